"""Edges: what no trigger saw, clocks, loops, cancelling, the sleep of a worker, and the web server."""

from __future__ import annotations

import http.client
import itertools
import signal
import threading
import time
from collections import Counter
from typing import Any

import psycopg
from servers import free_port

from chaos.cell import Cell
from chaos.direct import _finish
from chaos.faults import PATIENCE, Result, fault, percentile, through, under_load
from chaos.handlers import said

CLIENTS = 4  # that wait for an answer of the web server at the same time, and so may see it die


@fault("A5", "triggers disabled, replica mode, TRUNCATE: reconcile() finds what no trigger saw, and nothing else")
def unseen(cell: Cell, n: int) -> Result:
    """n rows each way; before them n that were handled, and n that nobody saw, and that a TRUNCATE took away."""
    result, seen = Result(trials=2), range(1, 1 + n)
    cell.start(1)
    off = {
        "replica mode": ("set session_replication_role = replica", "set session_replication_role = origin"),
        "triggers disabled": ("alter table near disable trigger all", "alter table near enable trigger all"),
    }

    def write(way: str, ids: range, after: str = "") -> None:
        with psycopg.connect(cell.url) as conn:
            conn.execute(off[way][0])
            conn.execute("insert into near select id, '' from unnest(%s::bigint[]) id", (list(ids),))
            if after:
                conn.execute(after)
            conn.commit()
            told = [row[0] for row in conn.execute("select problem from anton.findings() where kind = 'trigger'")]
            conn.execute(off[way][1])
        result.verdict.require(
            any("is disabled" in one for one in told) == (way == "triggers disabled"), f"{way}: findings say {told}"
        )

    def reconcile(wanted: int, what: str) -> None:
        (found,) = cell.one("select found from anton.reconcile('near', true)")
        result.verdict.require(found == wanted, f"{what}: reconcile() found {found} of {wanted}")
        result.more["found"] = result.more.get("found", 0) + found

    cell.one("insert into near select id, '' from unnest(%s::bigint[]) id", list(seen))
    result.verdict.require(cell.drain(30) is not None, "not drained")
    cell.one("truncate near")
    reconcile(0, "after TRUNCATE of what was handled")
    handled = cell.one("select count(*), count(distinct src) from out_near")
    result.verdict.require(handled == (n, n), f"{handled} outputs of {n} that were truncated later")
    cell.one("delete from out_near")
    for at, way in enumerate(off, 1):
        write(way, range(1 + at * n, 1 + at * n + n), "truncate near")
        reconcile(0, f"{way}, TRUNCATE of what nobody saw")
    for at, way in enumerate(off, 1):
        ids = range(1 + (2 + at) * n, 1 + (2 + at) * n + n)
        write(way, ids)
        cell.history.end(cell.history.begin("near", "unseen", ids), "ok")
        reconcile(n, way)
        reconcile(0, f"{way}, looked at again")
    result.n = 2 * n
    return _finish(cell, result)


@fault("T1", "workers whose clocks are an hour ahead and an hour behind")
def skewed(cell: Cell, n: int) -> Result:
    """n kills; no worker may take a lease that is held."""
    result = Result()
    for skew in (-3600, 3600):
        cell.start(1, skew=skew)
    with under_load(cell, result):
        for _ in range(n):
            above = cell.random.choice(sorted(cell.workers))
            for pid in cell.children(above):
                cell.kill(pid, "any time", both=True)
            cell.workers.discard(above)
            cell.start(1, skew=cell.random.choice((-3600, 3600)))
            time.sleep(cell.random.uniform(0.3, 1.0))
        time.sleep(3 * cell.lease)  # a heart that beats late by its clock has lost its leases by now
        steals = said(cell, "lease was lost")
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
    both = "(table ping union all table pong) h (id, hop)"
    hops = Counter(dict(_rows(cell, f"select hop, count(*) from {both} group by 1")))
    (dead,) = cell.one("select count(*) from anton.dead where reason = 'depth'")
    wanted = Counter(dict.fromkeys(range(max(hops) + 1), n))
    result.verdict.compare("hops", wanted, hops)
    result.verdict.require(took is not None, "not drained")
    result.verdict.require(dead == n and len(hops) <= 33, f"{len(hops)} hops and {dead} dead letters for {n} loops")
    result.more |= {"hops": len(hops), "dead": dead}
    return result


