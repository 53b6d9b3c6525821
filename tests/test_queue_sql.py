"""The queue by SQL alone: every function that a worker of any language calls, and what each refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from pg import Pg

LOST = "NT001"
REFUSED = "NT004"


class Queue(Pg):
    """A session on a database with a table orders and one handler of its new records."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.h = 0

    def insert(self, *totals: int) -> None:
        """A statement for each record, so a job for each."""
        for total in totals:
            self.sql(f"insert into orders (total) values ({total})")

    def ids(self, *handlers: int, **limits: Any) -> tuple[int, list[int]]:
        """The token and the ids of the jobs of a claim."""
        token, jobs = self.claim(*handlers or (self.h,), **limits)
        return token, [job.id for job in jobs]

    def count(self, table: str) -> int:
        return int(self.value(f"select count(*) from anton.{table}"))

    def counts(self) -> dict[str, int]:
        """Rows of the queue's tables that have any."""
        found = {table: self.count(table) for table in ("job", "lease", "delayed", "dead", "receipt")}
        return {table: n for table, n in found.items() if n}

    def together(self, token: int, lease: str = "30 s") -> list[Any]:
        with self.conn.cursor(row_factory=psycopg.rows.namedtuple_row) as cursor:
            cursor.execute("select * from anton.reclaim_together(1, %s, %s, %s)", (token, [self.h], lease))
            return cursor.fetchall()

    def reclaim(self, token: int = 99, jobs: int = 10, lease: str = "30 s") -> list[Any]:
        with self.conn.cursor(row_factory=psycopg.rows.namedtuple_row) as cursor:
            cursor.execute("select * from anton.reclaim(1, %s, %s, %s, %s)", (token, [self.h], lease, jobs))
            return cursor.fetchall()

    def poll(self) -> Any:
        with self.conn.cursor(row_factory=psycopg.rows.namedtuple_row) as cursor:
            cursor.execute("select * from anton.poll(1, %s)", ([self.h],))
            return cursor.fetchone()

    def handler(self) -> Any:
        with self.conn.cursor(row_factory=psycopg.rows.namedtuple_row) as cursor:
            cursor.execute("select * from anton.handler where id = %s", (self.h,))
            return cursor.fetchone()


@pytest.fixture
def queue(pg: Pg) -> Iterator[Queue]:
    queue = Queue(pg.url)
    queue.sql("create table orders (id bigint generated always as identity primary key, total int)")
    queue.h = queue.listen("orders", "new", name="h")
    yield queue
    queue.conn.close()


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(psycopg.Error) as caught:
        yield
    assert caught.value.sqlstate == code, caught.value


# claim


def test_a_claim_moves_the_oldest_jobs_and_gives_their_keys(queue: Queue) -> None:
    queue.insert(1, 2, 3)
    _, jobs = queue.claim(queue.h, jobs=2)
    assert [(job.handler_id, job.ids, job.lo, job.hi, job.op, job.attempt) for job in jobs] == [
        (queue.h, [1], 1, 1, "n", 0),
        (queue.h, [2], 1, 1, "n", 0),
    ]
    assert queue.counts() == {"job": 1, "lease": 2}
    assert [job.ids for job in queue.claim(queue.h)[1]] == [[3]]
    assert queue.claim(queue.h)[1] == []


def test_a_claim_stops_at_the_records_asked_for_and_gives_one_job_at_least(queue: Queue) -> None:
    queue.sql(
        "insert into orders (total) select g from generate_series(1, 10) g",
        "insert into orders (total) values (1), (2)",
    )
    queue.insert(1)
    assert [job.hi for job in queue.claim(queue.h, records=5)[1]] == [10]
    assert [job.hi for job in queue.claim(queue.h, records=3)[1]] == [2, 1]


def test_a_job_of_many_records_gets_its_keys_from_its_change(queue: Queue) -> None:
    queue.sql("insert into orders (total) select g from generate_series(1, 1500) g")
    _, jobs = queue.claim(queue.h)
    assert [key for job in jobs for key in job.ids] == list(range(1, 1501))
    assert queue.value("select count(*) from anton.lease where ids is not null") == 0


