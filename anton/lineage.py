"""Lineage: what SQL says of itself, read by sqlglot: tables read and written, and which column comes from which.

    columns("select sum(total) as sum from orders", Tables({"public.orders": ["id", "total"]}))
        ->  {"sum": {("public.orders", "total")}}
    read("insert into big (id) select id from new_records", tables, "public.orders")  ->  a Reading

Tables are named as Postgres quotes them, with their schema: public.orders. What sqlglot does not understand is read at
table level, and the Reading's warnings say so; nothing here raises. {name} stands for a bound value: it is text that is
never looked into. Importing this costs some 0.3 s, so commands import it only when there is SQL to read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.lineage import lineage
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, build_scope, traverse_scope
from sqlglot.schema import MappingSchema

from anton.columns import SYSTEM
from anton.db import quote
from anton.sqlfile import statements

Column = tuple[str, str]                                               # ("public.orders", "total")
Sources = frozenset[Column]

DIALECT = "postgres"
RECORDS = ("new_records", "old_records")
DEPTH = 8                                                              # functions over functions over columns
MOST_TUPLES = 100                                                      # of VALUES: the others are like these
logging.getLogger("sqlglot").setLevel(logging.CRITICAL)                # it warns of what the Reading's warnings say

_WRITES = (("new", r"\binsert\s+into\s+([\w.\"]+)"),
           ("updated", r"\bupdate\s+(?:only\s+)?([\w.\"]+)\s+(?:as\s+\w+\s+|(?!set\b)\w+\s+)?set\b"),
           ("deleted", r"\bdelete\s+from\s+(?:only\s+)?([\w.\"]+)"),
           ("truncate", r"\btruncate\s+(?:table\s+)?(?:only\s+)?([\w.\"]+)"),
           ("rebuilt", r"\brefresh\s+materialized\s+view\s+(?:concurrently\s+)?([\w.\"]+)"))
_READS = r"(?<!\bdelete\s)\b(?:from|join|using)\s+(?:only\s+)?([a-z_\"][\w.\"]*)(?!\s*\()"
_QUIET = re.compile(r"\s*(?:create\s+policy|alter|grant|revoke|comment|set|reset|drop|create\s+(?:extension|type|domain|role|schema))\b",
                    re.IGNORECASE)                                     # they neither read nor write a record
_BLANK = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'", re.DOTALL)
_PIECE = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|(\$\w*\$).*?\1|\{([A-Za-z_]\w*)\}", re.DOTALL)


class Tables:
    """What there is to be named. columns: by table, "public.orders". default: the schema of unqualified names."""

    def __init__(self, columns: Mapping[str, Iterable[str]], default: str = "public") -> None:
        self.default = default
        self.columns = {table: tuple(names) for table, names in columns.items()}
        nested: dict[str, Any] = {}
        for table, names in self.columns.items():
            schema, name = (part.name for part in exp.to_table(table, dialect=DIALECT).parts[-2:])
            nested.setdefault(schema, {})[name] = dict.fromkeys(names, "text")
        self.mapping = MappingSchema(nested, dialect=DIALECT, normalize=False)

    def name(self, text: str) -> str:
        """A table as SQL writes it, with its schema: orders -> public.orders."""
        table = normalize_identifiers(exp.to_table(text, dialect=DIALECT), dialect=DIALECT)
        return named(table, self.default)


@dataclass(frozen=True)
class Unknown:
    """A name that is not there, as far as can be seen from here. start: its place in the text. known: what is."""

    kind: str                                                          # "table" or "column"
    name: str
    start: int
    known: tuple[str, ...]


@dataclass
class Reading:
    """What one text of SQL does.

    reads: tables. writes: (table, "new" | "updated" | "deleted" | "truncate" | "rebuilt"). makes: views and tables it
    creates. outputs: of a query, by column. fills: the same for each column that is written or made. bodies: (reads,
    writes) of the functions it creates, by name. calls: the functions it calls that are not Postgres' own, perhaps.
    """

    reads: set[str] = field(default_factory=set)
    writes: set[tuple[str, str]] = field(default_factory=set)
    makes: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Sources] = field(default_factory=dict)
    fills: dict[Column, Sources] = field(default_factory=dict)
    bodies: dict[str, tuple[set[str], set[tuple[str, str]]]] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)
    unknown: list[Unknown] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def columns(sql: str, tables: Tables) -> dict[str, set[Column]]:
    """Where each output column of a query comes from; none for what is made of nothing, such as count(*).

    A column "*" is of a table whose columns are not known. {} when it is no query, or none that sqlglot understands.
    """
    return {name: set(sources) for name, sources in read(sql, tables).outputs.items()}


@lru_cache(maxsize=4096)
def read(text: str, tables: Tables, records: str | None = None) -> Reading:
    """Reads SQL, one or more statements. records: the table that new_records and old_records are of."""
    found, at, plain = Reading(), 0, hidden(text)
    for line, statement in statements(plain):
        at = plain.index(statement, at)
        _Statement(statement, at, line, tables, records, found).read()
        at += len(statement)
    return found


def hidden(text: str) -> str:
    """The text with a literal of the same length for each {name}; in strings and comments braces are braces."""
    return _PIECE.sub(lambda piece: f"'{piece[2]}'" if piece[2] else piece[0], text)


def named(table: exp.Table, default: str) -> str:
    """ "public.orders", quoted where that is needed."""
    return f"{quote(table.db or default)}.{quote(table.name)}"


def written(text: str) -> Iterator[tuple[str, str]]:
    """Tables behind INSERT INTO, UPDATE … SET, DELETE FROM and the like, in words alone: (name, op)."""
    plain = _BLANK.sub(" ", text)
    for op, pattern in _WRITES:
        for name in re.findall(pattern, plain, re.IGNORECASE):
            yield name, op


class _Statement:
    """One statement, put into a Reading. at: where it begins in the text, line: on which line, from 0."""

    def __init__(self, text: str, at: int, line: int, tables: Tables, records: str | None, found: Reading) -> None:
        self.text, self.at, self.line, self.tables, self.found = text, at, line, tables, found
        self.records = exp.to_table(records, dialect=DIALECT) if records else None

    def read(self) -> None:
        try:
            tree = sqlglot.parse_one(self.text, dialect=DIALECT)
            if isinstance(tree, exp.Command):
                self._in_words(None if _QUIET.match(self.text) else "sqlglot does not read such statements")
                return
            tree = normalize_identifiers(tree, dialect=DIALECT)
            self._place_records(tree)
            self._calls(tree)
            self._any(tree)
        except Exception as error:                                     # whatever sqlglot stumbles over is no error of the app
            self._in_words(str(error).partition("\n")[0] or type(error).__name__)

    def _in_words(self, why: str | None) -> None:
        """Table level: what the words say."""
        reads, writes = self._words(self.text)
        self.found.reads |= reads
        self.found.writes |= writes
        if why is not None:
            self.found.warnings.append(f"line {self.line + 1}: read at table level only ({why})")

    def _words(self, text: str) -> tuple[set[str], set[tuple[str, str]]]:
        plain = _BLANK.sub(" ", text)
        ctes = {name.lower() for name in re.findall(r"(?:\bwith(?:\s+recursive)?|,)\s+(\w+)\s+(?:\([^)]*\)\s*)?as\b",
                                                    plain, re.IGNORECASE)}
        reads = set()
        for name in re.findall(_READS, plain, re.IGNORECASE):
            if name.lower() in RECORDS and self.records is not None:
                reads.add(named(self.records, self.tables.default))
            elif name.lower() not in ctes | {"select", "lateral", "unnest"}:
                reads.add(self.tables.name(name))
        writes = {(self.tables.name(name), op) for name, op in written(text)}
        return {name for name in reads if name in self.tables.columns}, writes

    def _place_records(self, tree: exp.Expr) -> None:
        """new_records is the table itself, so that its columns are the table's."""
        own = {cte.alias for cte in tree.find_all(exp.CTE)}
        for table in tree.find_all(exp.Table) if self.records is not None else ():
            if table.name in RECORDS and not table.db and table.name not in own:
                if not table.alias:
                    table.set("alias", exp.TableAlias(this=exp.to_identifier(table.name)))
                table.set("this", self.records.this.copy())
                table.set("db", self.records.args["db"].copy())

    def _calls(self, tree: exp.Expr) -> None:
        for call in tree.find_all(exp.Anonymous):
            if isinstance(call.this, str):
                self.found.calls.add(call.this.lower())

    # Statements

    def _any(self, tree: exp.Expr) -> None:
        if isinstance(tree, exp.Query):
            self._inner_writes(tree)
            into = tree.args.get("into")
            outputs = self._query(tree)
            if into is not None:
                self._made(into.this, "table", [name for name, _ in outputs], outputs)
            else:
                self.found.outputs = dict(outputs)
        elif isinstance(tree, (exp.Insert, exp.Update, exp.Delete, exp.Merge)):
            self._inner_writes(tree)
            self._write(tree, _ctes(tree))
        elif isinstance(tree, exp.Create):
            self._create(tree)
        elif isinstance(tree, exp.TruncateTable):
            self.found.writes |= {(self._name(table), "truncate") for table in tree.expressions}
        elif isinstance(tree, exp.Copy):
            self._copy(tree)

    def _copy(self, tree: exp.Copy) -> None:
        inner = tree.this
        if isinstance(inner, exp.Subquery):
            self._query(inner.this)
        elif tree.args.get("kind"):
            self.found.writes.add((self._name(inner), "new"))
        else:
            self.found.reads.add(self._name(inner))

    def _create(self, tree: exp.Create) -> None:
        kind, what, query = str(tree.args["kind"]).lower(), tree.this, tree.expression
        table = what.find(exp.Table) if isinstance(what, (exp.Schema, exp.UserDefinedFunction)) else what
        if kind in ("view", "table") and isinstance(query, exp.Query):
            names = [one.name for one in what.expressions] if isinstance(what, exp.Schema) else []
            self._inner_writes(query)
            self._made(table, kind, names, self._query(query))
        elif kind == "table":
            self._made(table, "table", (), [(column.name, frozenset()) for column in
                                            (what.expressions if isinstance(what, exp.Schema) else ())
                                            if isinstance(column, exp.ColumnDef)])
        elif kind in ("function", "procedure") and query is not None:
            self.found.bodies[table.name.lower()] = self._words(query.name or query.sql(dialect=DIALECT))
            self.found.warnings.append(f"line {self.line + 1}: the body of {kind} {table.name} is read at table level")

    def _made(self, table: exp.Table, kind: str, names: Sequence[str], outputs: Sequence[tuple[str, Sources]]) -> None:
        made = named(table, self.tables.default)
        self.found.makes[made] = kind
        for n, (name, sources) in enumerate(outputs):
            self._fill(made, names[n] if n < len(names) else name, sources)

    def _inner_writes(self, tree: exp.Expr) -> None:
        """WITH x AS (INSERT … RETURNING …): the write is noted, and x becomes the SELECT that returns the same."""
        for cte in _ctes(tree):
            if isinstance(cte.this, (exp.Insert, exp.Update, exp.Delete, exp.Merge)):
                before = [one for one in _ctes(tree) if one is not cte and isinstance(one.this, exp.Query)]
                self._write(cte.this, [*before, *_ctes(cte.this)])
                cte.set("this", self._returned(cte.this))

    def _write(self, tree: exp.Expr, ctes: Sequence[exp.CTE]) -> None:
        if isinstance(tree, exp.Insert):
            self._insert(tree, ctes)
            return
        table = tree.this
        target, assigned = self._name(table), []
        if isinstance(tree, exp.Update):
            self.found.writes.add((target, "updated"))
            assigned = list(_assigned(tree.expressions))
        elif isinstance(tree, exp.Delete):
            self.found.writes.add((target, "deleted"))
        else:
            assigned = list(self._whens(tree, target))
        values = [_aliased(value, n) for n, (_, value) in enumerate(assigned)]
        select = _with(_from(tree, values or [exp.Literal.number(1)]), ctes)
        outputs = self._query(select, but=target if not _reads_itself(tree) else None)
        for (column, _), (_, sources) in zip(assigned, outputs, strict=False):
            self._fill(target, column, sources)

    def _whens(self, tree: exp.Merge, target: str) -> Iterator[tuple[str, exp.Expr]]:
        for when in tree.args["whens"].expressions:
            then = when.args["then"]
            if isinstance(then, exp.Update):
                self.found.writes.add((target, "updated"))
                yield from _assigned(then.expressions)
            elif isinstance(then, exp.Insert):
                self.found.writes.add((target, "new"))
                names = [column.name for column in then.this.expressions] if then.this else self._columns(target)
                values = then.expression.expressions if then.expression else []
                yield from zip(names, values, strict=False)
            elif then.name.lower() == "delete":
                self.found.writes.add((target, "deleted"))

    def _insert(self, tree: exp.Insert, ctes: Sequence[exp.CTE]) -> None:
        table = tree.this.this if isinstance(tree.this, exp.Schema) else tree.this
        target = self._name(table)
        self.found.writes.add((target, "new"))
        names = [one.name for one in tree.this.expressions] if isinstance(tree.this, exp.Schema) else self._columns(target)
        source = tree.expression
        tuples = source.expressions[:MOST_TUPLES] if isinstance(source, exp.Values) else []
        queries = [exp.Select(expressions=list(one.expressions)) for one in tuples] or (
            [source] if isinstance(source, exp.Query) else [])
        for query in queries:
            for name, (_, sources) in zip(names, self._query(_with(query, ctes)), strict=False):
                self._fill(target, name, sources)
        conflict = tree.args.get("conflict")
        if conflict is not None and conflict.expressions:
            self.found.writes.add((target, "updated"))
            assigned = list(_assigned(conflict.expressions))
            offered = exp.Table(this=table.this.copy(), db=table.args.get("db"), alias=exp.TableAlias(
                this=exp.to_identifier("excluded")))
            select = exp.Select(expressions=[_aliased(value, n) for n, (_, value) in enumerate(assigned)],
                                from_=exp.From(this=table.copy()), joins=[exp.Join(this=offered, kind="cross")])
            own = {column: self.found.fills.get((target, column), frozenset()) for _, column in
                   ((None, name) for name in names)}
            for (column, value), (_, sources) in zip(assigned, self._query(_with(select, ctes), but=target), strict=False):
                taken = {one.name for one in value.find_all(exp.Column) if one.table == "excluded"}
                kept = {one.name for one in value.find_all(exp.Column) if one.table != "excluded"}
                mine = {(t, c) for t, c in sources if t != target or c in kept}
                self._fill(target, column, frozenset(mine).union(*(own.get(name, frozenset()) for name in taken)))

    def _returned(self, tree: exp.Expr) -> exp.Select:
        returning = tree.args.get("returning")
        values = list(returning.expressions) if returning is not None else [exp.Literal.number(1)]
        if isinstance(tree, exp.Insert):
            table = tree.this.this if isinstance(tree.this, exp.Schema) else tree.this
            return exp.Select(expressions=values, from_=exp.From(this=table.copy()))
        return _from(tree, values)

    def _fill(self, table: str, column: str, sources: Sources) -> None:
        self.found.fills[table, column] = self.found.fills.get((table, column), frozenset()) | sources

    def _name(self, table: exp.Expr) -> str:
        found = table if isinstance(table, exp.Table) else table.find(exp.Table)
        assert found is not None
        name = named(found, self.tables.default)
        self._seen(found, name)
        return name

    def _columns(self, table: str) -> Sequence[str]:
        return self.tables.columns.get(table, ())

    # Queries

    def _query(self, tree: exp.Query, but: str | None = None) -> list[tuple[str, Sources]]:
        """Notes what it reads; its outputs in order. but: a table that is there as the target alone."""
        for table in tree.find_all(exp.Table):
            table.set("catalog", None)
        names = [_output(one) for one in tree.selects] if not tree.is_star else []
        tree = qualify(tree, dialect=DIALECT, db=self.tables.default, schema=self.tables.mapping,
                       allow_partial_qualification=True, validate_qualify_columns=False, quote_identifiers=False)
        self._look(tree, but)
        for lateral in list(tree.find_all(exp.Lateral)):               # lineage() reads a subquery better when it is plain
            if isinstance(lateral.this, exp.Subquery):
                lateral.replace(exp.Subquery(this=lateral.this.this, alias=lateral.args.get("alias")))
        keys = []
        for n, one in enumerate(tree.selects):
            name = names[n] if n < len(names) and names[n] else one.alias_or_name
            keys.append(("*", "*") if one.is_star else (f"c{n}", name))
            if not one.is_star:
                one.replace(exp.alias_(one.unalias(), f"c{n}"))
        scope = build_scope(tree)
        found = lineage(None, tree, self.tables.mapping, dialect=DIALECT, scope=scope, trim_selects=False)
        scopes = traverse_scope(tree)
        return [(name, self._leaves(found[key], scopes)) for key, name in keys]

    def _leaves(self, node: Any, scopes: Sequence[Scope]) -> Sources:
        found: set[Column] = set()
        for one in node.walk():
            if one.downstream:
                continue
            table = one.expression
            if isinstance(table, exp.Table) and isinstance(table.this, exp.Identifier):
                column = "*" if one.name.endswith("*") else exp.to_column(one.name, dialect=DIALECT).name
                found.add((named(table, self.tables.default), column))
            elif isinstance(table, exp.Placeholder):                   # of a query around it, or of a function's rows
                found |= self._elsewhere(exp.to_column(one.name, dialect=DIALECT), scopes, 0)
            elif isinstance(table, exp.Table):
                found |= self._inside(table, scopes, 0)
        return frozenset(found)

    def _elsewhere(self, column: exp.Column, scopes: Sequence[Scope], depth: int) -> set[Column]:
        """A column that lineage() did not find: of the only source that has this name, or this column."""
        for scope in reversed(scopes):
            for name, source in scope.sources.items():
                plain = isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier)
                whole = not column.table and name == column.name
                if column.table == name or whole or (not column.table and column.name in self._outputs(source)):
                    if plain:
                        return {(named(source, self.tables.default), "*" if whole else column.name)}
                    if isinstance(source, exp.Table):
                        return self._inside(source, scopes, depth)
                    if isinstance(source.expression, exp.Query):
                        if whole or column.name not in source.expression.named_selects:
                            continue
                        inner = lineage(column.name, source.expression, self.tables.mapping, dialect=DIALECT, scope=source,
                                        trim_selects=False)
                        return set(self._leaves(inner, scopes[:-1])) if depth < DEPTH else set()
                    return self._inside(source.expression, scopes, depth)
        return set()

    def _inside(self, rows: exp.Expr, scopes: Sequence[Scope], depth: int) -> set[Column]:
        """What the arguments of a function that stands for a table name."""
        if depth >= DEPTH:
            return set()
        return set().union(*(self._elsewhere(column, scopes, depth + 1) for column in rows.find_all(exp.Column)))

    def _look(self, tree: exp.Query, but: str | None) -> None:
        """Tables read, and names that are not there."""
        for scope in traverse_scope(tree):
            for source in scope.sources.values():
                if isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier):
                    name = named(source, self.tables.default)
                    if name != but and (name in self.tables.columns or not source.name.startswith("pg_")):
                        self.found.reads.add(name)
                    self._seen(source, name)
            for column in scope.columns:
                self._column(column, scope)

    def _seen(self, table: exp.Table, name: str) -> None:
        if name not in self.tables.columns:
            known = [other for other in self.tables.columns]
            self._unknown("table", table.this, name, known)

    def _column(self, column: exp.Column, scope: Scope) -> None:
        sources = _visible(scope)
        if column.table:
            source = sources.get(column.table)
            if source is None:
                self._unknown("table", column.args["table"], column.table, list(sources))
                return
            there = self._outputs(source)
        else:
            every = [self._outputs(source) for source in sources.values()]
            if column.name in sources:
                return
            there = [name for one in every for name in one]
        if there and "*" not in there and column.name not in there and column.name not in SYSTEM:
            self._unknown("column", column.this, column.name, there)

    def _outputs(self, source: exp.Table | Scope) -> Sequence[str]:
        if isinstance(source, Scope):
            query = source.expression
            return query.named_selects if isinstance(query, exp.Query) else ()
        return self._columns(named(source, self.tables.default)) if isinstance(source.this, exp.Identifier) else ()

    def _unknown(self, kind: str, identifier: Any, name: str, known: Sequence[str]) -> None:
        start = identifier.meta.get("start") if isinstance(identifier, exp.Identifier) else None
        if start is not None:
            one = Unknown(kind, name, self.at + start, tuple(dict.fromkeys(known)))
            if one not in self.found.unknown:
                self.found.unknown.append(one)


