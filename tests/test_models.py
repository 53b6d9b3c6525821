"""Models: Tables that are kept by a SELECT, through migrate and a worker."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from decimal import Decimal
from typing import Any

import asyncpg
import psycopg
import pytest
from pydantic import BaseModel
from shop import Shop, lambda_named

from anton.db import Database, set_database
from anton.errors import (
    AntonError,
    BadOption,
    DatabaseError,
    DeclarationError,
    MigrationError,
    ReadOnly,
    SqlRefused,
    UnknownOption,
    UnknownTable,
)
from anton.rebuilt import Failed, Rebuilt
from anton.table import Table
from anton.worker import Worker

DAILY = """-- anton: model
-- refresh: orders
-- key: customer
select customer, count(*) as orders, sum(total) as total from orders group by customer;
"""
AGED = "update anton.model set built_at = built_at - interval '11 min'"
WAITING = "select count(*) from anton.job j join anton.handler h on h.id = j.handler_id where h.name = 'note'"
ORDERS = "create table orders (id int primary key, customer text, total numeric)"


class Daily(BaseModel):
    customer: str
    orders: int
    total: Decimal


def work(shop: Shop) -> None:
    asyncio.run(Worker(shop.db, shop.app).run_until_idle())


@pytest.fixture
def daily(shop: Shop) -> Shop:
    shop.sql(ORDERS, "insert into orders values (1, 'ann', 5), (2, 'bob', 7), (3, 'ann', 1)")
    shop.file("sql/daily.sql", DAILY)
    shop.migrate()
    return shop


def rows(shop: Shop, table: str = "daily") -> list[tuple[Any, ...]]:
    return sorted(shop.sql(f"select * from {table}"))


def test_a_model_is_a_table_that_migrate_makes_and_fills(daily):
    assert rows(daily) == [("ann", 2, Decimal(6)), ("bob", 1, Decimal(7))]
    assert daily.columns("daily") == {"customer": "text", "orders": "bigint", "total": "numeric"}
    assert not daily.migrate(check=True).drift


def test_a_model_that_is_renamed_keeps_its_table_its_grants_and_what_waits(daily):
    daily.sql("grant select on daily to public", "insert into orders values (4, 'cleo', 3)")
    table = daily.sql("select 'daily'::regclass::oid")
    handler = daily.sql("select id from anton.handler where name = 'daily:orders'")
    (daily.folder / "sql" / "daily.sql").unlink()
    daily.file("sql/by_customer.sql", DAILY.replace("-- key:", "-- was: daily\n-- key:"))
    assert any("rename_model" in step.body for step in daily.migrate(plan=True).steps)
    assert daily.sql("select to_regclass('by_customer')") == [(None,)]
    daily.migrate()
    assert daily.sql("select 'by_customer'::regclass::oid") == table
    assert daily.sql("select id from anton.handler where name = 'by_customer:orders'") == handler
    assert daily.sql("select has_table_privilege('public', 'by_customer', 'select'), to_regclass('daily')") == [
        (True, None)]
    work(daily)
    assert rows(daily, "by_customer") == [("ann", 2, Decimal(6)), ("bob", 1, Decimal(7)), ("cleo", 1, Decimal(3))]
    assert daily.sql("select name from anton.model") == [("by_customer",)]
    assert not daily.migrate(check=True).drift                         # the line may stay


def test_a_change_of_its_table_refreshes_it_and_only_what_differs_is_an_event(daily):
    def code() -> None:
        Table("seen", Seen)
        Table("daily", Daily, key="customer").on_changes(note)

    seen: list[tuple[str, str]] = []

    class Seen(BaseModel):
        id: int

    def note(records: Any) -> None:
        for change in records.changes:
            seen.append((change.op, (change.new or change.old).customer))

    daily.declare(code).migrate()
    work(daily)
    assert seen == []
    daily.sql("insert into orders values (4, 'cid', 3)", "update orders set total = 8 where id = 2",
              "delete from orders where customer = 'ann'")
    work(daily)
    assert rows(daily) == [("bob", 1, Decimal(8)), ("cid", 1, Decimal(3))]
    assert sorted(seen) == [("deleted", "ann"), ("new", "cid"), ("updated", "bob")]
    assert daily.sql("select count(*) from anton.job") == [(0,)]


def test_jobs_that_wait_together_are_one_refresh(daily):
    daily.sql(*(f"insert into orders values ({n}, 'eve', 1)" for n in range(100, 160)))
    daily.sql("insert into orders select g, 'flo', 1 from generate_series(1000, 9999) g")
    work(daily)
    assert daily.sql("select jobs, new_n, is_full from anton.model") == [(69, 2, True)]
    assert rows(daily)[2:] == [("eve", 60, Decimal(60)), ("flo", 9000, Decimal(9000))]
    assert daily.sql("select sum(n) from anton.receipt") == [(9060,)]


def test_a_refresh_that_changes_nothing_fires_nothing(daily):
    def code() -> None:
        Table("daily", Daily, key="customer").on_changes(lambda_named("note"))

    daily.declare(code).migrate()
    daily.sql("update orders set id = 99 where id = 2")
    assert daily.sql("select new, updated, deleted from anton.refresh('daily')") == [(0, 0, 0)]
    assert daily.sql("select count(*) from anton.job") == [(0,)]


def test_a_key_that_is_null_or_comes_twice_leaves_the_old_rows_and_the_handler_waits(daily):
    before = rows(daily)
    daily.sql("insert into orders values (5, null, 1)")
    work(daily)
    assert rows(daily) == before
    (error, failures), = daily.sql("select failing_error, failures from anton.handler where name = 'daily:orders'")
    assert 'model "daily": null value in column "customer"' in error and failures == 1
    assert daily.sql("select (select count(*) from anton.dead), (select count(*) from anton.job)") == [(0, 1)]
    daily.sql("delete from orders where customer is null", "select anton.refresh('daily')")
    assert daily.sql("select failing_since from anton.handler where name = 'daily:orders'") == [(None,)]
    daily.file("sql/daily.sql", DAILY.replace("group by customer", "group by customer, id"))
    with pytest.raises(AntonError, match=r"gives the key \(ann\) more than once"):
        daily.migrate()
    assert rows(daily) == before


def test_a_refresh_that_fails_is_told_once_for_each_reason_until_one_succeeds(daily):
    def code() -> None:
        table = Table("daily", Daily, key="customer")
        table.on_failed(told.append, name="failed")
        table.on_rebuilt(told.append, name="rebuilt")

    told: list[Any] = []
    probe = "update anton.handler set probe_at = anton.now() where failing_since is not null"
    daily.declare(code).migrate()
    daily.sql("insert into orders values (5, null, 1)")
    work(daily)
    daily.sql(probe)
    work(daily)
    failed, = told
    assert isinstance(failed, Failed) and failed.status == "error" and failed.run is None
    assert 'model "daily": null value in column "customer"' in failed.error
    daily.sql("insert into orders values (6, null, 1)", probe)
    work(daily)                                                        # (null, 2, 2) now
    assert len(told) == 2 and isinstance(told[1], Failed) and told[1].error != failed.error
    daily.sql("delete from orders where customer is null", probe)
    work(daily)
    assert len(told) == 3 and isinstance(told[2], Rebuilt)
    daily.sql("insert into orders values (5, null, 1)")
    work(daily)
    assert len(told) == 4 and isinstance(told[3], Failed)
    assert daily.sql("select count(*) from anton.dead") == [(0,)]


def test_sql_hears_of_a_refresh_that_fails(daily):
    daily.sql("create table alarms (id int generated always as identity primary key, said text)")
    daily.file("sql/alarm.sql", "-- anton: handler\n-- on: daily failed\ninsert into alarms (said) values ('daily')")
    daily.migrate()
    daily.sql("insert into orders values (5, null, 1)")
    work(daily)
    assert rows(daily, "alarms") == [(1, "daily")]


def test_a_refresh_by_the_clock_that_fails_is_told(daily):
    def code() -> None:
        Table("daily", Daily, key="customer").on_failed(told.append, name="failed")

    told: list[Any] = []
    daily.file("sql/daily.sql", DAILY.replace("refresh: orders", "refresh: @hourly"))
    daily.declare(code).migrate()
    daily.sql("insert into orders values (5, null, 1)", "select anton.run_schedule('daily:@hourly')")
    work(daily)
    failed, = told
    assert isinstance(failed, Failed) and 'null value in column "customer"' in failed.error


def test_python_writes_to_a_models_table_are_refused(daily, request):
    holder: dict[str, Table[Any]] = {}

    def code() -> None:
        holder["daily"] = Table("daily", Daily, key="customer")

    daily.declare(code).migrate()
    set_database(daily.db)
    table = holder["daily"]
    assert table.get("ann").total == 6
    request.addfinalizer(lambda: set_database(None))
    for write in (lambda: table.append({"customer": "x", "orders": 1, "total": 1}), lambda: table.extend([{}]),
                  lambda: table.upsert({"customer": "x", "orders": 1, "total": 1}),
                  lambda: table.select(customer="ann").update(orders=3), lambda: table.select(customer="ann").delete()):
        with pytest.raises(ReadOnly, match='"daily" is kept by the model daily'):
            write()


def test_a_changed_select_alters_the_table_in_place_and_rebuilds_it(daily):
    oid = daily.sql("select 'daily'::regclass::oid")
    daily.sql("grant select on daily to public", "alter table daily enable row level security")
    daily.file("sql/daily.sql", DAILY.replace("count(*) as orders, sum(total) as total",
                                              "sum(total)::int as total, max(id) as last"))
    plan = daily.migrate(plan=True)
    assert 'alter table public.daily drop column orders, drop column total, add column total integer' in plan.sql
    assert rows(daily)[0] == ("ann", 2, Decimal(6))
    daily.migrate()
    assert rows(daily) == [("ann", 6, 3), ("bob", 7, 2)] and daily.sql("select 'daily'::regclass::oid") == oid
    assert daily.sql("select relrowsecurity, relacl::text like '%=r/%' from pg_class where relname = 'daily'") == [
        (True, True)]
    assert not daily.migrate(check=True).drift
    daily.file("sql/daily.sql", DAILY.replace("key: customer", "key: customer, orders"))
    with pytest.raises(MigrationError, match=r'drop table public.daily; and run again'):
        daily.migrate()


def test_a_view_on_a_column_that_goes_is_said(daily):
    daily.sql("create view best as select total from daily")
    daily.file("sql/daily.sql", DAILY.replace(", sum(total) as total", ""))
    with pytest.raises(MigrationError, match="other objects depend on it"):
        daily.migrate()
    assert rows(daily)[0] == ("ann", 2, Decimal(6))


def test_models_on_models_are_made_and_refreshed_in_order(daily):
    daily.file("sql/all_days.sql", "-- anton: model\n-- refresh: daily\n-- key: one\n"
               "select 1 as one, sum(orders) as orders from daily")
    daily.migrate()
    assert rows(daily, "all_days") == [(1, Decimal(3))]
    daily.sql("insert into orders values (4, 'ann', 1)")
    work(daily)
    assert rows(daily, "all_days") == [(1, Decimal(4))]
    assert any("a loop" in note for note in daily.migrate().notes) is False
    daily.file("sql/daily.sql", DAILY.replace("refresh: orders", "refresh: orders, all_days"))
    with pytest.raises(MigrationError, match="in a circle: all_days -> daily -> all_days"):
        daily.migrate()


def test_a_model_by_the_clock_is_rebuilt_whole_and_its_pending_changes_with_it(daily):
    daily.file("sql/daily.sql", DAILY.replace("refresh: orders", "refresh: orders, @hourly")
               .replace("-- key", "-- incremental: orders.customer\n-- key"))
    daily.migrate()
    daily.sql("update daily set orders = 0", "insert into orders values (4, 'cid', 1)",
              "select anton.run_schedule('daily:@hourly')")
    work(daily)
    assert rows(daily) == [("ann", 2, Decimal(6)), ("bob", 1, Decimal(7)), ("cid", 1, Decimal(1))]
    assert daily.sql("select state from anton.tick") == [("done",)]
    assert not daily.migrate(check=True).drift


def test_with_max_wait_the_first_change_is_seen_at_once_and_later_ones_together(daily):
    daily.file("sql/daily.sql", DAILY.replace("-- key", "-- max_wait: 10m\n-- key"))
    daily.migrate()
    daily.sql(AGED, "insert into orders values (4, 'cid', 1)")
    work(daily)
    assert len(rows(daily)) == 3
    daily.sql("insert into orders values (5, 'dan', 1)", "insert into orders values (6, 'eve', 1)")
    work(daily)
    assert len(rows(daily)) == 3 and daily.sql("select count(*) from anton.delayed") == [(2,)]
    daily.sql("update anton.delayed set run_at = anton.now()", AGED)
    work(daily)
    assert len(rows(daily)) == 5 and daily.sql("select jobs from anton.model") == [(2,)]


def test_while_one_refresh_runs_others_wait_in_the_queue_and_not_in_a_transaction(daily):
    daily.sql("insert into orders values (4, 'cid', 1)")
    with psycopg.connect(daily.url) as other:
        other.execute("select from anton.model for no key update")
        claimed = daily.sql("select id from anton.claim(0, 7, array(select id from anton.handler where model_id > 0), "
                            "'{1}', '{1000}', '{0}', '1 min')")
        assert daily.sql(f"select anton.run_sql(7, array{[claimed[0][0]]}, 0)") == [(None,)]
        assert daily.sql("select count(*) from anton.delayed") == [(1,)] and daily.sql("table anton.lease") == []
    daily.sql("update anton.delayed set run_at = anton.now()")
    work(daily)
    assert len(rows(daily)) == 3


def test_a_table_that_is_no_models_is_not_taken(daily):
    daily.sql("create table mine (customer text primary key)")
    daily.file("sql/mine.sql", DAILY)
    with pytest.raises(DatabaseError, match='there is a table "public.mine", and it is none that a model keeps'):
        daily.migrate()


def test_a_model_that_vanished_leaves_an_ordinary_table(daily):
    (daily.folder / "sql/daily.sql").unlink()
    assert any("model daily is not in sql/ any more" in note for note in daily.migrate().notes)
    daily.sql("insert into orders values (4, 'cid', 1)")
    work(daily)
    assert len(rows(daily)) == 2 and daily.sql("select state from anton.models()") == [("missing",)]
    daily.file("sql/daily.sql", DAILY)
    daily.migrate()
    assert len(rows(daily)) == 3


def test_a_first_build_that_fails_is_made_up_for_without_events(shop):
    def code() -> None:
        Table("daily", Daily, key="customer").on_changes(lambda_named("note"))

    shop.sql(ORDERS, "insert into orders values (1, 'ann', 5), (2, null, 1)")
    shop.file("sql/daily.sql", DAILY)
    with pytest.raises(AntonError, match="null value in column"):
        shop.declare(code).migrate()
    shop.sql("delete from orders where id = 2")
    shop.migrate()
    assert rows(shop) == [("ann", 1, Decimal(5))]
    assert shop.sql(WAITING) == [(0,)]
    shop.sql("insert into orders values (3, 'cid', 1)", "select anton.refresh('daily')")
    assert shop.sql(WAITING) == [(1,)]


@pytest.mark.parametrize(("header", "error", "match"), [
    ("-- refresh: orders\n-- kee: a", UnknownOption, 'unknown option "kee" of sql/m.sql. Did you mean "key"'),
    ("-- refresh: orders", BadOption, "key="),
    ("-- key: a", BadOption, "refresh="),
    ("-- refresh: @sometimes\n-- key: a", BadOption, "@sometimes"),
    ("-- refresh: orders, 0 25 * * *\n-- key: a", BadOption, "0 25"),
    ("-- refresh: ordrs\n-- key: a", UnknownTable, 'Did you mean "orders"'),
    ("-- refresh: orders\n-- key: b", UnknownOption, 'unknown option "b" of key: of sql/m.sql'),
    ("-- refresh: orders\n-- key: a\n-- incremental: customers.id", BadOption, "customers.id"),
    ("-- refresh: orders\n-- key: a\n-- incremental: orders.custmer", UnknownOption, 'Did you mean "customer"'),
    ("-- refresh: orders\n-- key: a\n-- max_wait: soon", BadOption, "soon"),
    ("-- refresh: orders\n-- key: a\nselect 1;", DeclarationError, "holds 2 statements"),
    ("-- refresh: orders\n-- key: a\nselect\nnothing,", SqlRefused, 'sql/m.sql, line 5, column 1: column "nothing"'),
    ("-- refresh: orders\n-- key: a\nselect\n  custmer,", SqlRefused,
     r'sql/m.sql, line 5, column 3: column "custmer" does not exist. Did you mean "customer"\?\n    custmer,'),
    ("-- refresh: orders\n-- key: a\nselect (select 1 from ordrs) as b,", SqlRefused,
     r'line 4, column 23: relation "ordrs" does not exist. Did you mean "orders"\?'),
])
def test_a_header_that_cannot_be_is_refused(shop, header, error, match):
    shop.sql(ORDERS)
    select = "" if header.endswith(",") else "select "
    shop.file("sql/m.sql", f"-- anton: model\n{header}\n{select}customer as a from orders")
    with pytest.raises(error, match=match):
        shop.migrate()


def test_what_writes_into_a_model_is_refused(daily):
    def code() -> None:
        kept = Table("daily", Daily, key="customer")
        Table("prompts").on_new_records(lambda_named("make"), into=kept)

    with pytest.raises(BadOption, match="sql/daily.sql would undo what is written to it"):
        daily.declare(code).migrate()


def test_values_that_have_no_equality_are_compared_as_text(shop):
    shop.sql("create table docs (id int primary key, body json, at point)",
             "insert into docs values (1, '{\"a\":1}', '(1,2)'), (2, '{}', null)")
    shop.file("sql/copy.sql", "-- anton: model\n-- refresh: docs\n-- key: id\nselect * from docs")
    shop.migrate()
    assert shop.sql("select new, updated, deleted from anton.refresh('copy')") == [(0, 0, 0)]
    shop.sql("update docs set body = '[]' where id = 2", "update docs set at = '(1,3)' where id = 1")
    assert shop.sql("select new, updated, deleted from anton.refresh('copy')") == [(0, 2, 0)]


CHILD = """import asyncio, sys
from anton.app import App
from anton.db import Database
from anton.worker import Worker
asyncio.run(Worker(Database(sys.argv[1]), App("shop", sys.argv[2])).run_until_idle())"""


def test_a_worker_that_is_killed_in_a_refresh_leaves_nothing_of_it_and_another_makes_it_once(daily):
    def code() -> None:
        Table("daily", Daily, key="customer").on_changes(lambda_named("note"))

    daily.file("sql/daily.sql", DAILY.replace("from orders", "from orders, (select pg_advisory_xact_lock_shared(7)) l"))
    daily.declare(code).migrate()
    daily.sql("insert into orders values (4, 'cid', 3)")
    with psycopg.connect(daily.url, autocommit=True) as other:
        other.execute("select pg_advisory_lock(7)")
        child = subprocess.Popen([sys.executable, "-c", CHILD, daily.url, str(daily.folder)])
        while not other.execute("select exists (select from pg_locks where locktype = 'advisory' and objid = 7 "
                                "and not granted)").fetchone()[0]:
            assert child.poll() is None
        child.kill()
        child.wait()
        pid, _ = other.execute("select pid, pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' "
                               "and objid = 7 and not granted").fetchone()
        while other.execute("select from pg_stat_activity where pid = %s", [pid]).fetchone():
            pass                                                       # it holds the model until then
    assert len(rows(daily)) == 2 and daily.sql("select count(*) from anton.lease") == [(1,)]
    daily.sql("select anton.worker_died(max(id)) from anton.worker")
    work(daily)
    assert len(rows(daily)) == 3
    assert daily.sql("select h.name, r.n from anton.receipt r join anton.handler h on h.id = r.handler_id order by 1") \
        == [("daily:orders", 1), ("note", 1)]


def test_many_writers_and_two_workers_end_where_the_select_does(daily):
    daily.file("sql/daily.sql", DAILY.replace("-- key", "-- incremental: orders.customer\n-- key"))
    daily.migrate()

    async def write(n: int) -> None:
        conn = await asyncpg.connect(daily.url)
        for i in range(40):
            await conn.execute("insert into orders values ($1, $2, 1) on conflict (id) do update set customer = $3",
                               (n * 7 + i) % 50, f"c{i % 5}", f"c{(n + i) % 6}")
        await conn.close()

    async def race() -> None:
        other = Database(daily.url)
        workers = [Worker(db, daily.app) for db in (daily.db, other)]
        tasks = [asyncio.create_task(worker.run()) for worker in workers]
        await asyncio.gather(*map(write, range(4)))
        for worker in workers:
            worker.drain()
        await asyncio.gather(*tasks)
        await Worker(daily.db, daily.app).run_until_idle()

    asyncio.run(race())
    while daily.sql("select count(*) from anton.delayed") != [(0,)]:
        daily.sql("update anton.delayed set run_at = anton.now()")
        work(daily)
    assert rows(daily) == sorted(daily.sql(daily.sql("select body from anton.model")[0][0]))
    assert daily.sql("select failures from anton.handler where model_id is not null") == [(0,)]
