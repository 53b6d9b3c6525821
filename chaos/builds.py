"""Builds: whoever builds is killed during it: dbt, Anton's warm child, its worker. Each committed build has its events.

    dbt      a plain `dbt run` that knows nothing of Anton but its macros
    child    the warm process of dbt that belongs to a worker: the worker starts another
    worker   the worker, half the time with its supervisor: the next one ends what is left, and builds
    gated    the child or the worker, while tests stand between the build and its commit
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pg import Event, Pg

from chaos.cell import LEASE, ROOT, Cell
from chaos.dbts import Child, Project
from chaos.faults import Result, fault

PATIENCE = 60.0
ROWS = 2000  # of each model
HOW = {"swapped": "table", "in_place": "anton_table", "added_to": "incremental"}  # model: how dbt makes it
WHO = ("dbt", "worker", "child", "gated")
TESTS = {
    "models": [{"name": how, "columns": [{"name": "id", "data_tests": ["unique", "not_null"]}]} for how in HOW],
}
APP = f"""
from anton import DbtProject
shop = DbtProject("dbt_project")
for name in {list(HOW)}:
    shop.model(name)
"""
WORK = """
import sys
from datetime import timedelta
from anton.cli import main
from anton.db import Database
from anton.supervisor import work
if sys.argv[2] == "migrate":
    raise SystemExit(main(["--database", sys.argv[1], "migrate"]))
