"""The rules of flow, beside all others of test_state_machine.py: permits, delays and debounces, against chaos/model.py.

A limit: never do workers believe to hold more permits than there are, each from what it was told, for a lease from
before it asked; what the dead held is free. A delay: nothing is ready before its time, nothing is lost, and each change
is handled once. A debounce: a key has one job when it comes to rest, or when its first change has waited for max_wait;
none before; and the last state of each row is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from machine import SETTINGS, TENANTS, finds, opened
from servers import Server
from test_state_machine import SOME, TENANT, TURNS, Machine

from chaos.bugs import JOB, PERMIT, Bug
from chaos.model import LEASE, Permits, Rest

LIMIT, LONGER = 3, 2 * LEASE  # permits of the handler, and how long they last in the database
DEBOUNCE, MAX_WAIT, NOTES = 2000.0, 5000.0, range(-4, 0)  # of the handler of notes; no order has such ids
REST, DEATH = "sql/28_debounce.sql", "sql/35_worker.sql"
WANTED = st.integers(0, LIMIT + 1)


class Flow(Machine):
    """And these rules, without those of Machine that have nothing to do with them."""

    resting = 0  # the handler of notes
    acks_of_two_tenants = beats = cancels_late = dead_letters = freezes = truncate = waits = zombie = None

    def __init__(self) -> None:
        super().__init__()
        self.permits = Permits(LIMIT)
        self.told: dict[int, tuple[int, float]] = {}  # worker: how many permits it believes to hold, until when
        self.rest = Rest(DEBOUNCE, MAX_WAIT)
        self.touched: dict[int, list[tuple[int, float]]] = {}  # writer: notes it changed, and when; not committed
        self.seen = dict.fromkeys(NOTES, 0)  # the state of each note that a handler saw
        self.sql(
            "delete from anton.debounce; update notes set n = 0; delete from anton.job; "
            "update anton.permit set worker_id = null, lease_until = '-infinity'"
        )

    def teardown(self) -> None:
        super().teardown()
        if sys.exc_info()[0] is None:
            self.move(12_000)
            self.poll()
            assert not self.rest.changed and self.seen == self.notes(), "the last state of a note is not seen"

    # Permits

    def spare(self, worker: int) -> bool:
        """Jobs that another worker had wait for somebody who has a permit."""
        return any(
            job.place == "lease" and job.until <= self.model.now and job.token not in self.held_by[worker]
            for job in self.model.jobs.values()
        )

    def asks(self, worker: int, wanted: int, suspects: bool = False, waits: str = "100ms") -> int:
        """In a transaction that stays open. How many it is told that it holds."""
        self.ask(worker, "begin")
        self.ask(worker, f"set local lock_timeout = '{waits}'")
        ((held,),) = self.ask(
            worker, "select anton.permit(%s, %s, %s, make_interval(secs => %s), true, %s)",
            worker + 1, self.handler, wanted, LONGER, suspects,
        )
        return int(held)

    def hears(self, worker: int, held: int, asked_at: float) -> None:
        """What it was told counts for a lease from before it asked."""
        self.told[worker] = held, asked_at + LEASE

    @rule(worker=SOME, wanted=WANTED, suspects=st.booleans())
    def takes(self, worker: int, wanted: int, suspects: bool) -> None:
        worker = self.free(worker)
        changes = self.permits.asked(worker, wanted, self.model.now, LONGER, not suspects and self.spare(worker))
        held = self.asks(worker, wanted, suspects)
        self.ask(worker, "commit")
        self.permits.change(changes)
        self.hears(worker, held, self.model.now)
        assert held == sum(holder is not None for holder in changes.values()), "permits: told of others than it holds"

    @precondition(lambda self: len(self.txs) < 2)
    @rule(first=SOME, wanted=st.tuples(WANTED, WANTED), commit=st.sampled_from([True, True, False]))
    def take_at_once(self, first: int, wanted: tuple[int, int], commit: bool) -> None:
        """The second asks while the first one's transaction is open; should it wait for that, it goes on after it."""
        first = self.free(first)
        second = next(worker for worker in (0, 1, 2) if worker != first and worker not in self.txs)
        now = self.model.now
        changes = self.permits.asked(first, wanted[0], now, LONGER, self.spare(first))
        others = self.permits.asked(second, wanted[1], now, LONGER, self.spare(second), changes)
        held = self.asks(first, wanted[0])
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(self.asks, second, wanted[1], waits="60 s")
            pid = self.conns[second].info.backend_pid
            while not asking.done() and not self.sql("select cardinality(pg_blocking_pids(%s))", pid):
                pass
            self.ask(first, "commit" if commit else "rollback")
            if commit:
                self.hears(first, held, now)
            self.hears(second, asking.result(), now)
        self.ask(second, "commit")
        self.within()
        for change in [changes] * commit + [others]:
            self.permits.change(change)

    @precondition(lambda self: self.told)
    @rule(data=st.data(), late=st.booleans())
    def keeps(self, data: Any, late: bool) -> None:
        """The heartbeat; late: when they have run out."""
        worker = data.draw(st.sampled_from(sorted(self.told)))
        if late:
            self.move(12_000)
        rows = dict(self.look.execute(
            "select * from anton.keep_permits(%s, make_interval(secs => %s))", (worker + 1, LONGER)).fetchall())
        kept = rows.get(self.handler, 0)
        assert kept == self.permits.keep(worker, self.model.now, LONGER), "permits: other ones are kept"
        self.hears(worker, min(kept, self.told.get(worker, (0, 0.0))[0]), self.model.now)

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def holder_dies(self, data: Any) -> None:
        self.dies(data.draw(st.sampled_from(sorted(self.told))))

    @rule(worker=SOME)
    def dies(self, worker: int) -> None:
        super().dies(worker)
        self.permits.died(worker)
        self.told.pop(worker, None)

    @invariant()
    def within(self) -> None:
        held = sum(held for held, until in self.told.values() if until > self.model.now)
        assert held <= LIMIT, f"{held} permits are held, of {LIMIT}"

    @invariant()
    def permits_are_equal(self) -> None:
        rows = self.look.execute(
            "select n, worker_id - 1 from anton.permit where handler_id = %s and lease_until > anton.now() order by n",
            (self.handler,),
        ).fetchall()
        assert dict(rows) == self.permits.valid(self.model.now), "permits: held by others than in the model"

    # Tenants

    @precondition(lambda self: not self.open)
    @rule(turn=st.sampled_from([None, *TURNS]))
    def take_turns(self, turn: str | None) -> None:
        """Two tenants have work, and a claim is of one job."""
        for tenant in ("acme", "beta"):
            self.append(1, tenant, "insert")
            self.end(next(reversed(self.open)), True)
        self.equal()
        self.claim(self.free(0), 1, 1, turn=turn)

    # Delay and debounce

    @precondition(lambda self: len(self.open) < 2)
    @rule(n=st.integers(1, 7), tenant=st.sampled_from(TENANTS), passes=st.sampled_from([None, 0, 1000, 3700]))
    def append_later(self, n: int, tenant: str | None, passes: int | None) -> None:
        """Left open; or committed, and looked for when so much time has passed."""
        self.append(n, tenant, "insert", later=True)
        if passes is not None:
            self.end(next(reversed(self.open)), True)
            self.move(passes)
            self.poll()

    def touch(self, writer: int, n: int) -> None:
        """A writer changes notes, each writer its own."""
        ids = [id for id in NOTES if id % 2 == writer % 2][:n]
        self.conns[writer].execute("update notes set n = n + 1 where id = any (%s)", (ids,))
        self.touched.setdefault(writer, []).extend((id, self.model.now) for id in ids)

    @precondition(lambda self: any(due is None for *_, due in self.open.values()))
    @rule(data=st.data(), n=st.integers(1, 2))
    def touches(self, data: Any, n: int) -> None:
        """In a transaction that is open and goes on."""
        self.touch(data.draw(st.sampled_from(sorted(writer for writer, tx in self.open.items() if tx[3] is None))), n)

    @precondition(lambda self: len(self.open) < 2)
    @rule(times=st.integers(1, 6), looks=st.booleans())
    def touches_again(self, times: int, looks: bool) -> None:
        """One that does not come to rest."""
        for _ in range(times):
            self.append(1, None, "insert")
            writer = next(reversed(self.open))
            self.touch(writer, 1)
            self.end(writer, True)
            self.move(1000)
            if looks:
                self.poll()

    def end(self, writer: int, commit: bool) -> None:
        super().end(writer, commit)
        for id, at in self.touched.pop(writer, []):
            if commit:
                self.rest.change(id, at)

    def notes(self) -> dict[int, int]:
        """The state of each."""
        return dict(self.look.execute("select id, n from notes").fetchall())

    @rule()
    def poll(self) -> None:
        """Of what has come to rest there is one job, whose handler sees it as it is now; of what has not, none."""
        super().poll()
        take = "delete from anton.job where handler_id = %s returning ids"
        made = sorted(id for (ids,) in self.look.execute(take, (self.resting,)).fetchall() for id in ids)
        assert made == self.rest.due(self.model.now), "debounce: other notes than those that have come to rest"
        self.seen |= {id: n for id, n in self.notes().items() if id in made}


