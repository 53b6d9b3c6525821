"""Machine, the half that every session shares: connections, transactions that stay open, writers, people, and what has
to hold after each step. The workers' half is in tests/test_state_machine.py.

Six connections: three workers, two writers, and one that looks on. Which transaction ends first is drawn.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
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

from chaos.bugs import Bug, planted
from chaos.model import LEASE, Part, Queue, Refused

AHEAD = 100_000.0  # the clock begins here: the server is up for longer than any lease
WORKERS, WRITERS = (0, 1, 2), (3, 4)
TENANTS = [None, None, "acme", "beta"]
DELAY = 2000.0  # of what is written now and handled later
STATE = """
with x as (
  select 'job' as place, id, change_id, lo, hi, settled, attempt, crashes, tenant, origin,
         null::text as token, false as alone, 0 as together, false as ended from anton.job where handler_id > 0
  union all select 'delayed', id, change_id, lo, hi, settled, attempt, crashes, tenant, origin, null, false, 0, false
    from anton.delayed
  union all select 'lease', id, change_id, lo, hi, settled, attempt, crashes, tenant, origin, token::text, alone,
                   together, lease_until < anton.now() from anton.lease)
select (select coalesce(jsonb_agg(x), '[]') from x)"""
IDLE = """
select extract(epoch from anton.now())::float8, setting::int, set_config(name, '0', true)
  from pg_settings where name = 'idle_in_transaction_session_timeout'"""
TABLES = """
select oid::regclass::text from pg_class
 where relkind = 'r' and relnamespace in ('anton'::regnamespace, 'public'::regnamespace)"""
ENDS = ("commit", "commit", "roll back", "crash", "terminate", "lose the reply")


SETTINGS = settings(
    max_examples=int(os.environ.get("ANTON_EXAMPLES", "12")),
    stateful_step_count=int(os.environ.get("ANTON_STEPS", "40")),
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    database=None,
)
BUG = settings(SETTINGS, max_examples=60, stateful_step_count=100, derandomize=True)  # to find one
RARER = settings(BUG, max_examples=300, stateful_step_count=60)  # that chance meets less often


class Blocked(Exception):
    """Another transaction is in the way."""


@dataclass
class Tx:
    """A worker's transaction that is open: what it has done, under which token, to what.

    at: when, by the model's clock. beside: what else it has locked: a claim locks as many jobs as were asked for, also
    when fewer have the records.
    """

    kind: Literal["ack", "claim", "reclaim"]
    token: int
    parts: list[Part]
    ids: list[int]
    at: float
    beside: list[Part] = field(default_factory=list)


@contextmanager
def told() -> Iterator[None]:
    """What a worker makes of an error."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise Blocked from error
    except psycopg.Error as error:
        if error.sqlstate == "NT001":
            raise Refused from error
        raise


class Sessions(RuleBasedStateMachine):
    """Connections to a database whose clock the test moves."""

    url = ""
    handler = 0
    conns: list[psycopg.Connection[Any]] = []
    look: psycopg.Connection[Any]

    @classmethod
    def connect(cls) -> psycopg.Connection[Any]:
        """A session that waits for nobody for long."""
        return psycopg.connect(cls.url, autocommit=True, options="-c lock_timeout=100ms")

    def __init__(self) -> None:
        super().__init__()
        for n, conn in enumerate(self.conns):  # what a run that failed has left open
            conn.close()
            self.conns[n] = self.connect()
        self.sql(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = current_database() "
            "and pid <> pg_backend_pid() and state like 'idle in transaction%'"
        )

    def sql(self, query: str, *args: Any) -> Any:
        """The first value, on the connection that looks on."""
        done = self.look.execute(query, args or None)
        row = done.fetchone() if done.description else None
        return row[0] if row else None

    def ask(self, worker: int, query: str, *args: Any) -> list[Any]:
        """Rows for a worker; Refused for a fence that held, Blocked for a row that another transaction holds."""
        with told():
            done = self.conns[worker].execute(query, args or None)
            return done.fetchall() if done.description else []

    def ask_on(self, worker: int, query: str, *args: Any) -> tuple[list[Any], float, int]:
        """The same in a transaction that goes on, when this was, and how long its session might be idle then, in ms.

        It may for as long as it likes: in what is left of a lease this machine may not get to the next statement.
        """
        with told():
            with self.conns[worker].pipeline():
                done, limit = (self.conns[worker].execute(one, of) for one, of in ((query, args or None), (IDLE, None)))
            ((now, ms, _),) = limit.fetchall()
            return done.fetchall(), now, ms

    def replace(self, worker: int) -> None:
        """Its session is gone, and it has a new one."""
        pid = self.conns[worker].info.backend_pid
        self.conns[worker].close()
        self.conns[worker] = self.connect()
        self.gone(pid)

    def gone(self, pid: int) -> None:
        """Waits until a session has ended."""
        end = time.monotonic() + 60
        while self.sql("select count(*) from pg_stat_activity where pid = %s", pid):
            assert time.monotonic() < end, f"session {pid} has not ended"


