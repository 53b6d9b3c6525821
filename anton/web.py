"""Web: serves what sense.py declares.

    request -> size -> signature (401) -> parameters (422) -> your function -> commit -> reply

A 2xx leaves only after the writes of its route have committed, all in one transaction; what a route returns is
written out after that. When the database is away the sender is told 503 and Retry-After, and may send again.
No traceback ever reaches a body. /health says that the process lives, /ready that it can commit.

FastAPI and uvicorn are imported here and nowhere else.
"""

from __future__ import annotations

import inspect
import logging
import socket
import time
import typing
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import FastAPIError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Incoming
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Send

from anton import answered, deadline, inbox, sense, sqlfile, write
from anton.answers import (
    MAX_BODY,
    UNSIGNED,
    BadBody,
    Refused,
    handlers,
    is_unmigrated,
    parse_json,
    refuse_public,
    too_many,
    try_later,
)
from anton.app import App, load_app, own_frames, shown
from anton.config import Settings, is_loopback
from anton.db import current_database, identifier
from anton.errors import BadSignature, ConfigError
from anton.record import Record
from anton.sent import MAX_FIELDS, readable
from anton.share import share
from anton.verify import Verifier
from anton.webhook import Receiver, Writer

T = TypeVar("T")

log = logging.getLogger("anton.web")

TRIES = 3  # more, for a commit that ran into a deadlock
OPTIONS: dict[str, Any] = {"http": deadline.Protocol, "ws": "none", "timeout_graceful_shutdown": 30,
                           "access_log": False, "log_level": "warning"}  # of uvicorn
_CLOCK_SECONDS = 30.0
_TOO_LARGE, _TOO_LARGE_JSON = b"Content Too Large", b'{"detail":"Content Too Large"}'


class Request(sense.Request):
    """The request that routes get: as declared, and a body that is not what it is read as answers 400 by itself."""

    def json(self) -> Any:
        return parse_json(self.body)

    def text(self) -> str:
        return _decoded(super().text)

    def form(self) -> dict[str, str]:
        if self.body.count(b"&") >= MAX_FIELDS:
            raise Refused(413, f"the form has more than {MAX_FIELDS:,} fields")
        return _decoded(super().form)


class Strict(Incoming):
    """The request as FastAPI parses it, by the same JSON as everywhere."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


class Clock:
    """The database's time, asked for every 30 s and counted on from there."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._asked: float | None = None

    async def now(self) -> float:
        """Unix seconds."""
        if self._asked is None or time.monotonic() - self._asked > _CLOCK_SECONDS:
            db = current_database()
            async with db.conn() as conn:
                at: datetime = await db.call_value(conn, "now")
            self._ahead, self._asked = at.timestamp() - time.time(), time.monotonic()
        return time.time() + self._ahead

    def forget(self) -> None:
        """Asks again next time: the clock was moved."""
        self._asked = None


def asgi(app: App) -> ASGIApp:
    """The ASGI app of what was declared; made once, and anew when main.py was loaded again."""
    if app.settings is None and not (app.routes or app.webhooks):
        app = load_app()                                               # uvicorn anton:app, in the app's folder
    made = _made.get(id(app))
    if made is None or made[0] is not app.routes:
        made = _made[id(app)] = app.routes, build(app)
    return made[1]


def forget_clocks() -> None:
    """The database's clock was moved."""
    for _, served in _made.values():
        served.state.clock.forget()


_made: dict[int, tuple[Any, Served]] = {}


