"""python -m benchmarks.peers [NAME ...]: Anton and other queues side by side, on one Postgres, in one run.

Writes benchmarks/results/peers.json and, from it, the tables in docs/benchmarks.md and the README (see report.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

from benchmarks.harness import WrongResult, median, percentile
from benchmarks.peers import report
from benchmarks.peers.known import PINNED, Peer, node_installed, peers, python_installed
from benchmarks.peers.program import Process, Program
from benchmarks.server import Conn, Server, connect, server
from benchmarks.subject import number

RUNS = 2  # of each number of processes
PROCESSES = (1, 2)
PROBES, RATE, WARM = 500, 100, 50
KILLS = 3
KILLED = 400  # jobs for each kill
QUICK_WAIT = 20
WRITTEN = "select count(*) from effects"
WAIT = 75  # seconds for the work of a killed worker to be done by another


def main() -> int:
    """0 when every peer was measured; a peer that failed has a row that says so."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="peers by the start of their name; default all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the jobs, nothing written: does it work?")
    parser.add_argument("--database", metavar="URL", help="a database on the server to use (default: an embedded one)")
    arguments = parser.parse_args()
    node_installed()
    python_installed()
    names = [name.lower() for name in arguments.names]
    chosen = [peer for peer in peers() if not names or any(peer.name.lower().startswith(name) for name in names)]
    began = time.monotonic()
    rows = []
    with server(arguments.database) as place:
        for peer in chosen:
            rows.append(measure(place, peer, arguments.quick))
            print(json.dumps(rows[-1]), flush=True)
        run = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "postgres": place.version,
            "cores": os.cpu_count(),
            "pinned": PINNED,
            "seconds": round(time.monotonic() - began),
            "wait_s": QUICK_WAIT if arguments.quick else WAIT,
            "kills": KILLS,
            "killed_jobs": KILLED,
            "probes": PROBES - WARM,
            "rate": RATE,
        }
    if len(rows) == len(peers()) and not arguments.quick:
        report.PATH.write_text(json.dumps({"run": run, "peers": rows}, indent=1) + "\n")
        report.write()
    print(report.table({"run": run, "peers": rows}))
    return any("error" in row for row in rows)


def measure(place: Server, peer: Peer, quick: bool) -> dict[str, Any]:
    """One peer's row."""
    row: dict[str, Any] = {
        "name": peer.name, "version": peer.version, "settings": peer.settings,
        "bulk": peer.bulk, "single": peer.single, "default": peer.default, "tuned": peer.tuned, "commits": peer.commits,
    }  # fmt: skip
    parts: list[Callable[[Server, Peer, bool], dict[str, Any]]] = [rates]
    if peer.rates_only:
        row["rates_only"] = True
    else:
        parts += [pickup, recovery]
    for part in parts:
        try:
            row |= part(place, peer, quick)
        except Exception as problem:  # its row says so; the others are measured
            traceback.print_exc()
            row["error"] = f"{part.__name__}: {type(problem).__name__}: {problem}"[:300]
    return row


@contextmanager
def database(place: Server, peer: Peer, kind: str, lease: float = 0) -> Any:
    """A database with the peer's tables and those that jobs write to; (connection, its programs)."""
    with ExitStack() as stack:
        url = stack.enter_context(place.database(f"peer_{kind}"))
        conn = stack.enter_context(connect(url))
        for table in ("starts (job bigint, at bigint", "effects (job bigint"):
            conn.execute(f"create table {table}, id bigint generated always as identity primary key)")
        program = Program(peer, url, kind, lease)
        program.install()
        yield conn, program


