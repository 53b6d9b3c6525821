"""Faults: each a function that does one kind of harm n times, while producers write and workers work.

Named as in docs/reliability.md. A fault ends the load, waits for the drain, checks, and returns what it counted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import servers

from chaos.cell import Cell
from chaos.check import Verdict
from chaos.history import Producers
from chaos.proxy import Cut, Proxy

WORKERS = 3
MORTAL = 20  # deaths of one record at which it should have been a dead letter
SILENCE = 30.0  # seconds without an ack while producers go on, after which it is said
PATIENCE = 60.0  # seconds without any ack that a drain may have after the last fault


@dataclass
class Result:
    """What a fault came to. n: how often it was done, of the `asked`; more: what else was counted or measured.

    trials: how many independent ones that were, when not n; 0 for seconds, rows and the like, which say no chance.
    """

    n: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    more: dict[str, Any] = field(default_factory=dict)
    asked: int = 0
    trials: int | None = None

    @property
    def bound(self) -> str:
        """The chance of one failure, at 95 %; "-" when there were any."""
        return bound(self.n if self.trials is None else self.trials, bool(self.verdict.text))


def bound(trials: int, failed: bool = False) -> str:
    """With no failure in so many trials the chance of one is below this, at 95 %; "-" when there were failures, or
    fewer than five trials."""
    return f"< {300 / trials:.2g} %" if trials >= 5 and not failed else "-"


Fault = Callable[[Cell, int], Result]
FAULTS: dict[str, tuple[str, Fault]] = {}


def fault(name: str, what: str) -> Callable[[Fault], Fault]:
    """Registers a fault."""

    def register(function: Fault) -> Fault:
        FAULTS[name] = what, function
        return function

    return register


@contextmanager
def under_load(cell: Cell, result: Result, *, rate: float = 20, url: str | None = None) -> Iterator[Producers]:
    """Producers write meanwhile; afterwards all is drained and checked."""
    producers = cell.producers(rate, url)
    try:
        yield producers
    finally:
        producers.stop()
    if not cell.workers:
        cell.start(WORKERS)
    took = cell.drain(PATIENCE)
    result.verdict = cell.check()
    result.verdict.require(took is not None, f"not drained, and nothing acked for {PATIENCE:g} s")
    result.more |= {"drain_s": took, "operations": dict(cell.history.states)}


def percentile(values: list[float], q: float) -> float | None:
    """The smallest value that at least a share q of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


# Processes


@fault("P2", "rolling SIGTERM, as a deployment does")
def rolling(cell: Cell, n: int) -> Result:
    """Every worker is replaced in turn, and hands its jobs back."""
    result, seconds, left = Result(), list[float](), 0
    with under_load(cell, result):
        cell.start(WORKERS)
        for _ in range(n):
            time.sleep(cell.random.uniform(0.2, 0.6))
            old = cell.random.choice(sorted(cell.workers))
            cell.start()
            began = time.monotonic()
            cell.signal(old, signal.SIGTERM)
            while Path(f"/proc/{old}").exists() and time.monotonic() - began < 40:
                time.sleep(0.01)
            seconds.append(time.monotonic() - began)
            left += Path(f"/proc/{old}").exists()
            cell.workers.discard(old)
    result.n = n
    result.verdict.require(left == 0, f"{left} workers had not ended 40 s after SIGTERM")
    result.more |= {"drain_p99_s": percentile(seconds, 0.99)}
    return result


@fault("P3", "SIGSTOP just before the ack, until another worker has a lease of it; then SIGCONT")
def zombies(cell: Cell, n: int, seconds: float = 3.0) -> Result:
    """Stale acks tried, and how many of them were refused. Who took the lease is stopped meanwhile, and holds it."""
    result, asleep, takers = Result(), dict[int, dict[str, Any]](), dict[int, float]()
    woken, count, tried = set[int](), Counter[str](), 0
    with under_load(cell, result, rate=30):
        cell.start(4, point="before_ack", hits=3)
        cell.start(2, point="reaper_mid", hits=1)
        end = time.monotonic() + 30 + seconds * n
        while count["refused"] + count["accepted"] < n and time.monotonic() < end:
            time.sleep(0.03)
            for event in cell.look():
                if event["what"] == "stopped" and event["point"] == "before_ack":
                    asleep[event["pid"]] = event
                elif event["what"] == "stopped":
                    takers[event["pid"]] = time.monotonic()
                elif event["pid"] in woken and event["what"] in ("refused", "accepted"):
                    woken.discard(event["pid"])
                    count[event["what"]] += 1
            for pid, event in list(asleep.items()):
                (held,) = cell.one(
                    "select count(*) from anton.lease where token = %s and id = any(%s)", event["token"], event["ids"]
                )
                if held < len(event["ids"]):
                    del asleep[pid]
                    woken.add(pid)
                    tried += 1
                    cell.signal(pid, signal.SIGCONT)
            for pid, since in list(takers.items()):
                if time.monotonic() - since > 0.25:
                    del takers[pid]
                    cell.signal(pid, signal.SIGCONT)
        for pid in (*asleep, *takers):
            cell.signal(pid, signal.SIGCONT)
    result.n = count["refused"] + count["accepted"]
    result.verdict.require(not count["accepted"], f"{count['accepted']} stale acks were accepted")
    # who was woken and said nothing had heard of its lost lease from its heart, and dropped the work
    result.more |= {**count, "woken": tried}
    return result


