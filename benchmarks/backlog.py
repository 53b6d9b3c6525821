"""Backlog: the claim's speed does not depend on how much lies in the queue, nor on what lies there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness import Row, Rows, Run, WrongResult, at_least, at_most, bench, median
from benchmarks.server import Conn, connect
from benchmarks.subject import check, migrate, number, plain_table, same_rows, source_table, wait_idle, worker

APP = "app_jobs"
_FILL = "insert into bench_in (n, s) select n, s from source limit {}"
_COPIED = ("select n, s from bench_in", "select n, s from bench_out")


@contextmanager
def _ready(run: Run, name: str, rows: int) -> Iterator[tuple[str, Conn]]:
    with run.server.database(name) as url, connect(url) as conn:
        source_table(conn, rows)
        for table in ("bench_in", "bench_out", "held_in"):
            plain_table(conn, table)
        migrate(url, APP)
        yield url, conn


def _drain(conn: Conn, url: str, rows: int) -> list[tuple[float, int]]:
    """Queues `rows` jobs, then works them; returns (seconds, records settled by then) for each receipt."""
    conn.execute("truncate bench_in, bench_out, anton.receipt, anton.output")
    conn.execute(_FILL.format(rows))
    conn.execute("checkpoint")
    with worker(conn, url, APP):
        wait_idle(conn, every=0.1)
    check(conn, *_COPIED)
    return _progress(conn)


def _progress(conn: Conn) -> list[tuple[float, int]]:
    rows = conn.execute("""
      select extract(epoch from at - min(at) over ()), sum(n) over (order by at, id)
        from anton.receipt where handler_id = (select id from anton.handler where name = 'work') order by at, id""")
    return [(float(str(at)), int(str(n))) for at, n in rows]


def _rate(progress: list[tuple[float, int]], first: float = 0.02, last: float = 1.0) -> float:
    """Records a second between two fractions of all that was settled; the worker's first breath is left out."""
    total = progress[-1][1]
    inside = [(at, n) for at, n in progress if first * total <= n <= last * total]
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


@bench(at_least("backlog_1m_jobs_ratio", 0.8))
def backlog_1m(run: Run) -> Rows:
    """Jobs a second over the first tenth of 1M queued single-record jobs, and over all, against a tenth alone."""
    rows = run.size(1_000_000, 100_000)
    with _ready(run, "backlog", rows) as (url, conn):
        before = _rate(_drain(conn, url, rows // 10))
        deep = _drain(conn, url, rows)
        after = _rate(_drain(conn, url, rows // 10))
    alone = median([before, after])
    detail = {
        "alone_per_s": [round(before), round(after)],
        "first_tenth_per_s": round(_rate(deep, last=0.1)),
        "all_per_s": round(_rate(deep)),
    }
    return {"backlog_1m_jobs_ratio": Row(min(_rate(deep, last=0.1), _rate(deep)) / alone, detail=detail)}


@bench(at_least("blocked_ahead_ratio", 0.8))
def blocked_ahead(run: Run) -> Rows:
    """Jobs a second with 300k paused, 100k delayed and 100k leased jobs ahead, against none."""
    rows = run.size(100_000, 20_000)
    with _ready(run, "blocked", rows) as (url, conn):
        alone = _rate(_drain(conn, url, rows))
        conn.execute("truncate bench_in, bench_out, anton.receipt, anton.output")
        conn.execute("select anton.pause('held')")
        for _ in range(3):
            conn.execute("insert into held_in (n, s) select n, s from source")
        _lease(conn, rows, 1)
        _lease(conn, rows, 2)
        conn.execute(
            "select anton.retry(token, id, array[lo], '1 hour', 'later', false) from anton.lease where token = 2"
        )
        blocked = [number(conn, f"select count(*) from anton.{table}") for table in ("job", "lease", "delayed")]
        if blocked != [3 * rows, rows, rows]:
            raise WrongResult(f"expected {3 * rows} paused, {rows} leased and {rows} delayed jobs, have {blocked}")
        conn.execute("truncate bench_in")
        conn.execute(_FILL.format(rows))
        conn.execute("checkpoint")
        with worker(conn, url, APP):
            end = time.monotonic() + 300
            while number(conn, "select count(*) from bench_out") < rows and time.monotonic() < end:
                time.sleep(0.2)
        same_rows(conn, *_COPIED)
        found = _rate(_progress(conn))
    return {
        "blocked_ahead_ratio": Row(found / alone, detail={"alone_per_s": round(alone), "blocked_per_s": round(found)})
    }


def _lease(conn: Conn, rows: int, token: int) -> None:
    """Queues `rows` jobs and leases them to a worker elsewhere for an hour."""
    conn.execute(_FILL.format(rows))
    conn.execute(f"""
      select count(*) from anton.handler h,
             anton.claim(anton.register_worker('elsewhere', 'elsewhere', 1, '0'), {token}::bigint,
                         array[h.id], array[{rows}], array[{rows}], array[0::bigint], '1 hour')
       where h.name = 'work'""")


@bench(at_least("old_xmin_ratio", 0.8))
def old_xmin(run: Run) -> Rows:
    """200k single-record jobs while one snapshot is held: the last tenth against the first."""
    rows = run.size(200_000, 20_000)
    with _ready(run, "old_xmin", rows) as (url, conn), connect(url) as holder:
        with worker(conn, url, APP):
            conn.execute(_FILL.format(5000))
            wait_idle(conn)
            conn.execute("truncate bench_in, bench_out, anton.receipt, anton.output")
            conn.execute("checkpoint")
            holder.execute("begin isolation level repeatable read")
            holder.execute("select 1")  # takes the snapshot, locks nothing
            conn.execute(_FILL.format(rows))
            wait_idle(conn, every=0.1)
        check(conn, *_COPIED)
        progress = _progress(conn)
    first, last = _rate(progress, 0, 0.1), _rate(progress, 0.9, 1)
    return {"old_xmin_ratio": Row(last / first, detail={"first_per_s": round(first), "last_per_s": round(last)})}


@bench(at_most("poison_ratio", 1.5))
def poison(run: Run) -> Rows:
    """Time to settle 100k records of which one is poison, against none."""
    rows = run.size(100_000, 20_000)
    clean: list[float] = []
    bad: list[float] = []
    with run.server.database("poison") as url, connect(url) as conn:
        source_table(conn, rows)
        for table in ("bench_in", "bench_out"):
            plain_table(conn, table)
        migrate(url, "app_poison")
        with worker(conn, url, "app_poison"):
            for _ in range(run.times):
                for seconds, text in ((clean, "s"), (bad, f"case when n = {rows // 2} then 'poison' else s end")):
                    conn.execute("truncate bench_in, bench_out, anton.dead")
                    conn.execute("checkpoint")
                    began = time.perf_counter()
                    conn.execute(f"insert into bench_in (n, s) select n, {text} from source")
                    seconds.append(wait_idle(conn) - began)
                    healthy = "select n, s from bench_in where s <> 'poison'"
                    check(conn, healthy, "select n, s from bench_out", dead=0 if seconds is clean else 1)
    detail = {"clean_s": [round(x, 2) for x in clean], "poison_s": [round(x, 2) for x in bad]}
    return {"poison_ratio": Row(median(bad) / median(clean), detail=detail)}
