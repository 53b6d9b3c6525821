"""Pgcron: pg_cron calls tick() each minute, where the cluster has pg_cron. Registered, updated and removed by migrate.

    cron.job in pg_cron's own database, this one or another of the cluster  --each minute-->  anton.tick() in ours

Nothing depends on it: workers tick, too, and each time fires once, whoever comes first. With it, times fire while no
worker is there. The job runs as the role that migrated. A cluster without pg_cron costs one look; what a role may not
do is noted with the GRANT it takes, and never stops a migrate.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import asyncpg

from anton.db import literal, quote
from anton.errors import DatabaseUnreachable
from anton.plan import Step
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


async def keep_job(run: Steps) -> None:
    """Brings pg_cron's job to what the schedules of all apps need: one, or none when there is no schedule."""
    wanted = await run.conn.fetchval(f"select exists (select from {run.schema}.schedule where enabled)")
    look = await run.conn.fetchrow(_LOOK)
    assert look is not None
    if look["has_it"]:
        await _keep(run, run.conn, look["here"], look["here"], wanted)
        return
    home = look["home"] or (None if look["sees"] else "postgres")      # its default, for those who may not see it
    if home is None or home == look["here"]:
        return
    try:
        other = await run.db.connect(home)
    except DatabaseUnreachable as error:
        if look["home"]:
            run.plan.notes.append(f'pg_cron lives in database "{home}" and is not used for schedules: {error}')
        return
    try:
        if await other.fetchval("select exists (select from pg_extension where extname = 'pg_cron')"):
            await _keep(run, other, home, look["here"], wanted)
    finally:
        with suppress(OSError, asyncpg.PostgresError):
            await other.close()


async def _keep(run: Steps, conn: Conn, home: str, here: str, wanted: bool) -> None:
    lacks = await _lacks(conn, home == here)
    if lacks:
        if wanted:
            run.plan.notes.append(f'pg_cron in database "{home}" is not used for schedules, workers fire them without '
                                  f'it. To let it: {" ".join(lacks)} and run again: anton migrate')
        return
    name, command = f"anton tick {here}.{run.db.schema}", f"select {quote(run.db.schema)}.tick()"
    jobs = await conn.fetch("select jobid, jobname, schedule, command, database from cron.job "
                            "where jobname like 'anton %' order by jobid")
    mine = [job for job in jobs if job["jobname"] == name]
    purges = [job for job in jobs if job["jobname"] == _PURGE]
    same = [tuple(job)[2:] for job in mine] == [(EACH_MINUTE, command, here)]
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
