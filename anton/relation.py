"""Relation: a table as the database has it, and the keys its next rows will get.

    describe(db, "shop.orders")  -> Relation: columns, types, key, defaults    (once per database and process)
    keys(db, relation, "id")     -> Keys: taken from the column's default in growing blocks

So an append can say the final key of its row before anything is written.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any, TypeVar

import asyncpg

from anton.db import Database, identifier, literal, portal, quote
from anton.errors import MissingPrivilege, ReadOnly, UnknownTable

T = TypeVar("T")

BLOCK, MOST = 8, 10_000  # growth of a block of keys, and its limit


@dataclass(frozen=True, slots=True)
class Attribute:
    """A column. type: as format_type() says it. default: SQL or None. plain: binary COPY can carry it.

    always: an identity that takes no other value by itself. generated: computed, never written.
    referenced: a foreign key points at it.
    """

    name: str
    type: str
    notnull: bool
    default: str | None
    always: bool
    plain: bool
    generated: bool
    referenced: bool


@dataclass(frozen=True, eq=False)
class Relation:
    """A table of the database. name: as the user wrote it; sql: quoted; key: () when it has none.

    copy: COPY may fill it. versioned: its rows have an xmin. document: as Anton makes it where there is no model.
    table_id: its number in `watched`, None when Anton does not watch it. triggers: it has some of the user's.
    keeper: what keeps its rows, so that nobody else may write them, "the model daily"; "" for most.
    """

    name: str
    schema: str
    table: str
    sql: str
    oid: int
    table_id: int | None
    columns: Mapping[str, Attribute]
    key: tuple[str, ...]
    copy: bool
    versioned: bool
    document: bool
    triggers: bool
    keeper: str = ""
    texts: dict[Any, Any] = field(default_factory=dict, repr=False)  # SQL written for it, by what it does

    def key_of(self, row: Any) -> Any:
        """The key of a row of asyncpg's: a value, or a tuple where several columns make it."""
        return value(row, self.key[0]) if len(self.key) == 1 else tuple(value(row, name) for name in self.key)


value = asyncpg.Record.__getitem__  # a column of a row, whatever names its class shows


_RELATIONS = """
select q.name as asked, c.oid::bigint as oid, n.nspname as schema, c.relname as name, c.relkind::text as kind,
       row_security_active(c.oid) as guarded, w.id as table_id,
       coalesce((select 'the model ' || m.name from {schema}.model m where m.table_id = w.id
                    and m.missing_at is null), '') as keeper,
       exists (select from pg_catalog.pg_trigger g where g.tgrelid = c.oid and not g.tgisinternal
                  and g.tgfoid not in (select p.oid from pg_catalog.pg_proc p join pg_catalog.pg_namespace s
                                         on s.oid = p.pronamespace where s.nspname = $2)) as triggers,
       coalesce(nullif(w.key_columns, '{{}}'), (
         select array_agg(a.attname::text order by k.at)
           from (select i.indkey, i.indnkeyatts from pg_catalog.pg_index i
                  where i.indrelid = c.oid and i.indisunique and i.indimmediate and i.indpred is null
                    and not exists (
                      select from unnest(i.indkey) with ordinality u (num, at)
                        left join pg_catalog.pg_attribute b on b.attrelid = i.indrelid and b.attnum = u.num
                       where u.at <= i.indnkeyatts and b.attnotnull is distinct from true)
                  order by i.indisprimary desc, i.indnkeyatts, i.indexrelid limit 1) i,
                unnest(i.indkey) with ordinality k (num, at)
           join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = k.num
          where k.at <= i.indnkeyatts), '{{}}') as key
  from unnest($1::text[], $3::text[]) q (name, path)
  join pg_catalog.pg_class c on c.oid = pg_catalog.to_regclass(q.path)
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  left join {schema}.watched w on w.relid = c.oid
"""
_COLUMNS = """
select a.attrelid::bigint as oid, a.attname as name,
       format_type(a.atttypid, a.atttypmod) as type, a.attnotnull as notnull,
       a.attidentity = 'a' as always, a.attgenerated <> '' as generated,
       exists (select from pg_catalog.pg_constraint f where f.contype = 'f' and f.confrelid = a.attrelid
                  and a.attnum = any (f.confkey)) as referenced,
       case when a.attidentity <> '' then 
              format('nextval(%L::regclass)', pg_get_serial_sequence(a.attrelid::regclass::text, a.attname))
            when a.attgenerated = '' then pg_get_expr(d.adbin, d.adrelid) end as default,
       coalesce(e.typtype, t.typtype) in ('e', 'r', 'm')
         or coalesce(e.typnamespace, b.typnamespace, t.typnamespace) = 'pg_catalog'::regnamespace as plain
  from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
  left join pg_catalog.pg_type b on b.oid = nullif(t.typbasetype, 0)
  left join pg_catalog.pg_type e on e.oid = nullif(t.typelem, 0) and t.typcategory = 'A'
  left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where a.attrelid = any ($1::bigint[]::oid[]) and a.attnum > 0 and not a.attisdropped
 order by a.attrelid, a.attnum
"""
_NAMES = """
select c.relname::text from pg_catalog.pg_class c
 where c.relkind in ('r', 'p', 'v', 'm', 'f') and pg_catalog.pg_table_is_visible(c.oid)
   and c.relnamespace <> 'pg_catalog'::regnamespace
"""
_DOCUMENT = {"id": "bigint", "created_at": "timestamp with time zone", "data": "jsonb"}

