"""Sqlread: what a text of SQL does, read by sqlglot: tables read, written and made, which column comes from which.

    columns("select sum(total) as sum from orders", tables)  ->  {"sum": {("public.orders", "total")}}
    read("insert into big (id) select id from new_records", tables, "public.orders")  ->  a Reading

What sqlglot does not understand is read at table level, and the Reading's warnings say so; nothing here raises. {name}
stands for a bound value: it is text that is never looked into. Importing this takes some 0.3 s, so commands import it
only when there is SQL to read: edges.sqlread().
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers

from anton.lineage import DIALECT, Column, Queries, Reading, Sources, Tables, named

RECORDS = ("new_records", "old_records")
NOTHING = Tables({})
MOST_TUPLES = 100                                                      # of VALUES: the others are like these
logging.getLogger("sqlglot").setLevel(logging.CRITICAL)                # it warns of what the Reading's warnings say

_WRITES = (("new", r"\binsert\s+into\s+([\w.\"]+)"),
           ("updated", r"\bupdate\s+(?:only\s+)?([\w.\"]+)\s+(?:as\s+\w+\s+|(?!set\b)\w+\s+)?set\b"),
           ("deleted", r"\bdelete\s+from\s+(?:only\s+)?([\w.\"]+)"),
           ("truncate", r"\btruncate\s+(?:table\s+)?(?:only\s+)?([\w.\"]+)"),
           ("rebuilt", r"\brefresh\s+materialized\s+view\s+(?:concurrently\s+)?([\w.\"]+)"))
_READS = r"(?<!\bdelete\s)\b(?:from|join|using)\s+(?:only\s+)?([a-z_\"][\w.\"]*)(?!\s*\()"
_QUIET = re.compile(r"\s*(?:create\s+(?:policy|extension|type|domain|role|schema)|alter|grant|revoke|comment|set|reset"
                    r"|drop)\b", re.IGNORECASE)                             # they neither read nor write a record
_BLANK = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'", re.DOTALL)
_PIECE = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|(\$\w*\$).*?\1|\{([A-Za-z_]\w*)\}",
                    re.DOTALL)


def columns(sql: str, tables: Tables) -> dict[str, set[Column]]:
    """Where each output column of a query comes from; none for what is made of nothing, such as count(*).

    A column "*" is of a table whose columns are not known. {} when it is no query, or none that sqlglot understands.
    """
    return {name: set(sources) for name, sources in read(sql, tables).outputs.items()}


@lru_cache(maxsize=4096)
def read(text: str, tables: Tables, records: str | None = None) -> Reading:
    """Reads SQL, one or more statements. records: the table that new_records and old_records are of."""
    found, plain = Reading(), hidden(text)
    for start, end in split(plain):
        _Statement(plain[start:end], start, plain.count("\n", 0, start), tables, records, found).read()
    return found


def split(text: str) -> list[tuple[int, int]]:
    """Where each statement begins and ends, without comments around it and its semicolon."""
    try:
        tokens = sqlglot.tokenize(text, read=DIALECT)
    except SqlglotError:                                               # a string without its end, and the like
        return [(0, len(text))]
    found: list[tuple[int, int]] = []
    start: int | None = None
    for token in tokens:
        if token.token_type is sqlglot.TokenType.SEMICOLON:
            start = None
        elif start is None:
            start = token.start
            found.append((start, token.end + 1))
        else:
            found[-1] = start, token.end + 1
    return found


def hidden(text: str) -> str:
    """The text with a literal of the same length for each {name}; in strings and comments braces are braces."""
    return _PIECE.sub(lambda piece: f"'{piece[2]}'" if piece[2] else piece[0], text)


def written(text: str) -> Iterator[tuple[str, str]]:
    """Tables behind INSERT INTO, UPDATE … SET, DELETE FROM and the like, in words alone: (name, op)."""
    plain = _BLANK.sub(" ", text)
    for op, pattern in _WRITES:
        for name in re.findall(pattern, plain, re.IGNORECASE):
            yield name, op


class _Statement(Queries):
    """One statement, put into a Reading. at: where it begins in the text, line: on which line, from 0."""

    def __init__(self, text: str, at: int, line: int, tables: Tables, records: str | None, found: Reading) -> None:
        super().__init__(at, tables, found)
        self.text, self.line = text, line
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
        except Exception as error:                                     # sqlglot's trouble is no error of the app
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
        if self.records is None:
            return
        for table in tree.find_all(exp.Table):
            if table.name in RECORDS and not table.db and table.name not in own:
                if not table.alias:
                    table.set("alias", exp.TableAlias(this=exp.to_identifier(table.name)))
                table.set("this", self.records.this.copy())
                table.set("db", exp.to_identifier(self.records.db or self.tables.default, quoted=True))

    def _calls(self, tree: exp.Expr) -> None:
        for call in tree.find_all(exp.Anonymous):
            if isinstance(call.this, str):
                self.found.calls.add(call.this.lower())

    # Statements

    def _any(self, tree: exp.Expr) -> None:
        if isinstance(tree, exp.Query):
            self._inner_writes(tree)
            into = tree.args.get("into")
            outputs = self.query(tree)
            if into is not None:
                self._made(into.this, "table", [name for name, _ in outputs], outputs)
            else:
                for name, sources in outputs:                          # a name may come twice
                    self.found.outputs[name] = self.found.outputs.get(name, frozenset()) | sources
        elif isinstance(tree, (exp.Insert, exp.Update, exp.Delete, exp.Merge)):
            self._inner_writes(tree)
            self._write(tree, _ctes(tree))
        elif isinstance(tree, exp.Create):
            self._create(tree)
        elif isinstance(tree, exp.TruncateTable):
            self.found.writes |= {(self.name(table), "truncate") for table in tree.expressions}
        elif isinstance(tree, exp.Copy):
            self._copy(tree)

    def _copy(self, tree: exp.Copy) -> None:
        inner = tree.this
        if isinstance(inner, exp.Subquery):
            self.query(inner.this)
        elif tree.args.get("kind"):
            self.found.writes.add((self.name(inner), "new"))
        else:
            self.found.reads.add(self.name(inner))

    def _create(self, tree: exp.Create) -> None:
        kind, what, query = str(tree.args["kind"]).lower(), tree.this, tree.expression
        table = what.find(exp.Table) if isinstance(what, (exp.Schema, exp.UserDefinedFunction)) else what
        if not isinstance(table, exp.Table):                           # an index, a trigger
            return
        if kind in ("view", "table") and isinstance(query, exp.Query):
            names = [one.name for one in what.expressions] if isinstance(what, exp.Schema) else []
            self._inner_writes(query)
            self._made(table, kind, names, self.query(query))
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
        target, assigned = self.name(table), []
        if isinstance(tree, exp.Update):
            self.found.writes.add((target, "updated"))
            assigned = list(_assigned(tree.expressions))
        elif isinstance(tree, exp.Delete):
            self.found.writes.add((target, "deleted"))
        elif isinstance(tree, exp.Merge):
            assigned = list(self._whens(tree, target))
        values = [_aliased(value, n) for n, (_, value) in enumerate(assigned)]
        select = _with(_from(tree, values or [exp.Literal.number(1)]), ctes)
        outputs = self.query(select, but=target if not _reads_itself(tree) else None)
        for (column, _), (_, sources) in zip(assigned, outputs, strict=False):
            self.target(target, column)
            self._fill(target, column.name, sources)

    def _whens(self, tree: exp.Merge, target: str) -> Iterator[tuple[exp.Expr, exp.Expr]]:
        for when in tree.args["whens"].expressions:
            then = when.args["then"]
            if isinstance(then, exp.Update):
                self.found.writes.add((target, "updated"))
                yield from _assigned(then.expressions)
            elif isinstance(then, exp.Insert):
                self.found.writes.add((target, "new"))
                names = list(then.this.expressions) if then.this else [
                    exp.to_identifier(name) for name in self.columns(target)]
                values = then.expression.expressions if then.expression else []
                yield from zip(names, values, strict=False)
            elif then.name.lower() == "delete":
                self.found.writes.add((target, "deleted"))

    def _insert(self, tree: exp.Insert, ctes: Sequence[exp.CTE]) -> None:
        table = tree.this.this if isinstance(tree.this, exp.Schema) else tree.this
        target = self.name(table)
        self.found.writes.add((target, "new"))
        names = self.columns(target)
        if isinstance(tree.this, exp.Schema):
            names = [one.name for one in tree.this.expressions]
            for one in tree.this.expressions:
                self.target(target, one)
        source = tree.expression
        tuples = source.expressions[:MOST_TUPLES] if isinstance(source, exp.Values) else []
        queries: list[exp.Query] = [exp.Select(expressions=list(one.expressions)) for one in tuples] or (
            [source] if isinstance(source, exp.Query) else [])
        for query in queries:
            for name, (_, sources) in zip(names, self.query(_with(query, ctes)), strict=False):
                self._fill(target, name, sources)
        conflict = tree.args.get("conflict")
        if conflict is not None and conflict.expressions:
            self.found.writes.add((target, "updated"))
            assigned = list(_assigned(conflict.expressions))
            offered = exp.Table(this=table.this.copy(), db=table.args.get("db"), alias=exp.TableAlias(
                this=exp.to_identifier("excluded")))
            select = exp.Select(expressions=[_aliased(value, n) for n, (_, value) in enumerate(assigned)],
                                from_=exp.From(this=table.copy()), joins=[exp.Join(this=offered, kind="cross")])
            own = {name: self.found.fills.get((target, name), frozenset()) for name in names}
            outputs = self.query(_with(select, ctes), but=target)
            for (column, value), (_, sources) in zip(assigned, outputs, strict=False):
                taken = {one.name for one in value.find_all(exp.Column) if one.table == "excluded"}
                kept = {one.name for one in value.find_all(exp.Column) if one.table != "excluded"}
                mine = {(t, c) for t, c in sources if t != target or c in kept}
                self.target(target, column)
                self._fill(target, column.name, frozenset(mine).union(*(own.get(name, frozenset()) for name in taken)))

    def _returned(self, tree: exp.Expr) -> exp.Select:
        returning = tree.args.get("returning")
        values = list(returning.expressions) if returning is not None else [exp.Literal.number(1)]
        if isinstance(tree, exp.Insert):
            table = tree.this.this if isinstance(tree.this, exp.Schema) else tree.this
            return exp.Select(expressions=values, from_=exp.From(this=table.copy()))
        return _from(tree, values)

    def _fill(self, table: str, column: str, sources: Sources) -> None:
        self.found.fills[table, column] = self.found.fills.get((table, column), frozenset()) | sources


def _ctes(tree: exp.Expr) -> list[exp.CTE]:
    inside = tree.args.get("with_")
    return list(inside.expressions) if inside is not None else []


def _assigned(expressions: Iterable[exp.Expr]) -> Iterator[tuple[exp.Expr, exp.Expr]]:
    """SET a = x, (b, c) = (y, z) or (SELECT y, z): each column with its value."""
    for one in expressions:
        if not isinstance(one, exp.EQ):
            continue
        left, right = one.this, one.expression
        if not isinstance(left, exp.Tuple):
            yield left, _no_default(right)
        elif isinstance(right, exp.Subquery):
            for n, column in enumerate(left.expressions):
                inner = right.copy()
                inner.this.set("expressions", [inner.this.selects[n]])
                yield column, inner
        else:
            for column, value in zip(left.expressions, right.expressions, strict=False):
                yield column, _no_default(value)


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
    return exp.Select(expressions=[value.copy() for value in values], from_=exp.From(this=tree.this.copy()),
                      joins=joins, where=where.copy() if where else exp.Where(this=on.copy()) if on else None)


def _aliased(value: exp.Expr, n: int) -> exp.Expr:
    plain = isinstance(value, (exp.Star, exp.Alias)) or value.is_star
    return value.copy() if plain else exp.alias_(value.copy(), f"v{n}")


def _with(query: exp.Query, ctes: Sequence[exp.CTE]) -> Any:
    query = query.copy()
    if ctes:
        query.set("with_", exp.With(expressions=[*(cte.copy() for cte in ctes), *_ctes(query)]))
    return query


def _reads_itself(tree: exp.Expr) -> bool:
    """Whether an UPDATE or MERGE looks at its target elsewhere, too."""
    name = tree.this.name
    return len([table for table in tree.find_all(exp.Table) if table.name == name]) > 1


