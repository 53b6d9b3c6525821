"""Context: what goes into a prompt besides the record: rows that SQL finds for it, and where they came from.

    prompt="triage.md"  prompt="Triage this: {text}"   {name} is the record's value, or that of a context
    context={"similar": sql("select … where customer = {customer}")}    {name} is bound, never pasted

The keys and versions of the rows are kept, so that `anton why` can say what an answer was made from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg
from pydantic import BaseModel

from anton.db import Database, literal, quote, to_json
from anton.errors import AntonError, BadOption, Discard, QueryError, did_you_mean
from anton.query import Sql, bind, fetch_bound, placeholders
from anton.relation import describe

_NAME = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_FILE = re.compile(r"[\w./-]+\.(?:md|txt|prompt)")
_TOKEN = re.compile(r"""(?P<none>--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$)"""
                    r"""|"(?:[^"]|"")*"|.""", re.DOTALL)
_READS = re.compile(r"\s*(?:select|with)\b", re.IGNORECASE)
_MERGES = re.compile(r"\b(?:(?<!is )(?<!not )distinct|union|intersect|except|group|having)\b", re.IGNORECASE)
_FROM = re.compile(r"\bfrom\b(?P<tables>.*?)(?:\b(?:where|window|order|limit|offset|fetch|for)\b|;|$)",
                   re.IGNORECASE | re.DOTALL)
_ID = r'(?:"[^"]+"|[A-Za-z_]\w*)'
_NO_ALIAS = r"(?!(?:join|left|right|inner|full|cross|natural|on|using|tablesample)\b)"
_TABLE = re.compile(rf"(?:^|,|\bjoin\b)\s*({_ID}(?:\.{_ID})?)(?:\s+(?:as\s+)?{_NO_ALIAS}({_ID}))?", re.IGNORECASE)
_NOT_SO = (asyncpg.SyntaxOrAccessError, asyncpg.FeatureNotSupportedError)
_SOURCES = "_anton_sources"


@dataclass(frozen=True)
class Prompt:
    """A template. version: "triage.md@1a2b3c4d", or "1a2b3c4d" of one that is in the code."""

    text: str
    version: str

    @property
    def names(self) -> set[str]:
        """The names in braces."""
        return {found[1] for found in _NAME.finditer(self.text) if found[1]}

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text for one record. {{ and }} stand for braces. Raises Discard for a name without a value."""
        def value(found: re.Match[str]) -> str:
            if found[1] is None:
                return found[0][0]
            if found[1] not in values:
                raise Discard(f"{{{found[1]}}} in the prompt is no value of this record."
                              f"{did_you_mean(found[1], values)} It has: {', '.join(values)}")
            return shown(values[found[1]])

        return _NAME.sub(value, self.text)


def prompt_of(given: str, folder: Path, of: str) -> Prompt:
    """A prompt from a text, or from a file of the app, in prompts/ or where it says. Raises BadOption."""
    if not isinstance(given, str) or not given.strip():
        raise BadOption("prompt", given, of, 'a text, or a file such as "triage.md"')
    if not _FILE.fullmatch(given):
        return Prompt(given, _version(given))
    for file in (folder / given, folder / "prompts" / given):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            return Prompt(text, f"{given}@{_version(text)}")
    raise BadOption("prompt", given, of, f"a file in {folder} or its prompts/, or a text of several words")


def _version(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]


def shown(value: Any) -> str:
    """A value as it stands in a prompt: text as it is, times in ISO, what is nested as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, (BaseModel, Mapping, list, tuple, set, bool)):
        return to_json(value).decode()
    return str(value)


class Context:
    """The queries of context=. Raises BadOption for what is none."""

    def __init__(self, given: Mapping[str, Any] | None, of: str) -> None:
        self.queries: dict[str, Sql] = {}
        for name, query in (given or {}).items():
            if not isinstance(query, Sql):
                raise BadOption("context", {name: query}, of, '{"similar": sql("select … where id = {id}")}')
            self.queries[name] = query
        self._plain: set[str] = set()

    @property
    def names(self) -> set[str]:
        """What the queries take from the record."""
        return {name for query in self.queries.values() for name in placeholders(query.text) - query.args.keys()}

    async def fetch(self, db: Database, record: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
        """The texts for the prompt, and [[table, key, version], …] of the rows, both by name."""
        texts: dict[str, str] = {}
        origins: dict[str, Any] = {}
        for name, query in self.queries.items():
            rows, origins[name] = await self._rows(db, query, {**record, **query.args})
            texts[name] = told(rows)
        return texts, origins

    async def _rows(self, db: Database, query: Sql, args: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        values: list[Any] = []
        text = bind(query.text, args, values)
        traced = None if query.text in self._plain else await _traced(db, text)
        try:
            if traced is not None:
                try:
                    return _apart(await _fetch(db, traced, values))
                except _NOT_SO:                                        # it counts, say: asked as it is
                    pass
            self._plain.add(query.text)
            rows = [dict(row) for row in await _fetch(db, text, values)]
        except (asyncpg.SyntaxOrAccessError, asyncpg.DataError, asyncpg.ReadOnlySQLTransactionError) as error:
            raise QueryError(f"{error}. It was: {text}", sql=text) from error
        return rows, {"rows": len(rows), "hash": _version(to_json(rows).decode())}


async def _fetch(db: Database, text: str, values: Sequence[Any]) -> list[asyncpg.Record]:
    async with db.conn() as conn, conn.transaction(readonly=True):
        return await fetch_bound(conn, text, values)


async def _traced(db: Database, text: str) -> str | None:
    """The query with the tables, keys and versions of what each row was made from; None where that cannot be.

    Of the tables in its own FROM. They come last, lest `order by 1` mean another column.
    """
    outer = _outermost(text)
    found = _FROM.search(outer)
    if found is None or not _READS.match(outer) or _MERGES.search(outer):
        return None
    parts = []
    for table in _TABLE.finditer(found["tables"]):
        alias = table[2] or table[1].rpartition(".")[2]
        try:
            relation = await describe(db, table[1])
        except AntonError:                                             # a function, a CTE, a subquery's name
            continue
        if relation.key and relation.versioned:
            key = ", ".join(f"to_jsonb({alias}.{quote(name)})" for name in relation.key)
            parts.append(f"jsonb_build_array({literal(relation.name)}, jsonb_build_array({key}), {alias}.xmin::text)")
    if not parts:
        return None
    return f"{text[:found.start()]}, jsonb_build_array({', '.join(parts)}) as {_SOURCES} {text[found.start():]}"


def _outermost(text: str) -> str:
    """The text with blanks where it is in parentheses, in quotes or a comment."""
    depth, kept = 0, []
    for token in _TOKEN.finditer(text):
        depth -= token[0] in (")", "]")
        kept.append(" " * len(token[0]) if depth or token["none"] else token[0])
        depth += token[0] in ("(", "[")
    return "".join(kept)


def _apart(rows: Sequence[asyncpg.Record]) -> tuple[list[dict[str, Any]], list[Any]]:
    found: list[Any] = []
    for row in rows:
        found += [one for one in row[_SOURCES] if one[2] is not None and one not in found]
    return [{name: value for name, value in row.items() if name != _SOURCES} for row in rows], found


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a prompt holds them, a line each: a value alone as it is, several as JSON."""
    if not rows:
        return "(none)"
    return "\n".join("- " + (shown(next(iter(row.values()))) if len(row) == 1 else to_json(dict(row)).decode())
                     for row in rows)