raise SystemExit(work(Database(sys.argv[1], source="chaos"), lease=timedelta(seconds=float(sys.argv[2]))))
"""
BUILDING = """select exists (select from pg_stat_activity where datname = current_database() and backend_xid is not null
                             and (application_name = 'dbt' or application_name like 'anton-dbt-%-build-%'))"""
SESSIONS = """select count(*) from pg_stat_activity where datname = current_database()
                 and (application_name = 'dbt' or application_name like 'anton-dbt-%-build-%')"""
OPEN = "select count(*) from anton.dbt_request where state in ('waiting', 'running')"
LEFT = {
    "tables": "select count(*) from pg_class where relname ~ '__dbt_' and relkind in ('r', 'v', 'm')",
    "temporary tables": "select count(*) from pg_class where relpersistence = 't' and relkind = 'r'",
    "requests": OPEN,
    "runs": "select count(*) from anton.dbt_run where state = 'running'",
    "jobs": "select count(*) from anton.job join anton.handler h on h.id = handler_id where h.name like 'dbt:%'",
    "leases": "select count(*) from anton.lease",
    "sessions": SESSIONS,
}


@dataclass
class Tally:
    """What came of it. killed: during a build, by who was; committed: builds of one model that were, all the same."""

    killed: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    committed: int = 0
    lost: int = 0
    phantom: int = 0
    left: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    told: int = 0  # ids of builds up to here


class Fleet:
    """One supervisor with its worker, in the folder of an app; and the children of dbt that belong to it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.children: set[int] = set()  # all that were seen
        self.log = (folder / "worker.log").open("w")
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "main.py").write_text(APP)
        (folder / "autonomous.json").write_text('{"name": "shop"}')
        self._start("migrate").wait()
        self.process = self._start(str(LEASE))

    def _start(self, what: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}
        return subprocess.Popen(
            [sys.executable, "-c", WORK, self.url, what],
            cwd=self.folder,
            env=environment,
            stdout=self.log,
            stderr=self.log,
        )

    def child(self) -> int | None:
        """The warm process of dbt of the worker that lives now."""
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if b"anton.dbt.child" in words and str(self.folder / "dbt_project").encode() in words:
                    self.children.add(int(entry.name))
                    if _above(int(entry.name), self.process.pid):
                        return int(entry.name)
        return None

    def kill(self, who: str, both: bool) -> bool:
        """Whether it could be. both: with its supervisor."""
        pid = self.child()
        if pid is None:
            return False
        with suppress(OSError):
            if who == "worker":
                worker = _parent(pid)
                if both and worker != self.process.pid:
                    self.process.kill()
                os.kill(worker, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
            return True
        return False

    def revive(self) -> None:
        """Starts another when its supervisor is dead."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)
            self.process = self._start(str(LEASE))

    def close(self) -> list[int]:
        """Ends it; the children of dbt that outlive it."""
        self.child()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()
        self.log.close()
        end = time.monotonic() + PATIENCE
        while alive := [pid for pid in self.children if self._lives(pid)]:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        return alive

    def _lives(self, pid: int) -> bool:
        with suppress(OSError):
            return b"anton.dbt.child" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _above(pid: int, ancestor: int) -> bool:
    while pid > 1:
        pid = _parent(pid)
        if pid == ancestor:
            return True
    return False


@contextmanager
def _fleet(folder: Path, url: str, tally: Tally) -> Iterator[Fleet]:
    fleet = Fleet(folder, url)
    try:
        yield fleet
    finally:
        if alive := fleet.close():
            tally.wrong.append(f"{len(alive)} processes of dbt outlived their workers")


def killed_builds(child: Child, folder: Path, url: str, n: int, seed: int) -> Tally:
    """Builds of three models until n kills met one. After each the tables are what their events say."""
    pg, chance, tally = Pg(url), random.Random(seed), Tally()
    pg.sql(
        "create table origin (id int primary key, n int)",
        f"insert into origin select g, 0 from generate_series(1, {ROWS}) g",
    )
    folder.mkdir()
    project = Project(child, folder / "dbt_project", url)
    project.file("models/schema.yml", json.dumps(TESTS))
    listen: dict[str, int] = {}
    mirrors: dict[str, dict[Any, Any]] = {how: {} for how in HOW}
    for how, made in HOW.items():
        project.model(how, "select * from origin", materialized=made, unique_key="id")
        pg.sql("select anton.dbt_register('shop', %s, 'public', %s, '{id}')", args=(f"model.shop.{how}", how))
        pg.put(f"of_{how}", how, "new", "updated", "deleted", read="change")
        listen[how] = pg.put(f"built_{how}", how, "rebuilt")
    project("run")
    for how in HOW:
        mirrors[how] = dict(pg.sql(f"select id, n from {how}"))
        tally.told += len(pg.events(listen[how]))
    began = time.monotonic()
    project("run")
    whole = time.monotonic() - began  # of a process that has run dbt before
    _compare(pg, listen, mirrors, tally, "the beginning")
    builds = tally.told
    with _fleet(folder, url, tally) as fleet:
        for who in itertools.cycle(WHO):
            if tally.killed.total() >= n or tally.turns >= 10 * n:
                break
            tally.turns += 1
            turn = tally.turns
            pg.sql(
                f"update origin set n = {turn} where id % 50 = {turn} % 50",
                f"delete from origin where id = {turn}",
                f"insert into origin values ({ROWS + turn}, 0)",
            )
            hit = _plain(pg, project, chance, whole) if who == "dbt" else _asked(pg, fleet, who, chance, whole)
            tally.killed[who] += hit
            _compare(pg, listen, mirrors, tally, f"turn {turn}, {who}")
        tally.committed = _builds(pg) - builds
        pg.sql("select anton.dbt_ask('shop', 'shop', '{}')")
        _until(pg, f"select ({OPEN}) = 0", "the last request", fleet.revive)
        _compare(pg, listen, mirrors, tally, "the end")
    for how in HOW:
        gone = "" if how == "added_to" else f"(table {how} except table origin) union all "  # that one deletes nothing
        if pg.sql(f"{gone}(table origin except table {how})"):
            tally.wrong.append(f"{how} is not what it should be")
    with suppress(TimeoutError):
        _until(pg, f"select ({SESSIONS}) = 0", "the end of all sessions of dbt")
    left = {what: int(pg.value(query)) for what, query in LEFT.items()}
    left["folders"] = len(list((folder / "tmp").glob("anton-dbt-*")))
    tally.left = {what: count for what, count in left.items() if count}
    pg.conn.close()
    return tally


def _plain(pg: Pg, project: Project, chance: random.Random, whole: float) -> bool:
    hit = False

    def until() -> None:
        nonlocal hit
        hit = _amid(pg, chance, whole)

    project("run", until=until)
    _until(pg, f"select ({SESSIONS}) = 0", "the end of a dbt that was killed")  # noticed when a statement is done
    return hit


def _asked(pg: Pg, fleet: Fleet, who: str, chance: random.Random, whole: float) -> bool:
    """A run of Anton's whose worker or child is killed, and which is done by who is left."""
    victim = chance.choice(("child", "worker")) if who == "gated" else who
    asked = pg.value("select anton.dbt_ask('shop', 'shop', %s::jsonb)", json.dumps({"gate": who == "gated"}))
    over = f"select state not in ('waiting', 'running') from anton.dbt_request where id = {asked}"
    _until(pg, f"select ({BUILDING}) or ({over})", "a build")           # all of it may pass between two looks
    hit = _amid(pg, chance, whole / 2) and fleet.kill(victim, chance.random() < 0.5)
    _until(pg, over, "a request", fleet.revive)
    if state := pg.value("select nullif(state, 'done') from anton.dbt_request where id = %s", asked):
        raise RuntimeError(f"request {asked} is {state}: " + str(pg.sql("select error from anton.dbt_run")[-1]))
    return hit


def _amid(pg: Pg, chance: random.Random, seconds: float) -> bool:
    """Waits for any time of a run, and then for a model that is being built; whether one is."""
    time.sleep(chance.uniform(0, seconds))
    end = time.monotonic() + max(1.0, 2 * seconds)
    while not pg.value(BUILDING):
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.02))
    return bool(pg.value(BUILDING))


