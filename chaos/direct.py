"""Direct: one harm, at one place, in seconds. What other faults meet by chance among thousands of records, these do.

The harness is a worker here, too: it claims and takes leases through the functions that any worker calls.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg

from chaos.cell import Cell
from chaos.faults import PATIENCE, Result, fault

SOON = 20.0  # seconds that a worker has to come to its point, or to go on from there
IN_FLIGHT = ("before_commit", "before_ack", "after_claim")


def _stopped(cell: Cell, point: str) -> dict[str, Any]:
    """The next worker that comes to its point. Raises TimeoutError."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        for event in cell.look():
            if event["what"] == "stopped":
                return event
        time.sleep(0.01)
    raise TimeoutError(f"no worker came to {point} in {SOON:g} s")


def _finish(cell: Cell, result: Result) -> Result:
    took = cell.drain(PATIENCE)
    verdict = cell.check()
    verdict.wrong += result.verdict.wrong
    result.verdict = verdict
    verdict.require(took is not None, f"not drained, and nothing acked for {PATIENCE:g} s")
    result.more["drain_s"] = took
    return result


@fault("P1a", "SIGKILL of a worker and its supervisor with one job in flight, at three named points in turn")
def killed_in_flight(cell: Cell, n: int) -> Result:
    """n kills, one after the other; then one worker finds all that they left."""
    result = Result()
    for id in range(1, n + 1):
        point = IN_FLIGHT[id % len(IN_FLIGHT)]
        cell.add("shaky" if id % 4 == 0 and point != "before_commit" else "near", [id])
        cell.start(point=point)
        result.n += cell.kill(_stopped(cell, point)["pid"], point, both=True) is not None
    cell.start()
    return _finish(cell, result)


def _zombies(cell: Cell, n: int, point: str) -> Result:
    """n workers sleep at the point, and the harness takes the lease of each before the next begins; all go on."""
    result, said, token = Result(), dict[int, str | None](), cell.random.getrandbits(62)
    (me,) = cell.one("select anton.register_worker('chaos', 'harness', 0, '')")
    mine, wanted = "select count(*) from anton.lease where token = %s", 0
    for id in range(1, n + 1):
        cell.add(("near", "shaky")[id % 2], [id])
        cell.start(point=point)
        event = _stopped(cell, point)
        said[event["pid"]] = None
        wanted += len(event["ids"])
        cell.one("select anton.worker_died(id) from anton.worker where pid = %s", event["pid"])  # so it is told
        end = time.monotonic() + SOON
        while cell.one(mine, token)[0] < wanted and time.monotonic() < end:
            cell.one(  # in one statement: a lease of a second may end between two
                "select h.n from (select count(*) as n "
                "from anton.reclaim(%s, %s, array(select id from anton.handler), %s, 100)) r "
                "cross join lateral (select count(*) as n from anton.heartbeat(%s, "
                "case when r.n >= 0 then array[%s::bigint] end, '10 min')) h",
                me,
                token,
                f"{cell.lease} s",
                me,
                token,
            )
    (got,) = cell.one(mine, token)
    with cell.calm():  # an ack that is tried again goes through
        for pid in said:
            cell.signal(pid, signal.SIGCONT)
        end = time.monotonic() + SOON
        while None in said.values() and time.monotonic() < end:
            for event in cell.look():
                if event["what"] in ("refused", "accepted") and event["pid"] in said:
                    said[event["pid"]] = event["what"]
            time.sleep(0.01)
    (held,) = cell.one(mine, token)
    count = Counter(what for what in said.values() if what is not None)
    result.verdict.require(len(said) == n, f"{len(said)} workers slept, not {n}")
    result.verdict.require(got == wanted, f"the harness came by {got} leases, not {wanted}, in {SOON:g} s for each")
    result.verdict.require(held == got, f"{got - held} of {got} leases were taken from the harness")
    result.verdict.require(count["accepted"] == 0, f"{count['accepted']} stale acks were accepted")
    result.verdict.require(count.total() == n, f"{n - count.total()} zombies did not try their ack")
    with contextlib.suppress(psycopg.DatabaseError):  # what is gone is in the verdict
        cell.one("select anton.give_back(%s, array(select id from anton.lease where token = %s))", token, token)
    result.n = count.total()
    result.more |= dict(count)
    return _finish(cell, result)


