"""Later: debounce= makes one call of many changes, delay= and at= put events off. The tests move the clock."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pg import Pg
from shop import Shop

from anton import Table, transaction
from anton.app import App, declaring
from anton.errors import BadOption
from anton.testing import TestApp

DEBOUNCE, MAX_WAIT, KEYS = 2, 7, 4


class Desk:
    """An app whose handlers note what they are called with."""

    def __init__(self, app: TestApp) -> None:
        self.app = app
        self.calls: list[Any] = []
        with declaring(app.app):
            self.orders = Table("orders")

    def listen(self, event: str, name: str = "note", **options: Any) -> None:
        def note(order: Any) -> None:
            self.calls.append((order["id"], order["n"]))

        with declaring(self.app.app):
            getattr(self.orders, event)(each=True, name=name, **options)(note)
        self.app.migrate()

    def set(self, n: int, *ids: int) -> None:
        with transaction():
            for id in ids:
                self.orders.select(id=id).update(n=n)

    def rows(self, text: str) -> list[Any]:
        return [tuple(row) for row in self.app._fetch(text)]

    def why(self, id: int) -> list[Any]:
        return self.rows(f"select state, error from anton.why('orders', '{id}') where level > 0")

    def took(self) -> list[Any]:
        calls, self.calls[:] = sorted(self.calls), []
        return calls


@pytest.fixture
def desk(app: TestApp) -> Desk:
    return Desk(app)


def test_a_record_that_changes_again_is_handled_once_with_its_latest_state(desk: Desk) -> None:
    desk.listen("on_updated_records", debounce="2h", max_wait="30h")
    one, two = desk.orders.append({"n": 0}), desk.orders.append({"n": 0})
    for n in range(1, 4):
        desk.set(n, one.id)
        desk.app.advance("1h")
    desk.set(9, two.id)
    desk.app.run()
    assert desk.took() == []
    assert [(state, error.split(",")[0]) for state, error in desk.why(one.id)] == [
        ("delayed", "waits for its debounce of 02:00:00")]
    shown = desk.rows("select s ->> 'debounce', s ->> 'max_wait' from anton.show_handler('note') s")
    assert shown == [("02:00:00", "1 day 06:00:00")]
    waiting = desk.rows("select delayed, why from anton.status")[0]
    assert waiting[0] == 2 and waiting[1].startswith("2 wait to come to rest, debounce 02:00:00, the next until ")
    desk.app.advance("1h")
    assert desk.took() == [(one.id, 3)]
    desk.app.advance("1h")
    assert desk.took() == [(two.id, 9)]
    assert desk.rows("select delayed, why from anton.status") == [(0, None)]


def test_what_waits_to_come_to_rest_is_among_the_jobs(desk: Desk) -> None:
    desk.listen("on_updated_records", debounce="2h")
    one, two = desk.orders.append({"n": 0}), desk.orders.append({"n": 0})
    with transaction():
        desk.orders.upsert({"id": two.id, "n": 3}, delay="1h")
    desk.set(1, one.id)
    jobs = "select id is null, handler, state, records, op, error, run_at - waiting_since from anton.list_jobs('note')"
    hours = [timedelta(hours=n) for n in range(3)]
    not_seen = (False, "note", "delayed", 1, "updated", "waits for its debounce", None)
    (put_off, seen) = sorted(desk.rows(jobs), key=lambda row: row[5] is not None)
    assert put_off[:6] == (False, "note", "delayed", 1, "updated", None) and put_off[6] <= hours[1] and seen == not_seen
    desk.app.run()
    assert (True, "note", "delayed", 1, "updated", "waits for its debounce of 02:00:00", hours[2]) in desk.rows(jobs)
    desk.app.advance("2h")
    assert desk.rows(jobs) == [] and desk.took() == [(one.id, 1), (two.id, 3)]


def test_what_changes_after_its_job_was_made_is_called_for_again_and_what_is_gone_is_settled(desk: Desk) -> None:
    desk.listen("on_updated_records", debounce="2h")
    one, two = desk.orders.append({"n": 0}), desk.orders.append({"n": 0})
    desk.set(1, one.id, two.id)
    desk.app.run()
    desk.rows("update anton.debounce set due_at = first_at returning 1")
    assert desk.rows("select anton.promote()") == [(1,)]
    desk.set(2, one.id)
    desk.orders.select(id=two.id).delete()
    desk.app.run()
    assert desk.took() == [(one.id, 2)]
    assert desk.rows("select sum(n)::int, sum(gone)::int from anton.receipt") == [(2, 1)]
    desk.app.advance("2h")
    assert desk.took() == [(one.id, 2)]


def test_with_per_the_last_record_of_a_key_is_handled_and_those_it_replaced_are_settled(desk: Desk) -> None:
    desk.listen("on_new_records", debounce="2h", per="customer")
    ids = [desk.orders.append({"n": n, "customer": who}).id for n, who in enumerate("aabba")]
    desk.app.run()
    last = desk.orders.append({"n": 9, "customer": "b"}).id
    desk.app.advance("2h")
    assert desk.took() == [(ids[4], 4), (last, 9)]
    assert desk.rows("select sum(found)::int from anton.reconcile('orders')") == [(0,)]
    assert {desk.why(id)[0][0] for id in [*ids, last]} == {"done"}


def test_a_delayed_row_is_there_now_and_handled_in_its_time(desk: Desk) -> None:
    desk.listen("on_new_records")
    later = desk.orders.append({"n": 1}, delay="1h")
    now = desk.orders.append({"n": 2})
    desk.app.run()
    assert desk.took() == [(now.id, 2)] and desk.orders.select().count() == 2
    due = desk.rows("select date_trunc('second', run_at)::text from anton.delayed")[0][0]
    assert desk.why(later.id) == [("delayed", f"due at {due}")]
    assert desk.rows("select delayed, why from anton.status") == [(1, f"the next is due at {due}")]
    desk.app.advance("30m")
    assert desk.took() == []
    desk.app.advance("30m")
    assert desk.took() == [(later.id, 1)]


def test_every_write_takes_a_delay_or_a_time_and_one_that_has_passed_is_now(desk: Desk) -> None:
    desk.listen("on_new_records", name="new")
    desk.listen("on_updated_records", name="updated")
    at = desk.app.now + timedelta(hours=2)
    known = desk.orders.append({"n": 0}, at=at - timedelta(days=1))
    with transaction():
        desk.orders.extend([{"n": 1}, {"n": 2}], delay=timedelta(hours=1))
        desk.orders.upsert({"id": known.id, "n": 3}, at=at)
        desk.orders.append({"n": 4})
        desk.orders.append({"n": 5}, delay="1h")
        desk.orders.append({"n": 6})
    desk.orders.extend(({"n": n} for n in range(100, 120)), delay="1h")
    desk.app.run()
    assert sorted(n for _, n in desk.took()) == [3, 4, 6]  # known is read now: with its update
    desk.app.advance("1h")
    assert sorted(n for _, n in desk.took()) == [1, 2, 5, *range(100, 120)]
    desk.app.advance("1h")
    assert [n for _, n in desk.took()] == [3]


def test_a_handler_puts_work_off_with_its_ack(desk: Desk) -> None:
    with declaring(desk.app.app):
        reminders = Table("reminders")

        @desk.orders.on_new_records
        def remind(records: Any) -> None:
            for order in records:
                reminders.append({"of": order.id}, delay="1d")

        @reminders.on_new_records(each=True)
        def send(reminder: Any) -> None:
            desk.calls.append(reminder["of"])

    desk.app.migrate()
    ids = [desk.orders.append({}).id for _ in range(3)]
    desk.app.run()
    assert reminders.select().count() == 3 and desk.took() == []
    assert desk.rows("select sum(hi - lo + 1)::int from anton.delayed where cause is not null") == [(3,)]
    desk.app.advance("1d")
    assert desk.took() == ids


def test_a_write_cannot_be_put_off_to_nowhere(desk: Desk) -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    desk.app.migrate()
    wrongs: list[dict[str, Any]] = [{"delay": "1h", "at": at}, {"delay": "-1h"}, {"delay": -1}, {"at": "tomorrow"},
                                    {"at": at.replace(tzinfo=None)}]
    for wrong in wrongs:
        for write in (desk.orders.append, desk.orders.upsert, lambda row, **of: desk.orders.extend([row], **of)):
            with pytest.raises(BadOption, match="orders"):
                write({"id": 1}, **wrong)
    assert desk.orders.select().count() == 0


def test_debounce_says_what_it_cannot_do() -> None:
    with declaring(App("x")):
        orders = Table("orders")
        for event, options, said in (
            (orders.on_deleted_records, {"debounce": "2s"}, "only new, or updated, records"),
            (orders.on_changes, {"debounce": "2s"}, "only new, or updated, records"),
            (orders.on_truncate, {"debounce": "2s"}, "only new, or updated, records"),
            (orders.on_rebuilt, {"debounce": "2s"}, "a build has no records"),
            (orders.on_new_records, {"debounce": 0}, "more than 0"),
            (orders.on_new_records, {"debounce": "-2s"}, "a text such as"),
            (orders.on_new_records, {"debounce": "2s", "read": "change"}, "the latest state"),
            (orders.on_new_records, {"debounce": "2s", "max_wait": "1s"}, "no less than debounce='2s'"),
            (orders.on_new_records, {"debounce": "2s", "per": "customer", "concurrency": 2}, "each=True"),
            (orders.on_new_records, {"per": "customer", "each": True}, "concurrency=N"),
        ):
            with pytest.raises(BadOption, match=said):
                event(name="h", **options)(lambda records: None)


def test_options_of_sql_files_and_of_psql_reach_the_handler(shop: Shop) -> None:
    shop.sql("create table orders (id bigint primary key, customer text)")
    body, head = "select 1 from new_records", "-- anton: handler\n-- on: orders"

    def put(ops: str, **options: Any) -> None:
        shop.sql(f"select anton.handler('c', 'orders', '{ops}', '{body}', '{json.dumps(options)}')")

    shop.file("sql/a.sql", f"{head} updated\n-- debounce: 2s\n-- max_wait: 10s\n-- per: customer\n{body}")
    shop.file("sql/b.sql", f"{head} new\n-- debounce: 1m\n-- concurrency: 3\n{body}")
    shop.migrate()
    put("new", debounce="2s", per="customer")
    got = shop.sql("select name, debounce::text, max_wait::text, per, read, (select count(*) from anton.permit p "
                   "where p.handler_id = h.id) from anton.handler h order by name")
    assert got == [("a", "00:00:02", "00:00:10", "customer", "now", 0), ("b", "00:01:00", "00:15:00", None, "now", 3),
                   ("c", "00:00:02", "00:00:30", "customer", "now", 0)]
    for wrong in ({"debounce": "2s", "per": "customer", "concurrency": 2},
                  {"debounce": "2s", "per": "customer", "rate": "1/s"}, {"per": "customer"},
                  {"debounce": "2s", "max_wait": "1s"}, {"debounce": "0"},
                  {"debounce": "2s", "per": "shop"}, {"debounce": "2s", "read": "change"}):
        with pytest.raises(psycopg.Error) as error:
            put("new", **wrong)
        assert error.value.sqlstate == "NT004"
    with pytest.raises(psycopg.Error, match="debounce with the events deleted"):
        put("deleted", debounce="2s")


# The same in SQL alone, second by second


class Clock(Pg):
    """A session on a database whose clock stands, with a handler h of updated records that debounces."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reset()
        self.sql("create table orders (id bigint primary key, n int not null default 0)",
                 f"insert into orders select generate_series(0, {KEYS - 1})")
        self.h = self.listen("orders", "updated", name="h", debounce=f"{DEBOUNCE} s", max_wait=f"{MAX_WAIT} s")
        self.second = 0
        self.set_clock()

    def set_clock(self) -> None:
        self.sql("create or replace function anton.now() returns timestamptz language sql volatile as "
                 f"$$select timestamptz '2030-01-01 00:00:00+00' + interval '{self.second} s'$$")

    def tick(self) -> None:
        self.second += 1
        self.set_clock()

    def touch(self, *ids: int) -> None:
        self.sql("update orders set n = n + 1 where id = any (%s)", args=(list(ids),))

    def due(self) -> list[int]:
        """Keys of the jobs that there are now."""
        while self.value("select anton.promote() > 0 or exists (select from anton.job where handler_id < 0)"):
            pass
        return sorted(event.key for event in self.events(self.h))


