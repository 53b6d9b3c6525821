"""Schedule, rules: what becomes of times that were missed, that overlap, that are put off; starts and ends."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pg import Pg
from working import Bench

from anton import Ctx, Table, cron
from anton.db import Database
from anton.errors import BadOption
from anton.schedule import fire

DAY = "2026-11-22 "
OPTIONS = {"app": "a", "name": "s"}


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


class Clock:
    """A database whose time stands still until it is set, and a schedule "s" in it."""

    def __init__(self, db: Database) -> None:
        self.db = db

    async def at(self, text: str) -> Clock:
        """Sets the time, on 2026-11-22 unless the text says another day."""
        day = text if len(text) > 8 else DAY + text
        await self.run("create or replace function anton.now() returns timestamptz language sql volatile as "
                       f"$$ select timestamptz '{day}Z' $$")
        return self

    async def run(self, query: str, *args: Any) -> list[tuple[Any, ...]]:
        async with self.db.conn() as conn:
            return [tuple(row) for row in await conn.fetch(query, *args)]

    async def put(self, text: str = "0 * * * *", **definition: Any) -> None:
        async with self.db.tx() as conn:
            await self.db.call(conn, "put_schedule", {**OPTIONS, "cron": text, **definition})
        await self.look()

    async def look(self) -> datetime | None:
        """What any worker does, until nothing is due any more."""
        while True:
            async with self.db.conn() as conn:
                due = await fire(self.db, conn)
                if due is None or due > await self.db.call_value(conn, "now"):
                    return due

    async def ticks(self) -> dict[str, str]:
        """State by hour and minute."""
        rows = await self.run(
            "select to_char(planned_at at time zone 'UTC', 'HH24:MI'), state from anton.tick order by 1")
        return dict(rows)  # type: ignore[arg-type]

    async def begin(self) -> list[int]:
        """A worker begins with all that is ready; the jobs."""
        return [row[0] for row in await self.run(
            "select id from anton.claim(1, 7, array[(select id from anton.handler)], array[9999], array[9999], "
            "array[0::bigint], '1 day')")]

    async def finish(self, *jobs: int) -> None:
        await self.run("select anton.ack(7, $1::bigint[], 1, 0)", list(jobs))

    async def jobs(self) -> list[str]:
        """The hours of what waits for a worker."""
        return [row[0] for row in await self.run(
            "select to_char((keys #>> '{0,1}')::timestamptz at time zone 'UTC', 'HH24:MI') from anton.job order by 1")]


@pytest.fixture
def clock(db: Database) -> Clock:
    return Clock(db)


# Times that were missed

HOURLY = pytest.mark.parametrize("text", ["0 * * * *", "@every 3600"])


@HOURLY
async def test_of_missed_times_the_last_runs_and_the_others_are_told(clock: Clock, text: str) -> None:
    await (await clock.at("10:30")).put(text)
    await (await clock.at("13:30")).look()
    told = await clock.ticks()
    assert told.pop("12:00", "skipped") == "skipped"                   # SQL's own notes the first one and the last
    assert told == {"11:00": "skipped", "13:00": "planned"}
    assert await clock.run("select next_at from anton.schedule") == [(utc(DAY + "14:00"),)]


@HOURLY
async def test_all_missed_times_run_when_asked_for_one_after_the_other(clock: Clock, text: str) -> None:
    await (await clock.at("10:30")).put(text, misfire="all")
    await (await clock.at("13:30")).look()
    assert await clock.ticks() == {"11:00": "planned", "12:00": "waiting", "13:00": "waiting"}
    for hour in ("11:00", "12:00", "13:00"):
        assert await clock.jobs() == [hour]
        await clock.finish(*await clock.begin())
        await clock.look()
    assert await clock.ticks() == dict.fromkeys(("11:00", "12:00", "13:00"), "done")


@HOURLY
async def test_all_missed_times_run_at_once_when_they_may_overlap(clock: Clock, text: str) -> None:
    await (await clock.at("10:30")).put(text, misfire="all", overlap="parallel")
    await (await clock.at("13:30")).look()
    assert await clock.jobs() == ["11:00", "12:00", "13:00"]


@HOURLY
async def test_a_missed_time_is_left_out_when_asked_for_but_for_two_minutes(clock: Clock, text: str) -> None:
    await (await clock.at("10:30")).put(text, misfire="skip")
    await (await clock.at("12:30")).look()
    assert set((await clock.ticks()).values()) == {"skipped"}
    await (await clock.at("13:01")).look()
    assert await clock.jobs() == ["13:00"]


@pytest.mark.parametrize("text, misfire, planned", [
    ("7 * * * *", "all", 24 * 90), ("@every 3600", "all", 24 * 90), ("*/2 * * * *", "once", 1),
    ("@every 60", "once", 1)])
async def test_a_stop_of_months_loses_no_time_that_was_asked_for(clock: Clock, text: str, misfire: str,
                                                                 planned: int) -> None:
    await (await clock.at("10:30")).put(text, misfire=misfire, overlap="parallel")
    await (await clock.at("2027-02-20 10:31")).look()
    states = dict(await clock.run("select state, count(*) from anton.tick group by state"))  # type: ignore[arg-type]
    assert states["planned"] == planned and states.get("skipped", 0) <= 200
    assert await clock.run("select max(planned_at) > anton.now() - interval '1 hour' from anton.tick") == [(True,)]


async def test_a_firing_that_no_worker_began_before_the_next_is_missed_too(clock: Clock) -> None:
    await (await clock.at("10:30")).put()
    await (await clock.at("11:00")).look()
    assert await clock.jobs() == ["11:00"]
    await (await clock.at("12:00")).look()
    assert await clock.jobs() == ["12:00"]
    assert await clock.ticks() == {"11:00": "skipped", "12:00": "planned"}
    assert await clock.run("select count(*) from anton.receipt where n = 0") == [(1,)]
    begun = await clock.begin()
    await (await clock.at("13:00")).look()
    await (await clock.at("14:00")).look()
    assert await clock.ticks() == {"11:00": "skipped", "12:00": "planned", "13:00": "skipped", "14:00": "waiting"}
    await clock.finish(*begun)
    await clock.look()
    assert await clock.jobs() == ["14:00"]


async def test_times_that_pass_while_it_is_paused_are_not_missed(clock: Clock) -> None:
    await (await clock.at("10:30")).put(misfire="all")
    await clock.run("select anton.pause_schedule('s')")
    await (await clock.at("12:30")).look()
    await clock.run("select anton.resume_schedule('s')")
    await (await clock.at("13:00")).look()
    assert await clock.ticks() == {"13:00": "planned"}


# Times that overlap

@pytest.mark.parametrize("overlap, state, ready", [
    ("queue", "waiting", []), ("skip", "skipped", []), ("parallel", "planned", ["12:00"])])
async def test_a_time_that_comes_while_the_firing_before_is_worked(clock: Clock, overlap: str, state: str,
                                                                   ready: list[str]) -> None:
    await (await clock.at("10:30")).put(overlap=overlap)
    await (await clock.at("11:00")).look()
    begun = await clock.begin()
    await (await clock.at("12:00")).look()
    assert await clock.ticks() == {"11:00": "planned", "12:00": state} and await clock.jobs() == ready
    await clock.finish(*begun)
    await clock.look()
    assert (await clock.ticks())["11:00"] == "done"
    assert await clock.jobs() == ([] if overlap == "skip" else ["12:00"])
    if overlap != "skip":
        await clock.finish(*await clock.begin())
    await (await clock.at("13:00")).look()
    assert await clock.jobs() == ["13:00"]


async def test_a_firing_that_waits_for_its_retry_is_not_done(clock: Clock) -> None:
    await (await clock.at("10:30")).put(overlap="skip")
    await (await clock.at("11:00")).look()
    (job,) = await clock.begin()
    await clock.run("select anton.retry(7, $1, array[1], interval '3 h', 'no luck', true)", job)
    await (await clock.at("12:00")).look()
    assert await clock.ticks() == {"11:00": "planned", "12:00": "skipped"}


async def test_what_is_run_by_hand_waits_unless_firings_may_overlap(clock: Clock) -> None:
    await (await clock.at("10:30")).put(overlap="skip")
    await clock.run("select anton.run_schedule('s')")
    begun = await clock.begin()
    await clock.at("10:31")
    await clock.run("select anton.run_schedule('s')")
    assert await clock.ticks() == {"10:30": "planned", "10:31": "waiting"}
    await clock.finish(*begun)
    await clock.at("10:32")
    await clock.run("select anton.run_schedule('s')")
    assert await clock.ticks() == {"10:30": "done", "10:31": "planned", "10:32": "waiting"}


async def test_ticks_at_once_never_start_two_that_may_not_overlap(clock: Clock) -> None:
    await (await clock.at("10:30")).put(misfire="all")
    await clock.at("20:30")
    for n in range(10):
        await asyncio.gather(*(clock.look() for _ in range(6)))
        assert await clock.jobs() == [f"{11 + n}:00"]
        await clock.finish(*await clock.begin())


async def test_who_closes_a_firing_starts_the_next_though_another_looks_meanwhile(clock: Clock) -> None:
    await (await clock.at("10:30")).put(misfire="all")
    await (await clock.at("12:30")).look()
    job = await clock.begin()
    async with clock.db.tx() as other:
        await other.execute("select anton.tick()")                     # sees that it runs; its transaction is open
        await clock.finish(*job)
        look = asyncio.create_task(clock.look())
        waits = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        while not await clock.run(waits):
            assert not look.done()
    await look
    assert await clock.jobs() == ["12:00"]


async def test_who_keeps_a_firing_locked_keeps_no_schedule_from_firing(clock: Clock) -> None:
    await (await clock.at("10:30")).put()
    await clock.at("11:00")
    await clock.look()
    await clock.begin()
    async with clock.db.tx() as other:
        await other.execute("select anton.tick()")                     # and stays open, as in psql
        await clock.at("12:00")
        await clock.look()
        assert await clock.ticks() == {"11:00": "planned", "12:00": "waiting"}


async def test_a_firing_that_waited_begins_as_soon_as_the_one_before_is_done(db: Database) -> None:
    free, ran, most = threading.Event(), [], [0]

    def declare() -> None:
        b = Table("b")

        @cron.daily(timeout="1h")
        def slow(ctx: Ctx) -> None:
            ran.append(ctx.planned_at)
            most[0] = max(most[0], len(ran))
            b.append({"n": len(ran)})
            free.wait(20)
            ran.pop()

    bench = await Bench.make(db, declare)
    assert await bench.value("select timeout from anton.handler") == timedelta(hours=1)
    async with bench.running():
        for _ in range(3):
            await bench.sql("select anton.run_schedule('slow')")
        await bench.until("select exists (select from anton.lease)")
        states = await bench.column("select state from anton.tick order by planned_at")
        assert states == ["planned", "waiting", "waiting"]
        free.set()
        await bench.until("select count(*) = 3 from anton.tick where state = 'done'")
    assert most == [1] and await bench.count("b") == 3


@pytest.mark.parametrize("is_async", [False, True])
async def test_firings_of_one_claim_are_told_their_own_times(db: Database, is_async: bool) -> None:
    def declare() -> None:
        b = Table("b")
        times = cron.every("1m", misfire="all", overlap="parallel")

        if is_async:
            @times
            async def tell(ctx: Ctx) -> None:
                await asyncio.sleep(0)
                b.append({"at": str(ctx.planned_at)})
        else:
            @times
            def tell(ctx: Ctx) -> None:
                b.append({"at": str(ctx.planned_at)})

    bench = await Bench.make(db, declare)
    await bench.advance(timedelta(minutes=20))
    await bench.work()
    assert await bench.count("b") >= 20
    assert await bench.value("select count(distinct data ->> 'at') = count(*) from b")


# Jitter, start and end

@HOURLY
async def test_a_time_with_jitter_fires_once_within_it_and_keeps_its_planned_time(clock: Clock, text: str) -> None:
    await (await clock.at("10:30")).put(text, jitter="30 min")
    due = await clock.look()
    assert due is not None and utc(DAY + "11:00") < due < utc(DAY + "11:30") and due == await clock.look()
    await clock.at(f"{due - timedelta(seconds=1):%Y-%m-%d %H:%M:%S}")
    assert await clock.look() == due and await clock.ticks() == {}
    await clock.at(f"{due + timedelta(seconds=1):%Y-%m-%d %H:%M:%S}")
    later = await clock.look()
    assert await clock.ticks() == {"11:00": "planned"}
    assert later is not None and utc(DAY + "12:00") < later < utc(DAY + "12:30") and later - due != timedelta(hours=1)


@HOURLY
async def test_it_starts_with_its_start_and_ends_with_its_end(clock: Clock, text: str) -> None:
    await (await clock.at("10:30")).put(text, starts_at=DAY + "12:00Z", ends_at=DAY + "14:00Z", misfire="all",
                                        overlap="parallel")
    assert await clock.look() == utc(DAY + "12:00")
    await clock.at("20:30")
    assert await clock.look() is None
    assert await clock.jobs() == ["12:00", "13:00", "14:00"]
    assert await clock.run("select state, next_at from anton.list_schedules()") == [("ended", None)]
    await clock.put(text, starts_at=DAY + "12:00Z", ends_at=DAY + "22:00Z")
    assert await clock.look() == utc(DAY + "21:00")
    assert await clock.run("select state from anton.list_schedules()") == [("live",)]


@HOURLY
async def test_one_that_ended_before_it_was_put_never_fires(clock: Clock, text: str) -> None:
    await (await clock.at("10:30")).put(text, ends_at=DAY + "10:00Z")
    assert await clock.look() is None and await clock.ticks() == {}


async def test_a_hundred_times_or_forty_days_are_planned_ahead_so_that_no_worker_is_needed(clock: Clock) -> None:
    await (await clock.at("10:30")).put("*/2 * * * *")
    assert await clock.run("select cardinality(ahead) from anton.schedule") == [(99,)]
    await clock.at("13:30")
    await clock.run("select anton.tick()")
    assert await clock.jobs() == ["13:30"]
    await clock.put("0 0 1 * *")
    assert await clock.run("select next_at, ahead from anton.schedule") == [
        (utc("2026-12-01"), [utc("2027-01-01"), utc("2027-02-01")])]


# psql

async def test_psql_says_the_same_rules(clock: Clock) -> None:
    await clock.run("""select anton.schedule('nightly', '0 3 * * *', 'select 1', 'Europe/Berlin', options => '{
        "misfire": "all", "overlap": "skip", "jitter": "5 min", "start": "2026-12-01", "end": "2026-12-31 12:00",
        "timeout": "1 hour"}')""")
    assert await clock.run("select misfire, overlap, jitter, starts_at, ends_at from anton.schedule") == [
        ("all", "skip", timedelta(minutes=5), utc("2026-11-30 23:00"), utc("2026-12-31 11:00"))]
    assert await clock.run("select timeout from anton.handler") == [(timedelta(hours=1),)]


