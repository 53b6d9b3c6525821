"""Handler: a function, SQL or a component that is called for what happens to a Table's records.

    @orders.on_new_records                        (records) or (records, ctx): one call a batch
    @orders.on_new_records(each=True, into=t)     (record) or (record, ctx): one call a record
    orders.on_new_records.sql("insert into …")    in the database
    orders.on_new_records(Component(…))

def runs in a thread, async def in the loop. Declared through event.py, worked by worker.py.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

from pydantic import BaseModel

from anton.ctx import Ctx
from anton.errors import BadSignature, ValueWithoutInto, WriteError
from anton.rank import PRIORITY
from anton.record import ChangeOp
from anton.write import OnConflict

if TYPE_CHECKING:
    from anton.table import Table

BATCH, EACH_BATCH = 4000, 100  # records of a call; with each=True of a claim
CALLS, EACH_CALLS = 4, 50  # at a time
MOST = 4096  # records of a batch


class Options(TypedDict, total=False):
    """What every handler takes besides each=."""

    name: str
    was: str
    into: Table[Any] | Sequence[Table[Any]]
    where: str
    columns: Sequence[str]
    read: Literal["now", "change"]
    since: Literal["now", "beginning"]
    batch: int
    max_wait: str | float | timedelta
    concurrency: int
    timeout: str | float | timedelta
    attempts: int
    backoff: str | float | timedelta
    max_lag: str | float | timedelta
    on_conflict: OnConflict
    per: str
    priority: int
    debounce: str | float | timedelta
    ordered: bool
    on_dead: Literal["skip", "block"]
    rate: str


OPTIONS = (*Options.__annotations__, "each")


@dataclass(eq=False)
class Handler:
    """A declared handler. Options as in docs/handlers.md, defaults filled in.

    ops: what it listens to. fn: None for SQL. wants_ctx: it takes a second argument. into: where returned values go.
    limit: calls, or records with each, at a time over all processes; None: concurrency in each of them.
    per: the column each of whose values has a limit of its own, or with debounce comes to rest by itself, or with
    ordered has an order. ordered: records of one key one at a time, in order. on_dead: its key goes on after a dead
    letter, or waits for it.
    debounce: how long a record must be at rest; max_wait then: how long at most after its first change, 0: the default.
    priority: 0 to 9, the highest goes first.
    rate: starts in any window over all processes.
    body, params: its SQL, and {name: [type, text]} bound into it. place: "main.py:12". typed: the options as typed.
    """

    app: str
    name: str
    table: Table[Any]
    ops: tuple[ChangeOp, ...]
    kind: Literal["python", "sql"]
    fn: Callable[..., Any] | None
    place: str
    is_async: bool = False
    wants_ctx: bool = False
    yields: bool = False
    each: bool = False
    into: tuple[Table[Any], ...] = ()
    where: str | None = None
    columns: tuple[str, ...] | None = None
    read: Literal["now", "change"] = "now"
    since: Literal["now", "beginning"] = "now"
    batch: int = BATCH
    max_wait: timedelta = timedelta(0)
    concurrency: int = CALLS
    limit: int | None = None
    per: str | None = None
    priority: int = PRIORITY
    debounce: timedelta | None = None
    ordered: bool = False
    on_dead: Literal["skip", "block"] = "skip"
    rate: str | None = None
    timeout: timedelta = timedelta(minutes=5)
    attempts: int = 5
    backoff: timedelta = timedelta(seconds=1)
    max_lag: timedelta | None = None
    on_conflict: OnConflict = "rerun"
    body: str | None = None
    params: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    component: object = None
    was: str | None = None
    typed: dict[str, Any] = field(default_factory=dict)

    def definition(self) -> dict[str, Any]:
        """What put_handler() takes."""
        return {
            "app": self.app, "name": self.name, "was": self.was, "table": self.table.name, "kind": self.kind,
            "ops": list(self.ops), "each_record": self.each, "read": self.read, "where_sql": self.where,
            "columns": list(self.columns) if self.columns is not None else None, "body": self.body,
            "params": {name: list(param) for name, param in self.params.items()},
            "into_tables": [table.name for table in self.into], "batch": self.batch,
            "max_wait": interval(self.max_wait or None), "concurrency": self.concurrency,
            "timeout": interval(self.timeout), "attempts": self.attempts, "backoff": interval(self.backoff),
            "max_lag": interval(self.max_lag),
            "options": self.typed, **({"limit": self.limit} if self.limit else {}),
            **({"per": self.per} if self.per else {}),
            **({"priority": self.priority} if self.priority != PRIORITY else {}),
            **({"debounce": interval(self.debounce)} if self.debounce else {}),
            **({"ordered": True, "on_dead": self.on_dead} if self.ordered else {}),
            **({"rate": self.rate} if self.rate else {}),
        }

    def call(self, subject: Any, ctx: Ctx | None = None) -> None:
        """Calls a def with records, or one record, and records what it returns or yields."""
        assert self.fn is not None
        result = self.fn(subject, ctx) if self.wants_ctx else self.fn(subject)
        if result is not None and inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise BadSignature(self.name, "and returns a coroutine from def", "async def", self.place)
        if result is not None:
            self.emit(result)

    async def acall(self, subject: Any, ctx: Ctx | None = None) -> None:
        """Calls an async def with records, or one record, and records what it returns or yields."""
        assert self.fn is not None
        result = self.fn(subject, ctx) if self.wants_ctx else self.fn(subject)
        if inspect.iscoroutine(result):                                # the usual case, and the quickest to see
            result = await result
        elif isinstance(result, AsyncIterator):
            async for value in result:
                self.emit(value)
            return
        elif isinstance(result, Awaitable):
            result = await result
        if result is not None:
            self.emit(result)

    def emit(self, value: Any) -> None:
        """Records a returned value: a model, a dict, or an iterable of them."""
        if value is None:
            return
        if not self.into:
            raise ValueWithoutInto(self.name, value)
        if isinstance(value, (Mapping, BaseModel, str, bytes)) or not isinstance(value, Iterable):
            self._target(value).append(value)
        elif len(self.into) == 1:
            self.into[0].extend(value)
        else:
            for one in value:
                self._target(one).append(one)

    def _target(self, value: Any) -> Table[Any]:
        if len(self.into) == 1:
            return self.into[0]
        fits = [table for table in self.into if table.model is not None and isinstance(value, table.model)]
        if len(fits) != 1:
            raise WriteError(f'handler "{self.name}" has several tables in into= and returned {type(value).__name__}, '
                             f"which is the model of {'none' if not fits else 'several'} of them. Append to the table "
                             "that you mean, or return an instance of its model")
        return fits[0]

    def __repr__(self) -> str:
        return f"Handler({self.name!r}, {self.table.name} {' '.join(self.ops)}, {self.place})"


def interval(length: timedelta | None) -> str | None:
    """A length of time as Postgres reads it."""
    return None if length is None else f"{length.days} days {length.seconds} seconds {length.microseconds} microseconds"



@dataclass
class HandlerSpec:
    """What a component becomes on a table: a function and the defaults of its options."""

    fn: Callable[..., Any]
    name: str
    each: bool = False
    into: Table[Any] | Sequence[Table[Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Component(Protocol):
    """A configured object that handles the records of whatever table it is put on."""

    def bind(self, table: Table[Any]) -> HandlerSpec:
        """Checks that it fits the table, and says what to run."""
