"""Sqlcheck: migrate refuses SQL that Postgres would refuse, and says where it is wrong and what was meant."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from shop import Order, Shop, orders

from anton.errors import MigrationError, MigrationFailed, SqlRefused
from anton.sqlcheck import parts
from anton.table import Table

HEAD = "-- anton: handler\n-- on: orders new updated\n"


WRONG = {  # SQL: token, near, line and column
    "insert into big (id)\nselect id from ordrs": ("ordrs", "orders", 4, 16),
    "insert into bgi (id) select id from new_records": ("bgi", "big", 3, 13),
    "insert into big (id) select idd from new_records": ("idd", "id", 3, 29),
    "insert into big (id)\n  select n.id from new_records n\n   where n.totl > 3": ("totl", "total", 5, 12),
    "insert into big (idd) select id from new_records": ("idd", "id", 3, 18),
    "update orders set stauts = 'paid' where id in (select id from old_records)": ("stauts", "status", 3, 19),
    "with x as (select id, total as sum from new_records)\ninsert into big (id) select smu from x":
        ("smu", "sum", 4, 29),
    "select count(*) from new_records; delete from big where idd = 1": ("idd", "id", 3, 57),
    "select 1; select id from new_records": ("new_records", None, 3, 26),
    "select coun(*) from new_records": ("coun", None, 3, 8),
    "insert into big (id) select id frm new_records": ("new_records", None, 3, 36),
    "insert into big (id) select customer from new_records": ("customer", None, 3, 29),
    "select 'x'::integer from new_records": ("'", None, 3, 8),
    "select o.id from orders, new_records where orders.idd = 1": ("o", None, 3, 8),
}

RIGHT = [
    "insert into big (id) select id from new_records;  -- a comment with {braces}",
    "with recursive t (n) as (select 1 union all select n + 1 from t where n < 3) insert into big (id) select n from t",
    "WITH gone AS (delete from big using old_records o where o.id = big.id returning big.id) select id from gone",
    "insert into big (id) select o.id from new_records n join old_records o using (id) where o is distinct from n",
    "select ctid, tableoid, (n).id, n.id::text, row_to_json(n) from orders n where n.customer ~ E'it\\'s; x'",
    "select x.a from new_records n, jsonb_to_recordset('[{\"a\": 1}]') as x(a int), generate_series(1, 3) g "
    "where g > x.a",
    "merge into big b using new_records n on n.id = b.id when matched then delete when not matched then insert (id) "
    "values (n.id)",
    "insert into sums (data) select jsonb_build_object('n', count(*)) from new_records; delete from big;",
    "select 1; create temp table few as select 1 as a; insert into big (id) select a from few",
    "select relname from pg_class where oid = 'orders'::regclass",
    "select later()",
    "select id from only (orders)",
]


def shop_tables() -> None:
    Table("orders", Order)
    Table("big")
    Table("sums")


def test_what_postgres_refuses_is_refused_with_its_place_and_what_was_meant(shop: Shop) -> None:
    for n, body in enumerate(WRONG):
        shop.file(f"sql/f{n:02}.sql", HEAD + body)
    shop.file("sql/g.sql", HEAD + "select 1")
    shop.declare(shop_tables)
    with pytest.raises(MigrationError) as error:
        shop.migrate()
    told = error.value.errors  # type: ignore[attr-defined]
    assert [(one.token, one.near, one.line, one.column) for one in told] == list(WRONG.values())
    for n, (one, body) in enumerate(zip(told, WRONG, strict=True)):
        assert str(one).startswith(f"sql/f{n:02}.sql, line {one.line}, column {one.column}: ")
        assert one.near is None or f'Did you mean "{one.near}"?' in str(one)
        assert (HEAD + body).splitlines()[one.line - 1] in str(one)
    assert shop.sql("select name from anton.handler") == [("g",)]
    assert "first statement of a handler alone" in str(told[8])


def test_what_postgres_takes_is_right_and_what_sqlglot_does_not_read_is_noted(shop: Shop) -> None:
    shop.file("sql/a.sql", "create or replace function later() returns bigint language sql "
                           "as 'select count(*) from big';")
    for n, body in enumerate(RIGHT):
        shop.file(f"sql/f{n:02}.sql", HEAD + body)
    plan = shop.declare(shop_tables).migrate()
    assert len(shop.sql("select name from anton.handler")) == len(RIGHT)
    told = [note for note in plan.notes if "read at table level" in note]
    assert [note[:20] for note in told] == ["sql/f11.sql, line 3:"], told


def test_sql_of_python_is_refused_at_its_place_with_its_values_bound(shop: Shop) -> None:
    def declare() -> None:
        table = Table("orders", Order)
        table.on_new_records.sql("select {limit}::int,\n  {who}, totl from new_records", limit=3, who="Ann", name="few")

    shop.declare(declare)
    with pytest.raises(SqlRefused) as error:
        shop.migrate()
    assert (error.value.line, error.value.column, error.value.near) == (2, 10, "total")
    assert "tests/test_sqlcheck.py:" in error.value.file and '(handler "few")' in str(error.value)


def test_a_schedule_is_looked_at_too(shop: Shop) -> None:
    shop.file("sql/c.sql", "-- anton: schedule\n-- cron: 0 3 * * *\ndelete from nosuch")
    with pytest.raises(SqlRefused) as error:
        shop.declare(orders()).migrate()
    assert (error.value.file, error.value.token, error.value.line) == ("sql/c.sql", "nosuch", 3)
    assert not shop.sql("select name from anton.schedule")


@pytest.mark.parametrize("path", ["sql/view.sql", "migrations/0001_view.sql"])
def test_a_file_that_migrate_runs_is_told_which_table_was_meant(shop: Shop, path: str) -> None:
    shop.sql("create table customers (id int)")
    shop.file(path, "create view seen as\n  select id from custmers;")
    with pytest.raises(MigrationFailed, match=rf'{path}, line 2: relation "custmers" does not exist. Did you mean '
                                              r'"customers"\?'):
        shop.declare(orders()).migrate()


def test_a_plan_refuses_as_migrate_does(shop: Shop) -> None:
    shop.file("sql/flag.sql", HEAD + "select totl from new_records")
    plan = shop.declare(orders()).migrate(plan=True)
    assert [type(error) for error in plan.refused] == [SqlRefused]
    assert shop.sql("select to_regclass('orders')") == [(None,)]


def test_a_statement_is_parsed_and_never_run(shop: Shop) -> None:
    shop.declare(lambda: (Table("orders", Order), Table("big"))).migrate()
    shop.sql("insert into big (data) values ('{}')")
    shop.file("sql/flag.sql", HEAD + "select 1; delete from big; select E'\\''; truncate big; drop table big")
    shop.migrate()
    assert shop.sql("select count(*) from big") == [(1,)]


def test_a_table_that_somebody_holds_is_noted_not_waited_for(shop: Shop) -> None:
    shop.declare(orders()).migrate()
    shop.sql("create table other (id int)")
    shop.file("sql/flag.sql", HEAD + "insert into other (id) select id from new_records")
    with psycopg.connect(shop.url) as conn:
        conn.execute("lock table other in access exclusive mode")
        plan = shop.migrate(plan=True)
    assert any("could not be checked" in note for note in plan.notes)


def test_values_become_typed_nulls_and_places_are_found_again() -> None:
    text, pairs = parts("select {a}, {b}, '{c}'", {"a": ["bigint", "1"], "b": ["text", None]})
    assert text == "select null::bigint, null::text, '{c}'"
    assert pairs == [(0, 0), (19, 10), (31, 15)]


def test_the_docs_show_the_message(shop: Shop) -> None:
    page = (Path(__file__).parent.parent / "docs" / "sql-steps.md").read_text()
    shop.file("sql/a.sql", "create view big_spenders as select customer from orders;")
    shop.file("sql/flag_big.sql", "-- anton: handler\n-- on: orders new\n-- where: total > 100\ninsert into big (id)\n"
                                  "select o.idd from new_records o join big_spenders using (customer)")
    with pytest.raises(SqlRefused) as error:
        shop.declare(shop_tables).migrate()
    assert f"```text\nanton: {error.value}\n```" in page