def test_a_job_of_many_records_whose_keys_are_no_integers_or_that_have_none_has_no_ids(queue: Queue) -> None:
    queue.sql("create table letters (name text primary key)", "create table marks (n int)")
    letters, marks = queue.listen("letters", "new"), queue.listen("marks", "new")
    queue.sql("insert into letters select 'n' || g from generate_series(1, 1500) g",
              "insert into marks select generate_series(1, 1500)")
    _, jobs = queue.claim(letters)
    assert sorted(key for job in jobs for [key] in job.keys) == sorted(f"n{n}" for n in range(1, 1501))
    assert all(job.ids is None for job in jobs)
    _, jobs = queue.claim(marks)
    assert jobs and all(job.ids is None and job.keys is None for job in jobs)


def test_after_steps_over_what_was_claimed_before(queue: Queue) -> None:
    queue.insert(1, 2, 3)
    first = queue.value("select min(id) from anton.job")
    assert queue.sql(
        "select ids from anton.claim(1, 1, array[%s]::int[], array[9], array[9], array[%s]::bigint[], '30 s')",
        args=(queue.h, first),
    ) == [([2],), ([3],)]


def test_two_claims_at_once_share_the_jobs_and_neither_waits(queue: Queue) -> None:
    queue.insert(1, 2, 3)
    with queue.other(lock_timeout="1ms") as other:
        queue.sql("begin")
        mine = queue.claim(queue.h, jobs=2)[1]
        theirs = other.claim(queue.h)[1]
        queue.sql("commit")
    assert [job.ids for job in mine] == [[1], [2]] and [job.ids for job in theirs] == [[3]]


def test_a_claim_that_is_rolled_back_has_claimed_nothing(queue: Queue) -> None:
    queue.insert(1)
    queue.sql("begin")
    assert len(queue.claim(queue.h)[1]) == 1
    queue.sql("rollback")
    assert queue.counts() == {"job": 1}


def test_a_claim_yields_nothing_for_a_handler_that_is_not_asked_for_or_not_there(queue: Queue) -> None:
    queue.insert(1)
    assert queue.claim()[1] == [] and queue.claim(queue.h + 1000)[1] == []
    assert queue.counts() == {"job": 1}


def test_a_deep_handler_does_not_keep_a_shallow_one_from_a_claim(queue: Queue) -> None:
    queue.insert(*range(50))
    shallow = queue.listen("orders", "new", name="shallow")
    queue.insert(1)
    _, jobs = queue.claim(queue.h, shallow, jobs=5)
    assert [(job.handler_id, job.ids[0]) for job in jobs] == [*((queue.h, key) for key in range(1, 6)), (shallow, 51)]


# ack


def test_an_ack_settles_jobs_and_writes_what_it_settled(queue: Queue) -> None:
    queue.insert(1, 2)
    queue.sql("insert into orders (total) select g from generate_series(1, 20) g")
    token, ids = queue.ids()
    receipt = queue.value("select anton.ack(%s, %s::bigint[], 1, 12.5, 3)", token, ids)
    assert queue.counts() == {"receipt": 1}
    assert queue.sql("select id, handler_id, worker_id, ms, n, gone from anton.receipt") == [
        (receipt, queue.h, 1, 12.5, 22, 3)
    ]
    assert [row[0] for row in queue.sql(f"select key from anton.inputs({receipt})")] == [[key] for key in range(1, 23)]


def test_an_ack_under_a_wrong_token_changes_nothing(queue: Queue) -> None:
    queue.insert(1)
    token, ids = queue.ids()
    with refused(LOST):
        queue.ack(token + 1, *ids)
    assert queue.counts() == {"lease": 1}
    queue.ack(token, *ids)


def test_an_ack_is_refused_whole_when_one_of_its_jobs_is_lost(queue: Queue) -> None:
    queue.insert(1, 2)
    token, ids = queue.ids()
    queue.sql("select anton.give_back(%s, %s::bigint[])", args=(token, ids[:1]))
    with refused(LOST):
        queue.ack(token, *ids)
    assert queue.counts() == {"job": 1, "lease": 1}


def test_a_second_ack_is_refused_and_so_is_one_of_nothing(queue: Queue) -> None:
    queue.insert(1)
    token, ids = queue.ids()
    queue.ack(token, *ids)
    with refused(LOST):
        queue.ack(token, *ids)
    with refused(LOST):
        queue.ack(token)
    assert queue.counts() == {"receipt": 1}


def test_what_was_written_goes_with_an_ack_that_is_refused(queue: Queue) -> None:
    queue.sql("create table letters (id int primary key)")
    queue.insert(1)
    token, ids = queue.ids()
    with refused(LOST), queue.conn.transaction():
        queue.sql("insert into letters values (1)")
        queue.ack(token + 1, *ids)
    assert queue.value("select count(*) from letters") == 0


