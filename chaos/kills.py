"""Kills: SIGKILL of workers that have jobs in flight, one experiment after the other, and how soon all is redone."""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.cell import Cell
from chaos.faults import WORKERS, Result, fault, percentile, under_load
from chaos.points import POINTS

CHAIN = (1, 1, 1, 2, 3)  # deaths in a row, each of whoever has jobs then, before the others are left in peace
SOON = 3.0  # seconds that a worker has to come to its point, or to be found with jobs
REAPER = "reaper_mid"  # the point of those who redo what the dead held
PEACE = 60.0  # seconds at most that the living have to redo it, before the next experiment begins all the same
RATE = 8  # operations a second, of nine records on average: what is measured is not how much two cores can take


@fault("P1", "SIGKILL of a worker, half at named points, half at any time; half with its supervisor")
def kills(cell: Cell, n: int) -> Result:
    """Counts only kills with a lease in flight."""
    return _kills(cell, n)


@fault("N7", "through PgBouncer in transaction mode, with kills")
def pooled(cell: Cell, n: int) -> Result:
    """Workers are behind it, producers are not."""
    import working

    with working.pooled(cell.server, cell.name, Path(cell.log).parent, size=20) as url:
        return _kills(cell, n, url=url, pooled=True)


def _kills(cell: Cell, n: int, **given: Any) -> Result:
    """Experiments: one to three deaths in a row, then peace until the living have redone what the dead held.

    Between them is the fleet whole. Who dies is whoever has jobs, so nobody works undisturbed beside the dying.
    """
    result, chains, points = Result(), 0, itertools.cycle(point for point in POINTS if point != REAPER)
    late = 0
    with under_load(cell, result, rate=RATE):
        end = time.monotonic() + 60 + 20 * n
        while len(cell.kills) < n and time.monotonic() < end:
            with cell.calm():
                for pid in sorted(cell.workers)[WORKERS:]:
                    cell.signal(pid, signal.SIGTERM)
                    cell.workers.discard(pid)
                while len(cell.workers) < WORKERS:
                    cell.start(point=next(points), hits=cell.random.randint(1, 12), **given)
                time.sleep(cell.random.uniform(0, 0.4))
            dead = list[int]()
            for nth in range(cell.random.choice(CHAIN)):
                both = cell.random.random() < 0.5
                if nth and cell.random.random() < 0.5:  # of those that redo what the one before held
                    cell.start(point=REAPER, hits=1, **given)
                    dead += _kill(cell, _stopped, both)
                elif cell.random.random() < 0.5:
                    dead += _kill(cell, _stopped, both)
                else:
                    with cell.calm():
                        dead += _kill(cell, _busy, both)
            chains += bool(dead)
            late += not _redone(cell, dead, **given)
    redo, unsettled = cell.redo()
    result.verdict.require(unsettled == 0, f"{unsettled} parts that a killed worker held were never settled")
    result.verdict.require(late == 0, f"{late} times the living had not redone it all in {PEACE:g} s")
    result.n, result.trials = len(cell.kills), chains
    result.more |= {
        "chains": chains,
        "points": dict(Counter(kill.point for kill in cell.kills)),
        "redo_p50_s": percentile(redo, 0.5),
        "redo_p99_s": percentile(redo, 0.99),
        "leases": sum(len(kill.held) for kill in cell.kills),
    }
    return result


def _kill(cell: Cell, find: Callable[[Cell], tuple[int, str] | None], both: bool) -> list[int]:
    """The process that died, if one was found; who else had stopped goes on."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        found = find(cell)
        if found is not None:
            pid, point = found
            killed = cell.kill(pid, point, both)
            _go_on(cell)
            return [pid] if killed else []
        time.sleep(0.005)
    return []


def _stopped(cell: Cell) -> tuple[int, str] | None:
    """One that has come to its point."""
    stops = cell.stops()
    for stop in stops[1:]:
        cell.signal(stop.pid, signal.SIGCONT)
    return (stops[0].pid, stops[0].point) if stops else None


def _busy(cell: Cell) -> tuple[int, str] | None:
    """One that has jobs, wherever it is."""
    (busy,) = cell.one(
        "select array(select distinct w.pid from anton.lease l join anton.worker w on w.id = l.worker_id "
        "where w.stopped_at is null)"
    )
    children = [pid for one in cell.workers for pid in cell.children(one) if pid in busy]
    return (cell.random.choice(children), "any time") if children else None


def _go_on(cell: Cell) -> None:
    for stop in cell.stops():
        cell.signal(stop.pid, signal.SIGCONT)


def _redone(cell: Cell, dead: list[int], **given: Any) -> bool:
    """Waits until the living have what these held; False when that takes too long."""
    end = time.monotonic() + PEACE
    with cell.calm():
        while cell.one(
            "select count(*) from anton.lease l join anton.worker w on w.id = l.worker_id "
            "where l.alone or l.together > 0 or w.pid = any(%s)",
            dead,
        ) != (0,):
            if time.monotonic() > end:
                return False
            _go_on(cell)
            if not cell.workers:
                cell.start(**given)
            time.sleep(0.02)
        return True
