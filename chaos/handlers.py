"""Handlers: those that take all memory, hang, block the loop, find their table changed, or have too much to do."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import psycopg
import servers

from benchmarks.proc import rss_mb
from chaos.cell import Cell
from chaos.faults import PATIENCE, Result, fault, percentile, under_load
from chaos.points import SESSIONS

BLOCK = 2.5  # seconds that the app's handler `block` keeps the event loop, and so its worker
CUT = re.compile(r"\[(\d+)\] FATAL: .*due to idle-in-transaction timeout")  # sessions that Postgres ended
FROM = 10_000_000  # keys of what is written beside a fault


class Neighbour:
    """Single inserts into `near` while it is open, each after the one before was handled; seconds: of each."""

    def __init__(self, cell: Cell) -> None:
        self.seconds: list[float] = []
        self._cell = cell
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._main)

    def __enter__(self) -> Self:
        self._cell.one("create index if not exists out_near_src on out_near (src)")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _main(self) -> None:
        cell = self._cell
        with psycopg.connect(cell.url, autocommit=True) as conn:
            (first,) = conn.execute("select coalesce(max(id), %s) + 1 from near", (FROM,)).fetchone() or (FROM,)
            for id in itertools.count(first):
                operation = cell.history.begin("near", "single", [id])
                conn.execute("insert into near values (%s, '')", (id,))
                cell.history.end(operation, "ok")
                began = time.monotonic()
                while conn.execute("select count(*) from out_near where src = %s", (id,)).fetchone() == (0,):
                    if time.monotonic() - began > PATIENCE:
                        break
                    time.sleep(0.002)
                self.seconds.append(time.monotonic() - began)
                if self._enough.wait(0.05):
                    return

    @property
    def more(self) -> dict[str, Any]:
        """How long a neighbour's record took to be handled."""
        return {"neighbour_p50_s": percentile(self.seconds, 0.5), "neighbour_max_s": max(self.seconds, default=None)}


def among(cell: Cell, table: str, handler: str | None, kind: str, ids: itertools.count[int]) -> None:
    """One insert of 5 to 20 records, one of this kind; with a handler, that one has to become its dead letter."""
    some = [next(ids) for _ in range(cell.random.randint(5, 20))]
    bad = cell.random.choice(some)
    operation = cell.history.begin(table, "many", some)
    cell.one(
        f"insert into {table} select id, case when id = %s then %s else '' end from unnest(%s::bigint[]) id",
        bad,
        kind,
        some,
    )
    cell.history.end(operation, "ok")
    if handler is not None:
        cell.dead.setdefault(handler, Counter())[bad] += 1


def said(cell: Cell, text: str) -> int:
    """How often the workers said so."""
    return Path(str(cell.log) + ".workers").read_text().count(text)


@fault("P4", "a record that takes all the memory its process may have (RLIMIT_AS), beside innocent ones")
def hungry(cell: Cell, n: int) -> Result:
    """Each such record has to be a dead letter, and none of its neighbours; nothing that was running is lost."""
    result, ids = Result(n), itertools.count(1)
    cell.start(2, memory=400)
    with under_load(cell, result), Neighbour(cell) as near:
        for _ in range(n):
            time.sleep(cell.random.uniform(0.1, 0.4))
            among(cell, "odd", "bear", "hungry", ids)
    result.more |= {**near.more, "processes_died": said(cell, ") died: ")}
    return result


@fault("P6", "a handler that hangs, in C or in Python, beside innocent records")
def hanging(cell: Cell, n: int) -> Result:
    """Its timeout settles it, its process is replaced, neighbours go on."""
    result, ids = Result(n), itertools.count(1)
    cell.start(2)
    with under_load(cell, result), Neighbour(cell) as near:
        for kind in itertools.islice(itertools.cycle(("hang", "spin")), n):
            time.sleep(cell.random.uniform(0.2, 0.6))
            among(cell, "odd", "bear", kind, ids)
        cell.drain(PATIENCE)
    (texts,) = cell.one("select array_agg(distinct error) from anton.dead")
    result.verdict.require(all("HandlerTimeout" in text for text in texts or []), f"dead letters say: {texts}")
    end = time.monotonic() + 10
    while (left := sum(len(cell.children(one)) for one in cell.workers)) > 2 and time.monotonic() < end:
        time.sleep(0.1)
    result.verdict.require(left == 2, f"{left} processes are left of 2 workers")
    slowest = max(near.seconds)
    result.verdict.require(slowest < 10, f"a neighbour waited {slowest:.1f} s")
    result.more |= near.more
    return result