def _ctes(tree: exp.Expr) -> list[exp.CTE]:
    inside = tree.args.get("with_")
    return list(inside.expressions) if inside is not None else []


def _visible(scope: Scope) -> dict[str, exp.Table | Scope]:
    """The sources a column may be of, those of the queries around it behind its own."""
    found: dict[str, exp.Table | Scope] = {}
    at: Scope | None = scope
    while at is not None:
        for name, (_, source) in at.selected_sources.items():
            found.setdefault(name, source)
        at = at.parent if at.is_subquery or at.is_udtf or at.is_derived_table else None
    return found


def _assigned(expressions: Iterable[exp.Expr]) -> Iterator[tuple[str, exp.Expr]]:
    """SET a = x, (b, c) = (y, z) or (SELECT y, z): each column with its value."""
    for one in expressions:
        if not isinstance(one, exp.EQ):
            continue
        left, right = one.this, one.expression
        if not isinstance(left, exp.Tuple):
            yield left.name, _no_default(right)
        elif isinstance(right, exp.Subquery):
            for n, column in enumerate(left.expressions):
                inner = right.copy()
                inner.this.set("expressions", [inner.this.selects[n]])
                yield column.name, inner
        else:
            for column, value in zip(left.expressions, right.expressions, strict=False):
                yield column.name, _no_default(value)


