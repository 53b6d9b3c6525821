"""Real dbt on real tables: what its builds do to a table with handlers on it, and what Anton's macros make of that."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from pg import Event, Pg

from chaos.dbts import Child, Failed, Project


@pytest.fixture
def dbt(pg: Pg, dbt_child: Child, tmp_path: Path) -> Project:
    pg.sql(
        "create table src (id int primary key, name text, n numeric)",
        "insert into src select g, 'c' || g, g * 10 from generate_series(1, 5) g",
    )
    return Project(dbt_child, tmp_path / "shop", pg.url)


def register(pg: Pg, name: str, *key: str, kind: str = "model") -> None:
    pg.sql("select anton.dbt_register('shop', %s, 'public', %s, %s)", args=(f"{kind}.shop.{name}", name, list(key)))


CHANGE = ("update src set n = 0 where id = 3", "delete from src where id = 1", "insert into src values (6, 'c6', 60)")


@pytest.mark.parametrize("how", ["table", "anton_table"])
def test_what_differs_is_what_is_heard(dbt: Project, pg: Pg, how: str) -> None:
    dbt.model("daily", "select * from src", materialized=how, unique_key="id")
    register(pg, "daily", "id")
    every = pg.listen("daily", "new", "updated", "deleted", read="change")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    first = pg.value("select 'daily'::regclass::oid")
    dbt("run")
    assert pg.events(every) == []
    pg.sql(*CHANGE)
    dbt("run")
    assert {(e.op, e.key) for e in pg.events(every)} == {("d", 1), ("u", 3), ("n", 6)}
    told = [event.key for event in pg.events(rebuilt)]
    assert [(one["initial"], one["new"], one["updated"], one["deleted"]) for one in told] == [
        (True, 5, None, None),
        (False, 0, 0, 0),
        (False, 1, 1, 1),
    ]
    assert len({one["run"] for one in told}) == 3
    assert (pg.value("select 'daily'::regclass::oid") == first) == (how == "anton_table")


def test_an_incremental_model_is_netted_by_key(dbt: Project, pg: Pg) -> None:
    """delete+insert shows each record of the batch as deleted and new; of them only what differs is heard."""
    dbt.model(
        "daily",
        "select * from src {% if is_incremental() %} where id >= 2 {% endif %}",
        materialized="incremental",
        unique_key="id",
    )
    register(pg, "daily", "id")
    every = pg.listen("daily", "new", "updated", "deleted", read="change")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    dbt("run")
    assert pg.events(every) == []
    pg.sql(*CHANGE)
    dbt("run")
    assert {(e.op, e.key) for e in pg.events(every)} == {("u", 3), ("n", 6)}  # 1 is not in the batch
    dbt("run", "--full-refresh")
    assert pg.events(every) == [Event("d", 1, {"id": 1, "name": "c1", "n": 10})]
    assert [one.key["full"] for one in pg.events(rebuilt)] == [True, False, False, True]


def test_an_incremental_model_that_is_emptied_by_truncate_says_that_it_was_not_compared(dbt: Project, pg: Pg) -> None:
    dbt.model("hourly", "select * from src", materialized="incremental", unique_key="id",
              pre_hook="{% if is_incremental() %}truncate {{ this }}{% endif %}")
    register(pg, "hourly", "id")
    heard = pg.listen("hourly", "new", "updated", "deleted", read="change")
    rebuilt, failed = pg.listen("hourly", "rebuilt"), pg.listen("hourly", "failed")
    dbt("run")
    pg.events(rebuilt)
    dbt("run")
    assert pg.events(heard) == [] and pg.events(rebuilt)[0].key["changed"]
    assert "emptied by TRUNCATE" in pg.events(failed)[0].key["error"]


def test_batches_that_commit_one_by_one_lose_no_event(dbt: Project, pg: Pg) -> None:
    pg.sql(
        "alter table src add at timestamptz",
        "update src set at = timestamptz '2026-11-22 01:00Z' - (id % 2) * interval '1 day'",
    )
    dbt.model(
        "daily",
        "select * from src",
        materialized="incremental",
        incremental_strategy="microbatch",
        unique_key="id",
        event_time="at",
        begin="2026-01-01",
        batch_size="day",
        lookback=1,
    )
    register(pg, "daily", "id")
    every = pg.listen("daily", "new", "updated", "deleted", read="change")
    when = ("--event-time-start", "2026-11-21", "--event-time-end", "2026-11-23")
    dbt("run", *when)
    pg.events(every)
    pg.sql(
        "update src set n = 0 where id = 3",
        "insert into src values (7, 'c7', 70, '2026-11-21 00:00Z'), (8, 'c8', 80, '2026-11-22 00:00Z')",
    )
    dbt("run", *when)
    assert {(e.op, e.key) for e in pg.events(every)} >= {("u", 3), ("n", 7), ("n", 8)}
    assert pg.sql("select id, name, n from daily order by id") == pg.sql("select id, name, n from src order by id")


def test_an_incremental_model_may_get_a_column_while_it_is_built(dbt: Project, pg: Pg) -> None:
    dbt.model(
        "daily",
        "select id, name from src",
        materialized="incremental",
        unique_key="id",
        on_schema_change="append_new_columns",
    )
    register(pg, "daily", "id")
    every = pg.listen("daily", "new", "updated", "deleted", read="change")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    pg.sql(*CHANGE)
    dbt.model(
        "daily",
        "select id, name, n from src",
        materialized="incremental",
        unique_key="id",
        on_schema_change="append_new_columns",
    )
    dbt("run")
    assert [one.key["schema_changed"] for one in pg.events(rebuilt)] == [False, True]
    assert [(e.op, e.key) for e in pg.events(every)] == [("n", 6)]
    pg.sql("update src set n = 5 where id = 6")
    dbt("run")
    assert [(e.op, e.key, e.new["n"]) for e in pg.events(every)] == [("u", 6, 5)]


@pytest.mark.parametrize("how", ["table", "anton_table"])
def test_a_column_that_comes_is_no_update_and_what_else_differs_is(dbt: Project, pg: Pg, how: str) -> None:
    dbt.model("daily", "select id, name from src", materialized=how, unique_key="id")
    register(pg, "daily", "id")
    every = pg.listen("daily", "new", "updated", "deleted", read="change")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    pg.sql("update src set name = 'x' where id = 3", *CHANGE[1:])
    dbt.model("daily", "select id, name, n from src", materialized=how, unique_key="id")
    dbt("run")
    pg.sql("select anton.mend()")                                      # what was kept whole would be captured now
    events = pg.events(every)
    assert {(e.op, e.key, e.degraded) for e in events} == {("d", 1, None), ("u", 3, None), ("n", 6, None)}
    assert len(events) == 3
    images = {e.op: (e.old and e.old.get("n"), e.new and e.new["n"]) for e in events}
    assert images == {"d": (None, None), "u": (None, 30), "n": (None, 60)}
    told = [event.key for event in pg.events(rebuilt)][1]
    assert (told["new"], told["updated"], told["deleted"]) == (1, 1, 1)
    assert told["changed"] and told["schema_changed"]
    assert pg.sql("select id, n from daily order by id") == pg.sql("select id, n from src order by id")


def test_a_column_that_a_failed_build_left_empty_is_no_update_when_it_is_filled(dbt: Project, pg: Pg) -> None:
    pg.sql("create table ok (id int)")
    dbt.model("daily", "select id, name from src", materialized="anton_table", unique_key="id")
    register(pg, "daily", "id")
    every = pg.listen("daily", "new", "updated", "deleted", read="change")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    dbt.model(
        "daily",
        "select id, name, n / (select count(*) from ok) as n from src",
        materialized="anton_table",
        unique_key="id",
    )
    with pytest.raises(Failed, match="division by zero"):
        dbt("run")
    assert pg.value("select count(*) from daily where n is null") == 5
    pg.sql("select anton.mend()", "insert into ok values (1)")         # its triggers know the column by now
    dbt("run")
    assert pg.events(every) == []
    told = [event.key for event in pg.events(rebuilt)]
    assert [(one["updated"], one["changed"], one["schema_changed"]) for one in told] == [
        (None, True, False),
        (0, True, True),
    ]
    assert pg.sql("select id, n from daily order by id") == pg.sql("select id, n from src order by id")


def test_a_key_that_gets_a_column_makes_the_table_anew(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select id, name from src", materialized="anton_table", unique_key="id")
    dbt("run")
    first = pg.value("select 'daily'::regclass::oid")
    dbt.model("daily", "select id, name, n from src", materialized="anton_table", unique_key=["id", "n"])
    dbt("run")
    assert pg.value("select 'daily'::regclass::oid") != first
    assert pg.sql("select * from daily order by id") == pg.sql("select * from src order by id")


def test_readers_do_not_wait_while_a_new_column_is_filled(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select id, name from src", materialized="anton_table", unique_key="id")
    register(pg, "daily", "id")
    heard = pg.listen("daily", "new", "updated", read="change")
    dbt("run")
    pg.sql("create function held() returns trigger language plpgsql as "
           "$$ begin perform pg_advisory_xact_lock(4711); return null; end $$",
           "create trigger held before update on daily for each statement execute function held()")
    dbt.model("daily", "select id, name, n from src", materialized="anton_table", unique_key="id")
    table = pg.value("select 'daily'::regclass::oid")
    with pg.other(lock_timeout="5s") as reader, ThreadPoolExecutor() as pool:
        pg.sql("select pg_advisory_lock(4711)")
        building = pool.submit(dbt, "run")
        try:
            waiting = ("select exists (select from pg_locks where locktype = 'advisory' and objid = 4711 and "
                       "not granted and database = (select oid from pg_database where datname = current_database()))")
            while not reader.value(waiting):
                assert not building.done(), building.result()
            assert reader.sql("select id, name, n from daily where id = 1") == [(1, "c1", None)]
        finally:
            pg.sql("select pg_advisory_unlock(4711)")
        building.result()
    assert pg.sql("select n from daily order by id") == pg.sql("select n from src order by id")
    assert pg.value("select 'daily'::regclass::oid") == table
    pg.sql("select anton.mend()")                                      # what was kept whole would be heard now
    assert pg.events(heard) == []                                      # a column that comes is no update
    assert pg.value("select schema_changed from anton.dbt_build order by id desc limit 1")


def test_what_a_build_saw_is_known_from_its_hook_before_it_or_not_at_all(dbt: Project, pg: Pg) -> None:
    saw = "select snapshot is not null from anton.dbt_build order by id desc limit 1"
    dbt.model("daily", "select * from src", materialized="table")
    dbt("run")
    assert pg.value(saw)
    pg.sql("alter table src add at timestamptz default '2026-11-22 01:00Z'")
    dbt.model("hourly", "select * from src", materialized="incremental", incremental_strategy="microbatch",
              unique_key="id", event_time="at", begin="2026-01-01", batch_size="day", lookback=1)
    dbt("run", "--select", "hourly", "--event-time-start", "2026-11-21", "--event-time-end", "2026-11-23")
    assert not pg.value(saw)                                           # of batches, each a transaction
    text = (dbt.folder / "dbt_project.yml").read_text()
    dbt.file("dbt_project.yml", text.replace('+pre-hook: "{{ anton_before() }}"', ""))
    dbt.model("daily", "select * from src", materialized="table")
    dbt("run")
    assert not pg.value(saw)


def test_models_of_an_installed_package_are_of_the_project_that_installs_it(dbt: Project, pg: Pg) -> None:
    dbt.file("dbt_packages/lib/dbt_project.yml", 'name: lib\nversion: "1.0"\n')
    dbt.file("dbt_packages/lib/models/leaf.sql", "{{ config(materialized='table') }} select 1 as id")
    dbt.model("daily", "select * from {{ ref('leaf') }}", materialized="table")
    dbt("run")
    behind = "select * from anton.dbt_behind('shop', '{\"model.shop.daily\": [\"model.lib.leaf\"]}')"
    assert pg.sql("select project, unique_id from anton.dbt_build order by id") == [
        ("shop", "model.lib.leaf"), ("shop", "model.shop.daily")]
    assert pg.sql(behind) == []
    pg.sql("select anton.dbt_register('shop', 'model.lib.leaf', 'public', 'leaf', '{}', true)")
    dbt.file("dbt_packages/lib/models/leaf.sql", "{{ config(materialized='table') }} select 2 as id")
    dbt("run", "--select", "leaf")
    assert pg.sql(behind) == [("model.shop.daily",)]


def test_a_seed_that_is_filled_again_fires_what_differs(dbt: Project, pg: Pg) -> None:
    dbt.file("seeds/lands.csv", "code,land\nDE,Germany\nFR,France\n")
    register(pg, "lands", "code", kind="seed")
    every = pg.listen("lands", "new", "updated", "deleted", read="change")
    emptied = pg.listen("lands", "truncate")
    dbt("seed")
    dbt("seed")
    assert pg.events(every) == []
    dbt.file("seeds/lands.csv", "code,land\nDE,Deutschland\nIT,Italy\n")
    dbt("seed")
    assert {(e.op, e.key) for e in pg.events(every)} == {("u", ("DE",)), ("n", ("IT",)), ("d", ("FR",))}
    pg.sql("grant select on lands to public")
    dbt.file("seeds/lands.csv", "code,land\nDE,Deutschland\n")
    dbt("seed", "--full-refresh")
    assert [(e.op, e.key) for e in pg.events(every)] == [("d", ("IT",))]
    assert pg.events(emptied) == []
    assert pg.value("select has_table_privilege('public', 'lands', 'select')")


def test_a_snapshot_fires_its_closed_and_its_new_versions(dbt: Project, pg: Pg) -> None:
    dbt.file(
        "snapshots/history.sql",
        "{% snapshot history %}{{ config(unique_key='id', strategy='check', check_cols=['n']) }} "
        "select * from src {% endsnapshot %}",
    )
    register(pg, "history", "dbt_scd_id", kind="snapshot")
    every = pg.listen("history", "new", "updated", "deleted", read="change")
    dbt("snapshot")
    dbt("snapshot")
    assert pg.events(every) == []
    pg.sql("update src set n = 0 where id = 3")
    dbt("snapshot")
    assert [(e.op, (e.new or {})["id"], (e.new or {})["dbt_valid_to"] is None) for e in pg.events(every)] == [
        ("u", 3, False),
        ("n", 3, True),
    ]


def test_views_are_rebuilt_and_no_more(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="view")
    register(pg, "daily")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    dbt("run")
    assert [(one.key["materialized"], one.key["new"]) for one in pg.events(rebuilt)] == [("view", None)] * 2
    with pytest.raises(psycopg.Error, match="has no key"):
        pg.put("h", "daily", "new")


def test_a_materialized_view_says_whether_it_changed(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="materialized_view")
    register(pg, "daily")
    rebuilt = pg.listen("daily", "rebuilt")
    dbt("run")
    dbt("run")
    pg.sql(*CHANGE)
    dbt("run")
    assert [one.key["changed"] for one in pg.events(rebuilt)] == [True, False, True]


def test_a_rebuilt_table_keeps_what_dbt_would_drop(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="table")
    register(pg, "daily", "id")
    dbt("run")
    pg.sql(
        "create table log (n int)",
        "create function noted() returns trigger language plpgsql as "
        "$$ begin insert into log values (1); return null; end $$",
        "create trigger mine after insert on daily for each row execute function noted()",
        "alter table daily disable trigger mine",
        "alter table daily add primary key (id)",
        "create unique index on daily (lower(name))",
        "create index on daily (n) where n > 5",
        "alter table daily add check (n > -1000), alter n set default 7, set (fillfactor = 90)",
        "comment on table daily is 'of each day'; comment on column daily.n is 'a number'",
        "grant select (id, n) on daily to public",
        "create policy few on daily for select to public using (n > 20)",
        "alter table daily enable row level security, force row level security",
    )
    found = (
        "select kind, case when kind not in ('index', 'constraint') then name end, sql "
        "from anton.dbt_belongings('daily') where kind <> 'key' order by 1, 2, 3"
    )
    had = pg.sql(found)
    kinds = {"comment", "constraint", "default", "grant", "index", "policy", "setting", "trigger"}
    assert {kind for kind, _, _ in had} == kinds
    for _ in range(2):
        dbt("run")
        assert pg.sql(found) == had
        assert pg.value("select note from anton.dbt_build order by id desc limit 1") is None
        assert pg.value("select count(*) from pg_index where indrelid = 'daily'::regclass and indisunique") == 2


def test_what_a_swap_cannot_keep_is_said_by_the_build_and_by_doctor(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="table")
    register(pg, "daily", "id")
    dbt("run")
    pg.sql("create table other (id int primary key); insert into other select id from src",
           "create view outside as select * from daily",
           "alter table daily add constraint theirs foreign key (id) references other")
    problems = "select problem from anton.dbt_findings() where subject = 'public.daily'"
    assert pg.sql(problems) == []                                      # the view is kept
    dbt("run")
    ((problem,),) = pg.sql(problems)
    assert "foreign key theirs was lost" in problem
    pg.sql("create materialized view frozen as select * from daily")
    dbt("run", "--vars", "anton_enabled: false")                       # what a project without the hooks does
    pg.sql("select anton.dbt_watchdog()", "create view outside as select * from daily",
           "create materialized view frozen as select * from daily")
    said = sorted(problem.partition(" depends")[0] for (problem,) in pg.sql(problems))
    unhooked = "built without Anton's hooks: records were not compared"
    assert said == [unhooked, "materialized view public.frozen", "view public.outside"]
    dbt("run")
    pg.sql("create materialized view if not exists frozen as select * from daily")
    assert any("frozen" in problem for (problem,) in pg.sql(problems))
    assert not any("view public.outside" in problem for (problem,) in pg.sql(problems))


def test_a_swap_keeps_not_null_and_the_replica_identity(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="table")
    dbt("run")
    pg.sql("alter table daily alter id set not null, alter name set not null",
           "create unique index on daily (name, id)")
    index = pg.value("select indexrelid::regclass::text from pg_index where indrelid = 'daily'::regclass")
    pg.sql(f"alter table daily replica identity using index {index}")
    kept = ("select array_agg(attname::text order by attname) from pg_attribute "
            "where attrelid = 'daily'::regclass and attnotnull and attnum > 0")
    identity = ("select c.relreplident::text, pg_get_indexdef(i.indexrelid) like '%(name, id)' from pg_class c "
                "left join pg_index i on i.indrelid = c.oid and i.indisreplident where c.oid = 'daily'::regclass")
    for _ in range(2):
        dbt("run")
        assert pg.value(kept) == ["id", "name"] and pg.sql(identity) == [("i", True)]
    pg.sql("alter table daily replica identity nothing", "update src set name = null where id = 1")
    dbt("run")
    assert pg.value(kept) == ["id"] and pg.sql(identity) == [("n", None)]
    note = pg.value("select note from anton.dbt_build order by id desc limit 1")
    assert "constraint not null of name was lost" in note


def test_what_left_the_project_or_was_revoked_is_not_carried_over(dbt: Project, pg: Pg) -> None:
    pg.sql("do $$ begin create role reader; exception when duplicate_object then null; end $$",
           "do $$ begin create role writer; exception when duplicate_object then null; end $$")
    dbt.model("daily", "select * from src", materialized="table", indexes=[{"columns": ["name"]}],
              grants={"select": ["reader", "writer"]})
    dbt("run")
    pg.sql("create index by_hand on daily (n)", "grant insert, delete on daily to writer")
    grants = ("select x.grantee::regrole::text, x.privilege_type from pg_class c, aclexplode(c.relacl) x "
              "where c.oid = 'daily'::regclass and x.grantee <> c.relowner order by 1, 2")
    indexed = ("select array_agg(regexp_replace(pg_get_indexdef(indexrelid), '.*using btree ', '', 'i')) "
               "from pg_index where indrelid = 'daily'::regclass")
    dbt("run")
    assert sorted(pg.value(indexed)) == ["(n)", "(name)"]
    assert pg.sql(grants) == [("reader", "SELECT"), ("writer", "DELETE"), ("writer", "INSERT"), ("writer", "SELECT")]
    dbt.model("daily", "select * from src", materialized="table")      # neither grants nor indexes any more
    pg.sql("revoke delete on daily from writer")
    dbt("run")
    assert pg.value(indexed) == ["(n)"]
    assert pg.sql(grants) == [("writer", "INSERT")]
    pg.sql("drop table daily")


def test_a_swap_publishes_no_more_than_was_published(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="table")
    dbt("run")
    pg.sql("create publication part for table daily (id, n) where (n > 20)")
    published = "select attnames::text, rowfilter from pg_publication_tables where pubname = 'part'"
    before = pg.sql(published)
    try:
        dbt("run")
        assert pg.sql(published) == before and before[0][0] == "{id,n}"
    finally:
        pg.sql("drop publication part")


def test_a_policy_that_does_not_fit_keeps_the_old_table(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="table")
    dbt("run")
    pg.sql("create policy few on daily using (n > 20)", "alter table daily enable row level security")
    dbt.model("daily", "select id, name from src", materialized="table")
    with pytest.raises(Failed, match="few of public.daily cannot be put onto the new table"):
        dbt("run")
    assert pg.value("select relrowsecurity from pg_class where oid = 'daily'::regclass")
    assert "n" in pg.value("select array_agg(attname::text) from pg_attribute where attrelid = 'daily'::regclass")


@pytest.mark.parametrize("how", ["table", "anton_table", "incremental"])
def test_a_test_that_gates_keeps_bad_rows_out(dbt: Project, pg: Pg, how: str) -> None:
    dbt.model("daily", "select * from src", materialized=how, unique_key="id")
    register(pg, "daily", "id")
    every = [pg.listen("daily", op) for op in ("updated", "rebuilt")]
    dbt("run")
    assert len(pg.events(every[1])) == 1
    pg.sql(
        "insert into anton.dbt_test (project, unique_id, name, sql, error_if) "
        "values ('shop', 'model.shop.daily', 'no_negatives', "
        "'select * from daily where n < 0', '> 1')",
        "update src set n = -1 where id = 1",
    )
    dbt("run", "--vars", "anton_gate: true")  # one is let pass
    pg.sql("update src set n = -2 where id = 2")
    assert [len(pg.events(one)) for one in every] == [1, 1]
    with pytest.raises(Failed, match="test no_negatives of model.shop.daily failed: 2"):
        dbt("run", "--vars", "anton_gate: true")
    assert [pg.events(one) for one in every] == [[], []]
    assert pg.value("select n from daily where id = 2") == 20
    dbt("run")  # not asked for
    assert pg.value("select n from daily where id = 2") == -2
    pg.sql("update anton.dbt_test set always = true")
    with pytest.raises(Failed, match="no_negatives"):
        dbt("run")
    pg.sql("update anton.dbt_test set severity = 'warn'")
    dbt("run")


def test_nothing_is_done_where_anton_is_not(dbt: Project, pg: Pg, bare: str) -> None:
    """On a database without Anton, and when it is told not to."""
    with psycopg.connect(bare) as conn:
        conn.execute("create table src as select 1 as id, 'a' as name, 2 as n")
    elsewhere = Project(dbt.child, dbt.folder.parent / "elsewhere", bare)
    for how in ("table", "view", "anton_table", "incremental", "materialized_view"):
        elsewhere.model(f"m_{how}", "select * from src", materialized=how, unique_key="id")
    elsewhere.file("seeds/lands.csv", "code,land\nDE,Germany\n")
    for _ in range(2):
        elsewhere("build")
    dbt.model("daily", "select * from src", materialized="table")
    dbt("run", "--vars", "anton_enabled: false")
    assert pg.value("select count(*) from anton.dbt_build") == 0


def test_views_that_others_made_read_the_new_table(dbt: Project, pg: Pg) -> None:
    dbt.model("daily", "select * from src", materialized="table")
    dbt.model("of_dbt", "select id from {{ ref('daily') }}", materialized="view")
    dbt("run")
    pg.sql(
        "create view outside with (security_barrier = true) as "
        "select d.id, daily.n from daily, daily d where d.id = daily.id",
        "create view over_it as select count(*) from outside",
        "grant select on outside to public",
    )
    pg.sql(*CHANGE)
    for _ in range(2):
        dbt("run")
    assert (
        pg.value("select sum(n) from outside") == pg.value("select sum(n) from src")
        and pg.value("select * from over_it") == 5
    )
    assert pg.value("select reloptions from pg_class where relname = 'outside'") == ["security_barrier=true"]
    assert pg.value("select has_table_privilege('public', 'outside', 'select')")
    pg.sql("insert into src select 77, 77")
    dbt("run", "--select", "daily")    # which takes dbt's own view along, as dbt believes
    assert pg.value("select count(*) from of_dbt where id = 77") == 1
    dbt("run")
    assert pg.value("select count(*) from of_dbt where id = 77") == 1
    pg.sql("create materialized view kept as select * from daily")
    dbt("run")
    assert "kept is lost" in pg.value(
        "select note from anton.dbt_build where unique_id = 'model.shop.daily' order by id desc limit 1"
    )


@pytest.fixture
def theirs(dbt: Project, pg: Pg, dbt_child: Child, tmp_path: Path) -> Iterator[Project]:
    """A project of a role that has no rights but to build."""
    pg.sql(
        "do $$ begin create role builder login password 'b'; "
        "exception when duplicate_object then null; end $$",
        "grant create, usage on schema public to builder",
        "grant usage on schema anton to builder",
        "grant select on src to builder",
    )
    theirs = Project(dbt_child, tmp_path / "theirs", pg.url, user="builder", password="b")
    yield theirs
    pg.sql("drop owned by builder")


def test_a_role_that_only_builds_needs_no_right_in_the_runtime_but_to_use_its_schema(theirs: Project, pg: Pg) -> None:
    theirs.model("daily", "select * from src", materialized="table")
    theirs.model("hourly", "select * from src", materialized="incremental", unique_key="id")
    theirs.model("kept", "select id, name from src", materialized="anton_table", unique_key="id")
    heard = {}
    for name in ("daily", "hourly", "kept"):
        register(pg, name, "id")
        heard[name] = pg.listen(name, "new", "updated", "deleted", read="change")
    rebuilt = pg.listen("daily", "rebuilt")
    theirs("run")
    theirs("run")
    assert [pg.events(one) for one in heard.values()] == [[], [], []]
    pg.sql(*CHANGE)
    theirs("run")
    assert {(e.op, e.key) for e in pg.events(heard["kept"])} == {("d", 1), ("n", 6)}
    theirs.model("kept", "select * from src", materialized="anton_table", unique_key="id")
    theirs("run", "--select", "kept")
    pg.sql("select anton.mend()")
    assert pg.events(heard["kept"]) == [] and pg.value("select n from kept where id = 6") == 60
    assert {(e.op, e.key) for e in pg.events(heard["daily"])} == {("d", 1), ("u", 3), ("n", 6)}
    assert {(e.op, e.key) for e in pg.events(heard["hourly"])} == {("u", 3), ("n", 6)}
    assert len(pg.events(rebuilt)) == 3
    pg.listen("src", "new")
    src = pg.value("select id from anton.watched where table_name = 'src'")
    with psycopg.connect(pg.url, user="builder", password="b", autocommit=True) as conn:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("delete from anton.job")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="is not the table of"):
            close = """select anton.dbt_close('{"schema": "public", "name": "src"}', '{}', null, null, null, false)"""
            conn.execute(close)
        conn.execute("create temp table anton_carrier (like src)")     # no changes of others' tables can be made up
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="src is not the table of"):
            conn.execute("select anton.dbt_attach(%s)", [src])


def test_records_that_row_security_hides_from_who_builds_are_not_compared(theirs: Project, pg: Pg) -> None:
    theirs.model("daily", "select * from src", materialized="table")
    theirs.model("kept", "select * from src", materialized="anton_table", unique_key="id")
    theirs.model("hourly", "select * from src {% if is_incremental() %} where id >= 3 {% endif %}",
                 materialized="incremental", unique_key="id")
    tables, heard, failed, rebuilt = ("daily", "kept", "hourly"), {}, {}, {}
    for name in tables:
        register(pg, name, "id")
        heard[name] = pg.listen(name, "new", "updated", "deleted", read="change")
        failed[name], rebuilt[name] = pg.listen(name, "failed"), pg.listen(name, "rebuilt")
    theirs("run")
    for name in tables:
        pg.sql(f"create policy few on {name} for select using (n > 20)", f"create policy d on {name} for delete using "
               "(true)", f"create policy i on {name} for insert with check (true)",
               f"alter table {name} enable row level security, force row level security")
        assert len(pg.events(rebuilt[name])) == 1
    findings = "select subject, remedy from anton.dbt_findings() where problem ~ 'row level security of' order by 1"
    assert pg.sql(findings) == []
    pg.sql(*CHANGE)                                                    # 3 is hidden from now on: no delete
    theirs("run")
    for name in ("daily", "kept"):
        assert pg.sql(f"select id, n from {name} order by id") == pg.sql("select id, n from src order by id")
        assert pg.events(heard[name]) == []
        assert "not compared" in pg.events(failed[name])[0].key["error"]
    assert {(e.op, e.key) for e in pg.events(heard["hourly"])} >= {("d", 3), ("n", 3), ("n", 6)}   # as it was written
    told = [event.key for name in tables for event in pg.events(rebuilt[name])]
    assert [(one["new"], one["changed"]) for one in told] == [(None, None)] * 3
    assert [subject for subject, _ in pg.sql(findings)] == ["public.daily", "public.hourly", "public.kept"]
    for _, remedy in pg.sql(findings):
        pg.sql(remedy.split(";")[0])
    assert pg.sql(findings) == []
    pg.sql("update src set n = 1 where id = 3")
    theirs("run")
    assert [(e.op, e.key) for name in tables for e in pg.events(heard[name])] == [("u", 3)] * 3


def test_a_writer_of_a_model_cannot_pass_himself_off_as_its_build(dbt: Project, pg: Pg) -> None:
    dbt.model("hourly", "select * from src", materialized="incremental", unique_key="id")
    register(pg, "hourly", "id")
    heard = pg.listen("hourly", "new", "updated", "deleted", read="change")
    dbt("run")
    assert pg.events(heard) == []
    table = pg.value("select id from anton.watched where table_name = 'hourly'")
    pg.sql(
        "do $$ begin create role scribe login password 's'; exception when duplicate_object then null; end $$",
        "grant insert on hourly to scribe",
    )
    with psycopg.connect(pg.url, user="scribe", password="s") as conn:
        conn.execute("create temp table anton_seen (id int, anton_was bool, anton_seq int)")
        conn.execute("grant all on anton_seen to public")
        conn.execute("select set_config('anton.collect', %s || ' ' || pg_current_xact_id(), true)", [str(table)])
        conn.execute("insert into hourly (id) values (99)")
        assert conn.execute("select count(*) from anton_seen").fetchone() == (0,)
    assert [(e.op, e.key) for e in pg.events(heard)] == [("n", 99)]
    pg.sql("revoke all on hourly from scribe")


def test_a_build_of_a_name_that_is_another_table_is_no_build_of_the_model(dbt: Project, pg: Pg) -> None:
    pg.sql("select anton.dbt_register('shop', 'model.shop.daily', 'public', 'elsewhere', '{id}')")
    rebuilt = pg.listen("elsewhere", "rebuilt")
    dbt.model("daily", "select * from src", materialized="table")
    dbt("run")
    pg.sql("alter table daily add primary key (id)")
    here = pg.listen("daily", "rebuilt", "deleted", read="change")
    pg.sql("delete from src where id = 1")
    dbt("run")
    assert pg.value("select count(*) from anton.dbt_build") == 0 and pg.events(rebuilt) == []
    assert sorted(event.op for event in pg.events(here)) == ["d", "r"]  # who listens to that table hears of it


def test_the_demo_project_builds_and_its_tests_pass(pg: Pg, dbt_child: Child, tmp_path: Path) -> None:
    pg.sql(
        "create table orders (id int primary key, customer text, country text, total numeric, status text, "
        "placed_at timestamptz)",
        "insert into orders select g, 'c' || g % 3, (array['DE', 'FR'])[1 + g % 2], g, 'paid', "
        "timestamptz '2026-01-01' + g * interval '1 h' "
        "from generate_series(1, 60) g",
    )
    demo = Project(dbt_child, tmp_path / "demo", pg.url, demo=True)
    for _ in range(2):
        nodes = demo("build")["nodes"]
    assert {status for status, _ in nodes.values()} == {"success", "pass"} and len(nodes) > 10
    assert pg.value("select count(distinct unique_id) from anton.dbt_build") == 6
    assert pg.sql("select code, revenue from revenue_by_country order by 1") == [("DE", 930), ("FR", 900), ("IT", 0)]
