"""Turns of tenants, and rank of handlers: pure, in the claim, and in a worker."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pg import Pg
from working import Bench, one_handler

from anton import Table, sqlfile
from anton.app import App, declaring
from anton.catalogue import read_lanes
from anton.db import Database
from anton.dispatch import Dispatcher
from anton.each import Each
from anton.errors import BadOption
from anton.lane import Batch, Lane
from anton.rank import rank
from anton.rate import Tap
from anton.turns import Turns

KEYS = "abcd"
STEPS = st.lists(st.one_of(st.tuples(st.just("add"), st.sampled_from(KEYS), st.integers(1, 5)), st.just(("take",))),
                 max_size=80)
pure = settings(deadline=None, suppress_health_check=list(HealthCheck))  # the machine may be busy


@pure
@given(STEPS, st.dictionaries(st.sampled_from(KEYS), st.integers(2, 4)))
def test_whoever_waits_has_a_turn_before_any_other_had_more_than_its_weight(steps: list[Any], weights: dict[str, int]):
    turns: Turns[str, tuple[str, int]] = Turns()
    turns.weights = weights
    waiting: dict[str, list[int]] = {}
    others: dict[str, Counter[str]] = {}                               # turns of others since a key waits for its own
    n = 0
    for step in steps:
        if step[0] == "add":
            for _ in range(step[2]):
                n += 1
                turns.add(step[1], (step[1], n))
                waiting.setdefault(step[1], []).append(n)
            others.setdefault(step[1], Counter())
            continue
        assert bool(turns) == bool(waiting)
        if not waiting:
            continue
        key, number = turns.queue.popleft()
        turns.end()
        assert number == waiting[key].pop(0)                           # in order, none lost, none twice
        for other, seen in others.items():
            seen[key] += other != key
            assert all(had <= weights.get(name, 1) for name, had in seen.items()), (other, seen)
        others[key].clear()
        if not waiting[key]:
            del waiting[key], others[key]
    assert sorted(number for _, number in turns) == sorted(number for left in waiting.values() for number in left)


def test_of_two_keys_that_never_run_dry_one_has_as_many_turns_as_its_weight_says():
    turns: Turns[str, int] = Turns()
    turns.weights = {"b": 3}
    for n in range(100):
        turns.add("a", n)
        turns.add("b", n)
    taken = []
    for _ in range(40):
        taken.append(turns.key)
        turns.queue.popleft()
        turns.end()
    assert "".join(taken[:8]) == "abbbabbb" and Counter(taken) == {"a": 10, "b": 30}


@pure
@given(st.lists(st.sampled_from(KEYS), max_size=30), st.sets(st.integers(0, 29)))
def test_what_is_dropped_is_gone_and_the_rest_is_in_order(keys: list[str], out: set[int]):
    turns: Turns[str, int] = Turns()
    for n, key in enumerate(keys):
        turns.add(key, n)
    turns.keep((keys[n], n) for n in turns if n not in out)
    left = [n for n in range(len(keys)) if n not in out]
    assert sorted(turns) == left
    for key in KEYS:
        assert [n for n in turns if keys[n] == key] == [n for n in left if keys[n] == key]
    assert sorted(turns.all()) == left and not turns


@pure
@given(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1e6))
def test_the_higher_priority_goes_first_until_the_lower_has_waited_a_second_for_each_step(low: int, high: int,
                                                                                          waited: float):
    low, high = sorted((low, high))
    assert rank(high, waited) >= rank(low, waited)
    assert rank(low, waited + (high - low) + 1e-3) > rank(high, waited)


# the claim


class Shared(Pg):
    """A session on a database with a table and a handler of its new records, whose writers say for whom they write."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.h = 0

    def write(self, tenant: str, *sizes: int) -> None:
        """A statement of so many records each, so a job each."""
        self.sql(f"set anton.tenant = '{tenant}'")
        for size in sizes:
            self.sql(f"insert into orders (n) select g from generate_series(1, {size}) g")
        self.sql("reset anton.tenant")

    def tenants(self, jobs: int = 1000, records: int = 100_000, turn: str | None = None) -> Counter[str]:
        """How many jobs of whom a claim brings."""
        return Counter(job.tenant or "" for job in self.claim(self.h, jobs=jobs, records=records, turn=turn)[1])


