"""Write: recorded, never awaited; made together with what surrounds them.

    append, update, delete --recorded in--> Scope: handler | route | schedule | transaction
    scope.ops --apply(conn, ops)--> the database, in one go, inside the caller's transaction

Each write belongs to an owner: the position of the input record that caused it, or WHOLE, the batch.
So one record can be settled, refused or run again without its neighbours' writes.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import asyncpg

from anton.db import Conn, Database, current_database, quote
from anton.errors import NoScope, Outcome, RowChanged, ScopeClosed, SyncInLoop, WriteError, WriteRefused
from anton.relation import Relation, columns_sql, value

WHOLE = -1  # owner of what belongs to the batch as a whole
COPY_FROM = 17  # rows from which COPY is quicker than INSERT
VALUES = 1000  # rows of one INSERT where COPY is refused

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


class Rows:
    """Rows to insert or upsert. flat: owner, row, owner, row, … (one list, so that threads may add to it)."""

    __slots__ = ("columns", "flat", "kind", "relation")

    def __init__(self, kind: Literal["insert", "upsert"], relation: Relation, columns: tuple[str, ...],
                 flat: list[Any] | None = None) -> None:
        self.kind = kind
        self.relation = relation
        self.columns = columns
        self.flat: list[Any] = [] if flat is None else flat

    @property
    def owners(self) -> list[int]:
        """One for each row."""
        return self.flat[0::2]

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """Values in the order of columns."""
        return self.flat[1::2]

    def __repr__(self) -> str:
        return f"Rows({self.kind} {len(self.flat) // 2} into {self.relation.name})"


@dataclass(slots=True, eq=False)
class Step:
    """A recorded update or delete. args bind $1… of head and where.

    head: "update orders set …" or "delete from orders". where: a condition.
    key: of the one row it means, else None. version: the xmin that row had when it was read, None to write regardless.
    versions: of rows of this table read before, where the condition may mean several.
    """

    kind: Literal["update", "delete"]
    relation: Relation
    head: str
    where: str
    args: tuple[Any, ...]
    owner: int
    key: Any = None
    version: int | None = None
    versions: Mapping[Any, int] | None = None


Op = Rows | Step


@dataclass(slots=True, eq=False)
class Output:
    """What was written to one table: keys (ids, or lists of key columns), and the owner of each."""

    relation: Relation
    keys: list[Any] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


class Scope:
    """Collects the writes of one call of a handler, a route, a schedule or a transaction.

        with Scope("handler", inputs=records) as scope:     # current for all code inside, tasks and to_thread included
            fn(records)
        await apply(conn, scope.ops)

    inputs: for of=. on_conflict: what a recorded update of a row that changed since it was read does by default.
    Writes after the end raise ScopeClosed. base: the owner that writes outside any iteration get.
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
        self._drop_sinks()

    def add(self, op: Op) -> None:
        """A write that comes after all so far."""
        self.check()
        self._drop_sinks()
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
        self._drop_sinks()
        self.ops.extend(inner.ops)

    def _drop_sinks(self) -> None:
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.close()


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


def pick(ops: Iterable[Op], owners: Collection[int], keep: bool = True) -> list[Op]:
    """The writes of these owners; with keep=False those of all others."""
    picked: list[Op] = []
    for op in ops:
        if isinstance(op, Step):
            if (op.owner in owners) == keep:
                picked.append(op)
            continue
        all_of_it = op.flat[:]                                         # a thread may be adding to it
        flat = [part for who, row in zip(all_of_it[0::2], all_of_it[1::2], strict=True) if (who in owners) == keep
                for part in (who, row)]
        if flat:
            picked.append(Rows(op.kind, op.relation, op.columns, flat))
    return picked


