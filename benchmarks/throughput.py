"""Throughput: 1M records from table to table through a handler, against the same rows written by plain SQL.

The floor: one backend, `INSERT ... SELECT` of all rows, twice (in and out). Floor and Anton take turns, each
after a CHECKPOINT, and the medians are compared.
"""

from __future__ import annotations

import time

from benchmarks import proc
from benchmarks.harness import Row, Rows, Run, at_least, at_most, bench, median, middle
from benchmarks.server import Conn, connect
from benchmarks.subject import check, migrate, plain_table, source_table, wait_idle, worker

ROWS = 1_000_000


def _fill(conn: Conn, table: str) -> float:
    began = time.perf_counter()
    conn.execute(f"insert into {table} (n, s) select n, s from source")
    return time.perf_counter() - began


def floor_seconds(conn: Conn) -> float:
    """One run of the floor; `source`, `floor_in` and `floor_out` exist."""
    conn.execute("truncate floor_in, floor_out")
    conn.execute("checkpoint")
    seconds = _fill(conn, "floor_in") + _fill(conn, "floor_out")
    conn.execute("truncate floor_in, floor_out")
    return seconds


def against_floor(run: Run, app: str, rows: int, words: tuple[str, ...] = ()) -> tuple[Row, float]:
    """floor / Anton for app module `app`, whose handler copies bench_in to bench_out; and Anton's median seconds."""
    floors, antons, cpus = [], [], []
    with run.server.database(app) as url, connect(url) as conn:
        source_table(conn, rows)
        for name in ("floor_in", "floor_out", "bench_in", "bench_out"):
            plain_table(conn, name)
        migrate(url, app)
        with worker(conn, url, app, *words) as pid, proc.peak_rss(pid) as peak:
            for _ in range(run.times):
                floors.append(floor_seconds(conn))
                conn.execute("truncate bench_in, bench_out")
                wait_idle(conn)
                conn.execute("checkpoint")
                meter = proc.Meter(run.server.postmaster, pid)
                began = time.perf_counter()
                _fill(conn, "bench_in")
                antons.append(wait_idle(conn) - began)
                cpus.append(meter.per_million(rows))
                check(conn, "select n, s from source", "select n, s from bench_out")
    seconds = median(antons)
    detail = {
        "floor_s": [round(x, 3) for x in floors],
        "anton_s": [round(x, 3) for x in antons],
        "records_per_s": round(rows / seconds),
        "peak_rss_mb": round(peak[0], 1) if peak else None,
    }
    return Row(median(floors) / seconds, middle(cpus), detail), seconds


@bench(at_least("python_batch_vs_floor", 0.40), at_most("peak_rss_mb", 250, "MB"))
def python_batch(run: Run) -> Rows:
    row, _ = against_floor(run, "app_batch", run.size(ROWS, 200_000))
    return {"python_batch_vs_floor": row, "peak_rss_mb": Row(row.detail["peak_rss_mb"])}


@bench(at_least("python_typed_vs_floor", 0.20))
def python_typed(run: Run) -> Rows:
    return {"python_typed_vs_floor": against_floor(run, "app_typed", run.size(ROWS, 100_000))[0]}


@bench(at_least("python_record_vs_floor", 0.15))
def python_record(run: Run) -> Rows:
    return {"python_record_vs_floor": against_floor(run, "app_record", run.size(ROWS, 100_000))[0]}


@bench(at_least("sql_handler_vs_floor", 0.60))
def sql_handler(run: Run) -> Rows:
    return {"sql_handler_vs_floor": against_floor(run, "app_sql", run.size(ROWS, 200_000))[0]}