@pytest.fixture
def shared(pg: Pg) -> Iterator[Shared]:
    shared = Shared(pg.url)
    shared.sql("create table orders (id bigint generated always as identity primary key, n int)")
    shared.h = shared.listen("orders", "new", name="h")
    yield shared
    shared.conn.close()


def test_a_claim_takes_the_same_of_each_tenant_however_long_one_s_backlog_is(shared: Shared) -> None:
    shared.write("a", *[1] * 20)
    shared.write("b", 1, 1)
    shared.write("", 1)
    assert shared.tenants(jobs=6) == {"": 1, "a": 3, "b": 2}           # what the others have no use for is a's
    shared.write("b", *[1] * 9)
    assert shared.tenants(jobs=6) == {"a": 3, "b": 3}


def test_the_share_is_of_records_and_no_job_is_cut(shared: Shared) -> None:
    shared.write("a", *[50] * 4)
    for tenant in ("b", ""):
        shared.write(tenant, *[1] * 40)
    assert shared.tenants(records=90) == {"": 30, "a": 1, "b": 30}


def test_each_tenant_s_oldest_job_is_first(shared: Shared) -> None:
    for tenant in "abab":
        shared.write(tenant, 1)
    first = [(job.tenant, job.ids) for job in shared.claim(shared.h, jobs=2)[1]]
    assert first == [("a", [1]), ("b", [2])]


def test_claims_go_on_behind_the_tenant_that_had_the_last_turn(shared: Shared) -> None:
    for tenant in "cab":
        shared.write(tenant, 1, 1)
    assert [*shared.tenants(jobs=1, turn="a"), *shared.tenants(jobs=1, turn="b")] == ["b", "c"]
    shared.write("", 1)
    assert [*shared.tenants(jobs=1, turn="c")] == [""]                 # round: those without a tenant are one more
    assert [*shared.tenants(jobs=2, turn="z")] == ["a", "b"]


def test_a_tenant_of_weight_3_gets_three_times_as_much(shared: Shared) -> None:
    shared.sql("select anton.weigh_tenant('b', 3)")
    for tenant in "ab":
        shared.write(tenant, *[1] * 20)
    assert shared.tenants(jobs=8) == {"a": 2, "b": 6}
    shared.sql("select anton.weigh_tenant('b', 1)")
    assert shared.tenants(jobs=8) == {"a": 4, "b": 4}


@pytest.mark.parametrize(("tenant", "weight"), [("", 3), ("a", 0), ("a", 101), ("a", None)])
def test_a_weight_that_is_none_is_refused(shared: Shared, tenant: str, weight: int | None) -> None:
    with pytest.raises(psycopg.Error, match="from 1 to 100"):
        shared.value("select anton.weigh_tenant(%s, %s::int)", tenant, weight)


def test_many_tenants_are_all_served_by_claims_in_turn(shared: Shared) -> None:
    names = [f"t{n:02}" for n in range(70)]
    for name in names:
        shared.write(name, 1, 1)
    seen: Counter[str] = Counter()
    turn = None
    for _ in range(3):
        found = shared.tenants(jobs=32, turn=turn)
        turn = max([name for name in found if name <= (turn or "")] or found)
        seen += found
    assert set(seen) == set(names)                                     # each once before one had three turns
    assert max(seen.values()) <= 2


def test_what_another_claim_has_locked_is_passed_over(shared: Shared) -> None:
    shared.write("a", 1, 1, 1)
    shared.write("b", 1)
    with shared.other() as other, other.conn.transaction():
        other.claim(shared.h, jobs=2)
        assert shared.tenants() == {"a": 2}
    assert shared.tenants() == {}


def test_a_failing_handler_s_probe_is_one_job_whoever_s(shared: Shared) -> None:
    for tenant in "ab":
        shared.write(tenant, 1, 1)
    token, jobs = shared.claim(shared.h, jobs=2)
    shared.value("select anton.world_failed(%s, %s::bigint[], 'away')", token, [job.id for job in jobs])
    shared.sql("update anton.handler set probe_at = anton.now()")
    assert [job.probe for job in shared.claim(shared.h)[1]] == [True]


