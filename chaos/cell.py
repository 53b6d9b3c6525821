"""Cell: a Postgres of its own, a database with the app, workers by their pids, and the harness's eyes on them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import servers

from chaos.check import Verdict, check
from chaos.history import History, Producers, attempt, write

ROOT = Path(__file__).resolve().parent.parent
APP = Path(__file__).resolve().parent / "app"
LEASE = 1.0
SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "max_prepared_transactions": "0",
    "autovacuum_naptime": "5s",
    "max_connections": "200",
}
TABLES = """
create table src (id bigint primary key, kind text not null);
create table ups (id bigint primary key, v bigint not null);
create table risky (id bigint primary key, kind text not null);
create table shaky (id bigint primary key, kind text not null);
create table outside (id bigint primary key, kind text not null);
create table load (id bigint primary key, kind text not null);
create table near (id bigint primary key, kind text not null);
create table odd (id bigint primary key, kind text not null);
create table slow (id bigint primary key, kind text not null);
create table drift (id bigint primary key, v text, w text);
create table out_kept (id bigint generated always as identity primary key, src bigint not null, v text);
create table clash (id bigint primary key, kind text not null);
create table gated (id bigint primary key, kind text not null);
create table paced (id bigint primary key, kind text not null);
create table shared (id bigint primary key, n bigint not null);
insert into shared select n, 0 from generate_series(1, 4) n;
create table counter (id bigint primary key, n bigint not null);
insert into counter values (0, 0);
create table tally (id bigint primary key, n bigint not null);
insert into tally select n, 0 from generate_series(0, 1) n;
create table out_lots (id bigint generated always as identity primary key, src bigint not null, v text not null);
create table out_ask (id bigint generated always as identity primary key, src bigint not null);
create table service (n bigint not null);
insert into service values (0);
create table out_ups (id bigint generated always as identity primary key, src bigint not null, v bigint not null);
create table ping (id bigint generated always as identity primary key, hop int not null);
create table pong (id bigint generated always as identity primary key, hop int not null);
""" + "".join(
    f"create table out_{name} (id bigint generated always as identity primary key, src bigint not null);\n"
    for name in (
        *("batch", "each", "chain", "sql", "risky", "shaky", "outside", "load", "near"),
        *("odd", "slow", "drift", "drift_sql", "clash", "strike", "hold", "alone", "inorder", "paced"),
    )
) + "alter table out_near add at bigint;\n"


@contextmanager
def cluster(**settings: str) -> Iterator[servers.Server]:
    """A private cluster of the system's Postgres, with fsync and these settings. Raises servers.NoServer."""
    with servers.running("system", **{**SETTINGS, **settings}) as server:
        yield server


