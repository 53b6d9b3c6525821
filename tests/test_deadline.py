"""Deadline: a sender that takes too long gets 408 and its connection ends; one that is only steady does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from serving import count, serve
from starlette.responses import PlainTextResponse

from anton.app import App
from anton.db import Database
from anton.deadline import look
from anton.sense import Request, get, post
from anton.table import Table
from anton.web import Server, port_of

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"


class Sender:
    """A raw connection to a server whose clock the test moves."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer, self.now = server, reader, writer, time.monotonic()

    async def send(self, data: bytes, until: Any = None) -> None:
        """Sends, and waits until the server has taken it in."""
        self.writer.write(data)
        await self.writer.drain()
        while until is not None and not any(until(conn) for conn in self.server.server_state.connections):  # noqa: ASYNC110
            await asyncio.sleep(0)

    def wait(self, seconds: float) -> None:
        """So many seconds pass for the server's deadlines."""
        self.now += seconds
        look(self.server.server_state, self.now)

    async def answer(self) -> bytes:
        """All that comes until the server closes."""
        return await self.reader.read()


def events(app: App) -> None:
    table = Table("events")

    @post("/")
    def keep(request: Request) -> int:
        table.append({"got": request.text()})
        return 201

    @get("/")
    def there() -> int:
        return 200


@asynccontextmanager
async def connected(db: Database, declare: Callable[[App], Any] = events) -> AsyncIterator[Sender]:
    """A server of what is declared, and a connection to it."""
    async with serve(db, declare) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        while not server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0)
        try:
            yield Sender(server, reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize(("part", "more", "until"), [
    (b"P", b"OST /abc HTTP/1.1\r\n", lambda conn: conn.url == b"/abc"),
    (b"POST / HTTP/1.1\r\nhost: x\r\nx-slow: ", b"a\r\nb", lambda conn: conn.headers[1:] == [(b"x-slow", b"a")])])
async def test_a_head_that_does_not_end_gets_408_however_it_trickles(db, part, more, until):
    async with connected(db) as slow:
        await slow.send(part, lambda conn: conn.begun)
        slow.wait(9.9)
        await slow.send(more, until)
        slow.wait(0.3)
        assert (await slow.answer()).startswith(b"HTTP/1.1 408 ")


async def test_a_connection_on_which_nothing_comes_ends_without_a_word(db):
    async with connected(db) as idle:
        idle.wait(10.1)
        assert await idle.answer() == b""


async def test_a_body_that_does_not_end_gets_408_and_leaves_nothing(db, caplog):
    async with connected(db) as slow:
        await slow.send(HEAD + b"12", lambda conn: conn.got == 2)
        slow.wait(29)
        await slow.send(b"34", lambda conn: conn.got == 4)
        slow.wait(1.2)
        assert (await slow.answer()).startswith(b"HTTP/1.1 408 ")
        assert await count(db, "events") == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_steady_sender_has_the_time_its_bytes_take(db):
    async with connected(db) as steady:
        size = 1_000_000
        await steady.send(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size)
        await steady.send(b"x" * (size - 1), lambda conn: conn.got == size - 1)
        steady.wait(125)
        await steady.send(b"x")
        assert (await steady.answer()).startswith(b"HTTP/1.1 201 ")
        assert await count(db, "events") == 1


async def test_a_route_may_take_its_time_and_a_second_request_waits_for_the_first(db):
    go = asyncio.Event()

    def declare(app: App) -> None:
        @get("/")
        async def slow() -> int:
            await go.wait()
            return 204

    async with connected(db, declare) as sender:
        await sender.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", lambda conn: conn.cycle is not None)
        sender.wait(1000)
        await sender.send(b"GET / HTTP/1.1\r\nhost:", lambda conn: conn.since is not None)
        sender.wait(1000)
        go.set()
        assert (await sender.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
        sender.wait(0)
        assert (await sender.answer()).startswith(b"HTTP/1.1 408 ")


async def test_an_app_that_does_not_read_is_not_its_senders_fault(db):
    go = asyncio.Event()

    async def lazy(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        while (await receive()).get("more_body"):
            pass
        await PlainTextResponse("all")(scope, receive, send)

    async with connected(db, lambda app: app.mount("/lazy", lazy)) as sender:
        await sender.send(b"POST /lazy/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 200000\r\n\r\n")
        await sender.send(b"x" * 100_000, lambda conn: conn.flow.read_paused)
        sender.wait(1000)
        go.set()
        await sender.send(b"x" * 100_000)
        assert (await sender.answer()).endswith(b"all")


async def test_who_goes_on_sending_after_the_answer_is_cut_off(db):
    async with connected(db) as sender:
        await sender.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 90000000\r\n\r\n")
        assert (await sender.reader.readuntil(b"}")).startswith(b"HTTP/1.1 413 ")
        await sender.send(b"x" * 100_000, lambda conn: conn.got == 100_000)
        sender.wait(31)
        assert await sender.answer() == b""