def test_beside_a_handler_with_tenants_another_is_claimed_as_ever(shared: Shared) -> None:
    shared.sql("create table plain (id bigint primary key)")
    plain = shared.listen("plain", "new", name="plain")
    shared.write("a", *[1] * 5)
    shared.write("b", 1)
    shared.sql("insert into plain values (1)", "insert into plain values (2)", "insert into plain values (3)")
    found = Counter((job.handler_id, job.tenant) for job in shared.claim(shared.h, plain, jobs=2)[1])
    assert found == {(shared.h, "a"): 1, (shared.h, "b"): 1, (plain, None): 2}


# in a worker


async def write(db: Database, tenant: str, rows: int) -> None:
    """One statement of a tenant."""
    async with db.conn() as conn, conn.transaction():
        await conn.execute("select set_config('anton.tenant', $1, true)", tenant)
        await conn.execute("insert into a (data) select jsonb_build_object('of', $1::text) from generate_series(1, $2)",
                           tenant, rows)


async def test_one_tenant_s_backlog_lets_the_others_have_every_other_call(db: Database) -> None:
    calls: list[str] = []

    async def handle(records: Any) -> None:
        calls.append(records[0]["of"])

    bench = await one_handler(db, handle, batch=1, concurrency=1)
    await write(db, "a", 40)
    for tenant in "bcb":
        await write(db, tenant, 1)
    await bench.work()
    assert await bench.left() == {} and len(calls) == 43
    assert {*calls[:4]} == {*"abc"}, calls
    assert calls.index("b", calls.index("b") + 1) < 8, calls


async def test_with_each_the_records_of_tenants_lie_in_turn() -> None:
    lane: Any = SimpleNamespace(items=deque(), waiting=Turns(), order=None)
    lane.waiting.weights = {"b": 2}
    for tenant, n in (("a", 3), ("b", 3), ("a", 1), (None, 1)):
        of = SimpleNamespace(parts=[(SimpleNamespace(tenant=tenant), [])])
        inputs: Any = SimpleNamespace(items=["record"] * n, batch=of, order=[])
        Each(None, lane, inputs, None).send()                          # type: ignore[arg-type]
    assert [each.tenant for each, _ in lane.items] == ["a", "b", "b", None, "a", "b", "a", "a"]


def lane_of(id: int, priority: int = 5, **more: Any) -> Lane:
    return Lane(id, f"h{id}", None, "python", True, "now", False, 100, timedelta(0), 2, timedelta(minutes=5), 5,
                timedelta(seconds=1), 1, "public.t", ("id",), "int", None, priority=priority, **more)


def test_with_each_a_tenant_with_nothing_among_what_runs_is_begun_at_once_and_one_that_has_is_not() -> None:
    lane = lane_of(1)
    jobs: list[Any] = [SimpleNamespace(id=n, tenant=tenant, attempt=0, probe=False, waited=0.0, left=range(60), token=1)
                       for n, tenant in enumerate("aab")]
    lane.claimed(jobs, 3, 180, 0, 0.0, 0.0)
    assert lane.turn == "b" and lane.ready and not lane.after
    begun = []
    while lane.free():
        batch = lane.take(1.0)
        assert batch is not None
        lane.started(batch)
        lane.items.extend(batch)
        begun.append([job.tenant for job in batch.jobs])
    assert begun == [["a", "a"], ["b"]]
    lane.claimed(jobs[:1], 1, 60, 0, 2.0, 0.0)
    assert not lane.free()
    lane.ended(Batch.of(jobs[:2]))
    assert lane.free()


async def test_where_slots_are_short_the_highest_priority_is_first(db: Database) -> None:
    calls: list[str] = []

    def declare() -> None:
        a = Table("a")
        for name, options in (("low", {"priority": 0}), ("mid", {}), ("high", {"priority": 8})):
            @a.on_new_records(name=name, **options)
            async def note(records: Any, name: str = name) -> None:
                calls.append(name)

        @a.on_new_records(priority=9)
        async def holds_the_slot(records: Any) -> None:
            await bench.until("select count(*) = 4 from anton.lease")  # until all are claimed

    bench = await Bench.make(db, declare)
    await bench.add("a", [{}])
    await bench.work(slots=1)
    assert calls == ["high", "mid", "low"] and await bench.left() == {}


