"""Load: a file into a Table, piece by piece. Killed anywhere, it goes on where it was; each row comes once.

    pieces of the file -> whole records -> one transaction: the rows, and how far we are -> the next piece

CSV goes to COPY as it is where the columns say all that the model says. All else passes through Python: Parquet,
JSON Lines, models with checks of their own, upserts. Rows that do not fit are kept in load_reject; the rest goes on.
"""

from __future__ import annotations

import asyncio
import codecs
import csv
import importlib
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import asyncpg
import orjson

from anton import chunk
from anton.apply import apply, refused
from anton.columns import exact
from anton.db import Conn, Database, quote
from anton.errors import BadOption, FileChanged, FileGone, InvalidRecord, LoadFailed, WriteRefused, did_you_mean, one_of
from anton.op import Op, pick
from anton.relation import Attribute, Relation, describe, made_keys
from anton.table import Table
from anton.write import WHOLE, Scope, owner

if TYPE_CHECKING:
    from anton.storage import Found, Storage

FORMATS = ("csv", "tsv", "jsonl", "parquet")
SUFFIXES = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet"}
RAW, PARSED, ROWS = 4 << 20, 1 << 20, 10_000  # bytes of a piece: for COPY, for Python; rows of Parquet's
READ = 1 << 20  # bytes of a request: larger ones leave holes in the memory of the threads that make them
SIP = 1 << 16  # bytes of a message of COPY
LONGEST = 64 << 20  # bytes of one record
REJECTS = 1000
KEPT = 8000  # characters kept of a row that did not fit
_DOT = re.compile(rb"^\\\.\r?$", re.MULTILINE)


@dataclass(frozen=True)
class Loaded:
    """What is in. rows: in the table; rejected: in load_reject. changed: the file was replaced before all was in."""

    rows: int
    rejected: int
    changed: bool = False


@dataclass(frozen=True)
class How:
    """How a file is read. See Files.load, which has the same names."""

    format: Literal["csv", "tsv", "jsonl", "parquet"] | None = None
    upsert: bool = False
    map: Mapping[str, str] = field(default_factory=dict)
    skip: Sequence[str] = ()
    columns: Sequence[str] | None = None
    delimiter: str | None = None
    encoding: str = "utf-8"
    rejects: int = REJECTS

    def checked(self, of: str) -> How:
        """Itself. Raises BadOption for what cannot be."""
        if self.format not in (None, *FORMATS):
            raise BadOption("format", self.format, of, one_of(FORMATS))
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'
                                           or not self.delimiter.isascii()):
            raise BadOption("delimiter", self.delimiter, of, 'one character, such as ";"')
        try:
            plain = 'a,"\n'.encode(self.encoding) == b'a,"\n'
        except LookupError:
            plain = False
        if not plain:
            raise BadOption("encoding", self.encoding, of, 'one that is ASCII for ASCII\'s characters: "utf-8", '
                            '"cp1252", "latin-1"')
        if isinstance(self.skip, str) or isinstance(self.columns, str):
            raise BadOption("skip" if isinstance(self.skip, str) else "columns", self.skip, of, "a list of names")
        if type(self.rejects) is not int or self.rejects < 0:
            raise BadOption("rejects", self.rejects, of, "a whole number from 0")
        return self


class _Moved(Exception):
    """Somebody else goes on with this load."""


async def load(db: Database, app: str, storage: Storage, found: Found, table: Table[Any], how: How) -> Loaded:
    """Loads one version of a file, or what is missing of it. Raises LoadFailed, StorageError."""
    relation = await describe(db, table.name)
    job = _Load(db, storage, found, table, relation, how)
    version = f"{found.etag} {found.modified.astimezone(UTC).isoformat()}"
    while True:
        async with db.tx() as conn:
            into = f"{quote(relation.schema)}.{quote(relation.table)}"
            row = (await db.call(conn, "begin_load", app, storage.name, found.path, version, into))[0]
        if row["state"] == "done":
            return Loaded(row["n"], row["rejected"])
        try:
            return await job.run(row)
        except _Moved:
            continue
        except (FileChanged, FileGone) as error:
            return await job.end("changed", str(error))
        except (LoadFailed, ValueError) as error:
            await job.end("failed", error.reason if isinstance(error, LoadFailed) else str(error))
            if isinstance(error, LoadFailed):
                raise
            raise job.failed(str(error)) from error


