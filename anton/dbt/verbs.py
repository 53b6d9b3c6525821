"""Verbs: what `anton dbt …` does. What dbt has by the same name gets its arguments as they are typed."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anton.app import current_app, load_app
from anton.db import Database
from anton.dbt.init import FILE, KINDS, hooks_missing, init, stamp
from anton.dbt.lineage import relation
from anton.dbt.manifest import Manifest
from anton.dbt.project import DbtProject
from anton.dbt.requests import alone
from anton.dbt.runner import BUILDS, Done, Heard, Logs, Runner, note, told
from anton.errors import ConfigError, did_you_mean
from anton.status import Row, ask, layout
from anton.verbs import FOUND, OK, emit, open_app_database, query

Args = argparse.Namespace

PATHS = ("--state", "--defer-state")  # options that name a folder, as seen from where the command is typed
SET = {                                                                # dbt's options that are Anton's, and what to do
    "--target": 'it is "{target}", of DbtProject(target=…). Give another one there',
    "--profile": "Anton makes it, of its own database. For another one: --database URL",
    "--profiles-dir": "Anton makes the profile, of its own database. For another one: --database URL",
    "--project-dir": "it is {folder}. For another project: --project NAME, or its path",
    "--target-path": "it is a folder of {home}, which no other run uses at that time. Read it there",
    "--log-path": "it is a folder of {home}. What dbt said of a model: anton dbt log MODEL",
}
PASSED = {
    "run": "Build models, as dbt run: anton dbt run --select revenue+.",
    "build": "Build models, seeds and snapshots, and test them, as dbt build.",
    "test": "Run tests, as dbt test.",
    "seed": "Load seeds, as dbt seed.",
    "snapshot": "Take snapshots, as dbt snapshot.",
    "ls": "List what is in the project, as dbt ls.",
    "compile": "Compile without building, as dbt compile.",
    "show": "Show what a model would hold, as dbt show.",
    "deps": "Fetch packages, as dbt deps.",
}
_RUNS = ("id", "project", "state", "requests", "models", "seconds", "started_at", "error")
_CHANGES = ("at", "model", "materialized", "changed", "new", "updated", "deleted", "note")


def passes(name: str) -> Any:
    """The verb that hands one of dbt's commands on."""
    def run(args: Args) -> int:
        return _pass(name, args)

    run.__doc__ = PASSED[name]
    return run


def dbt_init(args: Args) -> int:
    """Put Anton's macros and two lines into a dbt project, or make one. Again after an update of Anton."""
    folder = Path(args.folder)
    done = init(folder)
    emit(args, {"folder": str(folder), "done": done}, "\n".join(done) or f"{folder} is up to date")
    return OK


def dbt_lineage(args: Args) -> int:
    """Show what models are made of and what is made of them: anton dbt lineage [MODEL]."""
    project, db = _project(args), open_app_database(args)

    async def look() -> Manifest:
        try:
            return await project.examine(db, await _schema(project, db))
        finally:
            await db.close()

    manifest = asyncio.run(look())
    made = project.graph().columns
    if args.model:
        node = manifest.node(args.model)
        nodes = [node, *(manifest.nodes[id] for id in sorted(manifest.upstream([node.id])))]
    else:
        nodes = sorted(manifest.nodes.values(), key=lambda node: node.id)
    facts = [{"model": node.name, "type": node.type, "materialized": node.materialized,
              "relation": f"{node.schema}.{node.alias}",
              "key": list(node.key), "reads": sorted(map(_short(manifest), node.parents)),
              "read_by": sorted(map(_short(manifest), manifest.children(node.id))),
              "columns": {column: sorted(map(".".join, sources)) for (table, column), sources in made.items()
                          if table == relation(manifest, node.id)}} for node in nodes]
    emit(args, facts, "\n".join(_drawn(one) for one in facts) or "no models")
    return OK


def dbt_changes(args: Args) -> int:
    """Show the last builds of a model and what each changed."""
    rows = query(args, lambda db, conn: ask(db, conn, "list_builds", args.model, args.limit))
    emit(args, rows, layout(rows, _CHANGES) if rows else "no builds with Anton's hooks yet")
    return OK


def dbt_runs(args: Args) -> int:
    """List the last runs that the app asked for, the newest first."""
    rows = query(args, lambda db, conn: ask(db, conn, "list_dbt_runs", None, args.limit))
    emit(args, rows, layout(rows, _RUNS) if rows else "none")
    return OK


