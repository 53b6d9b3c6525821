"""The public names and signatures, as docs/reference says them."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import anton
from anton import Table
from anton.app import App, declaring
from anton.query import Query

NAMES = ["Approval", "action", "Ctx", "Discard", "Records", "Request", "Retry", "Table", "Webhook", "app",
         "cron", "delete", "env", "get", "patch", "poll", "post", "put", "sql", "transaction"]
LATER = ["DbtProject", "Files"]  # issues of their own


def test_the_public_names() -> None:
    assert anton.__all__ == sorted(anton.__all__)
    assert set(NAMES) <= set(anton.__all__) <= set(NAMES + LATER)
    for name in anton.__all__:
        assert getattr(anton, name) is not None
        assert inspect.getdoc(getattr(anton, name)), f"{name} has no docstring"


@pytest.mark.parametrize(("thing", "parameters"), [
    (Table.__init__, "self name model key= unique= index= **"), (Table.append, "self row of= delay= at="),
    (Table.extend, "self rows of= delay= at="), (Table.upsert, "self row of= delay= at="),
    (Table.select, "self where **"),
    (Table.get, "self *key"), (Table.aget, "self *key"), (Query.order_by, "self *columns"), (Query.limit, "self count"),
    (Query.count, "self"), (Query.acount, "self"), (Query.update, "self on_conflict= **"),
    (Query.delete, "self on_conflict="), (anton.sql, "text **"), (anton.transaction, "on_conflict="),
    (anton.post, "path verify= secret= **"), (anton.Webhook, "path table verify= secret= invalid="),
    (anton.env, "name"),
    (anton.Retry, "why after="), (anton.Discard, "why"), (anton.Ctx.retry, "self record after= why="),
    (anton.Ctx.discard, "self record why"), (anton.Ctx.origin, "self record"), (anton.Ctx.aorigin, "self record"),
])
def test_the_signatures(thing: Any, parameters: str) -> None:
    marks: dict[Any, str] = {inspect.Parameter.KEYWORD_ONLY: "{}=", inspect.Parameter.VAR_KEYWORD: "**",
             inspect.Parameter.VAR_POSITIONAL: "*{}"}
    found = [marks.get(p.kind, "{}").format(p.name) for p in inspect.signature(thing).parameters.values()]
    assert " ".join(found) == parameters


def test_every_event_of_a_table_is_there() -> None:
    with declaring(App()):
        table = Table("x")
    for name in ("on_new_records", "on_updated_records", "on_deleted_records", "on_changes", "on_truncate"):
        assert repr(getattr(table, name)) == f"x.{name}"
        assert inspect.getdoc(getattr(Table, name))
        assert callable(getattr(table, name).sql)


def test_sync_reads_have_an_async_twin() -> None:
    for cls, names in ((Table, ["get"]), (Query, ["count"]), (anton.Ctx, ["origin"])):
        for name in names:
            assert inspect.iscoroutinefunction(getattr(cls, f"a{name}"))
    for query in (Query, anton.sql):
        assert {"__iter__", "__await__", "__aiter__"} <= set(dir(query))


def test_importing_anton_loads_nothing_heavy() -> None:
    code = ("import sys, anton; heavy = {'fastapi', 'starlette', 'uvicorn', 'openai', 'anthropic', 'dbt', 'sqlglot', "
            "'psycopg', 'httpx', 'pytest'}; print(sorted(heavy & set(sys.modules)))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
