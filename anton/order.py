"""Order: which records of a handler with ordered= may run now. One of a key at a time, first what was first.

    batches, in the order of their claims -> records, in theirs -> nobody of its key is inside: runs
                                                                   else waits aside, until that one is settled
    an earlier one of its key waits for a retry, or is dead    ->  put off: into turn (sql/27_order.sql), off the queue

One process has all of such a handler (permits.py). A key is free again only when what was inside is settled: committed,
not just returned. Called from any thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

import orjson

from anton.errors import LeaseLost

UNKNOWN = "?"  # the key of a record that cannot be read: those stand in a line of their own


class OutOfOrder(LeaseLost):
    """Records are given back, so those after them are, too, to be claimed again in order."""

    def __init__(self) -> None:
        super().__init__("records are given back, and what comes after them, too")


class Order:
    """The order of one lane. column: whose values it is for, None: the primary key.

    An entry is a lane's item: (Each, item). Each has order, the keys of its items; here it gets held, the keys that
    its items keep others from, ran, those of them that ended, and off, what is to be put off by key.
    closed: keys, as text, of which some record waits in turn; heads: jobs that are the first of such a key.
    """

    def __init__(self, column: str | None) -> None:
        self.column = column
        self.closed: set[str] = set()
        self.heads: set[int] = set()
        self.tenure = -1                                               # of the permits, that closed is known for
        self.stopped = False                                           # what was begun goes back: begin nothing later
        self._lock = threading.Lock()
        self._inside: dict[Hashable, Any] = {}
        self._aside: dict[Hashable, deque[Any]] = {}
        self._line: deque[Any] = deque()
        self._moved = asyncio.Event()

    # The line of batches

    def join(self, run: Any) -> None:
        """A batch was begun: its records come after those of the batches before it."""
        self._line.append(run)

    async def first(self, run: Any) -> None:
        """Until all batches before it have sent their records, or have ended."""
        while self._line and run in self._line and self._line[0] is not run:
            self._moved.clear()
            await self._moved.wait()

    def sent(self, run: Any) -> None:
        """Its records are all where pullers find them. Does nothing the second time."""
        if run in self._line:
            self._line.remove(run)
            self._moved.set()

    # Keys

    def key(self, record: Any) -> Hashable:
        """What a record has in the column; None where it has none."""
        assert self.column is not None
        try:
            value = getattr(record, self.column) if hasattr(record, "model_fields_set") else record[self.column]
        except (KeyError, AttributeError):
            return None
        return value if isinstance(value, Hashable) else repr(value)

    def of_job(self, job: Any, ordinal: int) -> Hashable:
        """The key of one record of a job; UNKNOWN where it was not read."""
        if self.column is not None:
            return UNKNOWN if job.order is None else job.order.get(ordinal, UNKNOWN)
        key = job.key(ordinal)
        return tuple(map(str, key)) if isinstance(key, list) else key

    def text(self, key: Hashable) -> str:
        """As turn has it."""
        if key == UNKNOWN:
            return UNKNOWN
        return orjson.dumps(list(key) if isinstance(key, tuple) else [key], default=str).decode()

    def note(self, batch: Any, items: Iterable[Any], first: list[int] | None, twins: dict[int, list[int]]) -> None:
        """Notes at their jobs which keys the records of a batch have, as these were read."""
        if self.column is None:
            return
        for item, record in enumerate(items):
            key = self.key(record)
            for position in (item if first is None else first[item], *twins.get(item, ())):
                job, ordinal = batch.at(position)
                if job.order is None:
                    job.order = {}
                job.order[ordinal] = key

    # Records

    def next(self, lane: Any) -> Any:
        """The next entry of the lane that may run, or that the caller is to skip(); None when there is none."""
        items = lane.items
        with self._lock:
            while items:
                each, item = entry = items.popleft()
                if self.stopped or each.world is not None or lane.down is not None or each.ended:
                    return entry
                key = each.order[item]
                inside = self._inside.get(key)
                off = bool(self.closed) and self.text(key) in self.closed and each.jobs[item] not in self.heads
                together = off and inside is each and key in each.off and key not in self._aside
                if inside is not None and not together:
                    self._aside.setdefault(key, deque()).append(entry)
                    continue
                self._inside[key] = each
                if off:
                    each.off.setdefault(key, []).append(item)
                    self._with_it(each, key)
                    each.tell()
                    continue
                each.held[item] = key
                return entry
        return None

    def ended(self, each: Any, item: int) -> bool:
        """A call has ended: its key is free when it is settled, or at once when its batch has left. Whether another
        record waits for it."""
        with self._lock:
            each.ran.add(item)
            if not each.ended:
                return each.held.get(item) in self._aside
            self._free(each, item)
            return False

    def _with_it(self, each: Any, key: Hashable) -> None:
        """Of the same batch, what waits aside first is put off together with what just was."""
        waiting = self._aside.get(key)
        while waiting and waiting[0][0] is each and each.jobs[waiting[0][1]] not in self.heads:
            each.off[key].append(waiting.popleft()[1])
        if waiting is not None and not waiting:
            del self._aside[key]

    def may(self, each: Any) -> bool:
        """Whether records of this batch are still begun."""
        return not (self.stopped or each.ended)

    def skip(self, each: Any, item: int) -> None:
        """This one is not run, and is given back with its batch."""
        with self._lock:
            if item not in each.held:
                self._hand_over(each.order[item])
                return
            each.ran.add(item)
            if each.ended:
                self._free(each, item)

    def put_off(self, each: Any) -> list[int]:
        """Takes what is to be put off of a batch, in order."""
        with self._lock:
            found, each.off = each.off, {}
            for key, items in found.items():
                each.held[items[-1]] = key
                each.ran.add(items[-1])
            return [item for items in found.values() for item in items]

    def settled(self, each: Any, items: Iterable[int]) -> None:
        """These are committed, so the next of their keys may run."""
        with self._lock:
            for item in items:
                self._free(each, item)

    def leave(self, each: Any) -> None:
        """A batch ends, whatever of it is settled. What still runs of it keeps its key until it has ended."""
        with self._lock:
            each.ended = True
            for key in each.off:
                self._open(each, key)
            each.off = {}
            for item in each.ran:
                self._free(each, item)

    def drop(self, each: Any) -> list[int]:
        """Takes out what waits of one batch; the items."""
        found: list[int] = []
        with self._lock:
            for key, waiting in list(self._aside.items()):
                found += [item for of, item in waiting if of is each]
                kept = deque(entry for entry in waiting if entry[0] is not each)
                if kept:
                    self._aside[key] = kept
                else:
                    del self._aside[key]
            for key, items in each.off.items():
                found += items
                self._open(each, key)
            each.off = {}
        return found

    @property
    def waiting(self) -> bool:
        """Some record waits for one of its key to be settled."""
        return bool(self._aside)

    def _free(self, each: Any, item: int) -> None:
        if item in each.held:
            self._open(each, each.held.pop(item))

    def _open(self, each: Any, key: Hashable) -> None:
        if self._inside.get(key) is not each:
            return
        del self._inside[key]
        self._hand_over(key)

    def _hand_over(self, key: Hashable) -> None:
        waiting = self._aside.get(key)
        if waiting and key not in self._inside:
            entry = waiting.popleft()
            if not waiting:
                del self._aside[key]
            entry[0].lane.items.appendleft(entry)

    def know(self, keys: Iterable[str], closed: Iterable[str]) -> None:
        """Of these keys, those some record of which waits, as a commit left it."""
        with self._lock:
            self.closed = self.closed.difference(keys).union(closed)
