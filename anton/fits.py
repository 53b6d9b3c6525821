"""Fits: whether a component can be wired to a table: its fields, their types, what they mean. For migrate.

A component says inputs(), the fields that it reads, outputs(), the fields of the rows that it makes, and told(), the
fields that it gives to a model. Each is compared with the models of its tables; a Table without a model takes all.

What a number may become is what Pydantic takes and no digit is lost by: int -> float, Decimal; float -> Decimal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anton import sqlfile
from anton.app import App
from anton.columns import Kind, kind_of
from anton.component import Component
from anton.db import Conn, Database, quote, split_name
from anton.edges import read, sqlread
from anton.errors import Miswired, near
from anton.handler import Handler
from anton.meaning import Meaning, meanings, of_model
from anton.poll import Poll
from anton.schedule import Schedule
from anton.table import Table

ANY = Kind("any type")
RECORD = "anton_record"  # stands for the record whose values are bound
_SOURCE = re.compile(r'\b(?:from|join)\s+(?:"?\w+"?\.)?"?(\w+)"?(?:\s+(?:as\s+)?(?!(?:where|order|group|limit|join|'
                     r'left|right|inner|full|cross|natural|on|using|for|window|having|union|fetch|offset)\b)(\w+))?',
                     re.IGNORECASE)
_LESSONS = re.compile(r"\blessons\s*\(", re.IGNORECASE)
_LIST = re.compile(r"\s*\(")
_BOUND = re.compile(r"'(?:[^']|'')*'|--[^\n]*|\{([A-Za-z_]\w*)\}")
_TAKES = {"bigint": ("bigint",), "double precision": ("bigint", "double precision"),
          "numeric": ("bigint", "double precision", "numeric")}
_PYTHON = {"bigint": "int", "double precision": "float", "numeric": "Decimal"}

Personal = Mapping[str, set[str]]                                      # columns that are PII, by table or view


async def check_app(app: App, db: Database, conn: Conn, schema: str) -> list[Miswired]:
    """What is wrong with all that are components. schema: of unqualified names."""
    used = any(isinstance(handler.component, Component) for handler in app.handlers.values())
    files = [*sqlfile.read(app.folder / "migrations"), *sqlfile.read(app.folder / "sql")]
    views = personal_views(app.tables.values(), await db.call(conn, "relations"),
                           [file.text for file in files if not file.kind], schema) if used else {}
    return [*(wrong for handler in app.handlers.values() for wrong in check(handler, app.tables, views)),
            *(wrong for schedule in app.schedules.values() for wrong in check_poll(schedule))]


def check(handler: Handler, tables: Mapping[str, Table[Any]], views: Personal | None = None) -> list[Miswired]:
    """What is wrong with a handler that is a component. tables: the app's, by name: context from SQL reads them.

    views: personal_views().
    """
    component = handler.component
    if not isinstance(component, Component):
        return []
    wrong = [*_reads(component, handler.table)]
    into = getattr(component, "into", None) if component.acts else None  # its sender writes there
    for table in handler.into or ([into] if into is not None else []):
        wrong += _makes(component, handler.table, table)
    if not component.allow_pii:
        of = {f'Table("{table.name}")': (table.name, _personal(table)) for table in tables.values()}
        of |= {f'view "{name}"': (name, columns) for name, columns in (views or {}).items()}
        wrong += _tells(component, handler.table, of)
    return [Miswired(handler.name, component.name, component.place, line) for line in wrong]


def check_poll(schedule: Schedule) -> list[Miswired]:
    """The same of a component that is polled."""
    poll = getattr(schedule.fn, "__self__", None)
    component = schedule.component
    if not isinstance(poll, Poll) or not isinstance(component, Component):
        return []
    return [Miswired(schedule.name, type(component).__name__, component.place, line)
            for line in _makes(component, None, poll.into)]


def personal_views(tables: Iterable[Table[Any]], relations: Iterable[Any], texts: Iterable[str],
                   schema: str) -> dict[str, set[str]]:
    """The columns of views that come from PII; of a view that cannot be read, all.

    relations: as relations() of the database says. texts: SQL of the app that makes views, perhaps not yet there.
    schema: of unqualified names.
    """
    known: dict[str, list[str]] = {row["name"]: list(row["columns"]) for row in relations}
    personal: dict[str, set[str]] = {}
    for table in tables:
        of, name = split_name(table.name)
        sql = f"{quote(of or schema)}.{quote(name)}"
        if found := _personal(table):
            personal[sql] = found
        if table.shape is not None:
            known[sql] = [column.name for column in table.shape.table_columns]
    if not personal:
        return {}
    made = sqlread().Tables(known, schema)
    fills: dict[str, dict[str, set[Any]]] = {}
    for row in relations:
        if row["query"]:
            reading = read(row["query"], made)
            fills[row["name"]] = {name: set(sources) for name, sources in reading.outputs.items()} or {
                name: {(table, "*") for table in reading.reads} for name in row["columns"]}
    for text in texts:
        reading = read(text, made)
        for (view, column), sources in reading.fills.items():
            if reading.makes.get(view) == "view":
                fills.setdefault(view, {}).setdefault(column, set()).update(sources)
                known.setdefault(view, []).append(column)
        made = sqlread().Tables(known, schema)
    views: dict[str, set[str]] = {}
    grown = True
    while grown:                                                       # views over views
        grown = False
        for view, columns in fills.items():
            found = {column for column, sources in columns.items() if any(
                personal.get(table) and (name == "*" or name in personal[table]) for table, name in sources)}
            if found - views.get(view, set()):
                views[view] = personal[view] = views.get(view, set()) | found
                grown = True
    return {view.replace('"', ""): found for view, found in views.items()}


def _reads(component: Component, table: Table[Any]) -> Iterator[str]:
    if table.shape is None:
        return
    fields = table.shape.model.model_fields
    whose = f'{table.shape.model.__name__} of Table("{table.name}")'
    for field, name in component.map.items():
        if name not in fields:
            close = near(name, fields)
            yield (f'map={{"{field}": "{name}"}}: {whose} has no field "{name}".'
                   + (f' Did you mean "{close}"?' if close else f" It has: {', '.join(fields)}."))
    for field, wanted in component.inputs().items():
        name = component.map.get(field, field)
        kind = _wanted(wanted)
        if name not in fields:
            if field not in component.map:
                yield (f'it reads "{field}" ({_said(wanted, kind)}), which {whose} has not. '
                       + _advice(component, field, wanted, table))
            continue
        have = kind_of(fields[name].annotation, fields[name].metadata)
        clash = _clash(meanings(wanted), meanings(fields[name].annotation, tuple(fields[name].metadata)))
        if not _same(kind, have):
            yield (f'it reads "{field}" as {_said(wanted, kind)}, and {whose} has "{name}" as {have.type}. '
                   + _digits(name, kind, have) + _advice(component, field, wanted, table))
        elif clash:
            yield (f'it reads "{field}" as {clash[0]}, and "{name}" of {whose} is {clash[1]}. '
                   + _advice(component, field, wanted, table))


def _advice(component: Component, field: str, wanted: Any, table: Table[Any]) -> str:
    """The map= that would fix it; else the fields there are."""
    assert table.shape is not None
    fields, kind = table.shape.model.model_fields, _wanted(wanted)
    fit = [name for name, info in fields.items() if name not in table.shape.key
           and _same(kind, kind_of(info.annotation, info.metadata))
           and not _clash(meanings(wanted), meanings(info.annotation, tuple(info.metadata)))
           and (component.allow_pii or not any(one.personal for one in of_model(table.shape.model)[name]))]
    if not fit:
        return f"No other field fits: {', '.join(fields)}."
    likely = near(field, fit) or fit[0]
    maps = {**component.map, field: likely}
    others = [name for name in fit if name != likely]
    more = f" (or {', '.join(others)})" if others else ""
    said = ", ".join(f'"{key}": "{value}"' for key, value in maps.items())
    return f"Say map={{{said}}}{more}."


def _makes(component: Component, source: Table[Any] | None, table: Table[Any]) -> Iterator[str]:
    """source: whose records it gets; None: it is polled."""
    if table.shape is None:
        return
    fields = table.shape.model.model_fields
    whose = f'{table.shape.model.__name__} of Table("{table.name}")'
    outputs = component.outputs()
    carried = _carried(component, source, table)
    if outputs and carried is not None:
        for name, info in fields.items():
            if info.is_required() and name not in outputs and name not in carried:
                close = near(name, [one for one in outputs if one not in fields])
                yield (f'{whose} needs "{name}", which nobody makes: it makes {", ".join(outputs)}'
                       + (f', and carries over {", ".join(sorted(carried))}' if carried else "") + ". "
                       + (f'Did you mean "{close}"? ' if close else "") + "Give it a default"
                       + (f', or say map={{"{name}": …}}.' if component.carries or source is None else "."))
    for name, made in outputs.items():
        if name not in fields:
            continue
        kind, have = _wanted(made), kind_of(fields[name].annotation, fields[name].metadata)
        if not _same(have, kind):
            yield (f'it makes "{name}" as {_said(made, kind)}, and {whose} has it as {have.type}. '
                   + (_digits(name, kind, have) or "Name it otherwise."))
        elif kind.nullable and not have.nullable:
            yield f'it makes "{name}", which may be None, and in {whose} it may not. Say {name}: … | None there.'
        clash = _clash(meanings(made), meanings(fields[name].annotation, tuple(fields[name].metadata)))
        if clash:
            yield f'it makes "{name}" as {clash[0]}, and in {whose} it is {clash[1]}. Name it otherwise.'
    if source is None or source.shape is None or not component.carries:
        return
    there = of_model(table.shape.model)
    for name, of in (carried or {}).items():
        if name in outputs or name not in fields:
            continue
        info = source.shape.model.model_fields[of]
        kind, have = kind_of(info.annotation, info.metadata), kind_of(fields[name].annotation, fields[name].metadata)
        if not _same(have, kind):
            yield (f'"{name}" is carried over: it is {kind.type} in {source.shape.model.__name__} of '
                   f'Table("{source.name}") and {have.type} in {whose}. '
                   + (_digits(name, kind, have) or "Name it otherwise."))
    for name, meant in of_model(source.shape.model).items():
        if name not in there or name in outputs or name in table.shape.key:
            continue
        of = f'{source.shape.model.__name__} of Table("{source.name}")'
        clash = _clash(meant, there[name])
        if clash:
            yield f'"{name}" is carried over: it is {clash[0]} in {of} and {clash[1]} in {whose}. Name it otherwise.'
        elif any(one.personal for one in meant) and not any(one.personal for one in there[name]):
            yield f'"{name}" is carried over: it is PII in {of} and not in {whose}. Say PII[…] there, too.'


def _carried(component: Component, source: Table[Any] | None, table: Table[Any]) -> dict[str, str] | None:
    """The source's fields by the names they are carried over as; None: the source has no model to say."""
    if not component.carries or source is None:
        return {}
    if source.shape is None or table.shape is None:
        return None
    fields = source.shape.model.model_fields
    names = {**{name: name for name in fields}, **{name: of for name, of in component.map.items() if of in fields}}
    return {name: of for name, of in names.items() if name not in table.shape.key}


