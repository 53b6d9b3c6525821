"""Requests: what the handler dbt:PROJECT does. All that was asked of a project by now becomes one run of dbt.

    dbt_begin() takes the requests  ->  dbt builds, each model in its own transaction  ->  dbt_finish()
    ->  dbt_settle() settles the requests with the ack

Tests that gate are run inside of the builds (gate.py), the others after them. One run of a project and target at a
time, by a lock that ends with the connection. A worker that dies leaves its requests to the next one, which ends what
is left of dbt's sessions and builds again. `anton dbt cancel` ends the session that holds the lock: the worker stops
dbt, and tries no more. A model that fails is told by its on_failed; when dbt cannot read the project at all, the
requests wait, and the handler tries again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from anton.ctx import Ctx
from anton.db import Conn, Database, split_name
from anton.dbt.gate import after, compiled, gates
from anton.dbt.manifest import Manifest
from anton.dbt.runner import Done, Logs, Result, Runner, note, told
from anton.errors import DbtFailed, DeclarationError, WorldError
from anton.op import WHOLE, Call
from anton.write import scope

if TYPE_CHECKING:
    from anton.dbt.project import DbtProject

log = logging.getLogger("anton.dbt")

TIMEOUT = 3600.0  # seconds of a run, unless a request says otherwise
TRIES = 3  # of a model that met a lock or a connection that broke
WORTH = 0.2  # seconds: what building a level by itself may cost
KINDS = ("--resource-type", "model", "--resource-type", "seed", "--resource-type", "snapshot")
PASSING = re.compile(r"deadlock detected|could not serialize|lock timeout|terminating connection|server closed|"
                     r"could not connect|connection to server|the database system is|SSL connection has been closed",
                     re.IGNORECASE)


@dataclass
class Wish:
    """Requests that one invocation can carry out. ids: of them. gate, full_refresh, vars: what they have in common."""

    gate: bool
    full_refresh: bool
    vars: dict[str, Any]
    ids: list[int] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)
    dirty: set[str] = field(default_factory=set)                       # what changed, of those that only run_when asked
    whole: set[str] = field(default_factory=set)                       # nodes that were asked for by name


class Requests:
    """Works the requests of a project, one run at a time, with a warm child that stays between them."""

    def __init__(self, project: DbtProject) -> None:
        self.project = project
        self.seconds: dict[str, float] = {}                            # how long each node took last
        self._runner: Runner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._guard: AsyncGenerator[None] | None = None
        self._built: set[str] = set()                                  # by the run that is going on

    async def __call__(self, records: Any, ctx: Ctx | None = None) -> None:
        """One batch of the handler."""
        current = scope.get()
        assert current is not None                                     # the worker's
        db = current.db
        runner = await self.runner(db, await self.project.schema_in(db))
        ids = [record.id for record in records]
        async with alone(db, runner.application) as (lost, holder):
            async with db.tx() as conn:
                rows = await db.call(conn, "dbt_begin", self.project.app.name, self.project.name, ids, holder,
                                     runner.application)
            if not rows:
                return                                                 # another run built them
            work = asyncio.ensure_future(self._run(db, runner, rows))
            try:
                await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    work.cancel()
                    await asyncio.wait({work})
                    async with db.tx() as conn:
                        if await db.call_value(conn, "dbt_cancelled", rows[0]["run_id"]):
                            await self._tell_cancelled(db, conn, rows)
                            return
                    raise WorldError("the connection that held the lock of the dbt project broke; its run was ended")
                settle = work.result()
            finally:
                if not work.done():
                    work.cancel()
                    await asyncio.wait({work})
            current.add(Call(f"dbt {self.project.name}", settle, WHOLE))

    async def runner(self, db: Database, schema: str) -> Runner:
        """The child of this loop, which stays as long as the loop does. schema: of the models."""
        loop = asyncio.get_running_loop()
        if self._runner is None or self._loop is not loop or (self._runner.db, self._runner.schema) != (db, schema):
            self._runner = self.project.runner(db, schema)
            self._loop, self._guard = loop, _close_with_loop(self._runner)
            await anext(self._guard)
        return self._runner

    async def _tell_cancelled(self, db: Database, conn: Conn, rows: Sequence[Any]) -> None:
        """on_failed, for the models that were asked for and not built by then."""
        manifest = self.project.manifest
        log.warning("dbt %s: run %s was cancelled", self.project.name, rows[0]["run_id"])
        if manifest is not None:
            for id in sorted({id for wish in wishes_of(manifest, rows)[0] for id in wish.nodes} - self._built):
                await db.call(conn, "dbt_failed", self.project.name, id, "cancelled", "cancelled", None)

    async def _run(self, db: Database, runner: Runner, rows: Sequence[Any]) -> Any:
        """Builds what the requests want, and finishes the run while nobody else can begin one.

        Returns what settles the requests in the transaction of the ack.
        """
        run, project = rows[0]["run_id"], self.project
        self._built.clear()
        try:
            manifest = await project.examine(db, runner.schema)
            wishes, refused = wishes_of(manifest, rows)
            results: dict[str, Result] = {}
            logs: Logs = {}
            errors: dict[int, str] = dict(refused)
            invocation = None
            for wish in wishes:
                done = await self._build(db, runner, manifest, wish, rows, logs)
                for one in done.results:
                    results[one.node] = one
                invocation = done.invocation or invocation
                if not done.success:
                    errors |= dict.fromkeys(wish.ids, done.error or "; ".join(
                        f"{one.name}: {one.message.splitlines()[0] if one.message else one.status}"
                        for one in done.results if one.status in ("error", "fail")))
        except DbtFailed as error:
            async with db.tx() as conn:
                await db.call(conn, "dbt_put_back", run, str(error), project.name, self._named(rows))
            raise
        self.seconds |= {one.node: one.seconds for one in results.values() if one.ok}
        failed = [{"node": one.node, "status": one.status, "message": one.message or one.status}
                  for one in results.values() if not one.ok and one.node in manifest.nodes]
        for one in results.values():                                   # of tests, on_failed of the models they read
            if one.status in ("error", "fail") and one.node in manifest.tests:
                failed += [{"node": id, "status": "test", "message": f"test {one.name} failed after the build, which "
                            f"is served, as the test reads models that are built side by side: {one.message}"}
                           for id in sorted(manifest.reads_of_test(one.node) & self._built)]
        summary = "; ".join(dict.fromkeys(errors.values())) or None
        if summary is not None:
            log.warning("dbt %s: %s", project.name, summary)

        async with db.tx() as conn:
            await db.call(conn, "dbt_finish", run, "failed" if errors else "done", summary, None,
                          told(results.values(), logs))

        async def settle(conn: Conn) -> bool:
            if not await db.call_value(conn, "dbt_settle", run, list(errors), summary):
                return False
            for one in failed:
                await db.call(conn, "dbt_failed", project.name, one["node"], one["message"], one["status"], invocation)
            return True

        return settle

    def _named(self, rows: Iterable[Any]) -> list[str]:
        """Models, by dbt's ids, that requests name, as far as the project was ever read."""
        manifest = self.project.manifest
        if manifest is None:
            return []
        names = {name for row in rows for name in row["models"]}
        return sorted(node.id for node in manifest.nodes.values() if node.name in names or node.id in names)

    async def _build(self, db: Database, runner: Runner, manifest: Manifest, wish: Wish, rows: Sequence[Any],
                     logs: Logs) -> Done:
        """One invocation, or one for each level where leaving out what has not changed is likely to pay."""
        if not wish.nodes:
            return Done(True)
        loop = asyncio.get_running_loop()
        until = loop.time() + max((row["timeout"].total_seconds() if row["timeout"] is not None else TIMEOUT
                                   for row in rows if row["id"] in wish.ids), default=TIMEOUT)
        settings = _settings(rows, wish)

        built = set[str]()

        def heard(event: dict[str, Any]) -> None:
            note(logs, event)
            if event["event"] == "NodeFinished" and event.get("status") == "success":
                built.add(event["node"])
                self._built.add(event["node"])

        async def build(ids: Collection[str]) -> Done:
            args = ["build", "--select", *sorted(_selector(manifest, id) for id in ids), *KINDS]
            args += ["--full-refresh"] if wish.full_refresh else []
            args += _given(wish)
            done = await runner.invoke(args, seconds=max(0.1, until - loop.time()), heard=heard, alone=len(ids) == 1,
                                       settings=settings)
            if done.error is None:
                return done
            # it broke as a whole, or took too long: dbt says nothing of single nodes, but what it finished is built
            broken = [_result(manifest, id, *(("success", "") if id in built else ("error", done.error))) for id in ids]
            return replace(done, results=broken)

        wish = replace(wish, nodes=await self._due(db, manifest, wish))
        if not wish.gate:
            return await self._ordered(db, manifest, wish, build)
        gate, stale = gates(manifest, wish.nodes)
        wrong = await self._put_tests(db, runner, manifest, wish, gate, until - loop.time())
        if wrong is not None:                                          # of this wish alone: others are built
            return Done(False, wrong, results=[_result(manifest, id, "error", wrong) for id in sorted(wish.nodes)])
        done = await self._ordered(db, manifest, wish, build)
        skipped = [_test(manifest, id, "skipped", "it reads what is made of this, and not built by this run")
                   for id in sorted(stale)]
        done = replace(done, results=[*done.results, *skipped])
        ok = {one.node for one in done.results if one.ok}
        late = after(manifest, gate, ok, {one.node for one in done.results} - ok)
        if done.error is not None or not late:
            return done
        tested = await runner.invoke(["test", *_chosen(manifest, late), *_given(wish)], heard=heard,
                                     seconds=max(0.1, until - loop.time()))
        results = tested.results or [_test(manifest, id, "error", tested.error or "dbt did not run it") for id in late]
        return replace(done, success=done.success and tested.success, results=[*done.results, *results])

    async def _due(self, db: Database, manifest: Manifest, wish: Wish) -> set[str]:
        """What is to be built: of what run_when() of a model asks for, nothing that has seen all changes of that."""
        models = wish.dirty & set(manifest.nodes)
        if not models:
            return wish.nodes
        behind = await self._behind(db, manifest, wish.nodes)
        first = {id for id in wish.nodes if id in behind or manifest.reads(id) & (wish.dirty - models)}
        return wish.whole | first | manifest.downstream(first) & wish.nodes

    async def _behind(self, db: Database, manifest: Manifest, ids: Collection[str]) -> set[str]:
        """Those that have not seen all builds of what they read, views being looked through."""
        async with db.conn() as conn:
            rows = await db.call(conn, "dbt_behind", manifest.project, {id: sorted(manifest.reads(id)) for id in ids})
        return {row["unique_id"] for row in rows}

    async def _ordered(self, db: Database, manifest: Manifest, wish: Wish, build: Any) -> Done:
        """Builds at once, or by levels where that pays."""
        if not wish.nodes:
            return Done(True)
        if not self._pays(manifest, wish):
            return await self._patiently(build, wish.nodes)
        return await self._by_levels(db, manifest, wish, build)

    def _pays(self, manifest: Manifest, wish: Wish) -> bool:
        """Whether building level by level is likely to save more than it costs."""
        levels = manifest.levels(wish.nodes - wish.whole)
        after = {id for level in levels[1:] for id in level}
        return bool(wish.dirty) and bool(after) and sum(
            self.seconds.get(id, 0.0) for id in after) > WORTH * (len(levels) - 1)

    async def _by_levels(self, db: Database, manifest: Manifest, wish: Wish, build: Any) -> Done:
        """Level by level; a node is left out that has seen all changes of its parents, of this run and of others."""
        changed, results, success, invocation, error = set(wish.dirty), list[Result](), True, None, None
        failed: set[str] = set()
        behind = await self._behind(db, manifest, wish.nodes)
        for level in manifest.levels(wish.nodes):
            due = [id for id in level if id in wish.whole or id in behind or manifest.reads(id) & changed]
            stopped = [id for id in due if manifest.reads(id) & failed]
            results += [_result(manifest, id, "skipped", "what it is made of failed") for id in stopped]
            failed |= set(stopped)
            due = [id for id in due if id not in failed]
            if not due:
                continue
            done = await self._patiently(build, due)
            results += done.results
            invocation, success, error = done.invocation or invocation, success and done.success, error or done.error
            if done.error is not None:
                break
            async with db.conn() as conn:
                rows = await db.call(conn, "dbt_unchanged", manifest.project, done.invocation)
            same = {row["unique_id"] for row in rows}
            for one in done.results:
                if one.ok:
                    changed |= set() if one.node in same else {one.node}
                else:
                    failed.add(one.node)
        return Done(success, error, results=results, invocation=invocation)

    async def _patiently(self, build: Any, ids: Collection[str]) -> Done:
        """Builds; what met a lock, or a server that was away, is built again."""
        done: Done = await build(ids)
        results = {one.node: one for one in done.results}
        for attempt in range(1, TRIES):
            again = [one.node for one in results.values() if one.status == "error" and PASSING.search(one.message)]
            if not again or done.error is not None:
                break
            again += [one.node for one in results.values() if one.status == "skipped"]
            await asyncio.sleep(0.2 * 2 ** attempt)
            done = await build(again)
            results |= {one.node: one for one in done.results}
        ok = done.error is None and all(one.ok for one in results.values())
        return Done(ok, done.error, done.parse, done.cancelled, list(results.values()), invocation=done.invocation)

    async def _put_tests(self, db: Database, runner: Runner, manifest: Manifest, wish: Wish, gate: Mapping[str, str],
                         left: float) -> str | None:
        """Puts the tests that gate these models where their builds run them: compiled anew, for this run alone.

        Returns what is wrong with them, so that nothing may be built that they gate.
        """
        tests = sorted(id for id, model in gate.items() if model)
        found: list[dict[str, Any]] = []
        if tests:
            done = await runner.invoke(["compile", *_chosen(manifest, tests), *_given(wish)], seconds=max(0.1, left),
                                       alone=True)
            found = compiled(gate, done.raw)
            if not done.success or len(found) < len(tests):
                lack = sorted({manifest.tests[id]["name"] for id in tests} - {test["name"] for test in found})
                said = done.error or "; ".join(one.message for one in done.results if not one.ok) or ", ".join(lack)
                wrong = f"dbt cannot compile the tests of {self.project.name}: {said}"
                if PASSING.search(said):
                    raise DbtFailed(wrong, project=self.project.name)
                return wrong
        async with db.tx() as conn:
            await db.call(conn, "dbt_put_tests", manifest.project, sorted(wish.nodes), found)
        return None


