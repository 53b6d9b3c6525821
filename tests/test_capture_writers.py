"""Writers: nobody's write fails because Anton listens, and nothing that was rolled back leaves a trace."""

from __future__ import annotations

import psycopg
import pytest
from pg import Pg

# Called by whom dbt logs in as, who has no right in the runtime: each looks whether he owns the table.
FOR_DBT = ("dbt_known", "dbt_built", "dbt_follow", "dbt_attach", "dbt_collect", "dbt_close", "dbt_speak")
IN_CHECKS = ("within",)  # of Tables, so called by whoever writes to them; it looks at its arguments alone


@pytest.fixture
def orders(pg: Pg) -> Pg:
    pg.sql("create table orders (id bigint generated always as identity primary key, n int, s text)")
    return pg


def left(pg: Pg) -> int:
    """Rows that capture has left."""
    return int(pg.value("select (select count(*) from anton.job) + (select count(*) from anton.change)"))


def test_a_rolled_back_writer_leaves_nothing(orders: Pg) -> None:
    h = orders.listen("orders", "new", "updated", "deleted", "truncate")
    orders.sql(
        "begin",
        "insert into orders (n) select 1 from generate_series(1, 50)",
        "update orders set n = 2",
        "delete from orders",
        "truncate orders",
        "rollback",
    )
    assert left(orders) == 0
    orders.sql(
        "begin",
        "insert into orders (n) values (1)",
        "savepoint a",
        "insert into orders (n) values (2)",
        "rollback to a",
        "insert into orders (n) values (3)",
        "release a",
        "commit",
    )
    assert len(orders.keys(h)) == 2
    before = left(orders)
    orders.sql("do $$ begin insert into orders (n) values (9); raise 'no'; exception when others then null; end $$")
    assert left(orders) == before


def test_a_truncate_that_was_rolled_back_to_a_savepoint_does_not_hide_the_next(orders: Pg) -> None:
    h = orders.listen("orders", "truncate")
    orders.sql("begin; savepoint a; truncate orders; rollback to a; truncate orders; commit")
    assert len(orders.events(h)) == 1


def test_a_two_phase_writer_is_captured_when_it_commits(orders: Pg) -> None:
    h = orders.listen("orders", "new", "updated", "truncate")
    if orders.value("show max_prepared_transactions") == "0":
        assert orders.value("select enabled from anton.doorbell()")
        return  # this server cannot; the system's can
    assert not orders.value("select enabled from anton.doorbell()")
    orders.sql(
        "begin",
        "insert into orders (n) select 1 from generate_series(1, 20)",
        "update orders set n = 2 where id = 1",
        "truncate orders",
        "prepare transaction 'one'",
    )
    assert left(orders) == 0
    orders.sql("commit prepared 'one'")
    assert len(orders.events(h)) == 22
    before = left(orders)
    orders.sql("begin", "insert into orders (n) values (1)", "prepare transaction 'two'", "rollback prepared 'two'")
    assert left(orders) == before


def test_a_writers_temporary_tables_and_functions_named_like_ours_are_not_ours(orders: Pg) -> None:
    h = orders.listen("orders", "new", "updated", "deleted", where_sql="n > 0")
    orders.sql("select anton.backfill((select name from anton.handler))")
    with orders.other() as writer:
        for name in (
            "job",
            "change",
            "handler",
            "change_seq",
            "new_records",
            "old_records",
            "fed",
            "setting",
            "pg_class",
        ):
            writer.sql(f"create temp table {name} (id int)")
        for name in ("now", "slot", "ring", "doorbell", "nextval"):
            writer.sql(f"create function pg_temp.{name}() returns int language plpgsql as 'begin raise ''mine''; end'")
        writer.sql(
            "create schema mine",
            "create table mine.job (id int)",
            "create function mine.now() returns text language sql as 'select 1::text'",
        )
        writer.sql(
            "set search_path = pg_temp, mine, public, pg_catalog",
            "insert into public.orders (n) select 1 from generate_series(1, 20)",
            "insert into public.orders (n) values (5)",
            "update public.orders set n = 2",
            "delete from public.orders",
        )
    assert len(orders.events(h)) == 63
    assert {event.degraded for event in orders.events(h)} <= {None}