@fault("P5", "a record that kills its process, beside innocent ones")
def poison(cell: Cell, n: int) -> Result:
    """Until n deaths; each such record has to be a dead letter, and none of its neighbours."""
    result, next_id = Result(), itertools.count(1)
    cell.start(2)
    deaths, rounds = 0, 0
    end = time.monotonic() + 60 + 20 * n
    while deaths < n and time.monotonic() < end:
        ids = [next(next_id) for _ in range(cell.random.randint(5, 30))]
        bad = cell.random.choice(ids)
        with psycopg.connect(cell.url) as conn:
            rows = [(id, "poison" if id == bad else "single") for id in ids]
            operation = cell.history.begin("risky", "many", ids)
            conn.cursor().executemany("insert into risky values (%s, %s)", rows) if rounds % 2 else conn.execute(
                "insert into risky select * from unnest(%s::bigint[], %s::text[])",
                tuple(map(list, zip(*rows, strict=True))),
            )
        cell.history.end(operation, "ok")
        cell.dead.setdefault("risk", Counter())[bad] += 1
        rounds += 1
        late = time.monotonic() + 120
        while (left := cell.left()) and deaths <= MORTAL * rounds and time.monotonic() < late:
            time.sleep(0.05)
            deaths = sum(event["what"] == "poison" for event in (cell.look(), cell.events)[1])
        deaths = sum(event["what"] == "poison" for event in (cell.look(), cell.events)[1])
        if left:
            break
    result.n, result.trials = deaths, rounds
    result.verdict = cell.check()
    result.verdict.require(deaths <= MORTAL * rounds, f"{deaths} deaths for {rounds} records")
    (result.more["innocent_dead"],) = cell.one(
        "select count(*) from anton.dead d join risky r on r.id = (d.key ->> 0)::bigint where r.kind <> 'poison'"
    )
    result.more |= {"records": rounds, "deaths_for_each": deaths / max(1, rounds)}
    return result


@fault("R1", "a record that a SQL handler fails at, beside innocent ones")
def bad_records(cell: Cell, n: int) -> Result:
    """Batches of every size up to 40 with one bad record."""
    result, next_id = Result(), itertools.count(1)
    cell.start(1)
    for size in itertools.islice(itertools.cycle(range(2, 41)), n):
        ids = [next(next_id) for _ in range(size)]
        bad = cell.random.choice(ids)
        with psycopg.connect(cell.url) as conn:
            operation = cell.history.begin("shaky", "many", ids)
            conn.execute(
                "insert into shaky select id, case when id = %s then 'bad' else '' end from unnest(%s::bigint[]) id",
                (bad, ids),
            )
        cell.history.end(operation, "ok")
        cell.dead.setdefault("shake", Counter())[bad] += 1
    took = cell.drain(PATIENCE)
    result.n = n
    result.verdict = cell.check()
    result.verdict.require(took is not None, "not drained")
    return result


# The database


def acks(cell: Cell) -> int:
    """A number that grows with each ack."""
    return int(cell.one("select coalesce(max(id), 0) from anton.receipt")[0])


def first_ack(cell: Cell) -> float:
    """Seconds until the next ack. Producers go on, so there is something to ack."""
    began, before = time.monotonic(), acks(cell)
    while acks(cell) == before and time.monotonic() - began < SILENCE:
        time.sleep(0.01)
    return time.monotonic() - began


def _crashes(cell: Cell, n: int, crash: Callable[[], None]) -> Result:
    result, seconds = Result(), list[float]()
    with under_load(cell, result):
        cell.start(WORKERS)
        for _ in range(n):
            time.sleep(cell.random.uniform(0.3, 1.5))
            crash()
            seconds.append(first_ack(cell))
    result.n = n
    result.verdict.require(max(seconds) < SILENCE, f"nothing was acked for {SILENCE:g} s")
    result.more |= {"first_ack_p50_s": percentile(seconds, 0.5), "first_ack_p99_s": percentile(seconds, 0.99)}
    return result


@fault("D1", "Postgres stopped with -m immediate, and started")
def restarts(cell: Cell, n: int) -> Result:
    """As a crash of the server would."""
    return _crashes(cell, n, lambda: servers.restart(cell.server, "immediate"))