def _tells(component: Component, table: Table[Any], every: Mapping[str, tuple[str, set[str]]]) -> Iterator[str]:
    """PII that would be given to a model. Of SQL, the columns that are named, and * of a table that has some.

    A value that is bound, {email}, reaches the model where it is selected, and not where it picks rows.
    """
    personal = _personal(table)
    for field in sorted(component.told()):
        name = component.map.get(field, field)
        if name in personal:
            yield (f'it gives "{name}" of Table("{table.name}") to a model, and that is PII. Leave it out, or say '
                   "allow_pii=True.")
    for query, text in component.queries().items():
        bare = re.sub(r"\{\w+\}|'(?:[^']|'')*'|--[^\n]*", " ", text)
        words = set(re.findall(r"\w+", bare.lower()))                     # Postgres folds what is not quoted
        sources = [(found[1].lower(), (found[2] or found[1]).lower(), _LIST.match(bare, found.end()))
                   for found in _SOURCE.finditer(bare)]                # a table may be there twice
        rest = _SOURCE.sub(" from ", bare.lower())
        everything = re.search(r"(?<!count\()\*", re.sub(r"\(\s+", "(", bare.lower())) is not None
        for shown, (other, columns) in every.items():
            short = other.rpartition(".")[2].lower()
            if short not in words:
                continue
            mine = [(alias, renamed) for name, alias, renamed in sources if name == short]
            names = "|".join(map(re.escape, {short, *(alias for alias, _ in mine)}))
            row = rf"\b(?:{names})\b(?!\s*\.)"                        # all of it, as one value
            whole = everything or any(renamed for _, renamed in mine) or re.search(row, rest) is not None
            for name in sorted(columns):
                if name.lower() in words or name == "*" or whole:
                    yield (f'context "{query}" reads "{name}" of {shown}, and that is PII. Name the '
                           "columns that the model may see, or say allow_pii=True.")
        if _LESSONS.search(bare):
            yield (f'context "{query}" reads lessons(): arguments and records, of which nothing says what is PII. If '
                   "the model may see them, say allow_pii=True.")
        bound = {name: of for name in _bound(text) if (of := component.map.get(name, name)) in personal}
        for name in sorted(_selected(text, bound)):
            yield (f'context "{query}" selects {{{name}}}, which is "{bound[name]}" of Table("{table.name}"), and that '
                   "is PII. Use it only to pick rows, or say allow_pii=True.")


