"""Table: declared once; takes writes, answers reads, and its records are events.

    orders  = Table("orders", Order)         columns from a Pydantic model
    prompts = Table("prompts")               id, created_at, and data: any dict
    legacy  = Table("shop.orders", Order)    was there before Anton: adopted, never altered

`anton migrate` makes the tables that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import chain, islice
from typing import Annotated, Any, Generic, TypeVar, cast, overload

from pydantic import BaseModel, TypeAdapter

from anton.app import current_app, place_of_caller
from anton.columns import Shape, kind_of
from anton.db import current_database, split_name
from anton.errors import BadOption, UnknownOption, WriteError
from anton.event import BuildEvent, Event
from anton.later import Due, due_of
from anton.query import Query
from anton.rebuilt import Failed, Rebuilt
from anton.record import ChangeOp, Record
from anton.relation import Relation, writable
from anton.sink import Columns, Documents, Models, Sink, beside
from anton.write import Rows, Scope, apply, find_scope, owner, scope, transaction

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Names = str | Sequence[str]
Length = str | float | timedelta

CHUNK = 10_000  # records of one COPY when a script extends


class Table(Generic[T]):
    """A Postgres table as records.

    name: "orders" or "shop.orders", as written. model: a Pydantic model; None: id, created_at and data, or whatever
    columns a table has that was there before. key: a field or several, default "id". unique, index: fields, or tuples
    of them, for a table that Anton makes. Raises DuplicateName, BadOption.
    """

    @overload
    def __init__(self: Table[Record], name: str, model: None = None) -> None: ...
    @overload
    def __init__(self: Table[M], name: str, model: type[M], *, key: Names | None = None,
                 unique: Sequence[Names] = (), index: Sequence[Names] = ()) -> None: ...
    def __init__(self, name: str, model: type[Any] | None = None, *, key: Names | None = None,
                 unique: Sequence[Names] = (), index: Sequence[Names] = (), **unknown: Any) -> None:
        of = f'Table("{name}")'
        for option in unknown:
            raise UnknownOption(option, of, ("model", "key", "unique", "index"))
        if model is not None and not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise BadOption("model", model, of, "a Pydantic model: class Order(BaseModel): …")
        try:
            split_name(name)
        except (ValueError, TypeError):
            raise BadOption("name", name, "Table", 'a text: orders, shop.orders, or "a.b" in double quotes') from None
        self.name = name
        self.model: type[Any] | None = model
        self.shape: Shape[Any] | None = None if model is None else Shape(model, key, name)
        self.unique = _names(self.shape, "unique", unique, of)
        self.index = _names(self.shape, "index", index, of)
        if model is None and key is not None:
            raise BadOption("key", key, of, "no key without a model: the key is id, or what the table has")
        self.make: Callable[[Any], T] | None = _maker(self.shape) if self.shape else None
        self._checks: dict[str, tuple[TypeAdapter[Any], Callable[[Any], Any] | None]] = {}
        self.read_only = ""                                            # who writes it, where nobody else may
        self.place = place_of_caller()
        current_app().claim_name("table", name, self.place)
        current_app().tables[name] = self

    @property
    def on_new_records(self) -> Event[T]:
        """Handles inserted records: @orders.on_new_records."""
        return self._event("new_records", ("new",))

    @property
    def on_updated_records(self) -> Event[T]:
        """Handles updated records; records.changes has old and new."""
        return self._event("updated_records", ("updated",))

    @property
    def on_deleted_records(self) -> Event[T]:
        """Handles deleted records, as they were."""
        return self._event("deleted_records", ("deleted",))

    @property
    def on_changes(self) -> Event[T]:
        """Handles new, updated and deleted records; records.changes says which."""
        return self._event("changes", ("new", "updated", "deleted"))

    @property
    def on_truncate(self) -> Event[T]:
        """Handles TRUNCATE: no records, one change."""
        return self._event("truncate", ("truncate",))

    @property
    def on_rebuilt(self) -> BuildEvent[Rebuilt]:
        """Handles rebuilds of a table that dbt or a SQL model makes: (rebuilt) or (rebuilt, ctx)."""
        return BuildEvent(self, "rebuilt", ("rebuilt",))

    @property
    def on_failed(self) -> BuildEvent[Failed]:
        """Handles rebuilds that failed: (failed) or (failed, ctx). The table is as it was."""
        return BuildEvent(self, "failed", ("failed",))

    def _event(self, verb: str, ops: tuple[ChangeOp, ...]) -> Event[T]:
        return Event(self, verb, ops)

    def append(self, row: T | Mapping[str, Any], *, of: object = None, delay: Length | None = None,
               at: datetime | None = None) -> T:
        """Records one insert and returns its record with the final key: record.id, even if the model has no such field.

        row: the model or a dict. of: the input record it belongs to, or all of them; default: the one at hand.
        delay, at: the row is written now, and handled so much later, "1h", or at that time, an aware datetime.
        Raises InvalidRecord for what does not fit, NoScope in async code with nothing around, BadOption.
        """
        if of is None and delay is None and at is None:
            current = scope.get()
            if current is not None:
                record: T = (current.sinks.get(self) or self._sink(current)).append(row)
                return record
        found = find_scope(of)
        if found is None:
            with transaction():
                return self.append(row, delay=delay, at=at)
        due = due_of(found[0].db, delay, at, self.name)
        mark = owner.set(found[1])
        try:
            record = (found[0].sinks.get((self, due) if due else self) or self._sink(found[0], due)).append(row)
        finally:
            owner.reset(mark)
        return record

    def extend(self, rows: Iterable[T | Mapping[str, Any]], *, of: object = None, delay: Length | None = None,
               at: datetime | None = None) -> None:
        """Records an insert of each row; any iterable, a generator is taken as it comes. of, delay, at: as for append.

        In a script: all of them in one transaction, in chunks, so that a million fits into memory.
        """
        found = find_scope(of)
        if found is None:
            self._load(rows, delay, at)
            return
        due = due_of(found[0].db, delay, at, self.name)
        mark = owner.set(found[1]) if of is not None else None
        try:
            (found[0].sinks.get((self, due) if due else self) or self._sink(found[0], due)).extend(rows)
        finally:
            if mark is not None:
                owner.reset(mark)

    def upsert(self, row: T | Mapping[str, Any], *, of: object = None, delay: Length | None = None,
               at: datetime | None = None) -> T:
        """Records: insert the row, or set its columns where the key exists. Without a model a dict names its "id".

        of, delay, at: as for append.
        """
        found = find_scope(of)
        if found is None:
            with transaction():
                return self.upsert(row, delay=delay, at=at)
        current, who = found
        due = due_of(current.db, delay, at, self.name)
        sink = current.sinks.get(self) or self._sink(current)
        columns, values, record = sink.upsert(row)
        last = current.ops[-1] if current.ops else None
        if not (isinstance(last, Rows) and last.kind == "upsert" and last.columns == columns and last.due == due
                and last.relation is self._relation(current)):
            last = Rows("upsert", self._relation(current), columns, due=due)
            current.add(last)
        last.flat.extend((who, values))
        return cast(T, record)

    def select(self, where: str | None = None, /, **args: Any) -> Query[T]:
        """Rows, lazily: select(status="new"), select("total > {x}", x=9), or both together."""
        return Query(self, where, args)

    def get(self, *key: Any) -> T | None:
        """The row with this key, None when there is none. In async def: await aget(7)."""
        rows = Query(self, key=key).now(f"{self.name}.get()", f"await {self.name}.aget()")
        return rows[0] if rows else None

    async def aget(self, *key: Any) -> T | None:
        """The row with this key, None when there is none."""
        rows = await Query(self, key=key)
        return rows[0] if rows else None

    def check(self, name: str, value: Any) -> Any:
        """A column's value as asyncpg takes it, validated by the model's field. Raises ValidationError, ValueError."""
        info = None if self.model is None else self.model.model_fields.get(name)
        if info is None:
            return value
        if name not in self._checks:
            whole: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
            self._checks[name] = TypeAdapter(whole), kind_of(info.annotation, info.metadata).out
        adapter, out = self._checks[name]
        value = adapter.validate_python(value)
        return out(value) if out is not None and value is not None else value

    def writable(self) -> None:
        """Raises WriteError for a table that something else writes."""
        if self.read_only:
            raise WriteError(f'"{self.name}" is read only: {self.read_only}')

    def __repr__(self) -> str:
        return f'Table("{self.name}"{f", {self.model.__name__}" if self.model else ""})'

    def _relation(self, current: Scope) -> Relation:
        return writable(current.db, self.name)

    def _sink(self, current: Scope, due: Due | None = None) -> Sink:
        """Where this scope's appends go; made at the first one after anything else."""
        current.check()
        self.writable()
        relation = self._relation(current)
        sink: Sink = (Models(current, relation, self.shape, due) if self.shape is not None
                      else Documents(current, relation, due) if relation.document
                      else Columns(current, relation, due))
        current.sinks[(self, due) if due else self] = sink
        return sink

    def _load(self, rows: Iterable[Any], delay: Length | None, at: datetime | None) -> None:
        """All rows in one transaction, chunk by chunk."""
        db = current_database()
        due = due_of(db, delay, at, self.name)
        rest = iter(rows)
        tx = db.tx()
        conn = db.run(tx.__aenter__())
        failure: BaseException | None = None
        try:
            for first in rest:
                with Scope("transaction", db=db) as current:
                    self._sink(current, due).extend(chain((first,), islice(rest, CHUNK - 1)))
                db.run(apply(conn, current.ops))
        except BaseException as error:
            failure = error
            raise
        finally:
            db.run(tx.__aexit__(type(failure) if failure else None, failure, None))