def dbt_log(args: Args) -> int:
    """Show what dbt said of a model in its last runs, the newest last."""
    rows = query(args, lambda db, conn: ask(db, conn, "list_dbt_log", args.model, args.limit))
    emit(args, rows, "\n".join(f"run {row['run']}, {row['at']:%Y-%m-%d %H:%M:%S} UTC: {row['status']}\n"
                               + (row["log"] or row["message"] or "") for row in rows) or "none")
    return OK


def dbt_cancel(args: Args) -> int:
    """End runs: their queries in Postgres, and dbt. No id: all that run. They are not tried again.

    --waiting: also what is asked for and does not run yet.
    """
    db = open_app_database(args)

    async def cancel() -> tuple[list[Row], list[Row], set[int]]:
        try:
            async with db.tx() as conn:
                waited = await ask(db, conn, "dbt_cancel_waiting", current_app().name) if args.waiting else []
                rows = await ask(db, conn, "dbt_cancel", args.ids)
            async with db.conn() as conn:
                ended = await db.call(conn, "dbt_end_holders", [row["id"] for row in rows if row["problem"] is None])
            return rows, waited, {row[0] for row in ended}
        finally:
            await db.close()

    rows, waited, ended = asyncio.run(cancel())
    lacking = sorted(set(args.ids) - {row["id"] for row in rows})
    for row in rows:
        row["state"] = "running" if row["problem"] else "cancelled"
    lines = [*(_cancelled(row, row["id"] in ended) for row in rows), *(f"run {id} is not running" for id in lacking),
             *(f"request {row['id']} of {row['project']} is cancelled before it ran" for row in waited)]
    facts = [*rows, *({"request": row["id"], "project": row["project"], "state": "cancelled"} for row in waited)]
    emit(args, facts, "\n".join(lines) or "nothing runs")
    return FOUND if lacking or any(row["problem"] for row in rows) else OK


def _cancelled(row: Row, ended: bool) -> str:
    run = f"run {row['id']} of {row['app']}.{row['project']}"
    if row["problem"]:
        return f"{run} goes on: {row['problem']}"
    return f"{run} is cancelled" + ("" if ended else ": who ran it was gone already")


def findings(module: str | None) -> list[Row]:
    """For anton doctor: projects whose macros are of another version, or whose hooks are not all there."""
    found = []
    try:
        projects = list(load_app(module).projects.values())
    except Exception as error:                                         # the rest of the examination needs no app
        return [{"kind": "app", "subject": module or "main", "problem": f"cannot be loaded: {error}",
                 "remedy": "mend it"}]
    for project in projects:
        have, came = stamp(project.folder)
        text = (project.folder / FILE).read_text()
        missing = hooks_missing(text)
        subject = project.folder.name
        if have is None and len(missing) == len(KINDS):                # Anton adds them in memory when it runs dbt
            continue
        if have is None:
            found.append(_finding(subject, f"{FILE} has Anton's hooks, and the macros are not there"))
        elif have != came:
            found.append(_finding(subject, f"has Anton's macros in version {have}; this Anton has {came}"))
        elif missing:
            found.append(_finding(subject, f"{FILE} lacks Anton's hooks under {', '.join(missing)}"))
    return found


def _finding(subject: str, problem: str) -> Row:
    return {"kind": "dbt", "subject": subject, "problem": problem, "remedy": f"anton dbt init {subject}"}


def _pass(verb: str, args: Args) -> int:
    project = _project(args)
    _check(verb, args.passed, project)
    db = open_app_database(args)
    try:
        done = asyncio.run(_run(project, db, [verb, *_absolute(args.passed)], quiet=args.json or verb == "ls"))
    except KeyboardInterrupt:
        print("anton: cancelled", file=sys.stderr)
        return FOUND
    if args.json:
        facts: list[Any] = [*done.lines] or [
            {"node": one.node, "status": one.status, "seconds": one.seconds, "message": one.message}
            for one in done.results]
        emit(args, {"success": done.success, "error": done.error, "results": facts}, "")
    else:
        for line in done.lines:
            print(line)
        if done.error:
            print(f"anton: {done.error}", file=sys.stderr)
    return OK if done.success else FOUND


async def _run(project: DbtProject, db: Database, words: list[str], quiet: bool) -> Done:
    """One command with its progress as it comes. What builds, waits until nobody else builds the project."""
    def heard(event: dict[str, Any]) -> None:
        shown = event["level"] in ("info", "warn", "error") and event["event"] not in ("Formatting", "ListCmdOut")
        if shown and not quiet:
            print(event["text"], flush=True)

    try:
        async with db.conn() as conn:
            migrated = bool(await conn.fetchval("select to_regproc($1) is not null", f"{db.schema}.dbt_lock"))
        async with project.runner(db, await _schema(project, db) if migrated else project.schema or "public") as runner:
            runner.migrated = migrated
            if words[0] not in BUILDS or not migrated:
                return await runner.invoke(words, heard=heard, keep=True)
            return await _build(project, db, runner, words, heard)
    finally:
        await db.close()