def _no_default(value: exp.Expr) -> exp.Expr:
    bare = isinstance(value, exp.Column) and not value.table and value.name == "default" and not value.this.quoted
    return exp.Null() if bare else value


def _from(tree: exp.Expr, values: Sequence[exp.Expr]) -> exp.Select:
    """SELECT the values FROM what an UPDATE, DELETE or MERGE is over."""
    others = list(tree.args.get("using") or ()) if isinstance(tree, exp.Delete) else [
        one for one in (tree.args.get("using"), tree.args["from_"].this if tree.args.get("from_") else None) if one]
    where, on = tree.args.get("where"), tree.args.get("on")
    joins: list[exp.Join] = []
    for other in others:
        inner = other.args.get("joins") or []
        plain = other.copy()
        plain.set("joins", None)
        joins += [exp.Join(this=plain, kind="cross"), *(join.copy() for join in inner)]
    return exp.Select(expressions=[value.copy() for value in values], from_=exp.From(this=tree.this.copy()), joins=joins,
                      where=where.copy() if where else exp.Where(this=on.copy()) if on else None)


def _aliased(value: exp.Expr, n: int) -> exp.Expr:
    return value.copy() if isinstance(value, (exp.Star, exp.Alias)) or value.is_star else exp.alias_(value.copy(), f"v{n}")