@fault("P3a", "SIGSTOP just before the ack, until the harness has the lease; then SIGCONT")
def stale_acks(cell: Cell, n: int) -> Result:
    """n stale acks; each is refused, and the harness keeps its leases."""
    return _zombies(cell, n, "before_ack")


@fault("P3b", "as P3a, and the heart of the zombie beats before it tries its ack")
def stale_hearts(cell: Cell, n: int) -> Result:
    """n heartbeats with tokens that hold nothing any more, then n stale acks."""
    return _zombies(cell, n, "before_late_ack")


@fault("P3c", "SIGSTOP inside the ack, just before its COMMIT, until another worker has done the work; then SIGCONT")
def frozen_acks(cell: Cell, n: int) -> Result:
    """n acks that hold their row locks; the server ends them, and what they had written is not there twice."""
    result = Result(n)
    for id in range(1, n + 1):
        cell.add("near", [id])
        cell.start(point="before_commit")
        _stopped(cell, "before_commit")
    with cell.calm():
        cell.start()
        end = time.monotonic() + SOON
        while cell.one("select count(*) from out_near") != (n,) and time.monotonic() < end:
            time.sleep(0.02)
        (done,) = cell.one("select count(*) from out_near")
        result.verdict.require(done == n, f"{n - done} of {n} records waited for {SOON:g} s behind a frozen ack")
        for event in cell.events:
            if event["what"] == "stopped":
                cell.signal(event["pid"], signal.SIGCONT)
        return _finish(cell, result)


@fault("R2", "records that fail their first run, beside others, each in a call of its own")
def first_runs(cell: Cell, n: int) -> Result:
    """n of them in a statement of 5 n records. What a failed run wrote is not there."""
    cell.add("src", list(range(16, 16 + 5 * n)), "many")
    result = Result(n)
    cell.start()
    return _finish(cell, result)


@fault("Q1", "a claim whose transaction stays open, beside a worker that claims from the same handler")
def open_claims(cell: Cell, n: int) -> Result:
    """n jobs are claimed by the harness, and n that come later by the worker, which waits for nobody."""
    result, token = Result(n), cell.random.getrandbits(62)
    (handler,) = cell.one("select id from anton.handler where name = 'pick_up'")
    for id in range(1, n + 1):
        cell.add("near", [id])
    with psycopg.connect(cell.url) as conn:
        rows = conn.execute(
            "select id, ids from anton.claim(1, %s, array[%s], array[%s], array[%s], array[0::bigint], '10 min')",
            (token, handler, n, n),
        ).fetchall()
        for id in range(n + 1, 2 * n + 1):
            cell.add("near", [id])
        cell.start()
        end = time.monotonic() + SOON
        while time.monotonic() < end and cell.one("select count(*) from out_near") != (n,):
            if cell.one(  # by us, not by what else the server does
                "select count(*) from pg_stat_activity where %s = any (pg_blocking_pids(pid))", conn.info.backend_pid
            ) != (0,):
                break
            time.sleep(0.01)
        conn.execute("select anton.ack(%s, %s::bigint[], 1, 1)", (token, [row[0] for row in rows]))
        conn.execute("insert into out_near (src) select unnest(%s::bigint[])", ([row[1][0] for row in rows],))
    return _finish(cell, result)


@fault("T1a", "what leases they get whose clocks are an hour ahead and an hour behind")
def skewed_claims(cell: Cell, n: int) -> Result:
    """n leases, each as long as it was asked for."""
    result, asked = Result(), 30.0
    for id in range(1, n + 1):
        cell.add("near", [id])
        cell.start(point="after_claim", lease=asked, skew=3600 * (-1) ** id)
        event = _stopped(cell, "after_claim")
        (left,) = cell.one(
            "select extract(epoch from min(l.lease_until) - now())::float8 from anton.lease l "
            "join anton.worker w on w.id = l.worker_id where w.pid = %s",
            event["pid"],
        )
        result.n += 1
        result.verdict.require(left is not None and 0 < left <= asked, f"a lease of {left} s, not of {asked:g}")
        cell.signal(event["pid"], signal.SIGCONT)
    return _finish(cell, result)


