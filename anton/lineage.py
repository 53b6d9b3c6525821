"""Lineage: which columns the outputs of a query come from, as sqlglot sees it, and the names in it that are not there.

    Tables({"public.orders": ["id", "total"]})    what there is to be named, as Postgres quotes it: public.orders
    Queries(…).query(tree)                        [("sum", {("public.orders", "total")}), …]

What stands in an output's expression counts: arguments, PARTITION BY, a subquery's outputs; what filters, joins and
groups rows does not. sqlread.py reads whole statements with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlglot import exp
from sqlglot.lineage import lineage
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, build_scope, traverse_scope
from sqlglot.schema import MappingSchema

from anton.columns import SYSTEM
from anton.db import quote

Column = tuple[str, str]                                               # ("public.orders", "total")
Sources = frozenset[Column]

DIALECT = "postgres"
DEPTH = 8                                                              # functions over functions over columns


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


class Queries:
    """The queries of one statement, put into a Reading. at: where the statement begins in its text."""

    def __init__(self, at: int, tables: Tables, found: Reading) -> None:
        self.at, self.tables, self.found = at, tables, found

    def query(self, tree: exp.Query, but: str | None = None) -> list[tuple[str, Sources]]:
        """Notes what it reads; its outputs in order. but: a table that is there as the target alone."""
        for table in tree.find_all(exp.Table):
            table.set("catalog", None)
        names = [_output(one) for one in tree.selects] if not tree.is_star else []
        tree = qualify(tree, dialect=DIALECT, db=self.tables.default, schema=self.tables.mapping,
                       allow_partial_qualification=True, validate_qualify_columns=False, quote_identifiers=False)
        self._look(tree, but)
        for lateral in list(tree.find_all(exp.Lateral)):               # lineage() reads plain subqueries better
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
            table = one.expression
            if not isinstance(table, exp.Table):
                for row in table.find_all(exp.TableColumn):            # a whole row: row_to_json(o)
                    found |= self._elsewhere(exp.column(row.this), scopes, 0)
            if one.downstream:
                continue
            if isinstance(table, exp.Table) and isinstance(table.this, exp.Identifier):
                name = "*" if one.name.endswith("*") else exp.to_column(one.name, dialect=DIALECT).name
                found.add((named(table, self.tables.default), name))
            elif isinstance(table, exp.Placeholder):                   # of a query around it, or of a function's rows
                column = exp.to_column(one.name, dialect=DIALECT)
                found |= self._elsewhere(column, scopes, 0) if isinstance(column, exp.Column) else set()
            elif isinstance(table, exp.Table):
                found |= self._inside(table, scopes, 0)
        return frozenset(found)

    def _elsewhere(self, column: exp.Column, scopes: Sequence[Scope], depth: int) -> set[Column]:
        """A column that lineage() did not find: of the only source that has this name, or this column."""
        for scope in reversed(scopes):
            for name, source in scope.sources.items():
                whole = not column.table and name == column.name
                if column.table == name or whole or (not column.table and column.name in self._outputs(source)):
                    if isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier):
                        return {(named(source, self.tables.default), "*" if whole else column.name)}
                    if isinstance(source, exp.Table):
                        return self._inside(source, scopes, depth)
                    if isinstance(source.expression, exp.Query):
                        if whole or column.name not in source.expression.named_selects:
                            continue
                        inner = lineage(column.name, source.expression, self.tables.mapping, dialect=DIALECT,
                                        scope=source, trim_selects=False)
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
                    self.seen(source, name)
            for column in scope.columns:
                self._column(column, scope)

    def seen(self, table: exp.Table, name: str) -> None:
        if name not in self.tables.columns:
            known = list(self.tables.columns)
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
        return self.columns(named(source, self.tables.default)) if isinstance(source.this, exp.Identifier) else ()

    def _unknown(self, kind: str, identifier: Any, name: str, known: Sequence[str]) -> None:
        start = identifier.meta.get("start") if isinstance(identifier, exp.Identifier) else None
        if start is not None:
            one = Unknown(kind, name, self.at + start, tuple(dict.fromkeys(known)))
            if one not in self.found.unknown:
                self.found.unknown.append(one)

    def name(self, table: exp.Expr) -> str:
        found = table if isinstance(table, exp.Table) else table.find(exp.Table)
        assert found is not None
        name = named(found, self.tables.default)
        self.seen(found, name)
        return name

    def columns(self, table: str) -> Sequence[str]:
        return self.tables.columns.get(table, ())

    def target(self, table: str, column: exp.Expr) -> None:
        there = self.columns(table)
        if there and column.name not in there:
            self._unknown("column", column.this if isinstance(column, exp.Column) else column, column.name, there)


def named(table: exp.Table, default: str) -> str:
    """ "public.orders", quoted where that is needed."""
    return f"{quote(table.db or default)}.{quote(table.name)}"


def _visible(scope: Scope) -> dict[str, exp.Table | Scope]:
    """The sources a column may be of, those of the queries around it behind its own."""
    found: dict[str, exp.Table | Scope] = {}
    at: Scope | None = scope
    while at is not None:
        for name, (_, source) in at.selected_sources.items():
            found.setdefault(name, source)
        at = at.parent if at.is_subquery or at.is_udtf or at.is_derived_table else None
    return found


def _output(one: exp.Expr) -> str:
    """The name Postgres gives an output column; "" where qualify knows it as well."""
    if isinstance(one, (exp.Alias, exp.Column, exp.Dot)):
        return ""
    if isinstance(one, exp.Cast):
        return _output(one.this) or one.this.alias_or_name or str(one.to.sql(dialect=DIALECT)).lower()
    if isinstance(one, exp.Anonymous):
        return str(one.this).lower()
    if isinstance(one, (exp.Window, exp.Filter, exp.WithinGroup, exp.Paren)):
        return _output(one.this)
    if isinstance(one, exp.Subquery):
        inner = one.this.selects[0]
        return _output(inner) or inner.alias_or_name
    if isinstance(one, exp.Case):
        return "case"
    if isinstance(one, exp.CurrentTimestamp):                          # now() is read as the same
        return "now"
    if isinstance(one, exp.Func) and not isinstance(one, exp.Binary):  # sqlglot has names of its own: GROUP_CONCAT
        word = re.match(r"\w+", one.sql(dialect=DIALECT))
        return word[0].lower() if word else "?column?"
    return "?column?"
