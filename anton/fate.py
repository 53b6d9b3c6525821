"""Fate: what an exception says: whose fault it was, and what becomes of the record.

    is_world(error)   not the record: the network, a service, the database, a right or a table that is missing
    failed(error)     the record: it is tried again, and after its attempts a dead letter
    fate_of(outcome)  the handler said it itself: Retry, Discard
"""

from __future__ import annotations

import errno
import random
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import asyncpg

from anton.duration import duration
from anton.errors import DatabaseUnreachable, Discard, Later, MissingPrivilege, Outcome, Retry, UnknownTable, WorldError
from anton.lane import Lane
from anton.secret import hide

LONGEST = timedelta(hours=6)  # of a backoff
TEXT = 8000  # characters kept of an error and of a traceback

_GONE = (OSError, asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.CrashShutdownError,
         asyncpg.CannotConnectNowError, asyncpg.IdleSessionTimeoutError, asyncpg.TooManyConnectionsError,
         asyncpg.InternalClientError, DatabaseUnreachable)
# A right, a table, a column, a function, a type that is missing, or is not what the statement takes it for: whatever
# the record, this handler cannot work until somebody has seen to it. Also a server that only reads at the moment.
_NO_FIT = {"42501", "42P01", "42703", "42883", "42704", "42804", "42809", "42P10", "428C9", "3F000", "55000", "25006"}
_NETWORK = {errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT,
            errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}
_CORE = {"NetworkError", "TimeoutException", "ProtocolError"}
_CLIENTS = {"httpx": {"TransportError"}, "httpx2": {"TransportError"}, "httpcore": _CORE, "httpcore2": _CORE,
            "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"}, "aiohttp": {"ClientConnectionError"},
            "openai": {"APIConnectionError"}, "anthropic": {"APIConnectionError"}, "grpc": {"UnavailableError"}}


def disconnected(error: BaseException) -> bool:
    """True when the connection to Postgres broke, or none is to be had."""
    if isinstance(error, asyncpg.InterfaceError):                      # asyncpg's own; also raised for wrong arguments
        return not isinstance(error, ValueError) and "connection" in str(error)
    return isinstance(error, _GONE)


def starved(error: BaseException | None) -> bool:
    """True when there is no memory. Said of what is not a handler's, it means that the process is of no more use."""
    return any(isinstance(one, MemoryError) for one in _causes(error))


def no_fit(error: BaseException | None) -> asyncpg.PostgresError | None:
    """The error by which Postgres says that a right or an object is missing, and not that it refuses this row."""
    for one in _causes(error):
        if isinstance(one, asyncpg.PostgresError):
            source = getattr(one, "server_source_function", "")        # row security shares 42501 with missing rights
            return one if one.sqlstate in _NO_FIT and source != "ExecWithCheckOptions" else None
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause of that. Once each: `raise error from error` leads back."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        reason = getattr(error, "reason", None)                        # urllib keeps its reason there
        error = error.__cause__ or (reason if isinstance(reason, BaseException) else None)


class World(Exception):
    """Carries what the outside world raised up to where the jobs are given back."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(hide(str(error)))
        self.error = error


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a record that is not done. after: None: the backoff. later: it was not begun: see order.py,
    keyrate.py (rated), and calls of actions that are due later.
    """

    kind: Literal["retry", "discarded", "failed", "later"]
    error: str
    after: timedelta | None = None
    traceback: str | None = None
    rated: bool = False


def backoff(lane: Lane, attempt: int) -> timedelta:
    """How long a record waits that has failed attempt + 1 times: doubling, with jitter, at most 6 hours."""
    wait: timedelta = min(lane.backoff * 2 ** min(attempt, 30), LONGEST)
    return wait * random.uniform(0.75, 1.25)


def say(error: BaseException) -> str:
    """ "ValueError: bad total", short enough to keep."""
    return hide(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)[:TEXT]


def failed(error: BaseException) -> Fate:
    """The fate of a record whose run raised this."""
    lines = traceback.format_exception(error)
    return Fate("failed", say(error), None, hide("".join(lines))[-TEXT:])


def fate_of(outcome: Outcome) -> Fate:
    """What Retry or Discard means. A retry counts as an attempt, so that there is an end to it."""
    if isinstance(outcome, Later):
        return Fate("later", "", outcome.after)
    if isinstance(outcome, Discard):
        return Fate("discarded", hide(outcome.why or "discarded"))
    why, after = (outcome.why, outcome.after) if isinstance(outcome, Retry) else (str(outcome), None)
    return Fate("failed", hide(why or "retry"), None if after is None else duration(after, "after", "Retry"))


def is_world(error: BaseException) -> bool:
    """True when not the record but something outside fails: no connection, a timeout, 429, 5xx, a missing right."""
    return any(_is_world(one) for one in _causes(error))


def _is_world(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(is_world(one) for one in error.exceptions)
    if isinstance(error, (WorldError, ConnectionError, TimeoutError, socket.gaierror, socket.herror)):
        return True
    if isinstance(error, (MissingPrivilege, UnknownTable)) or no_fit(error) is not None:
        return True
    if error.errno in _NETWORK if isinstance(error, OSError) else disconnected(error):
        return True
    for cls in type(error).__mro__:
        if cls.__name__ in _CLIENTS.get(cls.__module__.partition(".")[0], ()):
            return True
    return status_of(error) in (408, 429) or 500 <= status_of(error) <= 599


def status_of(error: BaseException) -> int:
    """The HTTP status that an error carries, 0 where it has none."""
    response = getattr(error, "response", None)
    for holder, name in (
        (error, "status_code"),
        (response, "status_code"),
        (response, "status"),
        (error, "status"),
        (error, "code"),
    ):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    return 0
