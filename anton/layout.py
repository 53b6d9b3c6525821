"""Layout: how the records of a file become rows of a Table: its format, which column each of its names is, its cells.

    layout = Layout("in/orders.csv", table, relation, How(map={"id": "Nr"}))
    layout.header(["Nr", "customer"])            which column each is; LoadFailed for what the table has not, or misses
    layout.parsed(b"7,Ann")                      ("7,Ann", {"id": "7", "customer": "Ann"}), or what is wrong with it
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import asyncpg
import orjson

from anton import chunk
from anton.columns import exact
from anton.errors import BadOption, LoadFailed, did_you_mean, one_of
from anton.relation import Attribute, Relation
from anton.table import Table

FORMATS = ("csv", "tsv", "jsonl", "parquet")
SUFFIXES = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet"}
REJECTS = 1000


@dataclass(frozen=True)
class How:
    """How a file is read. See Files.load, whose options these are."""

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


class Layout:
    """How one file is read into one table. names: the column of each of the file's, "" for what is left out."""

    def __init__(self, path: str, table: Table[Any], relation: Relation, how: How) -> None:
        self.path, self.table, self.relation, self.how = path, table, relation, how
        name = path.lower()
        self.packed = name.endswith(".gz")
        self.format = how.format or SUFFIXES.get(name.removesuffix(".gz").rpartition(".")[2])
        self.delimiter = how.delimiter or ("\t" if self.format == "tsv" else ",")
        self.quote = b"" if self.format == "jsonl" else chunk.QUOTE
        self.names: list[str] = []

    def failed(self, reason: str) -> LoadFailed:
        """What to raise."""
        return LoadFailed(self.path, self.relation.name, reason)

    def header(self, header: list[str]) -> None:
        """Takes the file's names. Raises LoadFailed for what the table has not, or misses."""
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

    @property
    def raw(self) -> bool:
        """Whether COPY may read the file itself."""
        if self.format not in ("csv", "tsv") or self.relation.document or not self.relation.copy:
            return False
        if self.table.shape is None:
            if self.how.upsert or "" in self.names:
                raise self.failed("upsert= and skip= need a table with a model")
            return True
        return (not self.how.upsert and "" not in self.names and exact(self.table.shape.model)
                and codecs.lookup(self.how.encoding).name in ("utf-8", "ascii"))

    @property
    def copied(self) -> dict[str, Any]:
        """How COPY is to read it: an empty cell is null where that may be, else an empty text."""
        columns = [self.relation.columns[name] for name in self.names]
        nulls = [column.name for column in columns if not column.notnull]
        texts = [column.name for column in columns if column.notnull and _is_text(column)]
        return {"format": "csv", "delimiter": self.delimiter, "encoding": "utf-8",
                **({"force_null": nulls} if nulls else {}), **({"force_not_null": texts} if texts else {})}

    def as_text(self, records: Sequence[bytes]) -> bytes:
        """CSV records in COPY's text format. Raises asyncpg's DataError, as COPY would."""
        columns, rows = [self.relation.columns[name] for name in self.names], []
        for record in records:
            try:
                given = chunk.cells(record.decode(), self.delimiter)
            except (csv.Error, UnicodeDecodeError) as error:
                raise asyncpg.DataError(str(error)) from None
            if len(given) != len(columns):
                raise asyncpg.DataError(f"it has {len(given)} cells and not {len(columns)}")
            rows.append([_cell(cell, column) for cell, column in zip(given, columns, strict=True)])
        return chunk.copy_text(rows)

    def renamed(self, there: Sequence[str], row: Mapping[str, Any]) -> dict[str, Any]:
        """A row by the table's names. there: the file's, in the order that header() got them."""
        return {name: row[own] for own, name in zip(there, self.names, strict=True) if name}

    def parsed(self, record: bytes) -> tuple[str, Any]:
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
        given = chunk.cells(text, self.delimiter)
        if len(given) != len(self.names):
            raise ValueError(f"it has {len(given)} cells and the file {len(self.names)} columns")
        if self.relation.document:
            return {name: cell or None for name, cell in zip(self.names, given, strict=True) if name}
        columns = self.relation.columns
        return {name: _value(cell, columns[name]) for name, cell in zip(self.names, given, strict=True) if name}


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
