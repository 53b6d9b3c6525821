"""Reaction: a change of a Table until the handler of a dbt model's changed records is called, against the dbt command.

Change -> run_when -> a warm `dbt build` of one small model -> its records compared -> the handler. The debounce, which
is waited for on purpose, is taken off. The other side is `dbt run` of the same model on the same database.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anton.dbt.profile import PASSWORD, outputs, write_profile
from benchmarks.harness import Row, Rows, Run, WrongResult, at_least, at_most, bench, median, percentile
from benchmarks.server import Conn, connect
from benchmarks.subject import ANTON, environment, number, wait_for, wait_idle

DEBOUNCE = 0.2  # seconds
DBT = [sys.executable, "-c", "from dbt.cli.main import cli; cli()"]  # what the command `dbt` is
_APP = f"""
import time
from decimal import Decimal
from pydantic import BaseModel
from anton import DbtProject, Table

class Order(BaseModel):
    id: int
    customer: str
    total: Decimal

orders, starts = Table("orders", Order), Table("starts")
shop = DbtProject()
shop.run_when(orders, debounce={DEBOUNCE}, max_wait="30s")

@shop.model("revenue").on_changes
def start(records):
    starts.append({{"at": time.monotonic_ns()}})
"""
_FILES = {
    "main.py": _APP,
    "dbt_project/dbt_project.yml": 'name: shop\nversion: "1.0"\nprofile: anton\n',
    "dbt_project/models/revenue.sql": """{{ config(materialized='table') }}
select customer, sum(total) as revenue from {{ source('app', 'orders') }} group by 1
""",
    "dbt_project/models/schema.yml": """version: 2
sources: [{name: app, schema: public, tables: [{name: orders}]}]
models: [{name: revenue, columns: [{name: customer, data_tests: [unique, not_null]}]}]
""",
}


@bench(at_most("dbt_reaction_s", 0.6, "s"), at_least("dbt_vs_cli", 4))
def dbt_reaction(run: Run) -> Rows:
    """One small model of 1,000 customers: seconds from the commit of one order to the call of the handler."""
    with run.server.database("reaction") as url, connect(url) as conn, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in _FILES.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        words = [*ANTON, "--database", url]
        subprocess.run([*words, "migrate"], cwd=folder, env=environment(), check=True, capture_output=True)
        conn.execute("insert into orders select n, 'customer ' || n % 1000, 1 from generate_series(1, 10000) n")
        taken = []
        with working(folder, url, conn):
            wait_for(lambda: number(conn, "select count(*) from anton.dbt_build") == 1, 120, "the first build")
            wait_idle(conn)
            for turn in range(run.size(20, 2) + 1):
                conn.execute("insert into orders values (%s, 'customer 7', 1)", (20_000 + turn,))
                began = time.monotonic_ns()
                wait_for(lambda n=turn + 1: number(conn, "select count(*) from starts") == n, 60, "the handler")
                at = conn.execute("select (data ->> 'at')::bigint from starts order by id desc limit 1").fetchone()
                taken.append((int(str(at[0] if at else 0)) - began) / 1e9 - DEBOUNCE)
                wait_idle(conn)
            if number(conn, "select (select count(*) from anton.dead) + (select count(*) from anton.dbt_run "
                            "where state <> 'done')"):
                raise WrongResult("a run of dbt failed")
        warm = taken[1:]
        command = [_dbt(folder, url) for _ in range(run.size(5, 1))]
    detail = {"reactions_s": [round(one, 3) for one in warm], "dbt_run_s": [round(one, 3) for one in command],
              "p90_s": round(percentile(warm, 90), 3)}
    return {"dbt_reaction_s": Row(median(warm), detail=detail),
            "dbt_vs_cli": Row(median(command) / median(warm), detail=detail)}


def _dbt(folder: Path, url: str) -> float:
    """Seconds of `dbt run` of the model, by the command."""
    output, password = outputs(url, "public", 4)
    write_profile(folder, "dev", output)
    began = time.perf_counter()
    subprocess.run([*DBT, "run", "--select", "revenue", "--profiles-dir", str(folder)], cwd=folder / "dbt_project",
                   check=True, capture_output=True, env={**os.environ, PASSWORD: password, "DO_NOT_TRACK": "1"})
    return time.perf_counter() - began


@contextmanager
def working(folder: Path, url: str, conn: Conn) -> Iterator[None]:
    """A running `anton work` in the app's folder, once it has registered."""
    process = subprocess.Popen([*ANTON, "--database", url, "work"], env=environment(), cwd=folder)
    try:
        wait_for(lambda: number(conn, "select count(*) from anton.worker") > 0, 30, "a worker", process)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
