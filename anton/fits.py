"""Fits: whether a component can be wired to a table: its fields, their types, what they mean. For migrate.

A component says inputs(), the fields that it reads, outputs(), the fields of the rows that it makes, and told(), the
fields that it gives to a model. Each is compared with the models of its tables; a Table without a model takes all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from anton.columns import Kind, kind_of
from anton.component import Component
from anton.errors import Miswired, near
from anton.handler import Handler
from anton.meaning import Meaning, meanings, of_model
from anton.table import Table

ANY = Kind("any type")
_SOURCE = re.compile(r'\b(?:from|join)\s+(?:"?\w+"?\.)?"?(\w+)"?(?:\s+(?:as\s+)?(?!(?:where|order|group|limit|join|'
                     r'left|right|inner|full|cross|natural|on|using|for|window|having|union|fetch|offset)\b)(\w+))?',
                     re.IGNORECASE)
_NUMBERS = ("bigint", "numeric", "double precision")


def check(handler: Handler, tables: Mapping[str, Table[Any]]) -> list[Miswired]:
    """What is wrong with a handler that is a component. tables: the app's, by name: context from SQL reads them."""
    component = handler.component
    if not isinstance(component, Component):
        return []
    wrong = [*_reads(component, handler.table)]
    into = getattr(component, "into", None) if component.acts else None  # its sender writes there
    for table in handler.into or ([into] if into is not None else []):
        wrong += _makes(component, handler.table, table)
    if not component.allow_pii:
        wrong += _tells(component, handler.table, tables)
    return [Miswired(handler.name, component.name, component.place, line) for line in wrong]


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
                   + _advice(component, field, wanted, table))
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


def _makes(component: Component, source: Table[Any], table: Table[Any]) -> Iterator[str]:
    if table.shape is None:
        return
    fields = table.shape.model.model_fields
    whose = f'{table.shape.model.__name__} of Table("{table.name}")'
    outputs = component.outputs()
    for name, made in outputs.items():
        if name not in fields:
            continue
        kind, have = kind_of(made), kind_of(fields[name].annotation, fields[name].metadata)
        if not _same(have, kind):
            yield f'it makes "{name}" as {_said(made, kind)}, and {whose} has it as {have.type}. Name it otherwise.'
        clash = _clash(meanings(made), meanings(fields[name].annotation, tuple(fields[name].metadata)))
        if clash:
            yield f'it makes "{name}" as {clash[0]}, and in {whose} it is {clash[1]}. Name it otherwise.'
    if source.shape is None or not component.carries:
        return
    there = of_model(table.shape.model)
    for name, meant in of_model(source.shape.model).items():
        if name not in there or name in outputs or name in table.shape.key:
            continue
        of = f'{source.shape.model.__name__} of Table("{source.name}")'
        clash = _clash(meant, there[name])
        if clash:
            yield f'"{name}" is carried over: it is {clash[0]} in {of} and {clash[1]} in {whose}. Name it otherwise.'
        elif any(one.personal for one in meant) and not any(one.personal for one in there[name]):
            yield f'"{name}" is carried over: it is PII in {of} and not in {whose}. Say PII[…] there, too.'


def _tells(component: Component, table: Table[Any], tables: Mapping[str, Table[Any]]) -> Iterator[str]:
    """PII that would be given to a model. Of SQL, the columns that are named, and * of a table that has some."""
    personal = _personal(table)
    for field in sorted(component.told()):
        name = component.map.get(field, field)
        if name in personal:
            yield (f'it gives "{name}" of Table("{table.name}") to a model, and that is PII. Leave it out, or say '
                   "allow_pii=True.")
    for query, text in component.queries().items():
        bare = re.sub(r"\{\w+\}|'(?:[^']|'')*'|--[^\n]*", " ", text)
        words = set(re.findall(r"\w+", bare.lower()))                     # Postgres folds what is not quoted
        aliases = {found[1].lower(): found[2].lower() for found in _SOURCE.finditer(bare) if found[2]}
        rest = _SOURCE.sub(" from ", bare.lower())
        everything = re.search(r"(?<!count\()\*", re.sub(r"\(\s+", "(", bare.lower())) is not None
        for other in tables.values():
            if other.name.rpartition(".")[2].lower() not in words:
                continue
            short = other.name.rpartition(".")[2].lower()
            names = "|".join(map(re.escape, (short, aliases.get(short, short))))
            row = rf"\b(?:{names})\b(?!\s*\.)"                        # all of it, as one value
            every = everything or re.search(row, rest) is not None
            for name in sorted(_personal(other)):
                if name.lower() in words or every:
                    yield (f'context "{query}" reads "{name}" of Table("{other.name}"), and that is PII. Name the '
                           "columns that the model may see, or say allow_pii=True.")


def _personal(table: Table[Any]) -> set[str]:
    if table.shape is None:
        return set()
    return {name for name, meant in of_model(table.shape.model).items() if any(one.personal for one in meant)}


def _wanted(annotation: Any) -> Kind:
    return ANY if annotation is Any else kind_of(annotation)


def _same(wanted: Kind, have: Kind) -> bool:
    """Whether a value of one kind can be had as another. numeric(10,2) is numeric; all numbers are numbers."""
    if wanted is ANY:
        return True
    a, b = (re.sub(r"\(.*?\)", "", one.type) for one in (wanted, have))
    return a == b or (a in _NUMBERS and b in _NUMBERS)


def _clash(wanted: frozenset[Meaning], have: frozenset[Meaning]) -> tuple[str, str] | None:
    """The two names, when both sides mean something and not the same. PII says of whom, not what."""
    a, b = ({one.name for one in side if not one.personal} for side in (wanted, have))
    return (_names(a), _names(b)) if a and b and a != b else None


def _names(names: set[str]) -> str:
    return " and ".join(sorted(names))


def _said(wanted: Any, kind: Kind) -> str:
    return _names({one.name for one in meanings(wanted)}) or kind.type
