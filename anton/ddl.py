"""Ddl: a declared table as SQL, a table as the database has it, and what lies between the two.

    create_sql(spec)               CREATE TABLE and CREATE INDEX
    await compare(conn, spec, …)   a table that Anton made: the statements it still needs, and those that are refused
    await check_adopted(conn, …)   a table that existed before Anton: differences, both sides named; never altered

The declared side is read back from a temporary table, so both sides are in Postgres' own words. Tables of more than
SMALL bytes are changed in steps that let others read and write: NOT VALID and VALIDATE, CREATE INDEX CONCURRENTLY.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anton.columns import NAME_BYTES, Column, Shape
from anton.db import quote
from anton.errors import near

if TYPE_CHECKING:
    from anton.db import Conn

VECTOR = "create extension if not exists vector"                        # pgvector
SMALL = 8 << 20                                                        # bytes; built or scanned in well under 200 ms


@dataclass(frozen=True)
class Spec:
    """A table as declared. unique, index: column lists. model: its name, for messages; "" when it has none."""

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    unique: tuple[tuple[str, ...], ...] = ()
    index: tuple[tuple[str, ...], ...] = ()
    model: str = ""

    @property
    def sql(self) -> str:
        """Its name for SQL."""
        return f"{quote(self.schema)}.{quote(self.name)}"

    @property
    def constraints(self) -> dict[str, str]:
        """Name to definition, of the primary key, the UNIQUEs and the CHECKs."""
        found = {self._named((), "pkey"): f"primary key ({_list(self.key)})"}
        found |= {self._named((c.name,), "check"): f"check ({c.check})" for c in self.columns if c.check}
        found |= {self._named(columns, "key"): f"unique ({_list(columns)})" for columns in self.unique}
        return found

    @property
    def indexes(self) -> dict[str, tuple[str, ...]]:
        """Name to columns."""
        return {self._named(columns, "idx"): columns for columns in self.index}

    @property
    def vectors(self) -> list[str]:
        """Its columns of pgvector's type."""
        return [column.name for column in self.columns if column.type.startswith("vector(")]

    def how(self, columns: Sequence[str]) -> str:
        """What an index holds: of a vector by cosine, which is what `<=>` asks for."""
        vector = len(columns) == 1 and columns[0] in self.vectors
        return f"using hnsw ({_list(columns)} vector_cosine_ops)" if vector else f"({_list(columns)})"

    def _named(self, columns: Sequence[str], suffix: str) -> str:
        name = "_".join((self.name, *columns, suffix))
        if len(name.encode()) <= NAME_BYTES:
            return name
        tag = f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}_{suffix}"
        return name.encode()[:NAME_BYTES - len(tag)].decode(errors="ignore") + tag

    def declared(self) -> dict[str, Any]:
        """What watched.model keeps: the names that Anton made, and so may take away again."""
        return {"model": self.model, "columns": {c.name: c.type for c in self.columns},
                "defaults": [c.name for c in self.columns if c.default is not None],
                "constraints": self.constraints, "indexes": {name: list(c) for name, c in self.indexes.items()}}


def create_sql(spec: Spec, *, temporary: bool = False) -> str:
    """CREATE TABLE and its indexes."""
    lines = [column.sql for column in spec.columns]
    lines += [f"constraint {quote(name)} {definition}" for name, definition in spec.constraints.items()]
    table = f"temporary table {quote(spec.name)}" if temporary else f"table {spec.sql}"
    made = [f"create {table} (\n  " + ",\n  ".join(lines) + "\n)"]
    on = quote(spec.name) if temporary else spec.sql
    made += [f"create index {quote(name)} on {on} {spec.how(columns)}" for name, columns in spec.indexes.items()]
    return ";\n".join(made)


@dataclass(frozen=True)
class Attr:
    """A column as the database has it. base: the type below a domain; labels: of an enum type."""

    type: str
    notnull: bool
    default: str | None
    identity: bool
    generated: bool
    base: str
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class Found:
    """A table as the database has it. key: of its primary key, or of the unique index that serves as one."""

    columns: dict[str, Attr]
    constraints: dict[str, str]
    indexes: dict[str, str]                                            # name to what follows USING
    invalid: frozenset[str]                                            # constraints and indexes left half made
    key: tuple[str, ...]
    bytes: int


