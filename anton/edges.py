"""Edges: which Tables a handler writes to, as far as its declaration and its source say, for graphs and loop checks.

    writes(handler)  ->  {("prompts", "new"), …}: into=, appends in its function, INSERT, UPDATE, DELETE in its SQL
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from types import CodeType
from typing import Any

from anton.handler import Handler
from anton.table import Table

_METHODS = {"append": "new", "extend": "new", "upsert": "new"}
_SQL = (("new", r"\binsert\s+into\s+([\w.\"]+)"),
        ("updated", r"\bupdate\s+(?:only\s+)?([\w.\"]+)\s+(?:as\s+\w+\s+)?set\b"),
        ("deleted", r"\bdelete\s+from\s+(?:only\s+)?([\w.\"]+)"))


def writes(handler: Handler) -> set[tuple[str, str]]:
    """(table name, "new" | "updated" | "deleted") for each write that can be seen without running it."""
    found = {(table.name, "new") for table in handler.into}
    if handler.body is not None:
        found |= set(sql_writes(handler.body))
    fn: Any = getattr(handler.fn, "__wrapped__", handler.fn)
    if getattr(fn, "__code__", None) is not None:
        closed = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False)
        cells = {name: cell.cell_contents for name, cell in closed if _filled(cell)}
        found |= set(_in_code(fn.__code__, {**fn.__globals__, **cells}))
    return found


def sql_writes(body: str) -> Iterator[tuple[str, str]]:
    """The tables that SQL names behind INSERT INTO, UPDATE and DELETE FROM."""
    plain = re.sub(r"--[^\n]*|'(?:[^']|'')*'", " ", body)
    for op, pattern in _SQL:
        for name in re.findall(pattern, plain, re.IGNORECASE):
            yield name, op


def _in_code(code: CodeType, names: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Table.append(…) and the like: a Table is loaded, then its method; select(…) leads to any update or delete."""
    table: Table[Any] | None = None
    selected: list[Table[Any]] = []
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME", "LOAD_CLASSDEREF"):
            thing = names.get(step.argval)
            table = thing if isinstance(thing, Table) else table
        elif step.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            if table is not None and step.argval in _METHODS:
                yield table.name, _METHODS[step.argval]
            elif table is not None and step.argval == "select":
                selected.append(table)
            elif step.argval in ("update", "delete"):
                yield from ((one.name, "updated" if step.argval == "update" else "deleted") for one in selected)
            table = None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _in_code(inner, names)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
