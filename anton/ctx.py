"""Ctx: what a handler may know and decide besides its records."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from anton.db import current_database
from anton.duration import duration
from anton.errors import Discard, Retry, WriteError
from anton.op import WHOLE
from anton.query import wait
from anton.record import Change, Records
from anton.write import owner


class Origin(NamedTuple):
    """The record that a chain of handlers began with. record: as it is now, None when it is gone."""

    table: str
    key: Any
    record: Any


class Ctx:
    """What a handler may know and decide besides its records.

    now: the database's time when the batch was claimed. handler: its name.
    attempt, trace, tenant, key: of the record at hand (while iterating records, else of the first); key is its
    idempotency key.
    """

    def __init__(self, handler: str, now: datetime, records: Records[Any], planned: Sequence[datetime] = (),
                 find_origin: Callable[[Change[Any]], Awaitable[Origin]] | None = None) -> None:
        self.handler = handler
        self.now = now
        self._planned = planned                                        # by position, as one claim may hold several
        self.outcomes: dict[int, Retry | Discard] = {}
        self._records = records
        self._find_origin = find_origin

    @property
    def planned_at(self) -> datetime | None:
        """When the schedule was due; None in a handler."""
        return self._planned[max(owner.get(), 0)] if self._planned else None

    @property
    def change(self) -> Change[Any]:
        """What happened to the record at hand."""
        return self._change()

    @property
    def attempt(self) -> int:
        """1 for the first run."""
        return self._change().attempt

    @property
    def trace(self) -> int | None:
        """The number of the change that this chain of handlers began with."""
        return self._change().trace

    @property
    def tenant(self) -> str | None:
        """Whose record it is."""
        return self._change().tenant

    @property
    def key(self) -> str:
        """The idempotency key: the same for all attempts at a record, and for no other."""
        return self._change().idempotency_key

    def retry(self, record: object, *, after: str | float | timedelta | None = None, why: str = "") -> None:
        """This record, or all records, is run again later; what was written for it is dropped. after: "5m"."""
        self._settle(record, Retry(why, after=after if after is None else duration(after, "after", "ctx.retry")))

    def discard(self, record: object, why: str = "") -> None:
        """This record, or all records, is given up: a dead letter that can be replayed; its writes are dropped."""
        self._settle(record, Discard(why))

    async def aorigin(self, record: object = None) -> Origin:
        """The record that led to this one through all handlers; itself when no handler wrote it."""
        if self._find_origin is None:
            raise WriteError(f"{self.handler} was not started by a record and has no origin")
        return await self._find_origin(self._change(record))

    def origin(self, record: object = None) -> Origin:
        """As aorigin, in def."""
        return wait(current_database(), lambda: self.aorigin(record), "ctx.origin()", "await ctx.aorigin()")

    def _settle(self, record: object, outcome: Retry | Discard) -> None:
        at = self._records.position(record)
        if at is None:
            raise WriteError(f"ctx.{type(outcome).__name__.lower()}() takes one of the records that the handler was "
                             f"called with, or all of them; not {record!r}")
        for one in range(len(self._records)) if at == WHOLE else (at,):
            self.outcomes[one] = outcome

    def _change(self, record: object = None) -> Change[Any]:
        at = owner.get() if record is None else self._records.position(record)
        if at is None:
            raise WriteError(f"{record!r} is none of the records that the handler was called with")
        changes = self._records.changes
        if not changes:
            raise WriteError(f"{self.handler} was not started by a record")
        return changes[max(at, 0)]
