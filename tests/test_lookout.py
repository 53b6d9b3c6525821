"""Lookout: looks that take no more than their part of the time, and that leave it to the claims what to say."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from servers import free_port

from anton.db import Database
from anton.dispatch import Dispatcher
from anton.lookout import Lookout
from anton.pace import Pace
from anton.queue import Look

LEASE = timedelta(seconds=30)


def lookout(db: Any, told: list[BaseException]) -> tuple[Lookout, Any]:
    """One of a worker that found its only lane empty, and the lane."""
    nothing: Any = None
    lane: Any = SimpleNamespace(id=1, ready=False, priority=5)
    dispatcher = Dispatcher(1, nothing, nothing, nothing)
    dispatcher.know({1: lane})
    return Lookout(db, 1, LEASE, dispatcher, Pace(), told.append), lane


@pytest.mark.parametrize(("took", "pause"), [(0.001, 0.3), (0.01, 0.5), (0.2, 1.0)])
async def test_looks_take_a_fiftieth_of_the_time_at_one_a_second_at_least(
        took: float, pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]

    async def poll(*asked: Any) -> Look:
        now[0] += took
        return Look([1], 0, None, None)                                # type: ignore[arg-type]

    monkeypatch.setattr("anton.lookout.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("anton.queue.poll", poll)
    looks, lane = lookout(SimpleNamespace(conn=contextlib.nullcontext), [])
    assert looks.due
    await looks.look()
    assert lane.ready
    now[0] += pause - 0.01
    assert not looks.due
    now[0] += 0.02
    assert looks.due


async def test_while_a_peek_is_under_way_no_other_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = asyncio.Event()

    async def ready(*asked: Any) -> list[int]:
        await answer.wait()
        return [1]

    monkeypatch.setattr("anton.queue.ready", ready)
    looks, lane = lookout(SimpleNamespace(conn=contextlib.nullcontext), [])
    assert looks.peek_due
    peek = asyncio.create_task(looks.peek_beside())
    await asyncio.sleep(0)
    looks.hurry()
    assert not looks.peek_due and not lane.ready
    answer.set()
    await peek
    assert looks.peek_due and lane.ready


async def test_a_peek_beside_the_claims_leaves_it_to_them_to_say_that_the_database_is_away() -> None:
    told: list[BaseException] = []
    db = Database(f"postgresql://postgres@127.0.0.1:{free_port()}/nowhere", source="test")
    looks, _ = lookout(db, told)
    try:
        await looks.peek_beside()
    finally:
        await db.close()
    looks.hurry()
    assert told == [] and looks.peek_due                               # and the next may begin


async def test_a_peek_that_fails_of_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ready(*asked: Any) -> list[int]:
        raise KeyError("ours")

    monkeypatch.setattr("anton.queue.ready", ready)
    told: list[BaseException] = []
    looks, _ = lookout(SimpleNamespace(conn=contextlib.nullcontext), told)
    await looks.peek_beside()
    looks.hurry()
    assert isinstance(told[0], KeyError) and looks.peek_due
