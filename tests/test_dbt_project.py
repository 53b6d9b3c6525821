"""A dbt project as an app has it, with the real dbt: one child for the whole file."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from servers import Server
from shop import Shop

from anton.app import declaring
from anton.db import Portal, set_database
from anton.dbt.project import DbtProject
from anton.table import Table
from anton.worker import Worker

PROJECT = Path(__file__).parent / "data" / "dbt_shop"


class Order(BaseModel):
    id: int
    customer: str
    total: Decimal


class Revenue(BaseModel):
    customer: str
    revenue: Decimal


class Live:
    """The app on a database of its own, its worker's loop, and what its handlers were told."""

    def __init__(self, url: str, folder: Path) -> None:
        shutil.copytree(PROJECT, folder / "dbt_project")
        self.shop = Shop(url, folder)
        self.loop = Portal()
        self.told: list[Any] = []
        self.shop.declare(self.declare)
        set_database(self.shop.db)
        self.shop.migrate()

    def declare(self) -> None:
        self.orders = Table("orders", Order)
        self.project = DbtProject("dbt_project")
        self.revenue = self.project.model("revenue", Revenue)
        self.big = self.project.model("big")
        self.revenue.on_rebuilt(self.hear("rebuilt"), name="rebuilt")
        self.revenue.on_failed(self.hear("failed"), name="failed")
        self.revenue.on_changes(self.hear_changes, name="changes")
        self.project.run_when(self.orders, debounce=0, max_wait=0)

    def hear(self, kind: str) -> Any:
        return lambda what: self.told.append((kind, what))

    def hear_changes(self, records: Any) -> None:
        self.told += [(change.op, change.key) for change in records.changes]

    def run(self) -> list[Any]:
        """Works until nothing is left; what was told."""
        async def work() -> None:
            await Worker(self.shop.db, self.shop.app).run_until_idle()

        self.loop.run(work())
        told, self.told = self.told, []
        return told

    def close(self) -> None:
        self.loop.run(self.shop.db.close())
        self.loop.stop()
        set_database(None)


@pytest.fixture(scope="module")
def live(server: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    name = server.clone(template)
    live = Live(server.url(name), tmp_path_factory.mktemp("shop"))
    yield live
    live.close()
    server.drop(name)


def test_e2e(live: Live) -> None:
    live.shop.sql("insert into orders values (1, 'ann', 50), (2, 'bob', 200)")
    print(live.run())
    for x in "handler job delayed dead dbt_request dbt_run dbt_result receipt dbt_model watched".split(): print(x, live.shop.sql(f"select to_jsonb(x) from anton.{x} x"))
    print(live.shop.sql("select * from revenue"), live.shop.sql("select * from anton.dbt_build"), live.shop.sql("select * from anton.dbt_request"), live.shop.sql("select * from anton.dbt_run"), live.shop.sql("select * from anton.dbt_result"))
    live.shop.sql("insert into orders values (3, 'ann', 150)")
    print(live.run())
    print(live.shop.sql("select * from revenue"), live.shop.sql("table anton.dead"))
    assert 0