def _with(query: exp.Query, ctes: Sequence[exp.CTE]) -> Any:
    query = query.copy()
    if ctes:
        query.set("with_", exp.With(expressions=[*(cte.copy() for cte in ctes), *_ctes(query)]))
    return query


def _reads_itself(tree: exp.Expr) -> bool:
    """Whether an UPDATE or MERGE looks at its target elsewhere, too."""
    name = tree.this.name
    return sum(table.name == name for table in tree.find_all(exp.Table)) > 1


def _output(one: exp.Expr) -> str:
    """The name Postgres gives an output column; "" where qualify knows it as well."""
    if isinstance(one, (exp.Alias, exp.Column, exp.Dot)):
        return ""
    if isinstance(one, exp.Cast):
        return _output(one.this) or one.this.alias_or_name or str(one.to.sql(dialect=DIALECT)).lower()
    if isinstance(one, exp.Anonymous):
        return str(one.this).lower()
    if isinstance(one, exp.Window):
        return _output(one.this)
    if isinstance(one, exp.Subquery):
        inner = one.this.selects[0]
        return _output(inner) or inner.alias_or_name
    if isinstance(one, exp.Case):
        return "case"
    return one.sql_name().lower() if isinstance(one, exp.Func) and not isinstance(one, exp.Binary) else "?column?"
