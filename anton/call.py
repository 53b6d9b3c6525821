"""Call: what a lane runs, and one call of it with the records of a batch.

    Caller.call(lane, inputs) -> Called: recorded writes, and the fates of records that the handler settled itself

A coroutine runs in the loop and is cancelled at its timeout; a plain function runs in a thread, which is given up then.
Handlers of single records (each=True) are called by each.py.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

from anton.app import App
from anton.ctx import Ctx, Origin
from anton.db import Database, quote
from anton.errors import HandlerTimeout, Outcome, UnknownTable
from anton.fate import Fate, fate_of
from anton.lane import Lane
from anton.read import Inputs
from anton.record import Change, Document, Records, Row
from anton.relation import Relation, describe, made_keys
from anton.threads import Threads
from anton.write import WHOLE, OnConflict, Op, Scope, owner, pick

MARGIN = 10.0  # seconds that a call may outlast its timeout before its lease is left to end


@dataclass(eq=False)
class Code:
    """What a lane runs: a handler of Python, or a schedule's function. relation: the table it listens to.

    run: called with records (or one, with each) and a Ctx.
    """

    name: str
    is_async: bool
    each: bool
    on_conflict: OnConflict
    run: Callable[[Any, Ctx | None], Any]
    relation: Relation | None = None
    wants_ctx: bool = False
    planned: bool = False


def code_of(app: App, name: str) -> Code | None:
    """The code of an app's handler, schedule or dbt project, None when it has none by this name."""
    handler, planned, project = app.handlers.get(name), app.schedules.get(name), app.projects.get(name)
    if handler is not None and handler.fn is not None:
        return Code(name, handler.is_async, handler.each, handler.on_conflict,
                    handler.acall if handler.is_async else handler.call, wants_ctx=handler.wants_ctx)
    if planned is not None:
        fn, wants = planned.fn, planned.wants_ctx
        return Code(name, iscoroutinefunction(fn), True, "rerun", lambda _, ctx: fn(ctx) if wants else fn(),
                    wants_ctx=wants, planned=True)
    if project is not None:
        return Code(name, True, False, "rerun", project.work)
    return None


@dataclass(slots=True)
class Called:
    """What a call brought: its writes, and the fates of items it settled itself."""

    ops: list[Op]
    fates: dict[int, Fate]


class Stuck(Exception):
    """A thread did not come back. item: the one it was at, WHOLE when that is not known."""

    def __init__(self, item: int, error: HandlerTimeout) -> None:
        super().__init__(str(error))
        self.item = item
        self.error = error


class Interrupted(Exception):
    """A batch handler raised Retry or Discard: at one item when it was iterating, else for all."""

    def __init__(self, item: int, outcome: Outcome) -> None:
        super().__init__(str(outcome))
        self.item = item
        self.outcome = outcome


