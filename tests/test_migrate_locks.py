"""Migrate in a database in use: locks, other migrates, kills."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import psycopg
import pytest
from shop import Order, Shop, grown, lambda_named, orders

from anton.db import Database
from anton.errors import LockNotGained
from anton.migrate import migrate
from anton.plan import Plan
from anton.table import Table


def test_two_at_once_wait_for_each_other(fresh):
    fresh.declare(lambda: (Table("orders", Order, index=["customer"]), Table("prompts")))

    async def both() -> list[Plan]:
        return await asyncio.gather(migrate(fresh.db, fresh.app), migrate(fresh.db, fresh.app))

    plans = asyncio.run(both())
    assert sorted(bool(plan.steps) for plan in plans) == [False, True]


def test_nobody_waits_behind_a_migrate_that_waits_for_a_writer(shop):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders values (1, 'ann', 2)")
    shop.declare(lambda: Table("orders", grown(note=(str, ""))).on_new_records(lambda_named("seen")))
    waits: list[float] = []
    done = threading.Event()

    def others() -> None:
        with psycopg.connect(shop.url, autocommit=True) as conn:
            n = 10
            while not done.is_set():
                n += 1
                started = time.monotonic()
                conn.execute(f"insert into orders (id, customer, total) values ({n}, 'bob', 1)")
                conn.execute("select count(*) from orders where id < 10")
                waits.append(time.monotonic() - started)
                done.wait(0.01)

    writer = psycopg.connect(shop.url)
    writer.execute("insert into orders (id, customer, total) values (2, 'eve', 1)")
    threads = [threading.Thread(target=others), threading.Timer(3, writer.commit)]
    for thread in threads:
        thread.start()
    try:
        shop.migrate()
    finally:
        done.set()
        for thread in threads:
            thread.join()
        writer.close()
    assert "note" in shop.columns("orders") and len(waits) > 20
    assert max(waits) < 0.4                                            # 2 × 200 ms: one statement each


def test_a_table_of_partitions_is_locked_at_once_or_not_at_all(shop):
    shop.sql("create table parts (id bigint primary key) partition by range (id)",
             *(f"create table parts_{n} partition of parts for values from ({n}) to ({n + 1})" for n in range(6)))
    shop.declare(lambda: Table("parts").on_new_records(lambda_named("seen")))
    with psycopg.connect(shop.url) as writer:
        writer.execute("insert into parts_4 values (4)")
        with pytest.raises(LockNotGained), psycopg.connect(shop.url, autocommit=True) as other:
            migrating = threading.Thread(target=lambda: waits.append(longest(other, "insert into parts_0 values (0) "
                                                                                    "on conflict do nothing", 1.5)))
            waits: list[float] = []
            migrating.start()
            try:
                shop.migrate(patience=1)
            finally:
                migrating.join()
        writer.commit()
    assert waits[0] < 0.3
    shop.migrate()
    shop.sql("insert into parts_2 values (2)")
    assert shop.sql("select count(*) from anton.job") == [(1,)]


def longest(conn: psycopg.Connection[Any], statement: str, seconds: float) -> float:
    """The longest time the statement took, tried for so many seconds."""
    end, worst = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        started = time.monotonic()
        conn.execute(statement)
        worst = max(worst, time.monotonic() - started)
    return worst


def test_a_lock_that_is_never_free_is_given_up_naming_its_holder(shop):
    shop.declare(orders()).migrate()
    shop.declare(orders(grown(note=(str, ""))))
    with psycopg.connect(shop.url) as writer:
        writer.execute("insert into orders (id, customer, total) values (2, 'eve', 1)")
        with pytest.raises(LockNotGained, match=rf"pid {writer.info.backend_pid}"):
            shop.migrate(patience=0.5)
        writer.rollback()
    shop.migrate()


def test_killed_at_any_statement_it_ends_well_when_run_again(server, tmp_path):
    def code() -> None:
        table = Table("orders", Order, unique=["customer"], index=["status"])
        table.on_updated_records(columns=["status"])(lambda_named("paid"))

    def schema(url: str) -> str:
        with psycopg.connect(url, autocommit=True) as conn:
            rows = conn.execute("""
                select 'table', c.relname, (select array_agg(attname || ' ' || atttypid::regtype order by attname)
                         from pg_attribute where attrelid = c.oid and attnum > 0)::text
                  from pg_class c where relnamespace in ('anton'::regnamespace, 'public'::regnamespace)
                union all select 'constraint', conname, pg_get_constraintdef(oid) from pg_constraint
                 where connamespace in ('anton'::regnamespace, 'public'::regnamespace)
                union all select 'trigger', tgname, tgrelid::regclass::text from pg_trigger where not tgisinternal
                union all select 'handler', name, ops::text from anton.handler
                union all select 'file', name, sha256 from anton.migration order by 1, 2, 3""").fetchall()
        return "\n".join(map(str, rows))

    def run(url: str, kill_at: int | None) -> bool:
        """Migrates; the server connection is killed before its nth statement. Returns whether it came to an end."""
        shop = Shop(url, tmp_path).declare(code)
        seen = 0

        class Killing(Database):
            async def connect(self) -> Any:
                conn = await super().connect()
                original = conn.execute

                async def execute(*args: Any, **options: Any) -> str:
                    nonlocal seen
                    if "idle_in_transaction" not in args[0]:
                        seen += 1
                        if seen == kill_at:
                            conn.terminate()
                    return str(await original(*args, **options))

                conn.execute = execute  # type: ignore[method-assign]
                return conn

        try:
            asyncio.run(migrate(Killing(url), shop.app))
        except Exception:
            return False
        return True

    clean = server.clone("template1")
    assert run(server.url(clean), None)
    wanted = schema(server.url(clean))
    server.drop(clean)
    for kill_at in range(1, 100):
        name = server.clone("template1")
        finished = run(server.url(name), kill_at)
        assert run(server.url(name), None)
        assert schema(server.url(name)) == wanted
        server.drop(name)
        if finished:
            break
    assert finished and kill_at > 8