@pytest.fixture
def flow(server: Server, template: str, request: pytest.FixtureRequest) -> Iterator[type[Flow]]:
    with opened(Flow, server, template, getattr(request, "param", None)) as pg:
        pg.sql(
            "create table notes (id bigint primary key, n int not null default 0)",
            f"insert into notes (id) select generate_series({NOTES[0]}, {NOTES[-1]})",
            f"select anton.set_limit({Flow.handler}, {LIMIT})",
        )
        Flow.resting = pg.listen("notes", "updated", name="rests", debounce=f"{DEBOUNCE} s", max_wait=f"{MAX_WAIT} s")
        yield Flow


def test_limits_delays_and_debounces_hold_whatever_happens(flow: type[Flow]) -> None:
    run_state_machine_as_test(flow, settings=SETTINGS)


SHIPPED = """    v_rows := array(select ctid from permit where handler_id = p_handler and lease_until <= v_now
                     order by n limit least(v_free, p_wanted - v_held) for update skip locked);
    update permit set worker_id = p_worker, lease_until = v_now + p_lease where ctid = any (v_rows);"""
COUNTED = """    update permit set worker_id = p_worker, lease_until = v_now + p_lease
     where handler_id = p_handler and n = any (array(
       select q.n from permit q where q.handler_id = p_handler and q.lease_until <= v_now
        order by q.n limit least(v_free, p_wanted - v_held)));"""
