"""Sink: turns what users append into rows of a Scope. The hot path: a record costs well under a microsecond.

    Documents   tables that Anton made without a model: one jsonb column
    Columns     tables without a model that have columns of their own
    Models      tables with a model
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import Any, Protocol

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from anton.columns import Shape
from anton.db import Json, to_json
from anton.errors import InvalidRecord, did_you_mean
from anton.later import Due
from anton.record import DOCUMENT, Appended
from anton.relation import Keys, Relation, described, keys
from anton.write import Rows, Scope, owner

Put = Callable[[Iterable[Any]], None]

NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


class Sink(Protocol):
    """Where a scope's appends to one table go."""

    def append(self, row: Any) -> Any:
        """Adds one; returns its record with the final key."""

    def extend(self, rows: Iterable[Any]) -> None:
        """Adds all."""

    def upsert(self, row: Any) -> tuple[tuple[str, ...], tuple[Any, ...], Any]:
        """Columns, values and record of a row whose key must be given; adds nothing."""

    def part(self) -> None:
        """What is added from now on comes after all other writes so far."""

    def close(self) -> None:
        """Gives unused keys back."""


class _Keyed:
    """A sink's supply of keys."""

    def __init__(self, scope: Scope, relation: Relation, due: Due | None) -> None:
        self.scope = scope
        self.relation = relation
        self.due = due
        self.made: Keys | None = None  # of the one key column that the database fills
        self.ids: Iterator[Any] = iter(())

    def more(self) -> Any:
        """The next key, from a new block."""
        assert self.made is not None
        self.ids = self.made.take()
        return next(self.ids)

    def close(self) -> None:
        if self.made is not None:
            self.made.give_back(self.ids)
            self.ids = iter(())

    def rows(self, columns: tuple[str, ...]) -> Put:
        """Starts a run of rows; returns what adds (owner, values) to it."""
        run = Rows("insert", self.relation, columns, due=self.due)
        self.scope.ops.append(run)
        return run.flat.extend


class _Plain(_Keyed):
    """A sink whose rows all have the same columns."""

    columns: tuple[str, ...]
    put: Put

    def part(self) -> None:
        self.put = self._resume

    def start(self) -> Put:
        """What adds many rows."""
        if self.put == self._resume:
            self.put = self.rows(self.columns)
        return self.put

    def _resume(self, row: Iterable[Any]) -> None:
        self.start()(row)


def encode(table: str, row: Any) -> Json:
    """A dict as JSON. Raises InvalidRecord for what is no dict, or what JSON or Postgres cannot hold."""
    if type(row) is not dict:
        if not isinstance(row, (Mapping, BaseModel)):
            raise InvalidRecord(table, row, [f"it takes a dict, not {type(row).__name__}"])
        row = row.model_dump() if isinstance(row, BaseModel) else dict(row)
    try:
        data = orjson.dumps(row, to_jsonable_python)
    except TypeError:
        try:
            data = to_json(row)
        except (TypeError, ValueError) as error:
            raise InvalidRecord(table, row, _no_json(row) or [str(error)]) from error
    if data.find(b"\\u0000") >= 0 and NUL.search(data):
        raise InvalidRecord(table, row, ["a text holds the character NUL, which Postgres cannot store"])
    return Json(data)


def _no_json(row: Mapping[str, Any]) -> list[str]:
    """Which values are the trouble."""
    found = []
    for name, value in row.items():
        try:
            to_json(value)
        except (TypeError, ValueError) as error:
            found.append(f"{name}: {error} ({type(value).__name__})")
    return found


class Documents(_Plain):
    """Rows (id, data)."""

    def __init__(self, scope: Scope, relation: Relation, due: Due | None = None) -> None:
        super().__init__(scope, relation, due)
        self.name = relation.name
        self.made = keys(scope.db, relation, "id")
        self.columns = DOCUMENT
        self.put = self.rows(DOCUMENT)

    def append(self, row: Any) -> Appended:
        data = encode(self.name, row)
        try:
            key = next(self.ids)
        except StopIteration:
            key = self.more()
        values = (key, data)
        self.put((owner.get(), values))
        return Appended(DOCUMENT, values)

    def extend(self, rows: Iterable[Any]) -> None:
        name, put, who = self.name, self.start(), owner.get
        for row in rows:
            data = encode(name, row)
            try:
                key = next(self.ids)
            except StopIteration:
                key = self.more()
            put((who(), (key, data)))

    def upsert(self, row: Any) -> tuple[tuple[str, ...], tuple[Any, ...], Any]:
        row = dict(row) if isinstance(row, Mapping) else row
        key = row.pop("id", None) if isinstance(row, dict) else None
        if type(key) is not int:
            raise InvalidRecord(self.name, row, ['upsert needs the key: {"id": 7, …}'])
        values = (key, encode(self.name, row))
        return DOCUMENT, values, Appended(DOCUMENT, values)