@fault("W2", "a record that is written between a worker's look and its announcement")
def second_looks(cell: Cell, n: int) -> Result:
    """n of them, each to a worker that has just started; its lease is so long that it has no other reason to look."""
    result, slow = Result(), list[float]()
    for id in range(1, n + 1):
        cell.start(lease=60, point="before_announce")
        event = _stopped(cell, "before_announce")
        cell.add("near", [id])
        since = len(cell.events)
        cell.signal(event["pid"], signal.SIGCONT)
        began = time.monotonic()
        while cell.one("select count(*) from out_near where src = %s", id) == (0,):
            for stop in cell.stops():
                cell.signal(stop.pid, signal.SIGCONT)
            if _sleeps(cell, event["pid"], since):
                result.verdict.wrong.append(f"record {id} lies in the queue, and its worker sleeps: it has announced "
                                            "itself, nobody will ring, and it did not look again")
                break
            if time.monotonic() - began > PATIENCE:
                result.verdict.wrong.append(f"record {id} was not picked up in {PATIENCE:g} s")
                break
            time.sleep(0.005)
        slow.append(time.monotonic() - began)
        if result.verdict.wrong:  # the next worker claims it as it starts
            cell.end()
            cell.start()
            break
        cell.drain(SOON)
        cell.end()
    result.n = len(slow)
    result.more["pickup_max_s"] = max(slow)
    return _finish(cell, result)


def _sleeps(cell: Cell, pid: int, since: int) -> bool:
    """Whether a worker holds the bell, has not looked since, is at rest for a second, and a job is there all the time.

    At rest: its process waits and takes no time, and so do its sessions. On a machine that is only slow, one does not.
    """
    before = None
    for _ in range(11):
        said = [one["what"] for one in cell.events[since:] if one["pid"] == pid and one["what"] in ("bell", "looked")]
        (waiting, busy) = cell.one(
            "select (select count(*) from anton.job), (select count(*) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle')"
        )
        try:
            state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it is gone
            return False
        now = (said, waiting, rest[10:12])  # its time in user and system mode
        if said[-1:] != ["bell"] or not waiting or busy or state != "S" or now != (before or now):
            return False
        before = now
        time.sleep(0.1)
        for stop in cell.stops():
            cell.signal(stop.pid, signal.SIGCONT)
    return True


POLL = ("mid_poll", "before_ack", "before_commit", "commit_sent_no_reply", "after_commit")
PAGE = 7  # rows that the service has more at each call


@fault("S1", "SIGKILL of a worker between a poll's fetch and its commit, at five named points in turn")
def killed_polls(cell: Cell, n: int) -> Result:
    """n kills; after each five one worker that lives. Each row of the service is there once, the cursor at its end."""
    result = Result()
    for at in range(1, n + 1):
        point = POLL[at % len(POLL)]
        cell.one("update service set n = n + %s returning n", PAGE)
        cell.one("select anton.fire(id, anton.now(), 'parallel') from anton.schedule where name = 'ask'")
        cell.start(point=point)
        cell.kill(_stopped(cell, point)["pid"], point, both=True)      # after its commit it holds nothing
        result.n += 1
        if at % len(POLL) == 0 or at == n:  # a firing that is killed over and over would be a dead letter
            cell.start()
            cell.drain(PATIENCE)
            cell.end()
    cell.start()
    cell.one("select anton.run_schedule('ask')")
    _finish(cell, result)
    total, rows, different = cell.one(
        "select n, (select count(*) from out_ask), "
        "(select count(distinct src) from out_ask where src between 1 and n) from service"
    )
    result.verdict.lost += total - different
    result.verdict.doubled += rows - different
    result.verdict.require(total == rows == different, f"the service has {total} rows, out_ask {rows}, of {different}")
    (cursor,) = cell.one("select cursor from anton.poll")
    result.verdict.require(cursor == total, f"the cursor is {cursor}, not {total}")
    result.more |= {"rows": rows, "polls": cell.one("select version from anton.poll")[0]}
    return result
