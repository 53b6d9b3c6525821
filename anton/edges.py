"""Edges: which Tables a handler, route or schedule writes and reads, as far as its declaration and its source say.

    writes(handler, tables)  ->  {("prompts", "new"), …}: into=, appends in its function, what its SQL writes
    of_code(fn, tables)      ->  Uses(writes, reads) of any function
"""

from __future__ import annotations

import dis
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import TYPE_CHECKING, Any

from anton.db import identifier
from anton.handler import Handler
from anton.query import Sql
from anton.table import Table

if TYPE_CHECKING:
    from anton.lineage import Reading, Tables

_METHODS = {"append": "new", "extend": "new", "upsert": "new", "run": "rebuilt"}
_READS = ("get", "aget")
_NO_WRITE = ("sql", "read", "name")


@dataclass
class Uses:
    """What something does to Tables. writes: (name, "new" | "updated" | "deleted" | …). reads: names.

    names: of those that it passes on, who knows what for.
    """

    writes: set[tuple[str, str]] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


def sqlread() -> Any:
    """The module sqlread, which takes a while to import: so only where there is SQL to read."""
    return importlib.import_module("anton.sqlread")


def read(text: str, tables: Tables | None, records: str | None = None) -> Reading:
    """What SQL says of itself. tables: None knows none. records: the table its new_records are of."""
    module = sqlread()
    found: Reading = module.read(text, module.NOTHING if tables is None else tables, records)
    return found


def writes(handler: Handler, tables: Tables | None = None) -> set[tuple[str, str]]:
    """(table name, "new" | "updated" | "deleted" | "truncate" | "rebuilt") for each write that can be seen."""
    found = {(table.name, "new") for table in handler.into}
    if handler.body is not None:
        found |= read(handler.body, tables, identifier(handler.table.name)).writes
    return found | {(name, op) for name, op in _of_function(handler.fn) if op not in _NO_WRITE}


def uses(handler: Handler, tables: Tables | None = None) -> Uses:
    """What a handler does to Tables."""
    found = of_code(handler.fn, tables)
    if handler.body is not None:
        reading = read(handler.body, tables, identifier(handler.table.name))
        found = Uses(set(reading.writes), set(reading.reads))
    found.writes |= {(table.name, "new") for table in handler.into}
    return found


def of_code(fn: Callable[..., Any] | None, tables: Tables | None = None) -> Uses:
    """What a function does to the Tables it names. Functions that it calls are not looked into."""
    found = Uses()
    for table, op in _of_function(fn):
        if op == "sql":
            found.reads |= read(table, tables).reads
        elif op in ("read", "name"):
            (found.reads if op == "read" else found.names).add(table)
        else:
            found.writes.add((table, op))
    return found


def named(fn: Any, kind: type) -> list[str]:
    """The names of things of a kind, such as actions, that a function names."""
    inner = getattr(fn, "__wrapped__", fn)
    code = getattr(inner, "__code__", None)
    if code is None:
        return []
    closed = zip(code.co_freevars, inner.__closure__ or (), strict=False)
    known = {**inner.__globals__, **{name: cell.cell_contents for name, cell in closed if _filled(cell)}}
    used = dict.fromkeys((*code.co_names, *code.co_freevars))
    return [known[name].name for name in used if isinstance(known.get(name), kind)]


def _of_function(fn: Any) -> Iterator[tuple[str, str]]:
    inner = getattr(fn, "__wrapped__", fn)
    inner = getattr(inner, "__func__", inner)
    if getattr(inner, "__code__", None) is not None:
        closed = zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=False)
        cells = {name: cell.cell_contents for name, cell in closed if _filled(cell)}
        yield from _in_code(inner.__code__, {**inner.__globals__, **cells})


def _in_code(code: CodeType, names: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Table.append(…) and the like: a Table is loaded, then its method; select(…) leads to any update or delete.

    (table name, op, "read" or "name"), and (text, "sql") for sql("select …").
    """
    table: Table[Any] | None = None
    asked = False                                                      # sql was loaded, its text comes next
    selected: list[Table[Any]] = []
    changed = False
    for step in dis.get_instructions(code):
        if table is not None and step.opname not in ("LOAD_METHOD", "LOAD_ATTR", "CACHE"):
            yield table.name, "name"
            table = None
        if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME", "LOAD_CLASSDEREF"):
            thing = names.get(step.argval)
            table = thing if isinstance(thing, Table) else None
            asked = asked or thing is Sql
        elif step.opname == "LOAD_CONST" and asked and isinstance(step.argval, str):
            asked = False
            yield step.argval, "sql"
        elif step.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            if table is not None and step.argval in _METHODS:
                yield table.name, _METHODS[step.argval]
            elif table is not None and step.argval in _READS:
                yield table.name, "read"
            elif table is not None and step.argval == "select":
                selected.append(table)
            elif step.argval in ("update", "delete"):
                changed = True
                yield from ((one.name, "updated" if step.argval == "update" else "deleted") for one in selected)
            table = None
    if not changed:
        yield from ((one.name, "read") for one in selected)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _in_code(inner, names)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
