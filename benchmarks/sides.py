"""Sides: what the webhook benches compare, each an ASGI app for `uvicorn benchmarks.sides:NAME`.

    kept    benchmarks/app_webhook.py as it is
    bare    the same app and route, verification included, that answers without a database
    insert  a Starlette route with one INSERT a request by asyncpg, as one would write it
    plain   a Starlette route that verifies and answers, without a database
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anton import app, web
from anton.app import load_app
from benchmarks.app_webhook import SECRET


def kept() -> Any:
    """A uvicorn factory, as all of these."""
    load_app("benchmarks.app_webhook")
    return app


def bare() -> Any:
    load_app("benchmarks.app_webhook")
    served: Any = web.asgi(app)

    class Nowhere:
        async def put(self, delivery: object) -> int:
            return 200

    for receiver in served.receivers.values():
        receiver._writer = Nowhere()
    return app


def _forged(request: Request, body: bytes) -> bool:
    made = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    return not hmac.compare_digest(made, request.headers.get("x-hub-signature-256", ""))


def insert() -> Any:
    @asynccontextmanager
    async def lifespan(served: Starlette) -> AsyncIterator[None]:
        async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=10, max_size=10) as pool:
            served.state.pool = pool
            yield

    async def hook(request: Request) -> Response:
        body = await request.body()
        if _forged(request, body):
            return Response(status_code=401)
        json.loads(body)
        await request.app.state.pool.execute("insert into bench_plain (data) values ($1::jsonb)", body.decode())
        return Response(status_code=200)

    return Starlette(routes=[Route("/hook", hook, methods=["POST"])], lifespan=lifespan)


def plain() -> Any:
    async def hook(request: Request) -> Response:
        return Response(status_code=401 if _forged(request, await request.body()) else 200)

    return Starlette(routes=[Route("/hook", hook, methods=["POST"])])
