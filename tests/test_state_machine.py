"""The queue's SQL functions in any order, over several connections, against the model in chaos/model.py.

Time is anton.now(), which the test moves; nothing sleeps. After every step the whole queue is compared with the model.
The numbers are those of the invariants: I1 each record is in one place. I2 no job without its commit. I3 a token is
new for each claim. I4 a stale one changes nothing: what the model refuses is refused, and the queue is as before. I5,
I6 what is done has each output once, nothing else has one. I7 done, dead and cancelled are final. I8 attempts and
crashes. I9 all is drained in the end. I10 what is paused is not claimed. I12 an ack is all or nothing. I13 the tenant.
(I11 would be the order by key, which is not promised; I14 and later are of the web, of schedules and of actions.)
ANTON_EXAMPLES: how many runs (12), of ANTON_STEPS steps (40).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from machine import SETTINGS, TENANTS, WORKERS, WRITERS, Base, Blocked, Tx, finding, finds, opened
from servers import Server

from chaos.bugs import BUGS, JOB, Bug
from chaos.model import LEASE, Part, Refused

SOME = st.sampled_from(WORKERS)
OPEN = st.sampled_from([False, False, True])
TENANT = "sql/26_tenant.sql"
TURNS = sorted({name or "" for name in TENANTS})
LEFT_OPEN = 100.0  # seconds of its lease that an ack which is left open must have: then the server lets it be idle


class Machine(Base):
    """The workers' rules."""

    def prepare(self) -> None:
        assert self.claim(0, 2, 20)

    def finish(self) -> None:
        self.claim(0, 1000, 10_000)
        while self.reclaim(0) is not None:
            pass
        for part, job in list(self.model.jobs.items()):
            if job.token is not None:
                self.ack_parts(0, job.token, part, self.model.left(part))

    # Claims

    @precondition(lambda self: self.any("job"))
    @rule(worker=SOME, jobs=st.integers(1, 3), records=st.integers(1, 12), turn=st.sampled_from([None, *TURNS]),
          stays_open=OPEN)
    def claims(self, worker: int, jobs: int, records: int, turn: str | None, stays_open: bool) -> None:
        """Left open: others step over its rows. turn: the tenant that had the last one."""
        self.claim(self.free(worker), jobs, records, stays_open and self.may_leave(), turn)

    def claim(self, worker: int, jobs: int, records: int, stays_open: bool = False, turn: str | None = None) -> int:
        token = self.random.getrandbits(63)
        order = sorted(
            (part for part, job in self.model.jobs.items() if job.place == "job" and not job.locked),
            key=lambda part: self.ids[part],
        )
        if stays_open:
            self.ask(worker, "begin")
        rows = self.ask(
            worker,
            "select change_id, lo, hi, id, ids, tenant from anton.claim(%s, %s, array[%s]::int[], array[%s]::int[], "
            "array[%s]::int[], array[0]::bigint[], %s, false, array[%s])",
            worker + 1,
            token,
            self.handler,
            jobs,
            records,
            f"{LEASE} s",
            turn,
        )
        wanted, locked = self.model.choose(order, jobs, records, turn)
        assert [tuple(row[:3]) for row in rows] == wanted, "I10, or a claim of other jobs"
        assert all(len(row[4]) == row[2] - row[1] + 1 for row in rows)
        assert all(row[5] == self.model.tenants[row[0]] for row in rows), "I13: a lease of another tenant"
        beside = [part for part in order if part in locked and part not in wanted]
        tx = Tx("claim", token, wanted, [row[3] for row in rows], self.model.now, beside)
        if stays_open:
            self.leave(worker, tx)
        else:
            self.committed(worker, tx)
        return token

    @precondition(lambda self: self.any("lease"))
    @rule(worker=SOME, later=st.booleans(), stays_open=OPEN)
    def reclaims(self, worker: int, later: bool, stays_open: bool) -> None:
        """Left open: its look is done and its update is not there yet, for all others."""
        if later:
            self.move(3700)
        self.reclaim(self.free(worker), stays_open and self.may_leave())

    def reclaim(self, worker: int, stays_open: bool = False) -> Part | None:
        token = self.random.getrandbits(63)
        expired = self.model.expired()
        if stays_open:
            self.ask(worker, "begin")
        rows = self.ask(
            worker,
            "select change_id, lo, hi, id, crashes from anton.reclaim(%s, %s, array[%s]::int[], %s, 1)",
            worker + 1,
            token,
            self.handler,
            f"{LEASE} s",
        )
        assert bool(rows) == bool(expired)
        if not rows:
            if stays_open:
                self.ask(worker, "rollback")
            return None
        part: Part = tuple(rows[0][:3])
        assert part in expired
        assert rows[0][4] == self.model.jobs[part].crashes + self.model.jobs[part].alone, "I8"
        tx = Tx("reclaim", token, [part], [rows[0][3]], self.model.now)
        if stays_open:
            self.leave(worker, tx)
        else:
            self.committed(worker, tx)
        return part

    @precondition(lambda self: self.any("lease"))
    @rule(worker=SOME, later=st.booleans())
    def reclaims_together(self, worker: int, later: bool) -> None:
        """Several that are suspects for the first time, or one that is to run alone."""
        if later:
            self.move(3700)
        worker, token = self.free(worker), self.random.getrandbits(63)
        rows = self.ask(
            worker,
            "select change_id, lo, hi, id, crashes from anton.reclaim_together(%s, %s, array[%s]::int[], %s)",
            worker + 1,
            token,
            self.handler,
            f"{LEASE} s",
        )
        self.note(worker, token, [row[3] for row in rows])
        expired = self.model.expired()
        parts: list[Part] = [tuple(row[:3]) for row in rows]
        assert bool(rows) == bool(expired) and set(parts) <= set(expired)
        if len(parts) > 1:
            assert self.model.probe_at is None, "several of a handler that fails"
            self.model.reclaim_together(token, parts)
        elif parts:
            self.model.reclaim(token, parts[0], self.model.now)
        assert [row[4] for row in rows] == [self.model.jobs[part].crashes for part in parts], "I8"

    # Acks

    @precondition(lambda self: self.any("lease"))
    @rule(data=st.data(), worker=SOME, stays_open=st.booleans())
    def acks(self, data: Any, worker: int, stays_open: bool) -> None:
        """Whole jobs of one token, with their outputs in the same transaction; left open, or committed."""
        part, worker = self.part(data), self.free(worker)
        if part is None or self.model.jobs[part].settled:
            return
        token, tenant = self.model.jobs[part].token, self.model.jobs[part].tenant
        parts = [part] + [
            other
            for other, job in self.model.jobs.items()
            if job.token == token and other != part and job.tenant == tenant and not job.settled and not job.locked
        ][: data.draw(st.integers(0, 2))]
        parts.sort(key=lambda part: self.ids[part])
        assert token is not None
        tx = Tx("ack", token, parts, [self.ids[part] for part in parts], self.model.now)
        self.ack(worker, tx)
        left = min(self.model.jobs[part].until for part in parts) - self.model.now
        if stays_open and left > LEFT_OPEN and self.may_leave():
            self.leave(worker, tx)
        else:
            self.ask(worker, "commit")
            self.model.ack(token, parts)

    def ack(self, worker: int, tx: Tx) -> None:
        """The ack and its outputs in a transaction, which stays open."""
        records = [(part[0], ordinal) for part in tx.parts for ordinal in self.model.left(part)]
        ((receipt,),) = self.fenced(
            worker, tx.token, tx.ids, "select anton.ack(%s, %s::bigint[], %s, 1)", tx.token, tx.ids, worker + 1
        )
        self.write(worker, receipt, records)

    def write(self, worker: int, receipt: int, records: list[tuple[int, int]]) -> None:
        """An output for each record."""
        self.ask(
            worker,
            "insert into results (receipt, change, ordinal, tenant) select %s, c, o, "
            "nullif(current_setting('anton.tenant', true), '') from unnest(%s::bigint[], %s::int[]) x (c, o)",
            receipt,
            [c for c, _ in records],
            [o for _, o in records],
        )

    @precondition(lambda self: self.any("lease"))
    @rule(data=st.data(), worker=SOME)
    def acks_of_two_tenants(self, data: Any, worker: int) -> None:
        """Refused: the outputs of one would be the other's."""
        part, worker = self.part(data), self.free(worker)
        if part is None:
            return
        job = self.model.jobs[part]
        others = [
            other
            for other, one in self.model.jobs.items()
            if one.token == job.token and one.tenant != job.tenant and not one.locked
        ]
        if others:
            self.ack_of_two_tenants(worker, part, data.draw(st.sampled_from(sorted(others))))

    def ack_of_two_tenants(self, worker: int, *parts: Part) -> None:
        """Of one token."""
        token, ids = self.model.jobs[parts[0]].token, [self.ids[part] for part in parts]
        with pytest.raises(psycopg.Error) as error:
            self.ask(worker, "select anton.ack(%s, %s::bigint[], 1, 1)", token, ids)
        assert error.value.sqlstate == "NT004", "I13: jobs of two tenants acked as one"

    @precondition(lambda self: self.any("lease"))
    @rule(data=st.data(), worker=SOME)
    def freezes(self, data: Any, worker: int) -> None:
        """In an ack, for longer than its session may be idle, which is shorter than what let_go() would set."""
        part, worker = self.part(data), self.free(worker)
        if part is None or self.model.jobs[part].settled:
            return
        token, conn = self.model.jobs[part].token, self.conns[worker]
        assert token is not None
        try:
            self.ask(worker, "set idle_in_transaction_session_timeout = '50ms'")
            self.ask(worker, "begin")
            self.ask(worker, "select anton.ack(%s, array[%s]::bigint[], 1, 1)", token, self.ids[part])
            ((limit,),) = self.ask(worker, "select current_setting('idle_in_transaction_session_timeout')")
            assert limit == "50ms", "let_go: longer than the session's own"
        except (psycopg.OperationalError, psycopg.errors.IdleInTransactionSessionTimeout):
            pass  # already
        self.gone(conn.info.backend_pid)
        self.conns[worker].close()
        self.conns[worker] = self.connect()

    def ack_parts(self, worker: int, token: int, part: Part, ordinals: list[int]) -> None:
        """Some records of a job are done, with their outputs."""
        id = self.ids[part]
        ((receipt,),) = self.fenced(
            worker, token, [id], "select anton.ack_part(%s, %s, %s::int[], 1, 1)", token, id, ordinals
        )
        self.write(worker, receipt, [(part[0], o) for o in ordinals])
        self.ask(worker, "commit")
        self.model.ack_part(token, part, ordinals)

    # What else is said of a lease

    @precondition(lambda self: self.any("lease"))
    @rule(data=st.data(), worker=SOME, how=st.sampled_from(["ack", "retry", "bury"]))
    def settles_some(self, data: Any, worker: int, how: str) -> None:
        part, worker = self.part(data), self.free(worker)
        if part is None:
            return
        token, left, id = self.model.jobs[part].token, self.model.left(part), self.ids[part]
        ordinals = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        assert token is not None
        if how == "ack":
            self.ack_parts(worker, token, part, ordinals)
        elif how == "retry":
            after, burn = data.draw(st.sampled_from([0, 1000, 5000])), data.draw(st.booleans())
            query = "select anton.retry(%s, %s, %s::int[], make_interval(secs => %s), 'no', %s)"
            self.fence(worker, token, [id], query, token, id, ordinals, after, burn)
            self.model.retry(token, part, ordinals, after, burn)
        else:
            query = "select anton.bury(%s, %s, %s, 'failed', 'no', null)"
            self.fence(worker, token, [id], query, token, id, ordinals[0])
            self.model.bury(token, part, ordinals[0])

    @precondition(lambda self: self.any("lease"))
    @rule(
        data=st.data(),
        worker=SOME,
        ways=st.sampled_from([2, 8]),
        how=st.sampled_from(["give back", "the world failed", "split", "split what crashed"]),
    )
    def parts_with(self, data: Any, worker: int, ways: int, how: str) -> None:
        part = self.part(data)
        if part is not None:
            self.part_with(self.free(worker), part, ways, how)

    def part_with(self, worker: int, part: Part, ways: int, how: str) -> None:
        """A lease ends, or is cut."""
        token, id = self.model.jobs[part].token, self.ids[part]
        assert token is not None
        if how == "give back":
            self.fence(worker, token, [id], "select anton.give_back(%s, array[%s]::bigint[])", token, id)
            self.model.give_back(token, [part])
        elif how == "the world failed":
            query = "select anton.world_failed(%s, array[%s]::bigint[], 'away', '2000 s')"
            if not self.txs:  # they would wait for each other
                self.fence(worker, token, [id], query, token, id)
                self.model.world_failed(token, [part], 2000)
        elif len(self.model.left(part)) > 1:
            crashed = how == "split what crashed"
            query = "split_crashed(%s, %s)" if crashed else f"split(%s, %s, {ways})"
            self.fence(worker, token, [id], f"select anton.{query}", token, id)
            self.model.split(token, part, 8 if crashed else ways, ended=crashed)

    @precondition(lambda self: self.any("lease"))
    @rule(worker=SOME)
    def dies(self, worker: int) -> None:
        """As its parent sees it. What it is settling is left to it: that commits, or the lease ends in its time."""
        self.sql("select anton.worker_died(%s)", worker + 1)
        self.model.died(self.held_by[worker])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def beats(self, data: Any) -> None:
        """Of any token there ever was: one that was lost is not revived."""
        self.beat(data.draw(st.sampled_from(self.tokens)))

    def beat(self, token: int) -> None:
        """Whether it holds anything is as in the model."""
        rows = self.look.execute("select anton.heartbeat(1, array[%s]::bigint[], %s)", (token, f"{LEASE} s")).fetchall()
        assert bool(rows) == self.model.heartbeat(token), "I4: a lease that was lost is revived"

    # What is refused, and what waits

    def lost(self) -> list[tuple[int, list[int]]]:
        """What a token held and does not hold any more, some of it; those first that others hold."""
        held = {id: self.model.jobs[part].token for part, id in self.ids.items()}
        lost = [(token, ids) for token, ids in self.past if any(held.get(id) != token for id in ids)]
        others = [(token, ids) for token, ids in lost if all(held.get(id) for id in ids)]
        return others or lost

    @precondition(lambda self: self.lost())
    @rule(data=st.data())
    def zombie(self, data: Any) -> None:
        """All that may be said with a token, about what it does not hold any more: refused, each and every one."""
        self.is_refused(*data.draw(st.sampled_from(self.lost())))

    def is_refused(self, token: int, ids: list[int]) -> None:
        """Unless it would wait."""
        mine = {self.ids[part] for part, job in self.model.jobs.items() if job.token == token}
        if {self.ids[part] for part, job in self.model.jobs.items() if job.locked} & set(ids):
            return
        gone = next(id for id in ids if id not in mine)
        for call, what in [("ack(%s, %s::bigint[], 1, 1)", ids), ("give_back(%s, %s::bigint[])", ids), *one(gone)]:
            with pytest.raises(Refused):
                self.ask(self.free(0), f"select anton.{call}", token, what)

    @precondition(lambda self: self.txs)
    @rule(data=st.data())
    def waits(self, data: Any) -> None:
        """Whatever is said of a job that another transaction has: it waits for that one's end, and nothing changes."""
        tx, worker = self.txs[data.draw(st.sampled_from(sorted(self.txs)))], self.free(0)
        if not tx.ids:
            return
        id = data.draw(st.sampled_from(tx.ids))
        token = next(self.model.jobs[part].token for part, of in self.ids.items() if of == id)
        calls = [("cancel(%s)", (id,))]
        if tx.kind != "claim":
            calls = [(call, (token, what)) for call, what in one(id)]
        call, args = data.draw(st.sampled_from(calls))
        with pytest.raises(Blocked):
            self.ask(worker, f"select anton.{call}", *args)


