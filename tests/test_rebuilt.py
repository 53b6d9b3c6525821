"""Handlers of builds: on_rebuilt and on_failed, from a committed event to one call of it."""

from __future__ import annotations

from typing import Any

import pytest
from working import Bench

from anton import Ctx, Failed, Rebuilt, Records, Table
from anton.app import App, declaring
from anton.db import Database
from anton.errors import BadOption, BadSignature


async def test_each_build_is_told_once_in_order_to_each_handler(db: Database) -> None:
    told: list[Any] = []

    def declare() -> None:
        daily, log = Table("daily"), Table("log")

        @daily.on_rebuilt
        def plain(rebuilt: Rebuilt) -> None:
            told.append(rebuilt)

        @daily.on_rebuilt(into=log)
        async def with_ctx(rebuilt: Rebuilt, ctx: Ctx) -> dict[str, Any]:
            return {"new": rebuilt.new, "key": ctx.key}

        @daily.on_failed
        def failed(failed: Failed) -> None:
            told.append(failed)

        daily.on_rebuilt.sql("insert into log (data) values ('{\"new\": -1}')", name="in_sql")

    bench = await Bench.make(db, declare)
    table = await bench.value("select id from anton.watched where table_name = 'daily'")
    for n in (1, 2):
        await bench.sql(
            "select anton.rebuilt($1, $2)", table, {"new": n, "changed": True, "run": "r", "later": "ignored"}
        )
    await bench.sql(
        "select anton.rebuilt($1, $2, 'f')", table, {"error": "no such column", "unique_id": "model.shop.daily"}
    )
    await bench.work()
    rebuilt = [one for one in told if isinstance(one, Rebuilt)]
    assert [(one.new, one.updated, one.run, bool(one)) for one in rebuilt] == [
        (1, None, "r", True),
        (2, None, "r", True),
    ]
    assert 0 < rebuilt[0].xid < rebuilt[1].xid  # type: ignore[operator]
    assert [one for one in told if isinstance(one, Failed)] == [Failed("no such column", unique_id="model.shop.daily")]
    assert sorted(await bench.column("select (data ->> 'new')::int from log")) == [-1, 1, 2]
    assert len(set(await bench.column("select data ->> 'key' from log where data ->> 'new' <> '-1'"))) == 2
    assert await bench.left() == {}


async def test_a_build_that_a_handler_fails_at_is_a_dead_letter_that_can_be_replayed(db: Database) -> None:
    told: list[Rebuilt] = []

    def declare() -> None:
        @Table("daily").on_rebuilt(attempts=1)
        def handle(rebuilt: Rebuilt) -> None:
            told.append(rebuilt)
            if len(told) == 1:
                raise ValueError("not yet")

    bench = await Bench.make(db, declare)
    table = await bench.value("select id from anton.watched where table_name = 'daily'")
    await bench.sql("select anton.rebuilt($1, $2)", table, {"new": 7})
    await bench.work()
    assert await bench.left() == {"dead": 1}
    await bench.sql("select anton.replay('handle')")
    await bench.work()
    assert [one.new for one in told] == [7, 7] and await bench.left() == {}


def test_what_does_not_fit_a_build_is_refused_where_it_is_declared() -> None:
    with declaring(App("t")):
        daily = Table("daily")
        for option in (
            {"each": True},
            {"where": "new > 1"},
            {"columns": ["a"]},
            {"read": "now"},
            {"since": "beginning"},
            {"batch": 5},
        ):
            with pytest.raises(BadOption, match=f"{next(iter(option))}="):
                daily.on_rebuilt(lambda rebuilt: None, name="x", **option)

        def of_records(records: Records[Any]) -> None: ...
        def of_failed(failed: Failed) -> None: ...
        def of_nothing() -> None: ...

        for fn in (of_records, of_failed, of_nothing):
            with pytest.raises(BadSignature, match="[Rr]ebuilt"):
                daily.on_rebuilt(fn)  # type: ignore[call-overload]