_known: weakref.WeakKeyDictionary[Database, dict[str, Relation]] = weakref.WeakKeyDictionary()
_keys: weakref.WeakKeyDictionary[Database, dict[tuple[int, str], Keys]] = weakref.WeakKeyDictionary()


async def describe(db: Database, name: str, *, fresh: bool = False) -> Relation:
    """The table as it is now; looked up once per process unless fresh. Raises UnknownTable."""
    found = (await describe_all(db, [name], fresh=fresh)).get(name)
    if found is None:
        async with db.conn() as conn:
            raise UnknownTable(name, [row[0] for row in await conn.fetch(_NAMES)], db.name)
    return found


async def describe_all(db: Database, names: Iterable[str], *, fresh: bool = False) -> dict[str, Relation]:
    """Those of these tables that are there, by their name; looked up together, and once per process unless fresh."""
    names, known = list(names), _known.setdefault(db, {})
    asked = [name for name in names if fresh or name not in known]
    if asked:
        async with db.conn() as conn:
            rows = await conn.fetch(_RELATIONS.format(schema=quote(db.schema)), asked, db.schema,
                                    [identifier(name) for name in asked])
            columns: dict[int, dict[str, Attribute]] = {row["oid"]: {} for row in rows}
            for c in await conn.fetch(_COLUMNS, list(columns)):
                columns[c["oid"]][c["name"]] = Attribute(c["name"], c["type"], c["notnull"], c["default"], c["always"],
                                                         c["plain"], c["generated"], c["referenced"])
        for name in asked:
            known.pop(name, None)
        known |= {row["asked"]: _relation(row["asked"], row, columns[row["oid"]]) for row in rows}
    return {name: known[name] for name in names if name in known}


def _relation(name: str, row: asyncpg.Record, columns: dict[str, Attribute]) -> Relation:
    return Relation(
        name, row["schema"], row["name"], identifier(name), row["oid"], row["table_id"], columns, tuple(row["key"]),
        copy=row["kind"] in "rpf" and not row["guarded"] and all(c.plain for c in columns.values()),
        versioned=row["kind"] in "rpm", triggers=row["triggers"], keeper=row["keeper"],
        document={c.name: c.type for c in columns.values()} == _DOCUMENT)


def described(db: Database, name: str, *, fresh: bool = False) -> Relation:
    """`describe` for sync callers: blocks for a few milliseconds the first time, also inside a loop."""
    known = None if fresh else _known.get(db, {}).get(name)
    return known or blocking(lambda: describe(db, name, fresh=fresh))


def writable(db: Database, name: str) -> Relation:
    """`described`, for a write. Raises ReadOnly for a table that something else keeps."""
    relation = described(db, name)
    if relation.keeper:
        raise ReadOnly(relation.name, relation.keeper)
    return relation