def idle(slots: int) -> Dispatcher:
    """So many slots, no lanes yet, and nothing runs."""
    nothing: Any = None
    return Dispatcher(slots, nothing, nothing, nothing)


def test_a_handler_that_has_waited_for_long_enough_goes_before_one_of_a_higher_priority() -> None:
    dispatcher = idle(1)
    now = time.monotonic()
    low, mid, high = lane_of(1, 0, slot_since=now - 9.5), lane_of(2, slot_since=now - 1), lane_of(3, 9, slot_since=now)
    dispatcher.order.extend([low, mid, high])
    assert dispatcher._first(lambda lane: True, "slot_since") == [low, high, mid]
    assert dispatcher._first(lambda lane: lane is not low, "slot_since") == [high, mid]   # low has nothing to wait for
    assert dispatcher._first(lambda lane: True, "slot_since")[2] == low


def test_what_has_no_start_for_its_work_has_waited_all_the_same() -> None:
    dispatcher = idle(1)
    since = time.monotonic() - 9.5
    works, rests = lane_of(1, 0, slot_since=since, tap=Tap()), lane_of(2, 0, slot_since=since, tap=Tap(), ready=False)
    dispatcher.order.extend([works, rests])
    assert dispatcher._first(Lane.free, "slot_since") == [] and works.slot_since == since < rests.slot_since


class Slot:
    """One slot, and lanes of these priorities; the clock stands until it is moved."""

    def __init__(self, patch: pytest.MonkeyPatch, priorities: list[int]) -> None:
        self.now = 1000.0
        patch.setattr("anton.dispatch.time", SimpleNamespace(monotonic=lambda: self.now))
        self.dispatcher, self.ran = idle(0), list[int]()
        patch.setattr(self.dispatcher, "start", self._start)
        self.lanes = [lane_of(n, priority, slot_since=self.now) for n, priority in enumerate(priorities)]
        self.dispatcher.order.extend(self.lanes)
        self.since: dict[int, float] = {}                              # who waits, and since when

    def _start(self, run: Any) -> None:
        self.ran.append(run.lane.id)
        self.dispatcher.slots = 0

    def comes(self, n: int) -> None:
        """Work for a lane."""
        self.dispatcher._fill_by_rank(self.now)                        # as the wake-up before did
        job: Any = SimpleNamespace(id=1, tenant=None, attempt=0, probe=False, waited=0.0, left=range(100), token=1)
        self.lanes[n].claimed([job], 9, 900, 0, self.now, 0.0)
        self.since.setdefault(n, self.now)

    def free(self, seconds: float) -> None:
        """The slot is free after so long."""
        self.now += seconds
        self.dispatcher.slots = 1
        self.dispatcher._fill_by_rank(self.now)
        self.dispatcher.slots = 0


PICKS = st.lists(st.one_of(st.tuples(st.just("comes"), st.integers(0, 3)),
                           st.tuples(st.just("free"), st.sampled_from([0.1, 0.7, 2.0]))), max_size=60)


def picks(patch: pytest.MonkeyPatch, priorities: list[int], steps: list[tuple[str, Any]]) -> None:
    """Whoever waits is picked up by priority and waiting, and each in bounded time."""
    slot = Slot(patch, priorities)
    for what, argument in steps:
        if what == "comes":
            slot.comes(argument)
            continue
        slot.free(argument)
        if not slot.since:
            assert not slot.ran
            continue
        first = slot.ran.pop()
        ranks = {n: priorities[n] + slot.now - since for n, since in slot.since.items()}
        assert ranks[first] >= max(ranks.values()) - 1e-6, "another goes first"
        for n, since in slot.since.items():                            # nine seconds, and a turn of each other
            assert slot.now - since <= 9 - priorities[n] + 2.0 * len(priorities), "one is starved"
        if slot.lanes[first].waiting:
            slot.since[first] = slot.now
        else:
            del slot.since[first]


