"""Routes: FastAPI's grammar around Anton's commit: mounts, middleware, handlers of errors, forms, limits, values."""

from __future__ import annotations

import asyncio
import tracemalloc
from decimal import Decimal
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, FastAPI, File, Form, Header, HTTPException, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from serving import count, serving
from starlette.middleware.cors import CORSMiddleware

from anton import flow, web
from anton.app import App, declaring
from anton.db import Database, set_database
from anton.errors import BadOption, DuplicateName, NoScope
from anton.query import sql
from anton.sense import Request, get, post, put
from anton.table import Table
from anton.write import transaction

pytestmark = pytest.mark.once("routes: the server is asked for the same")


class Order(BaseModel):
    id: int | None = None
    customer: str
    total: Annotated[Decimal, Field(gt=0)] = Decimal(1)


async def test_a_mounted_app_is_served_below_its_path_and_after_the_routes(db):
    def declare(app: App) -> None:
        admin = FastAPI()
        notes = Table("notes")

        @admin.get("/hello")
        async def hello() -> str:
            async with transaction():
                notes.append({"by": "admin"})
            return "admin"

        @admin.get("/unsaid")
        async def unsaid() -> str:
            with pytest.raises(NoScope, match="async with transaction"):
                notes.append({"by": "nobody"})
            return "refused"

        @get("/admin/own")
        def own() -> str:
            return "own"

        app.mount("/admin", admin)
        app.mount("/", PlainTextResponse("anything else"))

    async with serving(db, declare) as client:
        assert (await client.get("/admin/hello")).json() == "admin"
        assert (await client.get("/admin/unsaid")).json() == "refused"
        assert (await client.get("/admin/own")).json() == "own"
        assert (await client.get("/nothing")).text == "anything else"
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert await count(db, "notes") == 1


async def test_middleware_is_around_everything_and_the_last_one_added_is_the_outermost(db):
    passed: list[str] = []

    def declare(app: App) -> None:
        @app.middleware("http")
        async def first(request: Any, call_next: Any) -> Any:
            passed.append("first")
            answer = await call_next(request)
            answer.headers["x-first"] = "1"
            return answer

        @app.middleware("http")
        async def second(request: Any, call_next: Any) -> Any:
            passed.append("second")
            return await call_next(request)

        app.add_middleware(CORSMiddleware, allow_origins=["https://shop.example"], allow_methods=["POST"])
        events = Table("events")

        @post("/events")
        def keep(request: Request) -> int:
            events.append({"got": request.json()})
            return 201

    async with serving(db, declare) as client:
        sent = {"Origin": "https://shop.example"}
        answer = await client.post("/events", json=1, headers=sent)
        assert (answer.status_code, answer.headers["x-first"]) == (201, "1")
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        assert passed == ["second", "first"]
        asked = await client.options("/events", headers=sent | {"Access-Control-Request-Method": "POST"})
        assert asked.status_code == 200 and passed == ["second", "first"]
        assert await count(db, "events") == 1


async def test_an_apps_own_exception_handlers_answer_and_what_was_written_is_dropped(db):
    class OutOfStock(Exception):
        pass

    def declare(app: App) -> None:
        orders = Table("orders", Order)

        @post("/orders")
        async def create(order: Order) -> Order:
            orders.append(order)
            raise OutOfStock(order.customer)

        @get("/teapot")
        def teapot() -> int:
            raise HTTPException(418, "short and stout", {"x-tea": "green"})

        @app.exception_handler(OutOfStock)
        async def out_of_stock(request: Any, error: OutOfStock) -> JSONResponse:
            return JSONResponse({"sold out for": str(error)}, 410)

        @app.exception_handler(404)
        async def not_here(request: Any, error: Exception) -> PlainTextResponse:
            return PlainTextResponse("nothing here", 404)

    async with serving(db, declare) as client:
        answer = await client.post("/orders", json={"customer": "ann"})
        assert (answer.status_code, answer.json()) == (410, {"sold out for": "ann"})
        assert await count(db, "orders") == 0
        assert (await client.get("/nowhere")).text == "nothing here"
        tea = await client.get("/teapot")
        assert (tea.status_code, tea.json(), tea.headers["x-tea"]) == (418, {"detail": "short and stout"}, "green")


def test_what_is_mounted_is_named_where_it_is_open_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    with declaring(App("web")) as app:
        app.mount("/static", PlainTextResponse(""))
    web.check_public(app, "0.0.0.0")
    assert "open to everybody on 0.0.0.0: what is mounted at /static" in caplog.text
    assert flow.endpoints(app) == "/static mounted"


