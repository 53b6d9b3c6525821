"""Rates, whatever happens: workers that are given starts, use them or not, and die, against Starts in chaos/model.py.

One handler has a rate, one a rate for each key, whose worker keeps anton.starts.Starts. Only the test moves the clock.
Whatever began, by the slots it began in: no window holds more (I15). When all windows are over there are starts again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test
from machine import RARER, SETTINGS, WORKERS, Sessions, finding, finds, opened
from servers import Server

from anton.starts import Starts as Book
from anton.starts import text
from chaos.bugs import RATE, Bug
from chaos.model import Starts

MOST, WINDOW = 2, 10_000_000  # starts, microseconds: "2/10s"
SLOT = WINDOW // 64
PERMIT = 5  # seconds that one lasts in the database
KEYS = ("a", "b")
SOME, WANTED = st.sampled_from(WORKERS), st.integers(1, 8)
ENDS = st.sampled_from(["commit", "commit", "commit", "roll back", "lose the reply"])
DEATH = "sql/35_worker.sql"


@dataclass(eq=False)
class Worker:
    """A process. left: starts that it has, by slot. book: of keys. until: it believes to hold their handler."""

    id: int
    left: dict[int, int] = field(default_factory=dict)
    book: Book = field(default_factory=lambda: Book(MOST, WINDOW))
    until: float = -math.inf


class Paced(Sessions):
    """Workers of a handler with a rate, and of one with a rate for each key."""

    keyed = 0  # the second one

    def __init__(self) -> None:
        super().__init__()
        self.us = 0
        self.last = 0
        self.workers = {n: self.born() for n in WORKERS}
        self.all = Starts(MOST, WINDOW, SLOT)
        self.of = {key: Starts(MOST, WINDOW, SLOT) for key in KEYS}
        self.sql(
            "update anton.rate set since = 0, given = '{}'; delete from anton.rate_key; "
            "update anton.permit set worker_id = null, lease_until = '-infinity'; update test_clock set ahead = '0'"
        )
        self.us = self.begun = self.sql("select (extract(epoch from anton.now()) * 1000000)::bigint")

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None:
            return
        for n in WORKERS:
            self.die(n, False)
        self.move(3 * WINDOW // 1000)
        assert sum(self.take(0, 1).values()) == 1, "a start that nobody has is not given"
        self.use(0, MOST)
        for key in KEYS:
            self.plan(0, key, 1, "commit")
            assert self.use_of_key(0, key, 1) == 1, "a start of a key that nobody has is not given"
        self.none_holds_more()

    def born(self) -> Worker:
        """A new process."""
        self.last += 1
        return Worker(self.last)

    @rule(ms=st.sampled_from([20, 160, 160, 500, 2000, 6000]))
    def moves(self, ms: int) -> None:
        self.move(ms)

    def move(self, ms: int) -> None:
        """The clock."""
        self.us += 1000 * ms
        self.sql("update test_clock set ahead = make_interval(secs => %s)", (self.us - self.begun) / 1e6)

    # One rate for all

    def take(self, n: int, wanted: int, over: bool = True) -> dict[int, int]:
        """What it is given, by slot. With it goes back what slots that are over have left."""
        left = self.workers[n].left
        back = {slot: left.pop(slot) for slot in [slot for slot in left if not over or slot < self.us // SLOT]}
        query = "select slots, counts from anton.take_rate(%s, %s, %s, %s::bigint[], %s::int[])"
        ((slots, counts),) = self.ask(n, query, self.workers[n].id, self.handler, wanted, [*back], [*back.values()])
        return dict(zip(slots, counts, strict=True))

    def got(self, n: int, slots: dict[int, int]) -> None:
        """It may use them."""
        left = self.workers[n].left
        for slot, count in slots.items():
            left[slot] = left.get(slot, 0) + count

    def use(self, n: int, times: int) -> None:
        """Begins so many records, of those it may."""
        left, slot = self.workers[n].left, self.us // SLOT
        for _ in range(min(times, left.get(slot, 0))):
            left[slot] -= 1
            self.all.began.append(slot)

    @rule(n=SOME, wanted=WANTED, how=ENDS, begins=st.integers(0, 8))
    def asks(self, n: int, wanted: int, how: str, begins: int) -> None:
        self.ask(n, "begin")
        slots = self.take(n, wanted)
        if self.end(n, how):
            self.got(n, slots)
        self.use(n, begins)

    @rule(first=SOME, wanted=st.tuples(WANTED, WANTED), how=ENDS)
    def ask_at_once(self, first: int, wanted: tuple[int, int], how: str) -> None:
        """The second asks while the first one's transaction is open."""
        second = (first + 1) % len(WORKERS)
        self.ask(first, "begin")
        slots = self.take(first, wanted[0])
        self.ask(second, "set lock_timeout = '60 s'")
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(self.take, second, wanted[1])
            pid = self.conns[second].info.backend_pid
            while not asking.done() and not self.sql("select cardinality(pg_blocking_pids(%s))", pid):
                pass
            if self.end(first, how):
                self.got(first, slots)
            self.got(second, asking.result())
        for n in (first, second):
            self.use(n, MOST)

    @rule(n=SOME)
    def gives_back(self, n: int) -> None:
        """All that it has not used."""
        assert self.take(n, 0, over=False) == {}

    def end(self, n: int, how: str) -> bool:
        """Of its transaction. Whether it knows that it is committed."""
        if how == "lose the reply":
            self.conns[n].pgconn.send_query(b"commit")
            self.conns[n].pgconn.flush()
            self.replace(n)
            return False
        self.ask(n, how.replace(" ", ""))
        return how == "commit"

    # A rate for each key

    @rule(n=SOME, key=st.sampled_from(KEYS), wanted=st.integers(1, MOST), how=ENDS, begins=st.integers(0, MOST))
    def plans(self, n: int, key: str, wanted: int, how: str, begins: int) -> None:
        n = self.holder(n)
        self.plan(n, key, wanted, how)
        self.use_of_key(n, key, begins)

    def holder(self, n: int) -> int:
        """Who holds the handler with a rate for each key; this one, where nobody does."""
        return next((n for n, worker in self.workers.items() if worker.until > self.us), n)

    def plan(self, n: int, key: str, wanted: int, how: str) -> None:
        """As anton/keyrate.py does it, where it holds the handler. how: the noting ends."""
        worker, slot = self.workers[n], self.us // SLOT
        if worker.until <= self.us:
            worker.book.clear()
        ((held,),) = self.ask(
            n, "select anton.permit(%s, %s, 1, make_interval(secs => %s), true)", worker.id, self.keyed, PERMIT)
        worker.until = self.us + PERMIT * 500_000 if held else -math.inf
        if not held:
            return
        if key not in worker.book.keys:
            rows = self.ask(n, "select * from anton.key_starts(%s, %s::text[])", self.keyed, [text(key)])
            worker.book.learn([key], {row[0]: (row[1], row[2]) for row in rows})
        worker.book.unused(key, slot)
        plan = worker.book.plan(key, slot, wanted)
        ends, counts = ("{" + ",".join(map(str, row)) + "}" for row in worker.book.row(key))
        self.ask(n, "begin")
        ((at,),) = self.ask(
            n, "select anton.note_starts(%s, %s, array[%s], array[%s], array[%s])",
            worker.id, self.keyed, text(key), ends, counts,
        )
        assert at is not None, "who holds the handler may not note"
        if self.end(n, how):
            worker.book.grant(key, plan)

    def use_of_key(self, n: int, key: str, times: int) -> int:
        """Begins so many records of a key, of those it may. How many."""
        worker, slot = self.workers[n], self.us // SLOT
        known = worker.book.keys.get(key)
        if known is None or worker.until <= self.us:
            return 0
        count = min(times, known.left.get(slot, 0))
        if count:
            known.left[slot] -= count
            self.of[key].began += [slot] * count
        return count

    # Who dies

    @rule(n=SOME, seen=st.booleans())
    def dies(self, n: int, seen: bool) -> None:
        self.die(n, seen)

    @rule(n=SOME)
    def holder_dies(self, n: int) -> None:
        self.die(self.holder(n), True)

    def die(self, n: int, seen: bool) -> None:
        """And what it had with it. seen: by its parent."""
        if seen:
            self.sql("select anton.worker_died(%s)", self.workers[n].id)
        self.workers[n] = self.born()

    @invariant()
    def none_holds_more(self) -> None:
        assert self.all.hold(), "I15: a window holds more starts than the rate"
        assert all(starts.hold() for starts in self.of.values()), "I15: a window holds more starts of a key"


