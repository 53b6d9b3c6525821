"""Groups: which rows of a SELECT a changed row of one of its tables can touch.

    Select("select customer_id, sum(total) from orders group by 1", …).outputs("public.orders", "customer_id")
        ->  {"customer_id"}: a change of an order with customer_id 7 touches rows whose customer_id is 7, and no others

Where that cannot be shown it is refused, with the reason. sqlglot parses; the proof goes scope by scope: a column
"carries" the group when every row of a scope that the change can touch holds the group's value in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, build_scope

Name = tuple[str, str]                                                 # schema, table
Class = frozenset[tuple[str, str]]                                     # (source, column) that are equal in every row


class Cannot(Exception):
    """Why it cannot be shown."""


@dataclass(frozen=True)
class Functions:
    """What is known of functions, in lower case. sets: they return several rows; opaque: they may read tables."""

    aggregates: frozenset[str] = frozenset()
    sets: frozenset[str] = frozenset()
    opaque: frozenset[str] = frozenset()


def parse(text: str) -> exp.Query:
    """A SELECT as sqlglot's tree. Raises Cannot."""
    try:
        tree = sqlglot.parse_one(text, dialect="postgres")
    except (SqlglotError, RecursionError) as error:
        raise Cannot(f"sqlglot cannot parse it: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, exp.Query):
        raise Cannot("it is no SELECT")
    return tree


def tables(tree: exp.Query) -> set[tuple[str, str]]:
    """The tables that it names, (schema or "", name), without its own CTEs' names."""
    own = {cte.alias for cte in tree.find_all(exp.CTE)}
    return {(table.db, table.name) for table in tree.find_all(exp.Table)
            if table.name and (table.db or table.name not in own)}


@dataclass
class Select:
    """A parsed SELECT whose columns are all resolved. schema: where unqualified names point; columns: of all tables."""

    tree: exp.Query
    schema: str
    columns: Mapping[Name, Mapping[str, str]]
    functions: Functions = field(default_factory=Functions)

    def __post_init__(self) -> None:
        known: dict[str, object] = {}
        for schema in {schema for schema, _ in self.columns}:
            known[schema] = {table: dict(columns) for (of, table), columns in self.columns.items() if of == schema}
        try:
            qualified = qualify(self.tree.copy(), dialect="postgres", schema=known, db=self.schema,
                                quote_identifiers=False, identify=False)
            root = build_scope(qualified)
        except (SqlglotError, RecursionError) as error:
            raise Cannot(f"sqlglot cannot resolve it: {str(error).splitlines()[0]}") from error
        if root is None:
            raise Cannot("sqlglot finds no SELECT in it")
        self.root: Scope = root

    def outputs(self, table: Name, column: str) -> frozenset[str]:
        """The output columns that carry the groups of this column of a table. Raises Cannot."""
        if any(one.args.get("recursive") for one in self.root.expression.find_all(exp.With)):
            raise Cannot("it is recursive")
        for one in self.root.expression.find_all(exp.Func):
            if _function(one) in self.functions.opaque:
                raise Cannot(f"{_function(one)}() is not IMMUTABLE: it may read tables")
        trace = _Trace(table, column, self.functions)
        found = trace.scope(self.root)
        if found is None:
            raise Cannot(f"the SELECT does not read {table[1]}")
        every = [one for one in self.root.expression.find_all(exp.Table) if (one.db, one.name) == table]
        if len(trace.met) != len(every):
            raise Cannot(f"it reads {table[1]} where that cannot be followed")
        return found

    def tells_apart(self, key: Iterable[str]) -> bool:
        """True when its form alone tells that no two of its rows have the same key."""
        select, key = self.root.expression, set(key)
        if not isinstance(select, exp.Select) or _makes_rows(select, self.functions):
            return False
        outputs = {one.alias_or_name: one.unalias() for one in select.selects}
        in_key = [one for name, one in outputs.items() if name in key]
        group, distinct = select.args.get("group"), select.args.get("distinct")
        if group is not None and _plain(group):
            return all(one in in_key for one in group.expressions)
        if distinct is not None and distinct.args.get("on") is not None:
            return all(one in in_key for one in _distinct_on(select))
        return distinct is not None and set(outputs) <= key


class _Trace:
    """One table's column, followed through all scopes. met: where the table was read and could be followed."""

    def __init__(self, table: Name, column: str, functions: Functions) -> None:
        self.table, self.column, self.functions = table, column, functions
        self.met: set[int] = set()
        self.known: dict[int, frozenset[str] | None] = {}

    def scope(self, scope: Scope) -> frozenset[str] | None:
        """The output columns that carry the group; None when nothing of the scope depends on the table."""
        at = id(scope)                                                 # a CTE may be named more than once
        if at not in self.known:
            self.known[at] = self._set(scope) if scope.set_operation_scopes else self._select(scope)
        return self.known[at]

    def _set(self, scope: Scope) -> frozenset[str] | None:
        """UNION, EXCEPT, INTERSECT: the same position in every part that depends on it."""
        positions: set[int] | None = None
        names: list[str] = []
        for part in scope.set_operation_scopes:
            found = self.scope(part)
            mine = part.expression.named_selects if isinstance(part.expression, exp.Query) else []
            names = names or mine
            if found is not None:
                here = {n for n, name in enumerate(mine) if name in found}
                positions = here if positions is None else positions & here
        if positions is None:
            return None
        self._no_limit(scope.expression)
        if not positions:
            raise Cannot(f"the parts of its {type(scope.expression).__name__.upper()} do not have {self.column} in "
                         "the same column")
        return frozenset(names[n] for n in positions)

    def _select(self, scope: Scope) -> frozenset[str] | None:
        select = scope.expression
        if not isinstance(select, exp.Select):
            if any((one.db, one.name) == self.table for one in select.find_all(exp.Table)):
                raise Cannot("it is no plain SELECT")
            return None
        for inner in (*scope.subquery_scopes, *scope.udtf_scopes):
            if self._depends(inner):
                raise Cannot(f"a subquery reads {self.table[1]}; make it a join")
        carries = {}
        for alias, (_, source) in scope.selected_sources.items():
            found = self._source(source)
            if found is not None:
                carries[alias] = found
        if not carries:
            return None
        self._no_limit(select)
        classes = self._classes(scope, carries)
        why = Cannot(f"its rows are not told apart by {self.column}")
        outputs: set[str] = set()
        for one in classes:
            try:
                outputs |= self._through(scope, select, one)
            except Cannot as reason:
                why = reason
        if not outputs:
            raise why
        return frozenset(outputs)

    def _source(self, source: exp.Table | Scope) -> frozenset[str] | None:
        if isinstance(source, Scope):
            return self.scope(source)
        if (source.db, source.name) != self.table:
            return None
        if source.args.get("sample") or source.args.get("joins"):
            raise Cannot("it takes a sample, or joins in parentheses")
        self.met.add(id(source))
        return frozenset((self.column,))

    def _depends(self, scope: Scope) -> bool:
        inside = any((one.db, one.name) == self.table for one in scope.expression.find_all(exp.Table))
        return inside or any(isinstance(source, Scope) and source is not scope and self._depends(source)
                             for source in scope.sources.values())

    # --- one SELECT

    def _classes(self, scope: Scope, carries: Mapping[str, frozenset[str]]) -> list[Class]:
        """Columns that hold the group's value in each row that a change can touch, whichever source it came by."""
        select = scope.expression
        joins = select.args.get("joins") or []
        optional: dict[str, exp.Join] = {}
        equal: list[tuple[exp.Column, exp.Column]] = list(_equalities(select.args.get("where")))
        for join in joins:
            side, alias = (join.side or "").upper(), join.alias_or_name
            if side in ("RIGHT", "FULL") or join.method or join.args.get("using"):
                raise Cannot(f"it has a {side or join.method or 'natural'} join; write it as a left join")
            if join.this.args.get("joins"):
                raise Cannot("it joins in parentheses")
            if isinstance(join.this, exp.Lateral) and self._named(join.this):
                raise Cannot("it reads the table in a lateral join")
            if side == "LEFT":
                optional[alias] = join
            else:
                equal += _equalities(join.args.get("on"))
        groups = _union(equal)
        shared: set[Class] | None = None
        for alias, columns in carries.items():
            mine = {groups.get((alias, column), frozenset({(alias, column)})) for column in columns}
            if alias in optional:                                      # its own are null in rows without a match
                pairs = [(_col(a), _col(b)) for a, b in _equalities(optional[alias].args.get("on"))]
                held = {(alias, column) for column in columns}
                others = {b if a in held else a for a, b in pairs if (a in held) != (b in held)}
                inner = {one for one in mine if len(one) > 1}           # WHERE drops the rows without a match
                mine = inner | {groups.get(one, frozenset({one})) for one in others if one[0] not in optional}
            shared = mine if shared is None else shared & mine
        if not shared:
            raise Cannot(f"it joins without an equality on {self.column}")
        return sorted(shared, key=sorted)

    def _named(self, node: exp.Expr) -> bool:
        return any((one.db, one.name) == self.table for one in node.find_all(exp.Table))

    def _through(self, scope: Scope, select: exp.Select, held: Class) -> set[str]:
        """Grouping, windows and DISTINCT keep to the group; the outputs that hold its value."""
        group = select.args.get("group")
        if group is not None:
            if not _plain(group):
                raise Cannot("it groups by ROLLUP, CUBE or GROUPING SETS")
            if not any(_is(one, held) for one in group.expressions):
                raise Cannot(f"it does not group by {self.column}")
        elif select.args.get("having") or any(self._aggregate(node) for node in _own(select)):
            raise Cannot("it aggregates without GROUP BY: every change touches the one row")
        named = {window.alias_or_name: window for window in select.args.get("windows") or []}
        for node in _own(select):
            if isinstance(node, exp.Window) and node not in named.values():
                parts = node.args.get("partition_by")
                known = named.get(node.alias or "") or named.get(str(node.args.get("alias") or ""))
                parts = parts or (known.args.get("partition_by") if known is not None else None) or []
                if not any(_is(one, held) for one in parts):
                    raise Cannot(f"a window function goes across groups: it has no PARTITION BY {self.column}")
        on = _distinct_on(select)
        if on and not any(_is(one, held) for one in on):
            raise Cannot(f"its DISTINCT ON does not name {self.column}")
        outputs = {one.alias_or_name for one in select.selects if _is(one.unalias(), held)}
        if not outputs:
            raise Cannot(f"{self.column} is none of its columns")
        return outputs

    def _aggregate(self, node: exp.Expr) -> bool:
        if isinstance(node.parent, exp.Window) or isinstance(node.parent, exp.Filter | exp.WithinGroup) \
                and isinstance(node.parent.parent, exp.Window):
            return False
        return isinstance(node, exp.AggFunc) or _function(node) in self.functions.aggregates

    def _no_limit(self, query: exp.Expr) -> None:
        if query.args.get("limit") or query.args.get("offset") or query.args.get("fetch"):
            raise Cannot("it has a LIMIT or OFFSET")


def _own(select: exp.Expr) -> Iterator[exp.Expr]:
    """The nodes of this SELECT, without those of subqueries and CTEs."""
    for key, value in select.args.items():
        if key in ("with", "with_"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, exp.Expr):
                yield from _walk(child)


def _walk(node: exp.Expr) -> Iterator[exp.Expr]:
    if isinstance(node, exp.Query):
        return
    yield node
    for child in node.iter_expressions():
        yield from _walk(child)


def _function(node: exp.Expr) -> str:
    if isinstance(node, exp.Anonymous):
        return node.name.lower()
    return node.sql_name().lower() if isinstance(node, exp.Func) and not isinstance(node, exp.And | exp.Or) else ""


def _plain(group: exp.Group) -> bool:
    return not any(group.args.get(name) for name in ("rollup", "cube", "grouping_sets", "all", "totals"))


def _distinct_on(select: exp.Select) -> list[exp.Expr]:
    """What DISTINCT ON names, output columns as what they are made of."""
    distinct = select.args.get("distinct")
    on = distinct.args.get("on") if distinct is not None else None
    if on is None:
        return []
    outputs = {one.alias_or_name: one.unalias() for one in select.selects}
    return [outputs.get(one.name, one) if isinstance(one, exp.Column) and not one.table else one
            for one in (on.expressions if isinstance(on, exp.Tuple) else [on])]


def _makes_rows(select: exp.Select, functions: Functions) -> bool:
    """Whether a function in its columns may make several rows of one."""
    made = exp.Unnest | exp.Explode | exp.GenerateSeries
    return any(isinstance(node, made) or _function(node) in functions.sets
               for one in select.selects for node in _walk(one))


def _col(column: exp.Column) -> tuple[str, str]:
    return column.table, column.name


def _is(node: exp.Expr, held: Class) -> bool:
    return isinstance(node, exp.Column) and _col(node) in held


def _equalities(node: exp.Expr | None) -> Iterator[tuple[exp.Column, exp.Column]]:
    """The pairs of columns that a condition makes equal: column = column, joined by AND."""
    node = node.this if isinstance(node, exp.Where | exp.Paren) else node
    if isinstance(node, exp.And):
        yield from _equalities(node.left)
        yield from _equalities(node.right)
    elif isinstance(node, exp.EQ) and isinstance(node.left, exp.Column) and isinstance(node.right, exp.Column):
        yield node.left, node.right


def _union(pairs: Iterable[tuple[exp.Column, exp.Column]]) -> dict[tuple[str, str], Class]:
    found: dict[tuple[str, str], Class] = {}
    for left, right in pairs:
        a, b = _col(left), _col(right)
        one = found.get(a, frozenset({a})) | found.get(b, frozenset({b}))
        found |= dict.fromkeys(one, one)
    return found
