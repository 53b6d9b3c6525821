"""Chunk: wherever a file is cut, its records come out whole."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anton.chunk import QUOTE, cells, copy_text, cut, first, gunzip, split

cell = st.text(st.sampled_from('ab",\n\r\\.\tü '), max_size=6)
rows = st.lists(st.lists(cell, min_size=2, max_size=3), max_size=8)


def written(some: Sequence[Sequence[str]], end: str = "\n") -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(some)
    return out.getvalue().encode()


@given(rows, st.lists(st.integers(0, 60)), st.sampled_from(["\n", "\r\n"]))
def test_records_come_out_whole_wherever_the_pieces_are_cut(some: list[list[str]], sizes: list[int], end: str) -> None:
    data, found, rest = written(some, end), [], b""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    for piece in [*pieces, data]:
        rest += piece
        size = cut(rest, QUOTE)
        assert rest[:size].count(QUOTE) % 2 == 0 and (not size or rest[size - 1:size] == b"\n")
        found += split(rest[:size], QUOTE)
        rest = rest[size:]
    assert rest == b"" and [cells(record.decode()) for record in found] == some


@given(rows.filter(bool))
def test_the_first_record_is_found_at_its_end(some: list[list[str]]) -> None:
    data = written(some)
    assert data[:first(data, QUOTE)] == written(some[:1])
    assert first(data[:len(written(some[:1])) - 1], QUOTE) == 0


def test_without_quotes_each_line_is_a_record() -> None:
    assert split(b'{"a": "\\""}\r\n\n[1"]\n') == [b'{"a": "\\""}', b'[1"]']
    assert cut(b'a"\nb') == 3 and cut(b"ab") == 0 and first(b"") == 0


def test_old_line_ends_are_line_ends_too() -> None:
    assert split(b'a,"x\ry"\rb\r', QUOTE, b"\r") == [b'a,"x\ry"', b"b"]


@given(st.lists(st.lists(st.none() | cell, min_size=2, max_size=2), max_size=5))
def test_copys_text_holds_every_cell(some: list[list[str | None]]) -> None:
    plain = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}

    def back(text: str) -> str | None:
        out, at = "", 0
        while at < len(text):
            step = 2 if text[at] == "\\" else 1
            out += plain.get(text[at:at + step], text[at:at + step])
            at += step
        return None if text == "\\N" else out

    lines = copy_text(some).decode().split("\n")[:-1]
    assert [[back(text) for text in line.split("\t")] for line in lines] == some


async def unpacked(data: bytes, size: int, most: int = 1000) -> list[bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), size):
            yield data[at:at + size]

    return [piece async for piece in gunzip(pieces(), most)]


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=4), st.integers(1, 50))
def test_gzip_is_unpacked_wherever_it_is_cut(parts: list[bytes], size: int) -> None:
    packed = b"".join(gzip.compress(part) for part in parts)
    assert b"".join(asyncio.run(unpacked(packed, size))) == b"".join(parts)


def test_a_bomb_comes_in_small_pieces() -> None:
    pieces = asyncio.run(unpacked(gzip.compress(b"x" * 5_000_000), 1 << 20))
    assert sum(map(len, pieces)) == 5_000_000 and max(map(len, pieces)) <= 1000


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"x" * 1000)[:-9], gzip.compress(b"x") + b"more"])
def test_broken_gzip_is_said(data: bytes) -> None:
    with pytest.raises(ValueError, match="gzip"):
        asyncio.run(unpacked(data, 3))
