"""Apply: makes recorded writes, inside the caller's transaction.

    inserts   grouped by table, by COPY from 17 rows on
    upserts   one statement for each run of different keys
    steps     one statement for each kind of update or delete by key, else one each
    calls     of the runtime's functions, in their turn

What is grouped comes out as if each write had been made in its turn.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Iterable
from typing import Any

import asyncpg

from anton.db import Conn, quote
from anton.errors import RowChanged, WriteRefused
from anton.later import Due
from anton.op import Call, Form, Op, Output, Rows, Step
from anton.relation import Relation, columns_sql, forget_spare

COPY_FROM = 17  # rows from which COPY is quicker than INSERT
MOST = 10_000  # rows, or steps, of one statement


async def apply(conn: Conn, ops: Iterable[Op]) -> list[Output]:
    """Makes the writes on conn, inside the caller's transaction. Returns the keys written, by table.

    Writes are grouped where that makes no difference; else they are made in their order.
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
        waiting = _Waiting()
        for op in ops:
            if not waiting.takes(op):
                await self.flush(waiting)
                waiting = _Waiting()
                if not waiting.takes(op):
                    await self.one(op)
        await self.flush(waiting)
        if self.changed:
            raise RowChanged(self.changed, self.changed_table)
        return list(self.outputs.values())

    async def one(self, op: Op) -> None:
        """A write that waits for no others."""
        if isinstance(op, Step):
            await self.step(op)
        elif isinstance(op, Rows):
            await self.in_time(op.due, self.upsert(op) if op.kind == "upsert" else self.missing(op))
        elif not await op.work(self.conn):
            self.changed.add(op.owner)
            self.changed_table = op.name

    async def in_time(self, due: Due | None, work: Awaitable[None]) -> None:
        """Awaits the work; the events of what it writes are due then."""
        if due is not None:
            await due.begin(self.conn)
        await work
        if due is not None:
            await due.end(self.conn)

    async def flush(self, waiting: _Waiting) -> None:
        await self.insert_all(waiting.inserts)
        for steps in waiting.steps.values():
            for at in range(0, len(steps), MOST):
                some = steps[at:at + MOST]
                await (self.steps(some) if len(some) > 1 else self.step(some[0]))

    async def insert_all(self, inserts: dict[tuple[int, tuple[str, ...], Due | None], list[Rows]]) -> None:
        for group in inserts.values():
            await self.in_time(group[0].due, self.insert(group))

    async def insert(self, group: list[Rows]) -> None:
        flat = group[0].flat if len(group) == 1 else [part for op in group for part in op.flat]
        relation, columns, owners, rows = group[0].relation, group[0].columns, flat[0::2], flat[1::2]
        if relation.copy and len(rows) >= COPY_FROM:
            await self.copy(relation, columns, owners, rows)
        else:
            size = _size(relation, columns)
            for at in range(0, len(rows), size):
                await self.values(relation, columns, owners[at:at + size], rows[at:at + size], "")
        if set(relation.key) <= set(columns):
            self.note(relation, _keys(relation, columns, rows), owners)

    async def copy(self, relation: Relation, columns: tuple[str, ...], owners: list[int],
                   rows: list[tuple[Any, ...]]) -> None:
        feed: Any = iter(rows)
        try:
            await self.conn.copy_records_to_table(relation.table, schema_name=relation.schema, columns=columns,
                                                  records=feed)
        except asyncpg.PostgresError as error:
            if not refused(error):
                error.query = f"copy {relation.sql}"  # type: ignore[attr-defined]  # asyncpg names no COPY
                raise
            if isinstance(error, asyncpg.UniqueViolationError):
                forget_spare(relation, error)
            line = re.search(r"\d+", (getattr(error, "context", None) or "").removeprefix(f"COPY {relation.table}, "))
            at = int(line[0]) - 1 if line and int(line[0]) <= len(rows) else None
            raise WriteRefused({owners[at]} if at is not None else _only(owners), error) from error
        except _UNFIT as error:  # a value its column's type does not take
            raise WriteRefused({owners[len(rows) - feed.__length_hint__() - 1]}, error) from error

    async def values(self, relation: Relation, columns: tuple[str, ...], owners: list[int],
                     rows: list[tuple[Any, ...]], conflict: str) -> list[asyncpg.Record]:
        """INSERT … VALUES for a few rows, from arrays for many. What it returns, if conflict says so."""
        types = [relation.columns[name] for name in columns]
        if not all(column.plain for column in types):
            rows = [tuple(value if column.plain or value is None or isinstance(value, str) else str(value)
                          for column, value in zip(types, row, strict=True)) for row in rows]
        many = len(rows) >= COPY_FROM and bool(columns)
        sql = relation.texts.get((columns, "many" if many else len(rows), conflict))
        if sql is None:
            sql = (_insert_many if many else _insert)(relation, columns, len(rows)) + conflict
            relation.texts[columns, "many" if many else len(rows), conflict] = sql
        args: list[Any] = [list(column) for column in zip(*rows, strict=True)] if many else [
            value for row in rows for value in row]
        try:
            return await self.conn.fetch(sql, *args)
        except (asyncpg.PostgresError, *_UNFIT) as error:
            if not refused(error):
                raise
            if isinstance(error, asyncpg.UniqueViolationError):
                forget_spare(relation, error)
            position = re.search(r"query argument \$(\d+)", str(error)) if not many else None
            at = (int(position[1]) - 1) // len(columns) if position else None
            raise WriteRefused({owners[at]} if at is not None else _only(owners), error) from error

    async def missing(self, op: Rows) -> None:
        """Inserts those rows whose values of op.unless are not there yet; the first of several that are alike."""
        relation, owners, rows = op.relation, op.owners, op.rows
        conflict = f" on conflict ({columns_sql(op.unless)}) do nothing"
        if relation.key:
            conflict += f" returning {columns_sql(relation.key)}"
        size = _size(relation, op.columns)
        for at in range(0, len(rows), size):
            some, whose = rows[at:at + size], owners[at:at + size]
            made = {relation.key_of(row) for row in await self.values(relation, op.columns, whose, some, conflict)}
            if relation.key and set(relation.key) <= set(op.columns):
                kept = [(key, who) for key, who in zip(_keys(relation, op.columns, some), whose, strict=True)
                        if _hashable(key) in made]
                self.note(relation, [key for key, _ in kept], [who for _, who in kept])

    async def upsert(self, op: Rows) -> None:
        relation, columns, owners, rows = op.relation, op.columns, op.owners, op.rows
        rest = [quote(name) for name in columns if name not in relation.key]
        conflict = f" on conflict ({columns_sql(relation.key)}) do " + (
            "update set " + ", ".join(f"{name} = excluded.{name}" for name in rest) if rest else "nothing")
        keys = _keys(relation, columns, rows)
        size = _size(relation, columns)
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

    async def steps(self, steps: list[Step]) -> None:
        """Many of one form, each on a row of its own."""
        form, relation = steps[0].form, steps[0].relation
        assert form is not None
        args: list[list[Any]] = [list(column) for column in zip(*(op.args for op in steps), strict=True)]
        args.append([op.version if self.touched.get((relation.oid, op.key)) != op.owner else None for op in steps])
        text = relation.texts.get(form)
        if text is None:
            text = relation.texts[form] = _many(relation, form)
        try:
            rows = await self.conn.fetch(text, *args)
        except (asyncpg.PostgresError, *_UNFIT) as error:
            if not refused(error):
                raise
            raise WriteRefused(_only([op.owner for op in steps]), error) from error
        made = {row["_at"] - 1 for row in rows}
        for at, op in enumerate(steps):
            if at in made:
                self.touched[relation.oid, op.key] = op.owner
            elif op.version is not None:
                self.conflict(op)
        if form.sets:
            done = [steps[at] for at in sorted(made)]
            self.note(relation, [_listed(op.key) for op in done], [op.owner for op in done])

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
            if not refused(error):
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
            self.note(relation, [_listed(key) for key in keys], [op.owner] * len(keys))

    def conflict(self, op: Step) -> None:
        self.changed.add(op.owner)
        self.changed_table = op.relation.name

    def note(self, relation: Relation, keys: list[Any], owners: list[int]) -> None:
        if not relation.key:
            return
        output = self.outputs.setdefault(relation.oid, Output(relation))
        output.keys += keys
        output.owners += owners