@pytest.mark.parametrize("options, match", [
    ({"misfires": "all"}, "misfires.*Known"), ({"misfire": "twice"}, "once, all, skip"),
    ({"overlap": "never"}, "queue, skip, parallel"), ({"jitter": "2 h"}, "less than"),
    ({"jitter": "x"}, "length of time"), ({"start": "soon"}, "as the clocks"),
    ({"start": "2026-02-02", "end": "2026-02-01"}, "ends before")])
async def test_psql_is_told_which_rule_is_wrong(db: Database, options: dict[str, str], match: str) -> None:
    with pytest.raises(BadOption, match=match):
        async with db.conn() as conn:
            await db.call(conn, "schedule", "s", "@every 3600", "select 1", "UTC", options)


async def test_an_expression_that_turns_out_to_be_none_is_disabled_and_says_why(clock: Clock) -> None:
    with pytest.raises(asyncpg.PostgresError, match="minute is"):        # what cannot be read is refused at once
        await clock.run("select anton.schedule('never', '61 * * * *', 'select 1')")
    await clock.run("select anton.schedule('never', '0 0 31 2 *', 'select 1')")
    assert await clock.look() is None
    ((state, error),) = await clock.run("select state, error from anton.list_schedules()")
    assert state == "disabled" and "0 0 31 2 *" in error