@pytest.fixture
def clock(pg: Pg) -> Iterator[Clock]:
    clock = Clock(pg.url)
    yield clock
    clock.reset()
    clock.conn.close()


changes = st.sets(st.integers(0, KEYS - 1), min_size=1)
steps = st.lists(st.one_of(st.tuples(st.just("touch"), changes), st.tuples(st.just("rolled back"), changes),
                           st.tuples(st.just("tick"), st.integers(1, 3))), max_size=25)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_calls_are_those_of_keys_at_rest_whatever_changes_and_when(clock: Clock, steps: list[tuple[str, Any]]) -> None:
    waiting: dict[int, tuple[int, int]] = {}
    for what, argument in [*steps, ("tick", MAX_WAIT)]:
        if what == "touch":
            clock.touch(*argument)
            for key in argument:
                waiting[key] = waiting.get(key, (clock.second, 0))[0], clock.second
        elif what == "rolled back":
            with clock.conn.transaction(force_rollback=True):
                clock.touch(*argument)
        for _ in range(argument if what == "tick" else 0):
            clock.tick()
            due = sorted(key for key, (first, last) in waiting.items()
                         if min(last + DEBOUNCE, first + MAX_WAIT) <= clock.second)
            assert clock.due() == due
            waiting = {key: times for key, times in waiting.items() if key not in due}
    assert not waiting and clock.sql("select 1 from anton.job union all select 1 from anton.debounce") == []


