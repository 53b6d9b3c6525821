"""The fixture app: what a user's own tests lean on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import Depends
from pydantic import BaseModel
from working import morning

from anton import Records, Request, Retry, Table, Webhook, cron, env, get, post, transaction
from anton.app import declaring
from anton.errors import BadOption
from anton.testing import NoNetwork

pytestmark = pytest.mark.once("the app's own process: the server is asked for the same")


class Order(BaseModel):
    id: int | None = None
    customer: str


@pytest.fixture
def shop(app):
    """orders -> letters, a route and a webhook for each, a daily and a weekly count."""
    with declaring(app.app):
        orders, letters, counts = Table("orders", Order), Table("letters"), Table("counts")
        Webhook("/hook", orders, verify="github", secret=env("A_SECRET"))

        @post("/orders")
        async def create(order: Order) -> Order:
            return orders.append(order)

        @get("/orders/{id}")
        def read(id: int, found: Annotated[None, Depends(lambda: None)]):
            return orders.get(id)

        @post("/boom")
        def boom(request: Request) -> int:
            raise RuntimeError("boom")

        @orders.on_new_records
        def thank(records: Records[Order]) -> None:
            for order in records:
                if order.customer == "mallory":
                    raise ValueError("no thanks")
                letters.append({"to": order.customer})

        @cron.daily(at="03:00")
        def nightly(ctx) -> None:
            counts.append({"at": ctx.planned_at.isoformat(), "orders": orders.select().count()})

        @cron.weekly
        async def weekly() -> None:
            counts.append({"orders": await orders.select().acount()})

    app.migrate()
    os.environ["A_SECRET"] = "known"
    yield app
    del os.environ["A_SECRET"]


def test_a_request_is_answered_and_its_record_handled(shop):
    made = shop.post("/orders", json={"customer": "ann"})
    assert made.status_code == 200 and shop.get(f"/orders/{made.json()['id']}").json()["customer"] == "ann"
    assert shop.records("letters") == []
    shop.run()
    assert [letter["to"] for letter in shop.records("letters")] == ["ann"]


async def test_calls_are_plain_in_async_tests_too(shop):
    assert shop.post("/orders", json={"customer": "ann"}).status_code == 200
    async with transaction():
        shop.tables["orders"].append({"customer": "bob"})
    shop.run()
    assert sorted(letter["to"] for letter in shop.records("letters")) == ["ann", "bob"]
    assert await shop.tables["orders"].select().acount() == 2 and not shop.dead


def test_what_a_route_raises_reaches_the_test(shop):
    with pytest.raises(RuntimeError, match="boom"):
        shop.post("/boom")


def test_a_signature_is_made_with_the_declared_secret(shop):
    assert shop.post("/hook", json={"customer": "ann"}).status_code == 401
    assert shop.post("/hook", json={"customer": "ann"}, sign="github").status_code == 200
    with pytest.raises(BadOption, match="/hook"):
        shop.post("/hok", sign="github")
    with pytest.raises(BadOption, match="a secret= that is set"):
        shop.post("/orders", sign="slack")


def test_a_record_that_keeps_failing_is_dead_after_its_attempts(shop):
    shop.tables["orders"].extend([{"customer": "ann"}, {"customer": "mallory"}])
    shop.run()
    assert not shop.dead
    shop.advance("1h")
    (dead,) = shop.dead
    assert (dead.handler, dead.table, dead.error) == ("thank", "orders", "ValueError: no thanks")
    assert [letter["to"] for letter in shop.records("letters")] == ["ann"]


def test_time_moves_by_hand_and_schedules_fire_at_theirs(shop):
    assert abs(shop.now - datetime.now(UTC)) < timedelta(minutes=1)
    morning(shop)
    shop.tables["counts"].select().delete()
    before = shop.now
    shop.advance("72h")
    assert timedelta(hours=72) <= shop.now - before < timedelta(hours=72, minutes=1)
    nightly = [count for count in shop.records("counts") if "at" in count]
    times = [datetime.fromisoformat(count["at"]) for count in nightly]
    assert len(times) == 3 and {(at.hour, at.minute) for at in times} == {(3, 0)}
    assert times == sorted(times) and times[0] > before
    shop.advance("7d")
    assert len([count for count in shop.records("counts") if "at" not in count]) >= 1


def test_a_schedule_that_fires_all_the_time_does_not_hold_the_clock_up(app):
    with declaring(app.app):
        ticks = Table("ticks")

        @cron.every("1m")
        def often() -> None:
            ticks.append({})

    app.migrate()
    app.advance("30d")
    assert 90 <= len(app.records("ticks")) <= 110


def test_a_retry_waits_for_its_time(app):
    with declaring(app.app):
        things, done = Table("things"), Table("done")

        @things.on_new_records(each=True, into=done)
        def act(thing, ctx):
            if ctx.attempt == 1:
                raise Retry(after="2h")
            return {"thing": thing.id}

    app.migrate()
    things.append({})
    app.advance("1h")
    assert app.records("done") == []
    app.advance("1h")
    assert len(app.records("done")) == 1


def test_sql_by_the_clock_from_psql(app):
    morning(app)
    with declaring(app.app):
        old = Table("old")
    app.migrate()
    old.extend({} for _ in range(3))

    async def schedule() -> None:
        async with app.db.conn() as conn:
            await conn.execute("select anton.schedule('nightly', '0 3 * * *', 'delete from old where id < 3')")

    app.db.run(schedule())
    app.run()
    assert len(app.records("old")) == 3
    app.advance("24h")
    assert [record.id for record in app.records("old")] == [3] and not app.dead


@pytest.mark.parametrize("number", [1, 2])
def test_each_test_has_a_database_of_its_own(shop, number):
    shop.post("/orders", json={"customer": "ann"})
    assert len(shop.records("orders")) == 1


def test_nothing_reaches_another_machine(app):
    for reach in (lambda: socket.create_connection(("192.0.2.1", 80), timeout=5),
                  lambda: socket.create_connection(("example.com", 80), timeout=5),
                  lambda: httpx.get("http://192.0.2.1/")):
        with pytest.raises(NoNetwork, match="stay on this machine"):
            reach()
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_connection(here.getsockname()):
        pass


@pytest.mark.parametrize("example", ["slack_ai_bot", "feed_reader", "github_hooks", "ticket_triage", "help_desk",
                                     "tuned_replies", "incident_room", "order_desk"])
def test_an_example_passes_its_own_tests(example, server):
    """As users run them: pytest in the app's folder, the fixture found by itself."""
    environment = {**os.environ, "ANTON_TEST_DATABASE": server.url()}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    folder = Path(__file__).parent.parent / "examples" / example
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
