"""Answers: what a sender is told when something is wrong. Web.py raises, FastAPI asks the handlers here.

    400  a body or a value that cannot be          413  too large, too many parts
    401  not who it says it is                     422  not what the route declares
    403  on a public address, and open to anybody
    409  against a constraint, or changed since    503  the database is away, or not migrated: Retry-After

Never a traceback, never SQL: those are logged. An app's own @app.exception_handler goes first.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request as Incoming

from anton.db import current_database, is_away, lacks_runtime
from anton.errors import InvalidRecord, QueryError, RowChanged, UnknownTable, WriteRefused
from anton.sink import NUL
from anton.verify import Verifier

log = logging.getLogger("anton.web")

MAX_BODY = 10_000_000  # bytes; more gets 413
DEPTH = 200  # of JSON, which pydantic's parser goes
AWAY = "the database is away; send it again"  # what of it was kept before is then known
NOT_READY = "the database is not ready for this release; send it again"
UNSIGNED = "the request is not signed as it must be"  # the log says why: who sends it learns nothing of the secrets
NOT_PUBLIC = "not open to the public"
RETRY_AFTER = 2  # seconds, said with a 503
_MANY = ("Too many", "Field exceeded", "Part exceeded")  # how Starlette's 400s for forms beyond its limits begin
_MAYBE_INFINITE = re.compile(rb"[eE]\+?\d{3}|\d{309}")
# A value that Postgres has no place for; what else is of class 22, such as a division by zero, is the query's doing.
_VALUE = {"22000", "22003", "22007", "22008", "22009", "22021", "22P02", "22P05"}


class Refused(HTTPException):
    """The request is answered with this status and text, and nothing is written."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail, {"Retry-After": str(RETRY_AFTER)} if status == 503 else None)


class BadBody(HTTPException, ValueError):
    """The body is not what the route reads it as; the sender gets 400 with this text."""

    def __init__(self, detail: str) -> None:
        super().__init__(400, detail)


def parse_json(body: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN, no half of a character; at most 200 deep, integers of any size.

    Raises BadBody.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadBody(f"the body is not JSON: {error}") from None
    if _MAYBE_INFINITE.search(body) and _infinite(value):
        raise BadBody("the body is not JSON: a number is out of range")
    return value


def check_json(body: bytes, whole: bool) -> None:
    """Looks whether parse_json() would take it, without making the value: quicker.

    whole: it is stored as it is, so that Postgres must take all of it. Raises BadBody.
    """
    try:
        orjson.loads(body)
        if body.count(b"[") + body.count(b"{") > DEPTH:
            from_json(body, allow_inf_nan=False)                       # refuses what is deeper
    except ValueError as error:
        raise BadBody(f"the body is not JSON: {error}") from None
    if whole and b"\\u0000" in body and NUL.search(body):
        raise BadBody("the body holds the character NUL, which Postgres cannot store")


def is_unmigrated(error: BaseException) -> bool:
    """Whether this says that the database lacks what `anton migrate` makes: the runtime of this release, or a Table."""
    return isinstance(error, UnknownTable) or lacks_runtime(current_database().schema, error)


def try_later(error: BaseException, what: str) -> str | None:
    """What to say with a 503 where the error is the database's state; None for every other error. Logs the reason."""
    if is_away(error):
        log.warning("503 for %s: %s", what, error or type(error).__name__)
        return AWAY
    if is_unmigrated(error):
        log.error("503 for %s: %s%s", what, error, "" if "anton migrate" in str(error) else "; run: anton migrate")
        return NOT_READY
    return None


def refuse_public(verifier: Verifier, scope: Mapping[str, Any]) -> str | None:
    """What to say with a 403 to a request on a public address, where nobody said who may call; None lets it in."""
    address = verifier.closed(scope)
    if address is None:
        return None
    log.error('403 for %s: it takes requests from anybody, and %s is a public address. Say who signs them: '
              'verify="slack", secret=env(…); or verify=False when that is meant', verifier.of, address)
    return NOT_PUBLIC


def _infinite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_infinite, value.values()))
    return any(map(_infinite, value)) if isinstance(value, list) else isinstance(value, float) and math.isinf(value)


def too_many(error: HTTPException) -> Refused | None:
    """413 for what is Starlette's 400 of a form with too many or too large parts; None for all others."""
    mine = error.status_code == 400 and str(error.detail).startswith(_MANY)
    return Refused(413, str(error.detail)) if mine else None


def handlers() -> dict[Any, Any]:
    """By class of exception, as FastAPI takes them."""
    return {RequestValidationError: _invalid_request, Exception: _failed, InvalidRecord: _invalid,
            QueryError: _query, WriteRefused: _write_refused, RowChanged: _changed}


async def _invalid_request(request: Incoming, error: RequestValidationError) -> Response:
    try:
        return await request_validation_exception_handler(request, error)
    except (ValueError, RecursionError):                               # what was sent cannot be shown as JSON
        shown = [{name: detail[name] for name in ("type", "loc", "msg")} for detail in error.errors()]
        return JSONResponse({"detail": shown}, 422)


async def _invalid(request: Incoming, error: InvalidRecord) -> Response:
    return JSONResponse({"detail": list(error.reasons)}, 422)


async def _query(request: Incoming, error: QueryError) -> Response:
    """A value that cannot be looked for cannot be there; the reasons are the sender's, the SQL is not."""
    if not error.told and str(getattr(error.__cause__, "sqlstate", "")) not in _VALUE:
        raise error
    log.info("400 for %s %s: %s", request.method, request.scope["path"], error)
    return JSONResponse({"detail": error.told or str(error.__cause__)}, 400)


async def _write_refused(request: Incoming, error: WriteRefused) -> Response:
    """SQLSTATE class 22, 54: the data cannot be stored at all; 23: it is against a constraint."""
    kind = str(getattr(error.error, "sqlstate", ""))[:2]
    if kind not in ("22", "23", "54"):
        raise error
    return JSONResponse({"detail": str(error.error.args[0])}, 409 if kind == "23" else 400)


async def _changed(request: Incoming, error: RowChanged) -> Response:
    return JSONResponse({"detail": "a record changed meanwhile; read it and try again"}, 409)


async def _failed(request: Incoming, error: Exception) -> Response:
    """The server logs it, the sender need not know."""
    what = f"{request.method} {request.scope['path']}"
    if later := try_later(error, what):
        return JSONResponse({"detail": later}, 503, {"Retry-After": str(RETRY_AFTER)})
    log.error("500 for %s: %s", what, type(error).__name__)
    return JSONResponse({"detail": "Internal Server Error"}, 500)