class Caller:
    """Makes the calls of one worker. tables: by handler, what it listens to."""

    def __init__(self, db: Database, app: App, threads: Threads) -> None:
        self.db = db
        self.app = app
        self.threads = threads
        self.tables: dict[int, int] = {}

    def context(self, code: Code, inputs: Inputs, records: Records[Any] | None = None) -> Ctx | None:
        """What the call may know besides its records; None for one that does not ask."""
        if not code.wants_ctx:
            return None
        job, _ = inputs.batch.at(0)
        now = job.at + timedelta(milliseconds=job.waited)
        if code.planned:
            planned = [datetime.fromisoformat(job.key(ordinal)[1]) for job, ordinal in inputs.batch]
            return Ctx(code.name, now, Records(()), planned)
        if records is None:
            records = Records(inputs.items, inputs.changes)
        return Ctx(code.name, now, records, (), partial(self.origin, inputs))

    async def call(self, lane: Lane, inputs: Inputs) -> Called:
        """One call with all items. Raises what the handler raises; Interrupted, Stuck."""
        code = lane.handler
        records: Records[Any] = Records(
            [item for item in inputs.items if item is not None] if inputs.events else inputs.items, inputs.changes
        )
        scope = Scope("handler", records, self.db, code.on_conflict)
        scope.table = lane.table
        if inputs.rows and code.relation is not None:
            scope.saw(code.relation, inputs.rows)
        ctx = self.context(code, inputs, records)
        seconds = lane.timeout.total_seconds()
        try:
            if code.is_async:
                await self.stock(lane, 1, len(inputs.items))
                await self._in_loop(code, scope, records, ctx, seconds)
            else:
                await self._in_thread(code, scope, records, ctx, seconds)
        finally:
            scope.close()
        ops = scope.take()
        lane.writes.update(op.relation.name for op in ops if op.relation)
        if ctx is None or not ctx.outcomes:
            return Called(ops, {})
        return Called(
            pick(ops, ctx.outcomes, keep=False), {item: fate_of(outcome) for item, outcome in ctx.outcomes.items()}
        )

    async def _in_loop(
        self, code: Code, scope: Scope, records: Records[Any], ctx: Ctx | None, seconds: float
    ) -> None:
        task = asyncio.create_task(_coroutine(code, scope, records, ctx))
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if done:
            task.result()
            return
        task.cancel()
        await asyncio.wait({task}, timeout=MARGIN / 2)                 # one that will not end is left alone
        raise HandlerTimeout(code.name, seconds)

    async def _in_thread(
        self, code: Code, scope: Scope, records: Records[Any], ctx: Ctx | None, seconds: float
    ) -> None:
        context = contextvars.copy_context()
        future = self.threads.submit(lambda: context.run(_plain, code, scope, records, ctx))
        try:
            await asyncio.wait_for(future, seconds)
        except TimeoutError:
            if future.done() and not future.cancelled():               # the handler's own
                future.result()
            raise Stuck(context.get(owner, WHOLE), HandlerTimeout(code.name, seconds)) from None

    async def stock(self, lane: Lane, takers: int, records: int) -> None:
        """Keys for what a coroutine may append: taken there they would block the loop."""
        for name in self.app.tables:
            try:
                supply = await made_keys(self.db, name)
            except UnknownTable:
                continue
            if supply is not None:
                often = name in lane.writes
                await supply.stock(takers if often else 1, records if often else 1)

    async def origin(self, inputs: Inputs, change: Change[Any]) -> Origin:
        """The record that a chain of handlers began with. In any loop."""
        job = next(
            job for job in inputs.batch.jobs if job.change_id == change.id and job.lo <= change.ordinal <= job.hi
        )
        key = list(change.key) if isinstance(change.key, tuple) else [change.key]
        table = self.tables[job.handler_id]
        async with self.db.conn() as conn:
            found = (await self.db.call(conn, "origin", table, key, job.cause))[0]
        keys = found["key"]
        relation = await describe(self.db, f"{quote(found['schema_name'])}.{quote(found['table_name'])}")
        make = await self._maker(relation)
        rows: list[Any] = []
        if found["fetch_sql"] is not None:
            kind = Document if relation.document and make is None else Row
            async with self.db.conn() as conn:
                key = keys if found["key_kind"] == "id" else [keys]
                rows = await conn.fetch(found["fetch_sql"], key, record_class=kind)
        record = None if not rows else rows[0] if make is None else make(rows[0])
        return Origin(found["table_name"], tuple(keys) if len(keys) > 1 else keys[0], record)

    async def _maker(self, relation: Relation) -> Callable[[Any], Any] | None:
        for table in self.app.tables.values():
            if table.make is not None and (await describe(self.db, table.name)).oid == relation.oid:
                return table.make
        return None


async def _coroutine(code: Code, scope: Scope, records: Records[Any], ctx: Ctx | None) -> None:
    with scope:
        try:
            if not code.each:
                await code.run(records, ctx)
            else:
                for at, record in enumerate(records._items):
                    owner.set(at)
                    await code.run(record, ctx)
        except Outcome as outcome:
            raise Interrupted(outcome.item, outcome) from outcome


def _plain(code: Code, scope: Scope, records: Records[Any], ctx: Ctx | None) -> None:
    with scope:
        try:
            if not code.each:
                code.run(records, ctx)
            else:
                for at, record in enumerate(records._items):
                    owner.set(at)
                    code.run(record, ctx)
        except Outcome as outcome:
            raise Interrupted(outcome.item, outcome) from outcome