def test_two_handlers_are_acked_apart(queue: Queue) -> None:
    other = queue.listen("orders", "new", name="other")
    queue.insert(1)
    token, ids = queue.ids(queue.h, other)
    with refused(REFUSED):
        queue.ack(token, *ids)
    assert queue.counts() == {"lease": 2}
    for id in ids:
        queue.ack(token, id)


def test_two_tenants_have_jobs_of_their_own_and_are_acked_apart(queue: Queue) -> None:
    queue.sql("set anton.tenant = 'acme'")
    queue.insert(1)
    queue.sql("set anton.tenant = 'other'")
    queue.insert(2)
    queue.sql("reset anton.tenant")
    token, jobs = queue.claim(queue.h)
    assert [job.tenant for job in jobs] == ["acme", "other"]
    with refused(REFUSED):
        queue.ack(token, *(job.id for job in jobs))
    for job in jobs:
        with queue.conn.transaction():
            queue.ack(token, job.id)
            assert queue.value("show anton.tenant") == job.tenant
    assert queue.sql("select tenant from anton.receipt order by id") == [("acme",), ("other",)]


def test_what_is_written_after_an_ack_knows_its_cause(queue: Queue) -> None:
    queue.sql("create table letters (id int primary key)")
    next_ = queue.listen("letters", "new", name="next")
    queue.insert(1)
    token, [job] = queue.claim(queue.h)
    with queue.conn.transaction():
        receipt = queue.ack(token, job.id)
        queue.sql("insert into letters values (7)")
    [written] = queue.claim(next_)[1]
    assert (written.cause, written.depth, written.trace) == (receipt, 1, job.trace)
    assert queue.value("select current_setting('anton.context', true)") == ""


def test_put_output_says_which_input_a_record_came_of(queue: Queue) -> None:
    queue.sql("create table letters (id int primary key)", "select anton.watch('letters')")
    queue.sql("insert into orders (total) values (1), (2)")
    token, ids = queue.ids()
    with queue.conn.transaction():
        receipt = queue.ack(token, *ids)
        queue.sql("insert into letters values (7), (8)")
        queue.sql(f"select anton.put_output({receipt}, anton.watch('letters'), '{{7,8}}', null, '{{2,1}}')")
    made = queue.sql("select receipt_id, from_key from anton.made_by(anton.watch('letters'), '[7]')")
    assert made == [(receipt, [2])]


# ack_part


def ten(queue: Queue) -> tuple[int, int]:
    """A leased job of ten records: token and id."""
    queue.sql("insert into orders (total) select g from generate_series(1, 10) g")
    token, [id] = queue.ids()
    return token, id


def part(queue: Queue, token: int, id: int, *ordinals: int) -> int:
    return int(queue.value("select anton.ack_part(%s, %s, %s::int[], 1, 0)", token, id, list(ordinals)))


def test_the_lease_goes_with_the_last_part(queue: Queue) -> None:
    token, id = ten(queue)
    first = part(queue, token, id, 2, 1)
    assert queue.counts() == {"lease": 1, "receipt": 1}
    assert queue.sql(f"select ordinal, key from anton.inputs({first})") == [(2, [2]), (1, [1])]
    part(queue, token, id, *range(3, 11))
    assert queue.counts() == {"receipt": 2}
    with refused(LOST):
        part(queue, token, id, 1)


@pytest.mark.parametrize("ordinals", [(1,), (0,), (11,), (2, 2), ()])
def test_a_part_that_was_settled_named_twice_or_not_its_own_is_refused(queue: Queue, ordinals: tuple[int, ...]) -> None:
    token, id = ten(queue)
    part(queue, token, id, 1)
    with refused(REFUSED):
        part(queue, token, id, *ordinals)
    with refused(LOST):
        part(queue, token + 1, id, 5)
    assert queue.value("select settled from anton.lease") == [1]


def test_an_ack_after_parts_settles_the_rest(queue: Queue) -> None:
    token, id = ten(queue)
    part(queue, token, id, 1, 2, 3)
    receipt = queue.ack(token, id)
    assert queue.value(f"select n from anton.receipt where id = {receipt}") == 7
    assert [row[0] for row in queue.sql(f"select ordinal from anton.inputs({receipt})")] == [4, 5, 6, 7, 8, 9, 10]