_COLUMNS = """
select a.attname::text as name, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull as notnull,
       pg_get_expr(d.adbin, d.adrelid) as default, a.attidentity <> '' as identity, a.attgenerated <> '' as generated,
       case when t.typtype = 'd' then format_type(t.typbasetype, t.typtypmod)
            else format_type(a.atttypid, a.atttypmod) end as base,
       (select array_agg(e.enumlabel::text order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid) as labels
  from pg_attribute a join pg_type t on t.oid = a.atttypid
  left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum"""
_CONSTRAINTS = """
select conname::text as name, pg_get_constraintdef(oid) as def, convalidated as valid
  from pg_constraint where conrelid = $1 and contype in ('p', 'u', 'c') order by conname"""
_INDEXES = """
select c.relname::text as name, substring(pg_get_indexdef(c.oid) from ' USING .*') as def, i.indisvalid as valid,
       i.indisunique as is_unique
  from pg_index i join pg_class c on c.oid = i.indexrelid
 where i.indrelid = $1 and not exists (select from pg_constraint k where k.conindid = c.oid and k.conrelid = i.indrelid)
 order by c.relname"""
_KEY = """
select array_agg(a.attname::text order by k.at)
  from (select i.* from pg_index i
         where i.indrelid = $1 and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null
           and i.indexprs is null and not exists (
             select from unnest(i.indkey[0:i.indnkeyatts - 1]) n
               join pg_attribute a on a.attrelid = i.indrelid and a.attnum = n where not a.attnotnull)
         order by i.indisprimary desc, i.indnkeyatts, i.indexrelid limit 1) i,
       unnest(i.indkey[0:i.indnkeyatts - 1]) with ordinality k (num, at)
  join pg_attribute a on a.attrelid = $1 and a.attnum = k.num"""


async def inspect(conn: Conn, oid: int) -> Found:
    """The table with this oid, as of now."""
    columns = {row["name"]: Attr(row["type"], row["notnull"], row["default"], row["identity"], row["generated"],
                                 row["base"], tuple(row["labels"]) if row["labels"] else None)
               for row in await conn.fetch(_COLUMNS, oid)}
    constraints = await conn.fetch(_CONSTRAINTS, oid)
    indexes = await conn.fetch(_INDEXES, oid)
    return Found(columns, {row["name"]: row["def"] for row in constraints},
                 {row["name"]: ("unique" if row["is_unique"] else "") + row["def"] for row in indexes},
                 frozenset(row["name"] for row in (*constraints, *indexes) if not row["valid"]),
                 tuple(await conn.fetchval(_KEY, oid) or ()),
                 await conn.fetchval("select pg_table_size($1::oid)", oid))


async def as_declared(conn: Conn, spec: Spec) -> Found:
    """The declared side in Postgres' own words: made as a temporary table, looked at and rolled back."""
    undo = conn.transaction()
    await undo.start()
    try:
        if spec.vectors:                                               # it may be a step of this migrate to make it
            await conn.execute(VECTOR)
        await conn.execute(create_sql(spec, temporary=True))
        oid = await conn.fetchval("select to_regclass($1)::oid", f"pg_temp.{quote(spec.name)}")
        return await inspect(conn, oid)
    finally:
        await undo.rollback()


