"""Gate: which records of a handler with per= may run now.

    next record -> its key has fewer than N running: go        else it waits aside, until one of its key is done
                   with rate=, and a start: go                 or there is a start for it (keyrate.py)

One process has all of such a handler (permits.py), so what runs is counted here, exactly. Called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from anton.starts import Starts, short

NOTHING = object()  # no key: outside
NAN = float("nan")  # the one there is, so that it is itself: as in the database, it is one value


def value_of(record: Any, column: str) -> Hashable:
    """What a record has in a column, as text where it cannot be a key; None where it has none."""
    try:
        value = getattr(record, column) if hasattr(record, "model_fields_set") else record[column]
    except (KeyError, AttributeError):
        return None
    if isinstance(value, Hashable):
        return value if value == value else NAN
    return repr(value)


def take_out(aside: dict[Hashable, deque[Any]], each: object) -> list[int]:
    """Takes what waits of one batch out of what waits by key; the items."""
    found: list[int] = []
    for key, waiting in list(aside.items()):
        mine = [item for of, item in waiting if of is each]
        if len(mine) == len(waiting):
            del aside[key]
        elif mine:
            aside[key] = deque(entry for entry in waiting if entry[0] is not each)
        found += mine
    return found


class Gate:
    """At most `most` records at a time for each value of a column. Entries are a lane's items: (Each, item).

    starts: with rate=, those of each key; lock: held while they are looked at. short: told that a record wants one.
    over: the option was taken out, or is of another column; nothing waits here any more.
    """

    def __init__(self, column: str, most: int) -> None:
        self.column, self.most = column, most
        self.starts: Starts | None = None
        self.short: Callable[[], None] = lambda: None
        self.lock = threading.Lock()
        self.over = False
        self._inside: dict[Hashable, int] = {}
        self._aside: dict[Hashable, deque[Any]] = {}
        self._wanted: set[Hashable] = set()                            # of which a record runs once more, outside

    def key(self, record: Any) -> Hashable:
        """What a record has in the column, in short; None where it has none."""
        return short(value_of(record, self.column))

    def enter(self, key: Hashable, entry: Any) -> bool:
        """Whether a record of this key may run; else its entry is put aside."""
        with self.lock:
            inside = self._inside.get(key, 0)
            room = inside < self.most
            if self.over or room and (self.starts is None or self.starts.take(key)):
                self._inside[key] = inside + 1
                return True
            self._aside.setdefault(key, deque()).append(entry)
        if room:
            self.short()
        return False

    def enter_all(self, keys: set[Hashable]) -> bool:
        """Whether one record of each of these may run; else none has entered."""
        with self.lock:
            if not self.over and any(self._inside.get(key, 0) >= self.most for key in keys):
                return False
            if not self.over and self.starts is not None and not self._start_all(self.starts, keys):
                return False
            for key in keys:
                self._inside[key] = self._inside.get(key, 0) + 1
            return True

    def leave(self, key: Hashable) -> Any:
        """One of this key is done: the entry that may try next, None when none waits."""
        with self.lock:
            inside = self._inside.pop(key) - 1
            if inside:
                self._inside[key] = inside
            if self.starts is None or self.starts.free(key):
                return next(iter(self._out(key, 1)), None)
            waits = self.aside(key) > 0
        if waits:                                                      # it came while one ran, and nobody was told
            self.short()
        return None

    def _out(self, key: Hashable, most: int) -> list[Any]:
        """Takes the first that wait for a key."""
        waiting = self._aside.get(key)
        found = [waiting.popleft() for _ in range(min(most, len(waiting)))] if waiting else []
        if waiting is not None and not waiting:
            del self._aside[key]
        return found

    def drop(self, each: object) -> list[int]:
        """Takes out what waits of one batch; the items."""
        with self.lock:
            return take_out(self._aside, each)

    def close(self) -> list[Any]:
        """Keeps nobody from now on; the entries that waited."""
        with self.lock:
            self.over = True
            found = [entry for waiting in self._aside.values() for entry in waiting]
            self._aside.clear()
            return found

    # With a rate

    def _start_all(self, starts: Starts, keys: set[Hashable]) -> bool:
        """Takes a start of each key, all or none; what lacks one is wanted for it."""
        lacking = [key for key in keys if not starts.free(key)]
        self._wanted.update(lacking)
        if lacking:
            self.short()
            return False
        self._wanted.difference_update(keys)
        return sum(starts.take(key) for key in keys) == len(keys)        # one's slot may end meanwhile

    def waiting(self) -> list[Hashable]:
        """The keys of which records wait, those that were served longest ago first."""
        with self.lock:
            return [*dict.fromkeys((*self._wanted, *self._aside))]

    def wanted(self, key: Hashable) -> int:
        """Records of a key that could begin, had they a start. The lock is held."""
        return min(self.aside(key), self.most - self._inside.get(key, 0)) + (key in self._wanted)

    def aside(self, key: Hashable) -> int:
        """Records of a key that wait. The lock is held."""
        return len(self._aside.get(key, ()))

    def served(self, keys: Iterable[Hashable]) -> list[Any]:
        """These were given starts: the entries that may try now. The keys are last in turn."""
        found: list[Any] = []
        with self.lock:
            for key in keys:
                waiting = self._aside.pop(key, None)
                if waiting is not None:
                    self._aside[key] = waiting
                    found += self._out(key, min(self.most - self._inside.get(key, 0), self._free(key)))
        return found

    def _free(self, key: Hashable) -> int:
        return self.starts.free(key) if self.starts is not None else self.most

    def gives_up(self, keys: set[Hashable]) -> None:
        """What wanted to run once more goes back."""
        with self.lock:
            self._wanted -= keys

    def beyond(self, key: Hashable, kept: int, least: int) -> list[Any]:
        """Takes out what waits of a key beyond so many, and all of the batch that it begins in, down to the least: else
        most batches would have to wait for a few records. The lock is held.
        """
        waiting = self._aside.get(key, deque())
        found = [waiting.pop() for _ in range(max(0, len(waiting) - kept))]
        while found and len(waiting) > least and waiting[-1][0] is found[-1][0]:
            found.append(waiting.pop())
        if key in self._aside and not waiting:
            del self._aside[key]
        return found[::-1]