async def _build(project: DbtProject, db: Database, runner: Runner, words: list[str], heard: Heard) -> Done:
    """Builds when nobody else does, as a run that `anton dbt runs` shows and `anton dbt cancel` ends."""
    logs: Logs = {}

    def both(event: dict[str, Any]) -> None:
        note(logs, event)
        heard(event)

    async with alone(db, runner.application) as (lost, holder):
        async with db.tx() as conn:
            run = await db.call_value(conn, "dbt_open", project.app.name, project.name, holder, runner.application)
        work = asyncio.ensure_future(runner.invoke(words, heard=both, keep=True))
        either: set[asyncio.Future[Any]] = {work, lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():                                        # the lock was lost, or we are to end
                work.cancel()
                await asyncio.wait({work})
                async with db.tx() as conn:
                    if not await db.call_value(conn, "dbt_cancelled", run):
                        await db.call(conn, "dbt_finish", run, "failed", "it was ended", [], [])
        if work.cancelled():
            return Done(False, f"run {run} was cancelled, or its connection broke: dbt was ended", cancelled=True)
        done = work.result()
        async with db.tx() as conn:
            state = "done" if done.success else "failed"
            await db.call(conn, "dbt_finish", run, state, done.error, [], told(done.results, logs))
    await _tell(db, project, done)
    return done


async def _tell(db: Database, project: DbtProject, done: Done) -> None:
    """on_failed, for models that the app declares."""
    async with db.tx() as conn:
        for one in done.results:
            if not one.ok and one.type in ("model", "seed", "snapshot"):
                await db.call(conn, "dbt_failed", project.name, one.node, one.message or one.status, one.status,
                              done.invocation)


def _check(verb: str, words: Iterable[str], project: DbtProject) -> None:
    """Raises ConfigError for an option of dbt's that Anton sets, as what was typed would not hold."""
    for word in words:
        option = "--target" if word.startswith("-t") else word.partition("=")[0]
        if option in SET:
            why = SET[option].format(target=project.target, folder=project.folder,
                                     home=project.app.folder / ".anton" / "dbt")
            raise ConfigError(f"anton dbt {verb} {word}: Anton sets {option}: {why}", option=option)


def _absolute(words: Iterable[str]) -> list[str]:
    """dbt's arguments; it runs in the project's folder, and who typed them is perhaps in another."""
    found: list[str] = []
    for word in words:
        option, equals, path = word.partition("=")
        if found and found[-1] in PATHS:
            found.append(str(Path(word).resolve()))
        else:
            found.append(f"{option}={Path(path).resolve()}" if equals and option in PATHS else word)
    return found


async def _schema(project: DbtProject, db: Database) -> str:
    return await project.schema_in(db)


def _project(args: Args) -> DbtProject:
    """The app's project; or a folder with a dbt_project.yml, where the app declares none."""
    app = load_app(args.app)
    known = {project.name: project for project in app.projects.values()}
    named = getattr(args, "project", None)
    if named and named in known:
        return known[named]
    if not named and len(known) == 1:
        return next(iter(known.values()))
    if not named and len(known) > 1:
        raise ConfigError(f"the app has several dbt projects: say which: --project {' | '.join(known)}")
    for folder in ([named] if named else ["dbt_project", "."]):
        if (Path(folder) / FILE).is_file():
            return DbtProject(Path(folder).resolve())
    if named:
        raise ConfigError(f'there is no dbt project "{named}".{did_you_mean(named, known)} Known: '
                          f"{', '.join(known) or 'none'}, or the path of a folder with a {FILE}")
    raise ConfigError(f"{current_app()!r} declares no DbtProject, and there is no {FILE} in dbt_project/ or here. "
                      "anton dbt init makes one")


def _short(manifest: Manifest) -> Any:
    def short(id: str) -> str:
        if id in manifest.nodes:
            return manifest.nodes[id].name
        source = manifest.sources.get(id)
        return f"{source['schema']}.{source['alias']}" if source else id

    return short


def _drawn(one: Row) -> str:
    def told(names: Iterable[str]) -> str:
        return ", ".join(names) or "nothing"

    return (f"{one['model']}  {one['materialized']} {one['relation']}"
            f"\n  from {told(one['reads'])}\n  into {told(one['read_by'])}"
            + "".join(f"\n  {column} <- {told(sources)}" for column, sources in one["columns"].items()))
