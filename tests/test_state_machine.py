"""The queue's SQL functions in any order, over several connections, against the model in chaos/model.py.

Time is anton.now(), which the test moves; nothing sleeps. After every step the whole queue is compared with the model.
The numbers are those of the invariants: I1 each record is in one place. I2 no job without its commit. I3 a token is
new for each claim. I4 a stale one changes nothing: what the model refuses is refused, and the queue is as before. I5,
I6 what is done has each output once, nothing else has one. I7 done, dead and cancelled are final. I8 attempts and
crashes. I9 all is drained in the end. I10 what is paused is not claimed. I12 an ack is all or nothing. I13 the tenant.
(I11 would be the order by key, which is not promised.)
ANTON_EXAMPLES: how many runs (12), of ANTON_STEPS steps (40). ANTON_BUG: a bug of chaos/bugs.py to catch.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pg import Pg
from servers import Server

from chaos.bugs import BUGS, planted
from chaos.model import Part, Queue, Refused

AHEAD = 3600.0  # the clock begins here: the server is up for longer than any lease
STATE = """
select coalesce(jsonb_agg(x), '[]') from (
  select 'job' as place, id, change_id, lo, hi, settled, attempt, crashes, null::text as token, tenant from anton.job
  union all select 'delayed', id, change_id, lo, hi, settled, attempt, crashes, null, tenant from anton.delayed
  union all select 'lease', id, change_id, lo, hi, settled, attempt, crashes, token::text, tenant from anton.lease) x"""


class Machine(RuleBasedStateMachine):
    """Two workers with a connection each, two writers, one that looks on."""

    url = ""
    handler = 0
    conns: list[psycopg.Connection[Any]] = []
    look: psycopg.Connection[Any]

    def __init__(self) -> None:
        super().__init__()
        for conn in self.conns:  # what a run that failed has left open
            conn.execute("rollback")
        self.model = Queue()
        self.random = random.Random(0)
        self.tokens: list[int] = []
        self.held_by: dict[int, set[int]] = {0: set(), 1: set()}  # worker: tokens it was given
        self.past: list[tuple[int, list[int]]] = []  # what any token ever held: (token, ids)
        self.open: dict[int, tuple[int, int, str | None]] = {}  # writer: (change, records, tenant)
        self.acks: dict[int, tuple[int, list[Part]]] = {}  # worker: an ack that is not committed
        self.ids: dict[Part, int] = {}
        self.next_id = 1
        self.sql(
            "delete from anton.job; delete from anton.lease; delete from anton.delayed; delete from anton.dead; "
            "delete from anton.receipt; truncate orders, results; update anton.handler set paused = false; "
            f"update test_clock set ahead = interval '{AHEAD} s'"
        )

    def teardown(self) -> None:
        """Every worker is gone; one that comes then finds and finishes all (I9), each output once (I6)."""
        for worker in list(self.acks):
            self.crash(worker)
        for writer in list(self.open):
            self.end(writer, True)
        self.steer(False)
        self.move(10_000)
        while self.model.jobs:
            self.poll()
            self.equal()
            self.claim(0, 1000, 10_000)
            while self.reclaim(0) is not None:
                pass
            for part, job in list(self.model.jobs.items()):
                assert job.token is not None, "I9: nothing waits for anything any more"
                self.ack_parts(0, job.token, part, self.model.left(part))
        self.equal()
        assert not self.model.jobs

    # What both sides are asked

    def sql(self, query: str, *args: Any) -> Any:
        """The first value, on the connection that looks on."""
        done = self.look.execute(query, args or None)
        row = done.fetchone() if done.description else None
        return row[0] if row else None

    def ask(self, worker: int, query: str, *args: Any) -> list[Any]:
        """Rows for a worker; Refused for a fence that held."""
        try:
            done = self.conns[worker].execute(query, args or None)
            return done.fetchall() if done.description else []
        except psycopg.Error as error:
            if error.sqlstate == "NT001":
                raise Refused from error
            raise

    def both(self, mine: Any, theirs: Any) -> bool:
        """Does it to the model and to the database; both go through, or both refuse."""
        try:
            mine()
        except Refused:
            with pytest.raises(Refused):
                theirs()
            return False
        theirs()
        return True

    def part(self, data: Any, place: str = "lease") -> Part | None:
        """One of the parts in a place that no open transaction holds."""
        some = sorted(part for part, job in self.model.jobs.items() if job.place == place and not job.locked)
        return data.draw(st.sampled_from(some)) if some else None

    # Writers

    @initialize(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=4))
    def begin(self, sizes: list[int]) -> None:
        for n in sizes:
            self.append(n, None)
            self.end(2, True)
        self.equal()
        token = self.claim(0, 2, 20)
        assert token

    def any(self, place: str) -> bool:
        """Whether a part is in that place."""
        return any(job.place == place for job in self.model.jobs.values())

    @precondition(lambda self: len(self.open) < 2)
    @rule(n=st.integers(1, 7), tenant=st.sampled_from([None, None, "acme"]))
    def append(self, n: int, tenant: str | None) -> None:
        writer = next(w for w in (2, 3) if w not in self.open)
        conn = self.conns[writer]
        conn.execute("begin")
        if tenant:
            conn.execute(f"set local anton.tenant = '{tenant}'")
        conn.execute("insert into orders select generate_series(%s::int, %s)", (self.next_id, self.next_id + n - 1))
        self.open[writer] = self.next_id, n, tenant
        self.next_id += n

    @precondition(lambda self: self.open)
    @rule(data=st.data(), commit=st.sampled_from([True, True, False]))
    def commit(self, data: Any, commit: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.open))), commit)

    def end(self, writer: int, commit: bool) -> None:
        """A writer's transaction. Its change is known by the first id it wrote."""
        first, n, tenant = self.open.pop(writer)
        self.conns[writer].execute("commit" if commit else "rollback")
        found = self.look.execute("select change_id from anton.job where ids[1] = %s", (first,)).fetchone()
        assert (found is not None) == commit, "I2: a job without its commit, or a commit without its job"
        if found:
            self.model.add(found[0], n, tenant)

    # Workers

    @precondition(lambda self: self.any("job"))
    @rule(worker=st.integers(0, 1), jobs=st.integers(1, 3), records=st.integers(1, 12))
    def claims(self, worker: int, jobs: int, records: int) -> None:
        if worker not in self.acks:
            self.claim(worker, jobs, records)

    def claim(self, worker: int, jobs: int, records: int) -> int:
        token = self.random.getrandbits(63)
        order = sorted(
            (part for part, job in self.model.jobs.items() if job.place == "job"), key=lambda part: self.ids[part]
        )
        rows = self.ask(
            worker,
            "select change_id, lo, hi, id, ids, settled from anton.claim(%s, %s, array[%s]::int[], array[%s]::int[], "
            "array[%s]::int[], array[0]::bigint[], '30 s')",
            worker + 1,
            token,
            self.handler,
            jobs,
            records,
        )
        wanted = self.model.claim(token, order, jobs, records)
        assert [tuple(row[:3]) for row in rows] == wanted
        assert all(len(row[4]) == row[2] - row[1] + 1 for row in rows)
        self.note(worker, token, [row[3] for row in rows])
        return token

    def note(self, worker: int, token: int, ids: list[int]) -> None:
        """A token was given out."""
        assert token not in self.tokens, "I3"
        self.held_by[worker].add(token)
        self.tokens.append(token)
        if ids:
            self.past.append((token, ids))

    @precondition(lambda self: self.any("lease"))
    @rule(worker=st.integers(0, 1))
    def reclaims(self, worker: int) -> None:
        if worker not in self.acks:
            self.reclaim(worker)

    def reclaim(self, worker: int) -> Part | None:
        token = self.random.getrandbits(63)
        rows = self.ask(
            worker,
            "select change_id, lo, hi, id, crashes from anton.reclaim(%s, %s, array[%s]::int[], '30 s', 1)",
            worker + 1,
            token,
            self.handler,
        )
        self.note(worker, token, [row[3] for row in rows])
        expired = self.model.expired()
        assert bool(rows) == bool(expired)
        if not rows:
            return None
        part: Part = tuple(rows[0][:3])
        assert part in expired
        self.model.reclaim(token, part)
        assert rows[0][4] == self.model.jobs[part].crashes, "I8"
        return part

    @precondition(lambda self: self.any("lease"))
    @rule(worker=st.integers(0, 1), later=st.booleans())
    def reclaims_together(self, worker: int, later: bool) -> None:
        """Several that are suspects for the first time, or one that is to run alone."""
        if later:
            self.move(31)
        if worker in self.acks:
            return
        token = self.random.getrandbits(63)
        rows = self.ask(
            worker,
            "select change_id, lo, hi, id, crashes from anton.reclaim_together(%s, %s, array[%s]::int[], '30 s')",
            worker + 1,
            token,
            self.handler,
        )
        self.note(worker, token, [row[3] for row in rows])
        expired = self.model.expired()
        parts: list[Part] = [tuple(row[:3]) for row in rows]
        assert bool(rows) == bool(expired) and set(parts) <= set(expired)
        if len(parts) > 1:
            self.model.reclaim_together(token, parts)
        elif parts:
            self.model.reclaim(token, parts[0])
        assert [row[4] for row in rows] == [self.model.jobs[part].crashes for part in parts], "I8"

    @precondition(lambda self: self.any("lease"))
    @rule(data=st.data(), worker=st.integers(0, 1))
    def acks_whole(self, data: Any, worker: int) -> None:
        """Whole jobs of one token, with their outputs in the same transaction; left open, or committed."""
        part = self.part(data)
        if part is None or worker in self.acks or self.model.jobs[part].settled:
            return
        token, tenant = self.model.jobs[part].token, self.model.jobs[part].tenant
        parts = [part] + [
            other
            for other, job in self.model.jobs.items()
            if job.token == token and other != part and job.tenant == tenant and not job.settled and not job.locked
        ][: data.draw(st.integers(0, 2))]
        parts.sort(key=lambda part: self.ids[part])
        assert token is not None
        self.ask(worker, "begin")
        self.ack(
            worker, token, [self.ids[part] for part in parts], [(p[0], o) for p in parts for o in self.model.left(p)]
        )
        if data.draw(st.booleans()):
            self.ask(worker, "commit")
            self.model.ack(token, parts)
        else:
            self.acks[worker] = token, parts
            for one in parts:
                self.model.jobs[one].locked = True

    def ack(self, worker: int, token: int, ids: list[int], records: list[tuple[int, int]]) -> None:
        """The ack and its outputs, in whatever transaction is open."""
        (receipt,) = self.ask(worker, "select anton.ack(%s, %s::bigint[], %s, 1)", token, ids, worker + 1)[0]
        self.write(worker, receipt, records)

    def write(self, worker: int, receipt: int, records: list[tuple[int, int]]) -> None:
        """An output for each record."""
        self.ask(
            worker,
            "insert into results (receipt, change, ordinal, tenant) select %s, c, o, "
            "nullif(current_setting('anton.tenant', true), '') "
            "from unnest(%s::bigint[], %s::int[]) x (c, o)",
            receipt,
            [c for c, _ in records],
            [o for _, o in records],
        )

    @precondition(lambda self: self.acks)
    @rule(data=st.data(), ends=st.sampled_from(["commit", "crash", "lost reply"]))
    def ends_ack(self, data: Any, ends: str) -> None:
        worker = data.draw(st.sampled_from(sorted(self.acks)))
        if ends == "crash":
            self.crash(worker)
            return
        token, parts = self.acks.pop(worker)
        self.ask(worker, "commit")
        self.model.ack(token, parts)
        if ends == "lost reply":  # the worker tries once more: the fence tells
            with pytest.raises(Refused):
                self.ask(worker, "select anton.ack(%s, %s::bigint[], 1, 1)", token, [self.ids[part] for part in parts])

    def crash(self, worker: int) -> None:
        """The socket is closed inside the transaction."""
        _, parts = self.acks.pop(worker)
        pid = self.conns[worker].info.backend_pid
        self.conns[worker].close()
        self.conns[worker] = psycopg.connect(self.url, autocommit=True)
        while self.sql("select count(*) from pg_stat_activity where pid = %s", pid):
            pass
        for part in parts:
            self.model.jobs[part].locked = False

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
        token, ids = data.draw(st.sampled_from(self.lost()))
        mine = {self.ids[part] for part, job in self.model.jobs.items() if job.token == token}
        if {self.ids[part] for part, job in self.model.jobs.items() if job.locked} & set(ids):
            return
        gone = next(id for id in ids if id not in mine)
        calls = [
            ("ack(%s, %s::bigint[], 1, 1)", ids),
            ("give_back(%s, %s::bigint[])", ids),
            ("split(%s, %s, 8)", gone),
            ("retry(%s, %s, array[1], '1 s', 'late', true)", gone),
            ("ack_part(%s, %s, array[1], 1, 1)", gone),
            ("bury(%s, %s, 1, 'failed', 'late', null)", gone),
            ("world_failed(%s, %s::bigint[], 'late')", [gone]),
        ]
        for call, what in calls:
            with pytest.raises(Refused):
                self.ask(
                    0 if 0 not in self.acks else 2 if 2 not in self.open else 1, f"select anton.{call}", token, what
                )

    @precondition(lambda self: self.any("lease"))
    @rule(worker=st.integers(0, 1))
    def steals(self, worker: int) -> None:
        """All leases end, and a suspect is taken."""
        self.move(31)
        if worker not in self.acks:
            self.reclaim(worker)

    @precondition(lambda self: self.any("lease"))
    @rule(data=st.data(), worker=st.integers(0, 1))
    def settles_some(self, data: Any, worker: int) -> None:
        part = self.part(data)
        if part is None or worker in self.acks:
            return
        token, left = self.model.jobs[part].token, self.model.left(part)
        ordinals = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        assert token is not None
        how = data.draw(st.sampled_from(["ack", "retry", "bury"]))
        if how == "ack":
            self.ack_parts(worker, token, part, ordinals)
        elif how == "retry":
            after, burn = data.draw(st.sampled_from([0, 10, 100])), data.draw(st.booleans())
            self.ask(
                worker,
                "select anton.retry(%s, %s, %s::int[], make_interval(secs => %s), 'no', %s)",
                token,
                self.ids[part],
                ordinals,
                after,
                burn,
            )
            self.model.retry(token, part, ordinals, after, burn)
        else:
            self.ask(worker, "select anton.bury(%s, %s, %s, 'failed', 'no', null)", token, self.ids[part], ordinals[0])
            self.model.bury(token, part, ordinals[0])

    def ack_parts(self, worker: int, token: int, part: Part, ordinals: list[int]) -> None:
        """Some records of a job are done, with their outputs."""
        with self.conns[worker].transaction():
            (receipt,) = self.ask(
                worker, "select anton.ack_part(%s, %s, %s::int[], 1, 1)", token, self.ids[part], ordinals
            )[0]
            self.write(worker, receipt, [(part[0], o) for o in ordinals])
        self.model.ack_part(token, part, ordinals)

    @precondition(lambda self: self.any("lease"))
    @rule(data=st.data(), ways=st.sampled_from([2, 8]))
    def gives_back_or_splits(self, data: Any, ways: int) -> None:
        part = self.part(data)
        if part is None or 0 in self.acks:
            return
        token = self.model.jobs[part].token
        assert token is not None
        if data.draw(st.booleans()):
            self.ask(0, "select anton.give_back(%s, array[%s]::bigint[])", token, self.ids[part])
            self.model.give_back(token, [part])
        elif len(self.model.left(part)) > 1 and data.draw(st.booleans()):
            self.ask(0, "select anton.split_crashed(%s, %s)", token, self.ids[part])
            self.model.split(token, part, 8, ended=True)
        elif len(self.model.left(part)) > 1:
            self.ask(0, "select anton.split(%s, %s, %s)", token, self.ids[part], ways)
            self.model.split(token, part, ways)

    @precondition(lambda self: self.any("lease"))
    @rule(worker=st.integers(0, 1))
    def dies(self, worker: int) -> None:
        """As its parent sees it. What it is settling is left to it: that commits, or the lease ends in its time."""
        self.sql("select anton.worker_died(%s)", worker + 1)
        self.model.died(self.held_by[worker])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def beats(self, data: Any) -> None:
        """Of any token there ever was: one that was lost is not revived."""
        token = data.draw(st.sampled_from(self.tokens))
        rows = self.look.execute("select anton.heartbeat(1, array[%s]::bigint[], '30 s')", (token,)).fetchall()
        assert bool(rows) == self.model.heartbeat(token)

    # Everybody

    @rule(seconds=st.sampled_from([10, 31, 100]))
    def move(self, seconds: int) -> None:
        self.model.now += seconds
        self.sql("update test_clock set ahead = ahead + make_interval(secs => %s)", seconds)

    @precondition(lambda self: self.any("delayed"))
    @rule()
    def poll(self) -> None:
        self.look.execute("select * from anton.poll(1, array[%s]::int[])", (self.handler,))
        self.model.promote()

    @rule(paused=st.booleans())
    def steer(self, paused: bool) -> None:
        self.sql("update anton.handler set paused = %s", paused)
        self.model.paused = paused

    @rule(data=st.data(), place=st.sampled_from(["job", "delayed", "lease"]))
    def cancels(self, data: Any, place: str) -> None:
        part = self.part(data, place)
        if part is not None:
            assert self.sql("select anton.cancel(%s)", self.ids[part]) == self.model.cancel(part)

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def cancels_late(self, data: Any) -> None:
        """A job that is done, or was cut or given back: I7."""
        _, ids = data.draw(st.sampled_from(self.past))
        for id in set(ids) - set(self.ids.values()):
            assert self.sql("select anton.cancel(%s)", id) is False

    @precondition(lambda self: self.model.dead)
    @rule(data=st.data())
    def replays(self, data: Any) -> None:
        change, ordinal = data.draw(st.sampled_from(sorted(self.model.dead)))
        job = self.sql(
            "select anton.replay((select id from anton.dead where change_id = %s and ordinal = %s limit 1))",
            change,
            ordinal,
        )
        found = self.look.execute("select change_id, tenant from anton.job where id = %s", (job,)).fetchone()
        assert found is not None
        self.model.dead.pop((change, ordinal))
        self.model.add(found[0], 1, found[1])

    @invariant()
    def equal(self) -> None:
        """I1, I3, I5-I8, I12, I13: the queue is as the model has it, and all outputs of what is done are there."""
        rows = self.sql(STATE)
        self.ids = {(row["change_id"], row["lo"], row["hi"]): row["id"] for row in rows}
        assert len(self.ids) == len(rows), "I1: a record is in two places"
        found = {
            (row["change_id"], row["lo"], row["hi"]): (
                row["place"],
                frozenset(row["settled"] or ()),
                row["attempt"],
                row["crashes"],
                row["token"],
                row["tenant"],
            )
            for row in rows
        }
        assert found == {
            part: (
                job.place,
                job.settled,
                job.attempt,
                job.crashes,
                None if job.token is None else str(job.token),
                job.tenant,
            )
            for part, job in self.model.jobs.items()
        }
        outputs = Counter(
            (row[0], row[1]) for row in self.look.execute("select change, ordinal from results").fetchall()
        )
        assert outputs == Counter(self.model.done)
        dead = {
            (row[0], row[1]): row[2]
            for row in self.look.execute("select change_id, ordinal, attempt from anton.dead").fetchall()
        }
        assert dead == self.model.dead
        assert (
            self.sql(
                "select count(*) from results r join anton.receipt x on x.id = r.receipt "
                "where r.tenant is distinct from "
                "nullif(x.tenant, '')"
            )
            == 0
        ), "I13"


