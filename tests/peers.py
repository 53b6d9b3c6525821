"""A service's stand-in on a real port: routes served from a thread of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from anton.db import Portal


@contextmanager
def served(*routes: Route, ending: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The address of a server of these routes. ending: called in its loop before it waits for what is in flight."""
    loop = Portal()
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning", lifespan="off",
                                           timeout_graceful_shutdown=1))

    async def start() -> asyncio.Task[None]:
        task = asyncio.create_task(server.serve())
        while not server.started:                                      # noqa: ASYNC110
            await asyncio.sleep(0)
        return task

    async def stop(task: asyncio.Task[None]) -> None:
        server.should_exit = True
        ending()
        await task

    task = loop.run(start())
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        loop.run(stop(task))
        loop.stop()
