"""Chores: the catalogue is read again where a reading may have missed something."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import anton.chores
from anton.chores import Chores
from anton.db import Database
from anton.dispatch import Dispatcher


async def test_the_catalogue_is_read_again_soon_where_the_bell_rang_while_it_was_read(
        db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REFRESH", "WATCH"):                                  # else it would be, without it
        monkeypatch.setattr(anton.chores, name, 3600.0)
    read, twice = list[int](), asyncio.Event()
    nothing: Any = None
    bell: Any = SimpleNamespace(held=True)

    async def refresh() -> None:
        read.append(len(read))
        if len(read) == 1:
            chores.stale()                                             # what was made just now may not be in it
        else:
            twice.set()

    dispatcher = Dispatcher(1, nothing, nothing, nothing)
    chores = Chores(db, dispatcher, bell, refresh, asyncio.Event(), nothing)
    running = asyncio.create_task(chores.run())
    await asyncio.sleep(0)
    chores.stale()
    try:
        await asyncio.wait_for(twice.wait(), 60)
    finally:
        running.cancel()