def one(id: int) -> list[tuple[str, Any]]:
    """All that may be said of one lease, after its token."""
    return [
        ("ack(%s, %s::bigint[], 1, 1)", [id]),
        ("give_back(%s, %s::bigint[])", [id]),
        ("world_failed(%s, %s::bigint[], 'late')", [id]),
        ("split(%s, %s, 8)", id),
        ("split_crashed(%s, %s)", id),
        ("retry(%s, %s, array[1], '1 s', 'late', true)", id),
        ("ack_part(%s, %s, array[1], 1, 1)", id),
        ("bury(%s, %s, 1, 'failed', 'late', null)", id),
    ]


@pytest.fixture
def machine(server: Server, template: str, request: pytest.FixtureRequest) -> Iterator[type[Machine]]:
    with opened(Machine, server, template, getattr(request, "param", None)):
        yield Machine


def test_the_queue_is_as_the_model_has_it_whatever_happens(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


def three_are_claimed(machine: Machine, stays_open: bool = False) -> Part:
    """A job of three records, by the first worker."""
    machine.append(3, None, "insert")
    machine.end(WRITERS[0], True)
    machine.equal()
    machine.claim(0, 1, 9, stays_open)
    machine.equal()
    (part,) = machine.model.jobs
    return part


def two_claim_at_once(machine: Machine) -> None:
    """What there is for one."""
    three_are_claimed(machine, stays_open=True)
    machine.claim(1, 1, 9)


def is_cut_in_two(machine: Machine) -> None:
    """The second half is one record."""
    machine.part_with(0, three_are_claimed(machine), 2, "split")
    machine.equal()


def another_has_it(machine: Machine) -> tuple[int, list[int]]:
    """The job is reclaimed. What the first one held."""
    three_are_claimed(machine)
    machine.move(3700)
    machine.reclaim(1)
    machine.equal()
    return machine.lost()[0]


def beats_late(machine: Machine) -> None:
    """The heart of the first one."""
    token, _ = another_has_it(machine)
    machine.beat(token)


def acks_late(machine: Machine) -> None:
    """And whatever else it may say."""
    machine.is_refused(*another_has_it(machine))


def two_tenants_are_acked(machine: Machine) -> None:
    """At once."""
    for tenant in ("acme", "beta"):
        machine.append(1, tenant, "insert")
        machine.end(WRITERS[0], True)
    machine.equal()
    machine.claim(0, 2, 9)
    machine.equal()
    machine.ack_of_two_tenants(0, *machine.model.jobs)


def crashes_alone(machine: Machine) -> None:
    """Then it is reclaimed a second time."""
    three_are_claimed(machine)
    for worker in (1, 2):
        machine.move(3700)
        machine.reclaim(worker)


IN_SQL = {bug.name: bug for bug in BUGS if all(path.endswith(".sql") for path, _, _ in bug.edits)}
MIXED = Bug(
    "two tenants acked as one", ((JOB, " or min(coalesce(tenant, '')) <> max(coalesce(tenant, ''))", ""),), "", 0, ""
)
RARE = (  # (what is wrong, the way that leads there, what the machine has to say): seldom met by chance
    (IN_SQL["claim without the row lock"], two_claim_at_once, "Blocked"),
    (IN_SQL["heartbeat that revives a lost lease"], beats_late, "I4: a lease that was lost is revived"),
    (IN_SQL["split that drops the odd record"], is_cut_in_two, "the queue is not as the model has it"),
    (IN_SQL["ack without token"], acks_late, "DID NOT RAISE"),
    (IN_SQL["attempt not counted on a crash"], crashes_alone, "I8"),
    (MIXED, two_tenants_are_acked, "DID NOT RAISE"),
)


@pytest.mark.once("it asks what the machine sees, not what a server does")
@pytest.mark.parametrize(
    ("machine", "way", "says"),
    RARE,
    indirect=["machine"],
    ids=lambda value: value.name if isinstance(value, Bug) else "",
)
def test_a_bug_that_chance_seldom_meets_is_found_on_its_way(
    machine: type[Machine], way: Callable[[Machine], None], says: str
) -> None:
    with finding(says):
        way(machine())


def test_on_the_ways_to_such_bugs_all_is_as_the_model_has_it(machine: type[Machine]) -> None:
    for _, way, _ in RARE:
        one = machine()
        way(one)
        one.teardown()


WRONG = (  # (what the SQL does wrong, where, as shipped, as it is then, what the machine has to say)
    (
        "outputs of no tenant",
        JOB,
        "set_config('anton.tenant', coalesce(p_tenant, ''), true)",
        "set_config('anton.tenant', '', true)",
        "I13: an output of another tenant",
    ),
    (
        "outputs of the tenant before",
        JOB,
        "set_config('anton.tenant', coalesce(p_tenant, ''), true)",
        "case when p_tenant <> '' then set_config('anton.tenant', p_tenant, false) end",
        "I13: an output of another tenant",
    ),
    ("a let_go that does nothing", JOB, "if v_set = 0 or v_set > v_ms then", "if false then", "let_go: idle for"),
    (
        "a let_go that lengthens what is shorter",
        JOB,
        "if v_set = 0 or v_set > v_ms then",
        "if true then",
        "let_go: longer than the session's own",
    ),
    (
        "a let_go for longer than the lease",
        JOB,
        "greatest(2, extract(epoch from p_until - now()))",
        "greatest(2, 60 + extract(epoch from p_until - now()))",
        "let_go: idle for",
    ),
    (
        "an ack that stays",
        JOB,
        "perform let_go(v_until);\n  insert into receipt",
        "insert into receipt",
        "let_go: idle for",
    ),
    (
        "a claim of one tenant that forgets the others",
        TENANT,
        "tenants_in_turn(p_handler, p_turn, 32, v_end)",
        "tenants_in_turn(p_handler, p_turn, 1, v_end)",
        "a claim of other jobs",
    ),
)


@pytest.mark.once("it asks what the machine sees, not what a server does")
@pytest.mark.parametrize(
    ("machine", "says"),
    [
        *((Bug(name, ((path, shipped, wrong),), "", 0, ""), says) for name, path, shipped, wrong, says in WRONG),
        *((bug, r"DID NOT RAISE|the queue is not as the model has it|I\d") for bug in IN_SQL.values()
          if bug not in {bug for bug, _, _ in RARE}),
    ],
    indirect=["machine"],
    ids=lambda value: value.name if isinstance(value, Bug) else "",
)
def test_a_bug_in_the_queue_is_found(machine: type[Machine], says: str) -> None:
    finds(machine, says)
