"""What a build of dbt leaves for handlers, by SQL alone: the statements of dbt's materializations, then dbt_after()."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
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
