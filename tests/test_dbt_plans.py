"""Plans: what dbt's builds and runs ask of the runtime reads a handful of rows, however many are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pg import Pg
from servers import Server

KEPT = 50_000  # builds, runs and requests
FEW = 50  # rows of each table that one statement may read
FILL = f"""
insert into anton.dbt_build (project, unique_id, relation, invocation_id, materialized, initial, changed,
                             schema_changed, at, xid, snapshot)
  select 'shop', 'model.shop.m' || g % 10, 'public.m' || g % 10, 'run ' || g / 10, 'table', false, true,
         false, anton.now(), pg_current_xact_id(), pg_current_snapshot() from generate_series(1, {KEPT}) g;
insert into anton.dbt_run (app, project, state, started_at, finished_at)
  select 'shop', 'shop', 'done', anton.now(), anton.now() from generate_series(1, {KEPT}) g;
insert into anton.dbt_request (app, project, models, state, first_at, due_at, run_id)
  select 'shop', 'shop', '{{m1}}', 'done', anton.now(), anton.now(), id from anton.dbt_run;
insert into anton.dbt_result (run_id, unique_id, status)
  select id, 'model.shop.m' || g, 'success' from anton.dbt_run, generate_series(0, 1) g
"""
TABLES = ("dbt_build", "dbt_run", "dbt_request", "dbt_result", "dbt_model", "dbt_test")
BUILD = """'{"project": "shop", "unique_id": "model.shop.m1", "schema": "public", "name": "m1"}'"""
HOT = {
    "known": f"select anton.dbt_known({BUILD})",
    "behind": """select * from anton.dbt_behind('shop', '{"model.shop.m1": ["model.shop.m2", "model.shop.m3"]}')""",
    "unchanged": "select * from anton.dbt_unchanged('shop', 'run 7')",
    "ask": """select anton.dbt_ask('shop', 'shop', '{"merge": "when", "tables": ["public.orders"]}')""",
    "begin": "select * from anton.dbt_begin('shop', 'shop', '{}', 1, 'anton-dbt-x')",
    "open": "select anton.dbt_open('shop', 'shop', 1, 'anton-dbt-x')",
    "cancel": "select * from anton.dbt_cancel('{}')",
    "waiting": "select * from anton.dbt_cancel_waiting('shop')",
    "finish": "select anton.dbt_finish((select max(id) from anton.dbt_run), 'done', null, '{}', '[]')",
    "settle": "select anton.dbt_settle((select max(id) from anton.dbt_run), '{}', null)",
}


@pytest.fixture(scope="module")
def full(server: Server, template: str) -> Iterator[Pg]:
    name = server.clone(template)
    pg = Pg(server.url(name))
    pg.sql("select anton.put_dbt_project('{\"app\": \"shop\", \"name\": \"dbt:shop\"}')", *FILL.split(";\n"))
    for model in range(10):                                            # each has seen all of it
        pg.sql("insert into anton.dbt_build (project, unique_id, relation, invocation_id, materialized, initial, "
               f"changed, schema_changed, at, xid, snapshot) select 'shop', 'model.shop.m{model}', 'm', 'last', "
               "'table', false, "
               "false, false, anton.now(), pg_current_xact_id(), pg_current_snapshot()")
    pg.sql("vacuum analyze")
    yield pg
    pg.conn.close()
    server.drop(name)


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan"])
@pytest.mark.parametrize("what", HOT)
def test_what_is_read_does_not_grow_with_what_is_kept(full: Pg, what: str, mode: str) -> None:
    full.sql("discard plans", f"set plan_cache_mode = {mode}")
    with full.conn.transaction(force_rollback=True):
        before = rows_read(full)
        full.sql(HOT[what])
        after = rows_read(full)
    assert set(after) == set(TABLES)
    assert {name: rows - before[name] for name, rows in after.items() if rows - before[name] > FEW} == {}


def rows_read(pg: Pg) -> dict[str, int]:
    """By table, what this session has read of it that is not counted for all yet."""
    return dict(pg.sql("select relname, seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_xact_all_tables "
                       "where schemaname = 'anton' and relname = any (%s)", args=(list(TABLES),)))


@pytest.mark.parametrize("order", ["g", "md5(g::text)"])
def test_rows_that_lie_in_the_order_of_their_key_are_compared_along_it_and_others_by_a_hash(pg: Pg, order: str) -> None:
    """Nobody has analyzed what was just made, nor, perhaps, what was there."""
    with pg.conn.transaction(force_rollback=True):
        pg.sql("set local max_parallel_workers = 0")                   # whose reads are not counted here
        for name in ("old", "new"):
            pg.sql(f"create table {name} as select g as id, g * 2 as n, rpad('', 200, 'x') as filler "
                   f"from generate_series(1, {KEPT}) g order by {order}", f"alter table {name} add primary key (id)")
        pg.sql("update new set n = 0 where id = 7", f"delete from old where id in (1, {KEPT})",
               f"delete from new where id in (2, {KEPT} / 2)")         # at the ends, and in the middle
        read = "select sum(seq_tup_read) from pg_stat_xact_user_tables where relname in ('old', 'new')"
        before = pg.value(read)
        assert pg.sql("select * from anton.dbt_diff('old', 'new', '{id}', false)") == [(2, 1, 2)]
        assert (pg.value(read) - before < KEPT) == (order == "g")
        assert pg.sql("select (o).id, (n).id, (o).n, (n).n from anton_diff order by coalesce((o).id, (n).id)") == [
            (None, 1, None, 2), (2, None, 4, None), (7, 7, 14, 0), (KEPT // 2, None, KEPT, None),
            (None, KEPT, None, KEPT * 2)]
        parts = pg.value("select anton.dbt_parts('new', 'id')")
        assert len(parts) == 4 and pg.value("select bool_and(n = 1) from (select " + " + ".join(
            f"({part})::int" for part in parts) + " as n from new) x")