def _names(shape: Shape[Any] | None, option: str, given: Sequence[Names], of: str) -> tuple[tuple[str, ...], ...]:
    """unique= or index= as tuples of columns."""
    if isinstance(given, str):
        raise BadOption(option, given, of, f'a list: {option}=["{given}"]')
    if given and shape is None:
        raise BadOption(option, given, of, f"no {option}= without a model; write a migration")
    groups = tuple((one,) if isinstance(one, str) else tuple(one) for one in given)
    for name in chain.from_iterable(groups):
        if shape is not None and name not in shape.names and name not in shape.key:
            raise UnknownOption(name, f"{option}= of {of}", shape.names)
    return groups


def _maker(shape: Shape[Any]) -> Callable[[Any], Any]:
    """What makes the model of a row, compiled once: the validator on a dict of exactly the fields."""
    fields = ", ".join(f"{name!r}: row[{name!r}]" for name in shape.names)
    aliased = any(field.validation_alias or field.alias for field in shape.model.model_fields.values())
    flags = ", by_alias=False, by_name=True" if aliased else ""
    validate = shape.model.__pydantic_validator__.validate_python
    made: Callable[[Any], Any] = eval(f"lambda row: validate({{{fields}}}{flags})", {"validate": validate})
    if not shape.hidden_id:
        return made

    def with_id(row: Any) -> Any:
        return beside(made(row), "id", row["id"]) if "id" in row.keys() else made(row)  # noqa: SIM118

    return with_id
