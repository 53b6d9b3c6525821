"""Action: effects leave only from a live process, once each, and a row says what became of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anton import Table, transaction
from anton.action import effects, perform, set_effects
from anton.app import declaring
from anton.errors import ConfigError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("ANTON_EFFECTS", raising=False)
    before = effects()
    yield
    monkeypatch.undo()
    set_effects(before)


def test_nothing_is_sent_until_someone_says_so():
    words = [sys.executable, "-c", "from anton.action import effects; print(effects())"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "capture\n"


@pytest.mark.parametrize("limit, wanted, is_", [
    ("", "live", "live"), ("live", "live", "live"), ("capture", "live", "capture"), ("offline", "live", "offline"),
    ("offline", "capture", "offline"), ("live", "capture", "capture"), ("capture", "offline", "offline")])
def test_the_environment_holds_back_and_never_lets_loose(limit, wanted, is_, monkeypatch):
    if limit:
        monkeypatch.setenv("ANTON_EFFECTS", limit)
    assert set_effects(wanted) == effects() == is_


def test_a_mistyped_limit_is_an_error_and_sends_nothing(monkeypatch):
    set_effects("capture")
    monkeypatch.setenv("ANTON_EFFECTS", "caputre")
    with pytest.raises(ConfigError, match='"live", "capture" or "offline"'):
        set_effects("live")
    assert effects() == "capture"


@pytest.fixture
def things(app):
    """An app of one Table and an effect for each of its records."""
    with declaring(app.app):
        table = Table("things")

        @table.on_new_records(each=True)
        async def act(thing, ctx):
            async def send():
                if thing["n"] < 0:
                    raise ValueError("refused")
                return {"number": thing["n"]}

            await perform("number", {"n": thing["n"]}, ctx.key, send)

    app.migrate()
    return app


def test_a_captured_effect_is_a_row_and_its_sender_is_never_called(things):
    things.tables["things"].extend({"n": n} for n in (1, -1))
    things.run()
    assert sorted(call.n for call in things.outbox) == [-1, 1] and not things.dead
    assert len({call.key for call in things.outbox}) == 2
    assert {call.state for call in things.outbox} == {"captured"}


def test_a_live_effect_leaves_what_came_back_and_a_refused_one_nothing(things):
    set_effects("live")
    things.tables["things"].extend({"n": n} for n in (1, -1))
    things.run()
    for _ in range(5):
        things.advance("10m")
    assert [(call.args, call.state, call.result) for call in things.outbox] == [({"n": 1}, "sent", {"number": 1})]
    assert [(dead.handler, dead.reason) for dead in things.dead] == [("act", "failed")]


async def test_the_row_names_the_receipt_that_caused_it(things):
    async with transaction():
        things.tables["things"].append({"n": 1})
    things.run()
    async with things.db.conn() as conn:
        row = await conn.fetchrow("select a.trace, r.n from anton.action a join anton.receipt r on r.id = a.cause")
    assert row is not None and row["trace"] is not None and row["n"] == 1
