"""Reconcile: new records that fired no trigger are found and queued once; what cannot be found is said.

And mend(): what a trigger kept whole, because the table was altered under it, is captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from pg import Pg


@pytest.fixture
def orders(pg: Pg) -> Pg:
    pg.sql("create table orders (id bigint generated always as identity primary key, n int)")
    return pg


@pytest.fixture
def notes(pg: Pg) -> Pg:
    """A table whose keys do not tell what is new, but its stamp does."""
    pg.sql("create table notes (id text primary key, created_at timestamptz not null default clock_timestamp())")
    return pg


def reconcile(pg: Pg, table: str, fix: bool = True) -> tuple[int, str, str]:
    """found, can, cannot"""
    [row] = pg.sql("select found, can, cannot from anton.reconcile(%s, %s)", args=(table, fix))
    return row


def unseen(pg: Pg, *statements: str) -> None:
    """Runs them as logical replication or a restore would: no trigger fires."""
    pg.sql("set session_replication_role = replica", *statements, "reset session_replication_role")


# What is found


def test_records_written_while_triggers_were_disabled_are_found_once(orders: Pg) -> None:
    h, other = orders.listen("orders", "new"), orders.listen("orders", "new", where_sql="n > 1")
    orders.sql(
        "insert into orders (n) values (1)",
        "alter table orders disable trigger user",
        "insert into orders (n) values (1), (2)",
        "alter table orders enable trigger user",
        "insert into orders (n) values (3)",
    )
    assert reconcile(orders, "orders")[0] == 3
    assert sorted(orders.keys(h)) == [1, 2, 3, 4] and sorted(orders.keys(other)) == [3, 4]
    assert reconcile(orders, "orders")[0] == 0


def test_records_written_as_a_replica_are_found(orders: Pg, notes: Pg) -> None:
    h, k = orders.listen("orders", "new"), notes.listen("notes", "new")
    unseen(orders, "insert into orders (n) select g from generate_series(1, 2500) g", "insert into notes values ('a')")
    assert reconcile(orders, "orders")[0] == 2500 and reconcile(orders, "notes")[0] == 1
    assert orders.keys(h) == list(range(1, 2501)) and orders.keys(k) == [("a",)]


def test_direct_writes_to_new_partitions_are_found_and_those_to_old_ones_are_not_doubled(pg: Pg) -> None:
    pg.sql(
        "create table p (id bigint primary key) partition by range (id)",
        "create table p1 partition of p for values from (0) to (100)",
    )
    h = pg.listen("p", "new")
    pg.sql(
        "create table p2 partition of p for values from (100) to (200)",
        "create table p3 (id bigint primary key)",
        "insert into p3 values (200)",  # made elsewhere and attached full
        "insert into p1 values (1)",
        "insert into p2 values (101), (102)",
        "insert into p values (103)",
        "alter table p attach partition p3 for values from (200) to (300)",
    )
    assert reconcile(pg, "p")[0] == 3
    assert sorted(pg.keys(h)) == [1, 101, 102, 103, 200]
    pg.sql("insert into p2 values (104)", "insert into p3 values (201)")
    assert pg.keys(h) == [104, 201]  # the new partitions have their triggers now
    assert reconcile(pg, "p")[0] == 0


def test_what_is_only_looked_for_is_not_queued(orders: Pg) -> None:
    h = orders.listen("orders", "new")
    unseen(orders, "insert into orders (n) values (1)")
    assert reconcile(orders, "orders", fix=False)[0] == 1
    assert orders.keys(h) == []
    assert reconcile(orders, "orders")[0] == 1


def test_a_filter_that_names_the_row_before_takes_what_is_new_when_it_is_found_or_fed(orders: Pg) -> None:
    orders.sql("insert into orders (n) values (0), (1)")
    h = orders.listen("orders", "new", "updated", where_sql="old.n is distinct from n and n > 0")
    unseen(orders, "insert into orders (n) values (0), (1), (null)")
    assert reconcile(orders, "orders")[0] == 1 and orders.keys(h) == [4]
    orders.sql(f"select anton.backfill(name) from anton.handler where id = {h}")
    assert orders.value("select anton.feed(%s)", h) == 1 and orders.keys(h) == [2]


# What is left alone


def test_records_older_than_the_handler_are_not_new(orders: Pg, notes: Pg) -> None:
    orders.sql("insert into orders (n) values (1)", "insert into notes values ('a')")
    handlers = orders.listen("orders", "new"), orders.listen("notes", "new")
    orders.sql("update orders set n = 2", "update notes set id = id")
    assert reconcile(orders, "orders")[0] == 0 and reconcile(orders, "notes")[0] == 0
    assert [orders.keys(h) for h in handlers] == [[], []]


def test_truncated_and_deleted_records_are_not_looked_for(orders: Pg) -> None:
    h = orders.listen("orders", "new")
    unseen(orders, "insert into orders (n) values (1), (2)", "delete from orders where id = 1", "truncate orders")
    assert reconcile(orders, "orders")[0] == 0
    orders.sql("truncate orders restart identity", "insert into orders (n) values (3)")
    assert reconcile(orders, "orders")[0] == 0 and orders.keys(h) == [1]


def waits(pg: Pg, token: int, id: int) -> None:
    pg.sql(f"select anton.give_back({token}, array[{id}::bigint])")


def leased(pg: Pg, token: int, id: int) -> None:
    pass


def delayed(pg: Pg, token: int, id: int) -> None:
    pg.sql(f"select anton.retry({token}, {id}, array[1, 2], '1 h', 'x', true)")


def settled(pg: Pg, token: int, id: int) -> None:
    pg.ack(token, id)


def settled_in_part(pg: Pg, token: int, id: int) -> None:
    pg.sql(f"select anton.ack_part({token}, {id}, array[2], 1, 0)")


def dead(pg: Pg, token: int, id: int) -> None:
    pg.sql(f"select anton.bury({token}, {id}, 1, 'failed', 'x', null)")
    pg.ack(token, id)


def dropped(pg: Pg, token: int, id: int) -> None:
    dead(pg, token, id)
    pg.sql("select anton.drop_dead(id) from anton.dead")


def cancelled(pg: Pg, token: int, id: int) -> None:
    waits(pg, token, id)
    pg.sql("select anton.cancel(id) from anton.job")


@pytest.mark.parametrize("fate", [waits, leased, delayed, settled, settled_in_part, dead, dropped, cancelled])
@pytest.mark.parametrize("records", [2, 30])
@pytest.mark.parametrize("table", ["orders", "notes"])
def test_a_record_that_was_given_to_its_handler_is_not_given_again(
    orders: Pg, notes: Pg, table: str, records: int, fate: Callable[[Pg, int, int], None]
) -> None:
    h = orders.listen(table, "new")
    column = "n" if table == "orders" else "id"
    orders.sql(f"insert into {table} ({column}) select g from generate_series(1, {records}) g")
    token, [job] = orders.claim(h)
    fate(orders, token, job.id)
    assert reconcile(orders, table)[0] == 0


# At once


def test_two_at_once_queue_what_was_missed_once(orders: Pg) -> None:
    h = orders.listen("orders", "new")
    unseen(orders, "insert into orders (n) values (1), (2)")
    found: list[int] = []
    with orders.other() as second:
        orders.sql("begin")
        found.append(reconcile(orders, "orders")[0])
        thread = threading.Thread(target=lambda: found.append(reconcile(second, "orders")[0]))
        thread.start()
        with orders.other() as watcher:
            while not watcher.value("select count(*) from pg_locks where locktype = 'advisory' and not granted"):
                pass
        orders.sql("commit")
        thread.join()
    assert found == [2, 0] and orders.keys(h) == [1, 2]


def test_what_it_queues_beside_a_running_backfill_is_not_fed_again(notes: Pg) -> None:
    h = notes.listen("notes", "new", name="h")
    unseen(notes, "insert into notes select 'a' || g from generate_series(1, 5) g")
    notes.sql("select anton.backfill('h')", "insert into notes values ('b')")
    assert notes.value(f"select anton.feed({h}, 2)") == 2
    unseen(notes, "insert into notes values ('c')")
    assert reconcile(notes, "notes")[0] == 4  # three not fed yet, and the one that nobody saw
    while notes.value(f"select anton.feed({h}, 2)") is not None:
        pass
    assert sorted(notes.keys(h)) == [(key,) for key in ("a1", "a2", "a3", "a4", "a5", "b", "c")]
    assert reconcile(notes, "notes")[0] == 0


def test_a_backfill_waits_for_it(notes: Pg) -> None:
    h = notes.listen("notes", "new", name="h")
    unseen(notes, "insert into notes values ('a')")
    with notes.other(lock_timeout="50ms") as second:
        notes.sql("begin")
        assert reconcile(notes, "notes")[0] == 1
        with pytest.raises(psycopg.errors.LockNotAvailable):
            second.sql("select anton.backfill('h')")
        notes.sql("commit")
        second.sql("select anton.backfill('h')")
        assert second.value(f"select anton.feed({h})") == 0
    assert notes.keys(h) == [("a",)]


# What it says


@pytest.mark.parametrize(("columns", "can", "cannot"), [
    ("id bigint primary key", "new records", "a id that is not above those the handler began with"),
    ("id text primary key, at timestamptz not null default now()", "new records", "whose at was set to before"),
    ("id text primary key, at timestamptz default now()", "nothing", "give it a column: created_at"),
    ("id text", "nothing", "the table has no key"),
])  # fmt: skip
def test_it_says_what_it_can_and_cannot_find(pg: Pg, columns: str, can: str, cannot: str) -> None:
    pg.sql(f"create table t ({columns})")
    pg.listen("t", "new")
    found, said, not_found = reconcile(pg, "t")
    assert (found, said) == (0, can) and cannot in not_found
    assert "updates, and deletes" in not_found


def test_it_says_that_triggers_are_disabled_and_that_filters_may_have_changed_their_mind(orders: Pg) -> None:
    orders.listen("orders", "new", name="big", where_sql="n > 1")
    orders.sql("alter table orders disable trigger user")
    cannot = reconcile(orders, "orders")[2]
    assert "triggers are disabled" in cannot and "handler big: a record that failed its filter" in cannot


def test_a_table_that_is_not_watched_is_an_error(orders: Pg) -> None:
    with pytest.raises(psycopg.Error, match='table "orders" is not watched') as caught:
        reconcile(orders, "orders")
    assert caught.value.sqlstate == "NT002"


# mend


def test_a_mend_leaves_the_callers_own_tables_alone(orders: Pg) -> None:
    h = orders.listen("orders", "updated")
    orders.sql("insert into orders (n) values (1)", "alter table orders add m int", "update orders set m = 5")
    orders.sql(
        "create temp table new_records as select 'mine' as x", "create temp table old_records as select 'too' as y"
    )
    assert orders.value("select anton.mend()") > 0
    assert orders.sql("select x, y from new_records, old_records") == [("mine", "too")]
    [event] = orders.events(h)
    assert event.new == {"id": 1, "n": 1, "m": 5}


def test_a_change_that_was_kept_whole_is_captured_once_by_two_mends(orders: Pg) -> None:
    h = orders.listen("orders", "updated")
    orders.sql("insert into orders (n) values (1)", "alter table orders add m int", "update orders set m = 5")
    with orders.other() as second:
        orders.sql("begin")
        assert orders.value("select anton.mend()") > 0
        assert second.value("select anton.mend()") == 0
        orders.sql("commit")
        assert second.value("select anton.mend()") == 0
    assert orders.keys(h) == [1]


def sql_handler(pg: Pg, **options: Any) -> int:
    pg.sql("create table seen (id bigint, n int)")
    return pg.listen("orders", "new", kind="sql", body="insert into seen select id, n from new_records", **options)


def test_a_degraded_job_in_the_batch_leaves_the_others_their_records_as_committed(orders: Pg) -> None:
    h = sql_handler(orders, where_sql="10 / n > 0")
    orders.sql(
        "insert into orders (n) values (1)",
        "insert into orders (n) values (0)",  # the filter fails: keys alone
        "insert into orders (n) values (2)",
        "update orders set n = 9 where id = 1",
        "delete from orders where id = 3",
    )
    token, jobs = orders.claim(h)
    assert [bool(job.degraded) for job in jobs] == [False, True, False]
    orders.sql("select anton.run_sql(%s, %s::bigint[], 1)", args=(token, [job.id for job in jobs]))
    assert orders.sql("select id, n from seen order by id") == [(1, 1), (2, 0), (3, 2)]
