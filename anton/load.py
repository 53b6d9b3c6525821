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
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any

import asyncpg

from anton import chunk
from anton.apply import apply, refused
from anton.db import Conn, Database, quote
from anton.errors import FileChanged, FileGone, InvalidRecord, LoadFailed, WriteRefused, one_of
from anton.layout import FORMATS, How, Layout
from anton.op import Op, pick
from anton.relation import Relation, describe, made_keys
from anton.table import Table
from anton.write import WHOLE, Scope, owner

if TYPE_CHECKING:
    from anton.storage import Found, Storage

RAW, PARSED, ROWS = 4 << 20, 1 << 20, 10_000  # bytes of a piece: for COPY, for Python; rows of Parquet's
READ = 1 << 20  # bytes of a request: larger ones leave holes in the memory of the threads that make them
SIP = 1 << 16  # bytes of a message of COPY
LONGEST = 64 << 20  # bytes of one record
KEPT = 8000  # characters kept of a row that did not fit
_DOT = re.compile(rb"^\\\.\r?$", re.MULTILINE)


@dataclass(frozen=True)
class Loaded:
    """What is in. rows: in the table; rejected: in load_reject. changed: the file was replaced before all was in."""

    rows: int
    rejected: int
    changed: bool = False


class _Moved(Exception):
    """Somebody else goes on with this load."""


async def load(db: Database, app: str, storage: Storage, found: Found, table: Table[Any], how: How) -> Loaded:
    """Loads one version of a file, or what is missing of it. Raises LoadFailed, StorageError."""
    relation = await describe(db, table.name)
    job = _Load(db, storage, found, table, relation, how)
    version = found.etag or found.modified.astimezone(UTC).isoformat()  # a touch in S3 keeps the etag
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
        self.layout = Layout(found.path, table, relation, how)
        self.failed = self.layout.failed
        self.rejects: list[tuple[int, str, str]] = []                  # of the piece at hand

    async def run(self, row: Any) -> Loaded:
        self.id, self.reached, self.n, self.rejected = row["id"], row["reached"], row["n"], row["rejected"]
        if self.layout.format is None:
            raise self.failed(f"what is in it? Say format=, which is {one_of(FORMATS)}")
        if self.layout.format == "parquet":
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
        if not self.layout.packed:
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
        quote = self.layout.quote
        if not self.found.size:
            return
        begin, end_of_line = await self._begin(quote)
        raw = self.layout.raw
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
        if self.layout.format == "jsonl":
            return bom, end_of_line
        if self.how.columns is not None:
            self.layout.header(list(self.how.columns))
            return bom, end_of_line
        size = chunk.first(head[bom:], quote, end_of_line) or len(head) - bom
        first = head[bom:bom + size].strip(b"\r\n").decode(self.how.encoding)
        if not first:
            raise self.failed("it has no header: its first line is empty. columns=[…] names the columns of a file "
                              "without one")
        try:
            self.layout.header(chunk.cells(first, self.layout.delimiter))
        except csv.Error as error:
            raise self.failed(f"its header is no CSV: {error}") from None
        return bom + size, end_of_line

    # --- one piece, one transaction

    async def _write(self, data: bytes, reached: int, raw: bool, quote: bytes, end_of_line: bytes) -> None:
        first = self.n + self.rejected + 1                             # the number of its first row
        if raw:
            async with self._piece(reached) as piece:
                piece.n = await self._copy(piece.conn, data, first, end_of_line)
            return
        records = await asyncio.to_thread(chunk.split, data, quote, end_of_line)
        rows = await asyncio.to_thread(lambda: [self.layout.parsed(record) for record in records])
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
        options = self.layout.copied
        if _DOT.search(data):                                          # a line that ends COPY before Postgres 18
            records = chunk.split(data, chunk.QUOTE, end_of_line)
            data = await asyncio.to_thread(self.layout.as_text, records)
            options = {"format": "text", "encoding": "utf-8"}
        if not data:
            return 0
        done = await conn.copy_to_table(self.relation.table, schema_name=self.relation.schema, source=_sips(data),
                                        columns=self.layout.names, **options)
        return int(done.split()[1])

    # --- rows that pass through Python

    async def _parquet(self) -> None:
        module = importlib.import_module("anton.parquet")              # pyarrow: heavy, and an extra
        file = self.storage.open(self.found.path, self.found.size, self.found.etag)
        with file:
            opened = await asyncio.to_thread(module.Parquet, file)
            self.layout.header(opened.names)
            rows: Iterator[list[dict[str, Any]]] = opened.rows(self.reached, ROWS)
            while True:
                some = await asyncio.to_thread(next, rows, None)
                if some is None:
                    return
                named = [(row, self.layout.renamed(opened.names, row)) for row in some]
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
