"""Against Graphile Worker: enqueue and drain of trivial jobs in its fastest documented configuration.

Batches: Anton's records a second through a Python batch handler, output rows included, against graphile's jobs.
Small jobs: as many one-record jobs, each with a call of its own that does nothing, on both sides.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from benchmarks.harness import Row, Rows, Run, WrongResult, at_least, bench, median, middle
from benchmarks.peers import graphile
from benchmarks.peers.known import node_installed
from benchmarks.proc import Meter
from benchmarks.server import Conn, connect
from benchmarks.subject import check, migrate, number, plain_table, source_table, wait_idle, worker

JOBS = 200_000


@bench(at_least("python_batch_vs_graphile", 5), at_least("small_jobs_vs_graphile", 1.5))
def vs_graphile(run: Run) -> Rows:
    """In turns: graphile (with 1, 2 and 4 processes, the best of which counts), batches, small jobs."""
    node_installed()
    rows, jobs = run.size(1_000_000, 200_000), run.size(JOBS, 20_000)
    peer: dict[int, list[float]] = {1: [], 2: [], 4: []}
    batches: list[float] = []
    small: list[float] = []
    cpu: dict[str, list[float | None]] = {"batches": [], "small": []}
    with ExitStack() as stack:
        url_a, url_b = (stack.enter_context(run.server.database(f"vs_graphile_{x}")) for x in "ab")
        conn_a, conn_b = (stack.enter_context(connect(url)) for url in (url_a, url_b))
        for conn, url, app, n in ((conn_a, url_a, "app_batch", rows), (conn_b, url_b, "app_small", jobs)):
            source_table(conn, n)
            for table in ("bench_in", "bench_out"):
                plain_table(conn, table)
            migrate(url, app)
        for _ in range(run.times):
            for processes, rates in peer.items():
                rates.append(graphile.drain(run.server, jobs, processes).per_second)
            for conn, url, app, rates, spent in (
                (conn_a, url_a, "app_batch", batches, cpu["batches"]),
                (conn_b, url_b, "app_small", small, cpu["small"]),
            ):
                with worker(conn, url, app) as pid:
                    meter = Meter(run.server.postmaster, pid)
                    rate, settled = _drain(conn)
                    rates.append(rate)
                    spent.append(meter.per_million(settled))
            check(conn_a, "select n, s from source", "select n, s from bench_out")
            check(conn_b, "select 1 where false", "select 1 where false")
            called = number(conn_b, "select coalesce(sum(n - gone), 0) from anton.receipt")
            if called != jobs:
                raise WrongResult(f"{called} of {jobs} small jobs were settled")
    best = max(median(rates) for rates in peer.values())
    detail = {
        "graphile_jobs_per_s": {processes: [round(x) for x in rates] for processes, rates in peer.items()},
        "batch_records_per_s": [round(x) for x in batches],
        "small_jobs_per_s": [round(x) for x in small],
    }
    return {
        "python_batch_vs_graphile": Row(median(batches) / best, middle(cpu["batches"]), detail),
        "small_jobs_vs_graphile": Row(median(small) / best, middle(cpu["small"]), detail),
    }


def _drain(conn: Conn) -> tuple[float, int]:
    """Records a second from the insert of all rows of `source` until the last is settled."""
    conn.execute("truncate bench_in, bench_out, anton.receipt, anton.output")
    conn.execute("checkpoint")
    began = time.perf_counter()
    done = conn.execute("insert into bench_in (n, s) select n, s from source").rowcount
    return done / (wait_idle(conn) - began), done
