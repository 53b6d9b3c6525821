"""Write: recorded, never awaited; made together with what surrounds them.

    append, update, delete --recorded in--> Scope: handler | route | schedule | transaction
    scope.ops --apply(conn, ops)--> the database, in one go, inside the caller's transaction

Each write belongs to an owner: the position of the input record that caused it, or WHOLE, the batch.
So one record can be settled, refused or run again without its neighbours' writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from anton.apply import apply as apply
from anton.db import Database, current_database
from anton.errors import NoScope, Outcome, ScopeClosed, SyncInLoop, WriteError
from anton.op import WHOLE as WHOLE
from anton.op import Op as Op
from anton.op import Output as Output
from anton.op import Rows as Rows
from anton.op import Step as Step
from anton.op import merge as merge
from anton.op import pick as pick
from anton.relation import Relation, value

Kind = Literal["handler", "route", "schedule", "transaction"]
OnConflict = Literal["rerun", "overwrite"]

owner: ContextVar[int] = ContextVar("anton_owner", default=WHOLE)
scope: ContextVar[Scope | None] = ContextVar("anton_scope", default=None)

Outcome.at = staticmethod(owner.get)  # Retry and Discard remember which record raised them

_live: set[Scope] = set()  # handlers that run now, for of= in a thread started by hand
_worker = 0


class Inputs(Protocol):
    """What a scope was called with; Records is one."""

    def position(self, of: object, /) -> int | None:
        """0-based position of one of the inputs, WHOLE for all of them, None for anything else."""


class Scope:
    """Collects the writes of one call of a handler, a route, a schedule or a transaction.

        with Scope("handler", inputs=records) as scope:     # current for all code inside, tasks and to_thread included
            fn(records)
        await apply(conn, scope.ops)

    inputs: for of=. on_conflict: what a recorded update of a row that changed since it was read does by default.
    Writes after the end raise ScopeClosed. base: the owner that writes outside any iteration get. table: what the
    inputs are records of, "shop.orders".
    """

    def __init__(self, kind: Kind, inputs: Inputs | None = None, db: Database | None = None,
                 on_conflict: OnConflict = "rerun", base: int = WHOLE) -> None:
        self.kind = kind
        self.inputs = inputs
        self.db = db or current_database()
        self.on_conflict: OnConflict = on_conflict
        self.ops: list[Op] = []
        self.sinks: dict[Any, Any] = {}  # by table: where its appends go
        self.closed = False
        self.table = ""
        self._base = base
        self._seen: list[tuple[Relation, Sequence[Any]]] = []
        self._versions: dict[int, dict[Any, int]] = {}
        self._tokens: tuple[Token[Scope | None], Token[int]] | None = None

    def __enter__(self) -> Self:
        self._tokens = scope.set(self), owner.set(self._base)
        if self.kind == "handler":
            _live.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._tokens is not None:
            scope.reset(self._tokens[0])
            owner.reset(self._tokens[1])
        self.close()

    def close(self) -> None:
        """No more writes; keys that were taken and not used go back."""
        self.closed = True
        _live.discard(self)
        self._seen, self._versions = [], {}                            # contexts of tasks may outlive the call by far
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.close()

    def take(self) -> list[Op]:
        """What was recorded, after the end; then the scope holds nothing more."""
        ops, self.ops, self.inputs = self.ops, [], None
        return ops

    def add(self, op: Op) -> None:
        """A write that comes after all so far."""
        self.check()
        self._part()
        self.ops.append(op)

    def check(self) -> None:
        """Raises ScopeClosed after the end."""
        if self.closed:
            raise ScopeClosed(f"this {self.kind} has ended and its writes are made. Await, or join, what it started "
                              "before it returns")

    def saw(self, relation: Relation, rows: Sequence[Any]) -> None:
        """Notes rows that were read with `xmin as _xmin`; a write to one of them then carries its version."""
        if relation.key and relation.versioned and rows:
            self._seen.append((relation, rows))

    def versions(self, relation: Relation) -> dict[Any, int]:
        """xmin by key, of the rows of this table read so far."""
        while self._seen:
            read, rows = self._seen.pop(0)
            known = self._versions.setdefault(read.oid, {})
            for row in rows:
                known[read.key_of(row)] = value(row, "_xmin")
        return self._versions.setdefault(relation.oid, {})

    def absorb(self, inner: Scope) -> None:
        """Takes over the writes of a transaction inside this scope."""
        self._part()
        self.ops.extend(inner.ops)

    def _part(self) -> None:
        """Appends from now on come after what is there."""
        for sink in self.sinks.values():
            sink.part()


class transaction:
    """with transaction(): … writes inside commit together at its end, and none of them when it raises.

    async with in async code. Inside a handler, a route or another transaction it joins what is around it.
    Raises RowChanged when a row that was read inside changed before its update; run the block again.
    """

    def __init__(self, *, on_conflict: OnConflict = "rerun") -> None:
        self._on_conflict = on_conflict

    def __enter__(self) -> None:
        if in_loop() and scope.get() is None:
            raise SyncInLoop("with transaction()", "async with transaction()")
        self._begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._end(error):
            self._scope.db.run(commit(self._scope.db, self._scope.ops))

    async def __aenter__(self) -> None:
        self._begin()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        at: TracebackType | None) -> None:
        if self._end(error):
            await commit(self._scope.db, self._scope.ops)

    def _begin(self) -> None:
        self._outer = scope.get()
        if self._outer is None:
            self._scope = Scope("transaction", on_conflict=self._on_conflict)
        else:
            self._outer.check()
            self._scope = Scope("transaction", self._outer.inputs, self._outer.db, self._on_conflict, owner.get())
            self._scope._seen, self._scope._versions = self._outer._seen, self._outer._versions
            self._scope.table = self._outer.table
        self._scope.__enter__()

    def _end(self, error: BaseException | None) -> bool:
        self._scope.__exit__()
        if error is not None:
            return False
        if self._outer is not None:
            self._outer.absorb(self._scope)
        return self._outer is None and bool(self._scope.ops)


def in_loop() -> bool:
    """True inside a running event loop."""
    return asyncio._get_running_loop() is not None


def as_worker(more: int) -> None:
    """+1 when a worker starts in this process, -1 when it ends: with one, a thread without a scope may not write."""
    global _worker
    _worker += more


def find_scope(of: object = None) -> tuple[Scope, int] | None:
    """The scope and the owner that a write belongs to; None in a plain script. Raises NoScope, WriteError."""
    current = scope.get()
    if of is None:
        if current is not None:
            return current, owner.get()
        if _worker or _live:
            raise NoScope("a thread started by hand does not know which record it works for. Say of=record (or "
                          "of=records), or start it with asyncio.to_thread")
        if in_loop():
            raise NoScope("nothing around this write would commit it. Put it inside: async with transaction():")
        return None
    for one in [current] if current else list(_live):
        position = one.inputs.position(of) if one.inputs is not None else None
        if position is not None:
            return one, position
    raise WriteError(f"of={type(of).__name__} is none of the records that this handler was called with. "
                     "Pass one of them as it came, or all of them")


async def commit(db: Database, ops: Sequence[Op]) -> list[Output]:
    """Makes the writes in a transaction of their own."""
    async with db.tx() as conn:
        return await apply(conn, ops)


