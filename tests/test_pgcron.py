"""Pgcron: the job that calls tick(): made, mended and removed by migrate, wherever in the cluster pg_cron lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import Server, has_cron, migrate, restart, running
from shop import Shop

from anton import pgcron
from anton.db import Database
from anton.schedule import cron

pytestmark = pytest.mark.system("the embedded Postgres has no pg_cron")

JOBS = "select jobname::text, schedule, command, database, username, active from cron.job order by jobname"
PURGE = ("anton purge", "7 3 * * *")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Server]:
    with running("system") as server:
        if not has_cron(server.bin):
            pytest.skip("this system's Postgres has no pg_cron")
        server.sql("create extension pg_cron", "create role app login", "create database template_app",
                   "grant create on database template_app to app")
        migrate(server.url("template_app"))
        yield server


@pytest.fixture
def other(cluster: Server, tmp_path: Path) -> Iterator[Shop]:
    """An app in a database beside the one where pg_cron lives."""
    name = cluster.clone("template_app")
    yield Shop(cluster.url(name), tmp_path)
    cluster.sql("delete from cron.job")
    cluster.drop(name)


def nightly() -> None:
    @cron.daily
    def clean() -> None: ...


def nothing() -> None: ...


def jobs(cluster: Server) -> list[tuple[object, ...]]:
    return [row[:4] for row in cluster.sql(JOBS) if row[0] != "anton purge"]


def wanted(shop: Shop) -> tuple[object, ...]:
    name = urlsplit(shop.url).path[1:]
    return (f"anton tick {name}.anton", "* * * * *", "select anton.tick()", name)


def test_migrate_registers_the_job_in_the_database_where_pg_cron_lives(cluster, other):
    plan = other.declare(nightly).migrate(plan=True)
    step = next(step for step in plan.steps if step.title == "pg_cron calls tick() each minute")
    assert step.body.startswith('-- in database "postgres"\n') and jobs(cluster) == []
    other.migrate()
    assert jobs(cluster) == [wanted(other)] and PURGE in [row[:2] for row in cluster.sql(JOBS)]
    assert not other.migrate(check=True).drift
    other.migrate()
    assert jobs(cluster) == [wanted(other)]


def test_a_job_that_is_not_what_it_should_be_is_made_anew(cluster, other):
    other.declare(nightly).migrate()
    cluster.sql("update cron.job set command = 'select 1' where jobname like 'anton tick%'")
    assert other.migrate(check=True).drift
    other.migrate()
    assert jobs(cluster) == [wanted(other)]


def test_the_job_goes_with_the_last_schedule_and_the_other_databases_stay(cluster, other, tmp_path):
    neighbour = Shop(cluster.url(cluster.clone("template_app")), tmp_path / "neighbour")
    for shop in (other, neighbour):
        shop.declare(nightly).migrate()
    assert other.declare(nothing).migrate().steps[-1].title == "pg_cron does not call tick() any more"
    assert jobs(cluster) == [wanted(neighbour)] and len(cluster.sql(JOBS)) == 2
    neighbour.declare(nothing).migrate()
    assert cluster.sql(JOBS) == [] and not neighbour.migrate(check=True).drift


def test_where_pg_cron_lives_in_the_same_database_any_role_with_its_schema_may_use_it(cluster, tmp_path):
    shop = Shop(cluster.url("postgres"), tmp_path)
    cluster.sql("grant create on database postgres to app")
    by_app = Shop(cluster.url("postgres").replace("//postgres@", "//app@"), tmp_path)
    plan = by_app.declare(nightly).migrate()
    (note,) = [note for note in plan.notes if "pg_cron" in note]
    assert "grant usage on schema cron to app;" in note and jobs(cluster) == []
    cluster.sql("grant usage on schema cron to app")
    assert not [note for note in by_app.migrate().notes if "pg_cron" in note]
    assert jobs(cluster) == [("anton tick postgres.anton", "* * * * *", "select anton.tick()", "postgres")]
    assert {row[4] for row in cluster.sql(JOBS)} == {"app"}
    by_app.declare(nothing).migrate()
    assert cluster.sql(JOBS) == []
    shop.sql("drop schema anton cascade")
    cluster.sql("revoke usage on schema cron from app")


def test_a_role_that_may_not_see_where_pg_cron_lives_is_told_what_it_lacks(cluster, other):
    name = urlsplit(other.url).path[1:]
    cluster.sql("grant anton_owner to app", "grant create on schema public to app", database=name)
    by_app = Shop(other.url.replace("//postgres@", "//app@"), other.folder)
    notes = [note for note in by_app.declare(nightly).migrate().notes if "pg_cron" in note]
    assert "grant usage on schema cron to app;" in notes[0] and "schedule_in_database" in notes[0]
    assert 'database "postgres"' in notes[0] and jobs(cluster) == []


def test_the_job_fires_what_is_due_while_no_worker_is_there(cluster, other):
    """pg_cron's own minute is not waited for: it runs a job that says @reboot when it starts."""
    other.declare(nightly).migrate()
    other.sql("update anton.schedule set misfire = 'all', next_at = '2026-11-22 00:00Z', "
              "ahead = '{2026-11-23 00:00Z,2027-11-24 00:00Z}'")
    cluster.sql("update cron.job set schedule = '@reboot' where jobname like 'anton tick%'")
    restart(cluster)
    until(lambda: other.sql("select count(*) from anton.job") == [(1,)], cluster)
    assert other.sql("select planned_at::date::text, state from anton.tick order by 1") == [
        ("2026-11-22", "planned"), ("2026-11-23", "waiting")]


