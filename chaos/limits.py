"""Limits: handlers that may run so many records at a time, or begin so many in any window, over all processes, while
these are killed.

A call notes its begin and its end. One that a killed process ran counts until just before it was killed.
"""

from __future__ import annotations

import bisect
import itertools
import signal
import time
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

from anton.permits import LONGER
from chaos.cell import Cell
from chaos.faults import PATIENCE, WORKERS, Result, fault

MOST = {"hold": 3, "alone": 1, "inorder": 1}  # of the app; alone, inorder: of each kind
KINDS = "abcdef"
RATE, WINDOW = 100, 5.0  # of the app's pace
FELT = 0.25  # seconds that a start may be noted after it was made, on a busy machine
OFFERED, FIRST = 15, 100  # records for pace in a second, and at once: more than it may begin


@fault("F1", "SIGKILL of workers in handlers with a limit, for all or for each key, or a rate, over all processes")
def limited(cell: Cell, n: int) -> Result:
    """No more run at a time than the limit, or begin than the rate, none out of its order, the dead hold no permits,
    and all is worked."""
    result, ids, died, kept, paced = Result(), itertools.count(1), dict[int, float](), 0, 0
    cell.start(WORKERS)
    began = time.monotonic()
    end = began + 60 + 10 * n
    while len(died) < n and time.monotonic() < end:
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
    kept = _held_by_the_dead(cell)
    took = cell.drain(PATIENCE)
    cell.look()
    result.n, result.verdict = len(died), cell.check()
    result.verdict.require(took is not None, f"not drained, and nothing acked for {PATIENCE:g} s")
    most = Counter[str]()
    for (handler, key), found in calls(cell.events, died).items():
        most[handler] = max(most[handler], overlap(found))
        result.verdict.require(most[handler] <= MOST[handler], f"{handler} ran {most[handler]} times at once ({key})")
    late = overtaken(cell.events)
    result.verdict.require(not late, f"inorder ran {late} records after a later one of their key")
    most_begun = within([event["at"] for event in cell.events if event["what"] == "start"], WINDOW - FELT)
    result.verdict.require(most_begun <= RATE, f"pace began {most_begun} records in {WINDOW:g} s")
    result.verdict.require(kept == 0, f"{kept} permits are held by the dead")
    result.more |= {"most": dict(most), "most_begun": most_begun, "drain_s": took}
    return result


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


Call = tuple[float, float]


def inside(events: Iterable[dict[str, Any]], died: dict[int, float]) -> list[tuple[str, int, float, int]]:
    """Calls that have begun and not ended, of the living: handler, record, when, pid."""
    began: dict[tuple[str, int, int], float] = {}
    for event in events:
        if event["what"] == "in":
            began[event["handler"], event["id"], event["pid"]] = event["at"]
        elif event["what"] == "out":
            began.pop((event["handler"], event["id"], event["pid"]), None)
    return [(handler, id, at, pid) for (handler, id, pid), at in began.items() if pid not in died]


def calls(events: Iterable[dict[str, Any]], died: dict[int, float]) -> dict[tuple[str, Hashable], list[Call]]:
    """From when to when each call was made, by handler and what has the limit."""
    began: dict[tuple[str, int, int], tuple[float, Hashable]] = {}
    found: dict[tuple[str, Hashable], list[Call]] = {}
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


def overlap(found: list[Call]) -> int:
    """How many of these were going on at once, at most."""
    steps = sorted([(end, -1) for _, end in found] + [(begin, +1) for begin, _ in found])
    return max(itertools.accumulate(step for _, step in steps), default=0)


def within(times: list[float], length: float) -> int:
    """How many of these are in any window of that length, at most."""
    times = sorted(times)
    return max((bisect.bisect_left(times, at + length) - n for n, at in enumerate(times)), default=0)
