"""Loads: large files into Tables by `anton work`, against psql's \\copy of the same CSV into a table like it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.csv  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from anton import embedded
from benchmarks.harness import Row, Rows, Run, WrongResult, at_least, at_most, bench, median, middle
from benchmarks.proc import Meter, peak_rss
from benchmarks.server import Conn, connect
from benchmarks.subject import ANTON, environment, number, same_rows, wait_for, wait_idle

_APP = """
from datetime import datetime
from decimal import Decimal
from pydantic import BaseModel, field_validator
from anton import Files, Table

class Line(BaseModel):
    id: int
    customer: str
    total: Decimal
    paid: bool
    at: datetime

class Checked(Line):
    @field_validator("customer")
    @classmethod
    def named(cls, value: str) -> str:
        if not value:
            raise ValueError("no name")
        return value

Files("disk", "*.csv", every="1h", settle=0, name="incoming").load(into=Table("lines", Line))
Files("disk", "checked/*.csv", every="1h", settle=0, name="checking").load(into=Table("checked", Checked))
Files("disk", "*.parquet", every="1h", settle=0, name="packed").load(into=Table("unpacked", Line))
"""
_ROWS = ("select n as id, 'customer ' || n % 1000 as customer, (n % 10000) / 100.0 as total, n % 2 = 0 as paid, "
         "timestamptz '2026-01-01' + n * interval '1 s' as at")


@bench(at_least("csv_vs_copy", 0.4), at_most("csv_rss_mb", 300, "MB"))
def csv(run: Run) -> Rows:
    """A CSV of 5M rows on a disk: rows a second from the scan on that finds it, against \\copy; the worker's memory."""
    rows = run.size(5_000_000, 50_000)
    copied, loaded, memory, cpu = [], [], [], []
    with run.server.database("csv") as url, connect(url) as conn, tempfile.TemporaryDirectory() as name:
        folder = _app(Path(name), url)
        conn.execute("create table copied (like lines including all)")
        for turn in range(min(run.times, 3)):
            file = folder / "data" / f"{turn}.csv"
            _psql(url, f"\\copy ({_ROWS} from generate_series(1, {rows}) n) to '{file}' csv header")
            conn.execute("truncate copied, lines")
            conn.execute("checkpoint")
            began = time.perf_counter()
            _psql(url, f"\\copy copied from '{file}' csv header")
            copied.append(rows / (time.perf_counter() - began))
            conn.execute("checkpoint")
            with _worker(folder, conn) as pid, peak_rss(pid) as peak:
                meter = Meter(run.server.postmaster, pid)
                loaded.append(rows / _load(conn, "incoming"))
                cpu.append(meter.per_million(rows))
                wait_idle(conn)
            memory.append(peak[0])
            same_rows(conn, "table copied", "table lines")
            if number(conn, "select count(*) from lines") != rows:
                raise WrongResult("the table has not all rows")
            file.unlink()
    detail = {"copy_per_s": [round(one) for one in copied], "load_per_s": [round(one) for one in loaded],
              "rss_mb": [round(one) for one in memory]}
    return {"csv_vs_copy": Row(median(loaded) / median(copied), middle(cpu), detail),
            "csv_rss_mb": Row(max(memory), detail=detail)}


@bench(at_least("csv_python_vs_copy", 0.02), at_least("parquet_vs_copy", 0.02),
       at_most("parquet_rss_mb", 300, "MB"))
def through_python(run: Run) -> Rows:
    """500,000 rows, each through a model: a CSV whose model has a validator, and Parquet in groups of 100,000."""
    rows = run.size(500_000, 20_000)
    copied, checked, unpacked, memory = [], [], [], []
    with run.server.database("python") as url, connect(url) as conn, tempfile.TemporaryDirectory() as name:
        folder = _app(Path(name), url)
        conn.execute("create table copied (like lines including all)")
        for turn in range(min(run.times, 3)):
            text, parquet = folder / "data" / "checked" / f"{turn}.csv", folder / "data" / f"{turn}.parquet"
            _psql(url, f"\\copy ({_ROWS} from generate_series(1, {rows}) n) to '{text}' csv header")
            _to_parquet(text, parquet)
            conn.execute("truncate copied, checked, unpacked")
            began = time.perf_counter()
            _psql(url, f"\\copy copied from '{text}' csv header")
            copied.append(rows / (time.perf_counter() - began))
            with _worker(folder, conn):
                checked.append(rows / _load(conn, "checking"))
            with _worker(folder, conn) as pid, peak_rss(pid) as peak:
                unpacked.append(rows / _load(conn, "packed"))
            memory.append(peak[0])
            for table in ("checked", "unpacked"):
                same_rows(conn, "table copied", f"table {table}")
            text.unlink()
            parquet.unlink()
    detail = {"copy_per_s": [round(one) for one in copied], "csv_per_s": [round(one) for one in checked],
              "parquet_per_s": [round(one) for one in unpacked], "rss_mb": [round(one) for one in memory]}
    return {"csv_python_vs_copy": Row(median(checked) / median(copied), detail=detail),
            "parquet_vs_copy": Row(median(unpacked) / median(copied), detail=detail),
            "parquet_rss_mb": Row(max(memory), detail=detail)}


def _load(conn: Conn, files: str) -> float:
    """The seconds from a scan on until what it finds is in."""
    done = "select count(*) from anton.load where state = 'done'"
    before, began = number(conn, done), time.perf_counter()
    conn.execute(f"select anton.run_schedule('scan_{files}')")
    wait_for(lambda: number(conn, done) > before, 900, "the load")
    return time.perf_counter() - began


def _to_parquet(text: Path, parquet: Path) -> None:
    kinds = {"total": pyarrow.decimal128(38, 20), "at": pyarrow.timestamp("us", "UTC")}
    read = pyarrow.csv.ConvertOptions(column_types=kinds, true_values=["t"], false_values=["f"])
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(text, convert_options=read), parquet, row_group_size=100_000)


def _app(folder: Path, url: str) -> Path:
    (folder / "data" / "checked").mkdir(parents=True)
    (folder / "main.py").write_text(_APP)
    (folder / "autonomous.json").write_text(json.dumps({"name": "bench", "storages": [
        {"name": "db", "type": "database", "url": url}, {"name": "disk", "type": "files", "url": "file://data"}]}))
    subprocess.run([*ANTON, "migrate"], env=_environment(), cwd=folder, capture_output=True, check=True)
    return folder


def _environment() -> dict[str, str]:
    return {name: value for name, value in environment().items() if not name.startswith(("DATABASE_URL", "PG"))}


def _psql(url: str, command: str) -> None:
    subprocess.run([embedded.postgres_bin("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", url, "-c", command],
                   env={"PATH": os.environ["PATH"]}, check=True)


@contextmanager
def _worker(folder: Path, conn: Conn) -> Iterator[int]:
    """A running `anton work` in the app's folder, once it has registered."""
    before = number(conn, "select count(*) from anton.worker")
    process = subprocess.Popen([*ANTON, "work"], env=_environment(), cwd=folder)
    try:
        wait_for(lambda: number(conn, "select count(*) from anton.worker") > before, 20, "a worker", process)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
