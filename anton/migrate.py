"""Migrate: brings a database to what Anton and an app declare. `await migrate(db, app)`, and again at any time.

    Anton's migrations/ and sql/  ->  the app's migrations/ and sql/  ->  tables  ->  handlers, schedules  ->  pg_cron

A migration runs once, in a transaction with the row that records it; what ran is frozen by its sha256. A sql/ folder
runs whole, in one transaction, whenever a file of it changed. Declared tables get what they lack when that loses
nothing; the rest is refused with the SQL it would take (`anton makemigration` writes that down). Tables that existed
before Anton are compared with their model and never altered.

One migrate runs at a time, the next waits. Each step is a transaction of its own, or one statement: killed anywhere,
run it again. DDL on tables in use asks for its lock for 200 ms at most, lets go, and tries again. What the role may
not do is collected as SQL for someone who may, and the rest goes on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from anton import pgcron, relation, sqlfile
from anton.app import App
from anton.db import Database, literal, quote
from anton.declared import Declared, Wanted
from anton.errors import AntonError, Destructive, FrozenChanged, MigrationError, MigrationFailed
from anton.plan import LOCK_TIMEOUT, Plan, Step
from anton.share import share
from anton.sqlfile import SqlFile
from anton.steps import BUSY, NOT_YET, SQL_FOLDER, Steps

PATIENCE = 600.0                                                       # seconds for one step to get its lock
_ONE_AT_A_TIME = 0x616E7472                                            # first key of the advisory lock
_TRY_SECONDS = 0.2                                                     # how long a plan may hold locks on tables in use


async def migrate(db: Database, app: App, *, plan: bool = False, check: bool = False,
                  patience: float = PATIENCE) -> Plan:
    """Brings the database to what Anton and the app declare.

    plan, check: change nothing; the Plan's steps are exactly what would be run.
    patience: seconds for each step to get its lock.
    Raises what was refused (Destructive, ModelMismatch, KeyNeeded, …) before any declared table is touched,
    MigrationFailed, FrozenChanged, LockNotGained, MissingPrivilege; after each of them it can be run again.
    """
    async with _alone(db):
        conn = await db.connect()
        try:
            run = Run(db, app, conn, dry=plan or check, patience=patience)
            await run.all()
        finally:
            await conn.close()
    relation.forget(db)
    return run.plan


async def makemigration(db: Database, app: App, name: str) -> Path:
    """Writes what migrate refuses as the app's next migration, for its author to look at; empty when there is nothing.

    name: verb_noun, "drop_legacy_total". Returns the new file.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise MigrationError(f'"{name}" is no name for a migration. Allowed: lower-case letters, digits and _, '
                             "such as drop_legacy_total.", name=name)
    found = await migrate(db, app, plan=True)
    folder = app.folder / "migrations"
    folder.mkdir(exist_ok=True)
    last = max((int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]_*.sql")), default=0)
    lines = []
    for error in found.refused:
        if isinstance(error, Destructive):
            lines += [*(f"-- {difference}" for difference in error.differences), *error.sql, ""]
    path = folder / f"{last + 1:04}_{name}.sql"
    path.write_text("\n".join(lines) or f"-- {name.replace('_', ' ')}\n-- The models and the tables agree.\n")
    return path


@asynccontextmanager
async def _alone(db: Database) -> AsyncIterator[None]:
    """Waits for other migrates of this schema. A transaction's lock, so that it holds behind a pooler too."""
    conn = await db.connect()
    try:
        while True:                                                    # waiting inside the lock would hold a snapshot
            turn = conn.transaction(isolation="read_committed")
            await turn.start()
            await conn.execute("set local idle_in_transaction_session_timeout = 0")
            mine = await conn.fetch("select pg_try_advisory_xact_lock($1, hashtext($2))", _ONE_AT_A_TIME, db.schema)
            await conn.execute("select")                               # closes the portal, which holds a snapshot
            if mine[0][0]:
                break
            await turn.rollback()
            await asyncio.sleep(0.1)
        yield
        if not conn.is_closed():
            await turn.rollback()
    finally:
        await conn.close()


class Run(Steps):
    """One migrate. dry: everything happens in one transaction that is rolled back; tables in use are not altered."""

    owner: tuple[str, ...] = ()                                        # the setting that acts as the runtime's owner

    async def all(self) -> None:
        if not self.dry:
            await self._all()
            return
        undo = self.conn.transaction(isolation="read_committed")
        await undo.start()
        try:
            await self._all()
        finally:
            await undo.rollback()

    async def _all(self) -> None:
        self.me = await self.conn.fetchval("select current_user")
        if not await self._framework():
            self.plan.notes.append("What the app needs is found when these have run.")
            return
        app_schema = await self.conn.fetchval(f"select {self.schema}.setting('app_schema')")
        declared = Declared(self, app_schema)
        files, noted = await self._app_steps(), len(self.plan.steps)
        try:
            async with self._trial(bool(files)):
                late = await self._run_files(files)
                wanted = await declared.examine()
        except (TimeoutError, *BUSY, asyncpg.QueryCanceledError):
            if not self.dry:
                raise
            self.plan.steps[noted:], self.plan.refused = [step for step, _ in files], []
            self.plan.notes.append("The app's files were not tried: they take longer than 200 ms on tables in use. "
                                   "What its tables then need is found when they have run.")
            return
        if self.plan.refused and not self.dry:
            raise _together(self.plan.refused)
        await self._declared(declared, wanted, late)

    async def _declared(self, declared: Declared, wanted: Sequence[Wanted], late: Step | None) -> None:
        await declared.make_tables(wanted)
        if late is not None and any(one.difference.alters for one in wanted) and self.dry:
            self.plan.steps.append(late)                               # it may need what a plan does not make
        elif late is not None:
            await self.step(late, SQL_FOLDER)
        await declared.make_handlers(wanted)
        await pgcron.keep_job(self)
        if self.plan.refused and not self.dry:
            raise _together(self.plan.refused)

    @asynccontextmanager
    async def _trial(self, files: bool) -> AsyncIterator[None]:
        """In a plan, the locks that an app's files take on its tables are held for 200 ms at most."""
        if not (self.dry and files) or not await self.conn.fetchval(
                f"select exists (select from {self.schema}.watched_tables() where app = $1)", self.app.name):
            yield
            return
        trial = self.conn.transaction()
        await trial.start()
        try:
            async with asyncio.timeout(_TRY_SECONDS):
                yield
        finally:
            await trial.rollback()

    # Anton's own

    async def _framework(self) -> bool:
        """False when a plan has to end here."""
        fresh = await self.conn.fetchval("select to_regnamespace($1) is null", self.schema)
        if fresh:
            await self._make_schema()
        else:
            owner = await self.conn.fetchval(
                "select pg_get_userbyid(nspowner) from pg_namespace where oid = to_regnamespace($1) "
                "and pg_has_role(current_user, nspowner, 'member') and nspowner::regrole::text <> current_user",
                self.schema)
            self.owner = (f"role {quote(owner)}",) if owner else ()
        settings = (f"lock_timeout = '{LOCK_TIMEOUT}'", *self.owner,
                    f"search_path = {self.schema}, pg_catalog, pg_temp")
        if await self.conn.fetchval("select to_regclass($1) is null", f"{self.schema}.migration"):
            await self.step(Step("the record of what was run", _MIGRATION_TABLE, settings), vital=True)
        done = await self._done("anton")
        files = sqlfile.read(share("migrations"))
        unknown = sorted(name for name in done if name.startswith("migrations/"))
        unknown = [name for name in unknown if name not in {file.name for file in files}]
        if unknown:
            raise MigrationError(f'database "{self.db.name}" was migrated by a newer Anton: this one does not have '
                                 f'{", ".join(unknown)}. Upgrade anton-framework, and run again: anton migrate')
        try:
            pending = self._pending(files, done)
        except FrozenChanged as error:
            raise MigrationError(
                f'database "{self.db.name}" was migrated by an Anton whose {error.file} is not that of this release. '
                "Released ones never change: it was a version between releases. Start with another database, or drop "
                f"all that the runtime keeps, and run anton migrate again: drop schema {self.schema} cascade;",
                name=error.file) from error
        if pending and self.dry and done:                              # tried here, they would lock the queue in use
            for file in pending:
                self.plan.steps.append(self._migration(file, "anton", settings))
            self.plan.steps.append(self._folder("anton", sqlfile.read(share("sql")), settings))
            return False
        for file in pending:
            await self.step(self._migration(file, "anton", settings), file.name, vital=True)
        if pending and not done:
            place = await self.conn.fetchval("select current_schema()")
            if place not in (None, "public", self.db.schema):
                await self.step(Step("where unqualified table names point", "update setting set value = "
                                     f"{literal(place)} where name = 'app_schema'", settings), vital=True)
        again = sqlfile.read(share("sql"))
        if pending or self._changed(again, done):
            await self._functions(again, settings)
        return True

    async def _functions(self, files: Sequence[SqlFile], settings: tuple[str, ...]) -> None:
        """Runs sql/. What Postgres does not replace, as its result is another one now, is dropped before.

        Never what somebody else's view or column uses: that is said.
        """
        drops: list[str] = []
        while True:
            try:
                await self.step(self._folder("anton", files, settings, drops), SQL_FOLDER, vital=True)
                return
            except MigrationFailed as error:
                drop = _in_the_way(error.__cause__)
                if drop is None or drop in drops:
                    if not isinstance(error.__cause__, asyncpg.DependentObjectsStillExistError):
                        raise
                    users = str(error.__cause__.detail).replace("\n", "\n  ")
                    raise MigrationError(f"this release makes functions of schema {self.schema} anew, and others use "
                                         f"what it has to drop for that:\n  {users}\nDrop these, run again: anton "
                                         "migrate, and make them again.", name=users) from error
                drops.insert(0, drop)

    async def _make_schema(self) -> None:
        """The schema, owned by a role that nobody logs in as when one can be made."""
        owner = f"{self.db.schema}_owner"
        row = await self.conn.fetchrow(
            "select (select rolcreaterole or rolsuper from pg_roles where rolname = current_user) as may, "
            "exists (select from pg_roles where rolname = $1) as there, "
            "exists (select from pg_roles where rolname = $1 and not rolsuper and not rolcanlogin "
            "        and pg_has_role(current_user, oid, 'member')) as mine", owner)
        assert row is not None
        body = []
        if not row["there"] and row["may"]:
            body = [f"create role {quote(owner)} nologin",
                    *([] if await self._superuser() else [f"grant {quote(owner)} to {quote(self.me)}"])]
        if body:
            try:
                await self.step(Step("the role that owns the runtime", ";\n".join(body)), vital=True)
            except MigrationFailed as error:
                if not isinstance(error.__cause__, (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError)):
                    raise                                              # else another database's migrate was quicker
        elif not row["mine"]:
            make = "" if row["there"] else f"create role {quote(owner)} nologin; "
            self.plan.notes.append(
                f'the runtime belongs to "{self.me}". For an owner that nobody logs in as, let someone who may run, '
                f"before the first migrate: {make}grant {quote(owner)} to {quote(self.me)};")
        mine = row["mine"] or bool(body)
        self.owner = (f"role {quote(owner)}",) if mine else ()
        authorization = f" authorization {quote(owner)}" if mine else ""
        await self.step(Step("the schema of the runtime", f"create schema {self.schema}{authorization}"), vital=True)

    async def _superuser(self) -> bool:
        return bool(await self.conn.fetchval("select rolsuper from pg_roles where rolname = current_user"))

    # An app's files

    async def _app_steps(self) -> list[tuple[Step, str]]:
        """Its migrations that have not run, and its sql/ when that changed, each with its file's name."""
        name, settings = f"app:{self.app.name}", (f"lock_timeout = '{LOCK_TIMEOUT}'",)
        done = await self._done(name)
        steps: list[tuple[Step, str]] = []
        for file in self._pending(self._read("migrations"), done):
            if file.transaction:
                steps.append((self._migration(file, name, settings), file.name))
            else:
                steps.append((Step(file.name, file.text, settings, transaction=False), file.name))
                steps.append((Step(f"{file.name} was run", self._record(name, [file])), ""))
        again = self._read("sql")
        self.files = [file for file in again if file.kind in ("handler", "schedule", "model")]
        again = [file for file in again if not file.kind]
        if self._changed(again, done) or (steps and again):
            steps.append((self._folder(name, again, settings), SQL_FOLDER))
        return steps

    async def _run_files(self, steps: Sequence[tuple[Step, str]]) -> Step | None:
        """Runs them. Returns the sql/ folder when it needs the declared tables first."""
        for step, file in steps:
            self.postpone = True
            try:
                await self.step(step, file)
            except NOT_YET:
                return step                                            # only sql/ raises these, and it is the last
            finally:
                self.postpone = False
        return None

    def _read(self, folder: str) -> list[SqlFile]:
        path = self.app.folder / folder
        own = path.resolve() == share(folder).resolve()                # in a checkout of Anton these are not the app's
        return [] if own else sqlfile.read(path)

    async def _done(self, set_name: str) -> dict[str, str]:
        """What of a set was run: name to sha256."""
        if await self.conn.fetchval("select to_regclass($1) is null", f"{self.schema}.migration"):
            return {}
        rows = await self.conn.fetch(f"select name, sha256 from {self.schema}.migration where set_name = $1", set_name)
        return {row["name"]: row["sha256"] for row in rows}

    def _pending(self, files: Sequence[SqlFile], done: dict[str, str]) -> list[SqlFile]:
        for file in files:
            if done.get(file.name, file.sha256) != file.sha256:
                raise FrozenChanged(file.name)
        return [file for file in files if file.name not in done]

    def _changed(self, files: Sequence[SqlFile], done: dict[str, str]) -> bool:
        before = {name: sha for name, sha in done.items() if name.startswith("sql/")}
        return before != {file.name: file.sha256 for file in files}

    def _migration(self, file: SqlFile, set_name: str, settings: tuple[str, ...]) -> Step:
        return Step(file.name, f"{file.text.rstrip()}\n{self._record(set_name, [file])}", settings)

    def _folder(self, set_name: str, files: Sequence[SqlFile], settings: tuple[str, ...],
                drops: Sequence[str] = ()) -> Step:
        texts = [*drops, *(f"-- {file.name}\n{file.text.rstrip()}" for file in files)]
        forget = f"delete from {self.schema}.migration where set_name = {literal(set_name)} and name like 'sql/%';"
        return Step("sql/, all of it", "\n\n".join((*texts, forget + "\n" + self._record(set_name, files))), settings)

    def _record(self, set_name: str, files: Sequence[SqlFile]) -> str:
        if not files:
            return ""
        rows = ",\n  ".join(f"({literal(set_name)}, {literal(file.name)}, '{file.sha256}')" for file in files)
        return f"insert into {self.schema}.migration (set_name, name, sha256) values\n  {rows};"


_MIGRATION_TABLE = """create table if not exists migration (
  set_name text not null,
  name text not null,
  sha256 text not null,
  at timestamptz not null default clock_timestamp(),
  primary key (set_name, name)
)"""


_VIEW = "drop view if exists status;"                                  # it uses functions, and is made again


def _in_the_way(error: BaseException | None) -> str | None:
    """What to drop, so that this CREATE OR REPLACE goes through; its hint names the function."""
    if isinstance(error, asyncpg.InvalidTableDefinitionError):         # other columns
        return _VIEW
    if isinstance(error, asyncpg.DependentObjectsStillExistError):
        return _VIEW if str(error.detail).startswith("view status depends") else None
    named = re.search(r"DROP FUNCTION (.*\))", str(getattr(error, "hint", None) or ""))
    return f"drop function {named[1]};" if isinstance(error, asyncpg.InvalidFunctionDefinitionError) and named else None


def _together(errors: Sequence[AntonError]) -> AntonError:
    return errors[0] if len(errors) == 1 else MigrationError("\n\n".join(str(error) for error in errors), errors=errors)
