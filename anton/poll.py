"""Poll: asks an outside service for what is new, by the clock.

    @poll(every="1m", into=issues, key="id")
    async def new_issues(cursor): return rows, "next cursor"       # called with None at first

    tick --begin_poll()--> cursor --the function, no transaction open--> rows --new_keys()--> those that are new
    rows + cursor + keys + ack: one transaction

A firing that dies before the commit leaves nothing, and is run again from the same cursor. A function that fails makes
its poll wait: `every`, then twice as long each time, up to an hour. Due times are those of schedule.py.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, overload, runtime_checkable
from uuid import UUID

from pydantic import BaseModel, ValidationError

from anton.app import current_app, place_of_caller
from anton.ctx import Ctx
from anton.db import Conn, Database, Json, to_json
from anton.due import normal
from anton.duration import duration, say
from anton.errors import (
    BadOption,
    BadSignature,
    InvalidRecord,
    LeaseLost,
    Outcome,
    PollFailed,
    UnknownOption,
    WorldError,
)
from anton.fate import is_world
from anton.fate import say as said
from anton.handler import interval
from anton.op import Call, Rows
from anton.query import wait
from anton.relation import described
from anton.schedule import Schedule
from anton.sink import reasons
from anton.table import Table
from anton.write import Scope, owner, scope

log = logging.getLogger("anton.poll")

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")
Length = str | float | timedelta

LONGEST = timedelta(hours=1)  # of a wait after failures, where `every` is not longer
TIMEOUT = timedelta(minutes=5)
ATTEMPTS = 5  # of a firing whose rows the database refuses
DEFAULTS = {"every": None, "into": None, "key": None, "name": None, "timeout": TIMEOUT, "attempts": ATTEMPTS}
_WANTED = "(), (cursor) or (cursor, ctx), def or async def, which returns (rows, cursor) or rows"


@runtime_checkable
class Source(Protocol):
    """A component that is polled. name: of its poll. into: its table. key: as of poll()."""

    name: str
    into: Table[Any]
    key: str | Sequence[str] | None

    async def poll(self, cursor: Any) -> Any:
        """What is new since the cursor: (rows, next cursor)."""


@dataclass(slots=True)
class Found:
    """What a call returned. keys: parallel to rows, each once; [] without key=. count: rows before any was dropped."""

    rows: list[Any]
    keys: list[UUID]
    cursor: Json
    count: int


class State(NamedTuple):
    """What begin_poll() says, see sql/62_poll.sql."""

    schedule_id: int
    cursor: Any
    version: int
    due: bool
    failing: timedelta | None
    now: datetime


@overload
def poll(*, every: Length, into: Table[Any], key: str | Sequence[str] | None = None, name: str | None = None,
         timeout: Length = TIMEOUT, attempts: int = ATTEMPTS) -> Callable[[F], F]: ...
@overload
def poll(source: S, /, *, every: Length, into: Table[Any] | None = None, key: str | Sequence[str] | None = None,
         name: str | None = None, timeout: Length = TIMEOUT, attempts: int = ATTEMPTS) -> S: ...
def poll(source: Any = None, /, **options: Any) -> Any:
    """@poll(every="1m", into=issues, key="id"): the function is asked for what is new, and its rows are appended.

    It takes the cursor that it returned last, None at first, and returns (rows, cursor), or rows alone. key: fields
    that make a row one that was met before; such rows are dropped. name: default the function's. timeout: of one call.
    attempts: of a firing whose rows the database refuses. poll(Rss(articles, url), every="15m") takes a component.
    Raises UnknownOption, BadOption, BadSignature, DuplicateName.
    """
    of = f'@poll "{options["name"]}"' if options.get("name") else "@poll"
    for option in options:
        if option not in DEFAULTS:
            raise UnknownOption(option, of, tuple(DEFAULTS))
    if callable(source) and "every" not in options:
        raise BadSignature(getattr(source, "__name__", "?"), "no times: @poll", '@poll(every="1m", into=TABLE)',
                           place_of_caller())
    if isinstance(source, Source) and not isinstance(source, type):
        given = {"into": source.into, "key": source.key, "name": source.name, **options}
        _declare(source.poll, of, DEFAULTS | given, source)
        return source

    def declare(fn: Any) -> Any:
        _declare(fn, of, DEFAULTS | options)
        return fn

    return declare if source is None else declare(source)


def _declare(fn: Callable[..., Any], of: str, given: dict[str, Any], component: Source | None = None) -> None:
    place, into, attempts = place_of_caller(), given["into"], given["attempts"]
    every, timeout = duration(given["every"], "every", of), duration(given["timeout"], "timeout", of)
    if every < timedelta(seconds=1):
        raise BadOption("every", given["every"], of, "at least 1 s")
    if not isinstance(into, Table):
        raise BadOption("into", into, of, 'a Table, such as into=issues with issues = Table("issues")')
    if type(attempts) is not int or not 1 <= attempts <= 1000:
        raise BadOption("attempts", attempts, of, "a whole number from 1 to 1000")
    name = given["name"] or getattr(fn, "__name__", None)
    if not isinstance(name, str) or name == "<lambda>":
        raise BadOption("name", name, "@poll", 'a text; a lambda and the like need one: name="new_issues"')
    app = current_app()
    one = Poll(app.name, name, fn, _takes(fn, name, place), every, into, _fields(into, given["key"], of))
    rules = {"overlap": "skip", "at_once": True, "options": {
        "into_tables": [into.name], "concurrency": 1, "timeout": interval(timeout), "attempts": attempts,
        "backoff": interval(min(every, timedelta(minutes=1)))}}
    app.claim_name("handler", name, place)                             # its jobs are a handler's
    app.schedules[name] = Schedule(name, normal(f"@every {every.total_seconds():.15g}"), "UTC", f"Every {say(every)}",
                                   one.arun if one.is_async else one.run, True, place, rules, component)


class Poll:
    """A function that is polled. takes: how many arguments. every: between calls. key: fields of into, () for none."""

    def __init__(self, app: str, name: str, fn: Callable[..., Any], takes: int, every: timedelta, into: Table[Any],
                 key: tuple[str, ...]) -> None:
        self.app, self.name, self.fn, self.takes = app, name, fn, takes
        self.every, self.into, self.key = every, into, key
        self.is_async = inspect.iscoroutinefunction(fn)
        self._last: tuple[datetime | None, datetime] | None = None     # planned and begun; perhaps not committed yet

    async def arun(self, ctx: Ctx) -> None:
        """One firing, inside its scope."""
        db = _scope().db
        state = await self._begin(db, ctx)
        if state.due:
            with self._failing(state):
                found = self._found(state, await self.fn(*(state.cursor, ctx)[:self.takes]))
            new = await self._new(db, state, found)
            self._record(ctx.planned_at, state, found, new)

    def run(self, ctx: Ctx) -> None:
        """One firing of a def, in a thread."""
        db = _scope().db
        state = wait(db, lambda: self._begin(db, ctx), "a poll", "async def")
        if state.due:
            with self._failing(state):
                found = self._found(state, self.fn(*(state.cursor, ctx)[:self.takes]))
            new = wait(db, lambda: self._new(db, state, found), "a poll", "async def")
            self._record(ctx.planned_at, state, found, new)

    async def _begin(self, db: Database, ctx: Ctx) -> State:
        async with db.conn() as conn:
            state = State(*(await db.call(conn, "begin_poll", self.app, self.name, ctx.planned_at))[0])
        last, planned = self._last, ctx.planned_at
        late = last is not None and planned is not None and planned != last[0] and planned <= last[1]
        return state._replace(due=state.due and not late)

    async def _new(self, db: Database, state: State, found: Found) -> set[UUID]:
        """Those of the keys that were not met before. A firing that commits meanwhile makes this one run again."""
        if not found.keys:
            return set()
        async with db.conn() as conn:
            return set(await db.call_value(conn, "new_keys", state.schedule_id, found.keys))

    @contextmanager
    def _failing(self, state: State) -> Iterator[None]:
        """There is no record to blame: whatever is raised inside makes the poll wait, and it keeps its cursor."""
        try:
            yield
        except (Outcome, LeaseLost):
            raise
        except Exception as error:
            if not is_world(error):
                log.warning("poll %s: %s (%s)", self.name, said(error), _raised_at(error, self.fn))
                log.debug("poll %s", self.name, exc_info=True)         # it may fail each time: once is one line
            after = min(max(self.every, state.failing or timedelta(0)), max(self.every, LONGEST))
            after = max(after, getattr(error, "after", None) or timedelta(0))
            raise PollFailed(self.name, str(error) if isinstance(error, WorldError) else said(error), after) from error

    def _found(self, state: State, result: Any) -> Found:
        """What the function returned, with its rows as they fit the table."""
        rows, cursor = result if isinstance(result, tuple) and len(result) == 2 else (result, state.cursor)
        rows = () if rows is None else rows
        if isinstance(rows, (str, bytes, Mapping, BaseModel)) or not isinstance(rows, Iterable):
            raise PollFailed(self.name, f'poll "{self.name}" returned {type(rows).__name__} as its rows. Allowed: '
                             "(rows, cursor), or rows: a list, or any iterable, of dicts or models")
        try:
            text = to_json(cursor)
        except TypeError as error:
            raise PollFailed(self.name, f'JSON cannot hold the cursor of poll "{self.name}": {error}') from None
        if b"\\u0000" in text:
            raise PollFailed(self.name, f'the cursor of poll "{self.name}" holds the character NUL, which Postgres '
                             "cannot store")
        fitting = [self._fit(row) for row in rows]
        if not self.key:
            return Found(fitting, [], Json(text), len(fitting))
        first: dict[UUID, Any] = {}
        for row in fitting:
            first.setdefault(self._key_of(row), row)
        return Found(list(first.values()), list(first), Json(text), len(fitting))

    def _fit(self, row: Any) -> Any:
        model = self.into.model
        if model is None or isinstance(row, model):
            return row
        try:
            return model.model_validate(row)
        except ValidationError as error:
            raise InvalidRecord(self.into.name, row, reasons(error)) from None

    def _key_of(self, row: Any) -> UUID:
        values = [row.get(name) if isinstance(row, Mapping) else getattr(row, name, None) for name in self.key]
        if None in values:
            raise InvalidRecord(self.into.name, row, [
                f'"{self.key[values.index(None)]}", which key= of poll "{self.name}" names, has no value'])
        return UUID(bytes=blake2b(to_json(values), digest_size=16).digest())

    def _record(self, planned: datetime | None, state: State, found: Found, new: set[UUID]) -> None:
        """Rows, keys and cursor, to be committed with the ack."""
        rows = [row for row, key in zip(found.rows, found.keys, strict=True) if key in new] if self.key else found.rows
        outer = _scope()
        db, unless = outer.db, self._unless(outer.db) if rows else ()
        inner = Scope("transaction", outer.inputs, db, outer.on_conflict, owner.get())
        with inner:
            self.into.extend(rows)
        for op in inner.ops:
            if isinstance(op, Rows):
                op.unless = unless
        outer.absorb(inner)

        async def finish(conn: Conn) -> bool:
            return bool(await db.call_value(conn, "finish_poll", state.schedule_id, state.version, found.cursor,
                                            state.now, found.keys, len(rows), found.count - len(rows)))

        self._last = planned, state.now
        outer.add(Call(f"poll {self.name}", finish, owner.get()))

    def _unless(self, db: Database) -> tuple[str, ...]:
        """The columns of a unique index over the key, if the table has one: others may have written the row."""
        relation = described(db, self.into.name)
        if not self.key or (relation.document and self.into.model is None):
            return ()
        return next((group for group in (relation.key, *self.into.unique) if set(group) == set(self.key)), ())


def _raised_at(error: Exception, fn: Callable[..., Any]) -> str:
    """The last line of the function's own file that was passed, "polls.py:12"; the last of all where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.unwrap(fn).__code__.co_filename] \
        if inspect.isfunction(inspect.unwrap(fn)) else []
    last = (own or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _scope() -> Scope:
    current = scope.get()
    assert current is not None                                         # the worker's, for this firing
    return current


def _fields(into: Table[Any], key: Any, of: str) -> tuple[str, ...]:
    if key is None:
        return ()
    names = (key,) if isinstance(key, str) else tuple(key) if isinstance(key, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise BadOption("key", key, of, 'a field or several: key="id", key=("repo", "number")')
    for name in names:
        if into.shape is not None and name not in into.shape.names:
            raise UnknownOption(name, f"key= of {of}", into.shape.names)
    return names


def _takes(fn: Any, name: str, place: str) -> int:
    """How many of (cursor, ctx) a function is called with."""
    if not callable(fn) or inspect.isasyncgenfunction(fn):
        raise BadSignature(name, "yield in async def" if callable(fn) else repr(fn), _WANTED, place)
    parameters = list(inspect.signature(fn).parameters.values())
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 2 or any(p.kind is p.KEYWORD_ONLY for p in needed):
        raise BadSignature(name, f"({', '.join(map(str, parameters))})", _WANTED, place)
    return 2 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else min(len(places), 2)
