"""Query: lazy reads, and the recorded update or delete of what they would read.

    orders.select(status="new")                       equality; None means null
    orders.select("total > {x}", x=9)                 SQL with bound values, never pasted
          .order_by("-total", "id").limit(10)
    list(query)  for row in query  query.count()      in def
    await query  async for row in query  acount()     in async def
    query.update(status="paid")  query.delete()       recorded: they commit with what surrounds them

Reads see what is committed, not the writes recorded so far.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from copy import copy
from enum import Enum
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

import asyncpg
from pydantic import BaseModel, ValidationError

from anton.columns import Shape
from anton.db import Database, current_database, literal, quote
from anton.errors import InvalidRecord, QueryError, SyncInLoop, did_you_mean, one_of
from anton.op import Form
from anton.record import Document, Record, Row
from anton.relation import Relation, columns_sql, describe, writable
from anton.sink import encode, reasons
from anton.vector import vector_text
from anton.write import OnConflict, Scope, Step, commit, find_scope, in_loop, scope

T = TypeVar("T")
_PLACEHOLDER = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
_NO_TEXT = re.compile(r"invalid input for query argument \$(\d+):.*expected str, got (?:list|tuple)", re.DOTALL)
_FIRST_WORD = re.compile(r"(?:\s|\(|--[^\n\r]*[\n\r]|/\*(?:(?!/\*).)*?\*/)*+(\w+)", re.DOTALL)
_READS = ("select", "with", "values", "table", "show", "explain")


class Source(Protocol[T]):
    """What a Query reads from; Table is one."""

    name: str
    shape: Shape[Any] | None
    make: Callable[[Any], T] | None

    def check(self, name: str, value: Any) -> Any:
        """A column's value for asyncpg. Raises pydantic's ValidationError, ValueError."""

    def writable(self) -> None:
        """Raises WriteError for a table that something else writes."""


def bind(text: str, args: Mapping[str, Any], values: list[Any]) -> str:
    """The text with $n for each {name}, its value appended to values. {{name}} stands for {name} itself.

    Raises QueryError for a {name} without a value.
    """
    numbers: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        if found[1]:
            return f"{{{found[1]}}}"
        name = found[2]
        if name not in args:
            raise QueryError(f'no value for {{{name}}}.{did_you_mean(name, args)} Give it: {name}=…, or write '
                             f"{{{{{name}}}}} for the braces themselves. It was: {text}", sql=text)
        if name not in numbers:
            values.append(args[name])
            numbers[name] = len(values)
        return f"${numbers[name]}"

    return _PLACEHOLDER.sub(number, text)


def placeholders(text: str) -> set[str]:
    """The names in braces."""
    return {found[2] for found in _PLACEHOLDER.finditer(text) if found[2]}


def wait(db: Database, make: Callable[[], Coroutine[Any, Any, T]], name: str, twin: str) -> T:
    """Runs an async read for sync code: all sync twins are made here. Raises SyncInLoop where it would block a loop."""
    if in_loop():
        raise SyncInLoop(name, twin)
    return db.run(make())


class Sql:
    """sql("select … where id = {id}", id=7): a query in SQL. Its rows are Records.

    Iterate it in def; await it, or async for, in async def. In update(n=sql("n + 1")) it is an expression that the
    database evaluates when the write is made. It reads only: what changes rows is recorded with append, update, delete.
    """

    def __init__(self, text: str, /, **args: Any) -> None:
        unused = sorted(args.keys() - placeholders(text))
        if unused:
            raise QueryError(f'"{unused[0]}" is not in the SQL.{did_you_mean(unused[0], placeholders(text))} '
                             f"Placeholders are written {{{unused[0]}}}. It was: {text}", sql=text)
        self.text = text
        self.args = args

    def __iter__(self) -> Iterator[Record]:
        return iter(wait(_database(), self._fetch, "iterating sql(…)", "await sql(…), or async for row in sql(…)"))

    def __await__(self) -> Generator[Any, None, list[Record]]:
        return self._fetch().__await__()

    async def __aiter__(self) -> AsyncIterator[Record]:
        for row in await self._fetch():
            yield row

    def __bool__(self) -> NoReturn:
        raise TypeError("a query has no truth value: use list(…) or await it")

    def __repr__(self) -> str:
        return f"sql({self.text!r}{''.join(f', {name}=…' for name in self.args)})"

    async def _fetch(self) -> list[Record]:
        values: list[Any] = []
        text = bind(self.text, self.args, values)
        first = _FIRST_WORD.match(text)
        word = first[1].lower() if first else ""
        if word not in _READS:                                         # DEALLOCATE ALL, say, would break the connection
            raise QueryError(f"sql() reads, by {one_of(_READS)}; it was: {self.text}.{did_you_mean(word, _READS)} "
                             "Record writes with append, update and delete; schema changes go into migrations/",
                             sql=text)
        async with _database().conn() as conn:
            reading = conn.transaction(readonly=True)                  # also a view, or an operator, may write
            await reading.start()
            try:
                return await _fetch(conn, text, values, Row)
            finally:                                                   # also of what it has set: a role, a search path
                if not conn.is_closed():
                    await reading.rollback()


sql = Sql


class Query(Generic[T]):
    """Rows of a Table, read when it is iterated, awaited or counted, each time anew."""

    def __init__(self, source: Source[T], where: str | None = None, args: Mapping[str, Any] | None = None,
                 key: tuple[Any, ...] | None = None) -> None:
        named = placeholders(where) if where is not None else set()
        self._source = source
        self._where = where
        self._args = {name: value for name, value in (args or {}).items() if name in named}
        self._equal = {name: value for name, value in (args or {}).items() if name not in named}
        self._key = key
        self._order: tuple[str, ...] = ()
        self._limit: int | None = None

    def order_by(self, *columns: str) -> Self:
        """Sorted by these columns; "-total" is descending."""
        other = copy(self)
        other._order = columns
        return other

    def limit(self, count: int) -> Self:
        """At most so many rows."""
        if type(count) is not int or count < 0:
            wrong = f"limit({count!r}) is not possible. Allowed: 0 or more."
            raise QueryError(wrong, told=wrong)
        other = copy(self)
        other._limit = count
        return other

    def count(self) -> int:
        """How many rows. In async def: acount()."""
        return wait(_database(), self.acount, f"{self}.count()", "await ….acount()")

    async def acount(self) -> int:
        """How many rows."""
        db = _database()
        values: list[Any] = []
        relation = await describe(db, self._source.name)
        inner = f"from {relation.sql} where {self._condition(relation, values)[0]}"
        text = f"select count(*) {inner}"
        if self._limit is not None:
            text = f"select count(*) from (select {inner} limit {self._limit}) _some"
        async with db.conn() as conn:
            count: int = (await _fetch(conn, text, values, Row))[0]["count"]
        return count

    def now(self, name: str, twin: str) -> list[T]:
        """The rows, for sync code; name and twin are for its error inside a loop."""
        return self._load(*wait(_database(), self._fetch, name, twin))

    def __iter__(self) -> Iterator[T]:
        return iter(self.now(f"iterating {self}", "await the query, or async for row in it"))

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self._all().__await__()

    async def __aiter__(self) -> AsyncIterator[T]:
        for row in await self._all():
            yield row

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{self} has no truth value: use count(), get() or list()")

    def update(self, *, on_conflict: OnConflict | None = None, **values: Any) -> None:
        """Records: set these columns in all rows that match when it commits. A value may be sql("n + 1").

        on_conflict: what happens when a row that was read here changed in between. "rerun" (the default): its record
        runs again; "overwrite": written regardless.
        """
        self._record("update", on_conflict, values)

    def delete(self, *, on_conflict: OnConflict | None = None) -> None:
        """Records: delete all rows that match when it commits. on_conflict: as for update."""
        self._record("delete", on_conflict, {})

    def __repr__(self) -> str:
        parts = [repr(self._where)] if self._where is not None else []
        parts += [f"{name}=…" for name in (*self._args, *self._equal)]
        return f"{self._source.name}.select({', '.join(parts)})"

    async def _all(self) -> list[T]:
        return self._load(*await self._fetch())

    async def _fetch(self) -> tuple[Relation, list[Any]]:
        db = _database()
        values: list[Any] = []
        relation = await describe(db, self._source.name)
        shape, version = self._source.shape, "xmin as _xmin, " if relation.versioned else ""
        wanted = "*" if shape is None else columns_sql([*shape.names, *(set(relation.key) - set(shape.names))])
        text = f"select {version}{wanted} from {relation.sql} where {self._condition(relation, values)[0]}"
        if self._order:
            text += " order by " + ", ".join(_order(relation, name) for name in self._order)
        if self._limit is not None:
            text += f" limit {self._limit}"
        async with db.conn() as conn:
            return relation, await _fetch(conn, text, values, Document if relation.document and shape is None else Row)

    def _load(self, relation: Relation, rows: list[Any]) -> list[T]:
        """Rows as records, in the reader's own context: its scope notes their versions."""
        current = scope.get()
        if current is not None:
            current.saw(relation, rows)
        make = self._source.make
        if make is None:
            return rows
        try:
            return [make(row) for row in rows]
        except ValidationError as error:
            raise InvalidRecord(self._source.name, error.errors()[0]["input"], reasons(error)) from error

    def _condition(self, relation: Relation, values: list[Any]) -> tuple[str, Any]:
        """The condition, and the key when it means one row by its key alone."""
        parts = []
        equal = self._equal
        if self._key is not None:
            if len(self._key) != len(relation.key):
                raise QueryError(f'"{relation.name}" has the key ({", ".join(relation.key)}); get() was given '
                                 f"{len(self._key)} value(s)")
            equal = dict(zip(relation.key, self._key, strict=True))
        elif equal.keys() == set(relation.key):
            equal = {name: equal[name] for name in relation.key}
        if self._where is not None:
            parts.append(f"({bind(self._where, self._args, values)})")
        parts += [_equals(relation, name, value, values) for name, value in equal.items()]
        key = None
        if self._where is None and relation.key and equal.keys() == set(relation.key) and None not in equal.values():
            key = tuple(equal[name] for name in relation.key)
            key = key[0] if len(key) == 1 else key
        return " and ".join(parts) or "true", key

    def _record(self, kind: Any, on_conflict: OnConflict | None, sets: Mapping[str, Any]) -> None:
        self._source.writable()
        if self._limit is not None or self._order:
            raise QueryError(f"{self}.{kind}() takes no order_by and no limit: it writes all rows that match")
        if kind == "update" and not sets:
            raise QueryError(f"{self}.update() needs a value: update(status=\"paid\")")
        found = find_scope()
        db = found[0].db if found else current_database()
        relation = writable(db, self._source.name)
        values: list[Any] = []
        head = f"delete from {relation.sql}"
        if kind == "update":
            head = f"update {relation.sql} set {self._sets(relation, sets, values)}"
        where, key = self._condition(relation, values)
        step = Step(kind, relation, head, where, tuple(values), found[1] if found else -1, key)
        if key is not None and not any(isinstance(value, Sql) for value in sets.values()):
            step.form = self._form(relation, tuple(sets))
        if found is None:
            wait(db, lambda: commit(db, [step]), f"{self}.{kind}()", "async with transaction(): …")
            return
        _versioned(step, found[0], on_conflict)
        found[0].add(step)

    def _form(self, relation: Relation, names: tuple[str, ...]) -> Form | None:
        """How many such steps are made at once; None where a type does not allow it."""
        form: Form | None = relation.texts.get(("form", names))
        if form is None:
            written = ("data",) if relation.document and self._source.shape is None and names else names
            columns = [relation.columns[name] for name in (*written, *relation.key)]
            if any(column.type.endswith("[]") for column in columns):  # unnest() would take them apart
                return None
            if not all(relation.columns[name].plain for name in relation.key):
                return None
            sets = tuple(f"{quote(name)} = {{}}" + ("" if column.plain else f"::{column.type}")
                         for name, column in zip(written, columns, strict=False))
            if written != names:
                sets = ("data = data || {}",)
            form = Form(sets, tuple(column.type if column.plain else "text" for column in columns), written)
            relation.texts["form", names] = form
        return form

    def _sets(self, relation: Relation, sets: Mapping[str, Any], values: list[Any]) -> str:
        if relation.document and self._source.shape is None:
            constant = {name: value for name, value in sets.items() if not isinstance(value, Sql)}
            parts = ["data"]
            if constant:
                values.append(encode(relation.name, constant))
                parts.append(f"${len(values)}::jsonb")
            parts += [f"jsonb_build_object({literal(name)}, to_jsonb({bind(value.text, value.args, values)}))"
                      for name, value in sets.items() if isinstance(value, Sql)]
            return f"data = {' || '.join(parts)}"
        wrong, parts = [], []
        for name, value in sets.items():
            column = relation.columns.get(name)
            if column is None:
                wrong.append(f'no column "{name}".{did_you_mean(name, relation.columns)} '
                             f"It has: {', '.join(relation.columns)}")
            elif isinstance(value, Sql):
                parts.append(f"{quote(name)} = ({bind(value.text, value.args, values)})")
            else:
                try:
                    values.append(plain(self._source.check(name, value), column.type))
                except ValidationError as error:
                    wrong += [f"{name}: {reason}" for reason in reasons(error)]
                except (TypeError, ValueError) as error:
                    wrong.append(f"{name}: {error}")
                parts.append(f"{quote(name)} = {_parameter(column, values)}")
        if wrong:
            raise InvalidRecord(relation.name, dict(sets), wrong)
        return ", ".join(parts)


