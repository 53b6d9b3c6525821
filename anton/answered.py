"""Answered: a delivery that comes again to a route with verify= gets its first answer again, and runs nothing.

    known?  -> its answer
    new     -> the function -> one commit: its writes, and the delivery with its status -> the reply is noted -> sent

Only a 2xx is an answer: what a route refuses, or raises at, is run again when it is sent again. Two at once with one
id in one process: the second waits for the first. In two processes both run, and the one that commits later is undone.
The names are those of Webhooks: the app, the path, and the method where it is not POST.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from anton.db import Conn, Database, current_database
from anton.sent import readable
from anton.verify import Verifier

log = logging.getLogger("anton.web")

METHODS = ("POST", "PUT", "PATCH", "DELETE")                           # whoever asks by GET wants what is there now


class Known(Exception):
    """The delivery was kept by another transaction meanwhile."""


class Incoming:
    """A verified delivery while its route runs. status: the 2xx it was kept with, None before."""

    def __init__(self, webhook: str, id: str, headers: str, body: bytes) -> None:
        self.webhook, self.id, self.headers, self.body = webhook, id, headers, body
        self.status: int | None = None

    async def answer(self) -> Response | None:
        """The first answer, when it is known."""
        db = current_database()
        async with db.conn() as conn:
            for status, reply, kind, _ in await db.call(conn, "answered", self.webhook, self.id):
                return Response(reply or b"", status, media_type=kind)
        return None

    async def keep(self, db: Database, conn: Conn, status: int) -> None:
        """Inside the transaction of the route's writes, before them. Raises Known."""
        if 200 <= status < 300:
            if not await db.call_value(conn, "keep_delivery", self.webhook, self.id, self.headers, self.body, status):
                raise Known
            self.status = status

    async def said(self, response: Response) -> None:
        """Notes the answer that is about to leave. It leaves also when that fails: what matters is committed."""
        reply, status = bytes(getattr(response, "body", b"")), response.status_code
        if self.status is None or (status, reply) == (self.status, b"") or not 200 <= status < 300:
            return
        db = current_database()
        try:
            async with db.conn() as conn:
                await db.call(conn, "keep_reply", self.webhook, self.id, status, reply,
                              response.headers.get("content-type"))
        except Exception as error:
            log.warning("%s: the answer to delivery %s was not kept: %s", self.webhook, self.id, error)


incoming: ContextVar[Incoming | None] = ContextVar("anton_incoming", default=None)
_running: dict[tuple[str, str], asyncio.Event] = {}


async def once(app: str, request: Request, verifier: Verifier,
               handle: Callable[[Any], Awaitable[Response]]) -> Response:
    """What handle(request) answers, or what it answered to this delivery before. The request is verified."""
    delivery = await _delivery(app, request, verifier)
    if delivery is None:
        return await handle(request)
    key = delivery.webhook, delivery.id
    while (other := _running.get(key)) is not None:
        await other.wait()
    done = _running[key] = asyncio.Event()
    token = incoming.set(delivery)
    try:
        if (known := await delivery.answer()) is not None:
            return known
        try:
            response = await handle(request)
        except Known:
            if (known := await delivery.answer()) is None:             # deleted at this very moment
                raise
            return known
        await delivery.said(response)
        return response
    finally:
        incoming.reset(token)
        del _running[key]
        done.set()


async def answer(app: str, request: Request, verifier: Verifier) -> Response | None:
    """The answer that a delivery got before; None when it is not known. Its signature is good."""
    delivery = await _delivery(app, request, verifier)
    return None if delivery is None else await delivery.answer()


async def _delivery(app: str, request: Request, verifier: Verifier) -> Incoming | None:
    """None where nothing tells that two requests are the same delivery."""
    if request.method not in METHODS or not verifier.active:           # a body that nobody verifies is not taken in
        return None
    body, raw, query = await request.body(), request.headers.raw, request.scope["query_string"]
    id = verifier.delivery_id(raw, body)
    if id is None:
        return None
    if query:                                                          # which most schemes do not sign
        id = f"{id} {hashlib.sha256(query).hexdigest()[:16]}"
    name = f"{app}{request.scope['path']}" + ("" if request.method == "POST" else f" {request.method}")
    return Incoming(name, id, orjson.dumps(readable(raw, verifier.hidden)).decode(), body)
