"""Gate: which records of a handler with per= may run now.

    next record -> its key has fewer than N running: go        else it waits aside, until one of its key is done

One process has all of such a handler (permits.py), so what runs is counted here, exactly. Called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Any

NOTHING = object()  # no key: outside


def value_of(record: Any, column: str) -> Hashable:
    """What a record has in a column, as text where it cannot be a key; None where it has none."""
    try:
        value = getattr(record, column) if hasattr(record, "model_fields_set") else record[column]
    except (KeyError, AttributeError):
        return None
    return value if isinstance(value, Hashable) else repr(value)


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
    """At most `most` records at a time for each value of a column. Entries are a lane's items: (Each, item)."""

    def __init__(self, column: str, most: int) -> None:
        self.column, self.most = column, most
        self._lock = threading.Lock()
        self._inside: dict[Hashable, int] = {}
        self._aside: dict[Hashable, deque[Any]] = {}

    def key(self, record: Any) -> Hashable:
        """What a record has in the column; None where it has none."""
        return value_of(record, self.column)

    def enter(self, key: Hashable, entry: Any) -> bool:
        """Whether a record of this key may run; else its entry is put aside."""
        with self._lock:
            inside = self._inside.get(key, 0)
            if inside < self.most:
                self._inside[key] = inside + 1
                return True
            self._aside.setdefault(key, deque()).append(entry)
            return False

    def enter_all(self, keys: set[Hashable]) -> bool:
        """Whether one record of each of these may run; else none has entered."""
        with self._lock:
            if any(self._inside.get(key, 0) >= self.most for key in keys):
                return False
            for key in keys:
                self._inside[key] = self._inside.get(key, 0) + 1
            return True

    def leave(self, key: Hashable) -> Any:
        """One of this key is done: the entry that may try next, None when none waits."""
        with self._lock:
            inside = self._inside.pop(key) - 1
            if inside:
                self._inside[key] = inside
            waiting = self._aside.get(key)
            if not waiting:
                return None
            entry = waiting.popleft()
            if not waiting:
                del self._aside[key]
            return entry

    def drop(self, each: object) -> list[int]:
        """Takes out what waits of one batch; the items."""
        with self._lock:
            return take_out(self._aside, each)