@fault("C1", "cancel() of jobs that wait, are worked, and are done")
def cancels(cell: Cell, n: int) -> Result:
    """What it says is so: true for a job that nobody works yet, false where nothing changed."""
    result, cancelled, worked = Result(n), 0, 0
    cell.one("select anton.pause('pick_up')")
    seen = list[int]()
    for id in range(1, n + 1):
        if id % 5:
            cell.add("near", [id])
        else:
            cell.one("insert into near values (%s, '')", id)
        (job,) = cell.one("select max(id) from anton.job")
        seen.append(job)
        if id % 5 == 0:
            (said_so,) = cell.one("select anton.cancel(%s)", job)
            result.verdict.require(said_so, f"cancel({job}) was false, and the job waited")
            cancelled += 1
            cell.one("delete from near where id = %s", id)  # an output of it would be a phantom
    cell.one("select anton.resume('pick_up')")
    cell.start(1, point="before_ack", lease=60)  # stopped with its leases held, again and again
    end = time.monotonic() + PATIENCE
    while cell.left() and time.monotonic() < end:
        for event in cell.look():
            if event["what"] == "stopped":
                for job in event["ids"]:
                    (said_so,) = cell.one("select anton.cancel(%s)", job)
                    result.verdict.require(not said_so, f"cancel({job}) was true, and the job was being worked")
                    worked += 1
                cell.signal(event["pid"], signal.SIGCONT)
        time.sleep(0.005)
    late = sum(bool(cell.one("select anton.cancel(%s)", job)[0]) for job in seen)
    cell.one("select anton.ring()")  # for what came back
    result.verdict.require(late == 0, f"{late} jobs were cancelled after they were done")
    result.verdict.require(worked > 0, "no job was found being worked")
    result.more |= {"waiting": cancelled, "worked": worked, "done": n - cancelled}
    return _finish(cell, result)


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
    return _finish(cell, result)


@fault("H1", "the web server killed with requests in flight, and COMMITs of its routes that never arrive")
def posts(cell: Cell, n: int) -> Result:
    """n kills of a server that had requests it had not answered; those answered 200 are in the database, once."""
    result, ids, answers = Result(), itertools.count(1), Counter[str]()
    cell.start(1)
    port, proxy, url = free_port(), *through(cell)
    proxy.choose = lambda explicit: "before" if cell.random.random() < 0.05 else None
    waiting, kills, enough = set[int](), 0, threading.Event()

    def post() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        while not enough.is_set():
            id = next(ids)
            operation = cell.history.begin("src", "http", [id])
            waiting.add(id)
            try:
                connection.request("POST", "/put", f'{{"id": {id}}}', {"content-type": "application/json"})
                reply = connection.getresponse()
                reply.read()
                answers[str(reply.status)] += 1
                cell.history.end(operation, "ok" if reply.status == 200 else "unknown")
            except ConnectionRefusedError:
                cell.history.end(operation, "fail")
                connection.close()
                enough.wait(0.02)
            except (OSError, http.client.HTTPException):
                cell.history.end(operation, "unknown")
                connection.close()
            finally:
                waiting.discard(id)
        connection.close()

    clients = [threading.Thread(target=post) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    end = time.monotonic() + 60 + 10 * n
    web = 0
    try:
        while kills < n and time.monotonic() < end:
            (web,) = cell.start(port=port, url=url)
            answered = answers["200"]
            while answers["200"] == answered and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(cell.random.uniform(0, 0.3))
            sent = set(waiting)
            cell.signal(web, signal.SIGSTOP)
            time.sleep(0.02)  # what was answered before is read
            kills += bool(sent & waiting)
            cell.signal(web, signal.SIGKILL)
            web = 0
            while cell.left() > 2000 and time.monotonic() < end:
                time.sleep(0.1)
    finally:
        enough.set()
        if web:
            cell.signal(web, signal.SIGKILL)
        for client in clients:
            client.join()
        proxy.close()
    result.n = kills
    result.more |= {"answers": dict(answers)}
    return _finish(cell, result)