def _versioned(step: Step, current: Scope, on_conflict: OnConflict | None) -> None:
    """Gives the step the versions of the rows that were read, unless it overwrites."""
    if (on_conflict or current.on_conflict) == "overwrite" or not step.relation.key:
        return
    known = current.versions(step.relation)
    if step.key is not None:
        step.version = known.get(step.key)
    elif known:
        step.versions = dict(known)


def _equals(relation: Relation, name: str, value: Any, values: list[Any]) -> str:
    column = relation.columns.get(name)
    if column is None and not relation.document:
        raise QueryError(f'"{relation.name}" has no column "{name}".{did_you_mean(name, relation.columns)} '
                         f"It has: {', '.join(relation.columns)}")
    if column is None and value is None:
        return f"coalesce(data -> {literal(name)}, 'null'::jsonb) = 'null'::jsonb"
    if column is None:
        values.append(value)
        return f"data -> {literal(name)} = ${len(values)}::jsonb"
    if value is None:
        return f"{quote(name)} is null"
    values.append(plain(value, column.type))
    return f"{quote(name)} = {_parameter(column, values)}"


def _parameter(column: Any, values: list[Any]) -> str:
    if column.plain:
        return f"${len(values)}"
    if values[-1] is not None and not isinstance(values[-1], str):
        values[-1] = str(values[-1])
    return f"${len(values)}::text::{column.type}"


