"""Webhook: receives what sense.Webhook declares. A 2xx means that it is committed.

    request -> size (413) -> handshake, signature (401) -> JSON (400) -> waits for the next group -> 200
    group   -> one INSERT for all that wait: anton.delivery, and the records of those that are new

One group of a table is under way, what comes meanwhile makes the next, of at most 1 MB; when a commit takes longer
than 2 ms, another group begins beside it. A group that the database refuses is halved until the bad one is alone.
A delivery id that was there before gets its first answer again, and leaves no second record.

Plain ASGI: no object of a framework is made for a request.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any
from urllib.parse import parse_qsl

import orjson
from pydantic import ValidationError

from anton.answers import AWAY, MAX_BODY, RETRY_AFTER, UNSIGNED, BadBody, check_json, refuse_public, try_later
from anton.db import Conn, Database, current_database, is_away, quote, to_json
from anton.errors import AntonError, ConfigError, InvalidRecord
from anton.relation import Attribute, Relation, columns_sql, describe
from anton.sense import Webhook
from anton.sent import MAX_FIELDS, is_form, readable
from anton.sink import reasons
from anton.table import Table
from anton.verify import Reply, Verifier

log = logging.getLogger("anton.web")

Message = MutableMapping[str, Any]
RawHeaders = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Now = Callable[[], Awaitable[float]]

GROUP_BYTES = 1_000_000
LANES, LANE_SECONDS = 4, 0.002  # groups of one table at once, at most; after how long the next begins beside the last
TURNS = 16  # groups that a lane keeps before it offers its connection to others
WAITING_BYTES = 64_000_000  # of one table; beyond that 503
COMMIT_SECONDS = 10.0
TRIES = 3  # more, for a group that ran into a deadlock
BUSY = "too much is waiting for the database; send it again"
COLUMNS = ("timestamp", "payload", "headers")  # of a record, where the table has no model
_DATA = ("22", "23", "2F", "38", "39", "44", "54", "P0")  # SQLSTATE classes: Postgres or a trigger refuses the values
_UNFIT = (TypeError, ValueError, ArithmeticError, AttributeError)  # asyncpg's codecs raise these
_CANCELED = "57014"  # SQLSTATE: by statement_timeout, or by hand
SPLIT_SECONDS = 2 * COMMIT_SECONDS  # for how long a group is split

_own = f"~{time.time_ns():x}-{os.urandom(8).hex()}-".__add__
_numbers = map(str, count(1))


class Answer(Exception):
    """A refusal: what the sender is told instead of a 2xx."""

    def __init__(self, status: int, detail: str | Sequence[str]) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Delivery:
    """A verified request on its way. values: of its model's columns; without one a form's JSON, or None.

    done: becomes the status, or an Answer.
    """

    __slots__ = ("body", "done", "headers", "id", "values", "webhook")

    def __init__(self, webhook: Receiver, id: str, headers: str, body: bytes) -> None:
        self.webhook, self.id, self.headers, self.body = webhook, id, headers, body
        self.values: Any = None
        self.done: asyncio.Future[int | Answer]


class Receiver:
    """The ASGI app of one Webhook. name: in anton.delivery. methods: those that it answers.

    now: the database's time, in Unix seconds. base: the app's public address, see verify.public_url().
    """

    def __init__(self, webhook: Webhook, verifier: Verifier, writer: Writer, now: Now, app: str, base: str) -> None:
        self.name, self.invalid = f"{app}{webhook.path}", webhook.invalid
        self.methods = verifier.methods | {"POST"}
        self._verifier, self._writer, self._now, self._base = verifier, writer, now, base
        self._shape = webhook.table.shape

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            if closed := refuse_public(self._verifier, scope):
                raise Answer(403, closed)
            outcome = await self._receive(scope, await _body(scope["headers"], receive))
        except Answer as answer:
            outcome = answer
        except BadBody as error:
            outcome = Answer(400, error.detail)
        except Exception as error:
            if later := try_later(error, self.name):
                outcome = Answer(503, later)
            else:
                log.exception("500 for %s", self.name)
                outcome = Answer(500, "Internal Server Error")
        if isinstance(outcome, Answer):
            if outcome.status in (400, 413):                           # it is kept nowhere: the log alone can tell
                log.info("%d for %s: %s", outcome.status, self.name, outcome.detail)
            await _refuse(send, outcome)
        elif isinstance(outcome, int):
            await _send(send, outcome, {}, self._verifier.accepted)
        else:
            await _send(send, outcome.status, outcome.headers, outcome.body)

    async def _receive(self, scope: Message, body: bytes) -> int | Answer | Reply:
        raw: RawHeaders = scope["headers"]
        verifier, method = self._verifier, scope["method"]
        if verifier.active:
            url = verifier.url(self._base, scope)
            now = await self._now() if verifier.timed else 0.0
            reply = verifier.handshake(body, raw, now, method=method, url=url)
            if reply is not None:
                return reply
            refusal = verifier.check(body, raw, now, method=method, url=url)
            if refusal is not None:
                known = await self._known(raw, body) if refusal.stale else None
                if known is not None:
                    return known
                log.info("401 for %s: %s", self.name, refusal.why)
                return Answer(401, UNSIGNED)
        if method != "POST":
            return Answer(405, "events come by POST")
        headers = readable(raw, verifier.hidden)
        form = _form(body) if is_form(headers.get("content-type", "")) else None
        if form is None and (body or not verifier.bodyless):
            check_json(body, whole=self._shape is None)
        id = verifier.delivery_id(raw, body)
        return await self._kept(Delivery(self, _own(next(_numbers)) if id is None else id,
                                         orjson.dumps(headers).decode(), body), form)

    async def _known(self, raw: RawHeaders, body: bytes) -> int | Answer | None:
        """The first answer to a delivery that came before, the one in quarantine included; None when it did not."""
        id = self._verifier.delivery_id(raw, body)
        if id is None:
            return None
        db = current_database()
        async with db.conn() as conn:
            for status, _, _, why in await db.call(conn, "answered", self.name, id):
                return status if status < 300 else Answer(status, [why])
        return None

    async def _kept(self, delivery: Delivery, form: dict[str, Any] | None) -> int | Answer:
        shape = self._shape
        if shape is None:
            if form is not None or not delivery.body:
                delivery.values = orjson.dumps(form).decode()
            return await self._writer.put(delivery)
        validator = shape.model.__pydantic_validator__
        try:
            record = validator.validate_json(delivery.body or b"null") if form is None \
                else validator.validate_python(form)
            delivery.values = shape.to_row(record)
        except ValidationError as error:
            return await self._writer.refuse(delivery, reasons(error))
        except InvalidRecord as error:
            return await self._writer.refuse(delivery, error.reasons)
        return await self._writer.put(delivery)


class Writer:
    """Keeps the deliveries of one table, whichever Webhook they come from."""

    def __init__(self, table: Table[Any], now: Now) -> None:
        self._table, self._now = table, now
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lanes: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: list[Delivery] = []
        self._bytes, self._began = 0, 0.0
        self._insert: Insert | None = None

    def put(self, delivery: Delivery) -> asyncio.Future[int | Answer]:
        """Lets it wait for the next group; what is returned becomes the status, or what else to answer."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:                                     # the first request, or another loop than before
            self._loop, self._lanes, self._timer, self._waiting, self._bytes = loop, set(), None, [], 0
        if self._bytes > WAITING_BYTES:
            raise Answer(503, BUSY)
        delivery.done = loop.create_future()
        self._waiting.append(delivery)
        self._bytes += len(delivery.body)
        if not self._lanes:
            self._open(loop)
        elif self._timer is None:
            self._timer = loop.call_later(LANE_SECONDS, self._look, loop)
        return delivery.done

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Opens another lane when the last group takes too long."""
        self._timer = None
        if self._waiting and len(self._lanes) < LANES:
            left = self._began + LANE_SECONDS - loop.time()
            if left > 0:
                self._timer = loop.call_later(left, self._look, loop)
            else:
                self._open(loop)

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        lane = loop.create_task(self._work(loop), context=contextvars.Context())
        self._lanes.add(lane)
        lane.add_done_callback(self._lanes.discard)

    async def refuse(self, delivery: Delivery, why: Sequence[str], conn: Conn | None = None) -> int | Answer:
        """Keeps one that does not fit, raw; returns what to answer."""
        db, text, name = current_database(), "; ".join(why).replace("\0", "\N{SYMBOL FOR NULL}"), delivery.webhook.name
        if conn is None:
            async with db.conn() as conn:
                return await self.refuse(delivery, why, conn)
        status: int = await db.call_value(conn, "quarantine", name, delivery.id, delivery.headers, delivery.body, text,
                                          delivery.webhook.invalid)
        log.warning("%s: delivery %s does not fit %s: %s", name, delivery.id, self._table.name, text)
        return status if status < 300 else Answer(status, why)

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """A lane: one group after the other, until none waits. One whose connection broke is tried once more: what
        of it was committed is known then.
        """
        group: list[Delivery] = []
        broken = False
        while group or self._waiting:
            try:
                async with current_database().conn() as conn:
                    for _ in range(TURNS):
                        self._began = loop.time()
                        group = group or self._next()
                        if not group:                                  # another lane took all meanwhile
                            break
                        await self._keep(conn, group, self._began + SPLIT_SECONDS)
                        group, broken = [], False
                        if not self._waiting:
                            break
            except Exception as error:
                if group and not broken and is_away(error):
                    broken = True
                else:
                    self._fail(group or self._next(), error)
                    group, broken = [], False

    def _next(self) -> list[Delivery]:
        """What goes together, sorted as deliver() wants it: at most GROUP_BYTES, and no id twice."""
        group: dict[tuple[str, str], Delivery] = {}
        later: list[Delivery] = []
        size = 0
        for delivery in self._waiting:
            key, more = (delivery.webhook.name, delivery.id), len(delivery.body)
            if key in group or (group and size + more > GROUP_BYTES):
                later.append(delivery)
            else:
                group[key] = delivery
                size += more
        self._waiting = later
        self._bytes -= size
        return [group[key] for key in sorted(group)]

    async def _keep(self, conn: Conn, group: list[Delivery], until: float, fresh: bool = False) -> None:
        """Commits them and tells each. Splits a group that the database refuses until the bad one is alone.

        until: of the loop's clock; then it splits no more. fresh: the table was just looked at. Raises what is the
        fault of none: the database is away, the table is gone.
        """
        for tries in count():
            try:
                known = await self._write(conn, group)
                break
            except Exception as error:
                state = str(getattr(error, "sqlstate", None) or "")
                if state[:2] == "40" and tries < TRIES:                # another transaction was in its way
                    continue
                if state[:2] == "42" and not fresh:                    # the table is not what it was
                    self._insert, fresh = None, True
                    continue
                mine = isinstance(error, _UNFIT) or (state and not isinstance(error, AntonError))
                if not mine or (state != _CANCELED and is_away(error)):
                    raise
                if len(group) == 1:
                    await self._alone(conn, group[0], error)
                    return
                if asyncio.get_running_loop().time() > until:
                    raise TimeoutError(f"the group was still being split; the last error: {error}") from error
            half = len(group) // 2                                     # what was canceled would take as long in a half
            parts = [[one] for one in group] if state == _CANCELED else [group[:half], group[half:]]
            for part in parts:
                await self._keep(conn, part, until, fresh)
            return
        answers: dict[int, int] = dict(known or ())
        for n, delivery in enumerate(group, 1):
            _tell(delivery, answers.get(n, 200))

    async def _write(self, conn: Conn, group: list[Delivery]) -> list[tuple[int, int]] | None:
        """One transaction. Returns [position from 1, first answer] of those that were there before."""
        db = current_database()
        insert = self._insert
        if insert is None or insert.db is not db:
            insert = self._insert = await prepare(db, self._table)
        at = datetime.fromtimestamp(await self._now(), UTC)
        [row] = await conn.fetch(
            insert.sql, [one.webhook.name for one in group], [one.id for one in group],
            [one.headers for one in group], [one.body for one in group], *insert.args(group, at),
            timeout=COMMIT_SECONDS)
        known: list[tuple[int, int]] | None = row[0]
        return known

    async def _alone(self, conn: Conn, delivery: Delivery, error: Exception) -> None:
        """Answers one that the database refused alone. Bad values go to quarantine; all else is no fault of it."""
        why, kind = str(error.args[0] if error.args else error), str(getattr(error, "sqlstate", None))[:2]
        if not isinstance(error, _UNFIT) and kind not in _DATA:
            self._fail([delivery], error)
        elif self._table.shape is None and kind in ("22", "54"):
            _tell(delivery, Answer(400, f"Postgres cannot store the body: {why}"))
        else:
            _tell(delivery, await self.refuse(delivery, [why], conn))

    def _fail(self, group: list[Delivery], error: Exception) -> None:
        group = [one for one in group if not one.done.done()]
        if not group:
            return
        what = f"{len(group)} deliveries to {self._table.name}"
        if later := try_later(error, what):
            answer = Answer(503, later)
        elif isinstance(error, TimeoutError):
            answer = Answer(503, AWAY)
            log.warning("503 for %s: %s", what, error or "TimeoutError")
        else:
            answer = Answer(500, "Internal Server Error")
            log.error("500 for %s", what, exc_info=error)
        for delivery in group:
            _tell(delivery, answer)


def _tell(delivery: Delivery, outcome: int | Answer) -> None:
    if not delivery.done.done():                                       # its request may have been cancelled
        delivery.done.set_result(outcome)


@dataclass(frozen=True)
class Insert:
    """The statement for a table as it is. args: its parameters from $5 on, for a group and the time."""

    db: Database
    sql: str
    args: Callable[[list[Delivery], datetime], list[Any]]


async def prepare(db: Database, table: Table[Any]) -> Insert:
    """How deliveries become records of this table, as it is now. Raises UnknownTable, ConfigError."""
    relation = await describe(db, table.name, fresh=True)
    names = COLUMNS if table.shape is None else table.shape.names
    missing = ", ".join(name for name in names if name not in relation.columns)
    if relation.document and table.shape is None:
        value = f"($5 || {_PAYLOAD} || ',\"headers\":' || _headers || '}}')::jsonb"
        return Insert(db, _sql(db, relation, [relation.columns["data"]], [value], {6: "text"}), _documents)
    if missing and table.shape is None:
        raise ConfigError(f'a Webhook writes {", ".join(COLUMNS)}; table "{table.name}" has no {missing}. Give the '
                          "Table a model of what is sent, or add the columns", table=table.name)
    if missing:
        raise ConfigError(f'table "{table.name}" has no column {missing}; run: anton migrate', table=table.name)
    columns = [relation.columns[name] for name in names]
    if table.shape is None:
        values = [f"{value}::{column.type}" for value, column in zip(("$5::timestamptz", _PAYLOAD, "_headers"), columns,
                                                                     strict=True)]
        return Insert(db, _sql(db, relation, columns, values, {6: "text"}),
                      lambda group, at: [at, [one.values for one in group]])
    values = [_value(column, n, relation) for n, column in enumerate(columns, 5)]
    converts = [_array if column.type.endswith("[]") else None if column.plain else _text for column in columns]

    def args(group: list[Delivery], at: datetime) -> list[Any]:
        by_column = zip(*(one.values for one in group), strict=True)
        return [list(values) if convert is None else [None if value is None else convert(value) for value in values]
                for convert, values in zip(converts, by_column, strict=True)]

    return Insert(db, _sql(db, relation, columns, values, {n: _type(one) for n, one in enumerate(columns, 5)}), args)


_PAYLOAD = "coalesce(_v6, convert_from(_body, 'UTF8'))"                # a form's, or the body as it was sent


def _documents(group: list[Delivery], at: datetime) -> list[Any]:
    """{"timestamp", "payload", "headers"}, as JSON that Postgres puts together: each body is sent to it once."""
    return [f'{{"timestamp":"{at.isoformat()}","payload":', [one.values for one in group]]


def _sql(db: Database, relation: Relation, columns: Sequence[Attribute], values: Sequence[str],
         arrays: Mapping[int, str]) -> str:
    """One statement, so one transaction and one round trip: deliver(), then the records of those it did not know."""
    own = "overriding system value " if any(column.always for column in columns) else ""
    given = ", ".join(["$3", "$4", *(f"${n}::{type}[]" for n, type in arrays.items())])
    names = ", ".join(["_headers", "_body", *(f"_v{n}" for n in arrays), "_n"])
    return (f"with _kept as materialized (select {quote(db.schema)}.deliver($1, $2, $3, $4) as known), "
            f"_made as (insert into {relation.sql} ({columns_sql([column.name for column in columns])}) {own}"
            f"select {', '.join(values)} from _kept, unnest({given}) with ordinality _given ({names}) "
            "where _kept.known is null or _n <> all (_kept.known[:][1:1])) select known from _kept")


def _type(column: Attribute) -> str:
    """The type that its values are sent as. Without limits: those are for the column to enforce, not to cut by."""
    if not column.plain or column.type.endswith("[]"):
        return "text"
    return "bpchar" if column.type.startswith("character(") else re.sub(r"\(.*?\)", "", column.type)


def _value(column: Attribute, n: int, relation: Relation) -> str:
    """The value as its column takes it; a key that is not said is made by the database."""
    if column.type.endswith("[]"):                                     # unnest() would take arrays in arrays apart
        return (f"case when _v{n} is not null then array(select _e::{column.type[:-2]} from jsonb_array_elements_text("
                f"_v{n}::jsonb) with ordinality _x (_e, _o) order by _o) end")
    value = f"_v{n}" if column.plain else f"_v{n}::{column.type}"
    return f"coalesce({value}, {column.default})" if column.name in relation.key and column.default else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _array(values: Any) -> str:
    return to_json([f"\\x{one.hex()}" if isinstance(one, bytes) else one for one in values]).decode()


# A request


async def _body(headers: RawHeaders, receive: Receive) -> bytes:
    """The raw body. Raises Answer for one that is too large, or broken off."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _too_large()
        return body
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and int(value) > MAX_BODY:
            raise _too_large()
    parts, size = [], 0
    while True:
        if message["type"] != "http.request":
            raise Answer(400, "the body broke off")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise _too_large()
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _too_large() -> Answer:
    return Answer(413, f"the body is larger than {MAX_BODY:,} bytes")


def _form(body: bytes) -> dict[str, Any]:
    """The fields of a form; one that is sent more than once is a list of its values. Raises Answer."""
    fields: dict[str, Any] = {}
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=bool(body), max_num_fields=MAX_FIELDS)
        text = "".join(name + value for name, value in pairs)
        if "\0" in text:
            raise ValueError("it holds the character NUL")
        text.encode()
    except ValueError as error:
        raise Answer(400, f"the body is no form: {error}") from None
    for name, value in pairs:
        if name not in fields:
            fields[name] = value
        elif isinstance(fields[name], list):
            fields[name].append(value)
        else:
            fields[name] = [fields[name], value]
    return fields


async def _refuse(send: Send, answer: Answer) -> None:
    headers = {"content-type": "application/json"}
    if answer.status == 503:
        headers["retry-after"] = str(RETRY_AFTER)
    await _send(send, answer.status, headers, orjson.dumps({"detail": answer.detail}))


async def _send(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    raw = [(b"content-length", b"%d" % len(body))]
    for name, value in headers.items():
        raw.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
