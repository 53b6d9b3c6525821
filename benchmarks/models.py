"""Models: what a refresh of changed groups costs against one of all rows."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from anton.app import App
from anton.db import Database
from anton.migrate import migrate
from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench, median
from benchmarks.server import Conn, connect

_MODEL = """-- anton: model
-- refresh: orders
-- key: customer
-- incremental: orders.customer
select customer, count(*) as orders, sum(total) as total, max(id) as last from orders group by customer
"""
_CHANGED = 1000


@bench(at_most("sql_model_incremental_vs_full", 0.3))
def incremental(run: Run) -> Rows:
    """A model of 1M rows over 2M, 1,000 of which change: the groups that changed against all of them."""
    rows = run.size(1_000_000, 50_000)
    part, full = [], []
    with run.server.database("models") as url, connect(url) as conn, tempfile.TemporaryDirectory() as folder:
        conn.execute("create table orders (id bigint primary key, customer int not null, total numeric not null)")
        conn.execute(f"insert into orders select g, g % {rows}, g % 97 from generate_series(1, {rows * 2}) g")
        conn.execute("create index on orders (customer)")
        conn.execute("vacuum analyze orders")
        (Path(folder) / "sql").mkdir()
        (Path(folder) / "sql" / "totals.sql").write_text(_MODEL)
        asyncio.run(migrate(Database(url), App("models", folder)))
        conn.execute("vacuum analyze totals")
        for at in range(run.times):
            for seconds, whole in ((full, True), (part, False)):
                first = at * 2 * _CHANGED + _CHANGED * whole
                conn.execute(f"update orders set total = total + 1 where id > {first} and id <= {first + _CHANGED}")
                conn.execute("checkpoint")
                seconds.append(_refresh(conn, whole))
        _check(conn)
    detail = {"incremental_s": [round(one, 3) for one in part], "full_s": [round(one, 3) for one in full]}
    return {"sql_model_incremental_vs_full": Row(median(part) / median(full), None, detail)}


def _refresh(conn: Conn, whole: bool) -> float:
    """Seconds that a refresh took. Raises WrongResult unless it wrote the changed rows, and no others."""
    began = time.perf_counter()
    did = conn.execute("select is_full, new, updated, deleted from anton.refresh('totals', %s)", [whole]).fetchone()
    seconds = time.perf_counter() - began
    if did != (whole, 0, _CHANGED, 0):
        raise WrongResult(f"a refresh of {_CHANGED} changed rows did {did}")
    return seconds


def _check(conn: Conn) -> None:
    """The model is what its SELECT says."""
    body = conn.execute("select body from anton.model").fetchone()
    assert body is not None
    wrong = conn.execute(f"select count(*) from (({body[0]} except table totals) union all (table totals except "
                         f"{body[0]})) x".encode()).fetchone()
    if wrong != (0,):
        raise WrongResult(f"{wrong} rows of the model are not what its SELECT says")