def test_writers_of_one_key_do_not_wait_for_each_other(clock: Clock) -> None:
    clock.sql("drop table orders cascade")
    clock.sql("create table orders (id bigint primary key, customer int, n int not null default 0)",
              "insert into orders values (1, 7), (2, 7), (3, 7)")
    clock.h = clock.listen("orders", "updated", name="h", debounce="2 s", per="customer")
    with clock.other(lock_timeout="10s") as one, clock.other(lock_timeout="10s") as two:
        with one.conn.transaction():
            one.sql("update orders set n = 1 where id = 1")
            with two.conn.transaction():
                two.sql("update orders set n = 1 where id = 2")
                clock.sql("update orders set n = 1 where id = 3")
                assert clock.due() == []
    clock.tick()
    clock.tick()
    assert len(clock.due()) == 1 and clock.due() == []


def test_workers_that_look_at_once_lose_no_change_and_make_no_writer_wait(clock: Clock) -> None:
    clock.sql("create or replace function anton.now() returns timestamptz language sql volatile as "
              "$$select pg_catalog.clock_timestamp()$$")
    clock.h = clock.listen("orders", "updated", name="h", debounce="1 ms")
    last: dict[int, datetime] = {}
    done = threading.Event()

    def write(keys: list[int]) -> None:
        with clock.other() as pg:
            for n in range(60):
                rows = pg.sql("update orders set n = n + 1 where id = any (%s) returning id, anton.now()",
                              args=(keys[n % 2:],))
                last.update(rows)

    def look() -> None:
        with clock.other() as pg:
            while not done.is_set():
                pg.sql("select anton.promote()")

    with ThreadPoolExecutor(4) as pool:
        looks = [pool.submit(look) for _ in range(2)]
        writes = [pool.submit(write, keys) for keys in ([0, 1], [2, 3])]
        try:
            for one in writes:
                one.result()
        finally:
            done.set()
        for one in looks:
            one.result()
    while clock.sql("select 1 from anton.debounce union all select 1 from anton.job where handler_id < 0"):
        clock.sql("select anton.promote()")
    made = dict(clock.sql("select k, max(at) from anton.job, unnest(ids) k group by k"))
    assert set(made) == set(range(KEYS)) and all(made[key] >= last[key] for key in made)


