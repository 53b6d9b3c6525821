"""Webhooks: a 2xx is a record, once; what is refused leaves none, and its neighbours do not notice."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator
from serving import count, serving

from anton import web, webhook
from anton.app import App, declaring
from anton.db import Database, set_database
from anton.errors import BadOption, ConfigError
from anton.sense import Webhook
from anton.status import status
from anton.table import Table
from anton.verify import SCHEMES, Hmac
from chaos.proxy import Cut, Proxy

pytestmark = pytest.mark.once("routes: the server is asked for the same")

SECRET = "s3cret-of-at-least-24-bytes"


class Order(BaseModel):
    id: int | None = None
    customer: str
    total: Decimal = Decimal(1)


def github(body: bytes, id: str, secret: str = SECRET) -> dict[str, str]:
    return SCHEMES["github"].sign(body, secret, id=id)


def hook(**options: Any) -> Callable[[App], Any]:
    return lambda app: Webhook("/hook", Table("hooks"), verify="github", secret=SECRET, **options)


def typed(model: type[BaseModel] = Order, **options: Any) -> Callable[[App], Any]:
    return lambda app: Webhook("/hook", Table("orders", model, unique=["customer"] if model is Order else ()),
                               verify="github", secret=SECRET, **options)


async def send(client: httpx.AsyncClient, payload: Any, id: str = "", **headers: str) -> httpx.Response:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return await client.post("/hook", content=body, headers=github(body, id or str(uuid.uuid4())) | headers)


async def fetch(db: Database, query: str) -> list[tuple[Any, ...]]:
    async with db.conn() as conn:
        return [tuple(row) for row in await conn.fetch(query)]


# Kept


async def test_what_was_sent_is_kept_raw_by_its_id_without_credentials(db):
    body = '{"b": 1, "a":  "ä", "b": 2}'.encode()
    async with serving(db, hook()) as client:
        sent = await send(client, body, "one", Authorization="Bearer x", Cookie="y", **{"X-GitHub-Event": "push"})
        assert (sent.status_code, sent.content) == (200, b"")
    query = "select webhook, id, status, headers, body from anton.delivery"
    [(name, id, status, headers, raw)] = await fetch(db, query)
    assert (name, id, status, raw) == ("web/hook", "one", 200, body)
    assert headers["x-github-event"] == "push" and headers["x-hub-signature-256"].startswith("sha256=")
    assert not {"authorization", "cookie"} & set(headers)
    [(data,)] = await fetch(db, "select data from hooks")
    assert data["payload"] == {"a": "ä", "b": 2} and data["headers"] == headers
    assert abs(datetime.fromisoformat(data["timestamp"]) - datetime.now(UTC)).total_seconds() < 60


async def test_a_secret_that_is_sent_along_is_not_kept(db):
    def declare(app: App) -> None:
        Webhook("/hook", Table("hooks"), verify="gitlab", secret=SECRET)

    async with serving(db, declare) as client:
        signed = SCHEMES["gitlab"].sign(b"{}", SECRET)
        assert SECRET in signed.values()
        assert (await client.post("/hook", content=b"{}", headers=signed)).status_code == 200
        assert (await client.post("/hook", content=b"{}")).status_code == 401
    for query in ("select headers::text from anton.delivery", "select data::text from hooks"):
        assert SECRET not in str(await fetch(db, query))


async def test_numbers_are_kept_as_they_were_sent(db):
    body = b'{"n": 123456789012345678901234567890.10, "m": 1e300}'
    async with serving(db, hook()) as client:
        assert (await send(client, body)).status_code == 200
    assert await fetch(db, "select data->'payload'->>'n' from hooks") == [("123456789012345678901234567890.10",)]


class Colour(Enum):
    RED = "red"


class Wide(BaseModel):
    key: str
    colour: Colour
    at: datetime
    price: Decimal
    tags: list[str] | None = None
    numbers: list[int] = []
    times: list[datetime] = []
    more: dict[str, Any] = {}
    raw: bytes = b""
    kind: Literal["a", "b"] = "a"


async def test_a_model_takes_values_of_all_kinds_and_several_webhooks_write_one_table(db):
    def declare(app: App) -> None:
        wide = Table("wide", Wide, key="key")
        Webhook("/hook", wide, verify="github", secret=SECRET)
        Webhook("/other", wide)

    value = {"key": "k", "colour": "red", "at": "2026-01-02T03:04:05Z", "price": 1.10, "tags": ["a,b", 'c"{', None],
             "numbers": [1, -2], "times": ["2026-01-02T03:04:05Z"], "more": {"a": [1, {"b": None}]}, "raw": "xyz"}
    async with serving(db, declare) as client:
        assert (await send(client, value)).status_code == 422          # None is no text
        value["tags"] = ["a,b", 'c"{', ""]
        other = value | {"key": "l", "tags": None}
        answers = await asyncio.gather(send(client, value), client.post("/other", json=other))
        assert [answer.status_code for answer in answers] == [200, 200]
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    rest = ([1, -2], [at], {"a": [1, {"b": None}]}, b"xyz", "a")
    assert await fetch(db, "select * from wide order by key") == [
        ("k", "red", at, Decimal("1.10"), ["a,b", 'c"{', ""], *rest), ("l", "red", at, Decimal("1.10"), None, *rest)]


async def test_a_key_is_made_by_the_database_unless_it_is_sent(db):
    async with serving(db, typed()) as client:
        for order in ({"customer": "ann"}, {"customer": "bob", "id": 700}, {"customer": "cal"}):
            assert (await send(client, order)).status_code == 200
    rows = await fetch(db, "select id, customer from orders order by customer")
    assert rows == [(1, "ann"), (700, "bob"), (2, "cal")]


async def test_a_table_that_was_there_before_takes_what_its_columns_say(db, caplog):
    async with db.conn() as conn:
        await conn.execute("create table seen (timestamp timestamptz, payload json, headers text);"
                           "create table other (n int)")

    def declare(app: App) -> None:
        Webhook("/hook", Table("seen"), verify="github", secret=SECRET)
        Webhook("/wrong", Table("other"))

    async with serving(db, declare) as client:
        assert (await send(client, {"a": 1}, "x")).status_code == 200
        wrong = await client.post("/wrong", json=1)
        assert (wrong.status_code, wrong.json()) == (500, {"detail": "Internal Server Error"})
    [(payload, headers)] = await fetch(db, "select payload, headers from seen")
    assert payload == {"a": 1} and json.loads(headers)["x-github-delivery"] == "x"
    assert 'table "other" has no timestamp, payload, headers' in caplog.text


async def test_a_column_that_came_later_is_found(db):
    async with serving(db, typed()) as client:
        assert (await send(client, {"customer": "ann"})).status_code == 200
        async with db.conn() as conn:
            await conn.execute("alter table orders rename to old; create table orders (like old including all); "
                               "alter table orders alter customer type varchar(5)")
        assert (await send(client, {"customer": "bob"})).status_code == 200
        assert (await send(client, {"customer": "too long"})).status_code == 422
    assert await count(db, "orders") == 1


async def test_middleware_of_the_app_sees_what_comes_for_a_webhook(db):
    seen: list[str] = []

    def declare(app: App) -> None:
        hook()(app)

        @app.middleware("http")
        async def note(request: Any, call_next: Any) -> Any:
            seen.append(request.url.path)
            return await call_next(request)

    async with serving(db, declare) as client:
        assert (await send(client, 1)).status_code == 200
        assert (await client.get("/hook")).status_code == 405
    assert seen == ["/hook", "/hook"] and await count(db, "hooks") == 1


# Once


async def test_a_delivery_that_comes_again_gets_its_first_answer_and_leaves_no_second_record(db):
    async with serving(db, hook()) as client:
        for payload in (1, 1, 2):
            assert (await send(client, payload, "same")).status_code == 200
        assert (await send(client, 1, "other")).status_code == 200
        assert (await client.post("/hook", content=b"1", headers=github(b"1", "same", "wrong"))).status_code == 401
    assert await fetch(db, "select data->'payload' from hooks order by id") == [(1,), (1,)]


async def test_fifty_at_once_with_one_id_through_two_servers_are_one_record(db):
    async with serving(db, hook()) as client, serving(db, hook()) as other:
        answers = await asyncio.gather(*(send(one, n, f"id-{n % 5}") for n in range(50) for one in (client, other)))
    assert {answer.status_code for answer in answers} == {200}
    assert (await count(db, "hooks"), await count(db, "anton.delivery")) == (5, 5)


async def test_two_webhooks_may_get_the_same_id(db):
    def declare(app: App) -> None:
        hooks = Table("hooks")
        for path in ("/hook", "/other"):
            Webhook(path, hooks, verify="github", secret=SECRET)

    async with serving(db, declare) as client:
        answers = await asyncio.gather(*(client.post(path, content=b"1", headers=github(b"1", "same"))
                                         for path in ("/hook", "/other", "/hook")))
    assert {answer.status_code for answer in answers} == {200} and await count(db, "hooks") == 2


async def test_without_an_id_each_request_is_a_record(db):
    async with serving(db, lambda app: Webhook("/hook", Table("hooks"))) as client:
        for _ in range(3):
            assert (await client.post("/hook", json=1)).status_code == 200
    assert await count(db, "hooks") == 3


async def test_an_old_timestamp_is_refused_unless_the_delivery_is_known(db):
    def declare(app: App) -> None:
        Webhook("/hook", Table("hooks"), verify="standard_webhooks", secret=key)

    scheme, now = SCHEMES["standard_webhooks"], time.time()
    key = scheme.pair("x" * 32)[1]
    signed = scheme.sign(b"{}", key, str(int(now)), id="msg_1")
    async with serving(db, declare) as client:
        assert (await client.post("/hook", content=b"{}", headers=signed)).status_code == 200
        async with db.conn() as conn:
            await conn.execute("create or replace function anton.now() returns timestamptz language sql volatile as "
                               "$$select clock_timestamp() + interval '7 days'$$")
        web.forget_clocks()
        await _maintained(db)
        assert (await client.post("/hook", content=b"{}", headers=signed)).status_code == 200
        late = scheme.sign(b"{}", key, str(int(now)), id="msg_2")
        assert (await client.post("/hook", content=b"{}", headers=late)).status_code == 401
        forged = signed | {"webhook-signature": late["webhook-signature"]}
        assert (await client.post("/hook", content=b"{}", headers=forged)).status_code == 401
    assert await count(db, "hooks") == 1


async def _maintained(db: Database) -> list[str]:
    async with db.conn() as conn:
        done = []
        while (step := await db.call_value(conn, "maintain")) is not None:
            done.append(step)
        return done


async def test_deliveries_are_forgotten_after_eight_days_and_by_the_index_on_their_time(db):
    async with serving(db, hook()) as client:
        assert (await send(client, 1)).status_code == 200
    async with db.conn() as conn:
        await conn.execute("insert into anton.delivery select 'web/hook', 'old' || n, now() - interval '8 days 1 s', "
                           "200, '{}', '' from generate_series(1, 3) n")
        await conn.execute("set enable_seqscan = off")                 # as the function does
        plan = await conn.fetch("explain select ctid from anton.delivery where at < '2026-01-01' limit 10000")
        await conn.execute("reset enable_seqscan")
        assert "Bitmap Index Scan on delivery_at_idx" in str(plan)
    assert await _maintained(db) == ["3 deliveries forgotten"]
    assert await count(db, "anton.delivery") == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=25))
def test_records_are_the_distinct_ids_that_were_answered_2xx(db, sent):
    async def run() -> None:
        async with serving(db, hook()) as client:
            async with db.conn() as conn:
                await conn.execute("truncate hooks, anton.delivery")
            answers = await asyncio.gather(*(send(client, n if good else b"{", f"id-{n}") for n, good in sent))
            kept = {n for (n, _), answer in zip(sent, answers, strict=True) if answer.status_code == 200}
            assert {answer.status_code for answer in answers} <= {200, 400}
            rows = await fetch(db, "select data->'payload' from hooks")
            assert sorted(row[0] for row in rows) == sorted(kept) == sorted({n for n, good in sent if good})

    asyncio.run(run())


async def test_a_quarantined_delivery_gets_its_first_answer_again_also_when_it_is_old(db):
    def declare(app: App) -> None:
        Webhook("/hook", Table("orders", Order), verify="standard_webhooks", secret=key)

    scheme, now = SCHEMES["standard_webhooks"], time.time()
    key = scheme.pair("x" * 32)[1]
    signed = scheme.sign(b"{}", key, str(int(now)), id="msg_1")
    async with serving(db, declare) as client:
        assert (await client.post("/hook", content=b"{}", headers=signed)).status_code == 422
        async with db.conn() as conn:
            await conn.execute("create or replace function anton.now() returns timestamptz language sql volatile as "
                               "$$select clock_timestamp() + interval '1 day'$$")
        web.forget_clocks()
        again = await client.post("/hook", content=b"{}", headers=signed)
        assert again.status_code == 422 and "customer" in str(again.json()["detail"])
        unknown = await client.post("/hook", content=b"{}", headers=scheme.sign(b"{}", key, str(int(now)), id="msg_2"))
        assert (unknown.status_code, unknown.json()) == (401, {"detail": "the request is not signed as it must be"})
    assert await count(db, "anton.quarantine") == 1


async def test_an_event_without_a_body_is_a_record_where_the_service_sends_such(db):
    def declare(app: App) -> None:
        Webhook("/hook", Table("hooks"), verify="google_channels", secret=SECRET)

    sent = {"X-Goog-Channel-Token": SECRET, "X-Goog-Channel-ID": "c", "X-Goog-Resource-State": "exists"}
    async with serving(db, declare) as client:
        for number in ("1", "2", "2"):
            answer = await client.post("/hook", content=b"", headers=sent | {"X-Goog-Message-Number": number})
            assert answer.status_code == 200
        assert (await client.post("/hook", content=b"{", headers=sent)).status_code == 400
    rows = await fetch(db, "select data->'payload', data->'headers'->>'x-goog-message-number' from hooks order by id")
    assert rows == [(None, "1"), (None, "2")]
    assert await fetch(db, "select distinct body from anton.delivery") == [(b"",)]


# Refused


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff\xfe", b'{"a": "\x00"}', b"[" * 100_000, b'"\\ud800"', b'"\\u0000"', b"NaN", b"1e400", b"1,2",
    b"1],[2", b"[" * 202 + b"]" * 202, b"\xef\xbb\xbf1", b'{"n": 1e-99999}', b'1}, "headers": {"a": 1'])
async def test_a_body_that_cannot_be_kept_gets_400_and_its_neighbours_200(db, body):
    async with serving(db, hook()) as client:
        answers = await asyncio.gather(*(send(client, n) for n in range(8)), send(client, body),
                                       *(send(client, n) for n in range(8)))
        assert [answer.status_code for answer in answers] == [200] * 8 + [400] + [200] * 8
        assert "Traceback" not in answers[8].text and answers[8].json()["detail"]
    assert (await count(db, "hooks"), await count(db, "anton.delivery")) == (16, 16)


async def test_the_log_says_what_got_400_and_413_for_it_is_kept_nowhere(db, caplog, monkeypatch):
    monkeypatch.setattr("anton.webhook.MAX_BODY", 10)
    with caplog.at_level("INFO", "anton.web"):
        async with serving(db, hook()) as client:
            assert (await send(client, b"{")).status_code == 400
            assert (await send(client, b"[1,2,3,4,5]")).status_code == 413
            assert (await send(client, b"[1]")).status_code == 200
    said = [record.getMessage() for record in caplog.records if record.name == "anton.web"]
    assert [text.split(": ")[0] for text in said] == ["400 for web/hook", "413 for web/hook"]
    assert "not JSON" in said[0] and "larger than 10 bytes" in said[1]


async def test_a_nul_is_quarantined_with_its_field_and_harmless_where_the_model_has_none(db):
    class Commit(BaseModel):
        id: int | None = None
        author: str
        tags: list[str] = []
        extra: dict[str, str] = {}
        kind: str = "a"

        @field_validator("kind")
        @classmethod
        def _known(cls, kind: str) -> str:
            if kind not in ("a", "b"):
                raise ValueError(f"no kind: {kind}")
            return kind

    def declare(app):
        Webhook("/hook", Table("commits", Commit), verify=False, invalid=202)

    async with serving(db, declare) as client:
        assert (await send(client, {"author": "ann", "message": "a\0b"})).status_code == 200
        for bad in ({"author": "a\0b"}, {"author": "a", "tags": ["a\0b"]}, {"author": "a", "extra": {"k": "a\0b"}},
                    {"author": "a", "kind": "a\0b"}):
            answers = await asyncio.gather(send(client, {"author": "bob"}), send(client, bad))
            assert [answer.status_code for answer in answers] == [200, 202]
    assert await fetch(db, "select author, count(*) from commits group by 1 order by 1") == [("ann", 1), ("bob", 4)]
    rows = await fetch(db, "select convert_from(body, 'UTF8'), error from anton.quarantine order by at")
    assert len(rows) == 4 and all("\\u0000" in body for body, _ in rows) and "no kind" in rows[3][1]


async def test_what_is_200_deep_is_kept_and_can_be_read(db):
    async with serving(db, hook()) as client:
        assert (await send(client, b"[" * 199 + b"]" * 199)).status_code == 200
    assert await count(db, "hooks") == 1


@pytest.mark.parametrize("body", [b"a=%00", b"a=\xff", b"&".join(b"a%d=1" % n for n in range(1001))])
async def test_a_broken_form_gets_400(db, body):
    async with serving(db, hook()) as client:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await send(client, body, **form)).status_code == 400
        assert (await send(client, b"a=1&b=%C3%A4", **form)).status_code == 200
    assert await fetch(db, "select data->'payload' from hooks") == [({"a": "1", "b": "ä"},)]


async def test_what_the_table_refuses_is_alone_in_that(db):
    async with serving(db, typed()) as client:
        assert (await send(client, {"customer": "ann"})).status_code == 200
        names = ["bob", "cal", "ann", "dan", "eve"]
        answers = await asyncio.gather(*(send(client, {"customer": name}) for name in names))
        assert [answer.status_code for answer in answers] == [200, 200, 422, 200, 200]
        assert "unique" in str(answers[2].json()["detail"])
    assert (await count(db, "orders"), await count(db, "anton.quarantine")) == (5, 1)


@pytest.mark.parametrize(("state", "status"), [
    ("42883", 500), ("42501", 500), ("0A000", 500), ("XX000", 500), ("55P03", 500), ("57014", 503)])
async def test_whatever_one_row_raises_its_neighbours_are_kept(db, state, status, caplog):
    async with serving(db, hook()) as client:
        async with db.conn() as conn:
            await conn.execute(
                "create function guard() returns trigger language plpgsql as $$ begin if new.data->>'payload' = 'bad' "
                f"then raise exception using errcode = '{state}', message = 'the plan'; end if; return new; end $$; "
                "create trigger guard before insert on hooks for each row execute function guard()")
        async with db.tx() as conn:                                    # so that they wait, and go together
            await conn.execute("lock table hooks in access exclusive mode")
            payloads = [f"{n}" for n in range(7)]
            sent = [asyncio.create_task(send(client, one)) for one in [*payloads[:3], "bad", *payloads[3:]]]
            await _waits(db)
        answers = [await one for one in sent]
        assert [one.status_code for one in answers] == [200] * 3 + [status] + [200] * 4
        assert "plan" not in answers[3].text and "plan" in caplog.text
    kept = [row[0] for row in await fetch(db, "select data->>'payload' from hooks")]
    assert sorted(kept) == payloads and await count(db, "anton.delivery") == 7


async def test_a_group_is_split_no_longer_than_its_senders_wait(db, monkeypatch):
    monkeypatch.setattr(webhook, "SPLIT_SECONDS", -1.0)
    async with serving(db, hook()) as client:
        async with db.conn() as conn:
            await conn.execute("create function guard() returns trigger language plpgsql as $$ begin raise 'x' using "
                               "errcode = 'XX000'; end $$; create trigger guard before insert on hooks execute "
                               "function guard()")
        async with db.tx() as conn:
            await conn.execute("lock table hooks in access exclusive mode")
            sent = [asyncio.create_task(send(client, n)) for n in range(20)]
            await _waits(db)
        statuses = {(await one).status_code for one in sent}
        assert 503 in statuses and statuses <= {500, 503}              # 500: one that was alone from the beginning
    assert (await count(db, "hooks"), await count(db, "anton.delivery")) == (0, 0)


async def test_what_is_sent_more_than_once_is_kept_more_than_once(db):
    async with serving(db, hook()) as client:
        body, form = b"a=1&b=2&a=3&a=", [("Content-Type", "Application/X-WWW-Form-UrlEncoded; charset=utf-8")]
        headers = [*github(body, "one").items(), *form, ("X-Tag", "x"), ("X-Tag", "y")]
        assert (await client.post("/hook", content=body, headers=headers)).status_code == 200
        wrong = [*github(body, "two").items(), ("Content-Type", "application/x-www-form-urlencoded-not")]
        assert (await client.post("/hook", content=body, headers=wrong)).status_code == 400   # so it must be JSON
    [(data,)] = await fetch(db, "select data from hooks")
    assert data["payload"] == {"a": ["1", "3", ""], "b": "2"} and data["headers"]["x-tag"] == "x, y"


async def test_what_does_not_fit_the_model_is_kept_raw_and_shown_and_leaves_when_it_fits(db):
    async with serving(db, typed()) as client:
        for total in (b'"x"', b'"y"'):
            wrong = await send(client, b'{"customer": "ann",  "total": %s}' % total, "one")
            assert wrong.status_code == 422 and "total" in str(wrong.json()["detail"])
        assert (await count(db, "orders"), await count(db, "anton.delivery")) == (0, 0)
        query = "select webhook, id, times, error, body from anton.quarantine"
        [(name, id, times, error, body)] = await fetch(db, query)
        assert (name, id, times, body) == ("web/hook", "one", 2, b'{"customer": "ann",  "total": "y"}')
        async with db.conn() as conn:
            [row] = await status(db, conn)
            assert (row["handler"], row["state"], row["ready"]) == ("/hook", "quarantine", 1) and error in row["why"]
            assert "quarantine" in str(await conn.fetch("select * from anton.findings()"))
        assert (await send(client, {"customer": "ann"}, "one")).status_code == 200
        assert (await send(client, {"customer": 7}, "one")).status_code == 200  # known, so never looked at
    assert (await count(db, "orders"), await count(db, "anton.quarantine")) == (1, 0)


async def test_what_does_not_fit_is_answered_as_configured_and_kept_once(db):
    async with serving(db, typed(invalid=202)) as client:
        for payload in ({"customer": 7}, {"customer": 7}, {"customer": "ann"}):
            assert (await send(client, payload, "one")).status_code == 202
    assert (await count(db, "orders"), await count(db, "anton.quarantine")) == (0, 1)


@pytest.mark.parametrize("invalid", [99, 600, "422", True])
def test_invalid_is_a_status(invalid):
    with pytest.raises(BadOption, match="invalid.*a status to answer"):
        with declaring(App("x")):
            hook(invalid=invalid)(App("x"))


async def test_too_much_that_waits_gets_503(db, monkeypatch):
    monkeypatch.setattr(webhook, "WAITING_BYTES", 1000)
    async with serving(db, hook()) as client:
        async with db.tx() as conn:
            await conn.execute("lock table hooks in access exclusive mode")
            waiting = [asyncio.create_task(send(client, "x" * 600)) for _ in range(8)]
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert {task.result().status_code for task in done} == {503}
        answers = await asyncio.gather(*waiting)
        kept = sum(answer.status_code == 200 for answer in answers)
        assert all(answer.headers["retry-after"] == "2" for answer in answers if answer.status_code == 503)
    assert await count(db, "hooks") == kept


@pytest.mark.parametrize("length", [b"content-length: 10000001", b"transfer-encoding: chunked"])
async def test_too_large_a_body_gets_413_before_it_is_read(db, length, monkeypatch):
    monkeypatch.setattr(webhook, "MAX_BODY", 10_000_000 if b"length" in length else 1000)
    async with serving(db, hook()) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST /hook HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n\r\n")
        for _ in range(3):
            writer.write(b"200\r\n" + b"x" * 512 + b"\r\n")
        assert b" 413 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_body_that_breaks_off_leaves_nothing(db):
    async with serving(db, hook()) as client:
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST /hook HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{}")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await send(client, 1)).status_code == 200
    assert await count(db, "hooks") == 1


# When the database is not as it should be


async def test_one_that_waits_for_another_transaction_does_not_hold_up_the_others(db):
    async with serving(db, hook()) as client:
        async with db.conn() as conn:
            tx = conn.transaction()
            await tx.start()
            await conn.execute("insert into anton.delivery values ('web/hook', 'held', now(), 200, '{}', '')")
            held = asyncio.create_task(send(client, 0, "held"))
            await _waits(db)
            for n in range(1, 4):
                assert (await send(client, n)).status_code == 200
            assert not held.done()
            await tx.rollback()
        assert (await held).status_code == 200
    assert await count(db, "hooks") == 4


async def test_two_groups_at_once_of_which_one_finds_nothing_left(db, caplog):
    async with serving(db, typed()) as client, AsyncExitStack() as all_of_them:
        for _ in range(db.size):
            await all_of_them.enter_async_context(db.conn())
        sent = [asyncio.create_task(send(client, {"customer": name})) for name in ("ann", "bob")]
        while sum(task.get_coro().__qualname__ == "Writer._work" for task in asyncio.all_tasks()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await all_of_them.aclose()
        assert [(await one).status_code for one in sent] == [200, 200]
    assert await count(db, "orders") == 2 and not caplog.records


async def _waits(db: Database) -> None:
    """Until someone waits for a lock."""
    async with db.conn() as conn:
        while not await conn.fetchval("select count(*) from pg_locks where not granted"):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_connection_that_breaks_is_tried_again_and_the_sender_does_not_notice(db):
    async with serving(db, hook()) as client:
        async with db.tx() as conn:
            await conn.execute("lock table hooks in access exclusive mode")
            sent = asyncio.create_task(send(client, 1))
            await _waits(db)
            async with db.conn() as other:
                await other.execute("select pg_terminate_backend(pid) from pg_locks where not granted")
        assert (await sent).status_code == 200
    assert (await count(db, "hooks"), await count(db, "anton.delivery")) == (1, 1)


@pytest.mark.system("the proxy speaks TCP, which only the system's server does")
async def test_a_group_whose_reply_was_lost_after_its_commit_is_known_when_it_is_tried_again(db):
    url = urlsplit(str(db.dsn))
    proxy, cuts = Proxy(url.port or 5432), list[Cut]()
    proxy.choose = lambda explicit: cuts.pop() if cuts else None
    through = Database(urlunsplit(url._replace(netloc=url.netloc.replace(str(url.port), str(proxy.port)),
                                               query="sslmode=disable")))
    try:
        async with serving(db, lambda app: Webhook("/hook", Table("hooks"))) as client:
            set_database(through)
            assert (await client.post("/hook", json=0)).status_code == 200
            cuts += ["before", "after"]
            for n in (1, 2):
                assert (await client.post("/hook", json=n)).status_code in (200, 503)
            assert not cuts and proxy.counts["SELECT 1"] == 1           # one that was cut had been committed
            kept = await fetch(db, "select data->'payload' from hooks order by id")
            await through.close()
    finally:
        proxy.close()
    assert kept == [(0,), (1,), (2,)]


async def test_a_deadlock_with_another_writer_is_tried_again(db, server):
    server.sql(f"alter database {db.name} set deadlock_timeout = '1s'")

    def declare(app: App) -> None:
        typed()(app)

    async with serving(db, declare) as client:
        async with db.conn() as conn:
            tx = conn.transaction()
            await tx.start()
            await conn.execute("set local deadlock_timeout = '60s'")   # so that the webhook is the one to be ended
            await conn.execute("insert into orders (customer) values ('ann')")
            sent = asyncio.create_task(send(client, {"customer": "ann"}, "held"))
            await _waits(db)
            await conn.execute("insert into anton.delivery values ('web/hook', 'held', now(), 200, '{}', '') "
                               "on conflict do nothing")
            await tx.rollback()
        assert (await sent).status_code == 200
    assert await count(db, "orders") == 1


async def test_a_request_that_is_given_up_does_not_end_its_group(db):
    async with serving(db, hook()) as client:
        async with db.tx() as conn:
            await conn.execute("lock table hooks in access exclusive mode")
            sent = [asyncio.create_task(send(client, n)) for n in range(5)]
            await _waits(db)
            sent[0].cancel()
        answers = await asyncio.gather(*sent[1:])
        assert {answer.status_code for answer in answers} == {200}
        assert (await send(client, 5)).status_code == 200
    assert await count(db, "hooks") == 6                               # a sender that hangs up has sent


async def test_a_missing_table_is_no_fault_of_the_sender(db, caplog):
    async with serving(db, hook()) as client:
        async with db.conn() as conn:
            await conn.execute("drop table hooks")
        answer = await send(client, 1)
        assert answer.status_code == 503 and "hooks" not in answer.text and answer.headers["retry-after"] == "2"
    assert 'no table "hooks"' in caplog.text and "anton migrate" in caplog.text
    assert await count(db, "anton.delivery") == 0


def test_a_custom_scheme_has_ids_too():
    assert Hmac("X-Sig", ids=("header:X-Id",)).delivery("7") == {"X-Id": "7"}


def test_a_public_address_wants_to_know_who_may_call_a_webhook():
    with declaring(App("x")) as app:
        Webhook("/hook", Table("hooks"))
    with pytest.raises(ConfigError, match="/hook"):
        web.check_public(app, "0.0.0.0")