def merge(parts: Iterable[tuple[int, Iterable[Op]]]) -> list[Op]:
    """Writes of several scopes as one list, each part under an owner of its own: (owner, scope.ops), …"""
    merged: list[Op] = []
    for who, ops in parts:
        for op in ops:
            if isinstance(op, Rows):
                flat = op.flat[:]
                flat[0::2] = [who] * (len(flat) // 2)
                merged.append(Rows(op.kind, op.relation, op.columns, flat))
            else:
                merged.append(Step(op.kind, op.relation, op.head, op.where, op.args, who, op.key, op.version,
                                   op.versions))
    return merged


async def apply(conn: Conn, ops: Iterable[Op]) -> list[Output]:
    """Makes the writes on conn, inside the caller's transaction. Returns the keys written, by table.

    Inserts are grouped by table up to the next update, delete or upsert; those run in their order.
    Raises WriteRefused for what the database refuses, with the owners when they are known, and RowChanged with
    all owners whose rows changed since they were read. Either way the transaction is to be rolled back.
    """
    return await _Apply(conn).run(ops)


class _Apply:
    def __init__(self, conn: Conn) -> None:
        self.conn = conn
        self.outputs: dict[int, Output] = {}
        self.touched: dict[tuple[int, Any], int] = {}  # rows changed here, by whom
        self.changed: set[int] = set()
        self.changed_table = ""

    async def run(self, ops: Iterable[Op]) -> list[Output]:
        waiting: dict[tuple[int, tuple[str, ...]], list[Rows]] = defaultdict(list)
        for op in ops:
            if isinstance(op, Rows) and op.kind == "insert":
                waiting[op.relation.oid, op.columns].append(op)
                continue
            await self.insert_all(waiting)
            if isinstance(op, Rows):
                await self.upsert(op)
            else:
                await self.step(op)
        await self.insert_all(waiting)
        if self.changed:
            raise RowChanged(self.changed, self.changed_table)
        return list(self.outputs.values())

    async def insert_all(self, waiting: dict[tuple[int, tuple[str, ...]], list[Rows]]) -> None:
        for group in waiting.values():
            flat = group[0].flat if len(group) == 1 else [part for op in group for part in op.flat]
            relation, columns, owners, rows = group[0].relation, group[0].columns, flat[0::2], flat[1::2]
            if relation.copy and len(rows) >= COPY_FROM:
                await self.copy(relation, columns, owners, rows)
            else:
                size = max(1, min(VALUES, 30_000 // max(1, len(columns))))
                for at in range(0, len(rows), size):
                    await self.values(relation, columns, owners[at:at + size], rows[at:at + size], "")
            if set(relation.key) <= set(columns):
                self.note(relation, _keys(relation, columns, rows), owners)
        waiting.clear()

    async def copy(self, relation: Relation, columns: tuple[str, ...], owners: list[int],
                   rows: list[tuple[Any, ...]]) -> None:
        feed: Any = iter(rows)
        try:
            await self.conn.copy_records_to_table(relation.table, schema_name=relation.schema, columns=columns,
                                                  records=feed)
        except asyncpg.PostgresError as error:
            if not _refused(error):
                raise
            line = re.search(r"\d+", (getattr(error, "context", None) or "").removeprefix(f"COPY {relation.table}, "))
            at = int(line[0]) - 1 if line and int(line[0]) <= len(rows) else None
            raise WriteRefused({owners[at]} if at is not None else _only(owners), error) from error
        except _UNFIT as error:  # a value its column's type does not take
            raise WriteRefused({owners[len(rows) - feed.__length_hint__() - 1]}, error) from error

    async def values(self, relation: Relation, columns: tuple[str, ...], owners: list[int],
                     rows: list[tuple[Any, ...]], conflict: str) -> None:
        texts = relation.texts
        sql = texts.get((columns, len(rows), conflict))
        if sql is None:
            sql = _insert(relation, columns, len(rows)) + conflict
            if len(rows) < COPY_FROM:
                texts[columns, len(rows), conflict] = sql
        args = [given for row in rows for given in row]
        if not relation.copy:
            plain = [relation.columns[name].plain for name in columns]
            args = [given if plain[n % len(plain)] or given is None or isinstance(given, str) else str(given)
                    for n, given in enumerate(args)]
        try:
            await self.conn.execute(sql, *args)
        except (asyncpg.PostgresError, *_UNFIT) as error:
            if not _refused(error):
                raise
            position = re.search(r"query argument \$(\d+)", str(error))
            at = (int(position[1]) - 1) // len(columns) if position else None
            raise WriteRefused({owners[at]} if at is not None else _only(owners), error) from error

    async def upsert(self, op: Rows) -> None:
        relation, columns, owners, rows = op.relation, op.columns, op.owners, op.rows
        rest = [quote(name) for name in columns if name not in relation.key]
        conflict = f" on conflict ({columns_sql(relation.key)}) do " + (
            "update set " + ", ".join(f"{name} = excluded.{name}" for name in rest) if rest else "nothing")
        keys = _keys(relation, columns, rows)
        size = max(1, min(VALUES, 30_000 // len(columns)))
        start, seen = 0, set[Any]()
        for at in range(len(rows) + 1):  # one statement may not meet a key twice
            hashable = _hashable(keys[at]) if at < len(rows) else None
            if at == len(rows) or at - start == size or hashable in seen:
                await self.values(relation, columns, owners[start:at], rows[start:at], conflict)
                start, seen = at, set()
            seen.add(hashable)
            if at < len(rows):
                self.touched[relation.oid, hashable] = owners[at]
        self.note(relation, keys, owners)

    async def step(self, op: Step) -> None:
        sql, args = op.head, list(op.args)
        relation = op.relation
        returning = f" returning {columns_sql(relation.key)}" if relation.key else " returning 1"
        mine = op.key is not None and self.touched.get((relation.oid, op.key)) == op.owner
        if op.version is not None and not mine:
            args.append(op.version)
            sql += f" where ({op.where}) and xmin = ${len(args)}{returning}"
        elif op.versions:
            sql = _checked(op)
        else:
            sql += f" where {op.where}{returning}"
        try:
            rows = await self.conn.fetch(sql, *args)
        except (asyncpg.PostgresError, *_UNFIT) as error:
            if not _refused(error):
                raise
            raise WriteRefused({op.owner}, error) from error
        if op.version is not None and not mine and not rows:
            self.conflict(op)
        if not relation.key:
            return
        keys = [relation.key_of(row) for row in rows]
        for key, row in zip(keys, rows, strict=True):
            if op.versions and key in op.versions and row["_xmin"] != op.versions[key] \
                    and self.touched.get((relation.oid, key)) != op.owner:
                self.conflict(op)
            self.touched[relation.oid, key] = op.owner
        if op.kind == "update":
            self.note(relation, [list(key) if isinstance(key, tuple) else key for key in keys], [op.owner] * len(keys))

    def conflict(self, op: Step) -> None:
        self.changed.add(op.owner)
        self.changed_table = op.relation.name

    def note(self, relation: Relation, keys: list[Any], owners: list[int]) -> None:
        if not relation.key:
            return
        output = self.outputs.setdefault(relation.oid, Output(relation))
        output.keys += keys
        output.owners += owners


_UNFIT = (TypeError, ValueError, ArithmeticError, AttributeError)  # asyncpg's codecs raise these


def _refused(error: BaseException) -> bool:
    """True when it is the written values that Postgres does not take: data, constraint, policy, or a raise."""
    if not isinstance(error, asyncpg.PostgresError) or (error.sqlstate or "22")[:2] in ("22", "23", "44", "P0"):
        return True
    return getattr(error, "server_source_function", "") == "ExecWithCheckOptions"  # row security; it shares 42501


def _only(owners: list[int]) -> set[int] | None:
    alone = set(owners)
    return alone if len(alone) == 1 else None


def _keys(relation: Relation, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[Any]:
    """The key of each row: an id, or a list of key columns."""
    at = [columns.index(name) for name in relation.key]
    if len(at) == 1:
        return [row[at[0]] for row in rows]
    return [[row[n] for n in at] for row in rows]


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _insert(relation: Relation, columns: tuple[str, ...], count: int) -> str:
    if not columns:
        return f"insert into {relation.sql} default values"
    types = [relation.columns[name] for name in columns]
    own = "overriding system value " if any(column.always for column in types) else ""
    rows = (", ".join(f"${n * len(types) + m}" + ("" if column.plain else f"::text::{column.type}")
                      for m, column in enumerate(types, 1)) for n in range(count))
    return f"insert into {relation.sql} ({columns_sql(columns)}) {own}values ({'), ('.join(rows)})"


def _checked(op: Step) -> str:
    """The statement that also tells the version each row had, locked as it is now."""
    relation = op.relation
    names = [quote(name) for name in relation.key]
    hit = ", ".join(f"{name} as _k{n}" for n, name in enumerate(names))
    same = " and ".join(f"{relation.sql}.{name} = _hit._k{n}" for n, name in enumerate(names))
    out = ", ".join(f"_hit._k{n} as {name}" for n, name in enumerate(names))
    link = "from" if op.kind == "update" else "using"
    return (f"with _hit as materialized (select {hit}, xmin as _v from {relation.sql} where {op.where} for update) "
            f"{op.head} {link} _hit where {same} returning {out}, _hit._v as _xmin")
