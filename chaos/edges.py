"""Edges: what no trigger saw, clocks, loops, cancelling, the sleep of a worker, and the web server."""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from typing import Any

import psycopg
from servers import free_port

from chaos.cell import Cell
from chaos.faults import PATIENCE, Result, fault, percentile, through, under_load
from chaos.handlers import said


@fault("A5", "triggers disabled, replica mode: what no trigger saw is found by reconcile()")
def unseen(cell: Cell, n: int) -> Result:
    """n rows each way."""
    result = Result()
    cell.start(1)
    for way in range(2):
        ids = list(range(1 + way * n, 1 + way * n + n))
        with psycopg.connect(cell.url) as conn:
            conn.execute("alter table near disable trigger all" if way else "set session_replication_role = replica")
            conn.execute("insert into near select id, '' from unnest(%s::bigint[]) id", (ids,))
            conn.execute("alter table near enable trigger all" if way else "set session_replication_role = origin")
        cell.history.end(cell.history.begin("near", "unseen", ids), "ok")
    (found,) = cell.one("select count(*) from anton.findings()")
    cell.one("select count(*) from anton.reconcile('near', true)")
    result.more |= {"findings": found, "drain_s": cell.drain(30)}
    result.n = 2 * n
    result.verdict = cell.check()
    return result


@fault("T1", "workers whose clocks are an hour ahead and an hour behind")
def skewed(cell: Cell, n: int) -> Result:
    """n kills; no worker may take a lease that is held."""
    result = Result()
    for skew in (-3600, 3600):
        cell.start(1, skew=skew)
    with under_load(cell, result):
        time.sleep(3 * cell.lease)
        steals = said(cell, "lease was lost")
        for _ in range(n):
            above = cell.random.choice(sorted(cell.workers))
            for pid in cell.children(above):
                cell.kill(pid, "any time", both=True)
            cell.workers.discard(above)
            cell.start(1, skew=cell.random.choice((-3600, 3600)))
            time.sleep(cell.random.uniform(0.3, 1.0))
        if n:
            cell.end()
            cell.start(2)
    result.n = n
    result.verdict.require(steals == 0, f"{steals} leases were taken from workers that held them")
    result.more["false_steals"] = steals
    return result


@fault("L3", "two handlers that feed each other")
def loops(cell: Cell, n: int) -> Result:
    """The chain ends at the depth limit, as a dead letter."""
    result = Result(n)
    cell.start(1)
    for _ in range(n):
        cell.one("insert into ping (hop) values (0)")
    took = cell.drain(60)
    (rows, dead) = cell.one(
        "select (select count(*) from ping) + (select count(*) from pong), "
        "(select count(*) from anton.dead where reason = 'depth')"
    )
    result.verdict.require(took is not None, "not drained")
    result.verdict.require(dead == n and rows <= 33 * n, f"{rows} rows and {dead} dead letters for {n} loops")
    result.more |= {"rows_for_each": rows / n, "dead": dead}
    return result


@fault("C1", "cancel() of jobs that wait, are worked, and are done")
def cancels(cell: Cell, n: int) -> Result:
    """What it says is so: true for a job that nobody works any more, false where nothing changed."""
    result, cancelled = Result(n), 0
    cell.one("select anton.pause('pick_up')")
    seen = list[int]()
    for id in range(1, n + 1):
        cell.add("near", [id])
        (job,) = cell.one("select max(id) from anton.job")
        seen.append(job)
        if id % 5 == 0 and cell.one("select anton.cancel(%s)", job)[0]:
            cancelled += 1
            cell.one("delete from near where id = %s", id)
            cell.history.end(cell.history.begin("near", "cancelled", [id]), "fail")
    cell.one("select anton.resume('pick_up')")
    cell.start(1)
    result.more["drain_s"] = cell.drain(30)
    late = sum(bool(cell.one("select anton.cancel(%s)", job)[0]) for job in seen)
    cell.drain(30)
    found = Counter(row[0] for row in _rows(cell, "select src from out_near"))
    for id in range(1, n + 1):
        wanted = 0 if id % 5 == 0 else 1
        if found[id] != wanted:
            result.verdict.wrong.append(f"out_near: {id} is there {found[id]} times, not {wanted}")
            result.verdict.doubled += max(0, found[id] - wanted)
    result.verdict.require(late == 0, f"{late} jobs were cancelled after they were done")
    result.more["cancelled"] = cancelled
    return result


def _rows(cell: Cell, query: str) -> list[Any]:
    with psycopg.connect(cell.url) as conn:
        return conn.execute(query).fetchall()


@fault("W1", "the last record before a worker goes to sleep")
def last_records(cell: Cell, n: int) -> Result:
    """Single inserts, each as soon as the one before was handled; the bell alone may wake the worker."""
    result, slow = Result(n), list[float]()
    cell.start(1, lease=60)
    time.sleep(1)
    with psycopg.connect(cell.url, autocommit=True) as conn, psycopg.connect(cell.url, autocommit=True) as look:
        for id in range(1, n + 1):
            operation = cell.history.begin("near", "single", [id])
            conn.execute("insert into near values (%s, '')", (id,))
            cell.history.end(operation, "ok")
            began = time.monotonic()
            while look.execute("select count(*) from out_near where src = %s", (id,)).fetchone() == (0,):
                if time.monotonic() - began > 3:
                    break
                time.sleep(0.0002)
            slow.append(time.monotonic() - began)
            if slow[-1] > 3:
                break
            time.sleep(cell.random.uniform(0, 0.004))
    result.n = len(slow)
    result.verdict.require(max(slow) < 3, f"record {len(slow)} was not picked up in 3 s")
    result.more |= {"pickup_p99_s": percentile(slow, 0.99)}
    return result


@fault("H1", "the web server killed while it answers; 2xx means committed")
def posts(cell: Cell, n: int) -> Result:
    """n requests that were answered 200, through servers that are killed."""
    import http.client

    result, answered, next_id = Result(), 0, itertools.count(1)
    kills = 0
    cell.start(1)
    port = free_port()
    web = 0
    proxy, url = through(cell)
    proxy.choose = lambda explicit: "before" if cell.random.random() < 0.05 else None
    end = time.monotonic() + 60 + n
    try:
        while answered < n and time.monotonic() < end:
            if not web:
                (web,) = cell.start(port=port, url=url)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            for _ in range(cell.random.randint(5, 40)):
                id = next(next_id)
                operation = cell.history.begin("src", "http", [id])
                try:
                    connection.request("POST", "/put", f'{{"id": {id}}}', {"content-type": "application/json"})
                    reply = connection.getresponse()
                    reply.read()
                except ConnectionRefusedError:
                    cell.history.end(operation, "fail")
                    time.sleep(0.05)
                    connection.close()
                    continue
                except (OSError, http.client.HTTPException):
                    cell.history.end(operation, "unknown")
                    connection.close()
                    continue
                cell.history.end(operation, "ok" if reply.status == 200 else "unknown")
                answered += reply.status == 200
            connection.close()
            cell.signal(web, signal.SIGKILL)
            kills, web = kills + 1, 0
    finally:
        proxy.close()
        if web:
            cell.signal(web, signal.SIGKILL)
    took = cell.drain(PATIENCE)
    result.n = answered
    result.verdict = cell.check()
    result.verdict.require(took is not None, "not drained")
    result.more["kills"] = kills
    return result
