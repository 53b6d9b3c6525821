"""Rank: which handler goes first where several wait for a slot: that of the highest priority, but waiting counts.

    rank = priority + seconds of waiting / STEP        so that 0 beats 9 after nine steps without a turn
"""

from __future__ import annotations

PRIORITY = 5  # of a handler that says nothing; 0 to 9
STEP = 1.0  # seconds of waiting that are worth one priority


def rank(priority: int, waited: float) -> float:
    """The highest goes first. waited: seconds without a turn while there was something to do."""
    return priority + max(0.0, waited) / STEP
