"""Turns: queues that are taken from in turn, a key's with weight 3 three times in a row.

    a a a a a a       turns: a, b, c, a, a, …        however much a has, b and c wait for one turn of each other key
    b     c

Of tenants; records of one key are kept in line by order.py, in the table turn.

Pure bookkeeping, not locked: one thread changes it, others may iterate.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class Turns(Generic[K, T]):
    """Things by key. weights: turns in a row of the keys that have more than one."""

    def __init__(self) -> None:
        self.weights: Mapping[K, int] = {}
        self._queues: OrderedDict[K, deque[T]] = OrderedDict()         # the first one has the turn
        self._had = 0

    def __iter__(self) -> Iterator[T]:
        """All of them, key by key."""
        return iter([thing for queue in list(self._queues.values()) for thing in list(queue)])

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, key: K, thing: T) -> None:
        """Behind those of this key; a new key is the last to have its turn."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = deque()
        queue.append(thing)

    @property
    def queue(self) -> deque[T]:
        """What the key has whose turn it is, never empty: take from it and call end(). KeyError: there is nothing."""
        return self._queues[self.key]

    @property
    def key(self) -> K:
        """Whose turn it is; KeyError when there is nothing."""
        for key in self._queues:
            return key
        raise KeyError("nothing waits")

    def end(self) -> None:
        """The turn is over: the next key's, or this one's again where its weight lets it."""
        key = self.key
        self._had += 1
        if not self._queues[key]:
            del self._queues[key]
            self._had = 0
        elif self._had >= self.weights.get(key, 1):
            self._queues.move_to_end(key)
            self._had = 0

    def all(self) -> Iterator[T]:
        """Takes all of them, one in each turn."""
        while self:
            yield self.queue.popleft()
            self.end()

    def keep(self, things: Iterable[tuple[K, T]]) -> None:
        """Only these, in the order of turns of the keys they have."""
        kept: OrderedDict[K, deque[T]] = OrderedDict()
        for key, thing in things:
            kept.setdefault(key, deque()).append(thing)
        if next(iter(kept), None) != next(iter(self._queues), None):
            self._had = 0
        self._queues = kept