def _until(pg: Pg, query: str, what: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    end = time.monotonic() + PATIENCE
    while not pg.value(query):
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        meanwhile()
        time.sleep(0.002)


def _builds(pg: Pg) -> int:
    return int(pg.value("select count(*) from anton.dbt_build"))


def _compare(pg: Pg, listen: dict[str, int], mirrors: dict[str, dict[Any, Any]], tally: Tally, when: str) -> None:
    for how in HOW:
        handler = pg.value("select id from anton.handler where name = %s", f"of_{how}")
        twice = [event.key for event in pg.events(handler) if not _apply(mirrors[how], event)]
        table = dict(pg.sql(f"select id, n from {how}"))
        lost = [key for key, value in table.items() if mirrors[how].get(key, value) != value or key not in mirrors[how]]
        phantom = [key for key in mirrors[how] if key not in table]
        tally.lost += len(lost)
        tally.phantom += len(phantom) + len(twice)
        if lost or phantom or twice:
            tally.wrong.append(
                f"{how}, {when}: no event for {lost[:5]}, events of nothing for {phantom[:5]}, twice of {twice[:5]}"
            )
            mirrors[how] = table
    told = sum(len(pg.events(one)) for one in listen.values())
    built = _builds(pg)
    if told != built - tally.told:
        tally.wrong.append(f"{when}: {built - tally.told} builds, and {told} were told")
    tally.told = built


def _apply(mirror: dict[Any, Any], event: Event) -> bool:
    """Whether it changed anything: one that does not was told before, or never happened."""
    if event.op == "d":
        return mirror.pop(event.key, None) is not None
    assert event.new is not None
    before, mirror[event.key] = mirror.get(event.key), event.new["n"]
    return bool((before is None) is (event.op == "n") and before != event.new["n"])


@fault("B1", "kill -9 during builds: of dbt, of Anton's warm dbt, of its worker, and of gated runs")
def builds(cell: Cell, n: int) -> Result:
    """Every committed build has exactly its events, no other has any; what the dead left behind is gone in the end."""
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        child = Child(Path(name) / "log")
        try:
            tally = killed_builds(child, Path(name) / "shop", cell.url, n, cell.random.getrandbits(32))
        finally:
            child.close()
    result.n = tally.killed.total()
    result.verdict.lost, result.verdict.phantom, result.verdict.wrong = tally.lost, tally.phantom, tally.wrong
    result.verdict.require(not tally.left, f"left behind: {tally.left}")
    result.more |= {"committed": tally.committed, "orphans": sum(tally.left.values()), **tally.killed}
    return result