class _Waiting:
    """Writes that may be made together: the inserts, then the steps.

    A step by key waits with others of its form, as long as inserts and steps that come later mind nothing of it:
    other tables, no foreign key on what it sets, no triggers of the user's. Then only one order is as good as another.
    """

    def __init__(self) -> None:
        self.inserts: dict[tuple[int, tuple[str, ...], Due | None], list[Rows]] = {}
        self.steps: dict[tuple[int, Form], list[Step]] = {}
        self._stepped: dict[int, Form] = {}  # by table
        self._keys: set[tuple[int, Any]] = set()
        self._minds = False

    def takes(self, op: Op) -> bool:
        """Adds it if that does not change what comes out."""
        if isinstance(op, Call):
            return False
        table = op.relation.oid
        if isinstance(op, Rows):
            late = bool(self.steps) and (self._minds or table in self._stepped or op.relation.triggers)
            if op.kind == "upsert" or op.unless or late:
                return False
            self.inserts.setdefault((table, op.columns, op.due), []).append(op)
            return True
        form = op.form
        if form is None or (table, op.key) in self._keys or self._stepped.get(table, form) != form:
            return False
        minds = op.relation.triggers or _referenced(op.relation, form)
        if self.steps and table not in self._stepped and (minds or self._minds):
            return False
        self._minds |= minds
        self._stepped[table] = form
        self._keys.add((table, op.key))
        self.steps.setdefault((table, form), []).append(op)
        return True