@pytest.fixture
def machine(server: Server, template: str) -> Iterator[type[Machine]]:
    name = server.clone(template)
    pg = Pg(server.url(name))
    pg.sql(
        "create table orders (id bigint primary key)",
        "create table results (receipt bigint, change bigint, ordinal int, tenant text)",
        "create table test_clock (ahead interval not null)",
        "insert into test_clock values ('0')",
        "grant select on test_clock to public",
        "create or replace function anton.now() returns timestamptz language sql volatile as "
        "'select pg_catalog.clock_timestamp() + (select ahead from public.test_clock)'",
        # an ack that is left open while the clock moves stays open for as long as the machine is slow
        "create or replace function anton.let_go(p_until timestamptz) returns void language sql as ''",
    )
    for bug in BUGS:
        if bug.name == os.environ.get("ANTON_BUG"):
            with planted(bug) as (_, statements):
                pg.sql(*statements)
    Machine.url, Machine.handler = server.url(name), pg.listen("orders", "new")
    Machine.look = pg.conn
    Machine.conns = [psycopg.connect(Machine.url, autocommit=True) for _ in range(4)]
    yield Machine
    for conn in [pg.conn, *Machine.conns]:
        conn.close()
    server.drop(name)


def test_the_queue_is_as_the_model_has_it_whatever_happens(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("ANTON_EXAMPLES", "12")),
            stateful_step_count=int(os.environ.get("ANTON_STEPS", "40")),
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            database=None,
        ),
    )
