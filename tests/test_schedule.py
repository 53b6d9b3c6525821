"""Schedule: due times, each fired once, whoever ticks; planned anew only when they changed."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from anton.app import App, declaring
from anton.db import Database
from anton.due import normal
from anton.errors import BadOption, BadSignature, DuplicateName, UnknownHandler, UnknownOption
from anton.schedule import cron, fire


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_the_decorators_say_what_they_mean():
    with declaring(App("clock")) as app:
        @cron.daily
        def nightly(): ...
        @cron.daily(at="03:05", tz="Europe/Berlin")
        def early(ctx): ...
        @cron.every("90s")
        async def often(): ...
        @cron.weekly(on="mon", at="9:30")
        def mondays(): ...
        @cron.monthly(day="last")
        def closing(): ...
        @cron.hourly(minute=15)
        def quarter(): ...
        @cron("*/5 9-17 * * mon-fri", name="office")
        def work(): ...
    assert {name: (s.cron, s.tz, s.title, s.wants_ctx) for name, s in app.schedules.items()} == {
        "nightly": ("0 0 * * *", "UTC", "Daily", False),
        "early": ("5 3 * * *", "Europe/Berlin", "Daily, at 03:05 (Europe/Berlin)", True),
        "often": ("@every 90", "UTC", "Every 1m30s", False),
        "mondays": ("30 9 * * 1", "UTC", "Weekly, Monday, at 9:30", False),
        "closing": ("0 0 L * *", "UTC", "Monthly, day last", False),
        "quarter": ("15 * * * *", "UTC", "Hourly, at :15", False),
        "office": ("*/5 9-17 * * MON-FRI", "UTC", "*/5 9-17 * * mon-fri", False)}
    assert nightly() is None                                           # still a function


def test_a_wrong_declaration_names_what_is_allowed():
    with declaring(App("clock")):
        with pytest.raises(UnknownOption, match='"att".*"at"'):
            cron.daily(att="03:00")  # type: ignore[call-overload]
        with pytest.raises(BadOption, match='at=\'25:00\''):
            cron.daily(at="25:00")
        with pytest.raises(BadOption, match="monday"):
            cron.weekly(on="caturday")
        with pytest.raises(BadSignature, match="@cron.daily"):
            cron(lambda: None)  # type: ignore[arg-type]
        with pytest.raises(BadSignature, match="a, b"):
            @cron.daily
            def two(a, b): ...
        @cron.daily
        def once(): ...
        with pytest.raises(DuplicateName, match="test_schedule.py:"):
            cron.daily(once)


async def put(db: Database, **definition: object) -> int:
    async with db.tx() as conn:
        definition = {"app": "a", "name": "s", "cron": "0 3 1 1 *", **definition}
        value: int = await db.call_value(conn, "put_schedule", definition)
        return value


async def rows(db: Database, query: str) -> list[tuple[object, ...]]:
    async with db.conn() as conn:
        return [tuple(row) for row in await conn.fetch(query)]


async def look(db: Database) -> datetime | None:
    async with db.tx() as conn:
        return await fire(db, conn)


async def test_a_due_schedule_fires_once_and_is_planned_again(db):
    await put(db, tz="Europe/Berlin")
    due = await look(db)
    assert due and due > datetime.now(UTC) and due.astimezone(ZoneInfo("Europe/Berlin")).hour == 3
    assert await rows(db, "select planned_at from anton.tick") == []
    late = utc("2026-11-22 02:00")
    async with db.conn() as conn:
        await conn.execute("update anton.schedule set next_at = $1", late)
    await asyncio.gather(*(look(db) for _ in range(8)))
    assert await rows(db, "select planned_at, state from anton.tick") == [(late, "planned")]
    jobs = "select h.name, jsonb_array_length(j.keys) from anton.job j join anton.handler h on h.id = handler_id"
    assert await rows(db, jobs) == [("s", 1)]
    assert await rows(db, "select last_at, next_at > now() from anton.schedule") == [(late, True)]


async def test_the_same_time_never_fires_twice_even_when_planned_twice(db):
    late = utc("2026-11-22 02:00")
    await put(db)
    for _ in range(2):
        async with db.conn() as conn:
            await conn.execute("update anton.schedule set next_at = $1", late)
        await look(db)
    assert await rows(db, "select count(*) from anton.job") == [(1,)]


async def test_a_changed_time_is_planned_anew_and_an_unchanged_one_is_kept(db):
    await put(db)
    first = await look(db)
    await put(db, title="other words")
    assert await look(db) == first
    await put(db, cron="0 4 * * *")
    assert await rows(db, "select next_at from anton.schedule") == [(None,)]
    assert await look(db) != first


async def test_a_paused_schedule_lets_its_time_pass(db):
    await put(db)
    async with db.conn() as conn:
        await db.call(conn, "pause_schedule", "s")
        await conn.execute("update anton.schedule set next_at = '2026-11-22 02:00Z'")
    assert (await look(db) or utc("2000-01-01")) > datetime.now(UTC)
    assert await rows(db, "select count(*) from anton.tick") == [(0,)]
    async with db.conn() as conn:
        await db.call(conn, "resume_schedule", "s")
        await db.call(conn, "run_schedule", "a.s")
    assert await rows(db, "select count(*) from anton.tick") == [(1,)]


async def test_psql_can_schedule_and_every_needs_no_python(db):
    async with db.conn() as conn:
        await db.call(conn, "schedule", "often", "@every 60", "select 1")
        await conn.execute("update anton.schedule set next_at = anton.now()")
        assert await db.call_value(conn, "tick") == 1
        assert await db.call_value(conn, "tick") == 0
    planned = "select next_at > anton.now(), extract(epoch from next_at)::int % 60 from anton.schedule"
    assert await rows(db, planned) == [(True, 0)]


@pytest.mark.parametrize("cron, tz, what", [
    ("0 3 * *", "UTC", "not five fields"), ("nightly", "UTC", "no cron"), ("0 25 * * *", "UTC", 'hour is "25"'),
    ("0 3 * * *", "Mars/Base", "Mars/Base")])
async def test_psql_is_told_what_is_wrong(db, cron, tz, what):
    with pytest.raises(BadOption, match=what):
        async with db.conn() as conn:
            await db.call(conn, "schedule", "nightly", cron, "select 1", tz)


async def test_psql_takes_the_expressions_that_python_takes_and_no_others(db):
    pick = random.Random(7)
    words = ["*", "0", "05", "7", "8", "12", "13", "23", "24", "31", "32", "59", "60", "99999", "L", "LW", "5L", "8L",
             "mon", "FRI", "jan", "Dec", "x", "", "-", "1#2", "mon#5", "1#6", "#1", "w"]
    glue = ["", "", "", "-{}", "/{}", ",{}", "-{}/{}", "-{}-{}", "/{}/{}", ",,{}"]

    def part() -> str:
        tail = pick.choice(glue).replace("{}", pick.choice(words), 1)
        return pick.choice(words) + tail.replace("{}", pick.choice(words))

    texts = [" ".join("*" if pick.random() < 0.75 else part() for _ in range(5)) for _ in range(4000)]
    texts += ["* * * *", "* * * * * *", "", "@Daily", "@never", "\t0 3 * * *\n", "@every 30"]
    async with db.conn() as conn:
        refused = [fault is not None for (fault,) in await conn.fetch(
            "select anton.cron_fault(x) from unnest($1::text[]) with ordinality u (x, n) order by n", texts)]
    never = {text for text in texts if fits(text) is None}             # days that no month has: told when it is planned
    assert [text for text, wrong in zip(texts, refused, strict=True) if text not in never and wrong == fits(text)] == []
    assert 500 < sum(refused) < 3800


def fits(text: str) -> bool | None:
    try:
        normal(text)
    except BadOption as error:
        days = text.split()[2] if len(text.split()) == 5 else ""
        return None if "bad day-of-month" in str(error) and days.isdigit() and 1 <= int(days) <= 31 else False
    return True


async def test_an_impossible_time_from_psql_is_disabled_and_not_retried(db):
    async with db.conn() as conn:
        await db.call(conn, "schedule", "never", "0 0 31 2 *", "select 1")
    assert await look(db) is None
    assert await rows(db, "select enabled from anton.schedule") == [(False,)]


async def test_a_schedule_does_not_take_a_handlers_name(db):
    async with db.conn() as conn:
        await conn.execute("create table t (id int primary key)")
        await db.call(conn, "handler", "flag", "public.t", "new", "select 1")
        with pytest.raises(BadOption, match="flag.*public.t"):
            await db.call(conn, "schedule", "flag", "@daily", "select 1")
        with pytest.raises(UnknownHandler, match="no schedule"):
            await db.call(conn, "pause_schedule", "flag")


async def test_what_vanished_from_the_code_fires_no_more(db):
    await put(db)
    async with db.conn() as conn:
        assert await db.call_value(conn, "retire_schedules", "a", ["other"]) == "s"
    assert await look(db) is None
    await put(db)
    assert await look(db)


async def test_a_tick_in_a_transaction_that_is_rolled_back_fires_again(db):
    await put(db)
    async with db.conn() as conn:
        await conn.execute("update anton.schedule set next_at = '2026-11-22 02:00Z'")
        tx = conn.transaction()
        await tx.start()
        await fire(db, conn)
        await tx.rollback()
    await look(db)
    assert await rows(db, "select count(*) from anton.job") == [(1,)]


async def test_a_firing_is_done_when_its_job_is_and_failed_with_its_dead_letter(db):
    await put(db, overlap="parallel")
    async with db.conn() as conn:
        for _ in range(2):
            await db.call(conn, "run_schedule", "s")
        await db.call(conn, "tick")
        assert await rows(db, "select distinct state from anton.tick") == [("planned",)]
        await conn.execute("with gone as (delete from anton.job where id = (select min(id) from anton.job)) "
                           "insert into anton.dead (handler_id, change_id, ordinal, op, key, attempt, reason, error, "
                           "died_at) select handler_id, change_id, 1, op, keys -> 0, 5, 'failed', 'no luck', now() "
                           "from anton.job order by id limit 1")
        await db.call(conn, "tick")
    states = "select state, error from anton.tick order by planned_at"
    assert await rows(db, states) == [("failed", "no luck"), ("planned", None)]
    async with db.conn() as conn:
        await conn.execute("delete from anton.job")
        await db.call(conn, "tick")
    assert await rows(db, states) == [("failed", "no luck"), ("done", None)]
