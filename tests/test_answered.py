"""Answered: a route with verify= runs once for each delivery; who sends it again gets the first answer again."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import HTTPException, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from serving import count, serving

from anton import web
from anton.app import App
from anton.sense import Request, delete, get, post, put
from anton.table import Table
from anton.verify import SCHEMES, Hmac

pytestmark = pytest.mark.once("routes: the server is asked for the same")

SECRET = "s3cret-of-at-least-24-bytes"


class Note(BaseModel):
    id: int | None = None
    text: str


def github(body: bytes, id: str) -> dict[str, str]:
    return SCHEMES["github"].sign(body, SECRET, id=id)


async def send(client: httpx.AsyncClient, payload: Any, id: str, path: str = "/hook") -> httpx.Response:
    body = json.dumps(payload).encode()
    return await client.post(path, content=body, headers=github(body, id) | {"Content-Type": "application/json"})


def route(answer: Callable[[Any], Any], ran: list[Any], **options: Any) -> Callable[[App], None]:
    """A route that notes what it gets, in the list and in the table, and answers what `answer` makes of it."""
    def declare(app: App) -> None:
        notes = Table("notes", Note)

        @post("/hook", verify="github", secret=SECRET, **options)
        async def hook(request: Request) -> Any:
            ran.append(request.json())
            notes.append({"text": str(request.json())})
            return answer(request.json())

    return declare


@pytest.mark.parametrize(("answer", "status", "body", "kind"), [
    (lambda got: 202, 202, b"", None),
    (lambda got: {"got": got}, 200, b'{"got":1}', "application/json"),
    (lambda got: PlainTextResponse("lunch", 201), 201, b"lunch", "text/plain; charset=utf-8"),
    (lambda got: None, 200, b"null", "application/json"),
])
async def test_a_delivery_that_comes_again_gets_the_first_answer_and_runs_nothing(db, answer, status, body, kind):
    ran: list[Any] = []
    async with serving(db, route(answer, ran)) as client:
        for payload in (1, 1, 2):
            got = await send(client, payload, "same")
            assert (got.status_code, got.content, got.headers.get("content-type")) == (status, body, kind)
        assert ran == [1]
        await send(client, 1, "other")
        assert ran == [1, 1] and await count(db, "notes") == 2
    async with db.conn() as conn:
        rows = await conn.fetch("select webhook, id, status, body, headers from anton.delivery order by id")
    assert [tuple(row)[:4] for row in rows] == [("web/hook", id, status, b"1") for id in ("other", "same")]
    assert rows[0]["headers"]["x-github-delivery"] == "other"


async def test_a_record_that_is_returned_is_answered_again_with_its_key(db):
    def declare(app: App) -> None:
        notes = Table("notes", Note)

        @post("/hook", verify="github", secret=SECRET, status_code=201)
        async def hook(note: Note) -> Note:
            return notes.append(note)

    async with serving(db, declare) as client:
        answers = [await send(client, {"text": "a"}, "same") for _ in range(2)]
        assert [(one.status_code, one.json()) for one in answers] == [(201, {"id": 1, "text": "a"})] * 2


async def test_what_was_not_answered_2xx_runs_again(db):
    ran: list[Any] = []

    def answer(got: Any) -> Any:
        if len(ran) == 1:
            raise RuntimeError("not yet")
        if len(ran) == 2:
            raise HTTPException(422, "not yet")
        return 503 if len(ran) == 3 else 200

    async with serving(db, route(answer, ran)) as client:
        assert [(await send(client, 1, "same")).status_code for _ in range(6)] == [500, 422, 503, 200, 200, 200]
    assert len(ran) == 4 and await count(db, "notes") == 2             # a route that returns 503 commits, as ever


async def test_a_status_that_is_set_on_fastapis_response_counts(db):
    def declare(app: App) -> None:
        @post("/hook", verify="github", secret=SECRET)
        async def hook(note: Note, response: Response) -> Note:
            response.status_code = int(note.text)
            return note

    async with serving(db, declare) as client:
        for status in (203, 422):
            for _ in range(2):
                assert (await send(client, {"text": str(status)}, f"is-{status}")).status_code == status
        async with db.conn() as conn:
            kept = await conn.fetch("select id, status from anton.delivery")
    assert [tuple(row) for row in kept] == [("is-203", 203)]


async def test_of_two_at_once_the_second_waits_for_the_first(db):
    ran: list[Any] = []
    go = asyncio.Event()

    def declare(app: App) -> None:
        @post("/hook", verify="github", secret=SECRET)
        async def hook(request: Request) -> dict[str, int]:
            ran.append(request.json())
            await go.wait()
            if len(ran) == 1:
                raise RuntimeError("the first one fails, the next one tries")
            return {"n": len(ran)}

    async with serving(db, declare) as client:
        sent = [asyncio.create_task(send(client, 1, "same")) for _ in range(5)]
        while not ran:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert (await client.get("/health")).status_code == 200        # the others have come by now
        go.set()
        answers = [await one for one in sent]
        assert sorted(one.status_code for one in answers) == [200, 200, 200, 200, 500]
        assert {one.text for one in answers if one.status_code == 200} == {'{"n":2}'} and ran == [1, 1]


async def test_of_two_processes_one_is_undone_and_answers_as_the_other(db, monkeypatch):
    monkeypatch.setattr("anton.answered._running", _Forgetful())       # what another process does not know of
    ran: list[Any] = []
    both = asyncio.Barrier(2)

    def declare(app: App) -> None:
        notes = Table("notes", Note)

        @post("/hook", verify="github", secret=SECRET)
        async def hook(request: Request) -> dict[str, int]:
            ran.append(len(ran))
            mine = len(ran)
            notes.append({"text": "once"})
            await both.wait()
            return {"n": mine}

    async with serving(db, declare) as client:
        answers = await asyncio.gather(*(send(client, 1, "same") for _ in range(2)))
        assert {one.status_code for one in answers} == {200} and len(ran) == 2
        again = await send(client, 1, "same")
        assert again.json() in ({"n": 1}, {"n": 2})
    assert (await count(db, "notes"), await count(db, "anton.delivery")) == (1, 1)


class _Forgetful(dict[Any, Any]):
    def get(self, key: Any, default: Any = None) -> Any:
        return default

    def __delitem__(self, key: Any) -> None:
        self.pop(key, None)


@pytest.mark.parametrize("state", ["57P01", "XX000"])
async def test_an_answer_that_cannot_be_noted_leaves_and_is_a_2xx_without_a_body_when_it_comes_again(db, state, caplog):
    """As when a process dies after the commit: the delivery is known, what was said to it is not."""
    async with db.conn() as conn:
        await conn.execute("create or replace function anton.keep_reply(p_webhook text, p_id text, p_status int, "
                           "p_reply bytea, p_type text) returns void language plpgsql as "
                           f"$$ begin raise 'lost' using errcode = '{state}'; end $$")
    ran: list[Any] = []
    async with serving(db, route(lambda got: {"got": got}, ran)) as client:
        assert (await send(client, 1, "same")).json() == {"got": 1}
        again = await send(client, 1, "same")
        assert (again.status_code, again.content, ran) == (200, b"", [1])
    assert await count(db, "notes") == 1 and "the answer to delivery same was not kept: lost" in caplog.text


async def test_adyen_hears_what_it_wants_to_from_a_route_too(db):
    items = {"notificationItems": [{"NotificationRequestItem": {
        "pspReference": "p", "eventCode": "AUTHORISATION", "success": "true", "eventDate": "d",
        "merchantAccountCode": "m", "merchantReference": "r", "amount": {"value": 1, "currency": "EUR"}}}]}
    key = "00" * 32
    made = hmac.new(bytes.fromhex(key), b"p::m:r:1:EUR:AUTHORISATION:true", "sha256").digest()
    items["notificationItems"][0]["NotificationRequestItem"]["additionalData"] = {
        "hmacSignature": base64.b64encode(made).decode()}

    def declare(app: App) -> None:
        @post("/hook", verify="adyen", secret=key)
        async def hook(request: Request) -> int:
            return 200

    async with serving(db, declare) as client:
        for _ in range(2):
            answer = await client.post("/hook", json=items)
            assert (answer.status_code, answer.text) == (200, "[accepted]")


async def test_a_known_delivery_is_answered_however_old_its_time_and_a_forged_one_never(db):
    ran: list[Any] = []

    def declare(app: App) -> None:
        @post("/hook", verify="standard_webhooks", secret=key)
        async def hook(request: Request) -> dict[str, Any]:
            ran.append(request.json())
            return {"got": request.json()}

    scheme, now = SCHEMES["standard_webhooks"], time.time()
    key = scheme.pair("x" * 32)[1]
    good = scheme.sign(b"1", key, str(int(now)), id="msg_1")
    async with serving(db, declare) as client:
        assert (await client.post("/hook", content=b"1", headers=good)).json() == {"got": 1}
        async with db.conn() as conn:
            await conn.execute("create or replace function anton.now() returns timestamptz language sql volatile as "
                               "$$select clock_timestamp() + interval '7 days'$$")
        web.forget_clocks()
        assert (await client.post("/hook", content=b"1", headers=good)).json() == {"got": 1}
        late = scheme.sign(b"1", key, str(int(now)), id="msg_2")
        forged = good | {"webhook-signature": late["webhook-signature"]}
        for headers in (late, forged):
            answer = await client.post("/hook", content=b"1", headers=headers)
            assert answer.status_code == 401
            assert answer.json() == {"detail": "the request is not signed as it must be"}
    assert ran == [1]


async def test_the_same_bytes_for_another_address_or_method_are_another_request(db):
    ran: list[str] = []
    signed = Hmac("X-Sig", signed="{ts}.{body}", timestamp="X-At")

    def declare(app: App) -> None:
        async def take(request: Request) -> int:
            ran.append(f"{request.method} {request.path} {request.query.get('a', '')}")
            return 200

        for method in (post, put, delete, get):
            method("/things/{n}", verify=signed, secret=SECRET)(take)

    headers = signed.sign(b"", SECRET, signed.stamp(time.time()))
    asked = ["POST /things/1", "POST /things/2", "POST /things/1?a=x", "PUT /things/1", "DELETE /things/1",
             "GET /things/1", "GET /things/1"]
    async with serving(db, declare) as client:
        for one in asked + asked[:5]:
            method, path = one.split()
            assert (await client.request(method, path, headers=headers)).status_code == 200
    assert ran == ["POST /things/1 ", "POST /things/2 ", "POST /things/1 x", "PUT /things/1 ", "DELETE /things/1 ",
                   "GET /things/1 ", "GET /things/1 "]


async def test_without_an_id_and_without_verify_each_request_runs(db):
    ran: list[Any] = []

    def declare(app: App) -> None:
        @post("/signed", verify=Hmac("X-Sig"), secret=SECRET)
        @post("/open")
        async def hook(request: Request) -> int:
            ran.append(request.json())
            return 200

    async with serving(db, declare) as client:
        for path in ("/signed", "/signed", "/open", "/open"):
            assert (await client.post(path, content=b"1", headers=Hmac("X-Sig").sign(b"1", SECRET))).status_code == 200
    assert len(ran) == 4 and await count(db, "anton.delivery") == 0


async def test_a_credential_is_not_kept_with_the_delivery(db):
    def declare(app: App) -> None:
        @post("/hook", verify="gitlab", secret=SECRET)
        async def hook(request: Request) -> int:
            return 200

    async with serving(db, declare) as client:
        signed = SCHEMES["gitlab"].sign(b"{}", SECRET, id="k") | {"Cookie": f"a={SECRET}"}
        assert (await client.post("/hook", content=b"{}", headers=signed)).status_code == 200
    async with db.conn() as conn:
        [headers] = [row[0] for row in await conn.fetch("select headers::text from anton.delivery")]
    assert SECRET not in headers and "idempotency-key" in headers