class Keys:
    """Keys that a column's default has given out and no row has yet. Safe in threads and loops."""

    def __init__(self, db: Database, relation: Relation, column: Attribute) -> None:
        self._db, self._relation, self._column = db, relation, column
        self._spare: list[Iterator[Any]] = []
        self._block = 1
        self._lock = threading.Lock()

    def take(self, at_least: int = 1) -> Iterator[Any]:
        """An iterator over some keys; about at_least of them when none are left over. Blocks for about 1 ms."""
        try:
            return self._spare.pop()
        except IndexError:
            pass
        with self._lock:
            size = min(max(self._block, at_least), MOST)
            self._block = min(self._block * BLOCK, MOST)
        return blocking(lambda: self._fetch(size))

    async def stock(self, takers: int, at_least: int) -> None:
        """Sees to it that so many take() at once need not wait: a loop that blocks cannot end its transactions."""
        missing = max(0, takers - len(self._spare))
        if not missing and (takers > 1 or sum(map(length_hint, self._spare)) >= at_least):
            return
        missing = max(1, missing)
        size = max(1, min(max(self._block, at_least // takers), MOST // missing))
        block = list(await self._fetch(missing * size))
        self._spare += [iter(block[at:at + size]) for at in range(0, len(block), size)]

    def give_back(self, left: Iterator[Any]) -> None:
        """Keys that were not used after all."""
        if length_hint(left):
            self._spare.append(left)

    def forget(self) -> None:
        """Those that are left are not to be used."""
        self._spare.clear()

    async def _fetch(self, size: int) -> Iterator[Any]:
        default = self._column.default
        contiguous = str(default).startswith("nextval(")
        # A block of numbers comes as two of them unless others took some in between.
        sql = (f"with v as materialized (select {default} as v from generate_series(1, $1)) select " +
               ("min(v), max(v), case when max(v) - min(v) + 1 <> count(*) then array_agg(v) end from v" if contiguous
                else "null, null, array_agg(v) from v"))
        try:
            async with self._db.conn() as conn:
                row = await conn.fetchrow(sql, size)
                assert row is not None
        except asyncpg.InsufficientPrivilegeError as error:
            raise await self._refused(str(default)) from error
        return iter(row[2]) if row[2] is not None else iter(range(row[0], row[1] + 1))

    async def _refused(self, default: str) -> MissingPrivilege:
        async with self._db.conn() as conn:
            role = await conn.fetchval("select current_user")
            sequence = await conn.fetchval(
                f"select pg_get_serial_sequence({literal(self._relation.sql)}, {literal(self._column.name)})")
        return MissingPrivilege(f'take keys for "{self._relation.name}" ({default})', role,
                                [f"grant usage on sequence {sequence} to {quote(role)};"])


def forget_spare(relation: Relation, error: asyncpg.UniqueViolationError) -> None:
    """After a key was given out twice, no more of those that are left are: the sequence was set back meanwhile.

    TRUNCATE … RESTART IDENTITY and ALTER SEQUENCE do that. The write is refused; made again, it gets a new key.
    """
    named = re.match(r"Key \((.*?)\)=", error.detail or "")
    for supplies in list(_keys.values()):
        for (oid, column), supply in list(supplies.items()):
            if oid == relation.oid and named and named[1].strip('"') == column:
                supply.forget()


def keys(db: Database, relation: Relation, column: str) -> Keys | None:
    """Where keys of this column come from; None when the column has no default."""
    attribute = relation.columns[column]
    if attribute.default is None:
        return None
    mine = _keys.setdefault(db, {})
    found = mine.get((relation.oid, column))
    return found or mine.setdefault((relation.oid, column), Keys(db, relation, attribute))


async def made_keys(db: Database, name: str) -> Keys | None:
    """Where the keys of this table's new rows come from; None when its rows bring theirs."""
    relation = await describe(db, name)
    return keys(db, relation, relation.key[0]) if len(relation.key) == 1 else None


if hasattr(os, "register_at_fork"):                                    # a key must not be given out twice
    os.register_at_fork(after_in_child=_keys.clear)


def forget(db: Database) -> None:
    """Drops what is known of this database's tables, as after a migration."""
    _known.pop(db, None)


def blocking(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a short piece of database work and waits, wherever the caller is: thread, loop, even the portal's own."""
    if threading.current_thread() is not portal().thread:
        return portal().run(make())
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(asyncio.run(make()))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="anton-blocking")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def columns_sql(names: Sequence[str]) -> str:
    """Column names, quoted, with commas."""
    return ", ".join(quote(name) for name in names)
