"""Database: locks, dumps, DDL, no connection left, one huge statement, a clock that jumps."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import psycopg
from psycopg import errors

from benchmarks.proc import rss_mb
from chaos.cell import APP, ROOT, Cell
from chaos.faults import WORKERS, Result, acks, fault, first_ack, under_load
from chaos.handlers import said

SHARED = 4  # rows of the table that everybody updates
WAIT = "200ms"  # that DDL keeps others waiting for


@fault("D7", "deadlocks and serialization failures between handlers, and with users")
def deadlocks(cell: Cell, n: int) -> Result:
    """Until n deadlocks: two handlers and users update four rows, each in its own order. Every update counts once."""
    result, ids, users = Result(), itertools.count(1), Counter[str]()
    added, enough = Counter[int](), threading.Event()
    cell.one(f"alter database {cell.name} set deadlock_timeout = '20ms'")

    def use(random: Random) -> None:
        with psycopg.connect(cell.url, autocommit=True) as conn:
            while not enough.wait(random.uniform(0, 0.02)):
                some = random.sample(range(1, SHARED + 1), 3)
                conn.isolation_level = random.choice(list(psycopg.IsolationLevel)[1:])
                try:
                    with conn.transaction():
                        for id in some:
                            conn.execute("update shared set n = n + 1 where id = %s", (id,))
                except (errors.DeadlockDetected, errors.SerializationFailure) as error:
                    users[type(error).__name__] += 1
                    continue
                users["committed"] += 1
                added.update(some)

    def met() -> int:
        (found,) = cell.one("select deadlocks from pg_stat_database where datname = current_database()")
        return int(found)

    threads = [threading.Thread(target=use, args=(Random(cell.seed + one),)) for one in range(2)]
    with under_load(cell, result):
        cell.start(2)
        for thread in threads:
            thread.start()
        end = time.monotonic() + 30 + n
        while met() < n and time.monotonic() < end:
            cell.add("clash", [next(ids) for _ in range(10)], "many")
            time.sleep(0.1)
            while cell.left() > 500 and time.monotonic() < end:
                time.sleep(0.1)
        enough.set()
        for thread in threads:
            thread.join()
    result.n = met()
    (records,) = cell.one("select count(*) from clash")
    with psycopg.connect(cell.url) as conn:
        found: dict[int, int] = dict(conn.execute("select id, n from shared").fetchall())
    across = {2: records, 3: records}
    for id in range(1, SHARED + 1):
        wanted = 2 * records + across.get(id, 0) + added[id]
        result.verdict.lost += max(0, wanted - found[id])
        result.verdict.doubled += max(0, found[id] - wanted)
        result.verdict.require(found[id] == wanted, f"shared row {id} is {found[id]}, not {wanted}")
    result.verdict.require(result.n >= n, f"{result.n} deadlocks in the time for {n}")
    result.more |= {"records": records, "users": dict(users)}
    return result


@contextmanager
def _everything(cell: Cell) -> Iterator[int]:
    """As pg_dump does: ACCESS SHARE on every table there is, under a snapshot; how many."""
    with psycopg.connect(cell.url) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        tables = [
            row[0]
            for row in conn.execute(
                "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname in ('public', 'anton')"
            )
        ]
        conn.execute(f"lock table {', '.join(tables)} in access share mode")
        yield len(tables)


@fault("D12b", "ACCESS SHARE on every table, as pg_dump takes it, during work and during migrate")
def dumps(cell: Cell, n: int) -> Result:
    """Acks go on, and migrate writes all triggers anew, while it is held."""
    result, seconds, acked = Result(n), list[float](), list[int]()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", "from anton.cli import main; raise SystemExit(main())", "--database", cell.url]
    with under_load(cell, result):
        cell.start(WORKERS)
        time.sleep(1)
        for _ in range(n):
            with _everything(cell) as tables:
                before, began = acks(cell), time.monotonic()
                done = subprocess.run(
                    [*words, "migrate"],
                    cwd=APP,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=60,
                )
                (written,) = cell.one("select count(anton.write_triggers(id, true)) from anton.watched")
                seconds.append(time.monotonic() - began)
                time.sleep(0.5)
                acked.append(acks(cell) - before)
                result.verdict.require(written > 0, "no table is watched")
                result.more["tables"] = tables
            if done.returncode:
                result.more["migrate"] = (done.stdout + done.stderr)[-300:]
    failed = result.more.get("migrate")
    result.verdict.require(failed is None, f"migrate: {failed}")
    result.verdict.require(min(acked) > 0, "nothing was acked meanwhile")
    result.verdict.require(max(seconds) < 30, f"migrate took {max(seconds):.1f} s")
    result.more |= {"migrate_max_s": max(seconds)}
    return result


DDL = (
    "alter table {table} add column extra int default 7",
    "alter table {table} alter column extra type bigint",
    "create index {name}_extra on {table} (extra)",
    "alter table {table} alter column {text} type varchar(80)",
    "alter table {table} drop column extra",
    "alter table {table} alter column {text} type text",
)


@fault("D13", "DDL on watched and written tables while they are worked")
def ddl(cell: Cell, n: int) -> Result:
    """Each statement waits 200 ms for its lock at most, and is tried again; none of them may take 10 s to get it."""
    result, tries, seconds, stalls = Result(n), 0, list[float](), list[float]()
    cell.one("alter table out_each add column note text")
    last, at = 0, time.monotonic()

    def look() -> None:
        nonlocal last, at
        found = acks(cell)
        if found != last:
            stalls.append(time.monotonic() - at)
            last, at = found, time.monotonic()

    with under_load(cell, result), psycopg.connect(cell.url, autocommit=True) as conn:
        cell.start(WORKERS)
        first_ack(cell)
        last, at = acks(cell), time.monotonic()
        conn.execute(f"set lock_timeout = '{WAIT}'")
        statements = itertools.cycle((text, table) for text in DDL for table in (("src", "kind"), ("out_each", "note")))
        for text, (table, column) in itertools.islice(statements, n):
            began = time.monotonic()
            while True:
                look()
                try:
                    conn.execute(text.format(table=table, name=table, text=column))
                    break
                except errors.LockNotAvailable:
                    tries += 1
                    if time.monotonic() - began > 10:
                        raise
                    time.sleep(cell.random.uniform(0, 0.1))
            seconds.append(time.monotonic() - began)
            end = time.monotonic() + cell.random.uniform(0.1, 0.5)
            while time.monotonic() < end:
                look()
                time.sleep(0.01)
    result.verdict.require(max(stalls) < 5, f"nothing was acked for {max(stalls):.1f} s")
    result.more |= {"ddl_max_s": max(seconds), "lock_timeouts": tries, "ack_stall_max_s": max(stalls)}
    return result


@fault("D11", "all connections taken by others for two seconds")
def full(cell: Cell, n: int) -> Result:
    """Workers lose theirs and get none; they wait, blame no record, and go on when there are some again."""
    result, seconds = Result(n), list[float]()
    (most,) = cell.one("select current_setting('max_connections')::int")
    with under_load(cell, result):
        cell.start(WORKERS)
        time.sleep(1)
        for _ in range(n):
            held = list[psycopg.Connection[Any]]()
            end, kicked, refused = time.monotonic() + 2.0, 0.0, 0
            while time.monotonic() < end or not refused:
                try:
                    held.append(psycopg.connect(cell.url, autocommit=True, connect_timeout=5))
                except psycopg.OperationalError:
                    refused += 1
                    end = max(end, time.monotonic() + 1.0) if refused == 1 else end
                    if time.monotonic() - kicked > 0.3:
                        kicked = time.monotonic()
                        cell.one(
                            "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = "
                            "current_database() and pid <> pg_backend_pid() and pid <> all (%s)",
                            [conn.info.backend_pid for conn in held],
                        )
            for conn in held:
                conn.close()
            seconds.append(first_ack(cell))
            time.sleep(0.5)
    result.verdict.require(
        max(seconds) < 10, f"nothing was acked for {max(seconds):.1f} s after there were connections"
    )
    result.more |= {"max_connections": most, "first_ack_max_s": max(seconds)}
    return result


@fault("A4", "one statement that writes n rows")
def huge(cell: Cell, n: int) -> Result:
    """Each is handled once; the worker and the statement stay within bounds."""
    result = Result(n, trials=0)
    (worker,) = cell.start(1, lease=30)
    time.sleep(1)
    before, peak = rss_mb(worker) or 0.0, 0.0
    operation = cell.history.begin("near", "one", range(1, n + 1))
    began = time.monotonic()
    cell.one("insert into near select id, '' from generate_series(1, %s) id", n)
    wrote = time.monotonic() - began
    cell.history.end(operation, "ok")
    (changes, jobs) = cell.one(
        "select (select count(*) from anton.change), "
        "(select count(*) from anton.job) + (select count(*) from anton.lease)"
    )
    end = time.monotonic() + 60 + n / 2000
    while cell.left() and time.monotonic() < end:
        peak = max(peak, rss_mb(worker) or 0.0)
        time.sleep(0.1)
    took = time.monotonic() - began
    result.verdict = cell.check()
    result.verdict.require(peak - before < 500, f"the worker grew by {peak - before:.0f} MB")
    result.more |= {
        "insert_s": wrote,
        "changes": changes,
        "jobs_after": jobs,
        "done_s": took,
        "records_per_s": n / took,
        "rss_before_mb": before,
        "rss_peak_mb": peak,
    }
    return result


def _jump(cell: Cell, seconds: float) -> None:
    """From now on the database's clock is so far ahead."""
    cell.one(
        "create or replace function anton.now() returns timestamptz language sql volatile as "
        f"$$ select pg_catalog.clock_timestamp() + interval '{seconds} seconds' $$"
    )


