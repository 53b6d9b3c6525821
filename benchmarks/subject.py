"""Subject: Anton as the benches use it: `anton migrate`, a real `anton work`, and the checks after a run."""

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
from typing import IO

from psycopg import sql

from benchmarks.harness import WrongResult
from benchmarks.server import Conn

_REPO = Path(__file__).parent.parent
ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]

# The newest job leads: jobs are claimed oldest first, so this look meets no row that was deleted.
_LEFT = """
select coalesce((select 'job' from anton.job order by handler_id desc, id desc limit 1),
                (select 'lease' from anton.lease limit 1), (select 'delayed' from anton.delayed limit 1))
"""


def environment(repo: Path = _REPO) -> dict[str, str]:
    """Of a process that imports Anton from this repository, or from another checkout of it."""
    return {**os.environ, "PYTHONPATH": str(repo), "PYTHONUNBUFFERED": "1"}


def _command(url: str, app: str, *words: str) -> list[str]:
    return [*ANTON, "--database", url, "--app", f"benchmarks.{app}", *words]


def migrate(url: str, app: str, repo: Path = _REPO) -> None:
    """Runs `anton migrate` for the app module benchmarks/<app>.py."""
    done = subprocess.run(
        _command(url, app, "migrate"), env=environment(repo), cwd=repo, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"anton migrate ended with {done.returncode}: {done.stdout}{done.stderr}")


@contextmanager
def worker(conn: Conn, url: str, app: str, *words: str, repo: Path = _REPO) -> Iterator[int]:
    """A running `anton work`; yields its pid once it has registered, and drains it at the end."""
    before = workers(conn)
    log: IO[str]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            _command(url, app, "work", *words), env=environment(repo), cwd=repo, stdout=log, stderr=log
        )
        try:
            wait_for(lambda: workers(conn) > before, 20, "a worker to register", process, log)
            time.sleep(0.3)  # its connections, before anything is measured
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.seek(0)
        if process.returncode not in (0, -signal.SIGTERM):
            raise RuntimeError(f"anton work ended with {process.returncode}:\n{log.read()[-3000:]}")


def wait_for(
    done: object, seconds: float, what: str, process: subprocess.Popen[bytes] | None = None, log: IO[str] | None = None
) -> None:
    """Waits until done() is true; raises when it takes longer, or when the process ended meanwhile."""
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > end:
            text = ""
            if log is not None:
                log.seek(0)
                text = "\n" + log.read()[-3000:]
            reason = "the process ended" if ended else f"{seconds:g} s passed"
            raise RuntimeError(f"{reason} while waiting for {what}{text}")
        time.sleep(0.02)


def workers(conn: Conn) -> int:
    """Workers that ever registered."""
    return number(conn, "select count(*) from anton.worker")


def number(conn: Conn, query: str) -> int:
    """The one integer that a query returns."""
    row = conn.execute(query).fetchone()
    assert row is not None
    return int(str(row[0]))


def wait_idle(conn: Conn, seconds: float = 600, every: float = 0.01) -> float:
    """Waits until no job, lease or delayed job is left; returns the time.perf_counter() of that moment."""
    end = time.monotonic() + seconds
    while (row := conn.execute(_LEFT).fetchone()) is not None and row[0] is not None:
        if time.monotonic() > end:
            raise WrongResult(f"after {seconds:g} s there is still work in anton.{row[0]}")
        time.sleep(every)
    return time.perf_counter()


def check(conn: Conn, expected: str, found: str, dead: int = 0) -> None:
    """Raises WrongResult unless both queries give the same multiset of rows and nothing is left in the queue."""
    same_rows(conn, expected, found)
    for name, most in (("job", 0), ("lease", 0), ("delayed", 0), ("dead", dead)):
        n = number(conn, f"select count(*) from anton.{name}")
        if n != most:
            raise WrongResult(f"anton.{name} holds {n} rows, expected {most}")


def same_rows(conn: Conn, expected: str, found: str) -> None:
    """Raises WrongResult unless the two queries give the same rows, each as often."""
    difference = conn.execute(f"""
      with e as materialized ({expected}), f as materialized ({found})
      select (select count(*) from (select * from e except all select * from f) lost),
             (select count(*) from (select * from f except all select * from e) extra)""").fetchone()
    assert difference is not None
    if difference != (0, 0):
        lost, extra = difference
        raise WrongResult(f"the output lacks {lost} expected rows and has {extra} that were not expected")


def plain_table(conn: Conn, name: str) -> None:
    """Makes the table of the floor under this name: logged, identity key, four columns."""
    conn.execute(
        sql.SQL("""
      create table {} (id bigint generated always as identity primary key,
                       created_at timestamptz not null default now(), n int, s text)""").format(sql.Identifier(name))
    )


def source_table(conn: Conn, rows: int) -> None:
    """Makes `source`: n from 1 to `rows`, s of 20 random characters."""
    conn.execute("create table source (n int, s text)")
    made = "insert into source select i, substr(md5(random()::text), 1, 20) from generate_series(1, %s::int) i"
    conn.execute(made, (rows,))
    conn.execute("vacuum analyze source")