def test_what_is_no_mount_middleware_or_handler_is_refused_where_it_is_declared() -> None:
    with declaring(App("web")) as app:
        app.mount("/static", PlainTextResponse(""))
        for wrong in (lambda: app.mount("static", PlainTextResponse("")), lambda: app.mount("/x", "no app"),
                      lambda: app.add_middleware("no class"), lambda: app.middleware("https"),
                      lambda: app.exception_handler("404")):
            with pytest.raises(BadOption):
                wrong()
        with pytest.raises(DuplicateName, match=r'mount /static.*tests/test_routes.py:\d+ and tests/test_routes.py'):
            app.mount("/static/", PlainTextResponse(""))


async def test_forms_files_headers_and_background_tasks_are_fastapis(db):
    done = asyncio.Event()

    def declare(app: App) -> None:
        uploads = Table("uploads")

        @post("/uploads")
        async def upload(background: BackgroundTasks, title: Annotated[str, Form()], file: UploadFile,
                         agent: Annotated[str, Header(alias="user-agent")]) -> Any:
            background.add_task(done.set)
            return uploads.append({"title": title, "name": file.filename, "text": (await file.read()).decode()})

        @post("/form")
        def form(request: Request) -> dict[str, str]:
            return request.form()

    async with serving(db, declare) as client:
        answer = await client.post("/uploads", data={"title": "t"}, files={"file": ("a.txt", b"hello")})
        assert answer.json() == {"id": 1, "title": "t", "name": "a.txt", "text": "hello"}
        await done.wait()
        assert (await client.post("/form", data={"a": "1", "b": "ü"})).json() == {"a": "1", "b": "ü"}
        assert (await client.post("/form", content=b"a=\xff\xfe")).status_code == 400


async def test_what_a_background_task_writes_is_a_transaction_of_its_own(db):
    done = asyncio.Event()

    def declare(app: App) -> None:
        notes = Table("notes")

        async def later() -> None:
            with pytest.raises(NoScope, match="async with transaction"):
                notes.append({"by": "nobody"})
            async with transaction():
                notes.append({"by": "background"})
            done.set()

        @post("/")
        async def answer(background: BackgroundTasks) -> int:
            background.add_task(later)
            notes.append({"by": "route"})
            return 201

        @post("/plain")
        def plain(background: BackgroundTasks) -> dict[str, str]:
            background.add_task(later)
            notes.append({"by": "route"})
            return {}

    async with serving(db, declare) as client:
        for path in ("/", "/plain"):
            done.clear()
            await client.post(path)
            await done.wait()
        async with db.conn() as conn:
            found = [row[0]["by"] for row in await conn.fetch("select data from notes order by id")]
        assert found == ["route", "background"] * 2


async def test_a_form_with_too_many_or_too_large_parts_gets_413(db):
    def declare(app: App) -> None:
        @post("/fields")
        def fields(a: Annotated[str, Form()]) -> int:
            return 200

        @post("/files")
        def files(file: Annotated[list[UploadFile], File()]) -> int:
            return 200

        @post("/plain")
        def plain(request: Request) -> int:
            return len(request.form()) and 200

    async with serving(db, declare) as client:
        form = {"content-type": "application/x-www-form-urlencoded"}
        for path in ("/fields", "/plain"):
            assert (await client.post(path, content=b"a=1&" * 1000 + b"a=1", headers=form)).status_code == 413, path
            assert (await client.post(path, content=b"a=1", headers=form)).status_code == 200, path
        assert (await client.post("/files", files=[("file", ("x", b""))] * 1001)).status_code == 413
        assert (await client.post("/files", files=[("file", ("x", b""))] * 3)).status_code == 200
        assert (await client.post("/fields", files={"b": (None, b"x" * 1_100_000)})).status_code == 413


async def test_a_limit_that_cannot_be_is_the_senders_doing(db):
    def declare(app: App) -> None:
        orders = Table("orders", Order)

        @get("/orders")
        async def some(limit: int) -> list[Order]:
            return await orders.select().limit(limit)

    async with serving(db, declare) as client:
        answer = await client.get("/orders?limit=-1")
        assert (answer.status_code, answer.json()["detail"]) == (400, "limit(-1) is not possible. Allowed: 0 or more.")
        assert (await client.get(f"/orders?limit={2**70}")).status_code == 400
        assert (await client.get("/orders?limit=0")).json() == []