def test_a_job_settled_in_part_is_acked_alone(queue: Queue) -> None:
    queue.sql("insert into orders (total) values (1), (2)")
    queue.insert(3)
    token, ids = queue.ids()
    part(queue, token, ids[0], 1)
    with refused(REFUSED):
        queue.ack(token, *ids)
    assert queue.count("lease") == 2


# retry


def retry(queue: Queue, token: int, id: int, *ordinals: int, after: str = "1 min", burn: bool = True) -> None:
    queue.sql("select anton.retry(%s, %s, %s::int[], %s, 'no luck', %s)", args=(token, id, list(ordinals), after, burn))


def test_a_retry_waits_for_its_time_and_comes_back_alone(queue: Queue) -> None:
    token, id = ten(queue)
    retry(queue, token, id, 3, 5)
    assert queue.counts() == {"lease": 1, "delayed": 2}
    look = queue.poll()
    assert look.ready is None and timedelta(seconds=25) < look.wake_at - look.at <= timedelta(seconds=30)  # its lease
    queue.ack(token, id)
    look = queue.poll()
    assert timedelta(seconds=55) < look.wake_at - look.at <= timedelta(minutes=1)
    queue.clock("61 s")
    assert queue.poll().ready == [queue.h]
    _, jobs = queue.claim(queue.h)
    assert [(job.lo, job.hi, job.ids, job.attempt) for job in jobs] == [(3, 3, [3], 1), (5, 5, [5], 1)]


def test_a_retry_that_burns_nothing_counts_no_attempt_and_keeps_its_change(queue: Queue) -> None:
    queue.insert(1)
    token, [job] = queue.claim(queue.h)
    retry(queue, token, job.id, 1, after="0 s", burn=False)
    queue.poll()
    _, [again] = queue.claim(queue.h)
    assert (again.attempt, again.change_id, again.lo, again.at) == (0, job.change_id, job.lo, job.at)
    assert again.id != job.id


def test_a_retry_under_a_wrong_token_changes_nothing(queue: Queue) -> None:
    token, id = ten(queue)
    with refused(LOST):
        retry(queue, token + 1, id, 1)
    assert queue.counts() == {"lease": 1}


# dead letters


def bury(queue: Queue, token: int, id: int, ordinal: int) -> int:
    return int(queue.value("select anton.bury(%s, %s, %s, 'failed', 'no luck', 'line 1')", token, id, ordinal))


def test_a_dead_letter_has_its_key_its_error_and_its_image(queue: Queue) -> None:
    deleted = queue.listen("orders", "deleted", name="deleted")
    queue.sql(
        "insert into orders (total) select g from generate_series(1, 20) g", "delete from orders where id in (3, 4)"
    )
    token, [job] = queue.claim(deleted)
    dead = bury(queue, token, job.id, 2)
    queue.ack(token, job.id)
    assert queue.sql("select id, key, cols, olds, reason, error, traceback, attempt from anton.dead") == [
        (dead, [4], ["id", "total"], [["4"], ["4"]], "failed", "no luck", "line 1", 1)
    ]


def test_a_replayed_dead_letter_is_a_job_with_the_idempotency_key_it_had(queue: Queue) -> None:
    token, id = ten(queue)
    change = queue.value("select change_id from anton.lease")
    dead = bury(queue, token, id, 4)
    queue.ack(token, id)
    queue.sql(f"select anton.replay({dead})")
    assert queue.count("dead") == 0
    token, [job] = queue.claim(queue.h)
    assert (job.ids, job.origin, job.attempt) == ([4], f"{queue.h}:{change}:4", 0)
    dead = bury(queue, token, job.id, 1)  # and once more
    assert queue.value("select anton.replay('h')") == 1
    assert queue.claim(queue.h)[1][0].origin == f"{queue.h}:{change}:4"
    with refused("NT000"):
        queue.sql(f"select anton.replay({dead})")


def test_a_bury_under_a_wrong_token_changes_nothing(queue: Queue) -> None:
    token, id = ten(queue)
    with refused(LOST):
        bury(queue, token + 1, id, 1)
    with refused(REFUSED):
        bury(queue, token, id, 11)
    assert queue.counts() == {"lease": 1}