class Served(FastAPI):
    """FastAPI's app. What comes for a Webhook goes straight to it, unless there is middleware to go through."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.receivers: dict[str, Receiver] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self.user_middleware:
            receiver = self.receivers.get(scope["path"])
            if receiver is not None and scope["method"] in receiver.methods:
                await receiver(scope, receive, send)
                return
        await super().__call__(scope, receive, _json_413(send) if scope["type"] == "http" else send)


def build(app: App) -> Served:
    """The routes and webhooks of `app`. Raises what FastAPI finds wrong with a signature."""
    clock = Clock()
    base = public_base(app)
    served = Served(title=app.name, lifespan=_lifespan, exception_handlers={**handlers(), **app.exception_handlers},
                    max_body_size=MAX_BODY)
    served.state.clock = clock
    verifiers = _verifiers(app)
    for route in app.routes:
        _add(served, route, _guarded(verifiers[f"{route.method} {route.path}"], clock, base, app.name))
    writers: dict[str, Writer] = {}
    for webhook in app.webhooks:
        verifier = verifiers[f"POST {webhook.path}"]
        writer = writers.setdefault(webhook.table.name, Writer(webhook.table, clock.now))
        served.receivers[webhook.path] = receiver = Receiver(webhook, verifier, writer, clock.now, app.name, base)
        served.router.routes.append(Route(webhook.path, receiver, methods=receiver.methods, name=webhook.path))
    for route in app.routes:                                           # after them: what you declare comes first
        verifier = verifiers[f"{route.method} {route.path}"]
        if asked := verifier.methods - {route.method}:
            served.router.add_api_route(
                route.path, _no_handshake, methods=sorted(asked), include_in_schema=False, name=f"ask {route.path}",
                route_class_override=_guarded(verifier, clock, base, app.name))
    served.add_api_route("/health", _health, include_in_schema=False)
    served.add_api_route("/ready", _ready(app), include_in_schema=False)
    served.router.routes.extend(inbox.routes(app, base))
    for path, mounted, name in app.mounts:
        served.mount(path, mounted, name=name)
    for kind, given, named in app.middlewares:
        served.add_middleware(kind or BaseHTTPMiddleware, *given, **named)
    for verifier in verifiers.values():
        if unset := verifier.unset():
            log.warning("%s answers 401 to everybody: set %s", verifier.of, unset)
    return served


def public_base(app: App) -> str:
    """deployment.url of autonomous.json; "" when it is not set."""
    return app.settings.deployment.url if isinstance(app.settings, Settings) else ""


def check_public(app: App, host: str) -> None:
    """Raises ConfigError when `host` is public and a route or Webhook does not say who may call it, or a secret is
    missing. What is open on purpose is logged.
    """
    if is_loopback(host):
        return
    doors = _doors(app)
    unsaid = [f"{name} ({door.place})" for name, door in doors if door.verify is None]
    if unsaid:
        raise ConfigError(f"{', '.join(unsaid)} would take requests from anybody on {host}. Say who signs them: "
                          'verify="slack", secret=env(…); or verify=False when that is meant.', host=host)
    verifiers = _verifiers(app).values()
    missing = [f"{verifier.of} needs {verifier.unset()}" for verifier in verifiers if verifier.unset()]
    if not public_base(app):
        missing += [f"{verifier.of} needs deployment.url in autonomous.json, the address that it must be for"
                    for verifier in verifiers if verifier.bound]
    if missing:
        raise ConfigError(f"not set: {'; '.join(missing)}. Without it every request gets 401.", host=host)
    open_ = [name for name, door in doors if door.verify is False]
    if open_ := open_ + [f"what is mounted at {path or '/'}" for path, _, _ in app.mounts]:
        log.warning("open to everybody on %s: %s", host, ", ".join(open_))


def server(app: App, host: str = "127.0.0.1", port: int = 3000, **options: Any) -> Server:
    """A uvicorn server to await (`await server(app).serve()`). port 0: any free one. options: uvicorn's.

    Raises ConfigError on a public address when nobody said who may call a route or Webhook. SIGTERM finishes the
    requests in flight.
    """
    check_public(app, host)
    own_lines()
    return Server(uvicorn.Config(asgi(app), host=host, port=port, **{**OPTIONS, **options}))


def own_lines() -> None:
    """The server's log shows a traceback with the app's own lines alone."""
    logging.getLogger("uvicorn.error").addFilter(_own_lines)           # each only once, however often it is added


def cannot_listen(host: str, port: int, error: object) -> ConfigError:
    """What to raise where a port cannot be had."""
    return ConfigError(f"cannot listen on port {port} of {host}: {error}. End what uses it, or take another: --port",
                       host=host, port=port)


class Server(uvicorn.Server):
    """Uvicorn's, but it raises ConfigError where it cannot listen."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit as error:
            raise cannot_listen(self.config.host, self.config.port, error.__context__ or "see above") from error


