"""Capacity: more than a handler can do, a world that is away, a snapshot that is held open."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import psycopg

from benchmarks.proc import peak_rss, rss_mb
from chaos.cell import Cell
from chaos.faults import Result, fault, percentile
from chaos.offer import offering

PROBES = (0.02, 0.08)  # seconds between those, as in `make bench BENCH=pickup`
CAPACITY = 1000  # records/s of the handlers `call` and `work`


@fault("OUT", "the world away: what a handler calls fails for n seconds")
def outage(cell: Cell, n: int) -> Result:
    """Nothing may die; then the backlog is drained, compared with the time its handler needs for it."""
    result = Result(n, trials=0)
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
    drained = cell.drain(200)
    took, ideal = time.monotonic() - began, backlog / CAPACITY
    result.verdict = cell.check()
    result.verdict.require(drained is not None, "not drained in 200 s without an ack")
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


def _pick_ups(cell: Cell, first: int, seconds: float) -> tuple[dict[str, float], int]:
    """From the reply to COMMIT until the handler's first line, of single inserts at random times from a process of
    its own: percentiles in ms, how late that process was itself, and the next id."""
    with offering(cell.url, "near", seconds, PROBES, first=first) as offer:
        committed, late = offer.wait().committed, offer.late
    end = time.monotonic() + 30
    while cell.one("select count(*) from out_near where src >= %s", first) != (len(committed),):
        if time.monotonic() > end:
            raise RuntimeError(f"{len(committed)} rows were written to near, and not as many handled")
        time.sleep(0.2)
    with psycopg.connect(cell.url) as conn:
        found: dict[int, int] = dict(conn.execute("select src, at from out_near where src >= %s", (first,)).fetchall())
    waits = [max(0.0, (found[id] - at) / 1e6) for id, at in committed.items()]
    cell.history.end(cell.history.begin("near", "single", committed), "ok")
    shown = {f"p{round(q * 100)}_ms": percentile(waits, q) or 0.0 for q in (0.5, 0.9, 0.99)}
    return shown | {"n": len(waits), "late_p99_ms": 1000 * (percentile(late, 0.99) or 0.0)}, first + len(committed)


@fault("L1", "ten times what a handler can do, offered for n seconds whatever comes of it")
def overload(cell: Cell, n: int) -> Result:
    """The handler goes on at its pace, its neighbour is not disturbed, the worker does not grow.

    What is left would take it ten times as long, so it is not drained for the check: each record has one output, or
    still waits.
    """
    result, parts = Result(n, trials=0), 10
    (worker,) = cell.start(1, lease=30)
    _, near = _pick_ups(cell, 1, 3)
    idle, near = _pick_ups(cell, near, max(5, n / 2))
    with offering(cell.url, "load", n + 10, (1 / parts, 1 / parts), rows=10 * CAPACITY // parts) as load:
        time.sleep(2)
        (before,), began, memory = cell.one("select count(*) from out_load"), time.monotonic(), [_memory(worker)]
        with peak_rss(worker) as peak:
            busy, _ = _pick_ups(cell, near, n)
        (after,), seconds = cell.one("select count(*) from out_load"), time.monotonic() - began
        memory.append(_memory(worker))
        if load.process.poll() is not None:
            raise RuntimeError("the load ended before the probes did")
        load.wait()
    records, twice, lost = cell.one(
        "select w.n, o.n - o.srcs, w.n - o.srcs - l.n from (select count(*) as n from load) w, "
        "(select count(*) as n, count(distinct src) as srcs from out_load) o, "
        "(select coalesce(sum(j.hi - j.lo + 1 - coalesce(cardinality(j.settled), 0)), 0)::bigint as n "
        "from (select handler_id, lo, hi, settled from anton.job union all "
        "select handler_id, lo, hi, settled from anton.lease union all "
        "select handler_id, lo, hi, settled from anton.delayed) j "
        "join anton.handler h on h.id = j.handler_id where h.name = 'work') l"
    )
    result.verdict.doubled += twice
    result.verdict.lost += max(0, lost)
    result.verdict.require(lost == 0, f"of {records} records {lost} neither wait nor have an output")
    result.verdict.acked = records
    result.more |= {
        "goodput": (after - before) / seconds / CAPACITY,
        "neighbour_ratio": busy["p99_ms"] / idle["p99_ms"],
        "idle": idle,
        "busy": busy,
        "offered_per_s": load.rows * len(load.committed) / (n + 10),
        "load_late_p99_ms": 1000 * (percentile(load.late, 0.99) or 0.0),
        "rss_mb": [round(one, 1) for one in (*memory, *peak)],
    }
    return result


def _memory(pid: int) -> float:
    return rss_mb(pid) or 0.0


@fault("D12", "a snapshot held open while n single-record jobs are worked")
def held_snapshot(cell: Cell, n: int) -> Result:
    """How long claims take at the end, when all that was claimed lies dead in the table. Claims as a worker does."""
    result, times, seen = Result(n, trials=0), list[float](), Counter[int]()
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
            rows = conn.execute(
                "select id, ids from anton.claim(1, %s, array[%s]::int[], array[25], array[25], "
                "array[%s]::bigint[], '1 hour')",
                (token, handler, after),
            ).fetchall()
            times.append(time.perf_counter() - began)
            took = took if after else times[-1]
            if not rows:
                break
            ids = [row[0] for row in rows]
            seen.update(record for row in rows for record in row[1])
            after = ids[-1]
            conn.execute("select anton.ack(%s, %s::bigint[], 1, 1)", (token, ids))
    result.verdict.lost = n - len(seen)
    result.verdict.doubled = seen.total() - len(seen)
    (settled,) = cell.one("select sum(n) from anton.receipt where handler_id = %s", handler)
    result.verdict.require(settled == n, f"receipts say {settled}, not {n}")
    result.verdict.require(not cell.left(), f"{cell.left()} jobs are left")
    tenth = len(times) // 10
    first, last = percentile(times[:tenth], 0.99) or 1.0, percentile(times[-tenth:-1], 0.99) or 0.0
    tenths = [times[at:at + tenth] for at in range(0, 10 * tenth, tenth)]
    result.more |= {
        "p50_ms_by_tenth": [round(1000 * (percentile(part, 0.5) or 0.0), 2) for part in tenths],
        "p99_ms_by_tenth": [round(1000 * (percentile(part, 0.99) or 0.0), 2) for part in tenths],
        "claims": len(times),
        "first_p99_ms": first * 1000,
        "last_p99_ms": last * 1000,
        "ratio": last / first,
    }
    return result
