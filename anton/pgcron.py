"""Pgcron: pg_cron calls tick() each minute, where the cluster has pg_cron. Registered, updated and removed by migrate.

    cron.job in pg_cron's own database, this one or another of the cluster  --each minute-->  anton.tick() in ours

Nothing depends on it: workers tick, too, and each time fires once, whoever comes first. With it, times fire while no
worker is there. The job runs as the role that migrated. A cluster without pg_cron costs one look; what a role may not
do is noted with the GRANT it takes, and never stops a migrate.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from anton.db import Database, literal, quote
from anton.errors import DatabaseUnreachable
from anton.plan import Step
from anton.status import Row
from anton.steps import Steps

if TYPE_CHECKING:
    from anton.db import Conn

EACH_MINUTE = "* * * * *"                                              # seconds came with pg_cron 1.5
_PURGE = "anton purge"
_DETAILS = ("delete from cron.job_run_details d using cron.job j where j.jobid = d.jobid and j.jobname like 'anton %' "
            "and d.end_time < now() - interval '1 day'")               # pg_cron keeps them for ever
_LOOK = """
select current_database() as here, exists (select from pg_extension where extname = 'pg_cron') as has_it,
       (select setting from pg_settings where name = 'cron.database_name') as home,
       pg_has_role(current_user, 'pg_read_all_settings', 'member') as sees"""
# What is wrong with the job: not there or another; its last call failed; its last call is long ago. By the real clock.
_EXAMINE = """
with mine as (select * from cron.job where jobname = $1),
     run as (select d.* from cron.job_run_details d join mine using (jobid) where d.end_time is not null
              order by d.runid desc limit 1)
select 'pg_cron does not call tick(): its job is ' || case when exists (select from mine) then 'another'
       else 'missing' end as problem, 'anton migrate' as remedy
 where not exists (select from mine where (schedule, command, database, active) = ($2, $3, $4, true))
union all
select format('pg_cron''s call of tick() at %s failed: %s', date_trunc('second', end_time), return_message),
       'see the server''s log; workers fire the schedules meanwhile'
  from run where status = 'failed'
union all
select format('pg_cron has not called tick() since %s', date_trunc('second', end_time)),
       'see whether its launcher runs: select * from pg_stat_activity where backend_type ~ ''cron''; restart the server'
  from run where status <> 'failed' and end_time < now() - interval '5 min'"""


@dataclass(frozen=True)
class Found:
    """Where pg_cron lives. conn: a connection to that database, None when it cannot be used, and why. here: ours.

    loaded: the server has it, if perhaps not the extension.
    """

    conn: Conn | None
    home: str
    here: str
    loaded: bool
    why: str = ""


async def keep_job(run: Steps) -> None:
    """Brings pg_cron's job to what the schedules of all apps need: one, or none when there is no schedule."""
    wanted = await _is_wanted(run.db, run.conn)
    async with _found(run.db, run.conn) as found:
        if found.conn is None:
            if found.why:
                run.plan.notes.append(found.why)
            return
        lacks = await _lacks(found.conn, found.home == found.here)
        if lacks:
            if wanted:
                run.plan.notes.append(_unused(found, lacks))
            return
        await _keep(run, found.conn, found.home, found.here, wanted)


async def examine(db: Database, conn: Conn) -> tuple[list[Row], list[str]]:
    """For anton doctor: what is wrong with pg_cron and its job, and what one should know. Nothing without schedules."""
    if not await _is_wanted(db, conn):
        return [], []
    async with _found(db, conn) as found:
        if found.conn is None:
            lacks_it = f'pg_cron is loaded; to use it: create extension pg_cron; in database "{found.home}", then: ' \
                "anton migrate" if found.loaded else "there is no pg_cron: schedules fire while a worker runs"
            return [], [found.why or lacks_it]
        lacks = await _lacks(found.conn, found.home == found.here)
        if lacks:
            return [], [_unused(found, lacks)]
        rows = await found.conn.fetch(_EXAMINE, _name(found.here, db), EACH_MINUTE, _command(db), found.here)
    return [{"kind": "pg_cron", "subject": _name(found.here, db), **row} for row in rows], []


