import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from anton import Ctx, Discard, Records, Retry, Table
from anton.app import App, declaring
from anton.ctx import Origin
from anton.db import Database
from anton.errors import BadOption, BadSignature, DuplicateName, UnknownOption, ValueWithoutInto, WriteError
from anton.event import Event
from anton.handler import OPTIONS, Handler, HandlerSpec
from anton.record import Change, Record
from anton.write import Rows, Scope, owner


class Order(BaseModel):
    id: int | None = None
    total: Decimal


class Big(Order):
    pass


class Invoice(BaseModel):
    order: int


@pytest.fixture
def app() -> Iterator[App]:
    with declaring(App("shop")) as app:
        yield app


@pytest.fixture
def orders(app: App) -> Table[Order]:
    return Table("orders", Order)


@pytest.fixture
def prompts(app: App) -> Table[Record]:
    return Table("prompts")


# Declared


def test_bare_with_options_and_by_call(app: App, orders: Table[Order]) -> None:
    @orders.on_new_records
    def score(records: Records[Order]) -> None: ...

    @orders.on_new_records(each=True, batch=7, name="one", timeout="30s", max_lag="5m")
    async def single(order: Order, ctx: Ctx) -> None: ...

    def plain(records: Records[Order]) -> None: ...

    assert orders.on_new_records(plain, concurrency=2) is plain
    assert list(app.handlers) == ["score", "one", "plain"]
    one, two = app.handlers["score"], app.handlers["one"]
    assert (one.fn, one.is_async, one.each, one.wants_ctx) == (score, False, False, False)
    assert (one.batch, one.concurrency, one.attempts, one.backoff) == (4000, 4, 5, timedelta(seconds=1))
    assert (one.timeout, one.max_wait, one.max_lag, one.since) == (timedelta(minutes=5), timedelta(0), None, "now")
    assert (two.fn, two.is_async, two.each, two.wants_ctx) == (single, True, True, True)
    assert (two.batch, two.concurrency) == (7, 50)
    assert (two.timeout, two.max_lag) == (timedelta(seconds=30), timedelta(minutes=5))
    assert one.place.endswith(f"test_handler.py:{score.__code__.co_firstlineno}")
    assert app.handlers["plain"].concurrency == 2


@pytest.mark.parametrize(("verb", "ops", "read"), [
    ("on_new_records", ("new",), "now"), ("on_updated_records", ("updated",), "change"),
    ("on_deleted_records", ("deleted",), "change"), ("on_changes", ("new", "updated", "deleted"), "change"),
    ("on_truncate", ("truncate",), "change")])
def test_what_each_decorator_listens_to(
        app: App, orders: Table[Order], verb: str, ops: tuple[str, ...], read: str) -> None:
    event: Event[Order] = getattr(orders, verb)

    @event
    def handle(records: Records[Order]) -> None: ...

    event.sql("select 1")
    python, in_sql = app.handlers.values()
    assert (python.ops, python.read, python.kind) == (ops, read, "python")
    assert (in_sql.ops, in_sql.read, in_sql.kind) == (ops, "change", "sql")
    assert in_sql.name == f"orders_{verb[3:]}_sql"


def test_the_definition_is_what_the_catalogue_takes(app: App, orders: Table[Order], prompts: Table[Record]) -> None:
    @orders.on_updated_records(where="total > 100 and old.total <= 100", columns=["total"], into=prompts,
                               was="old_name", backoff="1m", since="now", read="now", max_wait="250ms")
    def grown(records: Records[Order]) -> list[dict[str, Any]]:
        return []

    assert app.handlers["grown"].definition() == {
        "app": "shop", "name": "grown", "was": "old_name", "table": "orders", "kind": "python", "ops": ["updated"],
        "each_record": False, "read": "now", "where_sql": "total > 100 and old.total <= 100", "columns": ["total"],
        "body": None, "params": {}, "into_tables": ["prompts"], "batch": 4000,
        "max_wait": "0 days 0 seconds 250000 microseconds", "concurrency": 4,
        "timeout": "0 days 300 seconds 0 microseconds", "attempts": 5, "backoff": "0 days 60 seconds 0 microseconds",
        "max_lag": None,
        "options": {"where": "total > 100 and old.total <= 100", "columns": ["total"], "into": "prompts",
                    "was": "old_name", "backoff": "1m", "since": "now", "read": "now", "max_wait": "250ms"}}


