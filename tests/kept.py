"""Kept: all that a database holds, as text; a secret must be nowhere in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anton.db import quote


def everything(app: Any) -> Iterator[tuple[str, str]]:
    """All rows of all tables of the database, as text."""
    for schema, table in app._fetch("select schemaname, tablename from pg_tables where schemaname !~ '^pg_' "
                                    "and schemaname <> 'information_schema'"):
        where = f"{quote(schema)}.{quote(table)}".replace("{", "{{").replace("}", "}}")
        yield where, "\n".join(row[0] for row in app._fetch(f"select (t.*)::text from {where} t"))