def test_a_dropped_dead_letter_is_gone_and_leaves_a_trace(queue: Queue) -> None:
    token, id = ten(queue)
    dead = bury(queue, token, id, 4)
    queue.ack(token, id)
    assert queue.value(f"select anton.drop_dead({dead})") is True
    assert queue.value(f"select anton.drop_dead({dead})") is False
    assert queue.counts() == {"receipt": 2}
    assert ([4],) in queue.sql(f"select traced({queue.h})".replace("traced", "anton.traced"))


# give_back, split


def test_what_is_given_back_is_ready_at_once_with_what_was_settled_and_nothing_counted(queue: Queue) -> None:
    token, id = ten(queue)
    part(queue, token, id, 1, 2)
    queue.sql("select anton.give_back(%s, %s::bigint[])", args=(token, [id]))
    _, [job] = queue.claim(queue.h)
    assert (job.settled, job.attempt, job.crashes, job.lo, job.hi) == ([1, 2], 0, 0, 1, 10)


def test_a_job_is_given_back_once_and_by_its_holder(queue: Queue) -> None:
    token, id = ten(queue)
    for wrong in (token + 1, token):
        if wrong == token:
            queue.sql("select anton.give_back(%s, %s::bigint[])", args=(token, [id]))
        with refused(LOST):
            queue.sql("select anton.give_back(%s, %s::bigint[])", args=(wrong, [id]))
    assert queue.counts() == {"job": 1}


def test_a_split_job_is_its_unsettled_parts(queue: Queue) -> None:
    token, id = ten(queue)
    part(queue, token, id, 1, 2, 3, 5)
    parts = queue.sql("select lo, hi from anton.split(%s, %s, 4) order by lo", args=(token, id))
    assert parts == [(4, 6), (7, 9), (10, 10)]
    rows = queue.sql("select id, lo, settled, ids from anton.leased(%s) order by lo", args=(token,))
    assert [row[1:] for row in rows] == [(4, [5], [4, 5, 6]), (7, None, [7, 8, 9]), (10, None, [10])]
    for row in rows:
        queue.ack(token, row[0])
    done = [row[0] for row in queue.sql("select i.ordinal from anton.receipt r, anton.inputs(r.id) i")]
    assert sorted(done) == list(range(1, 11))


# pause, cancel


def test_a_paused_handler_yields_nothing_until_it_is_resumed(queue: Queue) -> None:
    queue.insert(1)
    queue.sql("select anton.pause('h')")
    assert queue.claim(queue.h)[1] == [] and queue.poll().ready is None
    queue.insert(2)
    queue.sql("select anton.resume('h')")
    assert queue.poll().ready == [queue.h]
    assert queue.events(queue.h) and queue.counts() == {"receipt": 2}


def test_what_a_paused_handler_holds_may_be_settled(queue: Queue) -> None:
    queue.insert(1)
    token, ids = queue.ids()
    queue.sql("select anton.pause('h')")
    queue.ack(token, *ids)


def test_a_waiting_job_can_be_cancelled_and_no_other(queue: Queue) -> None:
    queue.insert(1, 2, 3)
    token, ids = queue.ids(jobs=2)
    retry(queue, token, ids[0], 1)
    delayed, ready = queue.value("select id from anton.delayed"), queue.value("select id from anton.job")
    assert [queue.value("select anton.cancel(%s)", id) for id in (delayed, ready, ids[1], ready)] == [
        True,
        True,
        False,
        False,
    ]
    queue.ack(token, ids[1])
    assert queue.value("select anton.cancel(%s)", ids[1]) is False
    assert queue.counts() == {"receipt": 3}


# leases that run out


def test_a_lease_is_reclaimed_when_it_ran_out_and_its_first_holder_is_refused(queue: Queue) -> None:
    queue.insert(1)
    token, [id] = queue.ids()
    assert queue.reclaim() == [] and queue.poll().suspects == 0
    queue.clock("31 s")
    assert queue.poll().suspects == 1 and queue.claim(queue.h)[1] == []
    [job] = queue.reclaim(token=99)
    assert (job.id, job.ids, job.attempt, job.crashes) == (id, [1], 0, 0)
    with refused(LOST):
        queue.ack(token, id)
    queue.ack(99, id)
    assert queue.counts() == {"receipt": 1}


def test_only_a_suspect_that_was_alone_counts_a_crash(queue: Queue) -> None:
    queue.insert(1)
    queue.ids()
    for n, crashes in enumerate((0, 1, 2)):
        queue.clock(f"{31 * (n + 1)} s")
        assert [job.crashes for job in queue.reclaim(token=n)] == [crashes]