async def test_a_body_beyond_the_limit_gets_413_also_without_a_length_and_a_route_may_set_its_own(db):
    def declare(app: App) -> None:
        for path, options in (("/small", {"max_body_size": 100}), ("/large", {"max_body_size": 20_000_000}), ("/", {})):
            @post(path, **options)
            def take(request: Request) -> int:
                return 200

        app.mount("/mounted", take_all)

    async def take_all(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await PlainTextResponse("all")(scope, receive, send)

    async def chunks(size: int) -> Any:
        for _ in range(size // 100_000 + 1):
            yield b"x" * 100_000

    async with serving(db, declare) as client:
        for path, status in (("/small", 413), ("/large", 200), ("/", 413), ("/mounted/", 413)):
            for body in (b"x" * 10_001_000, chunks(10_001_000)) if path != "/large" else (b"x" * 10_001_000,):
                answer = await client.post(path, content=body)
                assert answer.status_code == status, path
                assert status == 200 or answer.json()["detail"] == "Content Too Large"
        assert (await client.post("/", content=b"x" * 10_000_000)).status_code == 200
        assert (await client.post("/small", content=b"x" * 100)).status_code == 200


async def test_a_large_file_is_not_held_in_memory(db):
    def declare(app: App) -> None:
        @post("/films", max_body_size=100_000_000)
        async def film(file: UploadFile) -> dict[str, int]:
            return {"size": file.size or 0}

    async def parts(count: int) -> Any:
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(count):
            yield bytes(1_000_000)
        yield b"\r\n--x--\r\n"

    async with serving(db, declare) as client:
        tracemalloc.start()
        try:
            sent = {"content-type": "multipart/form-data; boundary=x"}
            answer = await client.post("/films", content=parts(30), headers=sent, timeout=60)
            assert answer.json() == {"size": 30_000_000}
            assert tracemalloc.get_traced_memory()[1] < 15_000_000
        finally:
            tracemalloc.stop()


async def test_a_route_may_take_a_form_and_the_request(db):
    def declare(app: App) -> None:
        @post("/")
        def both(a: Annotated[str, Form()], request: Request) -> dict[str, str]:
            return {"a": a, "body": request.text()}

    async with serving(db, declare) as client:
        assert (await client.post("/", data={"a": "1"})).json() == {"a": "1", "body": "a=1"}


@pytest.mark.parametrize("path", [
    f"/orders/{10**30}", "/orders/9223372036854775808", "/orders?customer=a%00b", "/orders?customer=%ff",
    "/orders?since=a%00", "/search?q=%00", "/at?at=9999-12-31T23:59:59-23:00", f"/orders/{'9' * 5000}"])
async def test_values_that_the_database_has_no_place_for_are_the_senders_and_get_4xx(db, path):
    def declare(app: App) -> None:
        orders = Table("orders", Order)

        @get("/orders/{id}")
        async def one(id: int) -> Order:
            found = await orders.aget(id)
            if found is None:
                raise HTTPException(404)
            return found

        @get("/orders")
        def some(customer: str = "", since: str = "") -> list[Order]:
            return list(orders.select(customer=customer)) + list(orders.select("customer > {since}", since=since))

        @get("/search")
        async def search(q: str) -> list[dict[str, Any]]:
            return [dict(row) for row in await sql("select id from orders where customer like {q}", q=q)]

        @get("/at")
        async def at(at: str) -> list[dict[str, Any]]:
            return [dict(row) for row in await sql("select {at}::text::timestamptz as at", at=at)]

    async with serving(db, declare) as client:
        answer = await client.get(path)
        assert answer.status_code in (200, 400, 404, 422), answer.text
        assert "select" not in answer.text


async def test_an_error_of_the_routes_own_sql_is_500_and_not_the_senders(db):
    def declare(app: App) -> None:
        @get("/")
        async def divide() -> Any:
            return [dict(row) for row in await sql("select 1 / 0 as n")]

    async with serving(db, declare) as client:
        answer = await client.get("/")
        assert (answer.status_code, answer.json()) == (500, {"detail": "Internal Server Error"})


@pytest.mark.parametrize("body", [
    b"1e999", b"-1e+999", b'{"a": [NaN]}', b"Infinity", b'"\\ud800"', b'{"\\udfff": 1}', b'"\xed\xa0\x80"', b"[" * 300,
    b"\xef\xbb\xbf1", b"1" * 400 + b".5"])
async def test_json_that_is_none_by_the_standard_gets_400_in_every_route(db, body):
    def declare(app: App) -> None:
        @post("/own")
        def own(request: Request) -> Any:
            return {"got": request.json()}

        @post("/any")
        def any_(body: Any = None) -> Any:
            return {"got": body}

        @put("/typed")
        def typed(order: Order) -> Order:
            return order

    async with serving(db, declare) as client:
        sent = {"content-type": "application/json"}
        for path, method in (("/own", "POST"), ("/typed", "PUT")):
            answer = await client.request(method, path, content=body, headers=sent)
            assert answer.status_code == 400 and "JSON" in answer.json()["detail"], (path, answer.text)
        whole = await client.post("/own", content=b'{"n": 123456789012345678901234567890}', headers=sent)
        assert whole.json() == {"got": {"n": 123456789012345678901234567890}}


async def test_a_422_is_answered_whatever_was_sent(db):
    def declare(app: App) -> None:
        @post("/")
        def take(title: Annotated[int, Form()]) -> int:
            return 200

        @put("/")
        def typed(order: Order) -> int:
            return 200

    async with serving(db, declare) as client:
        form = {"content-type": "application/x-www-form-urlencoded; charset=raw_unicode_escape"}
        answer = await client.post("/", content=b"title=\\ud800", headers=form)
        assert answer.status_code in (400, 422), answer.text
        wrong = (await client.put("/", json={"customer": 5, "total": 0})).json()["detail"]
        assert [error["loc"] for error in wrong] == [["body", "customer"], ["body", "total"]]


async def test_a_sender_that_leaves_in_the_middle_is_no_error(db, caplog):
    def declare(app: App) -> None:
        events = Table("events")

        @post("/")
        def keep(request: Request) -> int:
            events.append({"got": request.json()})
            return 201

    async with serving(db, declare) as client:
        for head in (b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n5\r\n{"):
            _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n" + head)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        assert (await client.post("/", json=1)).status_code == 201
        assert await count(db, "events") == 1
    assert not caplog.records


@pytest.mark.parametrize("host", [b"[", b"a b", b"\xff", b"", b"x:99999999", b"/", b"?"])
async def test_any_host_header_is_answered(db, host):
    def declare(app: App) -> None:
        @get("/a/")
        def a(request: Request) -> dict[str, str]:
            return {"path": request.path}

    async with serving(db, declare) as client:
        for path in (b"/a/", b"/a", b"/b"):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(b"GET %s HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n\r\n" % (path, host))
            status = (await reader.read()).split()[1]
            assert status[:1] in b"234", (path, status)
            writer.close()
            await writer.wait_closed()


async def test_the_database_away_is_503_also_in_middleware_and_mounted_apps(db):
    away = Database("postgresql://nobody@127.0.0.1:1/nothing")

    def declare(app: App) -> None:
        @app.middleware("http")
        async def look(request: Any, call_next: Any) -> Any:
            if request.url.path == "/middle":
                await sql("select 1")
            return await call_next(request)

    async with serving(db, declare) as client:
        set_database(away)
        answer = await client.get("/middle")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "Traceback" not in answer.text


async def test_ready_says_what_the_database_lacks_and_one_ahead_of_the_code_lacks_nothing(db, tmp_path):
    def declare(app: App) -> None:
        app.folder = tmp_path
        Table("orders", Order)
        Table('shop."Odd.name"')
        (tmp_path / "migrations").mkdir()
        (tmp_path / "migrations" / "0001_make_shop.sql").write_text(
            'create schema shop; create table shop."Odd.name" (id bigint primary key);')

    async with serving(db, declare) as client:
        async with db.conn() as conn:
            assert (await client.get("/ready")).json() == {"status": "ready"}
            await conn.execute("insert into anton.migration values ('anton', 'migrations/9999_of_tomorrow.sql', '')")
            assert (await client.get("/ready")).status_code == 200
            for change, says in (
                ("drop table orders", "table orders"),
                ('alter table shop."Odd.name" rename to even', 'table shop."Odd.name"'),
                ("delete from anton.migration where set_name = 'app:web'", "0001_make_shop.sql of the app"),
                ("delete from anton.migration where name like '%/0001_init.sql'", "migrations/0001_init.sql, "),
                ("drop function anton.missing", "the runtime of this release in schema"),
            ):
                await conn.execute(change)
                answer = await client.get("/ready")
                assert answer.status_code == 503 and says in answer.json()["detail"], (change, answer.text)
                assert "anton migrate" in answer.json()["detail"] and answer.headers["retry-after"]


async def test_a_database_that_only_reads_is_not_ready(db, server):
    async with serving(db, lambda app: None) as client:
        server.sql(f"alter database {db.name} set default_transaction_read_only = on",
                   f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{db.name}'")
        answer = await client.get("/ready")
        assert answer.status_code == 503 and "can be written to" in answer.json()["detail"]