@pytest.fixture
def paced(server: Server, template: str, request: pytest.FixtureRequest) -> Iterator[type[Paced]]:
    with opened(Paced, server, template, getattr(request, "param", None)) as pg:
        pg.sql(
            "create or replace function anton.now() returns timestamptz language sql volatile as "
            "$$select timestamptz '2030-01-01 00:00:00Z' + (select ahead from public.test_clock)$$"
        )
        Paced.keyed = pg.listen("orders", "new", name="keyed", each_record=True, per="id")
        for handler in (Paced.handler, Paced.keyed):
            pg.value("select anton.set_rate(%s, %s)", handler, f"{MOST}/10s")
        pg.value("select anton.set_limit(%s, 1)", Paced.keyed)
        assert pg.sql("select distinct length_us, slot_us from anton.rate, anton.rate_slots(length_us)") == [
            (WINDOW, SLOT)]
        yield Paced


def test_no_window_holds_more_starts_whatever_happens(paced: type[Paced]) -> None:
    run_state_machine_as_test(paced, settings=SETTINGS)


WRONG = (  # (what is wrong, how, what the machine has to say)
    (
        "starts of the dead that are given anew",
        ((DEATH, "  update permit set worker_id = null, lease_until = '-infinity' where worker_id = p_worker;\n",
          "  update permit set worker_id = null, lease_until = '-infinity' where worker_id = p_worker;\n"
          "  update rate set given = '{}';\n"),),
        "holds more starts than the rate",
    ),
    (
        "starts counted, then given",
        ((RATE, "from rate where handler_id = p_handler for update;", "from rate where handler_id = p_handler;"),),
        "holds more starts than the rate",
    ),
    (
        "starts that go back with those of others",
        ((RATE, "greatest(0, r.given[v_i] - p_unused[i])", "0"),),
        "holds more starts than the rate",
    ),
)


