"""Real dbt on real tables: what its materializations do to a table with handlers, rights and triggers on it, and what Anton's macros make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dbts import Child, Failed, Project
from pg import Event, Pg

PATHS = {"table": 1}


@pytest.fixture(scope="session")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    child = Child(tmp_path_factory.mktemp("dbt") / "log")
    yield child
    child.close()


@pytest.fixture
def dbt(pg: Pg, child: Child, tmp_path: Path) -> Project:
    pg.sql("create table src (id int primary key, name text, n numeric)", "insert into src select g, 'c' || g, g * 10 from generate_series(1, 5) g")
    return Project(child, tmp_path / "shop", pg.url)


def register(pg: Pg, name: str, *key: str, kind: str = "model") -> None:
    pg.sql("select anton.dbt_register('shop', %s, 'public', %s, %s)", args=(f"{kind}.shop.{name}", name, list(key)))


CHANGE = ("update src set n = 0 where id = 3", "delete from src where id = 1", "insert into src values (6, 'c6', 60)")


@pytest.mark.parametrize("how", ["table", "anton_table"])
def test_what_differs_is_what_is_heard(dbt: Project, pg: Pg, how: str) -> None:
    dbt.model("daily", "select * from src", materialized=how, unique_key="id")
    register(pg, "daily", "id")
    every = pg.listen("daily", "new", "updated", "deleted", read="change")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    first = pg.value("select 'daily'::regclass::oid")
    dbt("run")
    assert pg.events(every) == []
    pg.sql(*CHANGE)
    dbt("run")
    assert {(e.op, e.key) for e in pg.events(every)} == {("d", 1), ("u", 3), ("n", 6)}
    told = [event.key for event in pg.events(rebuilt)]
    assert [(one["initial"], one["new"], one["updated"], one["deleted"]) for one in told] == [
        (True, 5, None, None), (False, 0, 0, 0), (False, 1, 1, 1)]
    assert len({one["run"] for one in told}) == 3
    assert (pg.value("select 'daily'::regclass::oid") == first) == (how == "anton_table")
