"""python -m chaos [--minutes M] [--seed S] [FAULT | FAULT=N | bugs ...]

Without names all faults, as often as the minutes allow, the planted bugs, the state machine of the tests, long, and the
tests of the worker through PgBouncer.
60 minutes reach the N of every bar.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import traceback

import servers

from chaos import capacity, cell, every, report, wire  # noqa: F401  (every: faults register themselves)
from chaos.bugs import BUGS, Bug, planted
from chaos.faults import FAULTS, Result, amcheck
from chaos.report import FULL

FIXED = {
    name for name, (_, what) in FAULTS.items() if what.__module__ == capacity.__name__
}  # seconds and sizes that a bar names
TRIALS = 3  # of each bug
WORKER = ("ack", "everywhere", "handler", "lanes", "settle", "timeout", "worker")
MACHINES = ("state", "flow", "order", "rate")
TESTS: list[tuple[list[str], dict[str, str]]] = [
    (
        [*(f"tests/test_{name}_machine.py" for name in MACHINES), "-o", "faulthandler_timeout=900"],
        {"ANTON_EXAMPLES": "300", "ANTON_STEPS": "60"},
    ),
    ([f"tests/test_{name}.py" for name in WORKER], {"ANTON_TEST_POOLED": "1"}),
]


def done(server: servers.Server, template: str, name: str, n: int, seed: int) -> Result:
    """One fault in a database of its own."""
    with cell.Cell(server, template, seed) as one:
        result = FAULTS[name][1](one, n)
        if name in ("D1", "D2", "D3"):
            found = amcheck(server, one.name)
            result.verdict.require(not found, f"pg_amcheck: {found}")
        one.end()
    result.asked = n
    return result


def catch(server: servers.Server, template: str, bug: Bug, seed: int) -> tuple[int, str]:
    """In which trial a bug was caught, 0 for none; and by what, or what else was found."""
    found = ""
    for trial in range(1, TRIALS + 1):
        with planted(bug) as (files, statements):
            with cell.Cell(server, template, seed + trial, patched=files, sql=statements) as one:
                found = FAULTS[bug.fault][1](one, bug.n).verdict.text
                one.end()
        if re.search(bug.sign, found):
            return trial, found
    return 0, found


def controls(server: servers.Server, template: str, seed: int) -> Result:
    """How many of the planted bugs were caught, and after how many trials. Only those whose fault is clean without."""
    result, found = Result(), dict[str, str]()
    for fault, n in {bug.fault: bug.n for bug in BUGS}.items():
        found[fault] = done(server, template, fault, n, seed).verdict.text
        result.verdict.require(not found[fault], f"{fault} without a bug: {found[fault]}")
    for bug in BUGS:
        began = time.monotonic()
        trial, how = catch(server, template, bug, seed)
        counts = trial > 0 and not found[bug.fault]
        result.n += counts
        result.more[bug.name] = trial if counts else 0
        said = f"trial {trial} by {bug.fault}: {how[:80]}" if trial else f"MISSED by {bug.fault}: {how[:300]}"
        print(f"      {bug.name:<42}{said}  {time.monotonic() - began:.0f} s", flush=True)
    return result


def main() -> int:
    """The exit status: 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    share = min(1.0, given.minutes / 60)
    wanted: dict[str, int] = {}
    for word in given.names or [*FULL, "bugs"]:
        name, _, n = word.partition("=")
        if name != "bugs" and name not in FAULTS:
            parser.error(f'no fault "{name}"; there are: {", ".join(FAULTS)}, bugs')
        if name == "N3" and not wire.possible():
            why = "N3 takes root, to make a network of its own"
            if given.names or os.environ.get("CI"):
                parser.error(f"{why}; name the faults that are to be done")
            print(f"{why}: it is left out")
            continue
        full = FULL.get(name, 0)
        wanted[name] = int(n) if n else full if name in FIXED else max(min(full, 3), round(full * share))
    results: dict[str, Result] = {}
    with cell.cluster() as server:
        template = cell.make_template(server)
        shown = ("fsync", "synchronous_commit", "full_page_writes", "server_version")
        settings = (
            ", ".join(f"{name}={server.sql(f'show {name}')[0][0]}" for name in shown) + f", lease={cell.LEASE:g} s"
        )
        print(f"seed {given.seed}; {settings}", flush=True)
        for name, n in wanted.items():
            began = time.monotonic()
            try:
                results[name] = (
                    controls(server, template, given.seed)
                    if name == "bugs"
                    else done(server, template, name, n, given.seed)
                )
            except Exception as error:
                traceback.print_exc()
                results[name] = Result(asked=n)
                results[name].verdict.wrong.append(f"{type(error).__name__}: {error}")
            print(report.line(name, results[name]), f" {time.monotonic() - began:.0f} s", flush=True)
            for kept in report.save({name: results[name]}, given.seed):
                print(f"      {kept}: the longer run of earlier stays in {report.DETAIL}", flush=True)
        print(report.table(results, given.seed, settings))
    broken = False
    if not given.names:  # also when a bar was missed
        for files, more in TESTS:
            environment = {**os.environ, "ANTON_TEST_SERVER": "system", **more}
            words = [sys.executable, "-m", "pytest", "-q", *files]
            broken |= subprocess.run(words, cwd=cell.ROOT, env=environment, check=False).returncode != 0
    wrong = [name for name, result in results.items() if result.verdict.text]
    missed = [row["name"] for row in report.rows(results) if not row["ok"] and given.minutes >= 60]
    return 1 if wrong or missed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
