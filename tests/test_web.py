"""Web: real requests to a real server; a 2xx means committed, and a body never tells too much."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends
from pydantic import BaseModel, Field

from anton import config, web, webhook
from anton.answers import UNSIGNED
from anton.app import App, declaring
from anton.db import Database, set_database
from anton.errors import ConfigError, NoScope
from anton.migrate import migrate
from anton.query import sql
from anton.secret import env
from anton.sense import Request, Webhook, get, patch, post
from anton.table import Table
from anton.verify import SCHEMES, Hmac
from anton.write import transaction

pytestmark = pytest.mark.once("routes: the server is asked for the same")


class Order(BaseModel):
    id: int | None = None
    customer: str
    total: Annotated[Decimal, Field(gt=0)] = Decimal(1)


@asynccontextmanager
async def serving(db: Database, declare: Callable[[], Any]) -> AsyncIterator[httpx.AsyncClient]:
    """What `declare` declares, migrated and served on a port of this machine."""
    with declaring(App("web")) as app:
        declare()
    app.settings = object()  # type: ignore[assignment]                # it was loaded
    await migrate(db, app)
    server = web.server(app, port=0)
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            assert not task.done(), task.result()
            await asyncio.sleep(0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{web.port_of(server)}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def count(db: Database, table: str) -> int:
    async with db.conn() as conn:
        found: int = await conn.fetchval(f"select count(*) from {table}")
        return found


def signed(body: bytes, secret: str = "s3cret", at: float | None = None) -> dict[str, str]:
    return SCHEMES["slack"].sign(body, secret, str(int(time.time() if at is None else at)))


async def test_what_a_route_wrote_is_there_when_the_answer_comes(db):
    def declare() -> None:
        events = Table("events")

        @post("/sync")
        def sync(request: Request) -> int:
            events.append({"got": request.json()})
            return 202

        @post("/async")
        async def soon(request: Request) -> int:
            events.append({"got": request.json()})
            return 201

    async with serving(db, declare) as client:
        for n in range(10):
            assert (await client.post("/sync", json=n)).status_code == 202
            assert (await client.post("/async", json=n)).status_code == 201
            assert await count(db, "events") == 2 * (n + 1)


async def test_parameters_bodies_and_returned_records_are_fastapis(db):
    def declare() -> None:
        orders = Table("orders", Order)

        @post("/orders", status_code=201)
        async def create(order: Order) -> Order:
            return orders.append(order)

        @get("/orders/{id}")
        def read(id: int, shout: bool = False) -> dict[str, Any]:
            order = orders.get(id)
            assert order is not None
            return {"customer": order.customer.upper() if shout else order.customer}

        @get("/orders")
        async def every() -> list[Order]:
            return await orders.select().order_by("id")

        @patch("/orders/{id}")
        def change(id: int, total: Annotated[Decimal, Depends(lambda total: Decimal(total))]) -> None:
            orders.select(id=id).update(total=total)

    async with serving(db, declare) as client:
        made = await client.post("/orders", json={"customer": "ann"})
        assert (made.status_code, made.json()) == (201, {"id": 1, "customer": "ann", "total": "1"})
        assert (await client.get("/orders/1", params={"shout": True})).json() == {"customer": "ANN"}
        assert (await client.patch("/orders/1", params={"total": "7.5"})).status_code == 200
        assert (await client.get("/orders")).json() == [{"id": 1, "customer": "ann", "total": "7.5"}]
        assert (await client.post("/orders", json={"customer": 5})).status_code == 422
        assert (await client.get("/orders/x")).status_code == 422
        schema = (await client.get("/openapi.json")).json()
        assert set(schema["paths"]) == {"/orders", "/orders/{id}"} and schema["openapi"].startswith("3.1")


async def test_records_without_a_model_are_written_out(db):
    def declare() -> None:
        notes = Table("notes")

        @post("/notes")
        def create(request: Request):
            return notes.append(request.json())

        @get("/notes")
        def every() -> list[Any]:
            return list(notes.select())

    async with serving(db, declare) as client:
        assert (await client.post("/notes", json={"text": "hi"})).json() == {"id": 1, "text": "hi"}
        assert (await client.get("/notes")).json()[0]["text"] == "hi"


async def test_a_route_that_raises_keeps_nothing_and_tells_nothing(db):
    def declare() -> None:
        events = Table("events")

        @post("/")
        def fail(request: Request) -> int:
            events.append({"a": 1})
            raise RuntimeError("the secret plan")

    async with serving(db, declare) as client:
        answer = await client.post("/")
        assert answer.status_code == 500 and answer.json() == {"detail": "Internal Server Error"}
        assert await count(db, "events") == 0


async def test_writes_of_one_route_are_one_transaction(db):
    def declare() -> None:
        orders = Table("orders", Order, unique=["customer"])
        log = Table("log")

        @post("/")
        async def create(order: Order) -> int:
            log.append({"about": order.customer})
            async with transaction():
                orders.append(order)
            return 201

    async with serving(db, declare) as client:
        assert (await client.post("/", json={"customer": "ann"})).status_code == 201
        again = await client.post("/", json={"customer": "ann"})
        assert again.status_code == 409 and "unique" in again.json()["detail"]
        assert (await client.post("/", json={"customer": "bob", "total": -1})).status_code == 422
        assert (await count(db, "orders"), await count(db, "log")) == (1, 1)


async def test_what_runs_after_the_reply_is_outside_the_routes_transaction(db):
    ended: asyncio.Queue[NoScope | None] = asyncio.Queue()

    def declare() -> None:
        events = Table("events")
        loop = asyncio.get_running_loop()

        def in_thread():
            events.append({"by": "dependency"})
            yield
            events.append({"by": "thread, after"})
            loop.call_soon_threadsafe(ended.put_nowait, None)

        async def in_loop():
            yield
            try:
                events.append({"by": "loop, after"})
            except NoScope as error:
                await ended.put(error)

        async def background():
            async with transaction():
                events.append({"by": "background"})
            await ended.put(None)

        @post("/")
        def create(tasks: BackgroundTasks, _: None = Depends(in_thread), __: None = Depends(in_loop)) -> int:
            tasks.add_task(background)
            return 200

    async with serving(db, declare) as client:
        assert (await client.post("/")).status_code == 200
        errors = [await ended.get() for _ in range(3)]
        assert [str(error) for error in errors if error] == [
            "nothing around this write would commit it. Put it inside: async with transaction():"]
        async with db.conn() as conn:
            rows = await conn.fetch("select data ->> 'by' as by, xmin::text as tx from events order by id")
        assert sorted(row["by"] for row in rows) == ["background", "dependency", "thread, after"]
        assert rows[0]["by"] == "dependency" and len({row["tx"] for row in rows}) == 3


def webhooks() -> None:
    Webhook("/slack", Table("mentions"), verify="slack", secret=[env("NEW_SECRET"), env("OLD_SECRET")])
    Webhook("/orders", Table("orders", Order))
    events = Table("events")

    @post("/events", verify="slack", secret=env("NEW_SECRET"))
    def keep(request: Request) -> int:
        events.append({"payload": request.json()})
        return 200

    @post("/typed", verify=Hmac("X-Sig"), secret=env("NEW_SECRET"))
    def typed(order: Order) -> int:
        return 200


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("NEW_SECRET", "s3cret")
    monkeypatch.setenv("OLD_SECRET", "older")


async def test_a_signed_request_becomes_a_record_and_a_forged_one_leaves_none(db, secrets):
    async with serving(db, webhooks) as client:
        body = json.dumps({"event": {"text": "hi"}}).encode()
        for path in ("/slack", "/events"):
            assert (await client.post(path, content=body, headers=signed(body))).status_code == 200
            for forged in ({}, signed(body, "wrong"), signed(body + b" "), signed(body, at=time.time() - 400)):
                refused = await client.post(path, content=body, headers=forged)
                assert (refused.status_code, refused.json()) == (401, {"detail": UNSIGNED})
        other = body + b" "                                            # the same again would be the same delivery
        assert (await client.post("/slack", content=other, headers=signed(other, "older"))).status_code == 200
        assert (await client.post("/events", content=body, headers=signed(body, "older"))).status_code == 401
        assert (await count(db, "mentions"), await count(db, "events")) == (2, 1)
        async with db.conn() as conn:
            row = await conn.fetchval("select data from mentions order by id limit 1")
        assert row["payload"] == {"event": {"text": "hi"}} and set(row) == {"timestamp", "payload", "headers"}


async def test_what_is_not_set_is_told_to_the_log_and_not_to_the_sender(db, caplog):
    caplog.set_level("INFO", "anton.web")
    async with serving(db, webhooks) as client:
        for path in ("/slack", "/events"):
            assert (await client.post(path, content=b"{}", headers=signed(b"{}"))).json() == {"detail": UNSIGNED}
    assert caplog.text.count('no secret is set: env("NEW_SECRET")') == 2


async def test_the_signature_is_looked_at_before_the_body(db, secrets):
    async with serving(db, webhooks) as client:
        assert (await client.post("/typed", content=b"{", headers={"X-Sig": "00"})).status_code == 401
        good = Hmac("X-Sig").sign(b"{", "s3cret") | {"Content-Type": "application/json"}
        assert (await client.post("/typed", content=b"{", headers=good)).status_code == 400


async def test_a_handshake_is_answered_and_leaves_no_record(db, secrets):
    async with serving(db, webhooks) as client:
        asked = json.dumps({"type": "url_verification", "challenge": "3eZbrw1aB"}).encode()
        for path in ("/slack", "/events"):
            answer = await client.post(path, content=asked, headers=signed(asked))
            assert (answer.status_code, answer.text) == (200, "3eZbrw1aB")
            assert (await client.post(path, content=asked)).status_code == 401
        assert (await count(db, "mentions"), await count(db, "events")) == (0, 0)


def test_the_url_that_is_signed_is_the_one_of_autonomous_json(tmp_path):
    (tmp_path / "autonomous.json").write_text('{"deployment": {"url": "https://hooks.example.com/app"}}')
    app = App("x")
    assert web.public_base(app) == ""
    app.settings = config.load(tmp_path).settings
    assert web.public_base(app) == "https://hooks.example.com/app"


async def test_a_handshake_by_get_is_answered_beside_the_route_and_signed_urls_are_ours(db, secrets):
    def declare() -> None:
        events = Table("events")

        @post("/meta", verify="facebook", secret={"secret": env("NEW_SECRET"), "token": "ours"})
        @post("/square", verify="square", secret=env("NEW_SECRET"))
        def keep(request: Request) -> int:
            events.append({"payload": request.json()})
            return 200

    async with serving(db, declare) as client:
        asked = {"hub.mode": "subscribe", "hub.challenge": "42", "hub.verify_token": "ours"}
        answer = await client.get("/meta", params=asked)
        assert (answer.status_code, answer.text) == (200, "42")
        assert (await client.get("/meta", params=asked | {"hub.verify_token": "x"})).status_code == 403
        assert (await client.get("/meta")).status_code == 401
        assert (await client.get("/square")).status_code == 405
        assert (await client.get("/openapi.json")).json()["paths"]["/meta"].keys() == {"post"}
        url = str(client.base_url.join("/square?a=%2F")).rstrip("/")
        good = SCHEMES["square"].sign(b"{}", "s3cret", url=url)
        assert (await client.post("/square?a=%2F", content=b"{}", headers=good)).status_code == 200
        assert (await client.post("/square?a=/", content=b"{}", headers=good)).status_code == 401
        assert await count(db, "events") == 1


async def test_secrets_are_not_kept_with_the_headers(db):
    async with serving(db, lambda: Webhook("/hook", Table("hooks"), verify=False)) as client:
        sent = {"Authorization": "Bearer x", "Cookie": "y", "X-GitHub-Event": "push"}
        await client.post("/hook", json={}, headers=sent)
        async with db.conn() as conn:
            headers = (await conn.fetchval("select data from hooks"))["headers"]
    assert headers["x-github-event"] == "push" and not {"authorization", "cookie"} & set(headers)


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff\xfe", b'{"a": "\x00"}', b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": "\\u0000"}'])
async def test_a_broken_body_gets_400_and_leaves_nothing(db, body):
    def declare() -> None:
        Webhook("/hook", Table("hooks"))
        events = Table("events")

        @post("/route")
        def keep(request: Request) -> int:
            events.append({"payload": request.json()})
            return 200

    async with serving(db, declare) as client:
        for path in ("/hook", "/route"):
            answer = await client.post(path, content=body)
            assert answer.status_code in (400, 422) and "Traceback" not in answer.text, (path, answer.text)
        assert (await count(db, "hooks"), await count(db, "events")) == (0, 0)


async def test_a_form_is_a_record_too_and_a_typed_webhook_is_its_model(db, secrets):
    async with serving(db, webhooks) as client:
        assert (await client.post("/orders", json={"customer": "ann"})).status_code == 200
        wrong = await client.post("/orders", json={"customer": 7})
        assert wrong.status_code == 422 and "customer" in str(wrong.json())
        assert await count(db, "orders") == 1
        form = b"command=%2Fask&text=hi+there"
        headers = signed(form) | {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await client.post("/slack", content=form, headers=headers)).status_code == 200
        async with db.conn() as conn:
            payload = (await conn.fetchval("select data from mentions"))["payload"]
        assert payload == {"command": "/ask", "text": "hi there"}


async def test_too_large_a_body_gets_413(db, monkeypatch):
    monkeypatch.setattr(webhook, "MAX_BODY", 1000)
    async with serving(db, lambda: Webhook("/hook", Table("hooks"))) as client:
        assert "larger than 1,000 bytes" in (await client.post("/hook", content=b"1" * 1001)).json()["detail"]
        assert (await client.post("/hook", content=b'"' + b"1" * 998 + b'"')).status_code == 200


async def test_without_the_database_it_is_503_and_good_again_when_it_is_back(db, server):
    async with serving(db, lambda: Webhook("/hook", Table("hooks"))) as client:
        assert (await client.post("/hook", json=1)).status_code == 200
        server.sql(f"alter database {db.name} allow_connections false",
                   f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{db.name}'")
        for path in ("/hook", "/ready"):
            answer = await client.request("POST" if path == "/hook" else "GET", path, json=2)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            assert "Traceback" not in answer.text
        assert (await client.get("/health")).status_code == 200
        server.sql(f"alter database {db.name} allow_connections true")
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post("/hook", json=3)).status_code == 200
        async with db.conn() as conn:
            assert [row[0]["payload"] for row in await conn.fetch("select data from hooks order by id")] == [1, 3]


async def test_a_database_without_the_runtime_is_not_ready(db, bare):
    async with serving(db, lambda: None) as client:
        empty = Database(bare)
        set_database(empty)
        answer = await client.get("/ready")
        assert answer.status_code == 503 and "anton migrate" in answer.json()["detail"]
        await empty.close()


async def test_a_database_that_was_not_migrated_is_503_and_the_log_says_what_to_run(db, bare, caplog):
    def declare() -> None:
        hooks = Table("hooks")
        Webhook("/hook", hooks)
        Webhook("/timed", hooks, verify="slack", secret="s3cret")

        @post("/route")
        async def route(request: Request) -> int:
            hooks.append({"a": 1})
            return 200

    async def asked(client: httpx.AsyncClient) -> set[int]:
        paths = ("/hook", "/timed", "/route")
        answers = [await client.post(path, content=b"1", headers=signed(b"1")) for path in paths]
        assert all(answer.headers["retry-after"] == "2" for answer in answers)
        assert not any("anton" in answer.text for answer in answers)
        return {answer.status_code for answer in answers}

    async with serving(db, declare) as client:
        empty = Database(bare)
        set_database(empty)
        assert await asked(client) == {503} and caplog.text.count("run: anton migrate") == 3
        await empty.close()
        set_database(db)
        async with db.conn() as conn:
            await conn.execute("drop table hooks")
        web.forget_clocks()
        assert await asked(client) == {503} and caplog.text.count("run: anton migrate") == 6


async def test_an_error_of_the_apps_own_sql_is_500(db):
    def declare() -> None:
        @post("/route")
        async def route(request: Request) -> int:
            await sql("select * from nothing.at_all")
            return 200

    async with serving(db, declare) as client:
        assert (await client.post("/route", content=b"1")).status_code == 500


async def test_many_at_once_are_all_there(db):
    async with serving(db, lambda: Webhook("/hook", Table("hooks"))) as client:
        answers = await asyncio.gather(*(client.post("/hook", json=n) for n in range(200)))
        assert {answer.status_code for answer in answers} == {200}
        assert await count(db, "hooks") == 200


@pytest.mark.parametrize("route", [False, True], ids=["webhook", "route"])
def test_on_a_public_address_it_must_be_said_who_may_call(monkeypatch, caplog, route):
    def app(**options: Any) -> App:
        with declaring(App("web")) as made:
            if route:
                post("/hook", **options)(lambda: 200)
            else:
                Webhook("/hook", Table("hooks"), **options)
        return made

    with pytest.raises(ConfigError, match=r"/hook \(tests/test_web.py:\d+\).*0\.0\.0\.0"):
        web.check_public(app(), "0.0.0.0")
    for host in ("127.0.0.1", "localhost", "::1"):
        web.check_public(app(), host)
    assert not caplog.records
    web.check_public(app(verify=False), "0.0.0.0")
    assert "open to everybody on 0.0.0.0: POST /hook" in caplog.text
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ConfigError, match=r'POST /hook needs env\("NO_SUCH"\)'):
        web.check_public(app(verify="slack", secret=env("NO_SUCH")), "0.0.0.0")
    web.check_public(app(verify="slack", secret="value"), "0.0.0.0")


async def test_what_is_open_to_anybody_answers_no_public_address_whatever_serves_it(db, caplog):
    with declaring(App("web")) as app:
        hooks = Table("hooks")
        Webhook("/silent", hooks)
        Webhook("/open", hooks, verify=False)

        @post("/route")
        def route() -> int:
            return 200

    app.settings = object()  # type: ignore[assignment]                # it was loaded
    await migrate(db, app)
    for host, status in (("203.0.113.7", 403), ("[2001:db8::1]", 403), ("127.0.0.1", 200), ("[::ffff:127.0.0.1]", 200),
                         ("testserver", 200)):
        # as an ASGI server says where a request came in
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
            for path in ("/silent", "/route"):
                assert (await client.post(path, json=1)).status_code == status, (host, path)
            assert (await client.post("/open", json=1)).status_code == 200
            assert (await client.get("/health")).status_code == 200
    assert 'POST /silent: it takes requests from anybody, and 203.0.113.7 is a public address' in caplog.text
    await db.close()


def test_a_token_for_our_url_wants_it_said_on_a_public_address():
    with declaring(App("web")) as app:
        Webhook("/hook", Table("hooks"), verify="monday", secret="value")
    with pytest.raises(ConfigError, match="POST /hook needs deployment.url"):
        web.check_public(app, "0.0.0.0")


async def test_the_clock_of_the_signature_is_the_databases(db, secrets):
    async with serving(db, webhooks) as client:
        async with db.conn() as conn:
            await conn.execute("create or replace function anton.now() returns timestamptz language sql volatile as "
                               "$$select clock_timestamp() + interval '1 day'$$")
        web.forget_clocks()
        body = b"{}"
        for at, status in ((time.time(), 401), (time.time() + 86400, 200)):
            assert (await client.post("/slack", content=body, headers=signed(body, at=at))).status_code == status


async def test_a_deadlock_with_another_writer_is_tried_again(db, server):
    """The route waits last, so that it finds the deadlock and is ended, however long the others took."""
    server.sql(f"alter database {db.name} set deadlock_timeout = '50ms'")

    def declare() -> None:
        orders = Table("orders", Order)

        @post("/")
        async def each(last: int) -> int:
            for n in range(1, last + 1):
                orders.select(id=n).update(customer="x")
            return 200

    async with serving(db, declare) as client:
        async with db.conn() as gate, db.conn() as writer, db.conn() as other:
            async def waiting(count: int) -> None:
                while await other.fetchval("select count(*) from pg_locks where not granted") < count:  # noqa: ASYNC110
                    await asyncio.sleep(0)

            await other.execute("insert into orders (customer) select 'a' from generate_series(1, 3)")
            await writer.execute("set deadlock_timeout = '60s'; begin; update orders set customer = 'b' where id = 3")
            await gate.execute("begin; update orders set customer = 'b' where id = 2")
            asked = asyncio.create_task(client.post("/", params={"last": 3}, timeout=60))
            await waiting(1)                                            # the route has 1 and wants 2
            wants = asyncio.create_task(writer.execute("update orders set customer = 'b' where id = 1"))
            await waiting(2)
            await gate.execute("commit")                                # now it wants 3
            await wants
            await writer.execute("commit; reset deadlock_timeout")
            assert (await asked).status_code == 200
            assert [row[0] for row in await other.fetch("select customer from orders")] == ["x", "x", "x"]


def test_any_asgi_server_can_serve_the_app_of_the_current_folder(database, tmp_path):
    (tmp_path / "main.py").write_text(
        "from anton import get\n\n@get('/hello')\ndef hello():\n    return {'hello': 'world'}\n")
    words = [sys.executable, "-m", "uvicorn", "anton:app", "--port", "0"]
    with subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "DATABASE_URL": database}, text=True,
                          stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr is not None
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            assert httpx.get(f"{address}/hello", timeout=60).json() == {"hello": "world"}
            assert httpx.get(f"{address}/ready", timeout=60).json() == {"status": "ready"}
        finally:
            server.terminate()
            server.communicate()
    assert server.returncode in (0, -15)
