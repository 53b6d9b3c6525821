"""Record: a row, read-only, and the batch of them that a handler gets.

    record["customer"]   a column; of a table without a model, a value of its data
    record.id            the key's usual name
    records.changes      what happened to each of them, in the same order

Tables with a model give instances of it instead of Record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, cast, overload

import asyncpg
import orjson

from anton.errors import WorldError, did_you_mean
from anton.write import WHOLE, owner

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

ChangeOp = Literal["new", "updated", "deleted", "truncate", "rebuilt", "failed"]
DOCUMENT = ("id", "data")  # what is written to a table without a model
_OWN = ("id", "created_at", "data")
_HIDDEN = frozenset({"_xmin", "_ord"})  # what the worker reads along


class Record(Mapping[str, Any]):
    """A row: record["column"], record.id, dict(record). Read-only.

    Of a table that Anton made without a model, the names are those of `data`, then id and created_at.
    """

    __slots__ = ("_data", "_row")

    def __init__(self, row: Mapping[str, Any], document: bool = False) -> None:
        data = row.get("data") if document else None
        self._row = row
        self._data: Mapping[str, Any] | None = data if isinstance(data, dict) else None

    def __getitem__(self, name: str) -> Any:
        data = self._data
        if data is not None and name in data:
            return data[name]
        try:
            return self._row[name]
        except KeyError:
            raise _missing(name, self) from None

    def __iter__(self) -> Iterator[str]:
        if self._data is None:
            return iter([name for name in self._row if name not in _HIDDEN])
        return iter([*(name for name in _OWN[:2] if name in self._row and name not in self._data), *self._data])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return (self._data is not None and name in self._data) or name in self._row

    @property
    def id(self) -> Any:
        """The column id, whatever the data says."""
        try:
            return self._row["id"]
        except KeyError:
            raise AttributeError(f"this record has no column id; it has: {', '.join(self)}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{name}={value!r}' for name, value in self.items())})"


class Appended(Record):
    """The record of a write that is not made yet: its key and values are final. Put together when it is looked at."""

    __slots__ = ("_columns", "_values")

    def __init__(self, columns: tuple[str, ...], values: tuple[Any, ...]) -> None:
        self._columns = columns
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name == "_row":
            value: Any = dict(zip(self._columns, self._values, strict=True))
        elif name == "_data":
            value = orjson.loads(memoryview(self._values[1])) if self._columns is DOCUMENT else None
        else:
            raise AttributeError(name)
        setattr(self, name, value)
        return value


class Short(Record):
    """A row of now, of a table that has lost columns. Asking it for one of them is no fault of this record.

    lost: their names. table, reader: what the error names.
    """

    __slots__ = ("_lost", "_reader", "_table")

    def __init__(self, row: Mapping[str, Any], lost: frozenset[str], table: str, reader: str) -> None:
        super().__init__(row)
        self._lost = lost
        self._table = table
        self._reader = reader

    def __getitem__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            if isinstance(name, str) and name in self._lost:
                raise LostColumn(self._table, name, self._reader) from None
            raise


class Row(asyncpg.Record):
    """A row as asyncpg gives it with record_class=Row: it is a Record, and costs nothing more."""

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:
        names: list[str] = self.keys()
        return iter(names)

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> Any:
        names = super().keys()
        return [name for name in names if name not in _HIDDEN]

    def values(self) -> Any:
        return [self[name] for name in self.keys()]

    def items(self) -> Any:
        return [(name, self[name]) for name in self.keys()]

    @property
    def id(self) -> Any:
        try:
            return asyncpg.Record.__getitem__(self, "id")
        except KeyError:
            raise AttributeError(f"this record has no column id; it has: {', '.join(self.keys())}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{name}={value!r}' for name, value in self.items())})"


class Document(Row):
    """A Row of a table that Anton made without a model."""

    __slots__ = ()

    def __getitem__(self, name: Any) -> Any:
        data = asyncpg.Record.__getitem__(self, "data")
        if type(data) is dict and name in data:
            return data[name]
        try:
            return asyncpg.Record.__getitem__(self, name)
        except KeyError:
            raise _missing(name, self) from None

    def get(self, name: Any, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def __contains__(self, name: object) -> bool:
        data = asyncpg.Record.__getitem__(self, "data")
        return (type(data) is dict and name in data) or asyncpg.Record.__contains__(self, name)

    def keys(self) -> Any:
        data = asyncpg.Record.__getitem__(self, "data")
        if type(data) is not dict:
            return list(_OWN)
        return [*(name for name in _OWN[:2] if name not in data), *data]


Record.register(Row)


@dataclass(slots=True, eq=False)
class Change(Generic[T]):
    """What happened to one record.

    op: "new" "updated" "deleted" "truncate" "rebuilt" "failed". key: a value, or a tuple; None where there are no
    records. old, new: the record before and after; None, whatever their type says, for the old of a new record and the
    new of a deleted one. attempt: 1 for the first run. idempotency_key: the same for all runs. at: when it was written.
    """

    op: ChangeOp
    key: Any
    old: T
    new: T
    attempt: int
    idempotency_key: str
    trace: int | None
    at: datetime
    tenant: str | None = None
    id: int = 0
    ordinal: int = 0


class _Owned(Sequence[T_co]):
    """A sequence whose iteration marks the current record: what is written meanwhile belongs to it."""

    __slots__ = ("_at", "_items")

    def __init__(self, items: Sequence[T_co], at: range | None = None) -> None:
        self._items = items
        self._at = range(len(items)) if at is None else at

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T_co]:
        mark, before, at = owner.set, owner.get(), WHOLE
        try:
            for at, item in zip(self._at, self._items, strict=True):
                mark(at)
                yield item
        finally:
            if owner.get() == at:                                      # else one that began before, in zip(), has ended
                mark(before)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._items)!r})"


class Records(_Owned[T_co]):
    """The records of one call, a sequence. Iterate: what is written meanwhile belongs to the record at hand.

    changes: a Change for each, in the same order; iterating them marks the record too.
    """

    __slots__ = ("_changes", "_find")

    def __init__(self, items: Sequence[T_co], changes: Callable[[], Sequence[Change[Any]]] | Sequence[Change[Any]] = (),
                 at: range | None = None) -> None:
        super().__init__(items, at)
        self._changes = changes
        self._find: dict[int, int] | None = None

    @property
    def changes(self) -> Changes[T_co]:
        """One Change for each record; made when first asked for."""
        if callable(self._changes):
            self._changes = self._changes()
        return Changes(self._changes, self._at if len(self._changes) == len(self._at) else None)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> Records[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | Records[T_co]:
        if isinstance(index, slice):
            changes = self.changes._items
            return Records(self._items[index], changes[index] if len(changes) == len(self) else (), self._at[index])
        return self._items[index]

    def position(self, of: object) -> int | None:
        """0-based position of a record or a change of this batch; WHOLE for (a part of) the batch; None for others."""
        if isinstance(of, _Owned):
            return WHOLE
        if self._find is None:
            self._find = {id(item): at for at, item in zip(self._at, self._items, strict=True)}
        found = self._find.get(id(of))
        if found is None and isinstance(of, Change):
            found = next((at for at, change in zip(self._at, self.changes._items, strict=True) if change is of), None)
        return found


class Changes(_Owned[Change[T]]):
    """The changes of a batch, a sequence parallel to its records."""

    __slots__ = ()

    @overload
    def __getitem__(self, index: int) -> Change[T]: ...
    @overload
    def __getitem__(self, index: slice) -> Changes[T]: ...
    def __getitem__(self, index: int | slice) -> Change[T] | Changes[T]:
        if isinstance(index, slice):
            return Changes(self._items[index], self._at[index])
        return self._items[index]


class NoColumn(KeyError):
    """A record has no such column, or value of its data. column: its name."""

    column: Any


class LostColumn(NoColumn, WorldError):
    """The table had this column, and its row of now has not: the handler waits. column: its name."""

    def __init__(self, table: str, column: str, reader: str) -> None:
        WorldError.__init__(
            self, f'table {table} has no column "{column}" any more, and {reader} reads it. Put it back, or '
            "deploy code that does without it; its records wait.", column=column)

    __str__ = Exception.__str__                                        # KeyError's is a repr


def _missing(name: Any, record: Any) -> KeyError:
    names = cast("KeysView[str]", record.keys())
    later = " What the database fills in can be read after the commit." if isinstance(record, Appended) else ""
    error = NoColumn(f'no "{name}" in this record.{did_you_mean(str(name), names)} It has: {", ".join(names)}.{later}')
    error.column = name
    return error