def test_suspects_run_together_twice_and_alone_after_that_died_with_no_crash_counted(queue: Queue) -> None:
    for n in (1, 2, 3):
        queue.insert(n)
    queue.ids()
    for token, later in ((1, "31 s"), (2, "62 s")):
        queue.clock(later)
        assert [(job.ids, job.crashes) for job in queue.together(token)] == [([1], 0), ([2], 0), ([3], 0)]
        assert queue.together(token=100 + token) == []
    queue.clock("93 s")
    assert [[(job.ids, job.crashes) for job in queue.together(token=n)] for n in (3, 4, 5, 6)] == [
        [([1], 0)], [([2], 0)], [([3], 0)], []]
    queue.clock("124 s")
    assert [(job.ids, job.crashes) for job in queue.together(token=7)] == [([1], 1)]


def test_a_holder_that_freezes_in_its_ack_lets_go_of_its_locks_when_its_lease_would_have_ended(queue: Queue) -> None:
    queue.insert(1)
    token, ids = queue.ids(lease="1 s")
    with psycopg.connect(queue.url) as frozen:
        frozen.execute("select anton.ack(%s, %s::bigint[], 1, 1)", (token, ids))
        queue.sql("select from anton.lease for update")                # waits for as long as the ack holds the row
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            frozen.execute("select 1")
    assert queue.counts() == {"lease": 1}


def test_a_holder_that_freezes_in_a_copy_of_its_ack_is_cut_off_when_its_heart_has_stopped(queue: Queue) -> None:
    queue.insert(1)
    worker = queue.value("select anton.register_worker('sql', 'here', 1, '')")
    token, ids = queue.ids(worker=worker)
    with psycopg.connect(queue.url) as frozen:
        frozen.execute("select anton.ack(%s, %s::bigint[], 1, 1)", (token, ids))
        frozen.execute("create temp table t (n int)")
        with pytest.raises(psycopg.OperationalError), frozen.cursor().copy("copy t from stdin") as copy:
            copy.write_row([1])
            reading = f"select wait_event from pg_stat_activity where pid = {frozen.info.backend_pid}"
            while queue.value(reading) != "ClientRead":
                pass
            assert queue.value("select anton.thaw('30 s')") == 0       # it holds its lease
            queue.clock("31 s")
            queue.sql(f"select anton.heartbeat({worker}, '{{}}', '30 s')")
            assert queue.value("select anton.thaw('30 s')") == 0       # its heart beats: it is slow
            queue.clock("62 s")
            assert queue.value("select anton.thaw('30 s')") == 1
            queue.sql("select from anton.lease for update")            # waits until the session has ended
    assert [job.ids for job in queue.reclaim()] == [[1]]


@pytest.mark.parametrize("call", [
    "ack(%(token)s, array[%(id)s], 1, 1)", "ack_part(%(token)s, %(id)s, array[1], 1, 1)",
    "retry(%(token)s, %(id)s, array[1], '1 min', 'x', true)", "give_back(%(token)s, array[%(id)s])",
    "split(%(token)s, %(id)s, 2)", "world_failed(%(token)s, array[%(id)s], 'x')"])
def test_a_lease_that_was_ended_and_not_taken_is_settled_as_before(queue: Queue, call: str) -> None:
    queue.sql("insert into orders (total) values (1), (2)")
    worker = queue.value("select anton.register_worker('sql', 'here', 1, '')")
    token, (id,) = queue.ids(worker=worker)
    queue.sql(f"select anton.worker_died({worker})")
    queue.sql("select anton." + call % {"token": token, "id": id})


def test_a_stricter_timeout_of_the_session_stays_and_the_lease_s_is_local_to_the_transaction(queue: Queue) -> None:
    queue.insert(1, 2)
    shown = "show idle_in_transaction_session_timeout"
    for before, within in (("5s", "5s"), ("10min", None), ("0", None)):
        queue.sql(f"set idle_in_transaction_session_timeout = '{before}'")
        token, ids = queue.ids(jobs=1)
        with queue.conn.transaction():
            queue.sql(f"select anton.give_back({token}, array{ids})")
            found = queue.value(shown)
            assert found == within if within else found.endswith(("s", "ms")) and found not in (before, "5s"), found
        assert queue.value(shown) == before


