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
