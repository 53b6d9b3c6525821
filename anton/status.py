"""Status: what is going on, asked of sql/40_status.sql, and how to print it.

Each question is one SQL function or view and comes back as plain dicts, so that --json, the command line and
other languages see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import orjson

from anton.db import Conn, Database, quote

Row = dict[str, Any]


async def status(db: Database, conn: Conn) -> list[Row]:
    """The view anton.status: one row for each handler."""
    return [dict(row) for row in await conn.fetch(f"table {quote(db.schema)}.status")]


async def ask(db: Database, conn: Conn, function: str, *args: Any) -> list[Row]:
    """The rows of a SQL function that answers with a table."""
    return [dict(row) for row in await db.call(conn, function, *args)]


def behind(rows: Sequence[Row]) -> bool:
    """True when a handler's oldest record waits longer than its max_lag."""
    return any(row["behind"] for row in rows)


def layout(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as aligned text under their column names; empty columns are left out."""
    columns = [name for name in columns if any(row[name] not in (None, "", []) for row in rows)] or list(columns[:1])
    cells = [[name.replace("_", " ") for name in columns], *([show(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    numbers = [all(isinstance(row[name], int | float) or row[name] is None for row in rows) for name in columns]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in cells
    )


def layout_one(row: Row) -> str:
    """One thing as "name  value" lines; empty values are left out."""
    known = {name: value for name, value in row.items() if value not in (None, [], {})}
    width = max((len(name) for name in known), default=0)
    return "\n".join(f"{name.replace('_', ' ').ljust(width)}  {show(value)}" for name, value in known.items())


def show(value: Any) -> str:
    """A value for people: times to the second, durations as 1 h 5 min, JSON for what is nested."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, timedelta):
        return show_duration(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if isinstance(value, dict | list | tuple):
        return orjson.dumps(value, default=str).decode()
    return str(value)


def show_duration(length: timedelta) -> str:
    """The two largest units: 3 d 4 h, 5 min 2 s, 250 ms."""
    left = length.total_seconds()
    if left < 1:
        return f"{max(left, 0) * 1000:.0f} ms"
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size:
            parts.append(f"{int(left // size)} {unit}")
            left %= size
    return " ".join(parts[:2])


def with_thoughts(rows: Sequence[Row], thoughts: Sequence[Row]) -> list[Row]:
    """The rows of why(), each with what models were asked by its handler run: "thoughts", where there are any."""
    named = {row["record"] for row in rows}
    found: dict[int, list[Row]] = {}
    for one in thoughts:
        if one["record"] in named:                                     # a run handles others, too
            found.setdefault(one["receipt_id"], []).append(one)
    return [{**row, "thoughts": found[row["receipt_id"]]} if row["receipt_id"] in found else row for row in rows]


def draw_thought(row: Row) -> str:
    """One line of what a model was asked: "asked gpt-5.4-mini, prompt triage.md@1a2b3c4d, $0.0012, call 7"."""
    facts = [f"asked {row['model']}"]
    facts += [f"{name} {show(value)}" for name, value in (row["params"] or {}).items()]
    facts += [f"prompt {row['prompt_version']}"] if row["prompt_version"] else []
    for name, rows in (row["context"] or {}).items():
        made = [f"{table}/{','.join(map(str, key))}@{version}" for table, key, version in rows] if isinstance(
            rows, list) else [f"{rows['rows']} rows, {rows['hash']}"]
        facts.append(f"{name}: {' '.join(made) or 'no rows'}")
    cost = "from memo" if row["memo"] else "price not known" if row["cost"] is None else f"${row['cost']:f}"
    return ", ".join([*facts, cost, f"call {row['call_id']}"])


def draw_why(rows: Sequence[Row]) -> str:
    """The rows of why(): what led to a record, the record, and below it what came of it."""
    lines = []
    top = min((row["level"] for row in rows), default=0)
    for row in rows:
        indent = "  " * (row["level"] - top)
        by = row["handler"] or ""
        took = f"  {row['ms']:.1f} ms" if row["ms"] else ""
        if row["level"] <= 0:
            mark = "> " if row["level"] == 0 else "  "
            maker = f"  written by {by}" if by else "  written outside of handlers"
            lines.append(f"{mark}{indent}{row['record']}{maker}  {show(row['at'])}{took}".rstrip())
        else:
            what = (row["record"] or "wrote nothing") if row["state"] == "done" else row["state"]
            error = f": {row['error']}" if row["error"] else ""
            ref = f" ({row['job_id']})" if row["job_id"] else ""
            lines.append(f"  {indent}{by} -> {what}{ref}{error}  {show(row['at'])}{took}".rstrip())
        lines += [f"  {indent}    {draw_thought(one)}" for one in row.get("thoughts", ())]
    return "\n".join(lines)