@pytest.mark.once("it asks what the machine sees, not what a server does")
@pytest.mark.parametrize(
    ("paced", "says"),
    [(Bug(name, edits, "", 0, ""), says) for name, edits, says in WRONG],
    indirect=["paced"],
    ids=lambda value: value.name if isinstance(value, Bug) else "",
)
def test_a_bug_in_a_rate_is_found(paced: type[Paced], says: str) -> None:
    finds(paced, says, RARER)


def another_takes_over(machine: Paced) -> None:
    """Within the window of what the first one began of a key."""
    for _ in range(MOST):
        machine.plan(0, "a", 1, "commit")
        assert machine.use_of_key(0, "a", 1) == 1
        machine.move(2000)
    machine.die(0, True)
    machine.plan(1, "a", 1, "commit")
    machine.use_of_key(1, "a", 1)
    machine.none_holds_more()


NOTED_ONCE = Bug(
    "starts of a key that are noted once",
    ((RATE, "do update set ends = excluded.ends, counts = excluded.counts, until", "do update set until"),),
    "", 0, "",
)


@pytest.mark.once("it asks what the machine sees, not what a server does")
@pytest.mark.parametrize("paced", [NOTED_ONCE], indirect=True, ids=[NOTED_ONCE.name])
def test_a_bug_that_chance_seldom_meets_is_found_on_its_way(paced: type[Paced]) -> None:
    with finding("holds more starts of a key"):
        another_takes_over(paced())


def test_who_takes_over_begins_no_more_of_a_key_than_is_left(paced: type[Paced]) -> None:
    another_takes_over(paced())
