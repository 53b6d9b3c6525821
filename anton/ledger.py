"""Ledger: a row for each call of a model, reserved before it is sent and settled after.

    begun = await ledger_of(db).begin(facts)           # send | answer | wait | …, see sql/80_call.sql
    await ledger.end({"id": begun.call_id, "state": "done", …})

Many calls share a statement: what is asked for while one runs goes with the next. A call's lease is longer than its
timeout, so that nothing has to renew it; what a process leaves behind turns unknown after it, and is charged at what it
can have cost at most.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import asyncpg

from anton.db import Database, is_away
from anton.errors import BadOption

MOST = 24  # calls of one statement; with more of them, calls that began together stay together, and wait for each other
TRIES = 60  # of an end, one a half second: an answer that was paid for is not given up when the database restarts

Scope = Literal["handler", "table", "app"]
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_BUDGET = re.compile(r"\s*\$?\s*(\d[\d_]*(?:\.\d+)?)\s*(usd|dollars?|tokens?)?"
                     r"\s*(?:(?:/|per|a)\s*(minute|hour|day|week|month))?\s*(?:per (handler|table|app))?\s*",
                     re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What may be spent in each period. unit: "usd" or "tokens". period "total": once and for all."""

    amount: Decimal
    unit: Literal["usd", "tokens"]
    period: str
    scope: Scope = "handler"

    def __str__(self) -> str:
        unit = "USD" if self.unit == "usd" else "tokens"
        return f"{self.amount} {unit}" + ("" if self.period == "total" else f"/{self.period}")


def budgets_of(given: str | Sequence[str] | None, of: str) -> tuple[Budget, ...]:
    """Budgets as an app states them: "5 USD/day", ["100000 tokens/hour", "20 USD/month per app"]. Raises BadOption."""
    found = []
    for text in (given,) if isinstance(given, str) else given or ():
        match = _BUDGET.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[2] is None and "$" not in text):
            raise BadOption("budget", given, of, '"5 USD/day", "200000 tokens/hour", "20 USD/month per app"; a minute, '
                            "hour, day, week or month in UTC, or none of them for ever; per handler (the default), "
                            "table or app")
        tokens = (match[2] or "").lower().startswith("token")
        found.append(Budget(Decimal(match[1].replace("_", "")), "tokens" if tokens else "usd",
                            (match[3] or "total").lower(), (match[4] or "handler").lower()))  # type: ignore[arg-type]
    if len({(one.scope, one.period, one.unit) for one in found}) < len(found):
        raise BadOption("budget", given, of, "one amount of a unit for each period and scope")
    return tuple(found)


Amounts = dict[tuple[str, str, str, str], tuple[Decimal, str]]


def agree(budgets: Sequence[Budget], known: Amounts, scope: Scope, name: str, of: str, place: str) -> None:
    """Raises BadOption where another component gives the same app or table another amount. known: App.budgets."""
    for one in budgets:
        if one.scope == scope:
            amount, who = known.setdefault((scope, name, one.period, one.unit), (one.amount, f"{of} ({place})"))
            if amount != one.amount:
                raise BadOption("budget", f"{one} per {scope}", of, f"{amount}, as {who} says: {scope} "
                                f'"{name}" has one amount of {one.unit} for each period')


@dataclass(eq=False)
class Place:
    """A request that is let through at its time; questions that join it count as none.

    due, late: on the monotonic clock. calls, size: how many go with it, and their bytes. gone: it is on its way.
    """

    due: float
    late: float
    calls: int
    size: int
    gone: bool = False


class Begun(NamedTuple):
    """What begin_calls() says of one call. due, late: to be sent then, and not after; on the monotonic clock.

    place: the request that it goes with; None: one of its own.
    """

    verdict: Literal["send", "answer", "wait", "later", "refused", "never"]
    call_id: int | None
    wait: float | None
    answer: Any
    reason: str | None
    due: float
    late: float
    place: Place | None = None