class Base(Sessions):
    """What the workers' rules build on."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Queue()
        self.random = random.Random(0)
        self.tokens: list[int] = []
        self.held_by: dict[int, set[int]] = {worker: set() for worker in WORKERS}  # tokens it was given
        self.past: list[tuple[int, list[int]]] = []  # what any token ever held: (token, ids)
        self.open: dict[int, tuple[int, int, str | None, float | None]] = {}  # writer: (first id, records, tenant, due)
        self.txs: dict[int, Tx] = {}
        self.ids: dict[Part, int] = {}
        self.rows: set[int] = set()  # of orders, committed
        self.next_id = 1
        self.sql(
            "delete from anton.job; delete from anton.lease; delete from anton.delayed; delete from anton.dead; "
            "delete from anton.receipt; truncate orders, results; "
            "update anton.handler set paused = false, failing_since = null, probe_at = null, failures = 0; "
            f"update test_clock set ahead = interval '{AHEAD} s'"
        )

    def teardown(self) -> None:
        """Every worker is gone; one that comes then finds and finishes all (I9), each output once (I6)."""
        if sys.exc_info()[0] is not None:
            return
        for worker in list(self.txs):
            self.end_tx(worker, "crash")
        for writer in list(self.open):
            self.end(writer, True)
        self.steer(False)
        self.move(12_000)
        for _ in range(1000):
            if not self.model.jobs:
                break
            self.poll()
            self.equal()
            self.finish()
        self.equal()
        assert not self.model.jobs, "I9: not all is ever done"

    def finish(self) -> None:
        """A round of the worker that comes at the end."""
        raise NotImplementedError

    # What both sides are asked

    def any(self, place: str) -> bool:
        """Whether a part is in that place."""
        return any(job.place == place for job in self.model.jobs.values())

    def part(self, data: Any, place: str = "lease") -> Part | None:
        """One of the parts in a place that no open transaction holds."""
        some = sorted(part for part, job in self.model.jobs.items() if job.place == place and not job.locked)
        return data.draw(st.sampled_from(some)) if some else None

    def free(self, nth: int) -> int:
        """A worker without an open transaction; there is one, see may_leave()."""
        some = [worker for worker in WORKERS if worker not in self.txs]
        return some[nth % len(some)]

    def may_leave(self) -> bool:
        """Whether one more transaction may stay open. What a handler that fails does locks its own row, too."""
        return len(self.txs) < len(WORKERS) - 1 and self.model.probe_at is None

    # Transactions that stay open

    def leave(self, worker: int, tx: Tx) -> None:
        """Its transaction stays open, with its row locks."""
        self.txs[worker] = tx
        for part in (*tx.parts, *tx.beside):
            self.model.jobs[part].locked = True

    @precondition(lambda self: self.txs)
    @rule(data=st.data(), how=st.sampled_from(ENDS))
    def ends(self, data: Any, how: str) -> None:
        self.end_tx(data.draw(st.sampled_from(sorted(self.txs))), how)

    def end_tx(self, worker: int, how: str) -> None:
        """crash: the socket is closed; terminate: the server ends it; lose the reply: to a COMMIT that was sent."""
        tx, conn = self.txs.pop(worker), self.conns[worker]
        committed = how == "commit"
        if how in ("commit", "roll back"):
            self.ask(worker, "commit" if committed else "rollback")
        else:
            if how == "terminate":
                self.sql("select pg_terminate_backend(%s)", conn.info.backend_pid)
                with pytest.raises(psycopg.OperationalError):
                    conn.execute("commit")
            if how == "lose the reply":
                conn.pgconn.send_query(b"commit")
                conn.pgconn.flush()
            self.replace(worker)
            if how == "lose the reply":  # then nobody knows but the database
                held = self.sql("select count(*) from anton.lease where token = %s and id = any(%s)", tx.token, tx.ids)
                committed = (held == len(tx.ids)) == (tx.kind != "ack")
        for part in (*tx.parts, *tx.beside):
            self.model.jobs[part].locked = False
        if committed:
            self.committed(worker, tx)
        if committed and tx.kind == "ack":  # who does not know it tries once more: the fence tells
            with pytest.raises(Refused):
                self.ask(worker, "select anton.ack(%s, %s::bigint[], 1, 1)", tx.token, tx.ids)

    def committed(self, worker: int, tx: Tx) -> None:
        """What the transaction did is so."""
        if tx.kind == "ack":
            self.model.ack(tx.token, tx.parts)
            return
        if tx.kind == "claim":
            self.model.take(tx.token, tx.parts, tx.at)
        else:
            self.model.reclaim(tx.token, tx.parts[0], tx.at)
        self.note(worker, tx.token, tx.ids)

    def note(self, worker: int, token: int, ids: list[int]) -> None:
        """A token was given out."""
        self.held_by[worker].add(token)
        self.tokens.append(token)
        if ids:
            self.past.append((token, ids))

    def idle_limit(self, limit: int, until: float, asked_at: float, now: float) -> None:
        """let_go(): this transaction may be idle for what is left of the lease, two seconds at least, a day at most."""
        least, most = (min(86_400.0, max(2.0, until - at)) * 1000 for at in (now, asked_at))
        assert least - 1 <= limit <= most + 1, f"let_go: idle for {limit} ms, not for {least:.0f} to {most:.0f}"

    def fenced(self, worker: int, token: int, ids: list[int], query: str, *args: Any) -> list[Any]:
        """A call about leases in a transaction that is left open, after which let_go() has to have been called."""
        self.ask(worker, "begin")
        try:
            (row,) = self.ask(
                worker,
                "select extract(epoch from min(lease_until))::float8, extract(epoch from anton.now())::float8 "
                "from anton.lease where token = %s and id = any(%s)",
                token,
                ids,
            )
            rows, now, limit = self.ask_on(worker, query, *args)
            if row[0] is not None:
                self.idle_limit(limit, *row, now)
            return rows
        except BaseException:
            with suppress(psycopg.Error):
                self.conns[worker].execute("rollback")
            raise

    def fence(self, worker: int, token: int, ids: list[int], query: str, *args: Any) -> list[Any]:
        """The same, committed."""
        rows = self.fenced(worker, token, ids, query, *args)
        self.ask(worker, "commit")
        return rows

    # Writers

    @initialize(changes=st.lists(st.tuples(st.integers(1, 7), st.sampled_from(TENANTS)), min_size=2, max_size=5))
    def begin(self, changes: list[tuple[int, str | None]]) -> None:
        for n, tenant in changes:
            self.append(n, tenant, "insert")
            self.end(WRITERS[0], True)
        self.equal()
        self.prepare()

    def prepare(self) -> None:
        """What every run begins with."""

    @precondition(lambda self: len(self.open) < 2)
    @rule(
        n=st.integers(1, 7),
        tenant=st.sampled_from(TENANTS),
        how=st.sampled_from(["insert", "copy", "upsert", "merge"]),
    )
    def append(self, n: int, tenant: str | None, how: str, later: bool = False) -> None:
        """New rows, handled now or later; an upsert also writes rows that are there, which are no new records."""
        writer = next(w for w in WRITERS if w not in self.open)
        conn, first, last = self.conns[writer], self.next_id, self.next_id + n - 1
        conn.execute("begin")
        if tenant:
            conn.execute(f"set local anton.tenant = '{tenant}'")
        due = self.model.now + DELAY if later else None
        if later:
            conn.execute("select anton.put_due(make_interval(secs => %s), null)", (DELAY,))
        if how == "copy":
            with conn.cursor().copy("copy orders from stdin") as copy:
                for id in range(first, last + 1):
                    copy.write_row((id,))
        elif how == "merge":
            conn.execute(
                "merge into orders o using generate_series(%s::bigint, %s) s (id) on o.id = s.id "
                "when not matched then insert (id) values (s.id)",
                (first, last),
            )
        else:
            there = [id for id in sorted(self.rows) if id % 2 == writer % 2][:3] if how == "upsert" else []
            conn.execute(
                "insert into orders select unnest(%s::bigint[]) on conflict (id) do update set id = excluded.id",
                ([*there, *range(first, last + 1)],),
            )
        self.open[writer] = first, n, tenant, due
        self.next_id += n

    @precondition(lambda self: self.open)
    @rule(data=st.data(), commit=st.sampled_from([True, True, False]))
    def commit(self, data: Any, commit: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.open))), commit)

    def end(self, writer: int, commit: bool) -> None:
        """A writer's transaction. Its change is known by the first id it wrote."""
        first, n, tenant, due = self.open.pop(writer)
        self.conns[writer].execute("commit" if commit else "rollback")
        place = "job" if due is None else "delayed"
        found = self.look.execute(f"select change_id, ids from anton.{place} where %s = any (ids)", (first,)).fetchall()
        assert len(found) == commit, "I2: a job without its commit, or a commit without its job"
        for change, ids in found:
            assert sorted(ids) == list(range(first, first + n)), "I2: other records than were written"
            self.rows.update(ids)
            self.model.add(change, n, tenant, due=due)

    @precondition(lambda self: self.rows and not self.open)
    @rule()
    def truncate(self) -> None:
        """What is to be done stays to be done."""
        self.sql("truncate orders")
        self.rows.clear()

    # Time and people

    @rule(seconds=st.sampled_from([1000, 3700, 12_000]))
    def move(self, seconds: int) -> None:
        self.model.now += seconds
        self.sql("update test_clock set ahead = ahead + make_interval(secs => %s)", seconds)

    @rule()
    def poll(self) -> None:
        """The look of an idle worker. What is due is ready."""
        (ready, suspects) = self.look.execute(
            "select ready, suspects from anton.poll(1, array[%s]::int[], %s)", (self.handler, f"{LEASE} s")
        ).fetchall()[0]
        self.model.promote()
        wanted = [self.handler] if self.any("job") and self.model.open() else None
        assert ready == wanted, "another handler is ready than in the model"
        ended = [job for job in self.model.jobs.values() if job.place == "lease" and job.until <= self.model.now]
        assert suspects == (0 if self.model.paused else len(ended))

    @rule(paused=st.booleans())
    def steer(self, paused: bool) -> None:
        self.sql("select anton.pause('h')" if paused else "select anton.resume('h')")
        self.model.steer(paused)

    @rule(data=st.data(), place=st.sampled_from(["job", "delayed", "lease"]))
    def cancels(self, data: Any, place: str) -> None:
        part = self.part(data, place)
        if part is not None:
            assert self.sql("select anton.cancel(%s)", self.ids[part]) == self.model.cancel(part)

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def cancels_late(self, data: Any) -> None:
        """A job that is done, or was cut or given back, and a change that is done: I7."""
        _, ids = data.draw(st.sampled_from(self.past))
        changes = {change for change, _ in self.model.done} - {part[0] for part in self.model.jobs}
        for id in (set(ids) | changes) - set(self.ids.values()):
            assert self.sql("select anton.cancel(%s)", id) is False

    @precondition(lambda self: self.model.dead)
    @rule(data=st.data(), how=st.sampled_from(["replay", "replay all", "drop"]))
    def dead_letters(self, data: Any, how: str) -> None:
        """Replayed, one or all, with the idempotency key that they had; or dropped, for good."""
        rows = self.look.execute("select id, change_id, ordinal from anton.dead order by id").fetchall()
        if how != "replay all":
            rows = [data.draw(st.sampled_from(rows))]
        if how == "drop":
            assert self.sql("select anton.drop_dead(%s)", rows[0][0]) is True
            assert self.sql("select anton.drop_dead(%s)", rows[0][0]) is False
        before = {part[0] for part in self.ids}
        if how == "replay":
            self.sql("select anton.replay(%s)", rows[0][0])
        if how == "replay all":
            assert self.sql("select anton.replay('h')") == len(rows)
        found = [
            row[0]
            for row in self.look.execute(
                "select change_id from anton.job where handler_id > 0 order by change_id"
            ).fetchall()
            if row[0] not in before
        ]
        for _, change, ordinal in rows:
            _, origin = self.model.dead.pop((change, ordinal))
            if how != "drop":
                self.model.add(
                    found.pop(0), 1, self.model.tenants[change], origin or f"{self.handler}:{change}:{ordinal}"
                )
        assert not found

    # What holds after every step

    @invariant()
    def equal(self) -> None:
        """I1, I3, I5-I8, I12, I13: the queue is as the model has it, and all outputs of what is done are there."""
        rows = self.sql(STATE)
        self.ids = {(row["change_id"], row["lo"], row["hi"]): row["id"] for row in rows}
        assert len(self.ids) == len(rows), "I1: a record is in two places"
        found = {
            (row["change_id"], row["lo"], row["hi"]): {
                **{name: row[name] for name in ("place", "attempt", "crashes", "tenant", "origin", "token")},
                **{name: row[name] for name in ("alone", "together", "ended")},
                "settled": frozenset(row["settled"] or ()),
            }
            for row in rows
        }
        wanted = {}
        for part, job in self.model.jobs.items():
            leased = job.place == "lease"
            wanted[part] = {
                **{name: getattr(job, name) for name in ("place", "attempt", "crashes", "tenant", "origin", "settled")},
                "token": str(job.token) if leased else None,
                "alone": leased and job.alone,
                "together": job.together if leased else 0,
                "ended": leased and job.until <= self.model.now,
            }
        assert found == wanted, "the queue is not as the model has it"
        outputs = self.look.execute("select change, ordinal, tenant from results").fetchall()
        assert Counter((row[0], row[1]) for row in outputs) == Counter(self.model.done), "I5, I6"
        dead = self.look.execute("select change_id, ordinal, attempt, origin, tenant from anton.dead").fetchall()
        receipts = self.look.execute("select unnest(change_ids), nullif(tenant, '') from anton.receipt").fetchall()
        assert {tuple(row[:2]): tuple(row[2:4]) for row in dead} == self.model.dead
        for what, pairs in {
            "an output": [(change, tenant) for change, _, tenant in outputs],
            "a dead letter": [(row[0], row[4]) for row in dead],
            "a receipt": receipts,
        }.items():
            wrong = [pair for pair in pairs if self.model.tenants[pair[0]] != pair[1]]
            assert not wrong, f"I13: {what} of another tenant: {wrong}"
        assert not self.sql(
            "select count(*) from results r where not exists "
            "(select from anton.receipt x where x.id = r.receipt and r.change = any (x.change_ids))"
        ), "I5: an output without a receipt of its record"