class Columns(_Keyed):
    """Rows of a table without a model; columns that a dict does not name get their defaults."""

    def __init__(self, scope: Scope, relation: Relation, due: Due | None = None) -> None:
        super().__init__(scope, relation, due)
        self._forms: dict[frozenset[str], _Form] = {}
        self._form = _Form((), False, lambda row: (), lambda items: None)
        self._count = -1

    def append(self, row: Any) -> Appended:
        form = self._form
        try:
            values = form.get(row)
            if len(row) != self._count:
                raise KeyError
        except (KeyError, TypeError, AttributeError):
            form = self._turn_to(row)
            values = form.get(row)
        if form.made:
            try:
                key = next(self.ids)
            except StopIteration:
                key = self.more()
            values = (key, *values)
        form.put((owner.get(), values))
        return Appended(form.columns, values)

    def extend(self, rows: Iterable[Any]) -> None:
        form, count, who = self._form, self._count, owner.get
        get, put, made, ids = form.get, self._start(form), form.made, self.ids
        for row in rows:
            try:
                values = get(row)
                if len(row) != count:
                    raise KeyError
            except (KeyError, TypeError, AttributeError):
                form = self._turn_to(row)
                get, put, made, count, ids = form.get, self._start(form), form.made, self._count, self.ids
                values = get(row)
            if made:
                try:
                    put((who(), (next(ids), *values)))
                except StopIteration:
                    put((who(), (self.more(), *values)))
                    ids = self.ids
            else:
                put((who(), values))

    def upsert(self, row: Any) -> tuple[tuple[str, ...], tuple[Any, ...], Any]:
        names = self._names(row)
        missing = [name for name in self.relation.key if row.get(name) is None]
        if missing or not self.relation.key:
            raise InvalidRecord(self.relation.name, row, [
                f"upsert needs the key: {', '.join(missing)}" if missing else "upsert needs a table with a key"])
        values = tuple(row[name] for name in names)
        return names, values, Appended(names, values)

    def part(self) -> None:
        for form in self._forms.values():
            form.put = partial(self._resume, form)

    def _start(self, form: _Form) -> Put:
        if isinstance(form.put, partial):
            form.put = self.rows(form.columns)
        return form.put

    def _resume(self, form: _Form, row: Iterable[Any]) -> None:
        self._start(form)(row)

    def _turn_to(self, row: Any) -> _Form:
        """Makes the form of this row the current one."""
        names = self._names(row)
        form = self._forms.get(frozenset(names))
        if form is None:
            form = self._forms[frozenset(names)] = self._plan(row, names)
        self._form, self._count = form, len(names)
        return form

    def _names(self, row: Any) -> tuple[str, ...]:
        """The row's columns in the table's order. Raises InvalidRecord for a name the table does not have."""
        if not isinstance(row, Mapping):
            raise InvalidRecord(self.relation.name, row, [f"it takes a dict, not {type(row).__name__}"])
        if not row.keys() <= self.relation.columns.keys():
            self.relation = described(self.scope.db, self.relation.name, fresh=True)  # it may have a new column
        known = self.relation.columns
        reasons = [f'no column "{name}".{did_you_mean(str(name), known)} It has: {", ".join(known)}'
                   for name in row if name not in known]
        reasons += [f'column "{name}" is computed by the database' for name in row
                    if name in known and known[name].generated]
        if reasons:
            raise InvalidRecord(self.relation.name, row, reasons)
        return tuple(name for name in known if name in row)

    def _plan(self, row: Any, names: tuple[str, ...]) -> _Form:
        relation = self.relation
        made: tuple[str, ...] = ()
        for name in relation.key:
            if name in names or made:
                continue
            supply = keys(self.scope.db, relation, name)
            if supply is not None:
                self.made, made = supply, (name,)
        missing = [f'column "{column.name}" may not be null and has no default' for column in relation.columns.values()
                   if column.notnull and column.default is None and not column.generated and column.name not in names]
        if missing:
            raise InvalidRecord(relation.name, row, missing)
        columns = (*made, *names)
        get = _several(names)
        return _Form(columns, bool(made), get, self.rows(columns))


class _Form:
    """Dicts with the same names: their columns, whether a key is put first, how to read one and where to put it."""

    __slots__ = ("columns", "get", "made", "put")

    def __init__(self, columns: tuple[str, ...], made: bool, get: Callable[[Any], tuple[Any, ...]],
                 put: Put) -> None:
        self.columns = columns
        self.made = made
        self.get = get
        self.put = put