def test_a_large_suspect_is_no_reason_to_run_those_behind_it_alone(queue: Queue) -> None:
    queue.sql("update anton.handler set batch = 1")
    queue.insert(1)
    queue.sql("insert into orders (total) select n from generate_series(1, 200) n")
    queue.insert(*range(20))
    queue.ids()
    queue.clock("31 s")
    assert sorted(len(queue.together(token=n)) for n in (1, 2)) == [1, 21]


def test_suspects_run_together_are_a_hundred_records_at_most_or_a_batch_and_one_is_run_alone(queue: Queue) -> None:
    queue.sql("update anton.handler set batch = 1")
    queue.insert(*range(101))
    queue.ids()
    queue.clock("31 s")
    assert len(queue.together(token=1)) == 100
    assert len(queue.together(token=2)) == 1
    queue.clock("62 s")
    runs = [queue.together(token=n) for n in range(3, 14)]
    assert sorted(len(run) for run in runs) == [1] + [10] * 10
    queue.clock("93 s")
    crashes = [job.crashes for n in range(20, 122) for job in queue.together(token=n)]
    assert sorted(crashes) == [0] * 100 + [2]


def test_two_reclaims_at_once_share_the_suspects_and_neither_waits(queue: Queue) -> None:
    queue.insert(1, 2, 3)
    queue.ids()
    queue.clock("31 s")
    with queue.other(lock_timeout="1ms") as other:
        queue.sql("begin")
        mine = {job.id for job in queue.reclaim(jobs=1)}
        theirs = {row[0] for row in other.sql("select id from anton.reclaim(2, 7, %s, '30 s', 9)", args=([queue.h],))}
        queue.sql("commit")
    assert (len(mine), len(theirs)) == (1, 2) and not mine & theirs


def test_two_that_reclaim_together_at_once_get_a_group_each(queue: Queue) -> None:
    queue.sql("update anton.handler set batch = 1")
    queue.insert(*range(150))
    queue.ids()
    queue.clock("31 s")
    with queue.other(lock_timeout="1ms") as other:
        queue.sql("begin")
        mine = {job.id for job in queue.together(token=1)}
        theirs = {row[0] for row in other.sql("select id from anton.reclaim_together(2, 7, %s, '30 s')",
                                              args=([queue.h],))}
        queue.sql("commit")
    assert (len(mine), len(theirs)) == (100, 50) and not mine & theirs
    assert queue.value("select bool_or(alone) from anton.lease") is False


def test_suspects_of_all_handlers_tenants_and_attempts_run_together_at_first_and_a_handler_s_after_that_died(
        queue: Queue) -> None:
    other = queue.listen("orders", "new", name="other")
    queue.insert(1, 2)
    with queue.conn.transaction():
        queue.sql("set local anton.tenant = 'acme'")
        queue.insert(3)
    token, ids = queue.ids()
    queue.sql(f"select anton.retry({token}, {ids[0]}, array[1], '0 s', 'no', true)")
    queue.poll()
    queue.ids()
    queue.ids(other)
    queue.clock("31 s")

    def run(token: int) -> list[tuple[Any, ...]]:
        return queue.sql("select handler_id, tenant, attempt from anton.reclaim_together(1, %s, %s, '30 s')",
                         args=(token, [queue.h, other]))

    first = run(1)
    assert sorted(row[0] for row in first) == sorted([queue.h, other] * 3)
    assert {row[1] for row in first} == {None, "acme"} and {row[2] for row in first} == {0, 1}
    queue.clock("62 s")
    runs = [run(token) for token in (2, 3, 4)]
    assert sorted(len(rows) for rows in runs) == [0, 3, 3] and all(len({row[0] for row in rows}) < 2 for rows in runs)


def test_suspects_of_a_paused_handler_wait(queue: Queue) -> None:
    queue.insert(1)
    queue.ids()
    queue.clock("31 s")
    queue.sql("select anton.pause('h')")
    assert queue.reclaim() == [] and queue.poll().suspects == 0


def test_the_leases_of_a_worker_known_to_be_dead_are_free_at_once(queue: Queue) -> None:
    queue.insert(1, 2)
    worker = queue.value("select anton.register_worker('test', 'here', 1, '1')")
    queue.ids(jobs=1, worker=worker)
    queue.ids(worker=worker + 1)
    assert queue.value("select anton.worker_died(%s)", worker) == 1
    assert [job.ids for job in queue.reclaim()] == [[1]]


