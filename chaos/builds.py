"""Builds: dbt is killed at any time during its builds; each committed build has its events, no other has any."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pg import Event, Pg

from chaos.cell import Cell
from chaos.dbts import Child, Project
from chaos.faults import Result, fault

PATIENCE = 30.0
ROWS = 2000  # of each model
HOW = {"swapped": "table", "in_place": "anton_table", "added_to": "incremental"}  # model: how dbt makes it


@dataclass
class Tally:
    """What came of it. killed: builds that were; committed: builds of one model that were, all the same."""

    killed: int = 0
    committed: int = 0
    lost: int = 0
    phantom: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    told: int = 0  # ids of builds up to here


def killed_builds(child: Child, folder: Path, url: str, n: int, seed: int) -> Tally:
    """n builds of three models, killed -9 at random. After each one the tables are what their events say."""
    pg, chance, tally = Pg(url), random.Random(seed), Tally()
    pg.sql(
        "create table origin (id int primary key, n int)",
        f"insert into origin select g, 0 from generate_series(1, {ROWS}) g",
    )
    project = Project(child, folder, url)
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
    whole = time.monotonic() - began                                   # of a process that has run dbt before
    _compare(pg, listen, mirrors, tally, "the beginning")
    builds = tally.told
    for turn in range(1, n + 1):
        pg.sql(
            f"update origin set n = {turn} where id % 50 = {turn} % 50",
            f"delete from origin where id = {turn}",
            f"insert into origin values ({ROWS + turn}, 0)",
        )
        tally.killed += project("run", kill_after=chance.uniform(0, 1.5 * whole))["killed"]
        _ended(pg)
        _compare(pg, listen, mirrors, tally, f"turn {turn}")
    tally.committed = _builds(pg) - builds
    project("run")
    _compare(pg, listen, mirrors, tally, "the end")
    for how in HOW:
        gone = "" if how == "added_to" else f"(table {how} except table origin) union all "  # that one deletes nothing
        if pg.sql(f"{gone}(table origin except table {how})"):
            tally.wrong.append(f"{how} is not what it should be")
    tally.left = pg.value("select count(*) from pg_class where relname ~ '__dbt_' and relkind in ('r', 'v', 'm')")
    pg.conn.close()
    return tally


def _builds(pg: Pg) -> int:
    return int(pg.value("select count(*) from anton.dbt_build"))


def _ended(pg: Pg) -> None:
    """Waits until what dbt began has ended: its sessions notice that nobody is there when a statement is done."""
    deadline = time.monotonic() + PATIENCE
    while pg.value(
        "select count(*) from pg_stat_activity where application_name = 'dbt' and datname = current_database()"
    ):
        if time.monotonic() > deadline:
            raise TimeoutError("a session of a dbt that was killed did not end")
        time.sleep(0.01)


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


@fault("B1", "kill -9 of dbt while it builds a table, an incremental model and one in place")
def builds(cell: Cell, n: int) -> Result:
    """Every committed build has exactly its events, no other has any; what dbt left behind is gone after the next."""
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        child = Child(Path(name) / "log")
        try:
            tally = killed_builds(child, Path(name) / "shop", cell.url, n, cell.random.getrandbits(32))
        finally:
            child.close()
    result.n = tally.killed
    result.verdict.lost, result.verdict.phantom, result.verdict.wrong = tally.lost, tally.phantom, tally.wrong
    result.verdict.require(tally.left == 0, f"{tally.left} tables were left behind")
    result.more |= {"committed": tally.committed}
    return result