def wishes_of(manifest: Manifest, rows: Iterable[Any]) -> tuple[list[Wish], dict[int, str]]:
    """What requests want, as few wishes as can be, in the order they were made; and why some cannot be had."""
    wishes: dict[tuple[Any, ...], Wish] = {}
    refused: dict[int, str] = {}
    for row in rows:
        try:
            named = {manifest.node(name).id for name in row["models"]}
        except DeclarationError as error:
            refused[row["id"]] = str(error)
            continue
        kind = row["gate"], row["full_refresh"], _json(row["vars"])
        wish = wishes.setdefault(kind, Wish(row["gate"], row["full_refresh"], row["vars"]))
        wish.ids.append(row["id"])
        if row["tables"]:
            sources = manifest.of_tables(_table(name) for name in row["tables"])
            wish.dirty |= sources
            below = manifest.downstream(sources)
            wish.nodes |= {id for id in below if _buildable(manifest, id)}
        if row["models"] or not row["tables"]:
            wanted = named or set(manifest.nodes)
            wanted |= manifest.upstream(wanted) if row["upstream"] else set()
            wish.whole |= {id for id in wanted if _buildable(manifest, id)}
            wish.nodes |= wish.whole
    return list(wishes.values()), refused


@asynccontextmanager
async def alone(db: Database, name: str) -> AsyncIterator[tuple[asyncio.Future[None], int]]:
    """Waits until nobody else runs this project. Yields what is done when the lock is lost, and the server's process.

    A transaction's lock, so that it holds behind a pooler; the server lets go of it when this process dies.
    """
    conn = await db.connect()
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    conn.add_termination_listener(lambda _: None if lost.done() else lost.set_result(None))
    pause = 0.02
    try:
        while True:                                                    # waiting inside the lock would hold a snapshot
            turn = conn.transaction(isolation="read_committed")
            await turn.start()
            holder = await db.call_value(conn, "dbt_lock", name)
            if holder is not None:
                break
            await turn.rollback()
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 1.5)
        await conn.execute("select")                                   # closes the portal, which holds a snapshot
        yield lost, holder
        if not conn.is_closed():
            await turn.rollback()
    finally:
        await conn.close()
        lost.cancel()