def test_a_suspect_of_many_records_is_cut_into_suspects(queue: Queue) -> None:
    token, id = ten(queue)
    assert queue.value("select anton.split_crashed(%s, %s)", token, id) == 5
    assert [(job.lo, job.hi, job.crashes) for job in queue.reclaim()] == [(lo, lo + 1, 0) for lo in (1, 3, 5, 7, 9)]


# heartbeat


def heartbeat(queue: Pg, *tokens: int) -> set[int]:
    return {row[0] for row in queue.sql("select anton.heartbeat(1, %s::bigint[], '30 s')", args=(list(tokens),))}


def test_a_heartbeat_prolongs_and_says_what_is_still_held(queue: Queue) -> None:
    queue.insert(1, 2)
    (one, _), (two, [id]) = queue.ids(jobs=1), queue.ids(jobs=1)
    queue.clock("20 s")
    assert heartbeat(queue, one, two, 12345) == {one, two}
    queue.clock("45 s")
    assert queue.reclaim() == []
    queue.ack(two, id)
    assert heartbeat(queue, one, two) == {one}


def test_a_heartbeat_does_not_revive_a_lease_that_was_taken(queue: Queue) -> None:
    queue.insert(1)
    token, _ = queue.ids()
    queue.clock("31 s")
    queue.reclaim(token=99)
    assert heartbeat(queue, token) == set()
    queue.clock("62 s")
    assert heartbeat(queue, token, 99) == {99}


def test_a_heartbeat_skips_what_is_being_settled_and_counts_it_as_held(queue: Queue) -> None:
    queue.insert(1, 2)
    token, ids = queue.ids()
    with queue.other(lock_timeout="1ms") as other:
        queue.sql("begin")
        queue.ack(token, ids[0])
        assert heartbeat(other, token) == {token}
        queue.sql("commit")
        queue.ack(token, ids[1])
        assert heartbeat(other, token) == set()


# the world fails


def test_a_failing_handler_probes_with_one_record_and_resumes(queue: Queue) -> None:
    queue.insert(1, 2, 3)
    token, ids = queue.ids()
    queue.sql("select anton.world_failed(%s, %s::bigint[], 'down')", args=(token, ids))
    assert queue.counts() == {"job": 3}
    assert queue.claim(queue.h)[1] == [] and queue.poll().ready is None
    assert timedelta(0) < queue.poll().wake_at - queue.poll().at <= timedelta(seconds=1)
    queue.clock("1.5 s")
    token, [probe] = queue.claim(queue.h)
    assert (probe.probe, probe.attempt) == (True, 0)
    assert queue.claim(queue.h)[1] == []  # no other worker probes meanwhile
    queue.ack(token, probe.id)
    assert (queue.handler().failing_since, queue.handler().failures) == (None, 0)
    assert len(queue.claim(queue.h)[1]) == 2


def test_a_failing_handler_probes_after_a_twentieth_of_its_outage_from_a_second_to_a_minute(queue: Queue) -> None:
    queue.insert(1)
    bounds = []
    for seconds in (0, 10, 60, 600, 3600, 86_400):
        queue.clock(f"{seconds} s")
        token, ids = queue.ids()
        queue.sql("select anton.world_failed(%s, %s::bigint[], 'down')", args=(token, ids))
        handler = queue.handler()
        most = max(timedelta(seconds=1), min(timedelta(minutes=1), (handler.failed_at - handler.failing_since) / 20))
        assert most * 0.79 <= handler.probe_at - handler.failed_at <= most * 1.01
        bounds.append(round(most.total_seconds()))
    assert bounds == [1, 1, 3, 30, 60, 60] and queue.handler().failures == 6


def test_jobs_in_flight_that_fail_together_are_one_step_of_the_wait(queue: Queue) -> None:
    queue.insert(1, 2, 3)
    for token, ids in [queue.ids(jobs=1) for _ in range(3)]:
        queue.sql("select anton.world_failed(%s, %s::bigint[], 'down')", args=(token, ids))
    assert queue.handler().failures == 1


def test_a_failing_handler_is_no_concern_of_another(queue: Queue) -> None:
    other = queue.listen("orders", "new", name="other")
    queue.insert(1)
    token, ids = queue.ids()
    queue.sql("select anton.world_failed(%s, %s::bigint[], 'down')", args=(token, ids))
    assert [job.handler_id for job in queue.claim(queue.h, other)[1]] == [other]
