"""Migrate: files once, declared tables as far as nothing is lost, the catalogue; a plan is exactly what is run."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from pydantic import BaseModel, Field, create_model

from anton.app import App, declaring
from anton.db import Database
from anton.errors import (
    AntonError,
    BadOption,
    DatabaseError,
    Destructive,
    FrozenChanged,
    KeyNeeded,
    LockNotGained,
    MigrationError,
    MigrationFailed,
    MissingPrivilege,
    ModelMismatch,
    NearName,
    UnknownOption,
    UnknownTable,
)
from anton.migrate import makemigration, migrate
from anton.plan import Plan
from anton.table import Table


class Order(BaseModel):
    id: int
    customer: str
    total: Decimal
    status: Literal["new", "paid"] = "new"


class Shop:
    """An app in a folder of its own, and the database it is migrated into. declare() starts over with its code."""

    def __init__(self, url: str, folder: Path, name: str = "shop") -> None:
        self.url, self.folder, self.app = url, folder, App(name, folder)
        self.db = Database(url, source="the test")

    def declare(self, code: Callable[[], object]) -> Shop:
        self.app.clear()
        with declaring(self.app):
            code()
        return self

    def migrate(self, **options: Any) -> Plan:
        return asyncio.run(migrate(self.db, self.app, **options))

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            for statement in statements:
                done = conn.execute(statement)
            return done.fetchall() if done.description else []

    def file(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def columns(self, table: str) -> dict[str, str]:
        return dict(self.sql("select attname, format_type(atttypid, atttypmod) from pg_attribute where attrelid = "
                             f"'{table}'::regclass and attnum > 0 and not attisdropped order by attnum"))


@pytest.fixture
def shop(database, tmp_path) -> Iterator[Shop]:
    yield Shop(database, tmp_path)


@pytest.fixture
def fresh(bare, tmp_path) -> Iterator[Shop]:
    """The same on an empty database."""
    yield Shop(bare, tmp_path)


def orders(model: type[BaseModel] = Order, **options: Any) -> Callable[[], object]:
    return lambda: Table("orders", model, **options)


def ignore(records: Any) -> None:
    pass


# What is made

def test_a_plan_is_exactly_what_is_then_run_and_a_second_migrate_has_nothing_to_do(fresh):
    def code() -> None:
        table = Table("orders", Order, unique=[("customer", "status")], index=["customer"])
        prompts = Table("prompts")
        table.on_new_records(each=True, into=prompts, where="total > 5")(lambda_named("score"))
        prompts.on_new_records.sql("insert into orders (id, customer, total) select id, 'x', 1 from new_records",
                                   name="back")

    fresh.file("migrations/0001_make_ledger.sql", "create table ledger (n int);\ninsert into ledger values (1);")
    fresh.file("sql/totals.sql", "create or replace view totals as select sum(total) from orders;")
    fresh.declare(code)
    planned = fresh.migrate(plan=True)
    assert fresh.sql("select to_regnamespace('anton') is null, to_regclass('orders') is null") == [(True, True)]
    made = fresh.migrate()
    assert planned.sql == made.sql and planned.notes == made.notes
    assert fresh.sql("select n from ledger") == [(1,)]
    again = fresh.migrate(check=True)
    assert not again.drift and not again.sql


def lambda_named(name: str) -> Callable[[Any], Any]:
    def fn(record: Any) -> Any:
        return None

    fn.__name__ = name
    return fn


def test_what_a_plan_prints_does_the_same_by_psql(fresh, server):
    def code() -> None:
        table = Table("orders", Order, index=["customer"])
        table.on_updated_records(columns=["status"])(lambda_named("paid"))

    fresh.declare(code)
    script = fresh.migrate(plan=True).sql
    with psycopg.connect(fresh.url, autocommit=True) as conn:
        conn.execute(script)
    assert not fresh.migrate(check=True).drift


def test_a_model_less_table_has_id_created_at_and_data(shop):
    shop.declare(lambda: Table("prompts")).migrate()
    assert shop.columns("prompts") == {"id": "bigint", "created_at": "timestamp with time zone", "data": "jsonb"}
    assert shop.sql("insert into prompts (data) values ('{\"a\": 1}') returning id") == [(1,)]


def test_names_are_taken_as_written_and_quoted(shop):
    shop.sql('create schema "My Shop"')
    shop.declare(lambda: (Table('"My Shop"."Order"', Order, key=("id", "customer")), Table("select")))
    shop.migrate()
    assert shop.sql("""insert into "My Shop"."Order" values (1, 'a', 2)""",
                    'insert into "select" default values returning id') == [(1,)]
    assert not shop.migrate(check=True).drift


# Differences

def grown(**fields: Any) -> type[BaseModel]:
    return create_model("Order", __base__=Order, **fields)


def test_additive_changes_are_made(shop):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders values (1, 'ann', 2)")
    wider = grown(status=(Literal["new", "paid", "lost"], "new"), note=(str, "none"), n=(int | None, None),
                  tags=(list[str], Field(default=[], max_length=3)))
    shop.declare(orders(wider, unique=["customer"], index=["note"])).migrate()
    assert shop.sql("insert into orders values (2, 'bob', 3, 'lost') returning note, n, tags") == [("none", None, [])]
    for wrong in ("'x', 3, 'gone'", "'ann', 3, 'new'", "'y', 3, 'new', '', 1, '{1,2,3,4}'"):
        with pytest.raises(psycopg.IntegrityError):
            shop.sql(f"insert into orders values (3, {wrong})")
    assert not shop.migrate(check=True).drift


def test_what_only_loosens_is_made(shop):
    class Strict(BaseModel):
        id: int
        n: int = Field(ge=0, lt=10)
        price: Decimal = Field(max_digits=6, decimal_places=2)

    class Loose(BaseModel):
        id: int
        n: int | None = 5
        price: Decimal = Field(max_digits=9, decimal_places=2)

    shop.declare(lambda: Table("things", Strict, unique=["n"], index=["price"])).migrate()
    shop.declare(lambda: Table("things", Loose)).migrate()
    assert shop.sql("insert into things values (1, null, 1234567.89), (2, -7, 1), (3, -7, 1) returning n")
    assert shop.sql("insert into things (id, price) values (4, 1) returning n") == [(5,)]
    assert not shop.migrate(check=True).drift


@pytest.mark.parametrize("model, why, takes", [
    (create_model("Order", id=(int, ...), customer=(str, ...), total=(Decimal, ...)),
     'column "status" is not in Order any more', "alter table public.orders drop column status;"),
    (grown(total=(int, 0)), 'column "total" is numeric, Order says bigint',
     "alter table public.orders alter column total type bigint using total::bigint;"),
    (grown(due=(int, ...)), '"due" of Order has no default',
     "alter table public.orders alter column due set not null;"),
    (grown(status=(Literal["new"], "new")), "2 rows have what Order does not allow: (status in ('new'))",
     "drop constraint orders_status_check, add constraint"),
    (grown(total=(Decimal, Field(le=2))), "2 rows have what Order does not allow: (total <= 2)", "orders_total_check"),
    (grown(id=(int | None, None)), 'column "id" is given by the writer, Order says it is made by the database',
     "add generated by default as identity"),
])
def test_what_may_lose_data_is_refused_with_the_sql_it_would_take(shop, model, why, takes):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders values (1, 'ann', 9, 'paid'), (2, 'ann', 9, 'paid')")
    before = shop.columns("orders")
    shop.declare(lambda: (Table("orders", model), Table("other")))
    with pytest.raises(Destructive) as refused:
        shop.migrate()
    assert why in str(refused.value) and takes in str(refused.value)
    assert shop.columns("orders") == before and shop.sql("select to_regclass('other')") == [(None,)]
    plan = shop.migrate(check=True)
    assert plan.drift and str(plan.refused[0]) == str(refused.value)


def test_a_unique_that_rows_break_names_the_values(shop):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders values (1, 'ann', 9), (2, 'ann', 9)")
    with pytest.raises(Destructive, match=r"\(customer\) is to be unique, and \(ann\) is there more than once"):
        shop.declare(orders(unique=["customer"])).migrate()


def test_another_key_is_refused(shop):
    shop.declare(orders()).migrate()
    with pytest.raises(Destructive, match=r"its key is \(id\), Order says \(customer\)"):
        shop.declare(orders(key="customer")).migrate()


def test_makemigration_writes_down_what_was_refused_and_migrate_then_does_it(shop):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders values (1, 'ann', 9)")
    shop.declare(orders(create_model("Order", id=(int, ...), customer=(str, ...), total=(Decimal, ...))))
    path = asyncio.run(makemigration(shop.db, shop.app, "drop_status"))
    assert path.name == "0001_drop_status.sql" and "drop column status;" in path.read_text()
    assert not shop.migrate(plan=True).refused
    shop.migrate()
    assert "status" not in shop.columns("orders") and not shop.migrate(check=True).drift
    assert asyncio.run(makemigration(shop.db, shop.app, "more")).name == "0002_more.sql"
    with pytest.raises(MigrationError, match="is no name for a migration"):
        asyncio.run(makemigration(shop.db, shop.app, "Drop it"))


def test_a_renamed_field_is_offered_a_rename(shop):
    shop.declare(orders()).migrate()
    renamed = create_model("Order", id=(int, ...), client=(str, ...), total=(Decimal, ...), status=(str, "new"))
    with pytest.raises(Destructive, match="or, if it was renamed: .* rename column customer to client"):
        shop.declare(orders(renamed)).migrate()


def test_what_others_added_to_a_table_stays(shop):
    shop.declare(orders()).migrate()
    shop.sql("alter table orders add column note text, add constraint mine check (total < 100)",
             "create index mine_too on orders (note)")
    plan = shop.migrate()
    assert not plan.steps or all("triggers" in step.title for step in plan.steps)
    assert "note" in shop.columns("orders")


def test_a_large_table_is_changed_without_locking_others_out(shop):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders select n, repeat('x', 100) || n, 1 from generate_series(1, 80000) n")
    plan = shop.declare(orders(grown(total=(Decimal, Field(ge=0))), unique=["customer"], index=["status"])).migrate()
    assert "add constraint orders_total_check check (total >= 0) not valid" in plan.sql
    assert "create unique index concurrently orders_customer_key" in plan.sql
    assert "create index concurrently orders_status_idx" in plan.sql
    assert not shop.migrate(check=True).drift


# Files

def test_a_migration_runs_once_and_is_frozen(shop):
    shop.file("migrations/0001_make_ledger.sql", "create table ledger (n int);")
    shop.migrate()
    assert not shop.migrate().steps
    shop.file("migrations/0001_make_ledger.sql", "create table ledger (n bigint);")
    with pytest.raises(FrozenChanged, match=r"0001_make_ledger\.sql was changed after it had been run"):
        shop.migrate()


def test_the_sql_folder_runs_whole_again_when_a_file_changed(shop):
    shop.file("sql/a.sql", "create table if not exists runs (n int); insert into runs values (1);")
    shop.file("sql/b.sql", "create or replace function two() returns int language sql as 'select 2';")
    shop.migrate()
    shop.migrate()
    assert shop.sql("select count(*) from runs") == [(1,)]
    shop.file("sql/b.sql", "create or replace function two() returns int language sql as 'select 3';")
    shop.migrate()
    assert shop.sql("select count(*), two() from runs") == [(2, 3)]


@pytest.mark.parametrize("path", ["migrations/0001_x.sql", "sql/x.sql"])
def test_a_statement_that_fails_is_named_by_file_and_line_and_leaves_nothing(shop, path):
    shop.file("sql/a.sql", "select 1;\nselect 2;")
    for statement, says in (("select 'x'::int", "invalid input syntax"),
                            ("insert into half values (1)", "duplicate key")):
        shop.file(path, "create table half (n int primary key);\n\ninsert into half -- ;\n  values (1);\n"
                  f"do $do$ begin perform 1; end $do$;\n\n{statement};\n")
        for options in ({"plan": True}, {}):
            with pytest.raises(MigrationFailed, match=says) as failed:
                shop.migrate(**options)
            assert (failed.value.file, failed.value.line) == (path, 7)
        assert shop.sql("select to_regclass('half')") == [(None,)]


def test_sql_that_needs_declared_tables_waits_for_them_and_else_is_named(shop):
    shop.file("sql/view.sql", "create or replace view seen as\nselect customer, note from orders;")
    shop.declare(orders(grown(note=(str, ""))))
    assert shop.migrate(plan=True).sql == shop.migrate().sql
    shop.file("sql/view.sql", "create or replace view seen as\nselect custmer from orders;")
    for options in ({"plan": True}, {}):
        with pytest.raises(MigrationFailed, match=r'sql/view.sql, line 2: column "custmer" does not exist'):
            shop.migrate(**options)


def test_a_plan_does_not_try_files_that_hold_a_table_in_use_for_long(shop):
    shop.declare(orders()).migrate()
    shop.file("migrations/0001_slow.sql", "lock table orders; select pg_sleep(20);")
    started = time.monotonic()
    plan = shop.migrate(plan=True)
    assert time.monotonic() - started < 10 and "0001_slow.sql" in plan.sql and "were not tried" in plan.notes[-1]


def test_a_file_may_run_outside_a_transaction(shop):
    shop.sql("create table big (n int)")
    shop.file("migrations/0001_index_big.sql",
              "-- anton: no-transaction\ncreate index concurrently if not exists big_n on big (n);")
    assert "begin" not in next(step.sql for step in shop.migrate(plan=True).steps if "big_n" in step.sql)
    shop.migrate()
    assert shop.sql("select indisvalid from pg_index where indexrelid = 'big_n'::regclass") == [(True,)]
    assert not shop.migrate().steps


def test_an_older_anton_does_not_touch_what_a_newer_one_made(shop):
    shop.sql("insert into anton.migration (set_name, name, sha256) values ('anton', 'migrations/9999_future.sql', 'x')")
    with pytest.raises(MigrationError, match=r"migrated by a newer Anton: .*9999_future"):
        shop.migrate()


# Adopted tables

ADOPTED = ("create schema shop; create table shop.orders "
           "(id int primary key, customer varchar(80), total numeric(10,2), status text)")


def test_an_adopted_table_is_watched_and_never_altered(shop):
    shop.sql(ADOPTED, "insert into shop.orders values (1, 'ann', 2, 'new')")
    before = shop.columns("shop.orders")

    def code() -> None:
        Table("shop.orders", Order).on_updated_records(lambda_named("seen"))

    plan = shop.declare(code).migrate()
    assert shop.columns("shop.orders") == before and "alter" not in plan.sql
    assert shop.sql("select app, key_columns, key_kind from anton.watched where table_name = 'orders'") == [
        (None, ["id"], "id")]
    assert any("may be NULL" in note for note in plan.notes)


def test_a_model_that_does_not_fit_an_adopted_table_names_both_sides(shop):
    shop.sql("create type mood as enum ('new', 'odd')",
             "create table thing (id uuid primary key, custumer text, total text, status mood, at timestamp)")
    model = create_model("Thing", id=(int, ...), customer=(str, ...), total=(Decimal, ...),
                         status=(Literal["new"], "new"), at=(datetime, ...))
    with pytest.raises(ModelMismatch) as wrong:
        shop.declare(lambda: Table("thing", model)).migrate()
    for part in ('Thing.id is bigint, column "id" is uuid',
                 'Thing.customer has no column "customer". Did you mean "custumer"?',
                 'Thing.total is numeric, column "total" is text', "does not know 'odd', which mood has",
                 'column "at" is timestamp without time zone. Say pydantic.NaiveDatetime', "test_migrate.py"):
        assert part in str(wrong.value)


def test_an_adopted_key_that_the_model_does_not_name_is_told(shop):
    shop.sql("create table stock (sku text, place text, n int not null, primary key (sku, place))")
    model = create_model("Stock", sku=(str, ...), place=(str, ...), n=(int, ...))
    with pytest.raises(ModelMismatch, match=r"the key of Stock is \(id, made by the database\), that of the table is "
                                            r"\(sku, place\). Say key=\('sku', 'place'\)"):
        shop.declare(lambda: Table("stock", model)).migrate()
    shop.declare(lambda: Table("stock", model, key=("sku", "place"))).migrate()
    assert shop.sql("select key_columns from anton.watched where table_name = 'stock'") == [(["sku", "place"],)]


@pytest.mark.parametrize("ddl, kind", [
    ('create table "Odd Table" (a text, "Order" uuid primary key)', "key"),
    ('create table "Odd Table" (id bigint primary key) partition by range (id); '
     'create table "Odd 1" partition of "Odd Table" for values from (0) to (10)', "id"),
    ('create table "Odd Table" (a text not null, b text not null, unique (a, b))', "key"),
    ('create table "Odd Table" (a text)', "none"),
])
def test_tables_of_every_shape_are_adopted(shop, ddl, kind):
    shop.sql(ddl)
    shop.declare(lambda: Table("Odd Table").on_new_records(lambda_named("seen"))).migrate()
    assert shop.sql("select key_kind from anton.watched where table_name = 'Odd Table'") == [(kind,)]
    assert shop.sql("""select count(*) > 0 from pg_trigger where tgrelid = '"Odd Table"'::regclass""") == [(True,)]
    assert not shop.migrate(check=True).drift


def test_without_a_key_updates_are_refused_with_the_alter_that_would_allow_them(shop):
    shop.sql("create table log (at date not null, line text)")
    shop.declare(lambda: Table("log").on_updated_records(lambda_named("seen")))
    with pytest.raises(KeyNeeded, match=r"(?s)no primary key .*alter table public.log add primary key \(at\)"):
        shop.migrate()


def test_a_view_is_no_table(shop):
    shop.sql("create view seen as select 1 as id")
    with pytest.raises(DatabaseError, match="is a view: only ordinary and partitioned tables"):
        shop.declare(lambda: Table("seen")).migrate()


# Names

def test_a_new_name_two_letters_from_an_existing_one_is_taken_for_a_slip(shop):
    shop.declare(lambda: Table("prompts")).migrate()
    with pytest.raises(NearName, match='Did you mean "prompts"') as slip:
        shop.declare(lambda: (Table("prompts"), Table("promtps"))).migrate()
    assert "test_migrate.py" in str(slip.value)
    shop.declare(lambda: (Table("prompts2"), Table("propmts", Order))).migrate()      # said on purpose


def test_a_schema_that_is_not_there_is_named(shop):
    with pytest.raises(DatabaseError, match='no schema "shpo".*Did you mean "shop"'):
        shop.sql("create schema shop")
        shop.declare(lambda: Table("shpo.orders", Order)).migrate()


# Handlers

def handlers(shop: Shop) -> dict[str, tuple[bool, bool]]:
    return {name: (enabled, missing) for name, enabled, missing in
            shop.sql("select name, enabled, missing_at is not null from anton.handler where app = 'shop'")}


def test_a_handler_that_vanished_keeps_its_jobs_and_is_reported(shop):
    shop.declare(lambda: Table("prompts").on_new_records(lambda_named("score"))).migrate()
    shop.sql("insert into prompts default values")
    plan = shop.declare(lambda: Table("prompts")).migrate()
    assert "handler score is not in the code any more: it gets no new jobs, its 1 jobs are kept" in plan.notes
    shop.sql("insert into prompts default values")
    assert shop.sql("select count(*) from anton.job") == [(1,)] and handlers(shop) == {"score": (False, True)}
    assert not shop.migrate(check=True).drift
    shop.declare(lambda: Table("prompts").on_new_records(lambda_named("score"))).migrate()
    shop.sql("insert into prompts default values")
    assert shop.sql("select count(*) from anton.job") == [(2,)] and handlers(shop) == {"score": (True, False)}


def test_a_renamed_handler_keeps_its_jobs(shop):
    shop.declare(lambda: Table("prompts").on_new_records(lambda_named("score"))).migrate()
    shop.sql("insert into prompts default values")
    shop.declare(lambda: Table("prompts").on_new_records(was="score")(lambda_named("rate"))).migrate()
    assert handlers(shop) == {"rate": (True, False)}
    assert shop.sql("select h.name from anton.job j join anton.handler h on h.id = j.handler_id") == [("rate",)]


def test_two_apps_share_a_database_and_each_others_tables(shop, tmp_path):
    other = Shop(shop.url, tmp_path, "mail")
    shop.declare(lambda: Table("orders", Order).on_new_records(lambda_named("score"))).migrate()
    other.declare(lambda: Table("orders", Order).on_new_records(lambda_named("score"))).migrate()
    assert shop.sql("select app, enabled from anton.handler order by app") == [("mail", True), ("shop", True)]
    with pytest.raises(ModelMismatch):                                 # the table is the shop's to change
        other.declare(lambda: Table("orders", grown(note=(str, "")))).migrate()
    assert not shop.migrate(check=True).drift


def test_a_filter_that_does_not_fit_is_refused_and_the_rest_is_done(shop):
    def code() -> None:
        table = Table("orders", Order)
        table.on_new_records(where="totl > 5")(lambda_named("bad"))
        table.on_new_records(where="total > 5")(lambda_named("good"))

    with pytest.raises(BadOption, match="totl"):
        shop.declare(code).migrate()
    assert list(handlers(shop)) == ["good"]


def test_existing_rows_are_counted_or_fed(shop):
    shop.sql("create table old (id int primary key)", "insert into old select generate_series(1, 1480)")
    plan = shop.declare(lambda: Table("old").on_new_records(lambda_named("score"))).migrate()
    assert "1,480 existing rows not handled: anton handlers backfill score" in plan.notes

    def code() -> None:
        Table("old").on_new_records(since="beginning")(lambda_named("all"))

    shop.declare(code).migrate()
    assert shop.sql("select h.name from anton.backfill b join anton.handler h on h.id = b.handler_id") == [("all",)]
    assert not shop.migrate(check=True).drift


def test_a_filter_on_a_new_column_is_planned_and_made(shop):
    shop.declare(orders()).migrate()
    shop.sql("insert into orders values (1, 'ann', 2)")

    def code() -> None:
        Table("orders", grown(note=(str, "")), index=["note"]).on_new_records(where="note <> ''")(lambda_named("noted"))

    shop.declare(code)
    planned = shop.migrate(plan=True)
    assert planned.sql == shop.migrate().sql and not planned.refused


def test_handlers_that_feed_each_other_are_named(shop):
    def code() -> None:
        first, second = Table("first"), Table("second")

        def there(records: Any) -> None:
            for record in records:
                second.append({"n": record["n"]})

        first.on_new_records(there)
        second.on_new_records.sql("insert into first (data) select data from new_records", name="back")

    plan = shop.declare(code).migrate()
    loop = next(note for note in plan.notes if note.startswith("a loop"))
    assert "public.first new -> there -> public.second new -> back -> public.first new" in loop
    assert "test_migrate.py" in loop


def test_a_sql_file_with_a_header_is_a_handler_or_a_schedule(shop):
    shop.file("sql/flag_big.sql", "-- anton: handler\n-- on: orders new\n-- where: total > 100\n-- timeout: 30s\n"
              "insert into big (id) select id from new_records;")
    shop.file("sql/clean.sql", "-- anton: schedule\n-- cron: 0 3 * * *\n-- tz: Europe/Berlin\ndelete from big;")
    shop.file("sql/plain.sql", "create or replace view one as select 1 as one;")
    shop.declare(lambda: (Table("orders", Order), Table("big", create_model("Big", id=(int, ...))))).migrate()
    assert shop.sql("select name, kind, where_sql, timeout::text, ops from anton.handler where name = 'flag_big'") == [
        ("flag_big", "sql", "total > 100", "00:00:30", ["new"])]
    assert shop.sql("select name, cron, tz from anton.schedule") == [("clean", "0 3 * * *", "Europe/Berlin")]
    assert shop.sql("select one from one") == [(1,)] and not shop.migrate(check=True).drift


@pytest.mark.parametrize("header, error, says", [
    ("-- anton: handler\n-- on: orders", BadOption, "a table and what happens to it"),
    ("-- anton: handler\n-- on: orders nwe", BadOption, '"orders nwe"|orders nwe'),
    ("-- anton: handler\n-- on: ordres new", UnknownTable, 'no table "ordres".*Did you mean "orders"'),
    ("-- anton: handler\n-- on: orders new\n-- wehre: true", UnknownOption, 'Did you mean "where"'),
    ("-- anton: handler\n-- on: orders new\n-- batch: many", BadOption, "a whole number"),
    ("-- anton: hanlder", AntonError, "means nothing"),
    ("-- anton: schedule", BadOption, "five cron fields"),
])
def test_a_header_that_is_wrong_is_named(shop, header, error, says):
    shop.file("sql/flag.sql", header + "\nselect 1;")
    with pytest.raises(error, match=says):
        shop.declare(orders()).migrate()


# Locks, kills, rights

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


def as_role(url: str, role: str) -> str:
    return re.sub(r"//postgres(:[^@/]*)?@", f"//{role}@", url)


@pytest.fixture
def limited(server, bare) -> Iterator[str]:
    """The URL of an empty database for a role that may little."""
    server.sql("drop role if exists clerk", "create role clerk login")
    yield as_role(bare, "clerk")
    server.drop(bare.partition("?")[0].rpartition("/")[2])
    server.sql("drop role clerk")


def test_without_the_right_to_make_a_schema_it_says_what_to_run(limited, tmp_path):
    with pytest.raises(MissingPrivilege, match=r"grant create on database \w+ to clerk;"):
        Shop(limited, tmp_path).migrate()


def test_missing_rights_are_collected_and_the_rest_goes_on(limited, server, tmp_path):
    name = limited.partition("?")[0].rpartition("/")[2]
    server.sql(f"grant create on database {name} to clerk")
    server.sql("create schema shop", "create table shop.orders (id int primary key, customer text)",
               "grant usage on schema shop to clerk", "grant create on schema public to clerk", database=name)
    shop = Shop(limited, tmp_path)

    def code() -> None:
        Table("shop.orders").on_new_records(lambda_named("seen"))
        Table("prompts").on_new_records(lambda_named("score"))

    plan = shop.declare(code).migrate()
    assert "grant select, trigger on table shop.orders to clerk;" in plan.dba
    assert shop.sql("insert into prompts default values returning id") == [(1,)]
    server.sql(*plan.dba, database=name)
    assert not shop.migrate().dba
    server.sql("insert into shop.orders values (1)", database=name)
    assert shop.sql("select count(*) from anton.job") == [(2,)]
    assert not shop.migrate(check=True).drift


def test_the_runtime_belongs_to_a_role_nobody_logs_in_as(shop):
    owners = shop.sql("select relowner from pg_class where relnamespace = 'anton'::regnamespace "
                      "union select proowner from pg_proc where pronamespace = 'anton'::regnamespace")
    role = shop.sql("select oid, rolname, rolcanlogin, rolsuper from pg_roles where rolname = 'anton_owner'")[0]
    assert owners == [(role[0],)] and role[1:] == ("anton_owner", False, False)


def test_a_role_that_may_make_roles_gives_the_runtime_an_owner(server, bare, tmp_path):
    name = bare.partition("?")[0].rpartition("/")[2]
    server.sql("drop role if exists chief", "create role chief login createrole",
               f"grant create on database {name} to chief")
    server.sql("grant create on schema public to chief", database=name)
    app = App("shop", tmp_path)
    with declaring(app):
        Table("orders").on_new_records(lambda_named("seen"))
    db = Database(as_role(bare, "chief"), schema="cell_two")
    planned, made = asyncio.run(migrate(db, app, plan=True)), asyncio.run(migrate(db, app))
    assert planned.sql == made.sql and not asyncio.run(migrate(db, app, check=True)).drift
    done = server.sql("insert into orders default values", "select nspowner::regrole::text, "
                      "(select count(*) from cell_two.job) from pg_namespace where nspname = 'cell_two'", database=name)
    assert done == [("cell_two_owner", 1)]
    server.drop(name)
    server.sql("drop role cell_two_owner", "drop role chief")


def test_the_runtimes_schema_may_have_another_name(bare, tmp_path):
    db = Database(bare, schema="cell_one")
    app = App("shop", tmp_path)
    with declaring(app):
        Table("orders", Order).on_new_records(lambda_named("seen"))
    asyncio.run(migrate(db, app))
    assert not asyncio.run(migrate(db, app, check=True)).drift
    with psycopg.connect(bare, autocommit=True) as conn:
        conn.execute("insert into orders values (1, 'ann', 2)")
        assert conn.execute('select count(*) from cell_one.job').fetchall() == [(1,)]
        conn.execute('drop schema cell_one cascade; drop owned by cell_one_owner; drop role cell_one_owner')
