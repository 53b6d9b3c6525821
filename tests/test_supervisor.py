"""Supervisor: processes die, hang and are told to stop; no record is lost, done twice or blamed for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

PATIENCE = 60.0
ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]

MAIN = """
import os, signal, threading
import psycopg
from anton import Ctx, Records, Table

def ask(sql, *args):
    with psycopg.connect(os.environ["TEST_URL"], autocommit=True) as conn:
        return conn.execute(sql, args)

def meet(n):
    "Tells the test that record n is at work here, and waits until the test lets go of its lock."
    ask("insert into seen (n, pid) values (%s, %s)", n, os.getpid())
    ask("select pg_advisory_lock_shared(7)")

a, b = Table("a"), Table("b")
"""


class Folder:
    """An app in a folder, its database, and `anton work` on it."""

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self.url = url
        self.conn = psycopg.connect(url, autocommit=True)
        self.conn.execute("create table seen (at timestamptz default clock_timestamp(), n int, pid int)")

    def write(self, handlers: str) -> None:
        (self.path / "main.py").write_text(MAIN + handlers)
        (self.path / "autonomous.json").write_text('{"name": "t"}')
        self.anton("migrate").wait(PATIENCE)

    def anton(self, *words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "DATABASE_URL": self.url, "TEST_URL": self.url, "PYTHONUNBUFFERED": "1"}
        with (self.path / "log").open("ab") as log:
            return subprocess.Popen([*ANTON, *words], cwd=self.path, env=environment, start_new_session=True,
                                    stdout=log, stderr=subprocess.STDOUT)

    @contextmanager
    def working(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        before = self.value("select count(*) from anton.worker")
        process = self.anton("work", *words)
        try:
            self.until("select count(*) > %s from anton.worker", before)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    @contextmanager
    def gate(self) -> Iterator[None]:
        """While it is open nothing that meets the test goes on."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute("select pg_advisory_lock(7)")
            yield

    def add(self, numbers: range | list[int]) -> None:
        self.conn.execute(
            "insert into a (data) select jsonb_build_object('n', n) from unnest(%s::int[]) n", [list(numbers)]
        )

    def begun(self) -> None:
        """Adds 30 records, of which five are at work when this returns, and others claimed."""
        self.add(range(30))
        self.until("select count(*) = 1 from seen")
        self.until("select count(*) > 1 from anton.lease")

    def value(self, sql: str, *args: Any) -> Any:
        row = self.conn.execute(sql, args).fetchone()
        return row and row[0]

    def column(self, sql: str, *args: Any) -> list[Any]:
        return [row[0] for row in self.conn.execute(sql, args)]

    def until(self, sql: str, *args: Any, patience: float = PATIENCE) -> Any:
        end = time.monotonic() + patience
        while not (value := self.value(sql, *args)):
            if time.monotonic() > end:
                raise AssertionError(f"after {patience:g} s still not: {sql}; left: {self.left()}\n{self.log()}")
            time.sleep(0.01)
        return value

    def until_done(self) -> None:
        self.until("select not exists (select from anton.job) and not exists (select from anton.lease) "
                   "and not exists (select from anton.delayed)")

    def left(self) -> dict[str, int]:
        found = {
            name: int(self.value(f"select count(*) from anton.{name}")) for name in ("job", "lease", "delayed", "dead")
        }
        return {name: n for name, n in found.items() if n}

    def outputs(self) -> list[int]:
        return self.column("select (data->>'n')::int from b order by 1")

    def log(self) -> str:
        return (self.path / "log").read_text()


@pytest.fixture
def folder(tmp_path: Path, database: str) -> Iterator[Folder]:
    folder = Folder(tmp_path, database)
    yield folder
    folder.conn.close()


@pytest.fixture
def started(folder: Folder) -> Callable[[str], Folder]:
    def start(handlers: str) -> Folder:
        folder.write(handlers)
        return folder

    return start


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
    except NotADirectoryError:                                         # no /proc here
        return subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode != 0


BATCH = """
@a.on_new_records
def handle(records: Records):
    for record in records:
        if record["n"] == 3:
            meet(3)
        b.append({"n": record["n"]})
"""


def test_records_of_a_worker_that_was_killed_are_done_at_once_and_once(started):
    folder = started(BATCH)
    with folder.working("--lease", "1h"):
        with folder.gate():
            folder.add(range(20))
            pid = folder.until("select pid from seen")
            os.kill(pid, signal.SIGKILL)
        folder.until_done()
    assert folder.outputs() == list(range(20)) and folder.left() == {}
    assert folder.value("select count(distinct pid) from seen") == 2
    assert "died: SIGKILL" in folder.log()


def test_when_the_supervisor_is_killed_its_workers_die_with_it_and_the_next_one_goes_on_after_the_lease(started):
    folder = started(BATCH)
    with folder.gate():
        with folder.working("--lease", "1s") as process:
            folder.add(range(20))
            pid = folder.until("select pid from seen")
            process.kill()
            process.wait()
            end = time.monotonic() + PATIENCE
            while not gone(pid):
                assert time.monotonic() < end
                time.sleep(0.01)
        assert folder.left() == {"lease": 1}
    with folder.working("--lease", "1s"):
        folder.until_done()
    assert folder.outputs() == list(range(20)) and folder.left() == {}