async def _close_with_loop(runner: Runner) -> AsyncGenerator[None]:
    """Ends the child when it is closed itself, which an ending loop does (shutdown_asyncgens)."""
    try:
        yield
    finally:
        await runner.close()


def _settings(rows: Iterable[Any], wish: Wish) -> dict[str, str]:
    """What the builds' transactions know: who caused them, and whether tests are a gate."""
    mine = [row for row in rows if row["id"] in wish.ids]
    caused = max((row for row in mine if row["cause"] is not None), key=lambda row: row["depth"], default=None)
    settings = {"anton.gate": "on"} if wish.gate else {}
    if caused is not None:
        settings["anton.context"] = f"{caused['cause']},{caused['depth'] + 1},{caused['trace'] or ''}"
    return settings


def _buildable(manifest: Manifest, id: str) -> bool:
    node = manifest.nodes.get(id)
    return node is not None and node.materialized != "ephemeral"


def _result(manifest: Manifest, id: str, status: str, message: str) -> Result:
    node = manifest.nodes[id]
    return Result(id, node.name, node.type, status, 0.0, message)


def _selector(manifest: Manifest, id: str) -> str:
    """How --select names one node: by its name, with its package where that is not enough."""
    node = manifest.nodes[id]
    same = [one for one in manifest.nodes.values() if one.name == node.name]
    return node.name if len(same) == 1 else f"package:{id.split('.')[1]},{node.name}"


def _test(manifest: Manifest, id: str, status: str, message: str) -> Result:
    return Result(id, manifest.tests[id]["name"], "test", status, 0.0, message)


def _chosen(manifest: Manifest, tests: Iterable[str]) -> list[str]:
    """How --select names tests."""
    return ["--select", *sorted(manifest.tests[id]["name"] for id in tests)]


def _given(wish: Wish) -> list[str]:
    return ["--vars", _json(wish.vars)] if wish.vars else []


def _table(name: str) -> tuple[str, str]:
    schema, table = split_name(name)
    return schema or "", table


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
