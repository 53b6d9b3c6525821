"""Migrate, handlers and schedules: the catalogue follows the code."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import create_model
from shop import Order, Shop, grown, lambda_named, orders

from anton.errors import AntonError, BadOption, ModelMismatch, UnknownOption, UnknownTable
from anton.table import Table


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
    assert "test_migrate_handlers.py" in loop


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