def rates(place: Server, peer: Peer, quick: bool) -> dict[str, Any]:
    """Enqueue in bulk with no worker, then drain, with 1 and with 2 processes; the better median counts.

    Then the same of jobs enqueued one by one; there only the enqueueing counts.
    """
    jobs, singles = ((peer.jobs // 10, peer.singles // 10) if quick else (peer.jobs, peer.singles))
    times = range(1 if quick else RUNS)
    runs: dict[int, list[tuple[float, float]]] = {}
    with database(place, peer, peer.kind) as (conn, program):
        for processes in PROCESSES:
            for _ in times:
                conn.execute("checkpoint")
                enqueued = program.enqueue(jobs)
                runs.setdefault(processes, []).append((enqueued, drain(conn, program, processes, jobs)))
        one_by_one = []
        for _ in times:
            conn.execute("checkpoint")
            one_by_one.append(program.single(singles))
            drain(conn, program, PROCESSES[-1], singles)
    best, seconds = min(((n, median(drain for _, drain in each)) for n, each in runs.items()), key=lambda x: x[1])
    enqueue = median(enqueued for each in runs.values() for enqueued, _ in each)
    return {
        "jobs": jobs,
        "singles": singles,
        "processes": best,
        "enqueue_per_s": round(jobs / enqueue),
        "single_per_s": round(singles / median(one_by_one)),
        "drain_per_s": round(jobs / seconds),
        "end_to_end_per_s": round(jobs / (enqueue + seconds)),
        "drain_s": {n: [round(drain, 3) for _, drain in each] for n, each in runs.items()},
    }


def drain(conn: Conn, program: Program, processes: int, jobs: int) -> float:
    """Seconds that so many workers, connected before, take for the jobs that are there; each was called once."""
    peer = program.peer
    working: list[Process] = []
    try:
        working += [program.work() for _ in range(processes)]
        began = time.perf_counter()
        for worker in working:
            worker.go()
        if not drained(conn, peer, 120):
            raise WrongResult(f"work was left after 120 s of draining {jobs} jobs")
        seconds = time.perf_counter() - began
        seen = [worker.end()["calls"] for worker in working]
    finally:
        for worker in working:
            worker.kill()
    calls = max(seen) if peer.counts_all else sum(seen)
    if peer.kind == "noop" and calls != jobs:
        raise WrongResult(f"{calls} calls for {jobs} jobs")
    return seconds


def pickup(place: Server, peer: Peer, quick: bool) -> dict[str, Any]:
    """Milliseconds from a known commit to the handler's first line, of jobs enqueued one by one at a fixed rate."""
    count = PROBES // 5 if quick else PROBES
    with database(place, peer, "start") as (conn, program):
        worker = program.work().go()
        try:
            with program.process("drip", str(count), str(RATE)) as dripping:
                time.sleep(2)  # the worker listens by now
                committed = dict(json.loads(dripping.go().answer()))
            if not drained(conn, peer, 60):
                raise WrongResult("work was left after the probes")
            started = worker.end()["starts"]
        finally:
            worker.kill()
    return waits(committed, started, WARM)


def waits(committed: dict[int, int], started: list[tuple[int, int]], warm: int) -> dict[str, float]:
    """p50 and p99 from the jobs' commits and starts in nanoseconds, without the first `warm` jobs."""
    if sorted(job for job, _ in started) != sorted(committed):
        raise WrongResult(f"{len(started)} starts of {len(committed)} probes")
    times = [max(0.0, (at - committed[job]) / 1e6) for job, at in started if job >= warm]
    return {f"pickup_p{q}_ms": round(percentile(times, q), 2) for q in (50, 99)}


def recovery(place: Server, peer: Peer, quick: bool) -> dict[str, Any]:
    """What kills do: to jobs that write by a connection of their own and as they commit, as it comes and tuned."""
    found = {}
    for writes in ("own", "commit") if peer.commits else ("own",):
        if peer.lease:
            found[writes] = {"default": killed(place, peer, writes, 0, 1, quick)} if writes == "own" else {}
            found[writes]["tuned"] = killed(place, peer, writes, peer.lease, 1 if quick else KILLS, quick)
        else:
            found[writes] = {"default": killed(place, peer, writes, 0, 1 if quick else KILLS, quick)}
    if peer.supervised:
        kills = 1 if quick else KILLS
        found["child"] = {"default": killed(place, peer, "own", 0, kills, quick, child=True)}
    return {"recovery": found}


def killed(
    place: Server, peer: Peer, kind: str, lease: float, kills: int, quick: bool, child: bool = False
) -> dict[str, Any]:
    """SIGKILL to a worker in the middle of `KILLED` jobs, another started at once; so many times, each on new jobs.

    child: only the worker's own process is killed, and the one that is its parent starts the next.
    seconds: from each kill until the peer's own tables hold no job; None when that took longer than `WAIT`.
    """
    wait = QUICK_WAIT if quick else WAIT
    seconds: list[float | None] = []
    with database(place, peer, kind, lease) as (conn, program):
        worker = program.work().go()
        try:
            for first in range(0, kills * KILLED, KILLED):
                written = number(conn, WRITTEN)
                program.enqueue(KILLED, first)
                if not until(lambda most=written + KILLED // 4: number(conn, WRITTEN) >= most, 30):
                    raise WrongResult(f"after 30 s the worker had not written {KILLED // 4} rows")
                (worker.kill_child if child else worker.kill)()
                began = time.monotonic()
                if number(conn, f"select count(distinct job) from effects where job >= {first}") == KILLED:
                    raise WrongResult("the worker had written everything before it was killed")
                if not child:
                    worker = program.work().go()
                done = drained(conn, peer, wait)
                seconds.append(round(time.monotonic() - began, 1) if done else None)
                if not done:
                    wait = 5  # what is there waits for longer than this run does
        finally:
            worker.kill()
        lost, doubled = lost_and_doubled(conn, kills * KILLED)
    return {
        "lease_s": lease or None, "kills": kills, "jobs": kills * KILLED, "seconds": seconds,
        "recovery_s": None if lost else max((each for each in seconds if each), default=None),
        "lost": lost, "doubled": doubled,
    }  # fmt: skip


def lost_and_doubled(conn: Conn, count: int) -> tuple[int, int]:
    """Of jobs 0 .. count-1: how many have no row in `effects`, how many more than one."""
    lost = f"select count(*) from generate_series(0, {count - 1}) n where n not in (select job from effects)"
    doubled = "select count(*) from (select from effects group by job having count(*) > 1) more"
    return number(conn, lost), number(conn, doubled)


def drained(conn: Conn, peer: Peer, seconds: float) -> bool:
    """Waits until the peer's own tables hold no job; False when that took longer."""
    return until(lambda: conn.execute(peer.left).fetchone() == (False,), seconds, 0.02)


def until(done: Callable[[], bool], seconds: float, every: float = 0.005) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


if __name__ == "__main__":
    sys.exit(main())
