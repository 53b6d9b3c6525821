"""Proxy: a TCP proxy that knows enough of Postgres's protocol to lose the reply to a COMMIT.

Runs in a thread with its own loop. Connections must come without TLS (sslmode=disable).

    choose(explicit)   asked at each commit, explicit or of one statement: None goes on; "after": the server commits,
                       its reply is dropped and the connection reset; "before": the commit is not sent on
    freeze(), heal()   a silent partition: nothing passes, nothing is closed; later all of it is reset
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

Cut = Literal["after", "before"] | None


class Proxy:
    """Forwards 127.0.0.1:port to 127.0.0.1:target. counts: commits cut, by how, and the server's tags."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.choose: Callable[[bool], Cut] = lambda explicit: None
        self.counts: Counter[str] = Counter()
        self._links: set[Link] = set()
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def _main(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._open.set()
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(asyncio.sleep(0))  # who was accepted just now has begun
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))  # aborted transports close their sockets
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(self, reader, writer)
        self._links.add(link)
        try:
            with suppress(asyncio.CancelledError):  # we are closed
                await link.run()
        finally:
            link.reset()
            self._links.discard(link)

    async def passing(self) -> None:
        """Waits while frozen."""
        await self._open.wait()

    def freeze(self) -> None:
        """Nothing passes any more, either way; new connections hang too."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def heal(self) -> None:
        """Resets every connection there is, and lets new ones pass."""

        def do() -> None:
            for link in list(self._links):
                link.reset()
            self._open.set()

        self._loop.call_soon_threadsafe(do)

    def close(self) -> None:
        """Ends the thread; connections break."""
        self.heal()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


class Link:
    """One client's connection and ours to the server."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy, self.reader, self.writer = proxy, reader, writer
        self.server: asyncio.StreamWriter | None = None
        self.idle = True  # outside a transaction, as the server said last
        self.swallow = False

    async def run(self) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await self.proxy.passing()
            back, self.server = await asyncio.open_connection("127.0.0.1", self.proxy.target)
            tasks = [asyncio.create_task(self._up(self.server)), asyncio.create_task(self._down(back))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def reset(self) -> None:
        """RST to the client; the server sees the connection closed."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        if self.server is not None:
            self.server.transport.abort()

    async def _up(self, server: asyncio.StreamWriter) -> None:
        """From the client: whole messages, so that a commit can be told."""
        head = await self.reader.readexactly(4)
        server.write(head + await self.reader.readexactly(int.from_bytes(head, "big") - 4))
        while True:
            kind = await self.reader.readexactly(1)
            size = await self.reader.readexactly(4)
            body = await self.reader.readexactly(int.from_bytes(size, "big") - 4)
            await self.proxy.passing()
            explicit = kind == b"Q" and body[:6].upper() == b"COMMIT"
            if explicit or (kind == b"S" and self.idle):
                cut = self.proxy.choose(explicit)
                if cut == "before":
                    self.proxy.counts["before"] += 1
                    return
                if cut == "after":
                    self.proxy.counts["after"] += 1
                    self.swallow = True
            server.write(kind + size + body)
            await server.drain()

    async def _down(self, back: asyncio.StreamReader) -> None:
        while True:
            kind = await back.readexactly(1)
            size = await back.readexactly(4)
            body = await back.readexactly(int.from_bytes(size, "big") - 4)
            await self.proxy.passing()
            if kind == b"Z":
                self.idle = body == b"I"
            if not self.swallow:
                self.writer.write(kind + size + body)
                await self.writer.drain()
                continue
            if kind == b"C":
                self.proxy.counts[body[:-1].decode()] += 1
            if kind in b"ZE":
                return
