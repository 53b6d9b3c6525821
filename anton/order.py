"""Order: which records of a handler with ordered= may run now. One of a key at a time, first what was first.

    batches, in the order of their claims -> records, in theirs -> nobody of its key is inside: it is now, and may run
                                                                   else waits aside, until that one is settled
    an earlier one of its key waits for a retry, or is dead    ->  put off: into turn (sql/27_order.sql), off the queue

One process has all of such a handler (permits.py). A key is free again only when what was inside is settled: committed,
not just returned. Called from any thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

import orjson

from anton.errors import LeaseLost
from anton.gate import NAN, take_out, value_of

UNKNOWN = "?"  # the key of a record that cannot be read: those stand in a line of their own


class OutOfOrder(LeaseLost):
    """Records are given back, so those after them are, too, to be claimed again in order."""

    def __init__(self) -> None:
        super().__init__("records are given back, and what comes after them, too")


class Order:
    """The order of one lane. column: whose values it is for, None: the primary key.

    An entry is a lane's item: (Each, item). Each has order, the keys of its items; here it gets ran, those of them that
    ended and are not settled, off, what is to be put off by key, and awaited: others wait for what it has to settle.
    closed: keys, as text, of which some record waits in turn; heads: jobs that are the first of such a key. over: the
    option was taken out, or is of another column: what was begun goes back, then the lane has heir.
    """

    def __init__(self, column: str | None) -> None:
        self.column = column
        self.closed: set[str] = set()
        self.heads: set[int] = set()
        self.tenure = -1                                               # of the permits, that closed is known for
        self.stopped = False                                           # what was begun goes back: begin nothing later
        self.over = False
        self.heir: Order | None = None
        self._lock = threading.Lock()
        self._inside: dict[Hashable, Any] = {}                         # the entry that keeps each key
        self._aside: dict[Hashable, deque[Any]] = {}
        self._line: deque[Any] = deque()
        self._moved = asyncio.Event()

    def leave_to(self, heir: Order | None) -> None:
        """Another one, or none, comes after it."""
        self.over = self.stopped = True
        self.heir = heir

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

    def note(self, batch: Any, items: Sequence[Any], first: list[int] | None,
             twins: dict[int, list[int]]) -> list[Hashable]:
        """The keys of a batch's items; with a column they are noted at their jobs, too, as they were read."""
        if self.column is None:
            keys = [key for job, ordinals in batch.parts for key in self._own(job, ordinals)]
            return keys if first is None else [keys[position] for position in first]
        keys, at = _values(items, self.column), 0
        for job, ordinals in batch.parts if first is None else ():
            if job.order is None:
                job.order = {}
            job.order.update(zip(ordinals, keys[at:at + len(ordinals)], strict=True))
            at += len(ordinals)
        for item, position in enumerate(first or ()):
            for place in (position, *twins.get(item, ())):
                job, ordinal = batch.at(place)
                if job.order is None:
                    job.order = {}
                job.order[ordinal] = keys[item]
        return keys

    def _own(self, job: Any, ordinals: Sequence[int]) -> Iterable[Hashable]:
        """Primary keys of records of a job."""
        if job.ids is not None and len(ordinals) == job.size:
            ids: list[int] = job.ids
            return ids
        return (self.of_job(job, ordinal) for ordinal in ordinals)

    # Records

    def send(self, each: Any) -> None:
        """Puts the records of a batch, in order, where pullers find them, or aside."""
        entries = [(each, item) for item in range(len(each.order))]
        by_key = dict(zip(each.order, entries, strict=True))
        with self._lock:
            if len(by_key) == len(entries) and not self.closed and self._inside.keys().isdisjoint(by_key):
                self._inside.update(by_key)                            # the same as below, at once
                each.lane.items.extend(entries)
                return
            for key, entry in zip(each.order, entries, strict=True):
                holder = self._inside.get(key)
                if holder is None:
                    if self._enter(key, entry):
                        each.lane.items.append(entry)
                elif holder[0] is each and key in each.off and key not in self._aside and self._is_off(key, entry):
                    each.off[key].append(entry[1])
                else:
                    self._aside.setdefault(key, deque()).append(entry)
                    if holder[1] in holder[0].ran:
                        holder[0].awaited = True
                        holder[0].tell()

    def _enter(self, key: Hashable, entry: Any) -> bool:
        """The entry has its key now. Whether it may run: else it is put off, with what comes next of its batch."""
        each, item = entry
        self._inside[key] = entry
        if not self._is_off(key, entry):
            return True
        each.off[key] = [item]
        waiting = self._aside.get(key)
        while waiting and waiting[0][0] is each and self._is_off(key, waiting[0]):
            each.off[key].append(waiting.popleft()[1])
        if waiting is not None and not waiting:
            del self._aside[key]
        each.tell()
        return False

    def _is_off(self, key: Hashable, entry: Any) -> bool:
        """An earlier record of its key waits in turn. What is given back comes again, and is not put off."""
        if not self.closed or self.text(key) not in self.closed:
            return False
        each, item = entry
        begins = self.may(each) and each.world is None and each.lane.down is None
        return begins and each.job(item) not in self.heads

    def ended(self, each: Any, item: int) -> bool:
        """A call has ended: its key is free when it is settled, or at once when its batch has left. Whether another
        record waits for it."""
        each.ran.add(item)
        if each.ended:
            self._free(each, (item,))
            return False
        if each.order[item] not in self._aside:
            return False
        each.awaited = True
        return True

    def may(self, each: Any) -> bool:
        """Whether records of this batch are still begun."""
        return not (self.stopped or each.ended)

    def skip(self, each: Any, item: int) -> None:
        """This one is not run, and is given back with its batch."""
        each.ran.add(item)
        if each.ended:
            self._free(each, (item,))

    def put_off(self, each: Any) -> list[int]:
        """Takes what is to be put off of a batch, in order."""
        with self._lock:
            found, each.off = each.off, {}
            for key, items in found.items():
                self._inside[key] = each, items[-1]
                each.ran.add(items[-1])
                if key in self._aside:
                    each.awaited = True
            return [item for items in found.values() for item in items]

    def settled(self, each: Any, items: Collection[int]) -> None:
        """These are committed, so the next of their keys may run."""
        self._free(each, items)
        each.ran.difference_update(items)

    def leave(self, each: Any) -> None:
        """A batch ends, whatever of it is settled. What still runs of it keeps its key until it has ended."""
        each.ended = True                                              # what ends from here on frees its key itself
        self._free(each, list(each.ran))

    def drop(self, each: Any) -> list[int]:
        """Takes out what waits of one batch; the items."""
        with self._lock:
            found, off = take_out(self._aside, each), each.off
            each.off = {}
            for key, items in off.items():
                found += items
                self._hand_over(key)
        return found

    def _free(self, each: Any, items: Iterable[int]) -> None:
        keys, inside, aside = each.order, self._inside, self._aside
        with self._lock:
            for item in items:
                key = keys[item]
                holder = inside.get(key)
                if holder is not None and holder[0] is each and holder[1] == item:
                    if key in aside:
                        self._hand_over(key)
                    else:
                        del inside[key]

    def _hand_over(self, key: Hashable) -> None:
        """Who had the key has it no more; the next one has."""
        self._inside.pop(key, None)
        waiting = self._aside.get(key)
        if waiting is None:
            return
        entry = waiting.popleft()
        if not waiting:
            del self._aside[key]
        if self._enter(key, entry):
            entry[0].lane.items.appendleft(entry)

    def know(self, keys: Iterable[str], closed: Iterable[str]) -> None:
        """Of these keys, those some record of which waits, as a commit left it."""
        with self._lock:
            self.closed = self.closed.difference(keys).union(closed)


def _values(records: Sequence[Any], column: str) -> list[Hashable]:
    """value_of() for each; of plain values in one go."""
    try:
        if records and hasattr(records[0], "model_fields_set"):
            values = [getattr(record, column) for record in records]
        else:
            values = [record[column] for record in records]
        set(values)                                                    # raises where one cannot be a key
    except (KeyError, AttributeError, TypeError):
        return [value_of(record, column) for record in records]
    return [value if value == value else NAN for value in values]
