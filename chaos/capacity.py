"""Capacity: more than a handler can do, a world that is away, a snapshot that is held open."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import psycopg

from benchmarks.proc import rss_mb
from chaos.cell import Cell
from chaos.faults import Result, fault, percentile

CAPACITY = 1000  # records/s of the handlers `call` and `work`


@fault("OUT", "the world away: what a handler calls fails for n seconds")
def outage(cell: Cell, n: int) -> Result:
    """Nothing may die; then the backlog is drained, compared with the time its handler needs for it."""
    result = Result(n)
    cell.start(1)
    cell.world.touch()
    ids, rate = itertools.count(1), 500
    began = time.monotonic()
    while time.monotonic() - began < n:
        cell.add("outside", [next(ids) for _ in range(rate)], "many")
        time.sleep(1.0 - (time.monotonic() - began) % 1.0)
    (backlog,) = cell.one("select count(*) from outside")
    cell.world.unlink()
    began = time.monotonic()
    while cell.one("select count(*) from out_outside") == (0,):
        time.sleep(0.02)
    probe = time.monotonic() - began
    cell.drain(200)
    took, ideal = time.monotonic() - began, backlog / CAPACITY
    result.verdict = cell.check()
    (died,) = cell.one("select count(*) from anton.dead")
    result.more |= {
        "dead": died,
        "drain_s": took,
        "ideal_s": ideal,
        "ratio": took / ideal,
        "backlog": backlog,
        "first_probe_s": probe,
    }
    return result


def _pick_ups(cell: Cell, ids: Iterator[int], seconds: float) -> list[float]:
    """Ten single inserts a second, and how long each takes to be handled."""
    times = []
    end = time.monotonic() + seconds
    with psycopg.connect(cell.url, autocommit=True) as conn:
        while time.monotonic() < end:
            id = next(ids)
            operation = cell.history.begin("near", "single", [id])
            conn.execute("insert into near values (%s, '')", (id,))
            cell.history.end(operation, "ok")
            began = time.monotonic()
            while conn.execute("select count(*) from out_near where src = %s", (id,)).fetchone() == (0,):
                time.sleep(0.001)
            times.append(time.monotonic() - began)
            time.sleep(max(0.0, 0.1 - times[-1]))
    return times


@fault("L1", "ten times what a handler can do, offered for n seconds whatever comes of it")
def overload(cell: Cell, n: int) -> Result:
    """The handler goes on at its pace, its neighbour is not disturbed, the worker does not grow."""
    result, near = Result(n), itertools.count(1)
    (worker,) = cell.start(1, lease=30)
    cell.one("create index on out_near (src)")
    _pick_ups(cell, near, 1)
    idle = percentile(_pick_ups(cell, near, max(5, n / 4)), 0.99) or 1.0
    ids, stop = itertools.count(1), threading.Event()

    def offer() -> None:
        began = time.monotonic()
        for second in itertools.count(1):
            for part in range(10):
                cell.add("load", [next(ids) for _ in range(CAPACITY)], "many")
                if stop.wait(max(0.0, began + second - 1 + (part + 1) / 10 - time.monotonic())):
                    return

    thread = threading.Thread(target=offer)
    thread.start()
    time.sleep(2)
    (before,), began, small = cell.one("select count(*) from out_load"), time.monotonic(), rss_mb(worker) or 0.0
    busy = percentile(_pick_ups(cell, near, n), 0.99) or 0.0
    (after,), seconds, large = (
        cell.one("select count(*) from out_load"),
        time.monotonic() - began,
        rss_mb(worker) or 0.0,
    )
    stop.set()
    thread.join()
    (offered,) = cell.one("select count(*) from load")
    result.more |= {
        "goodput": (after - before) / seconds / CAPACITY,
        "neighbour_ratio": busy / idle,
        "idle_p99_s": idle,
        "busy_p99_s": busy,
        "offered": offered,
        "rss_growth_mb": large - small,
    }
    return result


@fault("D12", "a snapshot held open while n single-record jobs are worked")
def held_snapshot(cell: Cell, n: int) -> Result:
    """How long claims take at the end, when all that was claimed lies dead in the table. Claims as a worker does."""
    result, times = Result(n), list[float]()
    (handler,) = cell.one("select id from anton.handler where name = 'pick_up'")
    with psycopg.connect(cell.url) as holder, psycopg.connect(cell.url, autocommit=True) as conn:
        holder.execute("set transaction isolation level repeatable read")
        holder.execute("select count(*) from near")
        conn.execute(
            "insert into anton.job (handler_id, change_id, at, lo, hi, op, ids) select %s, 0, now(), 1, 1, 'n', "
            "array[g] from generate_series(1, %s) g",
            (handler, n),
        )
        conn.execute("analyze anton.job")
        after, from_start, took = 0, time.monotonic(), 0.0
        for token in itertools.count(1):
            if time.monotonic() - from_start > max(1.0, 20 * took):
                after, from_start = 0, time.monotonic()
            began = time.perf_counter()
            ids = [
                row[0]
                for row in conn.execute(
                    "select id from anton.claim(1, %s, array[%s]::int[], array[100], array[100], "
                    "array[%s]::bigint[], '1 hour')",
                    (token, handler, after),
                ).fetchall()
            ]
            times.append(time.perf_counter() - began)
            took = took if after else times[-1]
            if not ids:
                break
            after = ids[-1]
            conn.execute("select anton.ack(%s, %s::bigint[], 1, 1)", (token, ids))
    tenth = len(times) // 10
    first, last = percentile(times[:tenth], 0.99) or 1.0, percentile(times[-tenth:-1], 0.99) or 0.0
    result.more |= {
        "claims": len(times),
        "first_p99_ms": first * 1000,
        "last_p99_ms": last * 1000,
        "ratio": last / first,
    }
    return result