@fault("P7", "a handler that blocks the event loop for two and a half leases")
def blocking(cell: Cell, n: int) -> Result:
    """The heartbeat keeps the leases: no run is doubled, and none is taken but of an ack that was open meanwhile,
    in a session that the server's log says it ended.

    That one holds its rows, so that no heartbeat reaches them, and the server ends its session as it would a frozen
    worker's. What neighbours wait is told.
    """
    result, ids = Result(n), itertools.count(1)
    before = len(CUT.findall(servers.log(cell.server)))
    cell.start(2, point=SESSIONS)
    with under_load(cell, result), Neighbour(cell) as near:  # it has ended when that checks
        for _ in range(n):
            among(cell, "slow", None, "block", ids)
            time.sleep(cell.random.uniform(0.5, 1.5) * BLOCK)
    cell.look()
    ended = set(map(int, CUT.findall(servers.log(cell.server))[before:]))
    excused = {one["token"] for one in cell.events if one["what"] == "acking" and one["session"] in ended}
    stolen = {one["token"] for one in cell.events if one["what"] == "lost"}
    result.verdict.require(stolen <= excused, f"{len(stolen - excused)} leases were taken from a worker that lived")
    slowest = max(near.seconds)
    result.verdict.require(slowest < 3 * BLOCK + 1, f"a neighbour waited {slowest:.1f} s")
    result.more |= {**near.more, "stolen": len(stolen), "cut": len(ended)}
    return result


DRIFTS = (  # (handler, table, column)
    ("follow_sql", "drift", "w"),
    ("keep", "out_kept", "v"),
    ("follow", "drift", "v"),
)


@fault("A3", "a column of its table, or of the one it writes to, renamed under a handler")
def drifting(cell: Cell, n: int) -> Result:
    """It is failing and names the column, nothing dies, the others go on; with the column it comes back."""
    result, ids, back = Result(n), itertools.count(1), list[float]()
    cell.start(1)
    with Neighbour(cell) as near:
        for handler, table, column in itertools.islice(itertools.cycle(DRIFTS), n):
            cell.one(f"alter table {table} rename {column} to elsewhere")
            some = [next(ids) for _ in range(cell.random.randint(1, 30))]
            operation = cell.history.begin("drift", "many", some)
            columns = (
                "(id, v, w)" if table != "drift" else "(id, v, elsewhere)" if column == "w" else "(id, elsewhere, w)"
            )
            cell.one(f"insert into drift {columns} select id, 'v', 'w' from unnest(%s::bigint[]) id", some)
            cell.history.end(operation, "ok")
            end = time.monotonic() + 20
            while time.monotonic() < end:
                (text,) = cell.one("select max(failing_error) from anton.handler where name = %s", handler)
                if text is not None:
                    break
                time.sleep(0.02)
            result.verdict.require(text is not None and f'"{column}"' in text, f"{handler} says: {text}")
            cell.one(f"alter table {table} rename elsewhere to {column}")
            back.append(cell.drain(PATIENCE) or PATIENCE)
    drained, wrong = cell.drain(PATIENCE), result.verdict.wrong
    result.verdict = cell.check()
    result.verdict.wrong += wrong
    result.verdict.require(drained is not None, "not drained")
    result.more |= {"resumed_max_s": max(back), **near.more}
    return result


@fault("L2", "handlers with a backlog of n records, beside one with a few")
def noisy(cell: Cell, n: int) -> Result:
    """How long a neighbour waits for one worker that has n records for each of five handlers before it."""
    result, ids = Result(n, trials=0), itertools.count(1)
    (worker,) = cell.start(1, lease=30)
    time.sleep(1)
    with Neighbour(cell) as idle:
        time.sleep(5)
    for _ in range(max(1, n // 10_000)):
        cell.add("src", [next(ids) for _ in range(min(n, 10_000))], "copy")
    with Neighbour(cell) as busy:
        took = cell.drain(120)
    result.verdict = cell.check()
    quiet, slow = percentile(idle.seconds, 0.99) or 1.0, percentile(busy.seconds, 0.99) or PATIENCE
    result.verdict.require(took is not None, "not drained in 120 s")
    result.verdict.require(len(busy.seconds) > 20 and slow < 1.0, f"a neighbour's p99 was {slow:.2f} s")
    result.more |= {
        "drain_s": took,
        "idle_p99_s": quiet,
        "busy_p99_s": slow,
        "probes": len(busy.seconds),
        "rss_mb": rss_mb(worker),
    }
    return result