def test_a_record_that_kills_its_process_is_found_and_buried_and_takes_nobody_along(started):
    folder = started("""
@a.on_new_records(attempts=2)
def handle(records: Records):
    for record in records:
        if record["n"] == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        b.append({"n": record["n"]})
""")
    with folder.working():
        folder.add([*range(100), 666, *range(1000, 1030)])
        folder.add(range(2000, 2010))
        folder.until_done()
    assert folder.outputs() == [*range(100), *range(1000, 1030), *range(2000, 2010)]
    dead = folder.conn.execute("select reason, error, key from anton.dead").fetchall()
    assert [(reason, key) for reason, _, key in dead] == [("crashed", [101])] and "died 2 times" in dead[0][1]


FIVES = """
@a.on_new_records(batch=5)
def handle(records: Records, ctx: Ctx):
    meet(records[0]["n"])
    for record in records:
        b.append({"n": record["n"], "attempt": ctx.attempt})
"""
AHEAD_IS_BACK = "select count(*) = 1 from anton.lease"                 # so the worker drains


def test_sigterm_finishes_what_runs_and_gives_the_rest_back(started):
    folder = started(FIVES)
    with folder.working("--slots", "1") as process:
        with folder.gate():
            folder.begun()
            process.terminate()
            folder.until(AHEAD_IS_BACK)
        assert process.wait(PATIENCE) == 0
    assert len(folder.outputs()) == 5 and folder.left() == {"job": 5}
    assert folder.value("select stopped_at is not null from anton.worker")
    with folder.working():
        folder.until_done()
    assert folder.outputs() == list(range(30))
    assert folder.column("select distinct data->>'attempt' from b") == ["1"]


def test_a_second_signal_stops_now_and_nothing_is_lost(started):
    folder = started(FIVES)
    with folder.working("--slots", "1") as process, folder.gate():
        folder.begun()
        process.send_signal(signal.SIGINT)
        folder.until(AHEAD_IS_BACK)                                    # two at once would be one signal
        assert process.poll() is None                                  # it waits for the handler
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert folder.outputs() == [] and folder.left() == {"job": 6}


def test_a_signal_that_comes_while_a_process_is_forked_ends_it_too_and_no_other_is_forked(started):
    folder = started("""
def told():
    if told in left:
        left.remove(told)
        os.kill(os.getpid(), signal.SIGTERM)

left = [told]
os.register_at_fork(after_in_parent=told)
""")
    process = folder.anton("work", "--processes", "2")
    try:
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def test_a_process_with_a_stuck_thread_is_replaced(started):
    folder = started("""
@a.on_new_records(each=True, timeout="1s", attempts=1)
def handle(record):
    if record["n"] == 3:
        meet(3)
    b.append({"n": record["n"]})
""")
    with folder.gate(), folder.working():
        folder.add(range(10))
        pid = folder.until("select pid from seen")
        folder.until("select count(*) = 2 from anton.worker")
        folder.add(range(10, 20))
        folder.until_done()
        assert folder.outputs() == [n for n in range(20) if n != 3] and folder.left() == {"dead": 1}
        end = time.monotonic() + PATIENCE
        while not gone(pid):
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_process_whose_loop_a_handler_blocks_is_replaced_and_its_neighbours_are_done(started):
    folder = started("""
import time
import anton.run, anton.supervisor

anton.run.MARGIN, anton.supervisor.STUBBORN = 0.5, 1.0

@a.on_new_records(each=True, timeout="500ms", attempts=1)
async def handle(record):
    if record["n"] == 3:
        time.sleep(1000)
    b.append({"n": record["n"]})
""")
    with folder.working("--lease", "1s"):
        for n in range(8):
            folder.add([n])
        folder.until_done()
    assert folder.outputs() == [n for n in range(8) if n != 3]
    assert folder.column("select reason from anton.dead") == ["crashed"]


def test_as_many_processes_work_as_were_asked_for_and_dead_ones_are_replaced(started):
    folder = started("""
@a.on_new_records(each=True, concurrency=1)
def handle(record):
    b.append({"n": record["n"], "pid": os.getpid()})
""")
    with folder.working("--processes", "3"):
        folder.until("select count(*) = 3 from anton.worker where stopped_at is null")
        folder.add([-1])
        folder.until("select exists (select from b)")                   # long after they told their parent who they are
        os.kill(folder.value("select min(pid) from anton.worker"), signal.SIGKILL)
        folder.until("select count(*) = 4 from anton.worker")
        folder.until("select count(*) = 3 from anton.worker where stopped_at is null")
        folder.add(range(3000))
        folder.until_done()
    assert folder.outputs() == list(range(-1, 3000))
    assert folder.value("select count(*) from anton.worker where stopped_at is null") == 0


def test_work_without_migrate_says_what_to_do(folder, bare):
    (folder.path / "main.py").write_text("")
    folder.url = bare
    assert folder.anton("work").wait(PATIENCE) == 1
    assert "Run: anton migrate" in folder.log() and "Traceback" not in folder.log()