def _own_lines(record: logging.LogRecord) -> bool:
    """A traceback is logged without the frames of the frameworks, where it has others: what a route raised."""
    if record.exc_info and record.exc_info[1] is not None and (own := own_frames(record.exc_info[1])):
        rest = None
        for at in reversed(own):
            rest = TracebackType(rest, at.tb_frame, at.tb_lasti, at.tb_lineno)
        record.exc_info = (record.exc_info[0], record.exc_info[1], rest)
    return True


def port_of(server: uvicorn.Server) -> int:
    """The port a started server listens on."""
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def _doors(app: App) -> list[tuple[str, sense.Route | sense.Webhook]]:
    """What may be called, by method and path."""
    return [*((f"{route.method} {route.path}", route) for route in app.routes),
            *((f"POST {webhook.path}", webhook) for webhook in app.webhooks)]


def _verifiers(app: App) -> dict[str, Verifier]:
    return {name: Verifier(door.verify, door.secrets or None, of=name) for name, door in _doors(app)}


def _json_413(send: Send) -> Send:
    """Starlette's own 413 is a text; all that Anton refuses is JSON."""
    replaced = False

    async def answer(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] == 413:
            said = dict(message["headers"])
            replaced = said.get(b"content-type", b"").startswith(b"text/plain") \
                and said.get(b"content-length") == b"%d" % len(_TOO_LARGE)
            if replaced:
                headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_TOO_LARGE_JSON))]
                await send({**message, "headers": headers})
                await send({"type": "http.response.body", "body": _TOO_LARGE_JSON})
        if not replaced:
            await send(message)

    return answer


@asynccontextmanager
async def _lifespan(served: FastAPI) -> AsyncIterator[None]:
    yield
    await current_database().close()


# A request on its way in


