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
from benchmarks.peers.known import Peer, node_installed, peers, python_installed
from benchmarks.peers.program import Program
from benchmarks.server import Conn, Server, connect, server
from benchmarks.subject import number

RUNS = 2  # of each number of processes
PROCESSES = (1, 2)
PROBES, RATE, WARM = 500, 100, 50
KILLS = 3
WAIT = 90  # seconds for the work of killed workers to be done by others


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
            "seconds": round(time.monotonic() - began),
            "wait_s": WAIT,
            "kills": KILLS,
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
        "name": peer.name, "version": peer.version, "settings": peer.settings, "recovers": peer.recovers,
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
    """Enqueue in bulk with no worker, then drain, with 1 and with 2 processes; the better median counts."""
    jobs = peer.jobs // 10 if quick else peer.jobs
    runs: dict[int, list[tuple[float, float]]] = {}
    with database(place, peer, peer.kind) as (conn, program):
        for processes in PROCESSES:
            for _ in range(1 if quick else RUNS):
                conn.execute("checkpoint")
                enqueued = program.enqueue(jobs)
                working = [program.work() for _ in range(processes)]
                try:
                    began = time.perf_counter()
                    for worker in working:
                        worker.go()
                    if not drained(conn, peer, 120):
                        raise WrongResult(f"work was left after 120 s of draining {jobs} jobs")
                    runs.setdefault(processes, []).append((enqueued, time.perf_counter() - began))
                    seen = [worker.end()["calls"] for worker in working]
                finally:
                    for worker in working:
                        worker.kill()
                calls = max(seen) if peer.counts_all else sum(seen)
                if peer.kind == "noop" and calls != jobs:
                    raise WrongResult(f"{calls} calls for {jobs} jobs")
    best, seconds = min(((n, median(drain for _, drain in each)) for n, each in runs.items()), key=lambda x: x[1])
    enqueue = median(enqueued for each in runs.values() for enqueued, _ in each)
    return {
        "jobs": jobs,
        "processes": best,
        "enqueue_per_s": round(jobs / enqueue),
        "drain_per_s": round(jobs / seconds),
        "end_to_end_per_s": round(jobs / (enqueue + seconds)),
        "drain_s": {n: [round(drain, 3) for _, drain in each] for n, each in runs.items()},
    }


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
    """SIGKILL to a worker in the middle of its work, another started at once, three times; then up to 90 s."""
    count = peer.killed
    with database(place, peer, "insert", peer.lease) as (conn, program):
        program.enqueue(count)
        worker = program.work().go()
        try:
            for kill in range(1, KILLS + 1):
                done = number(conn, "select count(*) from effects")
                most = max(done, kill * count // 8)
                if not until(lambda most=most: number(conn, "select count(*) from effects") > most, 30):
                    raise WrongResult(f"after 30 s the worker had not written {most + 1} rows")
                worker.kill()
                killed = time.monotonic()
                worker = program.work().go()
            recovered = drained(conn, peer, (10 if quick else WAIT) - (time.monotonic() - killed))
            seconds = time.monotonic() - killed
        finally:
            worker.kill()
        lost, doubled = lost_and_doubled(conn, count)
    return {
        "killed_jobs": count,
        "recovery_s": round(seconds, 1) if recovered and not lost else None,
        "lost": lost,
        "doubled": doubled,
    }


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
