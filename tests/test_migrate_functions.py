"""A release whose functions return something else than those of the last one: migrate replaces them, and only them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from shop import Shop

from anton.errors import MigrationError


@pytest.fixture
def shop(database: str, tmp_path: Path) -> Iterator[Shop]:
    """A database whose sql/ is that of another release."""
    shop = Shop(database, tmp_path)
    shop.sql("delete from anton.migration where name like 'sql/%'")
    yield shop


STATUS = "select pg_get_viewdef('anton.status'::regclass)"
RELEASED = {
    "another result": (
        "drop function anton.split_crashed(bigint, bigint)",
        "create function anton.split_crashed(p_token bigint, p_id bigint) returns text language sql as 'select null'",
    ),
    "other columns": (
        "drop function anton.findings()",
        "create function anton.findings() returns table (kind text) language sql as 'select null::text'",
    ),
    "another name of an argument": (
        "drop function anton.drop_dead(bigint)",
        "create function anton.drop_dead(p_letter bigint) returns boolean language sql as 'select true'",
    ),
    "a default less": (
        "create or replace function anton.doorbell(out k1 int, out k2 int, out channel text, out enabled boolean)"
        " language sql as $$ select 1, 2, 'x', true $$",
        "drop function anton.token()",
        "create function anton.token(n int default 1) returns bigint language sql as 'select 1::bigint'",
    ),
    "a function that the view uses": (
        "drop view anton.status",
        "drop function anton.slot(timestamptz)",
        "create function anton.slot(timestamptz) returns int language sql as 'select 1'",
        "create view anton.status as select anton.slot(now()) as x",
    ),
    "other columns of the view": ("drop view anton.status", "create view anton.status as select 1 as x"),
}


@pytest.mark.parametrize("released", RELEASED.values(), ids=RELEASED)
def test_what_the_last_release_had_is_made_anew(shop: Shop, released: tuple[str, ...]) -> None:
    functions = "select p.oid::regprocedure::text, pg_get_functiondef(p.oid) from pg_proc p where p.pronamespace = "
    functions += "'anton'::regnamespace and p.prokind = 'f' and pronargs < 9 and proname <> 'token' order by 1"
    view, made = shop.sql(STATUS), shop.sql(functions)
    shop.sql("set role anton_owner", *released)
    assert shop.sql(functions) != made or shop.sql(STATUS) != view
    planned = shop.migrate(plan=True)
    assert shop.migrate().sql == planned.sql
    assert (shop.sql(STATUS), shop.sql(functions)) == (view, made)
    assert not shop.migrate(check=True).drift


def test_a_view_of_somebody_elses_on_the_status_outlives_a_release(shop: Shop) -> None:
    shop.sql("create view dash as select handler, ready from anton.status", "create role reader_of_status")
    shop.sql("grant select on anton.status to reader_of_status")
    shop.migrate()
    assert shop.sql("select * from dash") == []
    assert shop.sql("select has_table_privilege('reader_of_status', 'anton.status', 'select')") == [(True,)]
    shop.sql("drop owned by reader_of_status", "drop role reader_of_status")


def test_what_somebody_elses_view_uses_is_not_dropped_but_said(shop: Shop) -> None:
    shop.sql("set role anton_owner", *RELEASED["another result"])
    shop.sql("create view dash as select anton.split_crashed(1, 2) as x")
    before = shop.sql("select oid from pg_proc where proname = 'split_crashed'")
    with pytest.raises(MigrationError, match=r"view public.dash depends on function(.|\n)*make them again"):
        shop.migrate()
    assert shop.sql("select oid from pg_proc where proname = 'split_crashed'") == before
    shop.sql("drop view dash")
    shop.migrate()
    assert shop.sql("select oid from pg_proc where proname = 'split_crashed'") != before
