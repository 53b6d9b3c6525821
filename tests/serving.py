"""What the tests of the web share: declarations served on a port of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from anton import web
from anton.app import App, declaring
from anton.db import Database
from anton.migrate import migrate


@asynccontextmanager
async def serve(db: Database, declare: Callable[[App], Any], **options: Any) -> AsyncIterator[web.Server]:
    """What `declare(app)` declares, migrated and served. options: uvicorn's."""
    with declaring(App("web")) as app:
        declare(app)
    app.settings = object()  # type: ignore[assignment]                # it was loaded
    await migrate(db, app)
    server = web.server(app, port=0, **options)
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            assert not task.done(), task.result()
            await asyncio.sleep(0)
        yield server
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def serving(db: Database, declare: Callable[[App], Any], **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The same, and a client of it."""
    async with serve(db, declare, **options) as server:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{web.port_of(server)}", timeout=60) as client:
            yield client


async def count(db: Database, table: str) -> int:
    """How many rows a table has."""
    async with db.conn() as conn:
        found: int = await conn.fetchval(f"select count(*) from {table}")
        return found
