"""Migrate in a database in use: locks, other migrates, kills."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from pydantic import Field
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


@contextmanager
def others(url: str, *statements: str) -> Iterator[list[int]]:
    """Somebody runs the statements over and over, none of which may wait a second for a lock; how often they ran.

    Postgres itself measures that: a statement that waits longer fails, and so does the test.
    """
    ran: list[int] = [0]
    wrong: list[Exception] = []
    enough = threading.Event()

    def run() -> None:
        try:
            with psycopg.connect(url, autocommit=True) as conn:
                conn.execute("set lock_timeout = '1s'")
                while not enough.wait(0.005):
                    for statement in statements:
                        conn.execute(statement)
                    ran[0] += 1
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ran
    finally:
        enough.set()
        thread.join()
    assert not wrong


class Listening(Database):
    """Keeps what is sent by execute()."""

    def __init__(self, url: str) -> None:
        super().__init__(url, source="the test")
        self.sent: list[str] = []

    async def connect(self, database: str | None = None) -> Any:
        conn = await super().connect(database)
        original = conn.execute

        async def execute(*args: Any, **options: Any) -> str:
            self.sent.append(args[0])
            return str(await original(*args, **options))

        conn.execute = execute  # type: ignore[method-assign]
        return conn


def wait_for_requests(url: str, tables: str, number: int) -> None:
    """Waits until so many requests for a lock that nobody may share were seen waiting."""
    seen: set[Any] = set()
    with psycopg.connect(url, autocommit=True) as conn:
        while len(seen) < number:
            seen |= set(conn.execute(
                "select waitstart from pg_locks where not granted and relation::regclass::text ~ %s "
                "   and waitstart is not null and mode in ('AccessExclusiveLock', 'ShareRowExclusiveLock')", [tables]))


@pytest.mark.parametrize("partitioned", [False, True], ids=["table", "partitions"])
def test_nobody_waits_behind_a_migrate_that_waits_for_a_writer(shop, partitioned):
    """A writer is open while the migrate tries in vain, 20 times; it could be open for a minute, or for ever.

    No time is measured here, which a busy machine would spoil. What bounds the wait of others is how long our request
    stands in the queue before them, and Postgres ends it: each request is sent under the limit of 200 ms, for all
    partitions together. That it lets go in between is seen by the others: they go on, and none of them ever waits a
    second, as all would that stood behind a request that stays.
    """
    shop.sql("create table orders (id bigint primary key)" + (
        " partition by range (id); create table orders_1 partition of orders for values from (0) to (10); "
        "create table orders_2 partition of orders for values from (10) to (1000000000)" if partitioned else ""))
    shop.declare(lambda: Table("orders").on_new_records(lambda_named("seen")))
    shop.db = db = Listening(shop.url)
    with psycopg.connect(shop.url) as writer:
        writer.execute("insert into orders values (1)")
        with others(shop.url, "insert into orders select coalesce(max(id), 0) + 10 from orders",
                    "select count(*) from orders") as ran:
            migrating = threading.Thread(target=shop.migrate)
            migrating.start()
            try:
                wait_for_requests(shop.url, "^orders", 5)
                before = ran[0]
                wait_for_requests(shop.url, "^orders", 16)
                went_on = ran[0] - before
            finally:
                writer.commit()
                migrating.join()
    limit = "set local statement_timeout = '200ms'" if partitioned else "set local lock_timeout = '200ms'"
    limits = [begin for begin, body in pairwise(db.sent) if "sync_triggers" in body]
    assert len(limits) >= 20 and all(limit in begin for begin in limits)
    assert went_on > 20
    before = shop.sql("select count(*) from anton.job")[0][0]
    shop.sql("insert into orders values (2)")
    assert shop.sql("select count(*) from anton.job") == [(before + 1,)]


@pytest.mark.parametrize("change", [
    {"note": (str, "")},                                               # add column
    {"total": (Decimal, Field(ge=0))},                                 # add constraint, validate
])
def test_every_change_of_a_table_in_use_asks_for_its_lock_for_200_ms(shop, change):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders values (1, 'ann', 2)")
    plan = shop.declare(orders(grown(**change), unique=["customer"], index=["status"])).migrate()
    altering = [step for step in plan.steps if "orders" in step.title and "declared" not in step.title]
    assert len(altering) >= 4
    assert all("lock_timeout = '200ms'" in step.sql for step in altering)


def test_a_lock_on_some_partitions_only_is_let_go_of(shop):
    shop.sql("create table parts (id bigint primary key) partition by range (id)",
             *(f"create table parts_{n} partition of parts for values from ({n}) to ({n + 1})" for n in range(6)))
    shop.declare(lambda: Table("parts").on_new_records(lambda_named("seen")))
    with psycopg.connect(shop.url) as writer:
        writer.execute("insert into parts_4 values (4)")
        with others(shop.url, "insert into parts_0 values (0) on conflict do nothing"), pytest.raises(LockNotGained):
            shop.migrate(patience=1)
        writer.commit()
    shop.migrate()
    shop.sql("insert into parts_2 values (2)")
    assert shop.sql("select count(*) from anton.job") == [(1,)]


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
            async def connect(self, database: str | None = None) -> Any:
                conn = await super().connect(database)
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