def _guarded(verifier: Verifier, clock: Clock, base: str, app: str) -> type[APIRoute]:
    """A route class that checks who sent a request, and holds the scope its writes are recorded in."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Incoming], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            whole = verifier.active or any(one.call is _request for one in self.dependant.dependencies)

            async def answer(request: Incoming) -> Response:
                request = Strict(request.scope, request.receive)
                if closed := refuse_public(verifier, request.scope):
                    raise Refused(403, closed)
                try:
                    if whole:                                          # else FastAPI takes it in: files go to disk
                        await request.body()
                    with write.Scope("route"):
                        if reply := await _checked(request, verifier, clock, base, app):
                            return reply
                        reply = await answered.once(app, request, verifier, handle)
                        if verifier.accepted and reply.status_code == 200 and not getattr(reply, "body", b"-"):
                            return Response(verifier.accepted, background=reply.background)
                        return reply
                except ClientDisconnect:                               # before its end had come: nobody waits for this
                    return Response(status_code=400)
                except HTTPException as error:
                    if refused := too_many(error):
                        raise refused from error
                    raise
                except Exception as error:
                    if later := try_later(error, f"{request.method} {request.url.path}"):
                        raise Refused(503, later) from error
                    raise

            return answer

    return Guarded


async def _checked(request: Incoming, verifier: Verifier, clock: Clock, base: str, app: str) -> Response | None:
    """Checks who sent it. Returns the answer to a handshake, None for what the route must see."""
    if not verifier.active:
        return None
    body = await request.body()
    headers, url = request.headers.raw, verifier.url(base, request.scope)
    now = await clock.now() if verifier.timed else 0.0
    if (reply := verifier.handshake(body, headers, now, method=request.method, url=url)) is not None:
        return Response(reply.body, reply.status, reply.headers)
    if (refusal := verifier.check(body, headers, now, method=request.method, url=url)) is not None:
        if refusal.stale and (known := await answered.answer(app, request, verifier)) is not None:
            return known
        log.info("401 for %s: %s", verifier.of, refusal.why)
        raise Refused(401, UNSIGNED)
    return None


async def _request(incoming: Incoming) -> Request:
    return Request(
        method=incoming.method, path=incoming.scope["path"], headers=readable(incoming.headers.raw),
        query=dict(incoming.query_params), body=await incoming.body(), path_params=incoming.path_params,
        client=incoming.client.host if incoming.client else "")


def _decoded(read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError as error:
        raise BadBody(f"the body cannot be read: {error}") from None


# Routes


def _add(served: FastAPI, route: sense.Route, kind: type[APIRoute]) -> None:
    options: dict[str, Any] = {"methods": [route.method], "name": route.fn.__name__, **route.options}
    endpoint, returned = _endpoint(route.fn, route.options.get("status_code") or 200)
    if "response_model" not in options and returned in (int, None, Record, inspect.Signature.empty):
        options["response_model"] = None
    try:
        served.router.add_api_route(route.path, endpoint, route_class_override=kind, **options)
    except FastAPIError:
        if "response_model" in options:
            raise
        served.router.add_api_route(route.path, endpoint, route_class_override=kind, response_model=None, **options)


def _endpoint(fn: Callable[..., Any], status: int) -> tuple[Callable[..., Any], Any]:
    """The function as FastAPI calls it: anton.Request filled in, its writes committed before it returns.

    status: what it answers unless it says another.
    """
    try:
        hints = typing.get_type_hints(fn, include_extras=True)
    except NameError as error:
        raise BadSignature(fn.__name__, f'an annotation whose "{error.name}" cannot be found', "names of its module",
                           shown(fn.__code__.co_filename, fn.__code__.co_firstlineno)) from error
    signature = inspect.signature(fn)
    parameters = []
    for parameter in signature.parameters.values():
        hint = hints.get(parameter.name, parameter.annotation)
        if hint is sense.Request or (hint is parameter.empty and parameter.name == "request"):
            hint = Annotated[Request, Depends(_request)]
        parameters.append(parameter.replace(annotation=hint))
    returned = hints.get("return", signature.return_annotation)

    async def endpoint(**values: Any) -> Any:
        if inspect.iscoroutinefunction(fn):
            result = await fn(**values)
        else:
            result = await run_in_threadpool(fn, **values)
        if isinstance(result, int) and not isinstance(result, bool):
            result = Response(status_code=result)
        await _commit(_status(result, values, status))
        return _plain(result)

    endpoint.__name__, endpoint.__doc__, endpoint.__module__ = fn.__name__, fn.__doc__, fn.__module__
    endpoint.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return endpoint, returned


def _plain(value: Any) -> Any:
    """Records of tables without a model as dicts, so that they can be written out."""
    if isinstance(value, Record):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, dict) else value


def _status(result: Any, values: dict[str, Any], status: int) -> int:
    """What will be answered: the function's own Response, or the one of FastAPI's that it set a status on, says it."""
    said = result if isinstance(result, Response) else next(
        (one for one in values.values() if isinstance(one, Response) and one.status_code), None)
    return status if said is None else said.status_code


async def _commit(status: int) -> None:
    """Commits what the route around has written, in one transaction, and closes it for more.

    With it the delivery that this is, answered with this status. Raises answered.Known.
    """
    around, delivery = write.scope.get(), answered.incoming.get()
    assert around is not None
    around.close()
    for tries in range(TRIES, -1, -1):
        try:
            if around.ops or delivery is not None:
                async with around.db.tx() as conn:
                    if delivery is not None:
                        await delivery.keep(around.db, conn, status)
                    await write.apply(conn, around.ops)
            return
        except Exception as error:
            if tries == 0 or str(getattr(error, "sqlstate", ""))[:2] != "40":
                raise                                                  # class 40: another transaction was in its way


# Is it there?


async def _no_handshake() -> Response:
    return JSONResponse({"detail": "Method Not Allowed"}, 405)


async def _health() -> Response:
    return JSONResponse({"status": "ok"})


def _ready(app: App) -> Callable[[], Coroutine[Any, Any, Response]]:
    own = app.folder / "migrations"
    needed = (app.name, [file.name for file in sqlfile.read(share("migrations"))],
              [] if own == share("migrations") else [file.name for file in sqlfile.read(own)],
              [identifier(table) for table in app.tables])

    async def ready() -> Response:
        db = current_database()
        try:
            async with db.conn() as conn:
                missing = [row[0] for row in await db.call(conn, "missing", *needed)]
        except Exception as error:
            if not is_unmigrated(error):
                if later := try_later(error, "/ready"):
                    raise Refused(503, later) from error
                raise
            missing = [f'the runtime of this release in schema "{db.schema}"']
        if missing:
            raise Refused(503, f"the database lacks {', '.join(missing)}; run: anton migrate")
        return JSONResponse({"status": "ready"})

    return ready