# Whatever happens

STEP = st.tuples(st.sampled_from(["wait", "tick", "begin", "finish", "retry", "promote", "run"]), st.integers(0, 7))
OPEN = " union all ".join(f"select keys #>> '{{0,1}}' from anton.{table}" for table in ("job", "lease", "delayed"))


@given(misfire=st.sampled_from(["once", "all", "skip"]), overlap=st.sampled_from(["queue", "skip", "parallel"]),
       steps=st.lists(STEP, max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_time_fires_once_and_overlaps_only_where_it_may(pg: Pg, misfire: str, overlap: str,
                                                             steps: list[tuple[str, int]]) -> None:
    pg.reset()
    at, held = datetime(2026, 11, 22, 10, 0, 30, tzinfo=UTC), dict[int, int]()

    def set_clock() -> None:
        pg.sql("create or replace function anton.now() returns timestamptz language sql volatile as "
               f"$$ select timestamptz '{at}' $$")

    set_clock()
    pg.sql(f"""select anton.put_schedule('{{"app": "a", "name": "s", "cron": "@every 60", "misfire": "{misfire}",
               "overlap": "{overlap}"}}')""")
    handler = pg.value("select id from anton.handler")
    for step, n in steps:
        if step in ("wait", "run"):
            at += timedelta(minutes=n, seconds=1)
            set_clock()
        if step == "run":
            pg.sql("select anton.run_schedule('s')")
        elif step == "tick":
            pg.sql("select anton.tick()")
        elif step == "begin":
            token, jobs = pg.claim(handler, jobs=1 + n, lease="1 day")
            held |= {job.id: token for job in jobs}
        elif step == "finish" and held:
            job, token = held.popitem()
            pg.ack(token, job)
        elif step == "retry" and held:
            job, token = held.popitem()
            pg.sql(f"select anton.retry({token}, {job}, array[1], interval '{n} min', 'no luck', true)")
        elif step == "promote":
            pg.sql("select anton.promote()")
        alive = pg.sql(OPEN)
        assert len(alive) == len(set(alive))                           # no time twice
        if overlap != "parallel":
            assert len(alive) <= 1
        states = dict(pg.sql("select state, count(*) from anton.tick group by state"))
        assert states.get("planned", 0) >= len(alive)
        if misfire == "all" and overlap != "skip" and step == "tick":  # none was left out
            assert "skipped" not in states
            assert pg.value("select count(*) from anton.tick where planned_at = date_trunc('minute', planned_at)") == (
                pg.value("select count(*) from generate_series(timestamptz '2026-11-22 10:01Z', anton.now(), '1 min')"))
