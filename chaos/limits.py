"""Limits: handlers that may run so many records at a time, or begin so many in any window, over all processes, while
these are killed.

A call notes its begin and its end. One that a killed process ran counts until just before it was killed.
"""

from __future__ import annotations

import bisect
import itertools
import signal
import time
from collections.abc import Hashable, Iterable
from typing import Any

from anton.permits import LONGER
from chaos.cell import Cell
from chaos.faults import PATIENCE, WORKERS, Result, fault

Call = tuple[float, float]
Calls = dict[tuple[str, Hashable], list[Call]]  # by handler and key
KINDS = "abcdef"
RATE, WINDOW = 100, 5.0  # of the app's pace
FELT = 0.25  # seconds that a start may be noted after it was made, on a busy machine
OFFERED, FIRST = 15, 100  # records for pace in a second, and at once: more than it may begin


@fault("F1", "SIGKILL of workers in handlers with a limit, for all or for each key, or a rate, over all processes")
def limited(cell: Cell, n: int) -> Result:
    """Every kind of limit holds, the dead hold no permits, and all is worked."""
    result = Result()
    cell.start(WORKERS)
    died = _killed(cell, n)
    kept = _held_by_the_dead(cell)
    took = cell.drain(PATIENCE)
    cell.look()
    result.n, result.verdict = len(died), cell.check()
    result.verdict.require(took is not None, f"not drained, and nothing acked for {PATIENCE:g} s")
    result.verdict.require(kept == 0, f"{kept} permits are held by the dead")
    found = calls(cell.events, died)
    for kind in (_limit_for_all, _limit_for_each_key, _order_of_each_key, _rate):
        kind(result, cell.events, found)
    result.more["drain_s"] = took
    return result


def _killed(cell: Cell, n: int) -> dict[int, float]:
    """Offers records to all of these handlers while n workers are killed, each inside of a call: who, and when."""
    ids, paced, died = itertools.count(1), 0, dict[int, float]()
    began = time.monotonic()
    while len(died) < n and time.monotonic() < began + 60 + 10 * n:
        for kind in KINDS:
            cell.add("gated", [next(ids) for _ in range(2)], kind)
        due = FIRST + int(OFFERED * (time.monotonic() - began))
        if due > paced:
            cell.add("paced", [*range(paced + 1, due + 1)])
            paced = due
        cell.look()
        busy = sorted({pid for _, _, _, pid in inside(cell.events, died)})
        if busy and cell.random.random() < 0.7:
            pid = cell.random.choice(busy)
            died[pid] = time.time()
            cell.signal(pid, signal.SIGKILL)
        time.sleep(cell.random.uniform(0.05, 0.4))
    return died


def _limit_for_all(result: Result, events: list[dict[str, Any]], found: Calls) -> None:
    """hold, concurrency=3: no more calls at a time over all processes."""
    most = result.more["most_of_all"] = at_once(found, "hold")
    result.verdict.require(most <= 3, f"hold ran {most} times at once")


def _limit_for_each_key(result: Result, events: list[dict[str, Any]], found: Calls) -> None:
    """alone, concurrency=1, per="kind": no more calls of a kind at a time."""
    most = result.more["most_of_a_key"] = at_once(found, "alone")
    result.verdict.require(most <= 1, f"alone ran {most} times at once")


def _order_of_each_key(result: Result, events: list[dict[str, Any]], found: Calls) -> None:
    """inorder, ordered=True, per="kind": one call of a kind at a time, and none after that of a later record."""
    most, late = at_once(found, "inorder"), overtaken(events)
    result.verdict.require(most <= 1, f"inorder ran {most} times at once")
    result.verdict.require(not late, f"inorder ran {late} records after a later one of their key")


def _rate(result: Result, events: list[dict[str, Any]], found: Calls) -> None:
    """pace, rate="100/5s": no more begin in any window over all processes."""
    starts = [event["at"] for event in events if event["what"] == "start"]
    most = result.more["most_begun"] = within(starts, WINDOW - FELT)
    result.verdict.require(most <= RATE, f"pace began {most} records in {WINDOW:g} s")


def _held_by_the_dead(cell: Cell) -> int:
    """Permits that stay theirs. What a session was taking as its worker was killed is no longer than it lasts."""
    end = time.monotonic() + LONGER * cell.lease + 1
    while True:
        (held,) = cell.one(
            "select count(*) from anton.permit p join anton.worker w on w.id = p.worker_id "
            "where w.stopped_at is not null and p.lease_until > anton.now()"
        )
        if not held or time.monotonic() > end:
            return int(held)
        time.sleep(0.05)


def inside(events: Iterable[dict[str, Any]], died: dict[int, float]) -> list[tuple[str, int, float, int]]:
    """Calls that have begun and not ended, of the living: handler, record, when, pid."""
    began: dict[tuple[str, int, int], float] = {}
    for event in events:
        if event["what"] == "in":
            began[event["handler"], event["id"], event["pid"]] = event["at"]
        elif event["what"] == "out":
            began.pop((event["handler"], event["id"], event["pid"]), None)
    return [(handler, id, at, pid) for (handler, id, pid), at in began.items() if pid not in died]


def calls(events: Iterable[dict[str, Any]], died: dict[int, float]) -> Calls:
    """From when to when each call was made, by handler and what has the limit."""
    began: dict[tuple[str, int, int], tuple[float, Hashable]] = {}
    found: Calls = {}
    for event in events:
        if event["what"] == "in":
            began[event["handler"], event["id"], event["pid"]] = event["at"], event["key"]
        elif event["what"] == "out":
            at, key = began.pop((event["handler"], event["id"], event["pid"]))
            found.setdefault((event["handler"], key), []).append((at, event["at"]))
    for (handler, _, pid), (at, key) in began.items():
        found.setdefault((handler, key), []).append((at, max(at, died.get(pid, at))))
    return found


def overtaken(events: Iterable[dict[str, Any]]) -> int:
    """Runs of inorder after one of a record of their key that was inserted later."""
    last, late = dict[str, int](), 0
    for event in sorted((one for one in events if one["what"] == "in"), key=lambda one: one["at"]):
        if event["handler"] == "inorder":
            late += event["id"] < last.get(event["key"], 0)
            last[event["key"]] = max(event["id"], last.get(event["key"], 0))
    return late


def at_once(found: Calls, handler: str) -> int:
    """How many of its calls were going on at once, at most; of one key, where it has keys."""
    return max((overlap(some) for (name, _), some in found.items() if name == handler), default=0)


def overlap(found: list[Call]) -> int:
    """How many of these were going on at once, at most."""
    steps = sorted([(end, -1) for _, end in found] + [(begin, +1) for begin, _ in found])
    return max(itertools.accumulate(step for _, step in steps), default=0)


def within(times: list[float], length: float) -> int:
    """How many of these are in any window of that length, at most."""
    times = sorted(times)
    return max((bisect.bisect_left(times, at + length) - n for n, at in enumerate(times)), default=0)
