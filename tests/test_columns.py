"""Columns: every type goes into Postgres and comes back equal; constraints and defaults hold for psql too."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import itertools
import pathlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, NewType, Optional

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import (
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    NaiveDatetime,
    PositiveInt,
    SecretStr,
    StringConstraints,
    conlist,
    create_model,
)

from anton.columns import ID, MODELLESS, Shape, kind_of
from anton.db import Database
from anton.ddl import Spec, create_sql
from anton.errors import BadOption, InvalidRecord

CODES = {"blacklist_categories": ["Cs"], "blacklist_characters": ["\0"]}
TEXT = st.text(st.characters(**CODES))
WORD = st.text(st.characters(**CODES), min_size=1, max_size=20)
INT64 = st.integers(-(2**63), 2**63 - 1)
AWARE = st.datetimes(timezones=st.sampled_from([dt.UTC, dt.timezone(dt.timedelta(hours=5, minutes=45))]))
WHEN = AWARE.filter(lambda at: dt.timedelta(days=1) < at - dt.datetime.min.replace(tzinfo=dt.UTC)
                    and dt.datetime.max.replace(tzinfo=dt.UTC) - at > dt.timedelta(days=1))
DECIMAL = st.decimals(allow_nan=False, allow_infinity=False)
FLOAT = st.floats(allow_nan=False)


class Colour(enum.Enum):
    RED = "red"
    SEA = "it's \"sea\""


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mixed(enum.Enum):
    ONE = 1
    WORD = "word"


class Perm(enum.IntFlag):
    READ = 1
    WRITE = 2


@dataclass
class Point:
    x: int
    y: float


class Address(BaseModel):
    street: str
    number: int | None = None
    since: dt.datetime
    price: Decimal
    tags: set[str]
    at: Point
    inner: dict[str, Address] = {}


Name = NewType("Name", str)
ADDRESSES = st.builds(Address, street=TEXT, number=st.none() | INT64, since=WHEN, price=DECIMAL, tags=st.sets(TEXT),
                      at=st.builds(Point, INT64, FLOAT), inner=st.just({}))
SHORT = FLOAT.filter(lambda f: abs(f) < 1e15)                          # jsonb keeps 1e16 as the integer it prints
JSON = st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | SHORT | TEXT,
                    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=5)


TYPES: list[tuple[Any, str, Any]] = [
    (bool, "boolean", st.booleans()),
    (int, "bigint", INT64),
    (PositiveInt, "bigint", st.integers(1, 2**63 - 1)),
    (float, "double precision", st.floats()),
    (Decimal, "numeric", DECIMAL),
    (Annotated[Decimal, Field(max_digits=10, decimal_places=2)], "numeric(10,2)",
     st.decimals("-99999999.99", "99999999.99", places=2)),
    (str, "text", TEXT),
    (Name, "text", TEXT),
    (Annotated[str, Field(min_length=1, max_length=20)], "text", WORD),
    (Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Z0-9]+)?$")], "text",
     st.from_regex(r"\A[a-z]{2,3}(-[A-Z0-9]+)?\Z")),
    (bytes, "bytea", st.binary()),
    (uuid.UUID, "uuid", st.uuids()),
    (dt.datetime, "timestamp with time zone", WHEN),
    (NaiveDatetime, "timestamp without time zone", st.datetimes()),
    (dt.date, "date", st.dates()),
    (dt.time, "time without time zone", st.times()),
    (dt.timedelta, "interval", st.timedeltas()),
    (ipaddress.IPv4Address, "inet", st.ip_addresses(v=4)),
    (IPvAnyAddress, "inet", st.ip_addresses()),
    (ipaddress.IPv6Network, "cidr", st.just(ipaddress.IPv6Network("2001:db8::/32"))),
    (pathlib.Path, "text", st.just(pathlib.Path("/a/b c"))),
    (AnyUrl, "text", st.just(AnyUrl("https://example.com/a?b=1"))),
    (Colour, "text", st.sampled_from(Colour)),
    (Level, "bigint", st.sampled_from(Level)),
    (Mixed, "jsonb", st.sampled_from(Mixed)),
    (Perm, "bigint", st.sampled_from([Perm.READ, Perm.READ | Perm.WRITE])),
    (Literal["new", "it's"], "text", st.sampled_from(["new", "it's"])),
    (Literal[1, 2], "bigint", st.sampled_from([1, 2])),
    (Literal["a", None], "text", st.sampled_from(["a", None])),
    (int | None, "bigint", st.none() | INT64),
    (Optional[dt.date], "date", st.none() | st.dates()),  # noqa: UP045 - both spellings must work
    (list[int], "bigint[]", st.lists(INT64)),
    (list[str], "text[]", st.lists(TEXT)),
    (list[str | None], "text[]", st.lists(st.none() | TEXT)),
    (Sequence[float], "double precision[]", st.lists(FLOAT)),
    (set[uuid.UUID], "uuid[]", st.sets(st.uuids())),
    (frozenset[Colour], "text[]", st.frozensets(st.sampled_from(Colour))),
    (tuple[Decimal, ...], "numeric[]", st.lists(DECIMAL).map(tuple)),
    (list[dt.datetime], "timestamp with time zone[]", st.lists(WHEN)),
    (list[bytes], "bytea[]", st.lists(st.binary())),
    (list[bool] | None, "boolean[]", st.none() | st.lists(st.booleans())),
    (list[list[int]], "jsonb", st.lists(st.lists(INT64))),
    (tuple[int, str], "jsonb", st.tuples(INT64, TEXT)),
    (int | str, "jsonb", INT64 | TEXT),
    (dict[str, Any], "jsonb", st.dictionaries(TEXT, JSON)),
    (dict[int, dt.date], "jsonb", st.dictionaries(INT64, st.dates())),
    (Any, "jsonb", JSON.filter(lambda value: value is not None)),
    (Address, "jsonb", ADDRESSES),
    (Address | None, "jsonb", st.none() | ADDRESSES),
    (list[Address], "jsonb", st.lists(ADDRESSES, max_size=3)),
    (Point, "jsonb", st.builds(Point, INT64, FLOAT)),
]


@pytest.fixture(scope="module")
def empty(server) -> Iterator[Database]:
    name = server.clone("template1")
    db = Database(server.url(name), source="the test")
    yield db
    db.run(db.close())
    server.drop(name)


_made = itertools.count()


def make(db: Database, shape: Shape[Any], name: str = "thing", **options: Any) -> Spec:
    """A table of the shape, under a name of its own."""
    async def create() -> None:
        async with db.conn() as conn:
            await conn.execute(create_sql(spec))

    spec = Spec("public", f"{name}{next(_made)}", shape.table_columns, shape.key, model=shape.model.__name__, **options)
    db.run(create())
    return spec


def through(db: Database, shape: Shape[Any], spec: Spec, records: list[Any], copy: bool) -> list[Any]:
    """The records, written and read back in order."""
    async def pass_through() -> list[Any]:
        async with db.tx() as conn:
            await conn.execute(f"truncate {spec.sql}")
            rows = [shape.to_row(record) for record in records]
            if copy:
                await conn.copy_records_to_table(spec.name, records=rows, columns=shape.names)
            else:
                marks = ", ".join(f"${n + 1}" for n in range(len(shape.names)))
                await conn.executemany(f"insert into {spec.sql} ({', '.join(shape.names)}) values ({marks})", rows)
            return [shape.from_row(row) for row in await conn.fetch(f"select * from {spec.sql} order by id")]

    return db.run(pass_through())


@pytest.mark.parametrize("annotation, sql, values", TYPES, ids=[str(case[0])[:60] for case in TYPES])
def test_every_type_comes_back_as_it_went(empty, annotation, sql, values):
    model = create_model("Thing", value=(annotation, ...))
    shape = Shape(model)
    assert shape.columns[0].type == sql
    spec = make(empty, shape)

    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(values, min_size=1, max_size=8), st.booleans())
    def check(items: list[Any], copy: bool) -> None:
        records = [model.model_validate({"value": item}) for item in items]
        back = through(empty, shape, spec, records, copy)
        assert repr([record.value for record in back]) == repr([r.value for r in records]) or back == records

    check()


class Plain:
    pass


class Order(BaseModel):
    id: int
    customer: Annotated[str, Field(min_length=1)]
    total: Annotated[Decimal, Field(ge=0, multiple_of=Decimal("0.5"))]
    status: Literal["new", "paid"] = "new"
    tags: Annotated[list[Annotated[int, Field(gt=0)]], Field(max_length=2)] = []
    kind: Colour = Colour.SEA
    note: str | None = None
    due: dt.timedelta = dt.timedelta(days=2, seconds=5)
    token: uuid.UUID = Field(default_factory=uuid.uuid4)
    extra: dict[str, int] = {"a": 1}
    ratio: float = 0.5
    raw: bytes = b"\x00'"
    on: dt.date = dt.date(2026, 1, 2)


def test_a_psql_insert_gets_the_models_defaults(empty):
    shape = Shape(Order)
    spec = make(empty, shape)

    async def insert() -> Order:
        async with empty.conn() as conn:
            return shape.from_row(await conn.fetchrow(
                f"insert into {spec.sql} (id, customer, total) values (1, 'ann', 2) returning *"))

    order = empty.run(insert())
    assert order == Order(id=1, customer="ann", total=Decimal(2), token=order.token)


@pytest.mark.parametrize("column, value", [
    ("customer", "''"), ("customer", "null"), ("total", "-1"), ("total", "0.3"), ("status", "'lost'"),
    ("tags", "'{0}'"), ("tags", "'{1,2,3}'"), ("kind", "'blue'"), ("id", "null"),
])
def test_what_the_model_refuses_a_psql_insert_cannot_write(empty, column, value):
    spec = make(empty, Shape(Order))
    row = {"id": "1", "customer": "'ann'", "total": "2"} | {column: value}

    async def insert() -> None:
        async with empty.conn() as conn:
            await conn.execute(f"insert into {spec.sql} ({', '.join(row)}) values ({', '.join(row.values())})")

    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        empty.run(insert())


@pytest.mark.parametrize("pattern, mapped", [
    (r"^[a-z]+$", True), (r"^\d+$", False), (r"^(?i)x$", False), (r"a|b{1,2}", True), (r"\w", False), (r"^a\.b$", True),
    (r"a*?", False), (r"[[:alpha:]]", False), (r"[a-z\d]", False), (r"x.y", False),
])
def test_a_pattern_becomes_a_check_only_where_both_sides_read_it_alike(pattern, mapped):
    column = Shape(create_model("P", p=(Annotated[str, Field(json_schema_extra={}, pattern=pattern)], ...))
                   if pattern != r"^(?i)x$" else create_model("P", p=(str, ...))).columns[0]
    assert (column.check is not None) == mapped


class Sparse(BaseModel):
    id: int | None = None
    name: str


class Keyed(BaseModel):
    sku: str
    n: int


def test_the_key_is_the_field_id_or_what_is_said_or_made_by_the_database():
    assert Shape(Order).key == ("id",) and not Shape(Order).identity
    assert Shape(Sparse).identity and Shape(Sparse).columns[0].identity and not Shape(Sparse).hidden_id
    assert Shape(Keyed).hidden_id and Shape(Keyed).table_columns[0] is ID
    assert Shape(Keyed, "sku").key == ("sku",) and Shape(Keyed, ("sku", "n")).key == ("sku", "n")
    assert [column.sql for column in MODELLESS] == [
        "id bigint generated by default as identity", "created_at timestamp with time zone not null default now()",
        "data jsonb not null default '{}'::jsonb"]


def test_a_key_that_cannot_be_names_what_can():
    with pytest.raises(BadOption, match=r'key=\'skuu\' of Table\("x"\).*"sku" or "n".*Did you mean "sku"'):
        Shape(Keyed, "skuu", "x")
    with pytest.raises(BadOption, match="plain types"):
        Shape(create_model("L", a=(list[int], ...)), "a")


def test_what_no_column_holds_is_refused_at_once_naming_the_field():
    shape = Shape(create_model("R", n=(int, ...), at=(dt.datetime, dt.datetime(2026, 1, 1, tzinfo=dt.UTC))))
    with pytest.raises(InvalidRecord, match="n: an integer column holds 64 bits"):
        shape.to_row(shape.model(n=2**63))
    with pytest.raises(InvalidRecord, match="at: a datetime needs a time zone"):
        shape.to_row(shape.model(n=1, at=dt.datetime(2026, 1, 1)))


def test_types_that_a_table_should_not_hold_are_refused_at_declaration():
    with pytest.raises(BadOption, match="secrets are not stored"):
        Shape(create_model("S", token=(SecretStr, ...)))
    with pytest.raises(BadOption, match="a type with a column"):
        Shape(create_model("S", f=(Plain, ...), __config__=ConfigDict(arbitrary_types_allowed=True)))
    with pytest.raises(BadOption, match="a column name"):
        Shape(create_model("S", xmin=(int, ...)))


def test_aliases_and_strict_models_come_back(empty):
    class Aliased(BaseModel):
        model_config = ConfigDict(strict=True)
        user: str = Field(alias="userName")
        colour: Colour
        home: Address | None = None

    shape = Shape(Aliased)
    spec = make(empty, shape)
    record = Aliased(userName="ann", colour=Colour.RED)
    assert through(empty, shape, spec, [record], copy=True) == [record]


def test_quoted_and_reserved_names_work(empty):
    model = create_model("Odd", order=(int, ...), select=(str, "x"), straße=(list[int], []), Upper=(bool, True))
    shape = Shape(model, "order")
    spec = make(empty, shape, 'we"ird Table', unique=(("select", "Upper"),), index=(("straße",),))

    async def check() -> Any:
        async with empty.tx() as conn:
            await conn.copy_records_to_table(spec.name, records=[shape.to_row(model(order=1))], columns=shape.names)
            return shape.from_row(await conn.fetchrow(f"select * from {spec.sql}"))

    assert empty.run(check()) == model(order=1)


def test_a_length_of_an_annotated_list_is_checked():
    kind = kind_of(conlist(int, min_length=1))
    assert kind.type == "bigint[]" and kind.metadata