def test_values_in_sql_are_bound_with_their_types(app: App, orders: Table[Order]) -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    handler = orders.on_new_records.sql(
        "insert into big select id from new_records where n > {limit} and {a} and {b} and {c} and {d} and {e} = {f}",
        where="total > {least}", limit=1000, least=Decimal("1.5"), a=True, b=None, c=at, d=timedelta(days=1, seconds=2),
        e=UUID(int=0), f=[1])
    assert handler.params == {
        "limit": ("bigint", "1000"), "least": ("numeric", "1.5"), "a": ("boolean", "true"), "b": ("text", None),
        "c": ("timestamptz", "2026-01-02T00:00:00+00:00"), "d": ("interval", "1 days 2 seconds 0 microseconds"),
        "e": ("uuid", "00000000-0000-0000-0000-000000000000"), "f": ("jsonb", "[1]")}
    with pytest.raises(UnknownOption, match='unknown option "limt".*Did you mean "limit"'):
        orders.on_new_records.sql("select {limit}", limt=1)
    with pytest.raises(BadOption, match="a bool, number, text"):
        orders.on_new_records.sql("select {x}", x=object())


def test_a_definition_is_taken_by_the_catalogue(app: App, db: Database) -> None:
    async def put(handler: Handler) -> Any:
        async with db.conn() as conn:
            await conn.execute("create table if not exists orders (id bigint primary key, total numeric)")
            await db.call_value(conn, "put_handler", handler.definition())
            return await conn.fetchrow("select * from anton.handler where name = $1", handler.name)

    orders = Table("orders", Order)
    row = db.run(put(orders.on_changes.sql("select {x}", x="it's", name="h", timeout="1h30m", batch=5)))
    assert (row["app"], row["kind"], row["ops"], row["batch"]) == ("shop", "sql", ["new", "updated", "deleted"], 5)
    assert (row["timeout"], row["params"], row["read"]) == (timedelta(hours=1.5), {"x": ["text", "it's"]}, "change")


# Components


@dataclass
class Shout:
    into: Table[Any]
    options: dict[str, Any] = field(default_factory=dict)

    def bind(self, table: Table[Any]) -> HandlerSpec:
        def shout(record: Any, ctx: Ctx) -> dict[str, Any]:
            return {"loud": str(record).upper()}

        return HandlerSpec(shout, "Shout", each=True, into=self.into, options={"batch": 9, "attempts": 2})


def test_a_component_brings_defaults_that_options_change(
        app: App, orders: Table[Order], prompts: Table[Record]) -> None:
    component = Shout(prompts)
    assert orders.on_new_records(component, attempts=3, name="shouting") is component
    handler = app.handlers["shouting"]
    assert (handler.each, handler.into, handler.batch, handler.attempts) == (True, (prompts,), 9, 3)
    assert handler.component is component
    assert handler.wants_ctx
    assert "test_handler.py" in handler.place
    prompts.on_new_records(Shout(prompts))
    assert "Shout" in app.handlers


# Wrong


def takes_nothing() -> None: ...
def takes_three(a: Any, b: Any, c: Any) -> None: ...
def takes_keyword(records: Any, *, limit: int) -> None: ...
def takes_other(records: Records[Invoice]) -> None: ...
def takes_record(order: Order) -> None: ...
def takes_records(orders: Records[Order]) -> None: ...
def takes_untyped_record(record: Record) -> None: ...
def returns_value(records: Any) -> dict[str, Any]: ...  # type: ignore[empty-body]
def yields_value(records: Any) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(("fn", "options", "message"), [
    (takes_nothing, {}, r'"takes_nothing" \(.*py:\d+\) takes \(\). Allowed: \(records\) or \(records, ctx\)'),
    (takes_three, {}, r"takes \(a: Any, b: Any, c: Any\)"), (takes_keyword, {}, "limit: int"),
    (takes_other, {}, 'Allowed: Order, which is what table "orders" holds'),
    (takes_record, {}, r"one record, without each=True. Allowed: Records\[Order\], or each=True"),
    (takes_records, {"each": True}, r"each=True. Allowed: \(record\) or \(record, ctx\)"),
    (takes_untyped_record, {"each": True}, 'Allowed: Order, which is what table "orders" holds'),
    (returns_value, {}, "returns dict.*Allowed: into=TABLE"), (yields_value, {}, "yields values. Allowed: into=TABLE"),
])
def test_a_wrong_signature_is_found_where_it_is_declared(
        app: App, orders: Table[Order], fn: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSignature, match=message):
        orders.on_new_records(fn, **options)
    assert app.handlers == {}