@contextmanager
def opened(machine: type[Sessions], server: Server, template: str, bug: Bug | None) -> Iterator[Pg]:
    """A database for the machine, with its connections; the bug is in its functions."""
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
    )
    pg.sql(*(f"alter table {table} set (autovacuum_enabled = off)" for (table,) in pg.sql(TABLES)))
    if bug is not None:
        with planted(bug) as (_, statements):
            for statement in statements:
                pg.sql(statement)
    machine.url, machine.handler = server.url(name), pg.listen("orders", "new", name="h")
    machine.look = pg.conn
    pg.sql("set lock_timeout = '60 s'")  # nobody is to be in its way
    machine.conns = [machine.connect() for _ in (*WORKERS, *WRITERS)]
    yield pg
    for conn in [pg.conn, *machine.conns]:
        conn.close()
    server.drop(name)


def finds(machine: type[RuleBasedStateMachine], says: str, by: settings = BUG) -> None:
    """The machine finds what is wrong with the code, and says so. says: a regular expression."""
    with finding(says):
        run_state_machine_as_test(machine, settings=by)


@contextmanager
def finding(says: str) -> Iterator[None]:
    """As finds(), for a way that is written down. A failure that is not there again on replay counts, too."""
    failures = AssertionError, psycopg.Error, Refused, Blocked, pytest.fail.Exception, FlakyFailure
    with pytest.raises(failures) as error:
        yield
    said = list(_said(error.value))
    assert any(re.search(says, one) for one in said), said


def _said(error: BaseException) -> Iterator[str]:
    """What it says, or those that it is a group of. Not the lines of its traceback, in which the words stand, too."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _said(one)
    else:
        yield str(error) or type(error).__name__