def test_a_role_that_may_only_insert_writes_and_is_captured(orders: Pg) -> None:
    orders.sql("drop role if exists only_writer", "create role only_writer", "grant insert on orders to only_writer")
    h = orders.listen("orders", "new", "updated", where_sql="n > 0", read="change")
    try:
        with orders.other() as writer:
            writer.sql(
                "set role only_writer",
                "insert into orders (n) values (1)",
                "insert into orders (n) select 1 from generate_series(1, 20)",
            )
            for statement in (
                "select * from anton.job",
                "select anton.claim(1, 1, '{1}', '{1}', '{1}', '{0}', '1 s')",
                "select * from orders",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    writer.sql(statement)
        assert len(orders.events(h)) == 21
    finally:
        orders.sql("drop owned by only_writer", "drop role only_writer")


def test_row_security_hides_nothing_from_capture(orders: Pg) -> None:
    orders.sql(
        "drop role if exists tenant_a",
        "create role tenant_a",
        "grant insert, select, update on orders to tenant_a",
        "alter table orders enable row level security",
        "create policy own on orders using (n = 1) with check (true)",
    )
    h = orders.listen("orders", "new", "updated")
    try:
        with orders.other() as writer:
            writer.sql("set role tenant_a", "insert into orders (n) values (1), (2)", "update orders set s = 'x'")
        assert sorted((event.op, event.key) for event in orders.events(h)) == [("n", 1), ("n", 2), ("u", 1)]
    finally:
        orders.sql("drop owned by tenant_a", "drop role tenant_a")


def test_read_only_replicas_and_bad_settings_of_the_writer_do_not_matter(orders: Pg) -> None:
    h = orders.listen("orders", "new", "updated")
    with orders.other() as writer:
        writer.sql(
            "set work_mem = '64kB'",
            "set enable_hashjoin = off",
            "set enable_seqscan = off",
            "set plan_cache_mode = force_generic_plan",
            "set statement_timeout = '20s'",
            "set default_transaction_isolation = 'serializable'",
            "set row_security = off",
            "set check_function_bodies = off",
            "set transform_null_equals = on",
            "set backslash_quote = on",
        )
        writer.sql("insert into orders (n) select 1 from generate_series(1, 3000)", "update orders set n = 2")
        assert writer.value("show work_mem") == "64kB"
        writer.sql("begin", "insert into orders (n) select 1 from generate_series(1, 3000)")
        assert writer.value("show work_mem") == "64kB"
        writer.sql("commit")
    assert len(orders.events(h)) == 9000


def test_a_writer_never_waits_for_a_claim(orders: Pg) -> None:
    h = orders.listen("orders", "new")
    orders.sql("insert into orders (n) values (1)", "begin")
    orders.claim(h)
    with orders.other(lock_timeout="50ms") as writer:
        writer.sql("insert into orders (n) values (2)", "insert into orders (n) select 1 from generate_series(1, 20)")
    orders.sql("commit")
    assert len(orders.keys(h)) == 21


# Partitions


def partitions(pg: Pg, *numbers: int) -> None:
    for number in numbers:
        pg.sql(f"create table p{number} partition of p for values from ({number * 100}) to ({number * 100 + 100})")


def test_writes_aimed_at_a_partition_are_seen_once(pg: Pg) -> None:
    pg.sql("create table p (id int primary key, n int) partition by range (id)")
    partitions(pg, 0, 1)
    h = pg.listen("p", "new", "updated", "deleted")
    pg.sql(
        "insert into p values (1, 1), (101, 1)",
        "insert into p0 values (2, 1)",
        "update p1 set n = 2",
        "update p set n = 3 where id = 1",
        "delete from p0 where id = 2",
        "update p0 set id = 5 where id = 1",
    )
    assert [(event.op, event.key) for event in pg.events(h)] == [
        ("n", 1),
        ("n", 101),
        ("n", 2),
        ("u", 101),
        ("u", 1),
        ("d", 2),
        ("d", 1),
        ("n", 5),
    ]


def test_a_new_partition_is_seen_through_its_parent_at_once_and_directly_after_mend(pg: Pg) -> None:
    pg.sql("create table p (id int primary key, n int) partition by range (id)")
    partitions(pg, 0)
    h = pg.listen("p", "new", "updated", "deleted")
    partitions(pg, 1)
    pg.sql(
        "create table p2 (n int, gone int, id int primary key)",
        "alter table p2 drop gone",
        "alter table p attach partition p2 for values from (200) to (300)",
    )
    pg.sql("insert into p values (101, 1), (201, 1)", "insert into p1 values (102, 1)")
    assert pg.keys(h) == [101, 201]
    assert pg.value("select anton.mend()") == 1
    pg.sql(
        "insert into p1 values (103, 1)",
        "insert into p2 (id, n) values (203, 1)",
        "update p2 set n = 2",
        "update p set n = 4 where id = 203",
    )
    found = pg.events(h)
    assert [(event.op, event.key) for event in found] == [("n", 103), ("n", 203), ("u", 201), ("u", 203), ("u", 203)]
    assert found[-1].old == {"id": 203, "n": 2} and {event.degraded for event in found} == {None}
    assert pg.value("select anton.mend()") == 0


def test_a_detached_partition_is_not_listened_to_any_more(pg: Pg) -> None:
    pg.sql("create table p (id int primary key, n int) partition by range (id)")
    partitions(pg, 0, 1)
    h = pg.listen("p", "new")
    pg.sql(
        "alter table p detach partition p1",
        "select anton.mend()",
        "insert into p1 values (101, 1)",
        "insert into p values (1, 1)",
    )
    assert pg.keys(h) == [1]


def test_subpartitions_are_watched(pg: Pg) -> None:
    pg.sql(
        "create table p (id int, d int, primary key (id, d)) partition by range (id)",
        "create table p0 partition of p for values from (0) to (100) partition by list (d)",
        "create table p00 partition of p0 for values in (0)",
        "create table p01 partition of p0 for values in (1)",
    )
    h = pg.listen("p", "new", "updated", "deleted")
    pg.sql(
        "insert into p00 values (1, 0)",
        "insert into p0 values (2, 0)",
        "update p0 set d = 1 where id = 1",
        "delete from p01",
    )
    assert [(event.op, event.key) for event in pg.events(h)] == [
        ("n", (1, 0)),
        ("n", (2, 0)),
        ("d", (1, 0)),
        ("n", (1, 1)),
        ("d", (1, 1)),
    ]


# Rights


def test_what_runs_with_its_owners_rights_has_a_fixed_path_and_is_nobody_elses(orders: Pg) -> None:
    h = orders.listen("orders", "new", "updated", "deleted", "truncate", where_sql="n > 0")
    orders.sql(
        "insert into orders (n) values (1)",
        "update orders set n = 2",
        "alter table orders alter id set generated by default",
        "update orders set id = 2",
        "delete from orders",
        "truncate orders",
    )
    assert [event.op for event in orders.events(h)] == ["n", "u", "d", "n", "d", "t"]
    definers = orders.sql("""
        select regexp_replace(p.proname, '^t[0-9]+_', ''), p.proconfig, r.rolname, r.rolcanlogin, r.rolsuper,
               has_function_privilege('public', p.oid, 'execute')
          from pg_proc p join pg_roles r on r.oid = p.proowner
         where p.pronamespace = 'anton'::regnamespace and p.prosecdef""")
    assert {name for name, *_ in definers} >= {"new", "updated", "deleted", "moved", "truncate"}
    for name, config, *facts in definers:
        assert [one for one in config if one.startswith("search_path")] == ["search_path=anton, pg_catalog, pg_temp"], (
            name
        )
        assert facts == ["anton_owner", False, False, name in FOR_DBT + IN_CHECKS], name


# Enabling


def test_a_handler_is_enabled_between_writers_and_says_which_it_waits_for(orders: Pg) -> None:
    first = orders.listen("orders", "new")
    with orders.other(application_name="the importer") as writer:
        writer.sql("begin", "insert into orders (n) values (1)")
        with pytest.raises(
            psycopg.errors.LockNotAvailable, match=r"being written to by pid \d+ \(the importer, since "
        ) as busy:
            orders.sql("set lock_timeout = '100ms'")
            orders.listen("orders", "new", name="second")
        assert "run it again" in (busy.value.diag.message_hint or "")
        orders.sql("reset lock_timeout")
        with writer.other(lock_timeout="1s") as another:               # who tried keeps nobody waiting
            another.sql("insert into orders (n) values (2)")
        writer.sql("commit")
    orders.sync("orders")
    second = orders.value("select id from anton.handler where name = 'second'")
    orders.sql("insert into orders (n) values (3)")
    assert sorted(orders.keys(first)) == [1, 2, 3]
    assert orders.keys(second) == [3]


def test_a_statement_that_began_before_a_handler_was_enabled_is_captured_or_was_waited_for(orders: Pg) -> None:
    """An old snapshot is no way round: what it writes after the handler is there is captured."""
    with orders.other() as old:
        old.sql("begin isolation level repeatable read", "select count(*) from orders")
        h = orders.listen("orders", "new")
        old.sql("insert into orders (n) values (1)", "commit")
    assert orders.keys(h) == [1]