def make_template(server: servers.Server) -> str:
    """The name of a database with the app's tables, migrated."""
    server.sql("create database chaos_template")
    url = server.url("chaos_template")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(TABLES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": url}
    words = [sys.executable, "-c", "from anton.cli import main; raise SystemExit(main())", "--database", url, "migrate"]
    done = subprocess.run(words, cwd=APP, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"anton migrate failed: {done.stdout}{done.stderr}")
    with psycopg.connect(url, autocommit=True) as conn:
        for name in ("ask", "strike", "scan_lots"):                     # their times pass: a fault fires them
            conn.execute("select anton.pause_schedule(%s)", [name])
    return "chaos_template"


def _halted(pid: int) -> None:
    """Waits until a process that is about to stop itself has, or is gone; on a busy machine that takes a while."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "TtZX":
            return
        time.sleep(0.001)


@dataclass
class Stop:
    """A worker that stopped itself at its point. supervisor: None when that has died."""

    pid: int
    point: str
    token: int | None


@dataclass
class Kill:
    """A kill, and the parts of changes that were leased then: (handler, change, lo, hi)."""

    at: Any
    point: str
    held: list[tuple[int, int, int, int]] = field(default_factory=list)


class Cell:
    """One database with its workers. Everything it started ends with it.

    patched: modules of the worker that are replaced, by name. sql: statements that replace functions of the runtime.
    """

    def __init__(
        self,
        server: servers.Server,
        template: str,
        seed: int,
        *,
        lease: float = LEASE,
        patched: dict[str, str] | None = None,
        sql: list[str] | None = None,
    ) -> None:
        self.server = server
        self.random = Random(seed)
        self.seed = seed
        self.lease = lease
        self.name = server.clone(template)
        self.url = server.url(self.name) + "?sslmode=disable"
        self._folder = tempfile.TemporaryDirectory(prefix="anton-chaos-")
        folder = Path(self._folder.name)
        self.log, self.world, self.files = folder / "events", folder / "world-is-down", folder / "files"
        self.log.touch()
        self.files.mkdir()
        self.history = History(folder / "history")
        self.workers: set[int] = set()  # supervisors
        self.kills: list[Kill] = []
        self.dead: dict[str, Counter[Any]] = {}
        self._offset = 0
        self._partial = b""
        self.events: list[dict[str, Any]] = []
        self._conn: psycopg.Connection[Any] | None = None
        for statement in sql or []:
            self.one(statement)
        settings = {
            "url": self.url,
            "app": str(APP),
            "log": str(self.log),
            "world": str(self.world),
            "files": str(self.files),
            "patched": patched or {},
        }
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "chaos.zygote", json.dumps(settings)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._said()

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._zygote.stdin is not None
        self._zygote.stdin.close()
        self._zygote.wait(10)
        assert self._zygote.stdout is not None
        self._zygote.stdout.close()
        if self._conn is not None:
            self._conn.close()
        with contextlib.suppress(psycopg.Error):
            self.server.drop(self.name)
        self.history.close()
        self._folder.cleanup()

    def _said(self) -> str:
        assert self._zygote.stdout is not None
        line = self._zygote.stdout.readline().strip()
        if not line:
            raise RuntimeError("the zygote has ended")
        return line

    # Processes

    def start(self, n: int = 1, **given: Any) -> list[int]:
        """Starts supervisors of one worker each. point, hits: where that stops itself; url, pooled, slots, skew.

        memory: MB that it may grow by. net: a pid whose network it is put into.
        """
        assert self._zygote.stdin is not None
        pids = []
        for _ in range(n):
            self._zygote.stdin.write(json.dumps({"lease": self.lease, **given}) + "\n")
            self._zygote.stdin.flush()
            pids.append(int(self._said()))
        if "port" not in given:
            self.workers.update(pids)
        return pids

    def children(self, pid: int) -> list[int]:
        """The processes a supervisor has forked."""
        try:
            return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    def supervisor(self, pid: int) -> int | None:
        """Whose child it is."""
        return next((one for one in self.workers if pid in self.children(one)), None)

    def signal(self, pid: int, number: int) -> bool:
        """Sends a signal to a process of this cell; False when it is gone."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            self.workers.discard(pid)
            return False
        return True

    def kill(self, pid: int, point: str, both: bool) -> Kill | None:
        """SIGKILL to a worker, with its supervisor when both. None when it held no lease."""
        self.signal(pid, signal.SIGSTOP)
        held = self.held(pid)
        above = self.supervisor(pid)
        others: list[int] = []
        if both and above is not None:  # its other children would end by themselves
            others = [one for one in self.children(above) if one != pid]
            self.signal(above, signal.SIGKILL)
            self.workers.discard(above)
        self.signal(pid, signal.SIGKILL)
        for one in others:
            self.kill(one, "with its supervisor", both=False)
        if held is None or not held.held:
            return None
        held.point = point
        self.kills.append(held)
        return held

    def end(self) -> None:
        """Kills all workers that are left."""
        for pid in list(self.workers):
            for one in (pid, *self.children(pid)):
                self.signal(one, signal.SIGKILL)
        self.workers.clear()

    def look(self) -> list[dict[str, Any]]:
        """New lines that workers noted. Who says that it stops itself has stopped: a SIGCONT would come before."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            data = self._partial + file.read()
            self._offset = file.tell()
        *lines, self._partial = data.split(b"\n")
        found = [json.loads(line) for line in lines]
        for event in found:
            if event["what"] == "stopped":
                _halted(event["pid"])
        self.events += found
        return found

    @contextmanager
    def calm(self) -> Iterator[None]:
        """Nobody stops at a point meanwhile."""
        file = Path(f"{self.log}.calm")
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    def stops(self) -> list[Stop]:
        """Workers that came to their point since the last look."""
        return [Stop(one["pid"], one["point"], one.get("token")) for one in self.look() if one["what"] == "stopped"]

    # Database

    def one(self, query: str, *args: Any) -> Any:
        """The first row of a query, over a connection that is made again when it broke; None without a row."""
        end = time.monotonic() + 60
        while True:
            try:
                if self._conn is None or self._conn.closed:
                    self._conn = psycopg.connect(self.url, autocommit=True, connect_timeout=5)
                done = self._conn.execute(query, args or None)
                return done.fetchone() if done.description else None
            except psycopg.OperationalError:
                if self._conn is not None:
                    self._conn.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def held(self, pid: int) -> Kill | None:
        """What a worker's process holds now."""
        with contextlib.suppress(psycopg.Error):
            at, held = self.one(
                "select clock_timestamp(), array(select format('%%s %%s %%s %%s', handler_id, change_id, lo, hi) "
                "from anton.lease where worker_id in "
                "(select id from anton.worker where pid = %s and stopped_at is null))",
                pid,
            )
            return Kill(at, "", [tuple(map(int, part.split())) for part in held])  # type: ignore[misc]
        return None

    def add(self, table: str, ids: list[int], kind: str = "single") -> None:
        """One acknowledged insert."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            if not attempt(
                self.history, self.history.begin(table, kind, ids), conn, lambda conn: write(conn, table, ids, kind)
            ):
                raise RuntimeError(f"insert into {table} failed")

    def producers(self, rate: float = 20, url: str | None = None) -> Producers:
        """Starts the load."""
        return Producers(self.history, url or self.url, self.seed, rate)

    def left(self) -> int:
        """Jobs that are not done."""
        (n,) = self.one(
            "select (select count(*) from anton.job) + (select count(*) from anton.lease) "
            "+ (select count(*) from anton.delayed)"
        )
        return int(n)

    def drain(self, patience: float = 60) -> float | None:
        """Waits until nothing is left; the seconds it took, None when it did not end.

        patience: seconds without any ack, so that a busy machine is only slow; and at most ten times that in all.
        """
        began = at = time.monotonic()
        acks = None
        while self.left():
            found = self.one("select max(id) from anton.receipt")
            if found != acks:
                acks, at = found, time.monotonic()
            if time.monotonic() - at > patience or time.monotonic() - began > 10 * patience:
                return None
            for stop in self.stops():  # nobody stops now
                self.signal(stop.pid, signal.SIGCONT)
            time.sleep(0.05)
        return time.monotonic() - began

    def check(self) -> Verdict:
        """The history against the database."""
        self.one("select 1")
        assert self._conn is not None
        return check(self._conn, list(self.history.read()), self.dead)

    def redo(self) -> tuple[list[float], int]:
        """For each kill, the seconds until the last record that it was the last to hold was settled.

        And how many of the parts that were held never were.
        """
        times, later, unsettled = list[float](), list[tuple[int, int, int, int]](), 0
        for kill in reversed(self.kills):
            parts = [
                part
                for part in kill.held
                if not any(part[:2] == other[:2] and part[2] <= other[3] and other[2] <= part[3] for other in later)
            ]
            later += kill.held
            if not parts:
                continue
            last, open_ = self.one(
                "select extract(epoch from max(r.at) - %s)::float8, count(*) filter (where r.at is null) "
                "from unnest(%s::int[], %s::bigint[], %s::int[], %s::int[]) h (handler, change, lo, hi) "
                "left join lateral ("
                "select x.at from anton.receipt x, unnest(x.change_ids, x.los, x.his) p (change, lo, hi) "
                "where x.handler_id = h.handler and x.change_ids @> array[h.change] "
                "and p.change = h.change and p.lo <= h.hi and p.hi >= h.lo) r on true",
                kill.at,
                *map(list, zip(*parts, strict=True)),
            )
            unsettled += open_
            if last is not None:
                times.append(max(0.0, last))
        return times, unsettled