async def _is_wanted(db: Database, conn: Conn) -> bool:
    return bool(await conn.fetchval(f"select exists (select from {quote(db.schema)}.schedule where enabled)"))


def _name(here: str, db: Database) -> str:
    return f"anton tick {here}.{db.schema}"


def _command(db: Database) -> str:
    return f"select {quote(db.schema)}.tick()"


def _unused(found: Found, lacks: list[str]) -> str:
    return (f'pg_cron in database "{found.home}" is not used for schedules, workers fire them without it. '
            f'To let it: {" ".join(lacks)} and run again: anton migrate')


@asynccontextmanager
async def _found(db: Database, conn: Conn) -> AsyncIterator[Found]:
    look = await conn.fetchrow(_LOOK)
    assert look is not None
    here: str = look["here"]
    if look["has_it"]:
        yield Found(conn, here, here, True)
        return
    loaded = look["home"] is not None
    home = look["home"] or (None if look["sees"] else "postgres")      # its default, for those who may not see it
    if home is None or home == here:
        yield Found(None, here, here, loaded)
        return
    try:
        other = await db.connect(home)
    except DatabaseUnreachable as error:
        why = f'pg_cron lives in database "{home}" and is not used for schedules: {error}' if loaded else ""
        yield Found(None, home, here, loaded, why)
        return
    try:
        there = await other.fetchval("select exists (select from pg_extension where extname = 'pg_cron')")
        yield Found(other if there else None, home, here, loaded)
    finally:
        with suppress(OSError, asyncpg.PostgresError):
            await other.close()


async def _keep(run: Steps, conn: Conn, home: str, here: str, wanted: bool) -> None:
    name, command = _name(here, run.db), _command(run.db)
    jobs = await conn.fetch("select jobid, jobname, schedule, command, database, active from cron.job "
                            "where jobname like 'anton %' order by jobid")
    mine = [job for job in jobs if job["jobname"] == name]
    purges = [job for job in jobs if job["jobname"] == _PURGE]
    same = [tuple(job)[2:] for job in mine] == [(EACH_MINUTE, command, here, True)]
    lines = []
    if mine and not (wanted and same):
        lines += [f"select cron.unschedule({job['jobid']});" for job in mine]
    if wanted and not same:
        how = "schedule" if home == here else "schedule_in_database"
        place = "" if home == here else f", {literal(here)}"
        lines += [f"select cron.{how}({literal(name)}, {literal(EACH_MINUTE)}, {literal(command)}{place});"]
    if wanted and not purges:
        lines += [f"select cron.schedule({literal(_PURGE)}, '7 3 * * *', {literal(_DETAILS)});"]
    if not wanted and len(jobs) == len(mine) + len(purges) and mine:
        lines += [f"select cron.unschedule({job['jobid']});" for job in purges]
    if lines:
        what = "pg_cron calls tick() each minute" if wanted else "pg_cron does not call tick() any more"
        body = "\n".join(lines)
        run.plan.steps.append(Step(what, body if home == here else f'-- in database "{home}"\n{body}'))
        if not run.dry:
            async with conn.transaction():
                await conn.execute(body)


async def _lacks(conn: Conn, is_here: bool) -> list[str]:
    """The GRANTs without which this role cannot use pg_cron."""
    found = await conn.fetch("""
        select format('grant usage on schema cron to %I;', current_user) where not has_schema_privilege('cron', 'usage')
        union all
        select format('grant execute on function %s to %I;', p.oid::regprocedure, current_user)
          from pg_proc p where p.pronamespace = 'cron'::regnamespace and p.proname = 'schedule_in_database'
           and not $1 and not has_function_privilege(p.oid, 'execute')""", is_here)
    return [row[0] for row in found]
