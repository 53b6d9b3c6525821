"""DDL under Anton: writes go on, nothing is swallowed, and mend() catches up with what the table has become."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest
from pg import Event, Pg


@pytest.fixture
def t(pg: Pg) -> Pg:
    pg.sql("create table t (id int primary key, a text, b text)")
    return pg


def waiting(pg: Pg) -> int:
    """Changes that were kept whole and wait for mend()."""
    return int(pg.value("select count(*) from anton.job where handler_id = 0"))


CHANGES = {
    "add a column": "alter table t add c int default 7",
    "drop a watched column": "alter table t drop a",
    "drop another column": "alter table t drop b",
    "rename a watched column": "alter table t rename a to a2",
    "rename another column": "alter table t rename b to b2",
    "rename the key": "alter table t rename id to key",
    "rename the table": "alter table t rename to t2",
    "another type for a watched column": "alter table t alter a type jsonb using to_jsonb(a)",
    "no equality for a watched column": "alter table t alter a type json using to_json(a)",
    "another type for another column": "alter table t alter b type bytea using b::bytea",
    "another type for the key": "alter table t alter id type bigint",
    "a text for the key": "alter table t alter id type text",
    "a uuid for the key": "alter table t alter id type uuid using lpad(to_hex(id), 32, '0')::uuid",
    "another key": "alter table t drop constraint t_pkey, add column k serial primary key",
}


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize("what", CHANGES)
def test_after_any_change_of_the_table_writes_succeed_and_every_record_arrives(
    t: Pg, what: str, filtered: bool
) -> None:
    options: dict[str, Any] = {"where_sql": "a is not null", "columns": ["a"]} if filtered else {}
    new = t.listen("t", "new")
    every = t.listen("t", "new", "updated", "deleted", **options)
    t.sql("insert into t select g, 'x', 'y' from generate_series(1, 60) g")
    assert len(t.events(new)) == len(t.events(every)) == 60

    t.sql(CHANGES[what])
    write(t, 61, 61)  # what the job itself would hold
    write(t, 62, 90)  # and what would be in a change
    t.sql("select anton.mend()")
    assert waiting(t) == 0 and t.value("select count(*) from anton.change where op = 'x'") == 0
    found = t.events(every)
    assert {op: len({str(event.key) for event in found if event.op == op}) for op in "nud"} == dict.fromkeys("nud", 30)
    assert len(found) == 90 and len(t.keys(new)) == 30
    assert all(event.new or event.degraded for event in found if event.op == "n")
    assert filtered or not any(event.degraded for event in found)  # images were kept, but for a filter that is gone

    write(t, 91, 120)  # and now as if nothing had happened
    assert waiting(t) == 0
    assert sorted(event.op for event in t.events(every)) == ["d"] * 30 + ["n"] * 30


def write(t: Pg, first: int, last: int) -> None:
    """Inserts rows first to last, updates those of 60 before and deletes those of 30 before, whatever t is by now."""
    table = t.value("select relname from pg_class where relname in ('t', 't2') and relkind = 'r'")
    columns = dict(
        t.sql(
            "select attname, format_type(atttypid, -1) from pg_attribute "
            "where attrelid = %s::regclass and attnum > 0 and not attisdropped",
            args=(table,),
        )
    )
    key = next(name for name in ("id", "key") if name in columns)
    a = next(name for name in ("a", "a2", "b") if name in columns)
    cast = {"uuid": "lpad(to_hex(g), 32, '0')::uuid", "text": "g::text"}.get(columns[key], "g")
    some = {"json": "'\"new\"'", "jsonb": "'\"new\"'"}.get(columns[a], "'new'")

    def rows(before: int) -> str:
        return f"select {cast} from generate_series({first - before}, {last - before}) g"

    t.sql(
        f"insert into {table} ({key}, {a}) {rows(0).replace(' from', f', {some} from')}",
        f"update {table} set {a} = {some} where {key} in ({rows(60)})",
        f"delete from {table} where {key} in ({rows(30)})",
    )


def test_a_column_added_since_is_in_the_image_that_mend_makes(t: Pg) -> None:
    h = t.listen("t", "updated")
    t.sql("insert into t values (1, 'x', 'y')", "alter table t add c int", "update t set c = 5")
    assert t.events(h) == []
    assert t.value("select anton.mend()") == 2  # its triggers, and the change
    assert t.events(h) == [
        Event("u", 1, {"id": 1, "a": "x", "b": "y", "c": None}, {"id": 1, "a": "x", "b": "y", "c": 5})
    ]
    t.sql("update t set c = 6")
    assert t.events(h) == [Event("u", 1, {"id": 1, "a": "x", "b": "y", "c": 5}, {"id": 1, "a": "x", "b": "y", "c": 6})]


def test_what_a_worker_sees_when_it_looks_is_mended_by_then(t: Pg) -> None:
    h = t.listen("t", "new")
    t.sql("alter table t rename id to key", "insert into t values (1, 'x', 'y')")
    assert waiting(t) == 1
    assert t.value("select ready from anton.poll(1, array[%s])", h) == [h]
    assert t.keys(h) == [1]


def test_a_mended_change_keeps_its_time_cause_and_tenant_and_no_op_updates_are_dropped(t: Pg) -> None:
    h = t.listen("t", "updated", columns=["a"])
    t.sql(
        "insert into t values (1, 'x', 'y'), (2, 'x', 'y')",
        "alter table t rename a to c",
        "begin",
        "select anton.enter(9, 2, 5, 'acme')",
        "update t set c = case id when 1 then 'z' else c end",
        "commit",
    )
    at = t.value("select at from anton.change where op = 'x'")
    t.sql("update anton.handler set columns = '{c}'", "select anton.mend()")
    _, (job,) = t.claim(h)
    assert (job.at, job.cause, job.depth, job.trace, job.tenant, job.ids) == (at, 9, 2, 5, "acme", [1])


def test_a_change_that_cannot_be_mended_waits_and_says_why(t: Pg) -> None:
    h = t.listen("t", "new")
    t.sql(
        "create domain public.short as text",
        "alter table t rename id to key",
        "alter table t add c public.short",
        "insert into t values (1, 'x', 'y', 'long')",
        "alter domain public.short add constraint is_short check (length(value) < 3) not valid",
        "select anton.mend()",
    )
    assert t.sql("select handler_id, error, run_at > now() from anton.delayed") == [
        (0, 'value for domain public.short violates check constraint "is_short"', True)
    ]
    t.sql("alter domain public.short drop constraint is_short", "update anton.delayed set run_at = now()")
    t.sql("select anton.promote()", "select anton.mend()")
    assert t.keys(h) == [1]


def test_a_renamed_table_is_followed(t: Pg) -> None:
    h = t.listen("t", "new", "updated", where_sql="a = 'x'")
    t.sql(
        "create schema shop",
        "alter table t rename to orders",
        "alter table orders set schema shop",
        "insert into shop.orders values (1, 'x', 'y')",
    )
    t.sql("select anton.mend()")
    assert t.sql("select schema_name, table_name from anton.watched") == [("shop", "orders")]
    t.sql("update shop.orders set b = 'z'")
    assert [(event.op, event.key) for event in t.events(h)] == [("n", 1), ("u", 1)]
    fetch = t.value("select fetch_sql from anton.watched")
    assert fetch.endswith("from shop.orders t where t.id = any ((select $1::bigint[])::bigint[])")


def test_a_table_that_was_swapped_for_another_is_watched_and_the_old_one_is_not(t: Pg) -> None:
    """As dbt does: build beside, rename twice."""
    h = t.listen("t", "new")
    t.sql(
        "create table t_next (like t including all)",
        "begin",
        "alter table t rename to t_old",
        "alter table t_next rename to t",
        "commit",
    )
    assert t.value("select anton.mend()") == 1
    t.sql("insert into t_old values (1, 'x', 'y')", "insert into t values (2, 'x', 'y')")
    assert t.keys(h) == [2]


def test_a_dropped_table_hurts_nobody(t: Pg) -> None:
    t.listen("t", "new")
    t.sql("create table u (id int primary key)")
    u = t.listen("u", "new")
    t.sql("drop table t", "alter table u rename id to key", "insert into u values (1)", "select anton.mend()")
    assert t.keys(u) == [1]


def test_a_filter_whose_function_is_gone_is_captured_whole_and_then_by_key(t: Pg) -> None:
    t.sql("create function public.ok(text) returns boolean language sql immutable as 'select true'")
    h = t.listen("t", "new", where_sql="public.ok(a)")
    t.sql("drop function public.ok", "insert into t values (1, 'x', 'y')", "select anton.mend()")
    (event,) = t.events(h)
    assert event.key == 1 and "public.ok(text) does not exist" in str(event.degraded)


def test_mend_leaves_alone_what_is_in_order(t: Pg) -> None:
    t.listen("t", "new", "updated", "truncate")
    before = t.sql(
        "select oid, xmin::text from pg_proc where pronamespace = 'anton'::regnamespace and proname ~ '^t[0-9]'"
    )
    assert t.value("select anton.mend()") == 0
    assert (
        t.sql("select oid, xmin::text from pg_proc where pronamespace = 'anton'::regnamespace and proname ~ '^t[0-9]'")
        == before
    )


def test_a_dropped_trigger_comes_back(t: Pg) -> None:
    h = t.listen("t", "new", "updated")
    t.sql("drop trigger anton_new on t", "select anton.mend()", "insert into t values (1, 'x', 'y')")
    assert t.keys(h) == [1]


def test_mend_gives_up_on_a_table_in_use_and_goes_on_with_the_others(t: Pg) -> None:
    t.listen("t", "new")
    t.sql("create table u (id int primary key)")
    u = t.listen("u", "new")
    with t.other() as writer:
        writer.sql("begin", "insert into t values (1, 'x', 'y')")
        t.sql("alter table u rename id to key", "set client_min_messages = error")
        t.sql("update anton.watched set key_columns = '{a}'")  # so that its row trigger has to be made anew
        assert t.value("select anton.mend()") == 1
        writer.sql("commit")
    t.sql("insert into u values (1)")
    assert t.keys(u) == [1]


def test_nothing_is_lost_while_columns_come_and_go_under_load(t: Pg) -> None:
    new, every = t.listen("t", "new"), t.listen("t", "new", "updated", "deleted")
    failed: list[psycopg.Error] = []
    stop = threading.Event()

    def write(offset: int) -> None:
        with t.other() as writer:
            id = offset
            while not stop.is_set():
                try:
                    writer.sql(f"insert into t values ({id}), ({id + 1})", f"update t set id = id where id = {id}")
                    writer.sql(
                        f"insert into t select {id + 2} + g from generate_series(0, 19) g",
                        f"delete from t where id = {id + 1}",
                    )
                except psycopg.Error as error:
                    failed.append(error)
                    return
                id += 22

    writers = [threading.Thread(target=write, args=(offset,)) for offset in (0, 10_000_000)]
    for writer in writers:
        writer.start()
    for turn in range(6):
        t.sql(
            f"alter table t add c{turn} int default {turn}",
            "alter table t rename b to bb",
            "alter table t alter bb type varchar(99)",
            "select anton.mend()",
            f"alter table t drop c{turn}",
            "alter table t rename bb to b",
            "alter table t alter b type text",
        )
    stop.set()
    for writer in writers:
        writer.join()
    assert not failed
    while t.value("select anton.mend()"):
        pass
    rows = {key for (key,) in t.sql("select id from t")}
    found = t.events(every)
    inserted = [event.key for event in found if event.op == "n"]
    deleted = {event.key for event in found if event.op == "d"}
    assert len(inserted) == len(set(inserted)) and set(inserted) - deleted == rows
    assert sorted(t.keys(new)) == sorted(inserted)
