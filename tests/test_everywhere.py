"""Every write and every read, called from every place where users' code runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from working import Bench

from anton import Records, Table, cron, post, sql, transaction, web
from anton.app import App, declaring
from anton.db import Database

pytestmark = pytest.mark.once("the app's own process: the server is asked for the same")


class Item(BaseModel):
    id: int | None = None
    name: str
    n: Decimal = Decimal(0)


def declare() -> None:
    inputs, items, notes = Table("inputs"), Table("items", Item), Table("notes")
    legacy = Table("legacy")

    def writes(place: str) -> None:
        """Each kind of write once, for three kinds of table."""
        item = items.append({"name": place})
        notes.append({"place": place, "item": item.id})
        legacy.append({"place": place, "n": 1})
        notes.extend({"place": place, "n": n} for n in range(3))
        items.upsert(Item(id=2000, name="shared", n=Decimal(5)))
        legacy.select(place="start").update(n=sql("n + {by}", by=1))
        notes.select(place="start").update(last=place)
        legacy.select(place=f"goes with {place}").delete()

    def reads() -> list[Any]:
        found = items.get(1000)
        return [found and found.name, items.select(name="read").count(), [item.id for item in items.select(id=1000)],
                [row["n"] for row in sql("select 1 as n where 1 = {x}", x=1)], notes.select(place="start").count()]

    async def areads() -> list[Any]:
        found = await items.aget(1000)
        return [found and found.name, await items.select(name="read").acount(),
                [item.id async for item in items.select(id=1000)],
                [row["n"] for row in await sql("select 1 as n where 1 = {x}", x=1)],
                await notes.select(place="start").acount()]

    expected = ["read", 1, [1000], [1], 1]

    def everything(place: str) -> None:
        assert reads() == expected
        writes(place)

    async def aeverything(place: str) -> None:
        assert await areads() == expected
        assert await asyncio.to_thread(reads) == expected
        writes(place)

    PLACES["script"] = everything, aeverything

    @inputs.on_new_records(where="data ->> 'to' = 'def'")
    def handler_def(records: Records[Any]) -> None:
        for record in records:
            everything(record["place"])

    @inputs.on_new_records(where="data ->> 'to' = 'async'")
    async def handler_async(records: Records[Any]) -> None:
        for record in records:
            await aeverything(record["place"])

    @inputs.on_new_records(each=True, where="data ->> 'to' = 'each def'")
    def each_def(record: Any) -> None:
        everything(record["place"])

    @inputs.on_new_records(each=True, where="data ->> 'to' = 'each async'")
    async def each_async(record: Any) -> None:
        await aeverything(record["place"])

    @inputs.on_new_records(where="data ->> 'to' = 'pool'")
    def handler_pool(records: Records[Any]) -> None:
        with ThreadPoolExecutor(2) as pool:
            for record in records:
                assert pool.submit(reads).result() == expected
                pool.submit(notes.append, {"place": record["place"]}, of=record).result()
            everything("a pool")

    @cron("0 3 * * *")
    def scheduled() -> None:
        everything("schedule")

    @post("/def")
    def route_def() -> None:
        everything("route def")

    @post("/async")
    async def route_async() -> None:
        await aeverything("route async")


PLACES: dict[str, Any] = {}


@pytest.fixture
def app(db: Database) -> Iterator[Bench]:
    async def make() -> Bench:
        async with db.conn() as conn:
            await conn.execute("create table legacy (id int generated always as identity primary key, place text,"
                               " n int)")
        bench = await Bench.make(db, declare)
        await bench.sql("insert into items (id, name, n) values (1000, 'read', 0)")
        await bench.sql("insert into notes (data) values ('{\"place\": \"start\"}')")
        await bench.sql("insert into legacy (place, n) values ('start', 0)")
        return bench

    yield db.run(make())


@contextmanager
def all_written(app: Bench, place: str) -> Iterator[None]:
    """What writes(place) leaves behind, exactly once."""
    run = app.db.run
    run(app.sql(f"insert into legacy (place) values ('goes with {place}')"))
    before = run(app.value("select n from legacy where place = 'start'"))
    yield
    assert run(app.column("select name from items where name = $1", place)) == [place]
    linked = "select i.name from notes n join items i on i.id = (n.data ->> 'item')::int where n.data ->> 'place' = $1"
    assert run(app.column(linked, place)) == [place]
    assert run(app.column("select data ->> 'n' from notes where data ->> 'place' = $1 and data ? 'n' order by 1",
                          place)) == ["0", "1", "2"]
    assert run(app.value("select count(*) from legacy where place = $1", place)) == 1
    assert run(app.value("select n from items where id = 2000")) == 5
    assert run(app.value("select n from legacy where place = 'start'")) == before + 1
    assert run(app.value("select data ->> 'last' from notes where data ->> 'place' = 'start'")) == place
    assert run(app.value("select count(*) from legacy where place like 'goes with %'")) == 0
    assert run(app.left()) == {}


def test_a_script(app: Bench) -> None:
    with all_written(app, "script"):
        PLACES["script"][0]("script")


def test_a_transaction(app: Bench) -> None:
    with all_written(app, "transaction"), transaction():
        PLACES["script"][0]("transaction")


def test_an_async_transaction(app: Bench) -> None:
    async def work() -> None:
        async with transaction():
            await PLACES["script"][1]("async transaction")

    with all_written(app, "async transaction"):
        asyncio.run(work())


def test_a_bare_thread_of_a_script(app: Bench) -> None:
    with all_written(app, "thread"), ThreadPoolExecutor(1) as pool:
        pool.submit(PLACES["script"][0], "thread").result()


@pytest.mark.parametrize("kind", ["def", "async", "each def", "each async"])
def test_a_handler(app: Bench, kind: str) -> None:
    async def work() -> None:
        await app.add("inputs", [{"to": kind, "place": f"handler {kind}"}])
        await app.work()

    with all_written(app, f"handler {kind}"):
        asyncio.run(work())


def test_a_handler_with_a_pool_of_threads(app: Bench) -> None:
    async def work() -> None:
        await app.add("inputs", [{"to": "pool", "place": "one"}, {"to": "pool", "place": "two"}])
        await app.work()
        owners = await app.column("select unnest(o.owners) from anton.output o "
                                  "join anton.watched w on w.id = o.table_id where w.table_name = 'notes'")
        assert sorted(owners) == [0, 0, 0, 0, 0, 1, 2]

    with all_written(app, "a pool"):
        asyncio.run(work())


def test_a_schedule(app: Bench) -> None:
    async def work() -> None:
        await app.work()
        await app.sql("update anton.schedule set next_at = anton.now()")
        await app.work()

    with all_written(app, "schedule"):
        asyncio.run(work())


@pytest.mark.parametrize("kind", ["def", "async"])
def test_a_route(app: Bench, kind: str) -> None:
    app.app.settings = object()  # type: ignore[assignment]  # it was loaded

    async def work() -> None:
        server = web.server(app.app, port=0)
        task = asyncio.create_task(server.serve())
        while not server.started:
            assert not task.done()
            await asyncio.sleep(0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{web.port_of(server)}", timeout=60) as client:
            answer = await client.post(f"/{kind}")
        server.should_exit = True
        await task
        assert answer.status_code == 200, answer.text

    with all_written(app, f"route {kind}"):
        asyncio.run(work())


def test_another_app_sees_the_same(app: Bench) -> None:
    with declaring(App("other")):
        assert {row["name"] for row in Table("items").select()} == {"read"}
