"""Sqlcheck: is the SQL that will run later right? Asked by migrate of every SQL handler, schedule and model.

    parts(text, params)   the text with its {name}s as typed nulls, and where each place of it was
    check(...)            Postgres parses each step, and runs none; what it refuses is said with file, line and token

Postgres judges: what it takes is right, whatever sqlglot makes of it. sqlread.py adds what Postgres does not say: which
names there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import asyncpg

from anton.db import Conn, Database, quote
from anton.edges import read, sqlread
from anton.errors import SqlRefused, near

if TYPE_CHECKING:
    from anton.lineage import Reading, Tables

_REFUSED = ("42", "22", "0A")                                          # the text is wrong: syntax, names, types
_MISSING = {"42P01": "table", "42703": "column", "42883": "function"}
_PLAIN = re.compile(r"\s*(?:with|select|insert|update|delete|merge|values|table)\b", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_TOKEN = re.compile(r'[\w.$]+|"(?:[^"]|"")*"(?:\."(?:[^"]|"")*")*|\S')


@dataclass(frozen=True)
class SqlStep:
    """SQL that runs later. kind: "handler", "schedule" or "model".

    place: "sql/flag_big.sql", or "main.py:12" of SQL in Python. table: whose records it gets, as SQL names
    it; None for a model. params: {name: [type, text]}.
    """

    kind: str
    name: str
    text: str
    place: str
    table: str | None = None
    params: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def reading(self, tables: Tables) -> Reading:
        """What it says of itself."""
        return read(self.text, tables, self.table)


async def tables(db: Database, conn: Conn, app_schema: str, more: Mapping[str, Sequence[str]] | None = None) -> Tables:
    """All tables and views of the database. more: columns that a plan would add."""
    known = {row["name"]: list(row["columns"]) for row in await db.call(conn, "relations")}
    for name, columns in (more or {}).items():
        known[name] = list(dict.fromkeys((*known.get(name, ()), *columns)))
    found: Tables = sqlread().Tables(known, app_schema)
    return found


async def check(db: Database, conn: Conn, step: SqlStep, known: Tables) -> SqlRefused | str | None:
    """What is wrong with a step; a text, when it could not be found out."""
    try:
        await _parse(db, conn, step, known.default)
    except asyncpg.PostgresError as error:
        return refusal(step, error, known, _start(step, error)) or (
            f"{step.place}: its SQL could not be checked: {error}")
    return None


async def _parse(db: Database, conn: Conn, step: SqlStep, app_schema: str) -> None:
    """Raises what Postgres says of the step. The extended protocol takes one statement, and only parses it."""
    text, _ = parts(step.text, step.params)
    pieces = sqlread().split(text)
    undo = conn.transaction()
    await undo.start()
    try:
        await conn.execute(f"set local lock_timeout = '200ms'; "
                           f"set local search_path = {quote(app_schema)}, pg_catalog, pg_temp")
        for n, (start, end) in enumerate(pieces):
            sent = text[start:end]
            if n == 0 and step.table is not None:                      # the records stand before the first alone
                sent = await db.call_value(conn, "empty_sql", step.table, sent)
            elif n and not _PLAIN.match(sent):                         # what it makes is not there for what follows
                return
            try:
                await conn.prepare(sent, name="")
            except asyncpg.PostgresError as error:
                if error.position is not None:                         # what stands before the text is ours
                    error.place = end - len(sent) + int(error.position) - 1  # type: ignore[attr-defined]
                    error.inside = error.place >= start  # type: ignore[attr-defined]
                raise
    finally:
        await undo.rollback()


def parts(text: str, params: Mapping[str, Sequence[str | None]]) -> tuple[str, list[tuple[int, int]]]:
    """The text as Postgres can parse it: null::TYPE for each {name} of params; and (place in it, in the text) pairs."""
    made, at, length, pairs = [], 0, 0, [(0, 0)]
    for found in _PLACEHOLDER.finditer(text):
        if found[1] in params:
            made += [text[at:found.start()], f"null::{params[found[1]][0]}"]
            at, length = found.end(), sum(map(len, made))
            pairs.append((length, at))
    return "".join((*made, text[at:])), pairs


def refusal(step: SqlStep, error: asyncpg.PostgresError, known: Tables, start: int | None) -> SqlRefused | None:
    """What Postgres said of a step, at a place of its text; None: it does not say that the text is wrong."""
    if error.sqlstate is None or error.sqlstate[:2] not in _REFUSED or error.sqlstate == "42501":
        return None
    token = found[0] if start is not None and (found := _TOKEN.match(step.text, start)) else ""
    missing, names = _MISSING.get(error.sqlstate or ""), []
    for one in step.reading(known).unknown:
        if one.kind == missing and (one.start == start or start is None or _last(token) == _last(one.name)):
            start, token, names = one.start, _last(one.name), list(one.known)
            break
    else:
        if missing == "table":
            names = list(known.columns)
    hint = error.hint or ""
    if missing == "table":                                             # unqualified where that is enough
        names = [name.removeprefix(f"{quote(known.default)}.") for name in names]
        close = near(_last(token), names)
        names = [close] if close else []
        hint = hint or f'Declare it: Table("{_last(token)}"), or create it in a migration'
        if _last(token) in ("new_records", "old_records"):
            hint = "They are there for the first statement of a handler alone"
    return SqlRefused(step.place, step.name if step.kind == "handler" else "", _last(token) if missing else token,
                      error.args[0], step.text, start, names, hint=hint)


def _start(step: SqlStep, error: asyncpg.PostgresError) -> int | None:
    """Where in the step's text an error is; None when it does not say, or is not in it."""
    place = getattr(error, "place", None)
    if place is None or not getattr(error, "inside", False):
        return None
    after = max(pair for pair in parts(step.text, step.params)[1] if pair[0] <= place)
    return after[1] + int(place) - after[0]


def _last(token: str) -> str:
    """o.total -> total, without quotes."""
    return re.sub(r'^"|"$', "", re.split(r'\.(?=(?:[^"]*"[^"]*")*[^"]*$)', token)[-1])