def _referenced(relation: Relation, form: Form) -> bool:
    """True when a foreign key of some table may look at what the step changes."""
    names = form.columns or relation.columns
    return any(relation.columns[name].referenced for name in names)


def _many(relation: Relation, form: Form) -> str:
    """One statement for many steps: an array for each value, one for the versions."""
    names = [f"_v{n}" for n in range(len(form.types))]
    arrays = ", ".join(f"${n}::{type}[]" for n, type in enumerate(form.types, 1))
    same = [f"{relation.sql}.{quote(column)} = {name}"
            for column, name in zip(relation.key, names[len(form.sets):], strict=True)]
    if relation.versioned:
        same.append(f"(_version is null or {relation.sql}.xmin = _version)")
    given = (f"unnest({arrays}, ${len(names) + 1}::xid[]) with ordinality _given ({', '.join(names)}, _version, _at) "
             f"where {' and '.join(same)} returning _at")
    if not form.sets:
        return f"delete from {relation.sql} using {given}"
    sets = ", ".join(text.format(name) for text, name in zip(form.sets, names, strict=False))
    return f"update {relation.sql} set {sets} from {given}"


_UNFIT = (TypeError, ValueError, ArithmeticError, AttributeError)  # asyncpg's codecs raise these


def refused(error: BaseException) -> bool:
    """True when it is the written values that Postgres does not take: data, size, constraint, policy, or a raise."""
    if not isinstance(error, asyncpg.PostgresError) or (error.sqlstate or "22")[:2] in ("22", "23", "44", "54", "P0"):
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


def _listed(key: Any) -> Any:
    return list(key) if isinstance(key, tuple) else key


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


def _insert_many(relation: Relation, columns: tuple[str, ...], count: int) -> str:
    types = [relation.columns[name] for name in columns]
    own = "overriding system value " if any(column.always for column in types) else ""
    arrays = ", ".join(f"${n}::{column.type if column.plain else 'text'}[]" for n, column in enumerate(types, 1))
    names = ", ".join(f"_v{n}" + ("" if column.plain else f"::{column.type}") for n, column in enumerate(types))
    return (f"insert into {relation.sql} ({columns_sql(columns)}) {own}select {names} from unnest({arrays}) "
            f"_given ({', '.join(f'_v{n}' for n in range(len(types)))})")


def _size(relation: Relation, columns: tuple[str, ...]) -> int:
    """Rows of one INSERT: few where unnest() would take a column's own arrays apart."""
    return COPY_FROM - 1 if not columns or any(relation.columns[name].type.endswith("[]") for name in columns) else MOST


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