@dataclass
class Difference:
    """What a table lacks. alters: statements that lose nothing, in order. refused: (why, the SQL it would take)."""

    alters: list[str] = field(default_factory=list)
    refused: list[tuple[str, list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


async def compare(conn: Conn, spec: Spec, oid: int, before: Mapping[str, Any]) -> Difference:
    """From the table with this oid to the declared one. before: Spec.declared() of the last migrate."""
    want, have = await as_declared(conn, spec), await inspect(conn, oid)
    found = Difference()
    await _compare_columns(conn, spec, want, have, before, found)
    await _compare_constraints(conn, spec, want, have, before, found)
    _compare_indexes(spec, want, have, before, found)
    return found


async def _compare_columns(conn: Conn, spec: Spec, want: Found, have: Found, before: Mapping[str, Any],
                           found: Difference) -> None:
    alter = f"alter table {spec.sql}"
    declared = {column.name: column for column in spec.columns}
    gone = [name for name in have.columns if name not in want.columns and name in before.get("columns", {})]
    for name, new in want.columns.items():
        old = have.columns.get(name)
        if old is None:
            await _add_column(conn, spec, declared[name], have, found)
            continue
        column = f"{alter} alter column {quote(name)}"
        if old.type != new.type:
            if _widens(old.type, new.type):
                found.alters.append(f"{column} type {new.type}")
            else:
                found.refused.append((f'column "{name}" is {old.type}, {spec.model} says {new.type}',
                                      [f"{column} type {new.type} using {quote(name)}::{new.type};"]))
        if old.identity != new.identity:
            found.refused.append((f'column "{name}" {_made(old.identity)}, {spec.model} says it {_made(new.identity)}',
                                  [f"{column} {'add generated by default as' if new.identity else 'drop'} identity;"]))
        elif old.default != new.default and (new.default is not None or name in before.get("defaults", ())):
            found.alters.append(f"{column} {f'set default {new.default}' if new.default else 'drop default'}")
        if old.notnull and not new.notnull:
            found.alters.append(f"{column} drop not null")
        elif new.notnull and not old.notnull:
            await _set_not_null(conn, spec, name, have, found)
    for name in gone:
        renamed = [f"-- or, if it was renamed: {alter} rename column {quote(name)} to {quote(other)};"
                   for other, attr in want.columns.items()
                   if other not in have.columns and attr.type == have.columns[name].type]
        found.refused.append((f'column "{name}" is not in {spec.model} any more',
                              [*renamed, f"{alter} drop column {quote(name)};"]))
    for name, extra in have.columns.items():
        if name not in want.columns and name not in gone and extra.notnull and extra.default is None \
                and not extra.identity and not extra.generated:
            found.notes.append(f'column "{name}" of {spec.sql} is NOT NULL without default, and {spec.model} does not '
                               "have it: appends will fail")


async def _add_column(conn: Conn, spec: Spec, column: Column, have: Found, found: Difference) -> None:
    alter = f"alter table {spec.sql}"
    filled = await conn.fetchval(f"select exists (select from {spec.sql})")
    computed = column.identity or (column.default or "").endswith("()")
    if filled and column.notnull and column.default is None and not column.identity:
        found.refused.append((
            f'"{column.name}" of {spec.model} has no default, and the rows that exist need a value',
            [f"{alter} add column {quote(column.name)} {column.type};",
             f"update {spec.sql} set {quote(column.name)} = …;",
             f"alter table {spec.sql} alter column {quote(column.name)} set not null;"]))
    elif computed and have.bytes > SMALL:
        found.refused.append((f'"{column.name}" of {spec.model} would rewrite every row',
                              [f"{alter} add column {column.sql};"]))
    else:
        found.alters.append(f"{alter} add column {column.sql}")


async def _set_not_null(conn: Conn, spec: Spec, name: str, have: Found, found: Difference) -> None:
    alter, column = f"alter table {spec.sql}", quote(name)
    nulls = await conn.fetchval(f"select count(*) from (select from {spec.sql} where {column} is null limit 1000) r")
    if nulls:
        found.refused.append((f'"{name}" of {spec.model} may not be None, and {_some(nulls)} no value',
                              [f"update {spec.sql} set {column} = … where {column} is null;",
                               f"{alter} alter column {column} set not null;"]))
    elif have.bytes <= SMALL:
        found.alters.append(f"{alter} alter column {column} set not null")
    else:                                                              # a valid CHECK spares the scan under the lock
        helper = spec._named((name,), "filled")
        if helper not in have.constraints:
            found.alters.append(f"{alter} add constraint {quote(helper)} check ({column} is not null) not valid")
        found.alters += [f"{alter} validate constraint {quote(helper)}", f"{alter} alter column {column} set not null",
                         f"{alter} drop constraint {quote(helper)}"]


async def _compare_constraints(conn: Conn, spec: Spec, want: Found, have: Found, before: Mapping[str, Any],
                               found: Difference) -> None:
    alter = f"alter table {spec.sql}"
    declared = spec.constraints
    for name, definition in want.constraints.items():
        old = have.constraints.get(name)
        add = f"add constraint {quote(name)} {declared[name]}"
        if old is not None and old.removesuffix(" NOT VALID") == definition:
            if name in have.invalid:
                found.alters.append(f"{alter} validate constraint {quote(name)}")
            continue
        if definition.startswith("PRIMARY KEY"):
            drop = [f"{alter} drop constraint {quote(other)};" for other, text in have.constraints.items()
                    if text.startswith("PRIMARY KEY")]
            found.refused.append((f"its key is ({_list(have.key)}), {spec.model} says ({_list(spec.key)})",
                                  [*drop, f"{alter} {add};"]))
        elif definition.startswith("CHECK"):
            await _add_check(conn, spec, name, declared[name], have, old is not None, found)
        else:
            await _add_unique(conn, spec, name, declared[name], have, old is not None, found)
    for name in have.constraints:
        if name not in want.constraints and name in before.get("constraints", {}):
            found.alters.append(f"{alter} drop constraint {quote(name)}")


async def _add_check(conn: Conn, spec: Spec, name: str, definition: str, have: Found, replaces: bool,
                     found: Difference) -> None:
    alter = f"alter table {spec.sql} " + (f"drop constraint {quote(name)}, " if replaces else "")
    condition = definition.removeprefix("check ")
    used = [column.name for column in spec.columns if column.check and definition == f"check ({column.check})"]
    exists = all(column in have.columns for column in used)
    broken = await conn.fetchval(f"select count(*) from (select from {spec.sql} where not {condition} limit 1000) r") \
        if exists else 0
    if broken:
        found.refused.append((f"{_some(broken)} what {spec.model} does not allow: {condition}",
                              [f"-- look at them: select * from {spec.sql} where not {condition};",
                               f"{alter}add constraint {quote(name)} {definition};"]))
    elif have.bytes <= SMALL:
        found.alters.append(f"{alter}add constraint {quote(name)} {definition}")
    else:
        found.alters += [f"{alter}add constraint {quote(name)} {definition} not valid",
                         f"alter table {spec.sql} validate constraint {quote(name)}"]


async def _add_unique(conn: Conn, spec: Spec, name: str, definition: str, have: Found, replaces: bool,
                      found: Difference) -> None:
    alter = f"alter table {spec.sql}"
    columns = next(columns for columns in spec.unique if spec._named(columns, "key") == name)
    if all(column in have.columns for column in columns):
        cells = ", ".join(f"{quote(column)}::text" for column in columns)
        twice = await conn.fetchrow(f"select {cells} from {spec.sql} where ({_list(columns)}) is not null "
                                    f"group by {_list(columns)} having count(*) > 1 limit 1")
        if twice is not None:
            found.refused.append((
                f"({_list(columns)}) is to be unique, and ({', '.join(twice)}) is there more than once",
                [f"{alter} add constraint {quote(name)} {definition};"]))
            return
    if replaces:
        found.alters.append(f"{alter} drop constraint {quote(name)}")
    if have.bytes <= SMALL:
        if name in have.indexes:
            found.alters.append(f"drop index {quote(spec.schema)}.{quote(name)}")
        found.alters.append(f"{alter} add constraint {quote(name)} {definition}")
        return
    if name in have.invalid:
        found.alters.append(f"drop index {quote(spec.schema)}.{quote(name)}")
    if name not in have.indexes or name in have.invalid:
        found.alters.append(f"create unique index concurrently {quote(name)} on {spec.sql} ({_list(columns)})")
    found.alters.append(f"{alter} add constraint {quote(name)} unique using index {quote(name)}")


def _compare_indexes(spec: Spec, want: Found, have: Found, before: Mapping[str, Any], found: Difference) -> None:
    for name, columns in spec.indexes.items():
        if have.indexes.get(name) == want.indexes[name] and name not in have.invalid:
            continue
        if name in have.indexes:
            found.alters.append(f"drop index {quote(spec.schema)}.{quote(name)}")
        how = "concurrently " if have.bytes > SMALL else ""
        found.alters.append(f"create index {how}{quote(name)} on {spec.sql} {spec.how(columns)}")
    for name in have.indexes:
        if name not in want.indexes and name in before.get("indexes", {}):
            found.alters.append(f"drop index {quote(spec.schema)}.{quote(name)}")


def _widens(old: str, new: str) -> bool:
    """True for a type change that neither loses anything nor rewrites the table."""
    was, now = re.fullmatch(r"numeric\((\d+),(\d+)\)", old), re.fullmatch(r"numeric(?:\((\d+),(\d+)\))?", new)
    if was and now:
        return now[1] is None or (now[2] == was[2] and int(now[1]) >= int(was[1]))
    return False


_FITS = {
    "bigint": ("bigint", "integer", "smallint"),
    "double precision": ("double precision", "real"),
    "numeric": ("numeric",),
    "text": ("text", "character varying", "character", "bpchar", "citext", "name"),
    "jsonb": ("jsonb", "json"),
    "inet": ("inet", "cidr"),
}


def check_adopted(shape: Shape[Any], have: Found) -> tuple[list[str], list[str]]:
    """(differences, notes) between a model and a table that existed before Anton. Each names both sides."""
    model, wrong, notes = shape.model.__name__, [], []
    for column in shape.columns:
        attr = have.columns.get(column.name)
        if attr is None:
            close = near(column.name, have.columns)
            hint = f' Did you mean "{close}"?' if close else f" Its columns: {', '.join(have.columns)}."
            wrong.append(f'{model}.{column.name} has no column "{column.name}".{hint}')
            continue
        if not _fits(column, attr):
            wrong.append(f'{model}.{column.name} is {column.type}, column "{column.name}" is {attr.type}.'
                         + _advice(column.type, attr.base))
        elif attr.labels and column.choices and set(attr.labels) - {*map(str, column.choices)}:
            more = sorted(set(attr.labels) - {str(choice) for choice in column.choices})
            wrong.append(f'{model}.{column.name} does not know {", ".join(map(repr, more))}, which {attr.type} has.')
        if column.notnull and not attr.notnull and column.name not in shape.key:
            notes.append(f'column "{column.name}" may be NULL and {model}.{column.name} may not be None: '
                         "a record without it will fail")
    if have.key and set(shape.key) != set(have.key):
        said = "id, made by the database" if shape.hidden_id else ", ".join(shape.key)
        wrong.append(f"the key of {model} is ({said}), that of the table is ({', '.join(have.key)}). "
                     f"Say key={have.key[0] if len(have.key) == 1 else have.key!r}.")
    for name, attr in have.columns.items():
        if name not in shape.names and attr.notnull and not (attr.default or attr.identity or attr.generated):
            notes.append(f'column "{name}" is NOT NULL without default, and {model} does not have it: '
                         "appends will fail")
    return wrong, notes


def _fits(column: Column, attr: Attr) -> bool:
    base = re.sub(r"\(.*?\)", "", attr.base)
    wanted = re.sub(r"\(.*?\)", "", column.type)
    if wanted.endswith("[]"):
        return base.endswith("[]") and base[:-2] in _FITS.get(wanted[:-2], (wanted[:-2],))
    if attr.labels is not None:
        return wanted == "text"
    return base.rpartition(".")[2] in _FITS.get(wanted, (wanted,))


def _advice(wanted: str, found: str) -> str:
    zones = {"timestamp with time zone": "timestamp without time zone"}
    if zones.get(wanted) == found:
        return " Say pydantic.NaiveDatetime."
    return " Say pydantic.AwareDatetime." if zones.get(found) == wanted else ""


def _made(identity: bool) -> str:
    return "is made by the database" if identity else "is given by the writer"


def _some(rows: int) -> str:
    return "a row has" if rows == 1 else f"{'1,000 or more' if rows >= 1000 else rows} rows have"


def _list(columns: Sequence[str]) -> str:
    return ", ".join(quote(column) for column in columns)


def key_advice(schema: str, name: str, have: Found) -> str:
    """The ALTER that would give a table a key."""
    alter = f"alter table {quote(schema)}.{quote(name)}"
    columns = [c for c in have.columns if c == "id"] or [c for c, attr in have.columns.items() if attr.notnull][:1]
    if columns:
        return f"{alter} add primary key ({_list(columns)});"
    return f"{alter} add column id bigint generated by default as identity primary key;"