def _held(cell: Cell, pid: int) -> int:
    (n,) = cell.one(
        "select count(*) from anton.lease l join anton.worker w on w.id = l.worker_id where w.pid = %s", pid
    )
    return int(n)


def _kill_one(cell: Cell) -> int:
    """Kills a worker that holds a lease, with its supervisor; its pid, 0 when none did in 5 s."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        for pid in [pid for one in sorted(cell.workers) for pid in cell.children(one)]:
            cell.signal(pid, signal.SIGSTOP)
            if _held(cell, pid):
                cell.kill(pid, "any time", both=True)
                return pid
            cell.signal(pid, signal.SIGCONT)
            time.sleep(0.01)
    return 0


@fault("T2", "the database's clock jumps an hour ahead and an hour back")
def jumps(cell: Cell, n: int) -> Result:
    """Ahead all leases end at once: none is taken twice, nothing doubled. Back: work goes on; a worker that dies is
    noticed by its lease. It ends ahead of all times it had: what waits for a time would wait for an hour."""
    result, seconds, redo = Result(n), list[float](), list[float]()
    twice = 0

    def settle() -> None:
        """Until nobody holds what was taken from another."""
        nonlocal twice
        end = time.monotonic() + 10
        while time.monotonic() < end:
            (again, taken) = cell.one(
                "select count(*) filter (where together > 0 and alone or crashes > 0), "
                "count(*) filter (where together > 0 or alone) from anton.lease"
            )
            twice += again > 0
            if not taken:
                return
            time.sleep(0.02)

    with under_load(cell, result):
        cell.start(WORKERS)
        time.sleep(1)
        for ahead in itertools.islice(itertools.cycle((-3600, 0, 3600)), n):
            settle()
            _jump(cell, ahead)
            seconds.append(first_ack(cell))
            settle()
            time.sleep(cell.lease)  # what was held before the jump back is held until that time comes again
            if ahead == -3600 and (victim := _kill_one(cell)):
                began = time.monotonic()
                while _held(cell, victim) and time.monotonic() - began < 10:
                    time.sleep(0.05)
                redo.append(time.monotonic() - began)
                cell.start()
            time.sleep(cell.random.uniform(0.5, 1.0))
        settle()
        _jump(cell, 7200)
    result.verdict.require(twice == 0, f"a lease was taken twice ({twice} looks)")
    result.verdict.require(max(seconds) < 5, f"nothing was acked for {max(seconds):.1f} s after a jump")
    result.verdict.require(
        max(redo, default=0) < 8 * cell.lease, f"a dead worker's jobs were held for {max(redo, default=0):.1f} s"
    )
    result.more |= {
        "first_ack_max_s": max(seconds),
        "redo_max_s": max(redo, default=None),
        "taken": said(cell, "lease was lost"),
    }
    return result
