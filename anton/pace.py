"""Pace: how soon a worker claims again, asks for the bell again, or tries again what failed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from anton.doorbell import Answer
from anton.lane import Lane

POLL = 0.04  # seconds between looks without a bell
BUSY = 0.025  # while the bell rings all the time; and while one open writer holds it back
SHORT = 0.002  # before the bell is asked for again that a writer held back; doubles up to BUSY, as most end at once
OTHERS = (1.0, 2.0)  # while another worker is announced
RINGS = 100  # in a second; above that polling is cheaper for the writers
CLAIM = 0.025  # seconds between claims while jobs flow in; each one costs, however few it brings
FLOW, WITHIN = 32, 0.1  # they flow when the last three claims brought so many jobs in so many seconds


class Pace:
    """What lately came of claims and of the bell. Times are the event loop's, in seconds. failures: in a row."""

    def __init__(self) -> None:
        self._claims: deque[tuple[float, Sequence[Lane], int]] = deque(maxlen=3)
        self._rings: deque[float] = deque(maxlen=RINGS)
        self._held_back = 0                                            # announcements in a row
        self.failures = 0

    def failed(self) -> float:
        """The database is away, or we are wrong: how long to wait, with jitter."""
        self.failures = min(self.failures + 1, 10)
        return min(5.0, 0.1 * 2.0**self.failures) * random.uniform(0.5, 1.0)

    def claimed(self, now: float, lanes: Sequence[Lane], jobs: int) -> None:
        """A claim at `now` brought so many jobs for these lanes."""
        self._claims.append((now, lanes, jobs))

    def flowing(self, now: float) -> Sequence[Lane]:
        """Lanes of the last claim, when jobs come in faster than claims are worth making; else none."""
        flow = (len(self._claims) == 3 and now - self._claims[0][0] < WITHIN
                and sum(jobs for _, _, jobs in self._claims) >= FLOW)
        return self._claims[-1][1] if flow else ()

    def next_claim(self) -> float:
        """While they flow: when to claim again."""
        return self._claims[-1][0] + CLAIM

    def rung(self, now: float) -> None:
        """The bell rang."""
        self._rings.append(now)

    def flapping(self, now: float) -> bool:
        """The bell rings all the time: writers pay for each ring."""
        return len(self._rings) == RINGS and now - self._rings[0] < 1.0

    def wait(self, answer: Answer | None, lease: float) -> float:
        """How long to wait at most after this answer to an announcement; None: there was none, as it is flapping."""
        self._held_back = self._held_back + 1 if answer is Answer.WRITER else 0
        match answer:
            case Answer.BELL:
                return lease
            case Answer.OFF:
                return POLL
            case Answer.OTHER:
                return random.uniform(*OTHERS)
            case Answer.WRITER:
                return min(BUSY, SHORT * 2.0 ** (min(self._held_back, 10) - 1))
        return BUSY
