"""Writes: what a subscriber costs the writer of its table."""

from __future__ import annotations

import time

from benchmarks.harness import Row, Rows, Run, at_least, at_most, bench, median, middle
from benchmarks.load import insert
from benchmarks.proc import Meter
from benchmarks.server import Conn, connect
from benchmarks.subject import check, migrate, plain_table, source_table, wait_idle, worker

_ONE_ROW = "insert into {} (n, s) values (:i, 'abcdefghijklmnopqrst')"
_ROWS = "select n, s from {}"


def _rates(values: list[float]) -> list[int]:
    return [round(value) for value in values]


@bench(at_least("single_insert_vs_bare", 0.65))
def single_insert(run: Run) -> Rows:
    """Single-row inserts, 16 clients, one subscriber and no worker, against the same table without Anton."""
    seconds = run.size(8, 3)
    bare, captured, cpu = [], [], []
    with run.server.database("single_insert") as url, connect(url) as conn:
        for name in ("floor_in", "bench_in", "bench_out"):
            plain_table(conn, name)
        migrate(url, "app_batch")
        for _ in range(run.times):
            conn.execute("checkpoint")
            bare.append(insert(url, _ONE_ROW.format("floor_in"), seconds)[1])
            conn.execute("checkpoint")
            meter = Meter(run.server.postmaster)
            done, rate = insert(url, _ONE_ROW.format("bench_in"), seconds)
            cpu.append(meter.per_million(done))
            captured.append(rate)
        with worker(conn, url, "app_batch"):
            wait_idle(conn)
        check(conn, _ROWS.format("bench_in"), _ROWS.format("bench_out"))
    detail = {"bare_per_s": _rates(bare), "captured_per_s": _rates(captured)}
    return {"single_insert_vs_bare": Row(median(captured) / median(bare), middle(cpu), detail)}


@bench(at_least("single_row_sustained", 0.40))
def single_row_sustained(run: Run) -> Rows:
    """The same while a worker drains, over the whole time until the last row is handled."""
    seconds = run.size(10, 4)
    bare, sustained, cpu, lag = [], [], [], []
    with run.server.database("sustained") as url, connect(url) as conn:
        for name in ("floor_in", "bench_in", "bench_out"):
            plain_table(conn, name)
        migrate(url, "app_batch")
        with worker(conn, url, "app_batch") as pid:
            for _ in range(run.times):
                conn.execute("truncate floor_in, bench_in, bench_out")
                wait_idle(conn)
                conn.execute("checkpoint")
                bare.append(insert(url, _ONE_ROW.format("floor_in"), seconds)[1])
                conn.execute("checkpoint")
                meter = Meter(run.server.postmaster, pid)
                began = time.perf_counter()
                done, _ = insert(url, _ONE_ROW.format("bench_in"), seconds)
                written = time.perf_counter()
                ended = wait_idle(conn)
                cpu.append(meter.per_million(done))
                sustained.append(done / (ended - began))
                lag.append(round(ended - written, 2))
                check(conn, _ROWS.format("bench_in"), _ROWS.format("bench_out"))
    detail = {"bare_per_s": _rates(bare), "sustained_per_s": _rates(sustained), "drained_after_s": lag}
    return {"single_row_sustained": Row(median(sustained) / median(bare), middle(cpu), detail)}


@bench(at_least("fanout_10", 0.60))
def fanout(run: Run) -> Rows:
    """Ten subscribers against one: single-row inserts a second, and deliveries a second; the lower ratio counts."""
    seconds = run.size(8, 3)
    rows = run.size(100_000, 10_000)
    one: list[float] = []
    ten: list[float] = []
    with run.server.database("fanout") as url, connect(url) as conn:
        source_table(conn, rows * 10)
        for name in ("one_in", "one_out", "ten_in", "ten_out"):
            plain_table(conn, name)
        migrate(url, "app_fanout")
        for _ in range(run.times):
            for rates, table in ((one, "one_in"), (ten, "ten_in")):
                conn.execute("checkpoint")
                rates.append(insert(url, _ONE_ROW.format(table), seconds)[1])
        with worker(conn, url, "app_fanout"):
            wait_idle(conn)
            check(conn, _ROWS.format("one_in"), _ROWS.format("one_out"))
            check(conn, "select n, s from ten_in, generate_series(1, 10)", _ROWS.format("ten_out"))
            drains = [_deliver(conn, rows, table) for _ in range(run.times) for table in ("one", "ten")]
    writes, deliveries = median(ten) / median(one), median(drains[::2]) / median(drains[1::2])
    detail = {
        "inserts": writes,
        "deliveries": deliveries,
        "one_per_s": _rates(one),
        "ten_per_s": _rates(ten),
        "seconds_for_ten_times_as_many": [round(x, 2) for x in drains],
    }
    return {"fanout_10": Row(min(writes, deliveries), None, detail)}


def _deliver(conn: Conn, rows: int, table: str) -> float:
    """Seconds for 10 * `rows` deliveries: of as many rows to one subscriber, or of a tenth to ten."""
    conn.execute(f"truncate {table}_in, {table}_out")
    conn.execute("checkpoint")
    began = time.perf_counter()
    limit = rows * 10 if table == "one" else rows
    conn.execute(f"insert into {table}_in (n, s) select n, s from source where n <= {limit}")
    seconds = wait_idle(conn) - began
    expected = f"select n, s from source, generate_series(1, {rows * 10 // limit}) where n <= {limit}"
    check(conn, expected, _ROWS.format(f"{table}_out"))
    return seconds


@bench(at_most("update_images_vs_bare", 3.5))
def update_images(run: Run) -> Rows:
    """UPDATE of 1M rows, their old and new images kept for a subscriber, against the bare statement."""
    rows = run.size(1_000_000, 100_000)
    bare: list[float] = []
    captured: list[float] = []
    cpu, drained = [], []
    with run.server.database("update_images") as url, connect(url) as conn:
        source_table(conn, rows)
        for name in ("floor_in", "bench_in"):
            plain_table(conn, name)
        conn.execute("create table moved (id bigint generated always as identity primary key, records int, by int)")
        migrate(url, "app_images")
        for _ in range(run.times):
            for seconds, table in ((bare, "floor_in"), (captured, "bench_in")):
                conn.execute(f"truncate {table}")
                conn.execute(f"insert into {table} (n, s) select n, s from source")
                conn.execute(f"vacuum analyze {table}")
                conn.execute("checkpoint")
                meter = Meter(run.server.postmaster)
                began = time.perf_counter()
                conn.execute(f"update {table} set n = n + 1")
                seconds.append(time.perf_counter() - began)
            cpu.append(meter.per_million(rows))
            with worker(conn, url, "app_images"):
                began = time.perf_counter()
                drained.append(round(wait_idle(conn) - began, 2))
            check(conn, f"select {rows}::bigint, {rows}::bigint", "select sum(records), sum(by) from moved")
            conn.execute("truncate moved")
    detail = {"bare_s": [round(x, 2) for x in bare], "captured_s": [round(x, 2) for x in captured], "drain_s": drained}
    return {"update_images_vs_bare": Row(median(captured) / median(bare), middle(cpu), detail)}