class _Load:
    """One run."""

    def __init__(self, db: Database, storage: Storage, found: Found, table: Table[Any], relation: Relation,
                 how: How) -> None:
        self.db, self.storage, self.found, self.how = db, storage, found, how
        self.table, self.relation = table, relation
        name = found.path.lower()
        self.packed = name.endswith(".gz")
        suffix = name.removesuffix(".gz").rpartition(".")[2]
        self.format = how.format or SUFFIXES.get(suffix)
        self.names: list[str] = []                                     # of the file's columns; "" to leave out
        self.rejects: list[tuple[int, str, str]] = []                  # of the piece at hand

    def failed(self, reason: str) -> LoadFailed:
        return LoadFailed(self.found.path, self.relation.name, reason)

    async def run(self, row: Any) -> Loaded:
        self.id, self.reached, self.n, self.rejected = row["id"], row["reached"], row["n"], row["rejected"]
        if self.format is None:
            raise self.failed(f"what is in it? Say format=, which is {one_of(FORMATS)}")
        if self.format == "parquet":
            await self._parquet()
        else:
            await self._text()
        return await self.end("done")

    async def end(self, state: str, error: str | None = None) -> Loaded:
        async with self.db.tx() as conn:
            await self.db.call(conn, "end_load", self.id, state, error)
        return Loaded(self.n, self.rejected, state == "changed")

    # --- pieces

    async def _pieces(self, start: int, size: int) -> AsyncGenerator[bytes]:
        """The file from a byte on, in pieces of about `size`. The next one is fetched while this one is worked."""
        path, etag, whole = self.found.path, self.found.etag, self.found.size
        waiting: deque[asyncio.Task[bytes]] = deque()
        at, parts, have = start, list[bytes](), 0
        try:
            while at < whole or waiting:
                while at < whole and len(waiting) * READ < size:
                    length = min(READ, whole - at)
                    waiting.append(asyncio.create_task(self.storage.read(path, at, length, etag)))
                    at += length
                data = await waiting[0]
                waiting.popleft()
                if not data:
                    raise FileChanged(self.storage.name, path)
                parts.append(data)
                have += len(data)
                if have >= size or not waiting and at >= whole:
                    piece, parts, have = b"".join(parts), [], 0
                    yield piece
        finally:
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.wait(waiting)

    async def _from(self, start: int, size: int) -> AsyncGenerator[bytes]:
        """As _pieces(), unpacked: start counts unpacked bytes."""
        if not self.packed:
            async for piece in self._pieces(start, size):
                yield piece
            return
        async with aclosing(self._pieces(0, size)) as packed, aclosing(chunk.gunzip(packed, size)) as pieces:
            async for piece in pieces:
                if start < len(piece):
                    yield piece[start:]
                start = max(0, start - len(piece))

    async def _text(self) -> None:
        """CSV and JSON Lines."""
        quote = b"" if self.format == "jsonl" else chunk.QUOTE
        if not self.found.size:
            return
        begin, end_of_line = await self._begin(quote)
        raw = await self._raw()
        at = max(self.reached, begin)
        rest = b""
        async with aclosing(self._from(at, RAW if raw else PARSED)) as pieces:
            async for piece in pieces:
                rest += piece
                size = chunk.cut(rest, quote, end_of_line)
                if not size and len(rest) > LONGEST:
                    raise self.failed(f"the record at byte {at:,} is longer than {LONGEST >> 20} MB: a quote that is "
                                      "not closed?")
                if size:
                    await self._write(rest[:size], at + size, raw, quote, end_of_line)
                    rest, at = rest[size:], at + size
        if quote and rest.count(quote) & 1:                            # as one row it would hide all that follows it
            raise self.failed(f"the quote that row {self.n + self.rejected + 1:,} opens, from byte {at:,} on, never "
                              f"closes. It begins: {rest[:200].decode(self.how.encoding, 'replace')}")
        if rest:
            await self._write(rest, at + len(rest), raw, quote, end_of_line)

    async def _begin(self, quote: bytes) -> tuple[int, bytes]:
        """Where the first record begins, and how lines end. Reads and checks the header."""
        head, end_of_line = b"", b"\n"
        async with aclosing(self._from(0, PARSED)) as pieces:
            async for piece in pieces:
                head += piece
                end_of_line = b"\r" if b"\r" in head and b"\n" not in head else b"\n"
                if chunk.first(head, quote, end_of_line) or len(head) > LONGEST:
                    break
        bom = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise self.failed("it is UTF-16; make it UTF-8")
        if self.format == "jsonl":
            return bom, end_of_line
        if self.how.columns is not None:
            self._columns(list(self.how.columns))
            return bom, end_of_line
        size = chunk.first(head[bom:], quote, end_of_line) or len(head) - bom
        first = head[bom:bom + size].strip(b"\r\n").decode(self.how.encoding)
        if not first:
            raise self.failed("it has no header: its first line is empty. columns=[…] names the columns of a file "
                              "without one")
        try:
            self._columns(chunk.cells(first, self._delimiter))
        except csv.Error as error:
            raise self.failed(f"its header is no CSV: {error}") from None
        return bom + size, end_of_line

    @property
    def _delimiter(self) -> str:
        return self.how.delimiter or ("\t" if self.format == "tsv" else ",")

    def _columns(self, header: list[str]) -> None:
        """Which column each of the file's is. Raises LoadFailed for what the table has not, or misses."""
        turned = {there: here for here, there in self.how.map.items()}
        missing = [name for name in (*turned, *self.how.skip) if name not in header]
        if missing:
            raise self.failed(f'map= or skip= names "{missing[0]}", which the file has not.'
                              f"{did_you_mean(missing[0], header)} It has: {', '.join(header)}")
        self.names = ["" if name in self.how.skip else turned.get(name, name) for name in header]
        known = self._known()
        for name, column in zip(header, self.names, strict=True):
            if known is not None and column and column not in known:
                raise self.failed(f'it has a column "{name}", and the table has none.{did_you_mean(column, known)} '
                                  f'The table has: {", ".join(known)}. map={{"COLUMN": "{name}"}} says where it goes, '
                                  f'skip=["{name}"] leaves it out')
        twice = {name for name in self.names if name and self.names.count(name) > 1}
        if twice:
            raise self.failed(f"it has more than one column for {', '.join(sorted(twice))}")
        self._complete(self.names)

    def _complete(self, names: Sequence[str]) -> None:
        needed = [] if self.relation.document else [
            c.name for c in self.relation.columns.values()
            if c.notnull and c.default is None and not c.generated and c.name not in names]
        if needed:
            raise self.failed(f"it has no column for {', '.join(needed)}, which may not be null and has no default. "
                              f"It has: {', '.join(name for name in names if name)}")

    def _known(self) -> Sequence[str] | None:
        """What rows may hold; None: anything."""
        if self.relation.document:
            return None
        if self.table.shape is not None:
            return [column.name for column in self.table.shape.table_columns]
        return [name for name, column in self.relation.columns.items() if not column.generated]

    async def _raw(self) -> bool:
        """Whether COPY may read the file itself."""
        if self.format == "jsonl" or self.relation.document or not self.relation.copy:
            return False
        if self.table.shape is None:
            if self.how.upsert or "" in self.names:
                raise self.failed("upsert= and skip= need a table with a model")
            return True
        return (not self.how.upsert and "" not in self.names and exact(self.table.shape.model)
                and codecs.lookup(self.how.encoding).name in ("utf-8", "ascii"))

    # --- one piece, one transaction

    async def _write(self, data: bytes, reached: int, raw: bool, quote: bytes, end_of_line: bytes) -> None:
        first = self.n + self.rejected + 1                             # the number of its first row
        if raw:
            async with self._piece(reached) as piece:
                piece.n = await self._copy(piece.conn, data, first, end_of_line)
            return
        records = await asyncio.to_thread(chunk.split, data, quote, end_of_line)
        rows: list[tuple[str, Any]] = await asyncio.to_thread(lambda: [self._parsed(record) for record in records])
        await self._rows(rows, reached, first)

    @asynccontextmanager
    async def _piece(self, reached: int) -> AsyncIterator[_Piece]:
        """A transaction that takes the load up to `reached`. Raises _Moved when somebody else did."""
        self.rejects = []
        async with self.db.tx() as conn:
            if not await self.db.call_value(conn, "lock_load", self.id, self.reached):
                raise _Moved
            piece = _Piece(conn)
            yield piece
            numbers, data, errors = ([one[n] for one in self.rejects] for n in range(3))
            await self.db.call(conn, "advance_load", self.id, reached, piece.n, numbers, data, errors)
        self.reached, self.n, self.rejected = reached, self.n + piece.n, self.rejected + len(self.rejects)

    async def _copy(self, conn: Conn, data: bytes, first: int, end_of_line: bytes) -> int:
        """COPY of the records; those it refuses are cut out. How many went in."""
        waiting, n = [(self._clean(data, end_of_line), first)], 0
        while waiting:
            part, first = waiting.pop()
            try:
                async with conn.transaction():
                    n += await self._copy_all(conn, part, end_of_line)
                continue
            except asyncpg.PostgresError as error:
                if not refused(error):
                    raise
                failure = error
            records = chunk.split(part, chunk.QUOTE, end_of_line)
            at = _at(records, failure, end_of_line)
            if len(records) == 1:
                self._reject(first, records[0].decode("utf-8", "replace"), _said(failure))
                continue
            cuts = [(0, at), (at, at + 1), (at + 1, len(records))] if at is not None else [
                (0, len(records) // 2), (len(records) // 2, len(records))]
            for start, end in reversed(cuts):
                if start < end:
                    waiting.append((b"".join(one + end_of_line for one in records[start:end]), first + start))
        return n

    def _clean(self, data: bytes, end_of_line: bytes) -> bytes:
        """Without empty lines, which are no rows, and with an end of its last line."""
        if not data.endswith(end_of_line):
            data += end_of_line
        twice, windows = end_of_line * 2, end_of_line + b"\r" + end_of_line
        if twice in data or windows in data or data.startswith((end_of_line, b"\r" + end_of_line)):
            return b"".join(one + end_of_line for one in chunk.split(data, chunk.QUOTE, end_of_line))
        return data

    async def _copy_all(self, conn: Conn, data: bytes, end_of_line: bytes) -> int:
        columns = [self.relation.columns[name] for name in self.names]
        options: dict[str, Any] = {
            "format": "csv", "delimiter": self._delimiter, "encoding": "utf-8",
            "force_null": [column.name for column in columns if not column.notnull],
            "force_not_null": [column.name for column in columns if column.notnull and _is_text(column)]}
        if _DOT.search(data):                                          # a line that ends COPY before Postgres 18
            data = await asyncio.to_thread(self._as_text, data, columns, end_of_line)
            options = {"format": "text", "encoding": "utf-8"}
        if not data:
            return 0
        done = await conn.copy_to_table(self.relation.table, schema_name=self.relation.schema, columns=self.names,
                                        source=_sips(data), **{k: v for k, v in options.items() if v})
        return int(done.split()[1])

    def _as_text(self, data: bytes, columns: Sequence[Attribute], end_of_line: bytes) -> bytes:
        rows = []
        for record in chunk.split(data, chunk.QUOTE, end_of_line):
            try:
                given = chunk.cells(record.decode(), self._delimiter)
            except (csv.Error, UnicodeDecodeError) as error:
                raise asyncpg.DataError(str(error)) from None
            if len(given) != len(columns):
                raise asyncpg.DataError(f"it has {len(given)} cells and not {len(columns)}")
            rows.append([_cell(cell, column) for cell, column in zip(given, columns, strict=True)])
        return chunk.copy_text(rows)

    def _parsed(self, record: bytes) -> tuple[str, Any]:
        """The record's text, and its row or what is wrong with it."""
        try:
            text = record.decode(self.how.encoding)
        except UnicodeDecodeError as error:
            return record.decode(self.how.encoding, "replace"), error
        try:
            return text, self._json(record) if self.format == "jsonl" else self._csv(text)
        except (csv.Error, ValueError) as error:
            return text, error

    def _json(self, record: bytes) -> dict[str, Any]:
        row = orjson.loads(record if self.how.encoding == "utf-8" else record.decode(self.how.encoding))
        if not isinstance(row, dict):
            raise ValueError("it is no object")
        return self._named(row)

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row by the table's names."""
        if self.how.map:
            turned = {there: here for here, there in self.how.map.items()}
            row = {turned.get(name, name): value for name, value in row.items()}
        if self.how.skip:
            row = {name: value for name, value in row.items() if name not in self.how.skip}
        known = self._known()
        if known is not None and not row.keys() <= set(known):
            name = next(name for name in row if name not in known)
            raise ValueError(f'the table has no column "{name}".{did_you_mean(name, known)} skip= leaves it out')
        return row

    def _csv(self, text: str) -> dict[str, Any]:
        given = chunk.cells(text, self._delimiter)
        if len(given) != len(self.names):
            raise ValueError(f"it has {len(given)} cells and the file {len(self.names)} columns")
        if self.relation.document:
            return {name: cell or None for name, cell in zip(self.names, given, strict=True) if name}
        columns = self.relation.columns
        return {name: _value(cell, columns[name]) for name, cell in zip(self.names, given, strict=True) if name}

    # --- rows that pass through Python

    async def _parquet(self) -> None:
        module = importlib.import_module("anton.parquet")              # pyarrow: heavy, and an extra
        file = self.storage.open(self.found.path, self.found.size, self.found.etag)
        with file:
            opened = await asyncio.to_thread(module.Parquet, file)
            self._columns(opened.names)
            rows: Iterator[list[dict[str, Any]]] = opened.rows(self.reached, ROWS)
            while True:
                some = await asyncio.to_thread(next, rows, None)
                if some is None:
                    return
                named = [(row, {name: row[there] for there, name in zip(opened.names, self.names, strict=True) if name})
                         for row in some]
                await self._rows(named, self.reached + len(some), self.n + self.rejected + 1)

    async def _rows(self, rows: Sequence[tuple[Any, Any]], reached: int, first: int) -> None:
        supply = await made_keys(self.db, self.table.name)
        if supply is not None:
            await supply.stock(1, len(rows))
        ops, wrong = await asyncio.to_thread(self._recorded, rows)
        async with self._piece(reached) as piece:
            waiting: list[tuple[int, int]] = [(0, len(rows))]
            while waiting:
                start, end = waiting.pop()
                part = pick(ops, range(start, end)) if (start, end) != (0, len(rows)) else ops
                try:
                    async with piece.conn.transaction():
                        await apply(piece.conn, part)
                    continue
                except WriteRefused as error:
                    bad = min(error.owners) if error.owners else None
                    failure = error.error
                if bad is None and end - start > 1:
                    bad, middle = None, (start + end) // 2
                    waiting += [(middle, end), (start, middle)]
                elif bad is None or end - start == 1:
                    wrong[start if bad is None else bad] = _said(failure)
                else:
                    waiting += [one for one in ((bad + 1, end), (bad, bad + 1), (start, bad)) if one[0] < one[1]]
            for at in sorted(wrong):
                shown = rows[at][0]
                self._reject(first + at, shown if isinstance(shown, str) else str(shown), wrong[at])
            piece.n = len(rows) - len(wrong)

    def _recorded(self, rows: Sequence[tuple[Any, Any]]) -> tuple[list[Op], dict[int, str]]:
        """The writes, each of the row with its number; what is wrong with rows that are none."""
        wrong: dict[int, str] = {}
        with Scope("transaction", db=self.db) as scope:
            for at, (_, row) in enumerate(rows):
                owner.set(at)
                try:
                    if isinstance(row, Exception):
                        wrong[at] = str(row)
                    elif self.how.upsert:
                        self.table.upsert(row)
                    else:
                        self.table.extend((row,))
                except InvalidRecord as error:
                    wrong[at] = "; ".join(error.reasons)
            owner.set(WHOLE)
        return scope.take(), wrong

    def _reject(self, number: int, data: str, error: str) -> None:
        self.rejects.append((number, data[:KEPT].replace("\0", "\N{SYMBOL FOR NULL}"), error[:KEPT].replace("\0", "")))
        if self.rejected + len(self.rejects) > self.how.rejects:
            number, data, error = self.rejects[0]
            many = f"more than {self.how.rejects:,} rows do" if self.how.rejects else "a row does"
            raise self.failed(f"{many} not fit. Row {number:,}: {error}. It was: {data[:200]}. "
                              "rejects= says how many may be left out")


@dataclass
class _Piece:
    """The transaction of one piece. n: rows that went in."""

    conn: Conn
    n: int = 0


async def _sips(data: bytes) -> AsyncIterator[bytes]:
    """The data in small parts: of larger ones uvloop keeps copies, 100 MB of them and more."""
    for at in range(0, len(data), SIP):
        yield data[at:at + SIP]


def _at(records: Sequence[bytes], error: BaseException, end_of_line: bytes) -> int | None:
    """Which record a COPY stopped at; None when it does not say."""
    found = re.search(r"line (\d+)", getattr(error, "context", None) or "")
    if found is None:
        return None
    line, number = 0, int(found[1])
    for at, record in enumerate(records):
        line += 1 + record.count(end_of_line)
        if line >= number:
            return at
    return None


def _said(error: BaseException) -> str:
    """What Postgres said, with the column."""
    column = re.search(r"column ([^:\n]+)", getattr(error, "context", None) or "")
    return f"{column[1]}: {error}" if column else str(error)


def _is_text(column: Attribute) -> bool:
    return column.type.startswith(("text", "character"))


def _cell(cell: str, column: Attribute) -> str | None:
    """An empty cell is null where that may be, else an empty text."""
    return cell if cell or (column.notnull and _is_text(column)) else None


def _value(cell: str, column: Attribute) -> Any:
    """A cell as its column has it; times without a zone are UTC, as COPY takes them."""
    value = _cell(cell, column)
    if value is not None and column.type == "timestamp with time zone":
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            return value
        return at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return value