class Ledger:
    """The calls that one loop of this process makes, noted in one database."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._begins = _Batches(self._begin)
        self._ends = _Batches(self._end)
        self._known: dict[Any, int] = {}

    async def begin(self, facts: Mapping[str, Any]) -> Begun:
        """Asks whether this call may be sent. Raises what the database raises."""
        future = self._begins.add(facts)
        try:
            begun: Begun = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(future.result())                       # it was told, and nobody heard
            raise
        return begun

    async def end(self, facts: Mapping[str, Any]) -> None:
        """Notes what came of a call; goes on trying for half a minute while the database is away."""
        await asyncio.shield(self._ends.add(facts))

    def end_later(self, facts: Mapping[str, Any]) -> None:
        """The same, for one that is being cancelled."""
        self._ends.add(facts).add_done_callback(lambda done: done.cancelled() or done.exception())

    async def put(self, function: str, *values: Any) -> int:
        """put_budget(), put_quota(): once for the same values."""
        if (function, *values) not in self._known:
            async with self.db.conn() as conn:
                self._known[function, *values] = await self.db.call_value(conn, function, *values)
        return self._known[function, *values]

    async def put_budgets(self, budgets: Sequence[Budget], app: str, handler: str, table: str) -> list[int]:
        """The ids of what they are in the database."""
        names = {"handler": handler, "table": table, "app": ""}
        return [await self.put("put_budget", app, one.scope, names[one.scope], one.period, one.unit, one.amount)
                for one in budgets]

    async def held(self, hash: str) -> int | None:
        """The call that asks this now, or asked it last; None: there is none."""
        async with self.db.conn() as conn:
            found: int | None = await self.db.call_value(conn, "find_call", hash)
        return found

    async def lapse(self) -> None:
        """Marks what dead processes left."""
        async with self.db.conn() as conn:
            await self.db.call(conn, "lapse_calls")

    async def forget(self, hashes: Sequence[str]) -> None:
        """Drops answers that are of no use."""
        async with self.db.conn() as conn:
            await self.db.call(conn, "forget_memos", list(hashes))

    async def _begin(self, calls: Sequence[tuple[Any, asyncio.Future[Any]]]) -> None:
        facts = [{**given, "n": n} for n, (given, _) in enumerate(calls)]
        for left in range(2, -1, -1):
            try:
                async with self.db.conn() as conn:
                    called = time.monotonic()
                    *rows, clock = await self.db.call(conn, "begin_calls", facts, self._worker)
                break
            except asyncpg.TransactionRollbackError:
                if not left:
                    raise
        # Postgres reckoned with a moment between these two: nothing is early by the second, nor late by the first.
        first, second = called + clock["wait"], time.monotonic() - clock["slack"]
        for row in rows:
            wait, slack = row["wait"] or 0.0, row["slack"]
            begun = Begun(row["verdict"], row["call_id"], row["wait"], row["answer"], row["reason"], second + wait,
                          math.inf if slack is None else first + wait + slack)
            future = calls[row["n"]][1]
            if future.cancelled():
                self._give_back(begun)
            if not future.done():
                future.set_result(begun)

    def _give_back(self, begun: Begun) -> None:
        """Who asked is gone: it is not sent."""
        if begun.verdict == "send":
            self.end_later({"id": begun.call_id, "state": "unsent"})

    async def _end(self, calls: Sequence[tuple[Any, asyncio.Future[Any]]]) -> None:
        await self._end_all([given for given, _ in calls])
        for _, future in calls:
            if not future.done():
                future.set_result(None)

    async def _end_all(self, facts: Sequence[Mapping[str, Any]]) -> None:
        for left in range(TRIES, -1, -1):
            try:
                async with self.db.conn() as conn:
                    await self.db.call(conn, "end_calls", storable(facts))
                return
            except Exception as error:
                if not left or not (is_away(error) or isinstance(error, asyncpg.TransactionRollbackError)):
                    raise
                await asyncio.sleep(0.5)


def storable(value: Any) -> Any:
    """The same, with U+FFFD for what Postgres stores in no text: U+0000, and halves of surrogate pairs.

    A service's text goes with other calls in one statement: an odd character of one must not cost all of them.
    """
    match value:
        case str():
            return value if value.isascii() and "\0" not in value else _UNSTORABLE.sub("\ufffd", value)
        case Mapping():
            return {key: storable(one) for key, one in value.items()}
        case list() | tuple():
            return [storable(one) for one in value]
    return value


class _Batches:
    """Gathers what is asked for while a statement runs, and sends it with the next one."""

    def __init__(self, send: Callable[[Sequence[tuple[Any, asyncio.Future[Any]]]], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, item: Any) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:                                         # in no context: it outlives who asked first
            self._task = asyncio.create_task(self._drain(), context=contextvars.Context())
        return future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                try:
                    await self._send(batch)
                except Exception as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
        finally:
            self._task = None


_ledgers: dict[asyncio.AbstractEventLoop, dict[Database, Ledger]] = {}


def ledger_of(db: Database) -> Ledger:
    """The running loop's ledger on a database."""
    loop = asyncio.get_running_loop()
    if loop not in _ledgers:
        for ended in [other for other in _ledgers if other.is_closed()]:
            del _ledgers[ended]
    mine = _ledgers.setdefault(loop, {})
    if db not in mine:
        mine[db] = Ledger(db)
    return mine[db]
