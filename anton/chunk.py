"""Chunk: text files cut into whole records, wherever the pieces that arrive are cut. Pure functions.

    cut(data, QUOTE)      how many bytes at its beginning are whole records
    split(data, QUOTE)    those records, each as it stands in the file
    cells(record, …)      the cells of a CSV record
    copy_text(rows)       rows as COPY reads them in its text format

A quote opens and closes wherever it stands, as in Postgres's CSV.
"""

from __future__ import annotations

import csv
import re
import sys
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from itertools import accumulate

QUOTE = b'"'
_ESCAPED = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_ESCAPE = re.compile(r"[\\\t\n\r]")

csv.field_size_limit(sys.maxsize)                                      # records are bounded where they are cut


def cut(data: bytes, quote: bytes = b"", end_of_line: bytes = b"\n") -> int:
    """The length of the whole records at the beginning of data; 0 when it holds none. quote: b"" where none matters."""
    if not quote:
        return data.rfind(end_of_line) + 1
    end, odd = len(data), data.count(quote) & 1
    while True:
        at = data.rfind(end_of_line, 0, end)
        if at < 0:
            return 0
        odd ^= data.count(quote, at, end) & 1
        if not odd:
            return at + 1
        end, odd = data.rfind(quote, 0, at), 0                         # it is inside of what this quote opens


def first(data: bytes, quote: bytes = b"", end_of_line: bytes = b"\n") -> int:
    """The length of the first record at the beginning of data, its end of line included; 0 when it is not whole."""
    at = data.find(end_of_line)
    while at >= 0 and quote and data.count(quote, 0, at) & 1:
        at = data.find(end_of_line, at + 1)
    return at + 1


def split(data: bytes, quote: bytes = b"", end_of_line: bytes = b"\n") -> list[bytes]:
    """Whole records, one by one, without the ends of their lines; empty lines are none."""
    lines = data.split(end_of_line)
    if quote and quote in data:
        odds = list(accumulate((line.count(quote) & 1 for line in lines), lambda odd, more: odd ^ more))
        if any(odds):
            lines = _joined(lines, odds, end_of_line)
    return [line.removesuffix(b"\r") for line in lines if line not in (b"", b"\r")]


def _joined(lines: Sequence[bytes], odds: Sequence[int], end_of_line: bytes) -> list[bytes]:
    records, start = [], 0
    for at, odd in enumerate(odds, 1):
        if not odd or at == len(lines):
            records.append(end_of_line.join(lines[start:at]))
            start = at
    return records


def cells(record: str, delimiter: str = ",") -> list[str]:
    """The cells of one CSV record. Raises csv.Error for one that is broken."""
    return next(csv.reader([record], delimiter=delimiter, strict=True), [])


def copy_text(rows: Iterable[Sequence[str | None]]) -> bytes:
    """Rows in COPY's text format, which holds every text and null."""
    def cell(value: str | None) -> str:
        if value is None:
            return "\\N"
        return _ESCAPE.sub(lambda found: _ESCAPED[found[0]], value) if _ESCAPE.search(value) else value

    return "".join("\t".join(map(cell, row)) + "\n" for row in rows).encode("utf-8", "surrogatepass")


async def gunzip(pieces: AsyncIterator[bytes], most: int) -> AsyncGenerator[bytes]:
    """What gzip packed, in pieces of at most `most` bytes. Raises ValueError when it is broken, or cut off."""
    unpack = zlib.decompressobj(31)
    begun = False
    async for piece in pieces:
        while piece:
            if unpack.eof:                                             # another member
                unpack, begun = zlib.decompressobj(31), False
                piece = piece.lstrip(b"\0")
                continue
            try:
                data = unpack.decompress(piece, most)
            except zlib.error as error:
                raise ValueError(f"not gzip: {error}") from None
            begun, piece = True, unpack.unused_data or unpack.unconsumed_tail
            if data:
                yield data
        while begun and not unpack.eof:
            data = unpack.decompress(b"", most)
            if not data:
                break
            yield data
    if not unpack.eof:
        raise ValueError("it is cut off: its gzip does not end")
