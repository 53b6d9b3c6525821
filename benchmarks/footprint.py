"""Footprint: what Anton costs when nothing happens, with wide rows, and to start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.harness import Row, Rows, Run, at_most, bench, median
from benchmarks.proc import Meter, peak_rss, rss_mb
from benchmarks.server import connect
from benchmarks.subject import ANTON, check, environment, migrate, number, plain_table, wait_for, wait_idle, worker

_QUERIES = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"


@bench(at_most("idle_cpu_percent", 0.5, "%"), at_most("idle_queries_per_s", 2, "/s"), at_most("idle_rss_mb", 100, "MB"))
def idle(run: Run) -> Rows:
    """A worker with nothing to do: CPU of Anton and Postgres in % of one core, transactions, memory."""
    seconds = run.size(60, 10)
    with run.server.database("idle") as url, connect(url) as conn:
        for table in ("bench_in", "bench_out"):
            plain_table(conn, table)
        migrate(url, "app_batch")
        with worker(conn, url, "app_batch") as pid:
            conn.execute("insert into bench_in (n, s) values (1, 'x')")
            wait_idle(conn)
            time.sleep(5)
            meter, queries, began = Meter(run.server.postmaster, pid), number(conn, _QUERIES), time.perf_counter()
            time.sleep(seconds)
            cpu, passed = meter.seconds(), time.perf_counter() - began
            queries = number(conn, _QUERIES) - queries - 1
            memory = rss_mb(pid)
    return {
        "idle_cpu_percent": Row(None if cpu is None else 100 * cpu / passed),
        "idle_queries_per_s": Row(queries / passed),
        "idle_rss_mb": Row(memory),
    }


@bench(at_most("wide_rows_rss_mb", 400, "MB"))
def wide_rows(run: Run) -> Rows:
    """The worker's peak memory over 2,000 rows of 1 MB."""
    rows, size = run.size(2000, 200), 1_000_000
    with run.server.database("wide") as url, connect(url) as conn:
        conn.execute("create table wide (id bigint generated always as identity primary key, n int, body text)")
        conn.execute("create table sizes (id bigint generated always as identity primary key, n int, size int)")
        migrate(url, "app_wide")
        with worker(conn, url, "app_wide") as pid, peak_rss(pid) as peak:
            conn.execute(f"insert into wide (n, body) select i, repeat('x', {size}) from generate_series(1, {rows}) i")
            wait_idle(conn)
        check(conn, f"select n, {size} from wide", "select n, size from sizes")
    return {"wide_rows_rss_mb": Row(peak[0] if peak else None)}


@bench(at_most("import_ms", 300, "ms"))
def import_time(run: Run) -> Rows:
    """`import anton` in a new interpreter, its files in the cache."""
    code = "import time; t = time.perf_counter(); import anton; print((time.perf_counter() - t) * 1000)"
    times = []
    for _ in range(run.size(9, 4)):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
        )
        times.append(float(done.stdout))
    return {"import_ms": Row(median(times[1:]), detail={"ms": [round(x) for x in times]})}


_APP = """
from pathlib import Path
from anton import Records, Table, post

events = Table("events")

@post("/events")
def event() -> int:
    events.append({"text": "first"})
    return 200

@events.on_new_records
def handled(records: Records) -> None:
    Path("handled").touch()
"""


@bench(at_most("dev_cold_s", 6, "s"))
def dev_cold(run: Run) -> Rows:
    """`anton dev` in a folder without a database: until the first event that is posted has been handled."""
    times = [_dev_cold() for _ in range(run.size(3, 1))]
    return {"dev_cold_s": Row(median(times), detail={"s": [round(x, 2) for x in times]})}


def _dev_cold() -> float:
    with tempfile.TemporaryDirectory(prefix="anton-bench-dev-") as name, tempfile.TemporaryFile("w+") as log:
        folder = Path(name)
        folder.chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "main.py").write_text(_APP)
        (folder / "autonomous.json").write_text(json.dumps({"name": "bench", "deployment": {"port": port}}))
        plain = {
            key: value for key, value in environment().items() if key != "DATABASE_URL" and not key.startswith("PG")
        }
        began = time.perf_counter()
        process = subprocess.Popen(
            [*ANTON, "dev"],
            cwd=folder,
            env=plain,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(lambda: _posted(port), 60, "anton dev to answer", process, log)
            wait_for((folder / "handled").exists, 30, "the first event to be handled", process, log)
            return time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _posted(port: int) -> bool:
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/events", data=b"{}", method="POST")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        raise
    except OSError:
        return False
