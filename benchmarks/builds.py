"""Builds: dbt's rebuild of a table of 1M rows: plain, with its events, and in place; what a reader waits meanwhile."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench, median
from benchmarks.server import Conn, connect
from benchmarks.subject import migrate, number
from chaos.dbts import Child, Project

_SOURCE = """
create table src as select g as id, 'customer ' || g % 1000 as customer,
       (g % 10000) / 100.0 as total, g % 2 = 0 as paid, timestamptz '2026-01-01' + g * interval '1 s' as at,
       g % 77 as a, g % 99 as b, md5(g::text) as note
  from generate_series(1, %s) g"""


@bench(
    at_most("dbt_diff_vs_plain", 1.6),
    at_most("anton_table_vs_plain", 1.3),
    at_most("anton_table_reader_wait_ms", 100, "ms"),
)
def dbt_builds(run: Run) -> Rows:
    """1M rows of 8 columns, 1 % changed, 0.1 % new, 0.1 % gone. Plain: dbt's table, the same unique index, ANALYZE.

    At least five turns, in each of them all three, one after another and each after a CHECKPOINT; the median of the
    turns' ratios.
    """
    rows = run.size(1_000_000, 20_000)
    took: dict[str, list[float]] = {"plain": [], "diff": [], "in_place": []}
    waits: list[float] = []
    with run.server.database("dbt") as url, connect(url) as conn, tempfile.TemporaryDirectory() as folder:
        migrate(url, "app_jobs")
        conn.execute(_SOURCE.replace("%s", str(rows)))
        child = Child(Path(folder) / "log")
        try:
            plain = Project(child, Path(folder) / "plain", url, hooks=False)
            plain.model(
                "plain",
                "select * from src",
                materialized="table",
                indexes=[{"columns": ["id"], "unique": True}],
                post_hook="analyze {{ this }}",
            )
            shop = Project(child, Path(folder) / "shop", url)
            shop.model("diff", "select * from src", materialized="table")
            shop.model("in_place", "select * from src", materialized="anton_table", unique_key="id")
            for name in ("diff", "in_place"):
                _listen(conn, name)
            plain("run")
            shop("run")
            for turn in range(1, (1 if run.quick else max(5, run.times)) + 1):
                _change(conn, rows, turn)
                for name in ("diff", "in_place"):
                    _keep(conn, name)
                for name in [*took][turn % 3 :] + [*took][: turn % 3]:  # none is always the first, or the last
                    conn.execute("checkpoint")
                    with _reader(url, waits) if name == "in_place" else nullcontext():
                        project = plain if name == "plain" else shop
                        took[name].append(project("run", "--select", name)["seconds"])
                    if name != "plain":
                        _exact(conn, name, rows)
        finally:
            child.close()
    detail: dict[str, Any] = {name: [round(one, 2) for one in times] for name, times in took.items()}
    return {
        "dbt_diff_vs_plain": Row(_ratio(took["diff"], took["plain"]), detail=detail),
        "anton_table_vs_plain": Row(_ratio(took["in_place"], took["plain"]), detail=detail),
        "anton_table_reader_wait_ms": Row(max(waits) * 1000, detail={"reads": len(waits)}),
    }


def _ratio(times: list[float], base: list[float]) -> float:
    """The median of the turns': what slows a machine down for a while slows down both of a turn."""
    return median(one / other for one, other in zip(times, base, strict=True))


def _listen(conn: Conn, name: str) -> None:
    conn.execute("select anton.dbt_register('shop', %s, 'public', %s, '{id}')", (f"model.shop.{name}", name))
    conn.execute("select anton.handler(%s, %s, 'changes', 'select 1')", (f"of_{name}", name))


def _change(conn: Conn, rows: int, turn: int) -> None:
    """1 % updated, 0.1 % new, 0.1 % gone."""
    conn.execute("update src set total = total + 1 where id %% 100 = %s", (turn,))
    conn.execute("delete from src where id %% 1000 = %s", (500 + turn,))
    conn.execute(
        "insert into src select g, 'new', 1, true, now(), 1, 1, 'new' from generate_series(%s::int, %s) g",
        (rows * (turn + 1), rows * (turn + 1) + rows // 1000 - 1),
    )
    conn.execute("vacuum analyze src")


def _keep(conn: Conn, name: str) -> None:
    """Which records are to be told of: those that differ from what they are made of now."""
    conn.execute(f"drop table if exists of_{name}")
    conn.execute(
        f"create table of_{name} as select coalesce(o.id, n.id) as id, "
        f"case when o.id is null then 'n' when n.id is null then 'd' else 'u' end as op from {name} o "
        "full join src n on n.id = o.id where o is distinct from n"
    )


def _exact(conn: Conn, name: str, rows: int) -> None:
    """The records that were told of are those that were changed; then they are forgotten."""
    if number(
        conn, f"select count(*) from ((table src except table {name}) union all (table {name} except table src)) x"
    ):
        raise WrongResult(f"{name} is not what it should be")
    found = conn.execute(
        "select sum(j.hi - j.lo + 1) filter (where j.op = 'n'), sum(j.hi - j.lo + 1) filter (where j.op = 'u'), "
        "sum(j.hi - j.lo + 1) filter (where j.op = 'd') from anton.job j join anton.handler h on h.id = j.handler_id "
        "where h.name = %s",
        (f"of_{name}",),
    ).fetchone()
    told = conn.execute(
        "select new_n, updated_n, deleted_n from anton.dbt_build where unique_id = %s order by id desc limit 1",
        (f"model.shop.{name}",),
    ).fetchone()
    if found != told or not told or told[0] != rows // 1000:
        raise WrongResult(f"{name}: events of {found} new, updated and deleted records; the build says {told}")
    events = (
        "select x as id, j.op::text as op from anton.job j join anton.handler h on h.id = j.handler_id "
        "left join anton.change c on j.ids is null and c.id = j.change_id cross join lateral "
        f"unnest(coalesce(j.ids, c.ids[j.lo:j.hi])) x where h.name = 'of_{name}'"
    )
    wanted = f"select id, op from of_{name}"
    differ = f"({events} except all {wanted}) union all ({wanted} except all {events})"
    if wrong := conn.execute(f"select * from ({differ}) x limit 5").fetchall():
        raise WrongResult(f"{name}: told of once too often, or not: {wrong}")
    conn.execute("delete from anton.job")


@contextmanager
def _reader(url: str, waits: list[float]) -> Iterator[None]:
    """Somebody reads by key meanwhile, and somebody else has been reading for long."""
    over = threading.Event()

    def read() -> None:
        with connect(url) as conn:
            while not over.is_set():
                began = time.perf_counter()
                conn.execute("select total from in_place where id = 77777")
                waits.append(time.perf_counter() - began)
                over.wait(0.002)

    with connect(url) as other:
        other.execute("begin; select count(*) from in_place where id < 10")
        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
