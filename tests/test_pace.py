"""Pace: how soon a worker asks again. Times are numbers here; nothing waits."""

from __future__ import annotations

from anton.doorbell import Answer
from anton.pace import BUSY, RINGS, SHORT, Pace


def test_a_bell_that_a_short_writer_holds_back_is_asked_for_again_at_once_and_then_less_and_less_often() -> None:
    pace = Pace()
    waits = [pace.wait(Answer.WRITER, 30.0) for _ in range(20)]
    assert waits[0] == SHORT < BUSY / 10 and waits[1] == 2 * SHORT
    assert waits == sorted(waits) and waits[-1] == BUSY
    assert pace.wait(Answer.BELL, 30.0) == 30.0
    assert pace.wait(Answer.WRITER, 30.0) == SHORT


def test_thirty_rings_a_second_do_not_turn_the_bell_off_and_a_hundred_do() -> None:
    pace = Pace()
    for ring in range(200):
        pace.rung(ring / 30)
    assert not pace.flapping(200 / 30)
    for ring in range(RINGS):
        pace.rung(100 + ring / (2 * RINGS))
    assert pace.flapping(100.5) and not pace.flapping(102)


def test_pauses_after_failures_grow_to_five_seconds_and_a_success_ends_them() -> None:
    pace = Pace()
    waits = [pace.failed() for _ in range(20)]
    assert 0.1 <= waits[0] <= 0.2 and all(2.5 <= wait <= 5 for wait in waits[6:])
    pace.failures = 0
    assert pace.failed() <= 0.2
