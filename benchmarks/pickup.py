"""Pick-up: from the reply to COMMIT until the handler's first line, both on this machine's monotonic clock."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench, percentile
from benchmarks.load import insert, inserting
from benchmarks.server import Conn, connect
from benchmarks.subject import check, migrate, number, same_rows, wait_for, wait_idle, worker

APP = "app_pickup"
_LOAD = "insert into probes (n) values (0 - :i::bigint)"
_NUMBERS = random.Random(1)


@contextmanager
def _ready(run: Run, name: str, doorbell: bool = True) -> Iterator[tuple[str, Conn]]:
    with run.server.database(name) as url, connect(url) as conn:
        conn.execute("create table probes (id bigint generated always as identity primary key, n bigint)")
        conn.execute("create table starts (id bigint generated always as identity primary key, n bigint, at bigint)")
        migrate(url, APP)
        if not doorbell:
            conn.execute("update anton.setting set value = 'off' where name = 'doorbell'")
            conn.execute("select anton.sync_triggers(id) from anton.watched")
        with worker(conn, url, APP):
            for _ in range(20):
                conn.execute("insert into probes (n) values (-1)")
            wait_idle(conn)
            yield url, conn


def probe(conn: Conn, table: str, n: int) -> int:
    """Inserts one probe; returns when its commit was known, in monotonic nanoseconds."""
    conn.execute(f"insert into {table} (n) values (%s)", (n,))
    return time.monotonic_ns()


def waits(conn: Conn, committed: dict[int, int]) -> list[float]:
    """Milliseconds from commit to start of each probe, once all work is done; raises WrongResult as check() does."""
    wait_idle(conn)
    check(conn, "select 1 where false", "select 1 where false")
    return since(conn, committed)


def since(conn: Conn, committed: dict[int, int]) -> list[float]:
    """The same while other work goes on; raises WrongResult when a probe was not started, or twice."""
    same_rows(conn, f"select n::bigint from generate_series(0, {len(committed) - 1}) n", "select n from starts")
    found = conn.execute("select n, at from starts").fetchall()
    return [max(0.0, (int(str(at)) - committed[int(str(n))]) / 1e6) for n, at in found]


def _probe_all(conn: Conn, count: int, shortest: float, longest: float) -> dict[int, int]:
    committed = {}
    for n in range(count):
        time.sleep(_NUMBERS.uniform(shortest, longest))
        committed[n] = probe(conn, "probes", n)
    return committed


def _summary(times: list[float]) -> dict[str, object]:
    return {"probes": len(times), **{f"p{q}_ms": round(percentile(times, q), 2) for q in (50, 90, 99, 100)}}


@bench(at_most("pickup_p50_ms", 3, "ms"), at_most("pickup_p99_ms", 20, "ms"))
def pickup(run: Run) -> Rows:
    with _ready(run, "pickup") as (_, conn):
        times = waits(conn, _probe_all(conn, run.size(1000, 200), 0.02, 0.08))
    return {
        "pickup_p50_ms": Row(percentile(times, 50), detail=_summary(times)),
        "pickup_p99_ms": Row(percentile(times, 99), detail=_summary(times)),
    }


@bench(at_most("pickup_loaded_p99_ms", 60, "ms"))
def pickup_loaded(run: Run) -> Rows:
    """Probes among single-row inserts at half the rate that is sustained until handled."""
    with _ready(run, "pickup_loaded") as (url, conn):
        began = time.perf_counter()
        done, _ = insert(url, _LOAD, run.size(8, 3))
        most = done / (wait_idle(conn) - began)
        count = run.size(1000, 200)
        with inserting(url, _LOAD, seconds=600, rate=most / 2) as process:
            time.sleep(1)
            committed = _probe_all(conn, count, 0.01, 0.03)
            if process.poll() is not None:
                raise WrongResult("the load ended before the probes did")
        times = waits(conn, committed)
    detail = {"sustained_per_s": round(most), "load_per_s": round(most / 2), **_summary(times)}
    return {"pickup_loaded_p99_ms": Row(percentile(times, 99), detail=detail)}


@bench(at_most("pickup_long_writer_p99_ms", 100, "ms"))
def pickup_long_writer(run: Run) -> Rows:
    """While another transaction that wrote to the same table stays open."""
    with _ready(run, "pickup_long_writer") as (url, conn), connect(url) as writer, writer.transaction():
        writer.execute("insert into probes (n) values (-1)")
        committed = {}
        for n in range(run.size(500, 100)):
            time.sleep(_NUMBERS.uniform(0.02, 0.1))
            committed[n] = probe(conn, "probes", n)
        times = waits(conn, committed)
    return {"pickup_long_writer_p99_ms": Row(percentile(times, 99), detail=_summary(times))}


@bench(at_most("pickup_polling_p99_ms", 100, "ms"))
def pickup_polling(run: Run) -> Rows:
    """With the doorbell switched off."""
    with _ready(run, "pickup_polling", doorbell=False) as (_, conn):
        times = waits(conn, _probe_all(conn, run.size(500, 100), 0.02, 0.15))
    return {"pickup_polling_p99_ms": Row(percentile(times, 99), detail=_summary(times))}


@bench(at_most("fair_pickup_p99_ms", 250, "ms"))
def fair_pickup(run: Run) -> Rows:
    """1,000 handlers with work, one of them 1M jobs deep: probes of the others."""
    deep, handlers, count = run.size(1_000_000, 100_000), run.size(1000, 100), run.size(1000, 200)
    os.environ["BENCH_HANDLERS"] = str(handlers)
    with run.server.database("fair") as url, connect(url) as conn:
        for i in range(handlers):
            conn.execute(f"create table fair_{i} (id bigint generated always as identity primary key, n bigint)")
        conn.execute("create table starts (id bigint generated always as identity primary key, n bigint, at bigint)")
        migrate(url, "app_fair")
        conn.execute(f"insert into fair_0 (n) select -1 from generate_series(1, {deep})")
        committed = {}
        with worker(conn, url, "app_fair"):
            for n in range(count):
                time.sleep(_NUMBERS.uniform(0.005, 0.015))
                committed[n] = probe(conn, f"fair_{1 + n % (handlers - 1)}", n)
            left = number(conn, "select count(*) from anton.job")
            if not left:
                raise WrongResult("the deep handler was done before the probes were")
            wait_for(lambda: number(conn, "select count(*) from starts") >= count, 60, "all probes to start")
        times = since(conn, committed)
    return {"fair_pickup_p99_ms": Row(percentile(times, 99), detail={"left_of_deep": left, **_summary(times)})}


@bench(at_most("fair_tenant_p99_ms", 250, "ms"))
def fair_tenant(run: Run) -> Rows:
    """One handler; tenant A has 1M records, written by statements of 1 and of 1,000 records: pick-up of tenant B's 10,
    which come one by one, again and again."""
    deep, count = run.size(1_000_000, 300_000), 10
    times, left = list[float](), list[int]()
    with run.server.database("fair_tenant") as url, connect(url) as conn:
        conn.execute("create table shared (id bigint generated always as identity primary key, n bigint)")
        conn.execute("create table starts (id bigint generated always as identity primary key, n bigint, at bigint)")
        migrate(url, "app_tenant")
        for _ in range(run.size(5, 1)):
            conn.execute("set anton.tenant = 'a'")
            conn.execute(f"do $$ begin for g in 1..{deep // 50} loop insert into shared (n) values (-1); end loop; "
                         f"for g in 1..{deep * 49 // 50 // 1000} loop insert into shared (n) "
                         "select -1 from generate_series(1, 1000); end loop; end $$")
            conn.execute("set anton.tenant = 'b'")
            conn.execute("truncate starts")
            committed = {}
            with worker(conn, url, "app_tenant"):
                wait_for(lambda: number(conn, "select count(*) from anton.receipt") > 0, 60, "work to begin")
                for n in range(count):
                    committed[n] = probe(conn, "shared", n)
                    time.sleep(_NUMBERS.uniform(0.02, 0.05))
                left.append(number(conn, "select coalesce(sum(hi - lo + 1), 0) from anton.job"))
                wait_for(lambda: number(conn, "select count(*) from starts") >= count, 60, "all probes to start")
            if not left[-1]:
                raise WrongResult("tenant A was done before B's probes were")
            times += since(conn, committed)
            conn.execute("delete from anton.job")
    return {"fair_tenant_p99_ms": Row(percentile(times, 99), detail={"left_of_a": left, **_summary(times)})}
