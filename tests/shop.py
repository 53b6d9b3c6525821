"""What the tests of migrate share: an app in a folder of its own, declared anew as often as one likes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import psycopg
from pydantic import BaseModel, create_model

from anton.app import App, declaring
from anton.db import Database
from anton.migrate import migrate
from anton.plan import Plan
from anton.table import Table


class Order(BaseModel):
    id: int
    customer: str
    total: Decimal
    status: Literal["new", "paid"] = "new"


class Shop:
    """An app in a folder of its own, and the database it is migrated into. declare() starts over with its code."""

    def __init__(self, url: str, folder: Path, name: str = "shop") -> None:
        self.url, self.folder, self.app = url, folder, App(name, folder)
        self.db = Database(url, source="the test")

    def declare(self, code: Callable[[], object]) -> Shop:
        self.app.clear()
        with declaring(self.app):
            code()
        return self

    def migrate(self, **options: Any) -> Plan:
        return asyncio.run(migrate(self.db, self.app, **options))

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            for statement in statements:
                done = conn.execute(statement)
            return done.fetchall() if done.description else []

    def file(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def columns(self, table: str) -> dict[str, str]:
        return dict(self.sql("select attname, format_type(atttypid, atttypmod) from pg_attribute where attrelid = "
                             f"'{table}'::regclass and attnum > 0 and not attisdropped order by attnum"))


def orders(model: type[BaseModel] = Order, **options: Any) -> Callable[[], object]:
    return lambda: Table("orders", model, **options)


def lambda_named(name: str) -> Callable[[Any], Any]:
    def fn(record: Any) -> Any:
        return None

    fn.__name__ = name
    return fn


def grown(**fields: Any) -> type[BaseModel]:
    return create_model("Order", __base__=Order, **fields)
