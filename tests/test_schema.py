"""The runtime's schema: released migrations stay as they are, sql/ can run again, every function is pinned down."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from anton.db import Database

REPO = Path(__file__).parent.parent
MIGRATIONS = sorted((REPO / "migrations").glob("*.sql"))


def test_released_migrations_are_as_they_were_released() -> None:
    for line in (REPO / "migrations" / "FROZEN").read_text().splitlines():
        if line and not line.startswith("#"):
            sha256, name = line.split()
            found = hashlib.sha256((REPO / "migrations" / name).read_bytes()).hexdigest()
            assert found == sha256, f"{name} was released and may not change: write a new migration"


def test_migrations_are_numbered_without_a_gap_and_named_by_what_they_do() -> None:
    assert [int(file.name[:4]) for file in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))
    for file in MIGRATIONS:
        assert re.fullmatch(r"\d{4}_[a-z0-9_]+\.sql", file.name), file.name


def test_a_migration_calls_no_function_of_ours() -> None:
    ours = {name for file in (REPO / "sql").glob("*.sql")
            for name in re.findall(r"create or replace function (\w+)\(", file.read_text())}
    for file in MIGRATIONS:
        code = re.sub(r"--[^\n]*", "", file.read_text())
        code = re.sub(r"(create table|references|on|into) \w+ ?\(", "(", code)  # tables share names with functions
        called = set(re.findall(r"\b(\w+)\s*\(", code)) & ours
        assert not called, f"{file.name} calls {called}: functions are of now, migrations of then"


async def test_every_function_has_the_search_path_written_out(db: Database) -> None:
    async with db.conn() as conn:
        rows = await conn.fetch(
            "select p.oid::regprocedure::text as name, c as path from pg_proc p "
            "left join unnest(p.proconfig) c on c like 'search_path=%' "
            "where p.pronamespace = 'anton'::regnamespace and p.prokind = 'f'")
    assert len(rows) > 50
    open_ = {row["name"] for row in rows if row["path"] != "search_path=anton, pg_catalog, pg_temp"}
    assert open_ == {"anton.now()", "anton.slot(timestamp with time zone)"}  # inlined; they name nothing of ours


async def test_a_function_that_switches_plan_nodes_off_switches_jit_off_too(db: Database) -> None:
    async with db.conn() as conn:
        settings = await conn.fetch("select proname, array_to_string(proconfig, ' ') as said from pg_proc "
                                    "where pronamespace = 'anton'::regnamespace and proconfig::text ~ 'enable_.*=off'")
    assert len(settings) > 10
    assert [row["proname"] for row in settings if "jit=off" not in row["said"]] == []


async def test_sql_runs_again_and_changes_nothing(db: Database) -> None:
    bodies = ("select p.oid::regprocedure::text as name, md5(pg_get_functiondef(p.oid)) as body from pg_proc p "
              "where p.pronamespace = 'anton'::regnamespace and p.prokind = 'f' order by 1")
    async with db.conn() as conn:
        before = await conn.fetch(bodies)
        for file in sorted((REPO / "sql").glob("*.sql")):
            await conn.execute(
                f"begin; set local search_path = anton, pg_catalog, pg_temp; {file.read_text()}; commit")
        assert await conn.fetch(bodies) == before


async def test_every_table_has_a_primary_key(db: Database) -> None:
    async with db.conn() as conn:
        rows = await conn.fetch(
            "select c.relname from pg_class c where c.relnamespace = 'anton'::regnamespace and c.relkind in ('r', 'p') "
            "and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)")
    assert [row["relname"] for row in rows] == []
