"""Poll: rows and cursor commit together, keys that were met are dropped, failures wait and lose nothing."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from working import Bench, cutting, met

from anton import Discard, Retry, Table, poll
from anton.app import App, declaring
from anton.db import Database
from anton.errors import BadOption, BadSignature, DuplicateName, UnknownHandler, UnknownOption, WorldError

pytestmark = pytest.mark.once("wires: the server is asked for the same")

MINUTE = timedelta(minutes=1)


class Issue(BaseModel):
    id: int
    title: str = ""


class Service:
    """What is polled: holds pages of rows; the cursor is how many of them were read. asked: the cursors it got."""

    def __init__(self, *pages: list[dict[str, Any]]) -> None:
        self.pages = list(pages)
        self.asked: list[Any] = []
        self.errors: list[BaseException] = []

    def read(self, cursor: int | None) -> tuple[list[dict[str, Any]], int]:
        self.asked.append(cursor)
        if self.errors:
            raise self.errors.pop(0)
        rest = self.pages[cursor or 0:]
        return [row for page in rest for row in page], len(self.pages)

    async def aread(self, cursor: int | None) -> tuple[list[dict[str, Any]], int]:
        return self.read(cursor)


async def polling(db: Database, fn: Any, model: Any = Issue, **options: Any) -> Bench:
    def declare() -> None:
        issues = Table("issues", model) if model else Table("issues")
        poll(**{"every": "1h", "into": issues, "key": "id", "name": "new", **options})(fn)

    bench = Bench(db, App("t"))
    if not await bench.count("anton.schedule"):
        await bench.full_hour()
    return await Bench.make(db, declare)


async def fire(bench: Bench, times: int = 1) -> None:
    for _ in range(times):
        await bench.sql("select anton.run_schedule('new')")
        await bench.work()


async def titles(bench: Bench) -> list[tuple[int, str]]:
    return [tuple(row) for row in await bench.sql("select id, title from issues order by id")]


async def cursor(bench: Bench) -> Any:
    return await bench.value("select cursor from anton.poll")


@pytest.mark.parametrize("way", ["read", "aread"])
async def test_rows_and_cursor_are_committed_and_the_next_call_gets_the_cursor(way, db):
    service = Service([{"id": 1, "title": "a"}, {"id": 2}])
    bench = await polling(db, getattr(service, way))
    await fire(bench)
    service.pages.append([{"id": 3, "title": "c"}])
    await fire(bench)
    assert service.asked == [None, 1] and await cursor(bench) == 2
    assert await titles(bench) == [(1, "a"), (2, ""), (3, "c")]
    assert await bench.left() == {}


# Keys


@pytest.mark.parametrize("model", [Issue, None])
async def test_a_row_whose_key_was_met_is_dropped_also_when_its_record_was_deleted(model, db):
    service = Service([{"id": 1, "title": "a"}, {"id": 2}, {"id": 1, "title": "again"}])
    bench = await polling(db, lambda: service.read(None), model=model)
    await fire(bench)
    await bench.sql("delete from issues")
    service.pages.append([{"id": 3}])
    await fire(bench)
    ids = "id" if model else "(data ->> 'id')::int"
    assert await bench.column(f"select {ids} from issues") == [3]
    assert [tuple(row) for row in await bench.sql("select rows, dropped from anton.poll")] == [(3, 4)]


async def test_a_row_that_somebody_else_wrote_stays_as_it_is(db):
    service = Service([{"id": 1, "title": "polled"}, {"id": 2, "title": "polled"}])
    bench = await polling(db, service.read)
    await bench.sql("insert into issues values (1, 'theirs')")
    await fire(bench)
    assert await titles(bench) == [(1, "theirs"), (2, "polled")]
    assert await bench.column("select ids from anton.output") == [[2]]      # what anton why says it wrote


class Article(BaseModel):
    id: int | None = None
    guid: str


async def test_a_unique_column_counts_as_a_key_of_its_table(db):
    def declare() -> None:
        articles = Table("articles", Article, unique=["guid"])
        poll(every="1m", into=articles, key="guid", name="new")(lambda: [{"guid": "a"}, {"guid": "b"}])

    bench = await Bench.make(db, declare)
    await bench.sql("insert into articles (guid) values ('a')")
    await fire(bench)
    assert await bench.column("select guid from articles order by id") == ["a", "b"]


async def test_another_unique_index_is_not_taken_for_the_key(db):
    bench = await polling(db, lambda: [{"id": 1, "title": "a"}, {"id": 2, "title": "a"}], attempts=1)
    await bench.sql("create unique index on issues (title)")
    await fire(bench)
    assert "duplicate key" in await bench.value("select error from anton.dead") and await titles(bench) == []


async def test_several_fields_make_a_key(db):
    rows = [{"repo": "a", "n": 1}, {"repo": "a", "n": 2}, {"repo": "b", "n": 1}, {"n": 1, "repo": "a"}]
    bench = await polling(db, lambda: rows, model=None, key=("repo", "n"))
    await fire(bench, 2)
    assert await bench.column("select data from issues order by id") == rows[:3]


async def test_without_a_key_every_row_is_appended(db):
    bench = await polling(db, lambda: [{"n": 1}], model=None, key=None)
    await fire(bench, 2)
    assert await bench.count("issues") == 2 and await bench.count("anton.poll_key") == 0


async def test_keys_are_forgotten_when_they_were_not_met_for_90_days(db):
    service = Service([{"id": 1}, {"id": 2}])
    bench = await polling(db, service.read, model=None)
    await fire(bench)
    service.pages = [[{"id": 1}]]
    service.read, keep = (lambda cursor: ([{"id": 1}], cursor)), service.read  # type: ignore[method-assign]
    bench = await polling(db, service.read, model=None)
    await bench.advance(timedelta(days=89))
    await fire(bench)
    await bench.advance(timedelta(days=2))
    assert await bench.value("select anton.forget_keys(anton.now())") == 1
    await fire(bench)
    bench = await polling(db, lambda: keep(None), model=None)
    service.pages = [[{"id": 1}, {"id": 2}]]
    await fire(bench)
    assert await bench.column("select (data ->> 'id')::int from issues order by id") == [1, 2, 2]


# What a function returns


@pytest.mark.parametrize(("returned", "kept"), [
    (None, 7), ([], 7), (([], 8), 8), (([{"id": 5}], {"page": "x"}), {"page": "x"}), ([{"id": 5}], 7),
    (((row for row in [{"id": 5}]), None), None), ([Issue(id=5)], 7)])
async def test_rows_alone_leave_the_cursor_as_it_is(returned, kept, db):
    bench = await polling(db, lambda cursor: ([], 7) if cursor is None else returned)
    await fire(bench, 2)
    assert await cursor(bench) == kept
    assert (await bench.count("issues") == 0) or await titles(bench) == [(5, "")]


@pytest.mark.parametrize(("returned", "why"), [
    ({"id": 5}, "returned dict as its rows"), ("text", "returned str as its rows"), (7, "returned int as its rows"),
    (([], object()), "JSON cannot hold the cursor"), (([], "a\0b"), "NUL"), ([{"id": "x"}], "invalid record.*integer"),
    ([{"title": "no id"}], "id: Field required"), ([1], "invalid record"), ([{"id": 1}, None], "invalid record")])
async def test_what_is_no_rows_makes_the_poll_wait_and_nothing_is_kept_of_it(returned, why, db):
    bench = await polling(db, lambda cursor: ([{"id": 1}], 7) if cursor is None else returned)
    await fire(bench, 2)
    assert await cursor(bench) == 7 and await titles(bench) == [(1, "")]
    assert await bench.value("select failing_error ~ $1 from anton.handler", why)
    assert await bench.left() == {"job": 1}


async def test_a_row_without_its_key_is_refused(db):
    bench = await polling(db, lambda: [{"id": 1}, {"id": None}], model=None)
    await fire(bench)
    assert '"id", which key= of poll "new" names, has no value' in await bench.value(
        "select failing_error from anton.handler")


def with_ctx(seen: list[Any]) -> Any:
    async def fn(cursor: Any, ctx: Any) -> Any:
        seen.append((cursor, ctx.planned_at, ctx.handler))
        return [], 1

    return fn


async def test_a_function_may_ask_for_its_ctx_or_for_nothing(db):
    seen: list[Any] = []
    bench = await polling(db, with_ctx(seen))
    await fire(bench)
    planned = await bench.value("select planned_at from anton.tick")
    assert seen == [(None, planned, "new")]


# Failing


async def test_a_poll_that_fails_waits_longer_each_time_and_keeps_its_cursor(db):
    service = Service([{"id": 1}])
    bench = await polling(db, service.aread, every="20m")
    await fire(bench)
    service.pages.append([{"id": 2}])
    service.errors = [ConnectionError("away"), KeyError("a bug"), WorldError("503"), TimeoutError()]
    await bench.sql("select anton.run_schedule('new')")
    waits = []
    for _ in range(4):
        await bench.work()
        waits.append(await bench.value("select extract(epoch from probe_at - failed_at)::float8 from anton.handler"))
        await bench.advance(timedelta(seconds=waits[-1] + 0.1))
    assert waits == pytest.approx([1200, 1200, 2400, 3600], rel=0.1)
    assert await cursor(bench) == 1 and await bench.count("anton.dead") == 0
    await bench.work()
    assert await titles(bench) == [(1, ""), (2, "")] and await cursor(bench) == 2
    assert await bench.value("select failing_since is null from anton.handler")
    assert service.asked == [None, 1, 1, 1, 1, 1]


async def test_a_poll_that_fails_says_so_in_one_line_of_the_log(db, caplog):
    service = Service([{"id": 1}])
    service.errors = [KeyError("a bug")]
    bench = await polling(db, service.aread)
    await fire(bench)
    [told] = [record for record in caplog.records if record.name == "anton.poll" and record.levelname == "WARNING"]
    assert told.getMessage().startswith("poll new: KeyError: 'a bug' (test_poll.py:") and told.exc_info is None


async def test_a_service_that_says_how_long_to_wait_is_left_alone_so_long(db):
    service = Service()
    service.errors = [WorldError("slow down", after=timedelta(hours=3))]
    bench = await polling(db, service.read)
    await fire(bench)
    assert await bench.value("select extract(epoch from probe_at - failed_at)::float8 from anton.handler") == \
        pytest.approx(3 * 3600, abs=1)
    assert await bench.value("select why from anton.status") is not None
    assert "PollFailed: slow down" in await bench.value("select failing_error from anton.handler")


async def test_a_poll_that_is_failing_runs_at_once_when_it_is_asked_to(db):
    service = Service([{"id": 1}])
    service.errors = [WorldError("503", after=timedelta(hours=3))]
    bench = await polling(db, service.read)
    await fire(bench, 2)
    assert await titles(bench) == [(1, "")] and await bench.left() == {}


async def test_firings_that_waited_for_the_same_poll_ask_only_once(db):
    service = Service([{"id": 1}])
    bench = await polling(db, service.read)
    for hour in range(5):                                              # as if nobody had been there
        await bench.sql("select anton.fire(1, anton.now() - make_interval(hours => $1), 'parallel')", hour)
    await bench.work()
    assert len(service.asked) == 1 and await bench.left() == {}


async def test_retry_and_discard_settle_the_firing(db):
    service = Service([{"id": 1}])
    service.errors = [Discard("not today")]
    bench = await polling(db, service.read)
    await fire(bench)
    assert [tuple(row) for row in await bench.sql("select reason, error from anton.dead")] == [
        ("discarded", "not today")]
    service.errors = [Retry(after="5m")]
    await fire(bench)
    assert await bench.value("select count(*) from anton.delayed") == 1
    await bench.advance(timedelta(minutes=6))
    await bench.work()
    assert await titles(bench) == [(1, "")]


async def test_a_call_that_takes_longer_than_its_timeout_is_ended(db):
    async def hangs(cursor: Any) -> None:
        await asyncio.Event().wait()

    bench = await polling(db, hangs, timeout="50ms", attempts=1)
    await fire(bench)
    assert "HandlerTimeout" in await bench.value("select error from anton.dead")


async def test_a_row_that_the_database_refuses_leaves_cursor_and_keys_as_they_were(db):
    service = Service([{"id": 1, "title": "x"}, {"id": 2, "title": "y"}])
    bench = await polling(db, service.read, attempts=2)
    await bench.sql("alter table issues add check (title <> 'y')")
    await fire(bench)
    assert await bench.value("select count(*) from anton.delayed") == 1
    assert await titles(bench) == [] and await cursor(bench) is None and await bench.count("anton.poll_key") == 0
    await bench.sql("alter table issues drop constraint issues_title_check")
    await bench.advance(2 * MINUTE)
    await bench.work()
    assert await titles(bench) == [(1, "x"), (2, "y")] and await bench.count("anton.poll_key") == 2


# Two at once, and broken connections


async def test_of_two_that_began_alike_one_commits_and_the_other_asks_nothing_more(db):
    service, both = Service([{"id": n} for n in range(50)]), threading.Barrier(2, timeout=20)

    def read(cursor: Any) -> Any:
        found = service.read(cursor)
        if len(service.asked) < 3:
            both.wait()                                                # each has read before either commits
        return found

    bench = await polling(db, read, key=None, model=None)
    other = await polling(db, read, key=None, model=None)              # another process's declarations
    await bench.sql("select anton.run_schedule('new')")
    first = asyncio.create_task(bench.work())
    await met(lambda: len(service.asked) == 1)
    await bench.sql("select anton.fire(1, anton.now(), 'parallel')")
    await asyncio.gather(first, other.work())
    assert service.asked in ([None, None], [None, None, 1]) and await bench.count("issues") == 50
    assert await bench.left() == {}


async def test_a_commit_whose_answer_is_lost_doubles_nothing(db):
    service = Service([{"id": 1}], [{"id": 2}])
    bench = await polling(db, service.read, key=None)
    await bench.sql("select anton.run_schedule('new')")
    async with cutting(db, b"finish_poll") as (wire, cuts):
        cuts.append(b"")
        await Bench(wire, bench.app).work()
        assert not cuts
        await wire.close()
    async with cutting(db, b"COMMIT;") as (wire, cuts):
        service.pages.append([{"id": 3}])
        await bench.sql("select anton.run_schedule('new')")
        cuts.append(b"")
        await Bench(wire, bench.app).work()
        await wire.close()
    assert await titles(bench) == [(1, ""), (2, ""), (3, "")] and await cursor(bench) == 3


async def test_a_cursor_can_be_set_back(db):
    service = Service([{"id": 1}], [{"id": 2}])
    bench = await polling(db, service.read, model=None)
    with pytest.raises(UnknownHandler, match="has not polled yet"):
        async with db.conn() as conn:
            await db.call(conn, "rewind_poll", "new")
    await fire(bench)
    await bench.sql("select anton.rewind_poll('new', '1')")
    await fire(bench)
    assert service.asked == [None, 1] and await bench.count("issues") == 2
    await bench.sql("select anton.rewind_poll('new', forget_keys => true)")
    await fire(bench)
    assert service.asked == [None, 1, None] and await bench.count("issues") == 4
    shown = await bench.value("select anton.show_schedule('new')")
    assert (shown["poll"]["cursor"], shown["poll"]["rows"], shown["title"]) == (2, 4, "Every 1h")


MADE: list[Bench] = []  # one for all examples
READ: list[Any] = []
ROWS = st.lists(st.integers(0, 12), max_size=5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(ROWS, st.integers(0, 12), st.sampled_from(["fail", "tick"])), max_size=8))
async def test_whatever_happens_each_key_is_there_once_and_the_cursor_is_the_last_one_returned(steps, db):
    if not MADE:
        MADE.append(await polling(db, lambda cursor: READ[0](cursor)))
    bench = MADE[0]
    for table in ("anton.poll_key", "anton.poll", "issues"):
        await bench.sql(f"delete from {table}")
    pages: list[list[int]] = []
    failing = [False]

    def read(cursor: int | None) -> Any:
        if failing[0]:
            raise OSError("away")
        return [{"id": n, "title": str(at)} for at, page in enumerate(pages) for n in page], len(pages)

    READ[:] = [read]

    expected: dict[int, str] = {}
    for step in steps:
        if isinstance(step, list):
            pages.append(step)
        failing[0] = step == "fail"
        if isinstance(step, int):
            await bench.sql("insert into issues values ($1, 'theirs') on conflict do nothing", step)
            expected.setdefault(step, "theirs")
        await fire(bench)
        if not failing[0]:
            for at, page in enumerate(pages):
                for n in page:
                    expected.setdefault(n, str(at))
    failing[0] = False
    await fire(bench)
    for at, page in enumerate(pages):
        for n in page:
            expected.setdefault(n, str(at))
    assert dict(await bench.sql("select id, title from issues")) == expected
    assert await cursor(bench) == len(pages) and await bench.left() == {}


# Declarations


def declared(source: Any = None, **options: Any) -> App:
    with declaring(App("declared")) as app:
        poll(source or (lambda cursor: []), **{"every": "1m", "into": Table("issues", Issue), "name": "new", **options})
    return app


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"evry": "1m"}, UnknownOption, 'Did you mean "every"'), ({"every": "0s"}, BadOption, "at least 1 s"),
    ({"every": "soon"}, BadOption, "every='soon'"), ({"every": None}, BadOption, "every=None"),
    ({"into": "issues"}, BadOption, "into=Table|a Table"), ({"into": None}, BadOption, "into=None"),
    ({"key": "idd"}, UnknownOption, 'Did you mean "id"'), ({"key": 7}, BadOption, "a field or several"),
    ({"key": ()}, BadOption, "a field or several"), ({"attempts": 0}, BadOption, "from 1 to 1000"),
    ({"timeout": "x"}, BadOption, "timeout"), ({"name": None}, BadOption, "a lambda"),
    ({"source": lambda a, b, c: []}, BadSignature, r"\(cursor, ctx\)"),
    ({"source": lambda *, cursor: []}, BadSignature, r"\(cursor\)"), ({"source": 7}, BadSignature, "7"),
])
def test_a_wrong_declaration_names_what_is_allowed(options, error, text):
    with pytest.raises(error, match=text):
        declared(**options)


def test_a_poll_needs_its_times_and_a_name_of_its_own():
    with declaring(App("declared")):
        issues = Table("issues", Issue)
        with pytest.raises(BadSignature, match='no times: @poll. Allowed: @poll\\(every="1m"'):
            poll(list)  # type: ignore[call-overload]

        @poll(every="1m", into=issues)
        async def new(cursor): ...
        with pytest.raises(DuplicateName, match="test_poll.py:"):
            poll(new, every="1m", into=issues)
        with pytest.raises(BadSignature, match="yield in async def"):
            @poll(every="1m", into=issues)
            async def streamed(cursor):
                yield {}
    assert asyncio.run(new(None)) is None                              # still a function


async def test_a_poll_that_fails_collects_no_firings_meanwhile(db):
    service = Service([{"id": 1}])
    service.errors = [WorldError("503", after=timedelta(hours=3))]
    bench = await polling(db, service.read, every="1m")
    await bench.work()
    for _ in range(4):
        await bench.advance(MINUTE)
        await bench.work()
    assert await bench.left() == {"job": 1} and len(service.asked) == 1
    await bench.advance(timedelta(hours=3))
    await bench.work()
    assert await titles(bench) == [(1, "")] and await bench.left() == {} and len(service.asked) == 2


def test_a_poll_is_a_schedule():
    schedule = declared(every="90s").schedules["new"]
    definition = schedule.definition("declared")
    assert (schedule.cron, schedule.title) == ("@every 90", "Every 1m30s")
    assert definition["options"]["into_tables"] == ["issues"] and definition["overlap"] == "skip"
