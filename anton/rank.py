"""Rank: which handler goes first where several wait for a slot: that of the highest priority, but waiting counts.

    rank = priority + seconds of waiting / STEP        so that 0 beats 9 after nine steps without a turn
"""

from __future__ import annotations

PRIORITY, HIGHEST = 5, 9  # of a handler that says nothing; the lowest is 0
STEP = 1.0  # seconds of waiting that are worth one priority


def rank(priority: int, waited: float) -> float:
    """The highest goes first. waited: seconds without a turn while there was something to do."""
    return priority + max(0.0, waited) / STEP