TURN = "tenants_in_turn(p_handler, p_turn, 32, v_end)"
NOT_SO = "the queue is not as the model has it|another handler is ready than in the model"
WRONG = (  # (what is wrong, how, what the machine has to say)
    (
        "permits counted, then claimed",
        ((PERMIT, SHIPPED, COUNTED),),
        f"permits are held, of {LIMIT}|permits: held by others than in the model",
    ),
    (
        "permits of the dead that are not freed",
        ((DEATH, "  update permit set worker_id = null, lease_until = '-infinity' where worker_id = p_worker;\n", ""),),
        "permits: held by others than in the model",
    ),
    (
        "a permit that has run out, and is kept",
        ((PERMIT, "p.worker_id = p_worker and p.lease_until > v_now for", "p.worker_id = p_worker for"),),
        "permits: other ones are kept",
    ),
    (
        "a claim that begins with the same tenant each time",
        ((TENANT, TURN, "tenants_in_turn(p_handler, null, 32, v_end)"),),
        "a claim of other jobs",
    ),
    (
        "delayed work that is ready too early",
        (
            (JOB, "delayed where run_at <= v_now) then", "delayed where run_at <= v_now + interval '1 h') then"),
            (JOB, "delayed where run_at <= v_now order", "delayed where run_at <= v_now + interval '1 h' order"),
        ),
        NOT_SO,
    ),
    (
        "delayed work that is lost when it is due",
        ((JOB, "    from moved order by run_at;", "    from moved where attempt > 0 order by run_at;"),),
        NOT_SO,
    ),
    (
        "a debounce that does not wait",
        ((REST, "least(last_at + $4, first_at + $5), cause", "least(last_at, first_at + $5), cause"),),
        "debounce: other notes than those that have come to rest",
    ),
    (
        "a debounce without an end",
        ((REST, "due_at = least(greatest(d.last_at, excluded.last_at) + $4, least(d.first_at, excluded.first_at) + $5)",
          "due_at = greatest(d.last_at, excluded.last_at) + $4"),),
        "debounce: other notes than those that have come to rest",
    ),
    (
        "a debounce that calls twice",
        (
            (REST, "    delete from debounce d using many(", "    select d.* from debounce d cross join many("),
            (REST, " where d.ctid = x.row returning d.*", " where d.ctid = x.row"),
        ),
        "debounce: other notes than those that have come to rest",
    ),
)


@pytest.mark.once("it asks what the machine sees, not what a server does")
@pytest.mark.parametrize(
    ("flow", "says"),
    [(Bug(name, edits, "", 0, ""), says) for name, edits, says in WRONG],
    indirect=["flow"],
    ids=lambda value: value.name if isinstance(value, Bug) else "",
)
def test_a_bug_in_what_is_limited_or_put_off_is_found(flow: type[Flow], says: str) -> None:
    finds(flow, says)