def _several(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """itemgetter that always gives a tuple."""
    if len(names) > 1:
        return itemgetter(*names)
    if names:
        return lambda row: (row[names[0]],)
    return lambda row: ()


class Models(_Plain):
    """Rows of a table with a model; dicts are validated into it."""

    def __init__(self, scope: Scope, relation: Relation, shape: Shape[Any], due: Due | None = None) -> None:
        super().__init__(scope, relation, due)
        self.model = shape.model
        self.to_row = shape.to_row
        self.validate = shape.model.__pydantic_validator__.validate_python
        self.hidden = tuple(name for name in relation.key if name not in shape.names)[:1]
        self.key = (self.hidden or (*relation.key, ""))[0]
        self.at = shape.names.index(self.key) if self.key in shape.names and len(relation.key) == 1 else -1
        if self.hidden or self.at >= 0:
            self.made = keys(scope.db, relation, self.key)
        self.columns = (*self.hidden, *shape.names)
        self.put = self.rows(self.columns)

    def append(self, row: Any) -> Any:
        given = isinstance(row, self.model)
        record = row if given else self.valid(row)
        values = self.to_row(record)
        if self.hidden or (self.at >= 0 and values[self.at] is None):
            key, values = self.with_key(values)
            if self.hidden:
                record = _beside(record, self.key, key) if given else beside(record, self.key, key)
            else:
                record = _with(record, self.key, key) if given else _set(record, self.key, key)
        self.put((owner.get(), values))
        return record

    def extend(self, rows: Iterable[Any]) -> None:
        model, to_row, put, who, at, hidden = self.model, self.to_row, self.start(), owner.get, self.at, self.hidden
        for row in rows:
            values = to_row(row if isinstance(row, model) else self.valid(row))
            if hidden or (at >= 0 and values[at] is None):
                values = self.with_key(values)[1]
            put((who(), values))

    def upsert(self, row: Any) -> tuple[tuple[str, ...], tuple[Any, ...], Any]:
        key = None
        if self.hidden and isinstance(row, Mapping):
            row = dict(row)
            key = row.pop(self.key, None)
        elif self.hidden and isinstance(row, self.model):
            key = row.__dict__.get(self.key)
        record = row if isinstance(row, self.model) else self.valid(row)
        values = (*((key,) if self.hidden else ()), *self.to_row(record))
        missing = [name for name in self.relation.key if values[self.columns.index(name)] is None]
        if missing or not self.relation.key:
            raise InvalidRecord(self.relation.name, row, [
                f"upsert needs the key: {', '.join(missing)}" if missing else "upsert needs a table with a key"])
        return self.columns, values, record

    def valid(self, row: Any) -> Any:
        """The row as the model. Raises InvalidRecord with every reason."""
        try:
            return self.validate(dict(row) if isinstance(row, Mapping) and type(row) is not dict else row)
        except ValidationError as error:
            raise InvalidRecord(self.relation.name, row, reasons(error)) from None

    def with_key(self, values: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """A new key, and the values with it. The values alone where the column has no default."""
        if self.made is None:
            return None, values
        try:
            key = next(self.ids)
        except StopIteration:
            key = self.more()
        if self.hidden:
            return key, (key, *values)
        return key, (*values[:self.at], key, *values[self.at + 1:])


def reasons(error: ValidationError) -> list[str]:
    """What is wrong, field by field: "total: Input should be a valid decimal"."""
    return [": ".join(filter(None, (".".join(map(str, detail["loc"])), detail["msg"])))
            for detail in error.errors(include_url=False, include_input=False)]


def _set(record: BaseModel, name: str, value: Any) -> BaseModel:
    record.__dict__[name] = value
    record.__pydantic_fields_set__.add(name)
    return record


def beside(record: BaseModel, name: str, value: Any) -> BaseModel:
    """record.id of a model without that field: neither dumped nor compared, as functools.cached_property's values."""
    record.__dict__[name] = value
    return record


def _beside(record: BaseModel, name: str, value: Any) -> BaseModel:
    return beside(_copy(record), name, value)


def _with(record: BaseModel, name: str, value: Any) -> BaseModel:
    """A copy with one field set; the user's own object stays as it is."""
    return _set(_copy(record), name, value)


def _copy(record: BaseModel) -> BaseModel:
    copy = object.__new__(type(record))
    _put(copy, "__dict__", {**record.__dict__})
    _put(copy, "__pydantic_fields_set__", {*record.__pydantic_fields_set__})
    _put(copy, "__pydantic_extra__", record.__pydantic_extra__ and {**record.__pydantic_extra__})
    _put(copy, "__pydantic_private__", record.__pydantic_private__ and {**record.__pydantic_private__})
    return copy


_put = object.__setattr__
