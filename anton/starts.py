"""Starts: how many records of each key may begin, and when, for a handler with rate= beside per=.

    records of a key wait -> plan(): starts in slots to come -> noted in the database -> grant() -> take(): one begins
                                                                 not begun in its slot: unused(), planned anew

One process has all of such a handler (permits.py), so this is pure bookkeeping. Slots and their pace are those of
sql/24_rate.sql: no span of slots, which is longer than any window, holds more starts than the rate.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Hashable, Iterable, Mapping
from decimal import Context, Decimal
from itertools import islice
from typing import Any

from anton.rate import Clock

FAR = 200  # slots ahead: a start that is there was noted before the database's clock was put back
PATIENCE = 2.0  # seconds that a record waits here
LONG = 200  # characters of a key that are kept as they are
MOST = 20_000  # keys that are remembered here; of others the database is asked again
AHEAD = 0.1  # seconds ahead that starts are planned at least, where a slot is shorter


class Key:
    """What is known of one key.

    given: starts by slot that were planned and not given back. left: those of them that have not begun. line: the
    slot in which the last record that was put off is expected to begin; lined: how many in the same. again: when to
    look at it again, by time.monotonic(). few: records that may wait here until then besides those for what is left.
    """

    __slots__ = ("again", "few", "given", "left", "line", "lined")

    def __init__(self) -> None:
        self.given: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.line = -math.inf
        self.lined = 0
        self.again = 0.0
        self.few = 0


class Starts:
    """The rate of one handler: `most` starts of each key in any window of `length_us`.

    clock: of the database. patience: seconds that a record waits for its start here; for longer it goes back.
    began: starts since it was last looked at. over: keys whose rows say more than was given.
    """

    def __init__(self, most: int, length_us: int) -> None:
        self.patience = PATIENCE
        self.clock = Clock()
        self.keys: dict[Hashable, Key] = {}
        self.over: set[Hashable] = set()
        self.began = 0
        self.slot_us = 0                                               # of a slot; slot: in seconds
        self.set(most, length_us)

    def set(self, most: int, length_us: int) -> None:
        """Another rate. What was planned by another length of slots is not used, and counts as begun."""
        slot_us = max(10_000, length_us // 64)
        if self.keys and slot_us != self.slot_us:
            self.clear()                                               # their rows say when
        self.most, self.length_us, self.slot_us, self.slot = most, length_us, slot_us, slot_us / 1e6
        whole = -(-length_us // slot_us)
        self.span = whole + 2
        self.few = max(1, whole // 10)
        self.together = min(most, math.ceil(1.2 * most * self.few / whole))
        self.once = max(math.ceil(2 * most / whole), min(10, self.together))
        self.group = max(1, most * self.few // whole)                  # so many of a key begin together,
        self.step = self.span * self.group / most                      # and as many again so many slots later

    @property
    def ahead(self) -> int:
        """Slots to come that starts are planned in."""
        return min(30, max(self.few, int(AHEAD / self.slot)), int(self.patience / self.slot))

    # Keys

    def clear(self) -> None:
        """Knows nothing: another process may have had the handler."""
        self.keys.clear()
        self.over.clear()

    def learn(self, keys: Iterable[Hashable], rows: Mapping[str, tuple[list[int], list[int]]]) -> None:
        """What the database knows of keys that are not known here. rows: ends and counts by text."""
        for key in keys:
            known = self.keys[key] = Key()
            for end, count in zip(*rows.get(text(key), ((), ())), strict=True):
                slot = (end - 1) // self.slot_us
                known.given[slot] = known.given.get(slot, 0) + count

    def row(self, key: Hashable) -> tuple[list[int], list[int]]:
        """What the database is to know of a key: ends of slots, and starts."""
        given = sorted(self.keys[key].given.items())
        return [(slot + 1) * self.slot_us for slot, _ in given], [count for _, count in given]

    def forget(self, busy: Iterable[Hashable]) -> None:
        """Of too many keys those that are not busy, the longest known first. Looks at few more than are too many."""
        more = len(self.keys) - MOST
        kept = set(busy) if more > 0 else set()
        for key in [*islice(self.keys, max(0, 2 * more))]:
            known = self.keys.pop(key)
            if known.left or key in kept:
                self.keys[key] = known                                 # looked at last
            else:
                self.over.discard(key)                                 # its row says more for a window: that is all

    # Time

    def first(self, late: float) -> int:
        """The first slot that begins, or goes on, so many seconds from now."""
        return int((time.monotonic() + self.clock.high + late) // self.slot)

    @property
    def past(self) -> int:
        """All slots before this one are over for sure."""
        return int((time.monotonic() + self.clock.low) // self.slot)

    def opens(self, slot: int) -> float:
        """Seconds until a slot begins."""
        return slot * self.slot - (time.monotonic() + self.clock.low)

    # What may begin

    def plan(self, key: Hashable, first: int, wanted: int) -> dict[int, int]:
        """Plans up to so many starts from a slot on; by slot."""
        known = self.keys[key]
        given = self._as_of(known, first)
        found: dict[int, int] = {}
        for slot in range(first, first + self.ahead + 1):
            room = min(wanted, self._room(given, slot)) if wanted > 0 else 0
            if room > 0:
                found[slot] = room
                given[slot] = given.get(slot, 0) + room
                wanted -= room
        return found

    def next(self, key: Hashable, first: int) -> int:
        """The first slot from this one on that has a start to give."""
        given = self._as_of(self.keys[key], first)
        found = {first, *(slot + after for slot in given for after in (1, self.few, self.span))}
        return next(slot for slot in sorted(found) if slot >= first and self._room(given, slot) > 0)

    def take_back(self, plans: Mapping[Hashable, Mapping[int, int]]) -> None:
        """What was planned does not begin, and may be noted all the same."""
        for key, slots in plans.items():
            if (known := self.keys.get(key)) is not None:
                for slot, count in slots.items():
                    if (left := known.given.pop(slot, 0) - count) > 0:
                        known.given[slot] = left
                self.over.add(key)

    def grant(self, key: Hashable, slots: Mapping[int, int]) -> None:
        """What was planned is noted: it may be used."""
        left = self.keys[key].left
        for slot, count in slots.items():
            left[slot] = left.get(slot, 0) + count

    def free(self, key: Hashable) -> int:
        """Starts that a key has now."""
        known = self.keys.get(key)
        return known.left.get(self._now(), 0) if known is not None and known.left else 0

    def take(self, key: Hashable) -> bool:
        """Whether a record of this key may begin now; it is to begin at once."""
        known = self.keys.get(key)
        if known is None or not known.left:
            return False
        slot = self._now()
        left = known.left.pop(slot, 0)
        if left > 1:
            known.left[slot] = left - 1
        self.began += bool(left)
        return bool(left)

    def _now(self) -> int:
        """The slot that it is for sure; -1 when nobody can tell."""
        now = time.monotonic()
        slot = int((now + self.clock.low) // self.slot) if math.isfinite(self.clock.low) else -1
        return slot if now + self.clock.high < (slot + 1) * self.slot else -1

    def lapses(self, key: Hashable) -> float:
        """Seconds until the first start that a key has is over; infinite without one."""
        left = self.keys[key].left
        return self.opens(min(left) + 1) if left else math.inf

    def unused(self, key: Hashable, before: float) -> bool:
        """Starts that did not begin in slots before this one can be planned again. Whether there were any."""
        known = self.keys[key]
        gone = [slot for slot in known.left if slot < before]
        for slot in gone:
            known.given[slot] -= known.left.pop(slot)
            self.over.add(key)
            if not known.given[slot]:
                del known.given[slot]
        return bool(gone)

    def _as_of(self, known: Key, first: int) -> dict[int, int]:
        """What still matters then."""
        given = known.given
        for slot in [slot for slot in given if slot < first - self.span - 4]:
            del given[slot]
        if any(slot > first + FAR for slot in given):                  # its clock was put back: as if all began now
            count = min(self.most, sum(given.values()))
            given.clear()
            known.left.clear()
            given[first] = count
        return given

    def _room(self, given: Mapping[int, int], slot: int) -> int:
        """Starts that a slot may have besides those it has."""
        few = sum(count for at, count in given.items() if slot - self.few < at <= slot)
        room = min(self.once - given.get(slot, 0), self.together - few)
        for end in (slot, *(at for at in given if slot < at < slot + self.span)):
            if room <= 0:
                return 0
            room = min(room, self.most - sum(count for at, count in given.items() if end - self.span < at <= end))
        return max(0, room)

    # Records that have to wait for long

    def kept(self, key: Hashable, first: int) -> int:
        """How many records of a key that have no start are expected to begin within the patience."""
        wait, patience = self.next(key, first) - first, self.patience / self.slot
        return 0 if wait > patience else self.group * (1 + int((patience - wait) / self.step))

    def put_off(self, key: Hashable, first: int, kept: int, count: int) -> list[float]:
        """In which slots `count` more records begin than are kept here, about: behind all that were put off."""
        known, found = self.keys[key], list[float]()
        soonest = self.next(key, first) + self.step * kept / self.group
        for _ in range(count):
            if known.line < soonest or known.lined >= self.group:
                known.line, known.lined = max(soonest, known.line + self.step), 0
            known.lined += 1
            together = found and known.line - found[-1] < self.patience / 4 / self.slot  # these wait here, a little
            found.append(found[-1] if together else known.line)
        return found


def text(key: Hashable) -> str:
    """A key as the database has it: the same text for what is equal here."""
    value: Any = key
    if isinstance(value, (bool, float, Decimal)) and math.isfinite(value) and value == int(value):
        value = int(value)
    elif isinstance(value, Decimal):
        value = str(value.normalize(Context(prec=len(value.as_tuple().digits) or 1)))
    return str(short(json.dumps([value], default=str)))


def short(key: Hashable) -> Hashable:
    """A key that is remembered: of a long text its beginning and its hash."""
    if isinstance(key, str) and len(key) > LONG:
        return key[:40] + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return key