def test_a_change_that_becomes_visible_late_is_due_by_when_it_was_made(clock: Clock) -> None:
    with clock.other() as slow:
        with slow.conn.transaction():
            slow.sql("update orders set n = n + 1 where id = 1")
            for _ in range(5):
                clock.tick()
            clock.touch(2)
            assert clock.due() == []
        assert clock.due() == [1]
    clock.tick()
    clock.tick()
    assert clock.due() == [2]


def test_many_keys_of_one_statement_stay_together(clock: Clock) -> None:
    clock.sql("insert into orders select generate_series(1000, 21999)", "update orders set n = n + 1")
    assert clock.value("select count(*) from anton.job") == 22
    assert clock.due() == []
    clock.tick()
    clock.tick()
    clock.sql("select anton.promote()")
    assert clock.sql("select count(*), sum(hi - lo + 1) from anton.job where handler_id > 0") == [(5, 5000)]
    assert len(clock.due()) == 21000 + KEYS and clock.value("select count(*) from anton.debounce") == 0


def test_a_change_whose_filter_failed_is_looked_at_before_it_waits(clock: Clock) -> None:
    clock.h = clock.listen("orders", "updated", name="h", debounce="2 s", where_sql="10 / n > 1")
    clock.sql("update orders set n = 4 where id in (1, 2)", "update orders set n = case id when 1 then 0 else 100 end")
    clock.sql("update orders set n = 5 where id = 1")
    clock.tick()
    clock.tick()
    assert clock.due() == [1, 2]


def test_a_delayed_change_of_a_handler_that_debounces_is_listed_and_can_be_cancelled(clock: Clock) -> None:
    with clock.conn.transaction():
        clock.sql("select anton.put_due('2 s', null)", "update orders set n = 7 where id = 1")
    ((job, name, state),) = clock.sql("select id, handler, state from anton.list_jobs('h')")
    assert (name, state, clock.value("select anton.cancel(%s)", job)) == ("h", "delayed", True)
    assert clock.value("select count(*) from anton.list_jobs()") == 0


def test_a_handler_that_debounces_no_more_gets_what_waited(clock: Clock) -> None:
    clock.touch(1)
    assert clock.due() == []
    clock.touch(2)
    clock.listen("orders", "updated", name="h")
    clock.touch(3)
    assert clock.due() == [2, 3]
    clock.tick()
    clock.tick()
    assert clock.due() == [1]


def test_a_row_that_was_kept_whole_since_its_table_changed_is_due_in_its_time(clock: Clock) -> None:
    clock.h = clock.listen("orders", "new", name="new", read="change")
    with clock.conn.transaction():
        clock.sql("alter table orders add column more text", "select anton.put_due('2 s', null)",
                  "insert into orders values (9)")
    clock.sql("select anton.mend()")
    assert clock.due() == []
    clock.tick()
    clock.tick()
    assert clock.due() == [9]