@fault("D2", "one backend killed with -9; Postgres throws out all others")
def dead_backends(cell: Cell, n: int) -> Result:
    """A backend of this cell's database."""

    killed = 0

    def crash() -> None:
        nonlocal killed
        killed += kill_backend(cell)
        time.sleep(0.05)

    result = _crashes(cell, n, crash)
    result.n = killed
    return result


def kill_backend(cell: Cell) -> int:
    """One backend of this cell's database killed with -9, so that all others are thrown out; 0 when there was none."""
    (pids,) = cell.one(
        "select array_agg(pid) from pg_stat_activity where datname = current_database() "
        "and pid <> pg_backend_pid() and backend_type = 'client backend'"
    )
    with contextlib.suppress(ProcessLookupError):
        if pids:
            os.kill(cell.random.choice(pids), signal.SIGKILL)
            return 1
    return 0


@fault("D3", "the postmaster killed with -9, and started")
def dead_postmasters(cell: Cell, n: int) -> Result:
    """It cannot start before the last orphan has gone."""

    return _crashes(cell, n, lambda: kill_postmaster(cell))


def kill_postmaster(cell: Cell) -> None:
    """SIGKILL to the postmaster, and a new one."""
    file = cell.server.folder / "data" / "postmaster.pid"
    os.kill(int(file.read_text().split()[0]), signal.SIGKILL)
    end = time.monotonic() + 30
    while True:
        time.sleep(0.1)
        try:
            servers.start(cell.server)
            return
        except servers.NoServer:
            if time.monotonic() > end:
                raise


@fault("D5", "storms of pg_terminate_backend: half of all backends, every 200 ms")
def storms(cell: Cell, n: int) -> Result:
    """Whoever they belong to but the harness."""
    result, ended = Result(), 0
    with under_load(cell, result):
        cell.start(WORKERS)
        time.sleep(0.5)
        for storm in range(n):
            ended += cell.one(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() "
                "and pid <> pg_backend_pid() and random() < 0.5"
            )[0]
            time.sleep(1.0 if storm % 10 == 9 else 0.2)
    result.n = n
    result.more["terminated"] = ended
    return result


# The network


def through(cell: Cell) -> tuple[Proxy, str]:
    port = int(cell.url.split(":")[-1].split("/")[0])
    proxy = Proxy(port)
    return proxy, cell.url.replace(f":{port}/", f":{proxy.port}/")


@fault("D6", "COMMIT of a worker sent, its reply lost; also of producers, of single statements, and never arrived")
def lost_replies(cell: Cell, n: int) -> Result:
    """n counts COMMITs of workers that the server carried out; those of producers are lost beside them."""
    result = Result()
    proxy, url = through(cell)
    other, producers = through(cell)

    def choose(explicit: bool) -> Cut:
        dice = cell.random.random()
        if explicit:
            return "after" if dice < 0.06 else "before" if dice < 0.08 else None
        return "after" if dice < 0.004 else None

    try:
        with under_load(cell, result, url=producers):
            cell.start(WORKERS, url=url)
            time.sleep(1)
            proxy.choose = other.choose = choose
            end = time.monotonic() + 60 + 10 * n
            while proxy.counts["COMMIT"] < n and time.monotonic() < end:
                time.sleep(0.1)
                if cell.left() > 4000:
                    time.sleep(1)
            proxy.choose = other.choose = lambda explicit: None
    finally:
        proxy.close()
        other.close()
    result.n = proxy.counts["COMMIT"]
    result.more |= {"of_producers": other.counts["COMMIT"], "never_arrived": proxy.counts["before"]}
    return result


@fault("N1", "a silent partition for two leases between some workers and Postgres, the doorbell's connection included")
def partitions(cell: Cell, n: int) -> Result:
    """What was frozen is reset at the end, as a kernel that gives up does."""
    result, seconds = Result(), list[float]()
    proxy, url = through(cell)
    try:
        with under_load(cell, result):
            cell.start(2, url=url)
            cell.start(1)
            time.sleep(1)
            for _ in range(n):
                time.sleep(cell.random.uniform(0.3, 0.8))
                proxy.freeze()
                seconds.append(first_ack(cell))
                time.sleep(2 * cell.lease)
                proxy.heal()
    finally:
        proxy.close()
    result.n = n
    result.more |= {"first_ack_by_others_max_s": max(seconds, default=None)}
    return result


def amcheck(server: servers.Server, name: str) -> str:
    """What pg_amcheck finds wrong in a database; "" for nothing."""
    server.sql("create extension if not exists amcheck", database=name)
    done = subprocess.run(
        [server.bin / "pg_amcheck", "--heapallindexed", server.url(name)], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-500:]