@pure
@given(st.lists(st.integers(0, 9), min_size=4, max_size=4), PICKS)
def test_slots_go_to_whom_priority_and_waiting_put_first_and_nobody_is_starved(priorities: list[int], steps: Any):
    with pytest.MonkeyPatch.context() as patch:
        picks(patch, priorities, steps)


@pytest.mark.parametrize("wrong", [
    pytest.param(lambda priority, waited: priority, id="no ageing"),
    pytest.param(lambda priority, waited: waited, id="no priority"),
    pytest.param(lambda priority, waited: -priority + waited, id="the lowest first"),
])
def test_a_wrong_rank_is_found(wrong: Any) -> None:
    @settings(pure, max_examples=300, derandomize=True, database=None, phases=(Phase.generate,))
    @given(st.lists(st.integers(0, 9), min_size=4, max_size=4), PICKS)
    def found(priorities: list[int], steps: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("anton.dispatch.rank", wrong)
            picks(patch, priorities, steps)

    with pytest.raises(AssertionError, match="another goes first|one is starved"):
        found()


@pytest.mark.parametrize("priority", [-1, 10, 5.0, "5", True])
def test_a_priority_that_is_none_is_refused(priority: Any) -> None:
    with declaring(App("t")), pytest.raises(BadOption, match="a whole number from 0 to 9"):
        Table("a").on_new_records(lambda records: None, name="h", priority=priority)


async def test_the_priority_of_sql_handlers_is_known_and_shown_and_goes_back_to_5(db: Database) -> None:
    bench = await one_handler(db, lambda records: None, priority=0)
    assert (await bench.value("select anton.show_handler('handle')"))["priority"] == 0
    await bench.sql("""select anton.handler('copy', 'a', 'new', 'select 1', '{"priority": 7}')""")
    assert sorted(await bench.column("select priority from anton.priorities()")) == [0, 7]
    lanes = await read_lanes(db, bench.app, {})
    assert sorted(lane.priority for lane in lanes.values()) == [0, 7]
    await bench.sql("select anton.handler('copy', 'a', 'new', 'select 1')")
    assert await bench.column("select priority from anton.handler where name = 'copy'") == [5]
    with pytest.raises(asyncpg.PostgresError, match="priority 12 is not a whole number from 0 to 9"):
        await bench.sql("""select anton.handler('copy', 'a', 'new', 'select 1', '{"priority": 12}')""")


def test_the_header_of_a_sql_file_has_a_priority() -> None:
    def declared(priority: str) -> Any:
        header = {"on": "orders new", "priority": priority}
        return sqlfile.handler(sqlfile.SqlFile("sql/h.sql", "select 1", "handler", header), "t")["priority"]

    assert (declared("0"), declared("9")) == (0, 9)
    for wrong in ("10", "-1", "high"):
        with pytest.raises(BadOption, match="a whole number from 0 to 9"):
            declared(wrong)


async def test_status_why_and_show_say_who_goes_first_and_beside(db: Database) -> None:
    bench = await one_handler(db, lambda records: None, priority=2)
    await bench.sql("select anton.register_worker('t', 'here', 1, '1')")
    await write(db, "", 1)
    assert await bench.column("select why from anton.status") == [None]
    assert "tenants" not in await bench.value("select anton.show_handler('handle')")
    await write(db, "a", 1)
    assert (await bench.value("select anton.show_handler('handle')"))["tenants"] == ["", "a"]
    await bench.sql("select anton.put_handler($1)", {"app": "t", "name": "other", "table": "a", "ops": ["new"]})
    await bench.sql("insert into anton.job (handler_id, change_id, at, lo, hi, op, ids) "
                    "select id, 1, now(), 1, 1, 'n', '{1}' from anton.handler where name = 'other'")
    says = "priority 2: handlers of a higher one have ready records and go first; 2 tenants take turns"
    assert await bench.column("select why from anton.status where handler = 'handle'") == [says]
    assert says in await bench.column("select error from anton.why('a', (select min(id)::text from a))")
