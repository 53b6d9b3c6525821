"""Migrate: files once, declared tables as far as nothing is lost; a plan is exactly what is run."""

from __future__ import annotations

import time

import psycopg
import pytest
from shop import Order, grown, lambda_named, orders

from anton.errors import FrozenChanged, MigrationError, MigrationFailed
from anton.table import Table

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
                            ("insert into half values (1)", "duplicate key"),
                            ("select anton.schedule('n', '0 25 * * *', 'select 1')", 'hour is "25"')):
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


def test_a_database_of_a_version_between_releases_is_told_apart(shop):
    shop.sql("update anton.migration set sha256 = 'x' where name = 'migrations/0001_init.sql'")
    with pytest.raises(MigrationError, match=r"whose migrations/0001_init.sql is not .*drop schema anton"):
        shop.migrate()


def test_an_older_anton_does_not_touch_what_a_newer_one_made(shop):
    shop.sql("insert into anton.migration (set_name, name, sha256) values ('anton', 'migrations/9999_future.sql', 'x')")
    with pytest.raises(MigrationError, match=r"migrated by a newer Anton: .*9999_future"):
        shop.migrate()