def _bound(text: str) -> set[str]:
    return {found[1] for found in _BOUND.finditer(text) if found[1]}


def _selected(text: str, names: Iterable[str]) -> set[str]:
    """Which of the values that are bound are in the query's outputs; all of them, where that cannot be told."""
    names = set(names)
    if not names:
        return names
    asked = _BOUND.sub(lambda found: f"(select {quote(found[1])} from {RECORD})" if found[1] in names
                       else "null" if found[1] else found[0], text)
    reading = read(asked, sqlread().Tables({f"public.{RECORD}": sorted(names)}))
    if reading.warnings or not reading.outputs:
        return names
    of = {name for sources in reading.outputs.values() for table, name in sources if table == f"public.{RECORD}"}
    return names & of


def _personal(table: Table[Any]) -> set[str]:
    if table.shape is None:
        return set()
    return {name for name, meant in of_model(table.shape.model).items() if any(one.personal for one in meant)}


def _wanted(annotation: Any) -> Kind:
    return ANY if annotation is Any else kind_of(annotation)


def _same(wanted: Kind, have: Kind) -> bool:
    """Whether a value of one kind can be had as another. numeric(10,2) is numeric; of numbers, see above."""
    if wanted is ANY or have is ANY:
        return True
    a, b = _plain(wanted), _plain(have)
    return a == b or b in _TAKES.get(a, ())


def _plain(kind: Kind) -> str:
    return re.sub(r"\(.*?\)", "", kind.type)


def _digits(name: str, made: Kind, have: Kind) -> str:
    """What to say of two kinds of numbers that do not fit."""
    a, b = _PYTHON.get(_plain(made)), _PYTHON.get(_plain(have))
    return f'Digits would be lost: make "{name}" {a} there. ' if a and b else ""


def _clash(wanted: frozenset[Meaning], have: frozenset[Meaning]) -> tuple[str, str] | None:
    """The two names, when both sides mean something and not the same. PII says of whom, not what."""
    a, b = ({one.name for one in side if not one.personal} for side in (wanted, have))
    return (_names(a), _names(b)) if a and b and a != b else None


def _names(names: set[str]) -> str:
    return " and ".join(sorted(names))


def _said(wanted: Any, kind: Kind) -> str:
    return _names({one.name for one in meanings(wanted)}) or kind.type