def plain(value: Any, type: str) -> Any:
    """A value as asyncpg takes it for a column of this type."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset, tuple)) and type.endswith("[]"):
        return list(value)
    if type == "text" and value is not None and not isinstance(value, (str, int, float, bytes, BaseModel)):
        return str(value)  # a path, a URL
    return value


def _order(relation: Relation, name: str) -> str:
    column, direction = (name[1:], " desc") if name.startswith("-") else (name, "")
    if column in relation.columns:
        return quote(column) + direction
    if relation.document:
        return f"data -> {literal(column)}{direction}"
    raise QueryError(f'"{relation.name}" has no column "{column}" to order by.'
                     f"{did_you_mean(column, relation.columns)} It has: {', '.join(relation.columns)}")


async def _fetch(conn: Any, text: str, values: Sequence[Any], kind: type[Row]) -> list[Any]:
    try:
        rows: list[Any] = await fetch_bound(conn, text, values, record_class=kind)
        return rows
    except (asyncpg.SyntaxOrAccessError, asyncpg.DataError, asyncpg.ReadOnlySQLTransactionError) as error:
        raise QueryError(f"{error}. It was: {text}", sql=text) from error


async def fetch_bound(conn: Any, text: str, values: Sequence[Any], **how: Any) -> list[Any]:
    """Rows of a query; a list that is bound where a vector belongs goes as the text that pgvector reads."""
    given = list(values)
    while True:
        try:
            rows: list[Any] = await conn.fetch(text, *given, **how)
            return rows
        except asyncpg.DataError as error:                             # asyncpg's own, nothing was sent
            found = _NO_TEXT.search(str(error))
            at = int(found[1]) - 1 if found else -1
            if not (found and isinstance(given[at], (list, tuple))):
                raise
            given[at] = vector_text(given[at])


def _database() -> Database:
    """The current scope's database, else the process's."""
    current = scope.get()
    return current.db if current is not None else current_database()
