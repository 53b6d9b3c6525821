"""Models: Tables that are kept by a SELECT, through migrate and a worker."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel
from shop import Shop, lambda_named

from anton.errors import (
    AntonError,
    BadOption,
    DatabaseError,
    DeclarationError,
    MigrationError,
    MigrationFailed,
    ReadOnly,
    UnknownOption,
    UnknownTable,
)
from anton.table import Table
from anton.worker import Worker

DAILY = """-- anton: model
-- refresh: orders
-- key: customer
select customer, count(*) as orders, sum(total) as total from orders group by customer;
"""
ORDERS = "create table orders (id int primary key, customer text, total numeric)"


class Daily(BaseModel):
    customer: str
    orders: int
    total: Decimal


def work(shop: Shop) -> None:
    asyncio.run(Worker(shop.db, shop.app).run_until_idle())


@pytest.fixture
def daily(shop: Shop) -> Shop:
    shop.sql(ORDERS, "insert into orders values (1, 'ann', 5), (2, 'bob', 7), (3, 'ann', 1)")
    shop.file("sql/daily.sql", DAILY)
    shop.migrate()
    return shop


def rows(shop: Shop, table: str = "daily") -> list[tuple[Any, ...]]:
    return sorted(shop.sql(f"select * from {table}"))


def test_a_model_is_a_table_that_migrate_makes_and_fills(daily):
    assert rows(daily) == [("ann", 2, Decimal(6)), ("bob", 1, Decimal(7))]
    assert daily.columns("daily") == {"customer": "text", "orders": "bigint", "total": "numeric"}
    assert not daily.migrate(check=True).drift


def test_a_change_of_its_table_refreshes_it_and_only_what_differs_is_an_event(daily):
    def code() -> None:
        Table("seen", Seen)
        Table("daily", Daily, key="customer").on_changes(note)

    seen: list[tuple[str, str]] = []

    class Seen(BaseModel):
        id: int

    def note(records: Any) -> None:
        for change in records.changes:
            seen.append((change.op, (change.new or change.old).customer))

    daily.declare(code).migrate()
    work(daily)
    assert seen == []
    daily.sql("insert into orders values (4, 'cid', 3)", "update orders set total = 8 where id = 2",
              "delete from orders where customer = 'ann'")
    work(daily)
    assert rows(daily) == [("bob", 1, Decimal(8)), ("cid", 1, Decimal(3))]
    assert sorted(seen) == [("deleted", "ann"), ("new", "cid"), ("updated", "bob")]
    assert daily.sql("select count(*) from anton.job") == [(0,)]


def test_jobs_that_wait_together_are_one_refresh(daily):
    daily.sql(*(f"insert into orders values ({n}, 'eve', 1)" for n in range(100, 160)))
    daily.sql("insert into orders select g, 'flo', 1 from generate_series(1000, 9999) g")
    work(daily)
    assert daily.sql("select jobs, new_n, is_full from anton.model") == [(69, 2, True)]
    assert rows(daily)[2:] == [("eve", 60, Decimal(60)), ("flo", 9000, Decimal(9000))]
    assert daily.sql("select sum(n) from anton.receipt") == [(9060,)]


def test_a_refresh_that_changes_nothing_fires_nothing(daily):
    def code() -> None:
        Table("daily", Daily, key="customer").on_changes(lambda_named("note"))

    daily.declare(code).migrate()
    daily.sql("update orders set id = 99 where id = 2")
    assert daily.sql("select new, updated, deleted from anton.refresh('daily')") == [(0, 0, 0)]
    assert daily.sql("select count(*) from anton.job") == [(0,)]


def test_a_key_that_is_null_or_comes_twice_leaves_the_old_rows_and_the_handler_waits(daily):
    before = rows(daily)
    daily.sql("insert into orders values (5, null, 1)")
    work(daily)
    assert rows(daily) == before
    (error, failures), = daily.sql("select failing_error, failures from anton.handler where name = 'daily:orders'")
    assert 'model "daily": null value in column "customer"' in error and failures == 1
    assert daily.sql("select count(*) from anton.dead") == [(0,)] and daily.sql("select count(*) from anton.job") == [(1,)]
    daily.sql("delete from orders where customer is null", "select anton.refresh('daily')")
    assert daily.sql("select failing_since from anton.handler where name = 'daily:orders'") == [(None,)]
    daily.file("sql/daily.sql", DAILY.replace("group by customer", "group by customer, id"))
    with pytest.raises(AntonError, match=r"gives the key \(ann\) more than once"):
        daily.migrate()
    assert rows(daily) == before


def test_python_writes_to_a_models_table_are_refused(daily):
    holder: dict[str, Table[Any]] = {}

    def code() -> None:
        holder["daily"] = Table("daily", Daily, key="customer")

    daily.declare(code).migrate()
    from anton.db import set_database
    set_database(daily.db)
    table = holder["daily"]
    assert table.get("ann").total == 6
    for write in (lambda: table.append({"customer": "x", "orders": 1, "total": 1}), lambda: table.extend([{}]),
                  lambda: table.upsert({"customer": "x", "orders": 1, "total": 1}),
                  lambda: table.select(customer="ann").update(orders=3), lambda: table.select(customer="ann").delete()):
        with pytest.raises(ReadOnly, match='"daily" is kept by the model daily'):
            write()
