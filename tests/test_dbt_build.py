"""What a build of dbt leaves for handlers, by SQL alone: the statements of dbt's materializations, then dbt_after()."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pg import Event, Pg

MODEL = "model.shop.daily"
START = "select g as id, 'c' || g as name, g * 10 as n from generate_series(1, 5) g"


class Dbt:
    """Builds one model as dbt does."""

    def __init__(self, pg: Pg) -> None:
        self.pg = pg

    def register(self, *key: str, name: str = "daily", track: bool = False) -> None:
        self.pg.sql("select anton.dbt_register('shop', %s, 'public', %s, %s, %s)", args=(MODEL, name, list(key), track))

    def after(self, **more: Any) -> dict[str, Any]:
        build = {
            "project": "shop",
            "unique_id": MODEL,
            "schema": "public",
            "name": "daily",
            "backup": "daily__dbt_backup",
            "materialized": "table",
            "invocation_id": "run1",
            **more,
        }
        found: dict[str, Any] = self.pg.value("select anton.dbt_after(%s::jsonb)", json.dumps(build))
        return found

    def table(self, select: str, *indexes: str, **more: Any) -> dict[str, Any]:
        """A `table`: made anew and swapped in."""
        with self.pg.conn.transaction():
            self.pg.sql(f"create table daily__dbt_tmp as {select}", *indexes)
            if self.pg.value("select to_regclass('daily') is not null"):
                self.pg.sql("alter table daily rename to daily__dbt_backup")
            self.pg.sql("alter table daily__dbt_tmp rename to daily")
            found = self.after(**more)
        self.pg.sql("drop table if exists daily__dbt_backup cascade")
        return found


@pytest.fixture
def dbt(pg: Pg) -> Iterator[Dbt]:
    yield Dbt(pg)


def counts(found: dict[str, Any]) -> tuple[Any, ...]:
    return found["new"], found["updated"], found["deleted"]


def test_a_rebuilt_table_fires_what_differs_and_nothing_else(dbt: Dbt) -> None:
    dbt.register("id")
    first = dbt.table(START)
    every = dbt.pg.listen("daily", "new", "updated", "deleted", read="change")
    same = dbt.table(START)
    assert (first["initial"], counts(same), same["changed"]) == (True, (0, 0, 0), False)
    assert dbt.pg.events(every) == []
    found = dbt.table(
        "select g as id, 'c' || g as name, case g when 3 then 0 else g * 10 end as n from generate_series(2, 6) g"
    )
    assert counts(found) == (1, 1, 1)
    assert dbt.pg.events(every) == [
        Event("d", 1, {"id": 1, "name": "c1", "n": 10}),
        Event("u", 3, {"id": 3, "name": "c3", "n": 30}, {"id": 3, "name": "c3", "n": 0}),
        Event("n", 6, None, {"id": 6, "name": "c6", "n": 60}),
    ]


def test_a_model_may_be_listened_to_before_it_was_ever_built(dbt: Dbt) -> None:
    dbt.register("id")
    new, rebuilt = dbt.pg.listen("daily", "new"), dbt.pg.listen("daily", "rebuilt")
    dbt.table(START)
    assert dbt.pg.events(new) == []  # what the first build makes is not new
    dbt.table("select g as id, 'c' || g as name, g * 10 as n from generate_series(1, 7) g")
    assert dbt.pg.keys(new) == [6, 7]
    first, second = (event.key for event in dbt.pg.events(rebuilt))
    assert (first["initial"], first["new"], second["initial"], second["new"]) == (True, 5, False, 2)
    assert second["run"] == "run1" and int(second["xid"]) > int(first["xid"])


def test_a_build_that_is_rolled_back_fires_nothing(dbt: Dbt) -> None:
    dbt.register("id")
    dbt.table(START)
    heard = [dbt.pg.listen("daily", op) for op in ("new", "rebuilt")]
    with pytest.raises(ZeroDivisionError):
        with dbt.pg.conn.transaction():
            dbt.table("select 9 as id, 'x' as name, 1 as n")
            raise ZeroDivisionError
    assert [dbt.pg.events(one) for one in heard] == [[], []]
    assert dbt.pg.value("select count(*) from anton.dbt_build") == 1


KEYS = st.integers(1, 4)
STATEMENTS = st.one_of(
    st.builds("insert into daily values ({0}, {1}) on conflict (id) do update set n = excluded.n".format, KEYS, KEYS),
    st.builds("update daily set n = {1} where id >= {0}".format, KEYS, KEYS),
    st.builds("delete from daily where id <= {0}".format, KEYS),
    st.builds("update daily set id = id + {0} * 10".format, KEYS),
    st.builds("update daily set id = id - 10 where id > 10".format),
    st.just("update daily set n = n"),
    st.just("delete from daily where id > 100"),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.dictionaries(KEYS, KEYS), statements=st.lists(STATEMENTS, max_size=6))
def test_whatever_a_build_writes_its_events_lead_from_the_rows_before_to_those_after(
    dbt: Dbt, before: dict[int, int], statements: list[str]
) -> None:
    pg = dbt.pg
    if pg.value("select to_regclass('daily') is null"):
        pg.sql("create table daily (id int primary key, n int)")
        dbt.register("id")
        pg.listen("daily", "new", "updated", "deleted", name="every", read="change")
    every = pg.value("select id from anton.handler where name = 'every'")
    pg.sql("truncate daily", *(f"insert into daily values ({key}, {n})" for key, n in before.items()))
    pg.events(every)
    build = {"project": "shop", "unique_id": MODEL, "schema": "public", "name": "daily", "incremental": True}
    build |= {"materialized": "incremental", "backup": "daily__dbt_backup", "invocation_id": "run"}
    try:
        with pg.conn.transaction():
            pg.sql("select anton.dbt_before(%s::jsonb)", args=(json.dumps(build),))
            pg.sql("select", *statements)
            found = dbt.after(**build)
    except psycopg.errors.UniqueViolation:                             # two keys moved onto each other
        assert pg.events(every) == []
        return
    after = dict(pg.sql("select id, n from daily"))
    told = {(event.op, event.key): (event.old, event.new) for event in pg.events(every)}
    wanted = {("n", key): (None, {"id": key, "n": n}) for key, n in after.items() if key not in before}
    wanted |= {("d", key): ({"id": key, "n": n}, None) for key, n in before.items() if key not in after}
    for key in before.keys() & after.keys():
        if before[key] != after[key]:
            wanted["u", key] = {"id": key, "n": before[key]}, {"id": key, "n": after[key]}
    assert told == wanted
    assert found["changed"] == bool(wanted) and sum(counts(found)) == len(wanted)


def test_a_model_whose_records_share_a_key_is_built_all_the_same_and_that_is_said(dbt: Dbt) -> None:
    dbt.register("id")
    dbt.table(START)
    every, failed = dbt.pg.listen("daily", "new", "updated", read="change"), dbt.pg.listen("daily", "failed")
    found = dbt.table("select 1 as id, 'a' as name, g as n from generate_series(1, 2) g")
    assert (found["changed"], counts(found)) == (True, (None, None, None))
    assert dbt.pg.events(every) == []
    assert "is not unique: records were not compared" in dbt.pg.events(failed)[0].key["error"]


def test_columns_that_come_go_or_change_their_type_are_no_updates(dbt: Dbt) -> None:
    dbt.register("id")
    dbt.table("select g as id, g as n, g as gone, json_build_object('a', g) as j from generate_series(1, 3) g")
    every = dbt.pg.listen("daily", "new", "updated", "deleted", read="change")
    found = dbt.table("select g::bigint as id, case g when 2 then 'x' else g::text end as n, "
                      "json_build_object('a', g) as j, now() as came from generate_series(1, 3) g")
    assert (found["schema_changed"], counts(found)) == (True, (0, 1, 0))
    (event,) = dbt.pg.events(every)
    assert (event.op, event.key, event.old["n"], event.new["n"]) == ("u", 2, "2", "x")  # type: ignore[index]


def test_rows_that_were_there_at_the_first_build_are_fed_to_who_asks_for_them(dbt: Dbt) -> None:
    dbt.register("id")
    dbt.pg.listen("daily", "new", name="all", options={"since": "beginning"})
    dbt.table(START)
    assert dbt.pg.value("select count(*) from anton.backfill where finished_at is null") == 1
