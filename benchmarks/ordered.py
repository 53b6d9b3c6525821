"""Ordered: what the order of each key costs, and whether it holds while workers are killed and records fail."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import Row, Rows, Run, WrongResult, at_least, at_most, bench
from benchmarks.server import Conn, connect
from benchmarks.subject import check, migrate, number, wait_for, wait_idle, worker, workers

KEYS = 10_000
TABLES = ("unordered", "inorder", "noted")


def _prepare(conn: Conn, url: str) -> None:
    for table in TABLES:
        conn.execute(f"create table {table} (id bigint generated always as identity primary key, customer int)")
    migrate(url, "app_ordered")


def _add(conn: Conn, table: str, records: int, keys: int = KEYS) -> None:
    conn.execute(f"insert into {table} (customer) select g::bigint * 7919 % {keys} "
                 f"from generate_series(1, {records}) g")


@bench(at_least("ordered_vs_unordered", 0.5))
def ordered(run: Run) -> Rows:
    """ordered=True for each of 10,000 keys against none: records that do nothing, two processes."""
    records, rates = run.size(1_000_000, 20_000), dict[str, list[float]]()
    for _ in range(run.times):
        for table in TABLES[:2]:
            with run.server.database("ordered") as url, connect(url) as conn:
                _prepare(conn, url)
                with worker(conn, url, "app_ordered", "--processes", "2"):
                    wait_for(lambda: workers(conn) >= 2, 60, "all processes to register")
                    began = time.perf_counter()
                    _add(conn, table, records)
                    rates.setdefault(table, []).append(records / (wait_idle(conn) - began))
                check(conn, "select 1 where false", "select 1 where false")
    best = {table: statistics.median(found) for table, found in rates.items()}
    detail: dict[str, object] = {"records_per_s": best, "records": records}
    return {"ordered_vs_unordered": Row(best["inorder"] / best["unordered"], detail=detail)}


def violations(notes: Iterable[tuple[int, int]]) -> int:
    """Runs of (key, number) that came after one with a greater number: a record runs again only before the next one."""
    last, wrong = dict[int, int](), 0
    for key, number_ in notes:
        before = last.get(key)
        wrong += before is not None and number_ < before
        last[key] = max(number_, before or 0)
    return wrong


def _kill(conn: Conn, owner: bool) -> bool:
    row = conn.execute("select w.pid from anton.worker w where stopped_at is null order by exists (select from "
                       "anton.permit p where p.worker_id = w.id and p.lease_until > anton.now()) = %s desc, random() "
                       "limit 1", (owner,)).fetchone()
    with contextlib.suppress(ProcessLookupError):
        if row is not None:
            os.kill(int(str(row[0])), signal.SIGKILL)
            return True
    return False


@bench(at_most("order_violations", 0, "records"))
def order_kept(run: Run) -> Rows:
    """Records of which one in 500 fails now and then, while workers are killed, mostly who has the handler."""
    records, kills, size = run.size(200_000, 5_000), 0, 0
    with (tempfile.TemporaryDirectory() as folder, run.server.database("ordered") as url, connect(url) as conn):
        notes = Path(folder, "notes")
        notes.touch()
        os.environ["BENCH_NOTES"] = str(notes)
        _prepare(conn, url)
        with worker(conn, url, "app_ordered", "--processes", "4"):
            _add(conn, "noted", records, KEYS // 10)
            end = time.monotonic() + 900
            while number(conn, "select count(*) from (select from anton.job limit 1) j"):
                if time.monotonic() > end:
                    raise WrongResult(f"{number(conn, 'select count(*) from anton.job')} jobs were left after 900 s")
                time.sleep(0.2)
                if notes.stat().st_size - size > records // 5:         # about a fiftieth of the records since the last
                    size = notes.stat().st_size
                    kills += _kill(conn, kills % 4 != 3)
            wait_idle(conn)
        check(conn, "select 1 where false", "select 1 where false")
        found = [(int(key), int(id)) for key, id in (line.split() for line in notes.read_text().splitlines())]
        left = number(conn, "select count(*) from anton.turn")
    times = Counter(id for _, id in found)
    if len(times) != records or left:
        raise WrongResult(f"{records - len(times)} records were never run, {left} wait for a turn")
    detail: dict[str, object] = {"records": records, "kills": kills, "runs": len(found),
                                 "most_runs": max(times.values())}
    return {"order_violations": Row(violations(found), detail=detail)}
