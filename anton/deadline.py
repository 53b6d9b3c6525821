"""Deadline: how long a request may take to arrive. Uvicorn waits for ever; here a slow sender gets 408.

    the head    10 s after the connection, or the request, began
    the body    20 s more, and 1 s for every 10,000 bytes that have come

A look over all connections once a second, so that a request pays nothing for it. How long a route takes is its own
business. Under another ASGI server the limits are that server's; uvicorn takes these: http="anton.deadline:Protocol".
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

log = logging.getLogger("anton.web")

HEAD_SECONDS = 10.0
BODY_SECONDS = 20.0
BYTES_PER_SECOND = 10_000
EVERY = 1.0  # seconds between two looks
_ANSWER = b'{"detail":"the request took too long to arrive"}'
_TOO_SLOW = (b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
             b"content-length: %d\r\n\r\n%b" % (len(_ANSWER), _ANSWER))


class Protocol(HttpToolsProtocol):
    """Uvicorn's, which notes since when it waits for the rest of a request."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.since: float | None = None                                # monotonic; None: it waits for nothing
        self.begun = False                                             # a first byte has come
        self.headed = False                                            # the head is complete
        self.got = 0                                                   # bytes of the body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)                             # type: ignore[arg-type]
        self.since = time.monotonic()
        if self.server_state not in _watched:
            _watched.add(self.server_state)
            self.loop.call_later(EVERY, _again, self.loop, self.server_state)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.since, self.begun, self.headed, self.got = time.monotonic(), True, False, 0

    def on_headers_complete(self) -> None:
        self.headed = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.got += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.since = None
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Anybody may ask for a WebSocket: nothing to log."""

    def look(self, now: float) -> None:
        """Ends the connection when what it waits for is overdue."""
        if self.since is None or self.transport is None or self.transport.is_closing():
            return
        if self.flow.read_paused:                                      # it is the app that does not take it
            self.since, self.got = now, 0
            return
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if answering and not self.headed:                              # the request before this one
            return
        patience = HEAD_SECONDS
        if self.headed:
            patience += BODY_SECONDS + (self.got / BYTES_PER_SECOND if answering else 0.0)
        if now - self.since < patience:
            return
        log.info("408: a request took longer than %.0f s to arrive", patience)
        if self.begun and (not self.headed or answering and not cycle.response_started):
            self.transport.write(_TOO_SLOW)
        if answering:                                                  # for the app, its sender has left
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()


def look(state: ServerState, now: float | None = None) -> None:
    """Looks over all connections of a server. now: as time.monotonic()."""
    now = time.monotonic() if now is None else now
    for connection in list(state.connections):
        if isinstance(connection, Protocol):
            connection.look(now)


def _again(loop: asyncio.AbstractEventLoop, state: ServerState) -> None:
    look(state)
    if state.connections:
        loop.call_later(EVERY, _again, loop, state)
    else:
        _watched.discard(state)


_watched: weakref.WeakSet[ServerState] = weakref.WeakSet()