def test_signatures_that_are_fine(app: App, orders: Table[Order], prompts: Table[Record]) -> None:
    class Callable_:
        async def __call__(self, records: Records[Order], ctx: Ctx) -> None: ...

    def default_ctx(records: Any, ctx: Any = None) -> None: ...
    def default_other(records: Any, limit: int = 5) -> None: ...
    def base(records: Records[BaseModel]) -> None: ...
    def any_sequence(records: Sequence[Order]) -> None: ...
    def untyped(records): ...  # type: ignore[no-untyped-def]
    def unknown(records: "Nowhere") -> "Nothing": ...  # type: ignore[name-defined] # noqa: F821
    def several(*args: Any) -> None: ...

    on: Any = orders.on_new_records
    for fn in (default_ctx, default_other, base, any_sequence, untyped, unknown, several):
        on(fn)
    on(Callable_(), name="object")
    on(partial(takes_three, 1, 2), name="partial")
    on(print, name="builtin")
    wants = {name: handler.wants_ctx for name, handler in app.handlers.items()}
    assert [name for name, ctx in wants.items() if ctx] == ["default_ctx", "object"]
    assert app.handlers["object"].is_async


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"concurency": 5}, UnknownOption, r'"concurency" of orders.on_new_records.*Did you mean "concurrency"'),
    ({"batch": 0}, BadOption, "a whole number from 1 to 4096"), ({"batch": 5000}, BadOption, "from 1 to 4096"),
    ({"attempts": True}, BadOption, "a whole number"), ({"timeout": "soon"}, BadOption, '"500ms", "30s", "5m"'),
    ({"read": "later"}, BadOption, '"now" or "change"'), ({"since": "monday"}, BadOption, '"now" or "beginning"'),
    ({"on_conflict": "panic"}, BadOption, '"rerun" or "overwrite"'), ({"into": "prompts"}, BadOption, "into=invoices"),
    ({"columns": "total"}, BadOption, r'columns=\["status"\]'), ({"columns": ["totl"]}, UnknownOption, 'mean "total"'),
    ({"where": " "}, BadOption, "not empty"), ({"name": ""}, BadOption, "a text"), ({"each": "yes"}, BadOption, "True"),
])
def test_an_option_that_cannot_be_says_what_is_allowed(
        app: App, orders: Table[Order], options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        orders.on_new_records(takes_records, **options)
    with pytest.raises(error, match=message):
        orders.on_new_records(**options)(takes_records)


def test_events_that_cannot_be(app: App, orders: Table[Order]) -> None:
    with pytest.raises(BadOption, match="a truncate has no records"):
        orders.on_truncate(each=True)(takes_record)
    with pytest.raises(BadOption, match="can only be fed as new records"):
        orders.on_updated_records(since="beginning")(takes_records)
    with pytest.raises(BadOption, match='name="score"'):
        orders.on_new_records(lambda records: None)
    with pytest.raises(BadOption, match="a function, a component"):
        orders.on_new_records(5)  # type: ignore[call-overload]


def test_a_handler_declared_twice_names_both_places(app: App, orders: Table[Order]) -> None:
    orders.on_new_records(takes_records)
    with pytest.raises(DuplicateName, match=r'handler "takes_records" is declared twice: .*py:\d+ and .*py:\d+'):
        orders.on_updated_records(takes_records)
    orders.on_new_records.sql("select 1")
    with pytest.raises(DuplicateName, match='"orders_new_records_sql"'):
        orders.on_new_records.sql("select 2")


# Called


@pytest.fixture
def scope(db: Database) -> Iterator[Scope]:
    async def make() -> None:
        async with db.conn() as conn:
            await conn.execute("create table invoices (id bigint generated by default as identity primary key,"
                               "\"order\" bigint); create table orders (id bigint primary key, total numeric)")

    db.run(make())
    with Scope("handler", Records([])) as scope:
        yield scope


def written(scope: Scope) -> list[Any]:
    return [row[-1] for op in scope.ops if isinstance(op, Rows) for row in op.rows]


@pytest.mark.parametrize(("value", "expected"), [
    (None, []), (Invoice(order=1), [1]), ({"order": 2}, [2]), ([{"order": 3}, Invoice(order=4)], [3, 4]), ([], []),
    (({"order": n} for n in (5, 6)), [5, 6])])
def test_a_returned_value_goes_into_into(app: App, scope: Scope, value: Any, expected: list[int]) -> None:
    orders, invoices = Table("orders", Order), Table("invoices", Invoice)

    async def later(record: Any) -> Any:
        return value

    orders.on_new_records(lambda record: value, name="now", each=True, into=invoices)
    orders.on_new_records(each=True, into=invoices)(later)
    app.handlers["now"].call(Order(total=Decimal(1)))
    assert written(scope) == expected
    if not isinstance(value, Iterator):
        asyncio.run(app.handlers["later"].acall(Order(total=Decimal(1))))
        assert written(scope) == expected * 2


def test_yielded_values_go_into_into_under_the_record_they_are_yielded_for(app: App, scope: Scope) -> None:
    orders, invoices = Table("orders", Order), Table("invoices", Invoice)
    records = Records([Order(id=7, total=Decimal(1)), Order(id=8, total=Decimal(1))])

    @orders.on_new_records(into=invoices)
    def steady(records: Records[Order]) -> Iterator[Invoice]:
        for order in records:
            yield Invoice(order=order.id or 0)

    @orders.on_new_records(into=invoices)
    async def waiting(records: Records[Order]) -> AsyncIterator[Invoice]:
        for order in records:
            await asyncio.sleep(0)
            yield Invoice(order=order.id or 0)

    app.handlers["steady"].call(records)
    asyncio.run(app.handlers["waiting"].acall(records))
    assert written(scope) == [7, 8, 7, 8]
    assert [who for op in scope.ops if isinstance(op, Rows) for who in op.owners] == [0, 1, 0, 1]


def test_several_tables_in_into_are_told_apart_by_model(app: App, scope: Scope) -> None:
    orders, invoices = Table("orders", Order), Table("invoices", Invoice)
    value: list[Any] = [Invoice(order=1), Big(id=5, total=Decimal(2))]
    orders.on_new_records(lambda records: value, name="both", into=[orders, invoices])
    app.handlers["both"].call(Records([]))
    assert written(scope) == [1, Decimal(2)]
    value.append({"order": 1})
    with pytest.raises(WriteError, match="an instance of its model"):
        app.handlers["both"].call(Records([]))


def test_a_value_without_into_is_an_error(app: App, orders: Table[Order]) -> None:
    orders.on_new_records(lambda records: 5, name="five")
    with pytest.raises(ValueWithoutInto, match='"five" returned int and has no into='):
        app.handlers["five"].call(Records([]))


def test_a_def_that_returns_a_coroutine_is_an_error(app: App, orders: Table[Order]) -> None:
    async def inner() -> None: ...

    orders.on_new_records(lambda records: inner(), name="wrapped")
    with pytest.raises(BadSignature, match="async def"):
        app.handlers["wrapped"].call(Records([]))


# Ctx


def context(**more: Any) -> tuple[Ctx, Records[Any]]:
    now = datetime.now(UTC)
    changes = [Change[Any]("new", n, None, None, n + 1, f"key {n}", 40 + n, now, f"tenant {n}") for n in range(3)]
    records = Records([object(), object(), object()], changes)
    return Ctx("score", now, records, **more), records


def test_ctx_speaks_of_the_record_at_hand() -> None:
    ctx, records = context()
    assert (ctx.attempt, ctx.trace, ctx.tenant, ctx.key) == (1, 40, "tenant 0", "key 0")
    assert [(ctx.attempt, ctx.key) for _ in records] == [(1, "key 0"), (2, "key 1"), (3, "key 2")]
    owner.set(2)
    assert ctx.trace == 42
    owner.set(-1)


def test_ctx_settles_a_record_or_all() -> None:
    ctx, records = context()
    ctx.retry(records[1], after="5m")
    ctx.discard(records[2], "already billed")
    assert isinstance(ctx.outcomes[1], Retry)
    assert ctx.outcomes[1].after == timedelta(minutes=5)
    assert isinstance(ctx.outcomes[2], Discard)
    assert str(ctx.outcomes[2]) == "already billed"
    ctx.discard(records, "all")
    assert sorted(ctx.outcomes) == [0, 1, 2]
    with pytest.raises(WriteError, match="one of the records that the handler was called with"):
        ctx.discard(object())
    with pytest.raises(BadOption, match="after='soon' of ctx.retry"):
        ctx.retry(records[0], after="soon")


def test_ctx_finds_the_origin_in_def_and_in_async_def(db: Database) -> None:
    async def find(change: Change[Any]) -> Origin:
        return Origin("mentions", change.key, None)

    ctx, records = context(find_origin=find)
    assert ctx.origin(records[1]) == Origin("mentions", 1, None)
    assert asyncio.run(ctx.aorigin(records[2])).key == 2
    with pytest.raises(WriteError, match="no origin"):
        context()[0].origin()


# Typed


SNIPPET = '''
from decimal import Decimal
from pydantic import BaseModel
from anton import Ctx, Records, Table, sql

class Order(BaseModel):
    id: int | None = None
    total: Decimal

class Invoice(BaseModel):
    order: int

orders = Table("orders", Order)
invoices = Table("invoices", Invoice)
prompts = Table("prompts")

@orders.on_new_records
def right(records: Records[Order]) -> None:
    for order in records:
        prompts.append({"total": str(order.total)})
    for change in records.changes:
        print(change.key, change.old.total, change.new.total)

@orders.on_new_records(each=True, into=invoices, where="total > 100", concurrency=50)
async def also_right(order: Order, ctx: Ctx) -> Invoice:
    found = await invoices.aget(order.id)
    if found is not None:
        print(found.order)
    saved = orders.append(order)
    print(saved.total, prompts.append({"x": 1})["x"], (await orders.select(id=1))[0].total)
    orders.select(id=7).update(total=sql("total + 1"))
    return Invoice(order=order.id or 0)

@orders.on_new_records
def wrong_table(records: Records[Invoice]) -> None: ...

@orders.on_new_records(each=True)
def wrong_each(records: Records[Order]) -> None: ...

@orders.on_new_records(batch=5)
def wrong_batch(order: Order) -> None: ...

@orders.on_new_records
def wrong_ctx(records: Records[Order], ctx: int) -> None: ...

@orders.on_new_records(concurency=5)
def wrong_option(records: Records[Order]) -> None: ...

orders.append(Invoice(order=1))
orders.get(7).total
prompts.append(5)
Table("bad", Order, keys="id")
'''


def test_mypy_strict_passes_what_is_right_and_flags_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    found = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir",
                            str(tmp_path / "cache"), str(file)], capture_output=True, text=True, check=False,
                           cwd=Path(__file__).parent.parent)
    lines = SNIPPET.splitlines()
    flagged = {lines[int(line.split(":")[1]) - 1] for line in found.stdout.splitlines() if ": error:" in line}
    start = lines.index("@orders.on_new_records", lines.index("def right(records: Records[Order]) -> None:"))
    assert flagged == {"@orders.on_new_records", "@orders.on_new_records(each=True)", "@orders.on_new_records(batch=5)",
                       "@orders.on_new_records(concurency=5)", "orders.append(Invoice(order=1))", "orders.get(7).total",
                       "prompts.append(5)", 'Table("bad", Order, keys="id")'}, found.stdout
    errors = [int(line.split(":")[1]) for line in found.stdout.splitlines() if ": error:" in line]
    assert min(errors) > start


def test_options_are_those_of_the_api_page() -> None:
    assert set(OPTIONS) == {"name", "was", "into", "where", "columns", "read", "since", "each", "batch", "max_wait",
                            "concurrency", "timeout", "attempts", "backoff", "max_lag", "on_conflict", "per",
                            "priority", "debounce", "ordered", "on_dead", "rate"}