def doctor(shop: Shop) -> tuple[list[str], list[str]]:
    async def run() -> tuple[list[str], list[str]]:
        db = Database(shop.url)
        async with db.conn() as conn:
            found, notes = await pgcron.examine(db, conn)
        await db.close()
        return [f"{row['problem']} -> {row['remedy']}" for row in found], notes

    return asyncio.run(run())


def test_doctor_says_when_the_job_is_missing_another_or_failing(cluster, other):
    assert doctor(other) == ([], [])                                   # nothing to be called
    other.declare(nightly).migrate()
    assert doctor(other) == ([], [])
    ran = ("insert into cron.job_run_details (jobid, runid, command, status, return_message, start_time, end_time) "
           "select jobid, {n}, command, '{status}', 'connection failed', now(), now() - interval '{ago}' from cron.job "
           "where jobname like 'anton tick%'")
    for n, (status, ago, says) in enumerate([
            ("succeeded", "1 min", None), ("succeeded", "6 min", "has not called tick() since"),
            ("failed", "1 min", "failed: connection failed"), ("succeeded", "0", None)]):
        cluster.sql(ran.format(n=1_000_000 + n, status=status, ago=ago))
        found, _ = doctor(other)
        assert (says in found[0]) if says else not found
    for change in ("update cron.job set active = false", "update cron.job set schedule = '7 7 * * *'",
                   "delete from cron.job"):
        cluster.sql(f"{change} where jobname like 'anton tick%'")
        [problem], _ = doctor(other)
        assert problem.endswith("-> anton migrate")
        assert ("missing" if "delete" in change else "another") in problem
        other.migrate()
        assert doctor(other) == ([], [])


def test_doctor_says_what_it_takes_to_use_pg_cron(cluster, other):
    name = urlsplit(other.url).path[1:]
    cluster.sql("grant anton_owner to app", "grant create on schema public to app", database=name)
    by_app = Shop(other.url.replace("//postgres@", "//app@"), other.folder)
    by_app.declare(nightly).migrate()
    found, [note] = doctor(by_app)
    assert not found and "grant usage on schema cron to app;" in note
    cluster.sql("drop extension pg_cron")
    try:
        assert doctor(other) == ([], ['pg_cron is loaded; to use it: create extension pg_cron; in database "postgres", '
                                      "then: anton migrate"])
    finally:
        cluster.sql("create extension pg_cron")


def until(done: Callable[[], bool], cluster: Server) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end, cluster.sql("select status, return_message from cron.job_run_details")
        time.sleep(0.05)
