"""Steps: runs the steps of a plan one by one, each a transaction that may be tried again; or only tries them.

DDL asks for its lock for 200 ms at most, lets go, and asks again. What the role may not do is noted as SQL for
someone who may.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import TYPE_CHECKING

import asyncpg

from anton import sqlfile
from anton.app import App
from anton.db import Database, quote, translated
from anton.errors import (
    DeclarationError,
    LockNotGained,
    MigrationFailed,
    MissingPrivilege,
    UnknownTable,
    did_you_mean,
)
from anton.plan import LOCK_TIMEOUT, Plan, Step
from anton.sqlfile import SqlFile

if TYPE_CHECKING:
    from anton.db import Conn

BUSY = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
NOT_YET = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError,
           asyncpg.UndefinedObjectError)

SQL_FOLDER = "sql/"                                                    # as a step's file: which of them is found out


class Steps:
    """One connection's steps, noted in `plan`.

    dry: nothing stays: the caller holds a transaction that it rolls back. patience: seconds for one step to get its
    lock. schema: the runtime's, quoted. files: the app's SQL handlers and schedules.
    """

    def __init__(self, db: Database, app: App, conn: Conn, *, dry: bool, patience: float) -> None:
        self.db, self.app, self.conn, self.dry, self.patience = db, app, conn, dry, patience
        self.schema = quote(db.schema)
        self.plan = Plan(db.name)
        self.me = ""
        self.files: list[SqlFile] = []
        self.postpone = False                                          # sql/ may wait for the declared tables

    async def step(self, step: Step, file: str = "", *, vital: bool = False, table: str = "", unless_same: str = "",
                   only_plan: bool = False, release: bool = False, cleanup: str = "") -> bool:
        """Runs a step, or tries it in a plan, and notes it. Returns whether it changed, or would change, anything.

        vital: without it nothing else can be done. table: whose lock or rights it needs, quoted.
        unless_same: a query; when its answer stays the same the step is undone and not noted.
        only_plan: not tried in a plan; release: undone at once there. cleanup: SQL to run before a second try.
        """
        if self.dry and (only_plan or not step.transaction):
            self.plan.steps.append(step)
            return True
        started, tried = time.monotonic(), False
        while True:
            try:
                if tried and cleanup:
                    await self.conn.execute(f"begin; set local lock_timeout = '{LOCK_TIMEOUT}'; {cleanup}; commit")
                changed = await (self._try(step, unless_same, release) if self.dry else self._run(step, unless_same))
                break
            except asyncpg.InsufficientPrivilegeError as error:
                await self._undo()
                await self._not_allowed(step, table, vital, error)
                return False
            except asyncpg.PostgresError as error:
                await self._undo()
                if self.dry or not _busy(error, step):
                    raise await self._explained(error, step, file) from error
                if time.monotonic() - started > self.patience:
                    raise LockNotGained(step.body, self.patience, await self._holders(table)) from error
                tried = True
            await asyncio.sleep(random.uniform(0.05, 0.5))
        if changed:
            self.plan.steps.append(step)
        return changed

    async def _run(self, step: Step, unless_same: str) -> bool:
        if not step.transaction:
            settings = () if self.db.pooled else step.settings         # a pooler would give them to strangers
            try:
                for setting in settings:
                    await self.conn.execute(f"set {setting}")
                await self.conn.execute(step.body)
            finally:
                for setting in settings:
                    await self.conn.execute(f"reset {setting.partition(' ')[0]}")
            return True
        if not unless_same:
            await self.conn.execute(step.sql)
            return True
        await self.conn.execute("\n".join(("begin;", *(f"set local {setting};" for setting in step.settings))))
        before = await self.conn.fetchval(unless_same)
        await self.conn.execute(step.body)
        same: bool = before == await self.conn.fetchval(unless_same)
        await self.conn.execute("rollback" if same else "commit")
        return not same

    async def _try(self, step: Step, unless_same: str, release: bool) -> bool:
        before = await self.conn.fetchval(unless_same) if unless_same else None
        trial = self.conn.transaction()
        await trial.start()
        try:
            for setting in step.settings:
                await self.conn.execute(f"set local {setting}")
            await self.conn.execute(step.body)
            for setting in step.settings:
                await self.conn.execute(f"reset {re.split(r'[ =]', setting)[0]}")
            changed = not unless_same or before != await self.conn.fetchval(unless_same)
        except BaseException:
            await trial.rollback()
            raise
        await (trial.rollback() if release else trial.commit())
        return changed

    async def _undo(self) -> None:
        if not self.dry and self.conn.is_in_transaction():
            await self.conn.execute("rollback")

    async def _explained(self, error: asyncpg.PostgresError, step: Step, file: str) -> BaseException:
        mine = translated(error)
        known = (*BUSY, asyncpg.QueryCanceledError, *(NOT_YET if file == SQL_FOLDER and self.postpone else ()))
        asked = bool(file) and isinstance(mine, DeclarationError | UnknownTable)   # by a statement of the file
        if mine is not None and not asked or isinstance(error, known):
            return mine or error
        if not file:
            return MigrationFailed(step.title, 1, step.body.strip().splitlines()[0], error)
        at = getattr(error, "position", None)
        if at:
            sent = step.body if self.dry else step.sql
            line = sent.count("\n", 0, int(at) - 1)
            line -= 0 if self.dry else step.sql.partition("begin;\n")[0].count("\n") + 1 + len(step.settings)
        else:
            line = await self._find(step, error)
        lines, reason = step.body.splitlines(), f"{mine or error}{await self._meant(error)}"
        for number in range(line, -1, -1) if file == SQL_FOLDER else ():   # a folder: which of its files
            if lines[number].startswith("-- sql/"):
                return MigrationFailed(lines[number][3:], line - number, lines[line].strip(), reason)
        return MigrationFailed(file, line + 1, lines[line].strip(), reason)

    async def _meant(self, error: asyncpg.PostgresError) -> str:
        """Which table may have been meant. Of columns Postgres says it."""
        name = re.search(r'"(.*)"', str(error.args[0]))
        if not isinstance(error, asyncpg.UndefinedTableError) or name is None:
            return ""
        rows = await self.db.call(self.conn, "relations")
        meant = did_you_mean(name[1], [row["name"].removeprefix("public.") for row in rows])
        return f".{meant}" if meant else ""
    async def _find(self, step: Step, error: asyncpg.PostgresError) -> int:
        """The line, from 0, of the statement that fails like this: some errors do not say where they happened."""
        trial = self.conn.transaction()
        await trial.start()
        try:
            for setting in step.settings:
                await self.conn.execute(f"set local {setting}")
            for line, text in sqlfile.statements(step.body):
                try:
                    await self.conn.execute(text)
                except asyncpg.PostgresError as again:
                    return line if again.sqlstate == error.sqlstate else 0
        finally:
            await trial.rollback()
        return 0

    async def _not_allowed(self, step: Step, table: str, vital: bool, error: BaseException) -> None:
        sql = await self._grants(table) or [step.body.rstrip().removesuffix(";") + ";"]
        if vital:
            if step.body.startswith("create schema"):
                sql = [f"grant create on database {quote(self.db.name)} to {quote(self.me)};"]
            raise MissingPrivilege(f"make {step.title}", self.me, sql) from error
        self.plan.dba += [line for line in sql if line not in self.plan.dba]
        self.plan.notes.append(f"{step.title}: {error}. Not done; after the SQL for the DBA, run again: anton migrate")

    async def _grants(self, table: str) -> list[str]:
        """The GRANTs without which this role cannot listen to a table."""
        if not table or table.startswith(f"{self.schema}."):
            return []
        schema = table.partition(".")[0]
        me = quote(self.me)
        rows = await self.conn.fetch(
            "select format('grant %s on table %I.%I to %s;', string_agg(p, ', ' order by p), "
            "              n.nspname, c.relname, $2::text) "
            "  from pg_class c join pg_namespace n on n.oid = c.relnamespace, unnest(array['select', 'trigger']) p "
            " where format('%I.%I', n.nspname, c.relname) = $1 and not has_table_privilege(c.oid, p) "
            " group by n.nspname, c.relname", table, me)
        usage, create = await self.conn.fetchrow(
            "select not has_schema_privilege(n.oid, 'usage'), not has_schema_privilege(n.oid, 'create') "
            "  and not exists (select from pg_class c "
            "                   where c.relnamespace = n.oid and format('%I.%I', n.nspname, c.relname) = $2) "
            "  from pg_namespace n where quote_ident(n.nspname) = $1", schema, table) or (False, False)
        return [*([f"grant usage on schema {schema} to {me};"] if usage else []),
                *([f"grant create on schema {schema} to {me};"] if create else []), *(row[0] for row in rows)]

    async def _holders(self, table: str) -> str:
        rows = await self.conn.fetch(
            "select distinct format('pid %s, %s, since %s', a.pid, "
            "       coalesce(nullif(a.application_name, ''), a.usename), date_trunc('second', a.xact_start)) "
            "  from pg_locks l join pg_stat_activity a on a.pid = l.pid "
            " where l.relation = to_regclass($1)::oid and l.granted and a.pid <> pg_backend_pid()", table or "-")
        return "; ".join(row[0] for row in rows)


def _busy(error: asyncpg.PostgresError, step: Step) -> bool:
    limited = any(setting.startswith("statement_timeout") for setting in step.settings)
    return (isinstance(error, BUSY) or (limited and isinstance(error, asyncpg.QueryCanceledError))
            or "concurrently updated" in str(error))
