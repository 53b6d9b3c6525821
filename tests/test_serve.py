"""Serve: real processes; what is in flight is finished, who dies is replaced, what changes is loaded anew."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

PATIENCE = 60.0
ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]

MAIN = """
import os, signal
import psycopg
from anton import Request, Table, app, get, post

events = Table("events")

@post("/events", verify=False)
def keep(request: Request):
    events.append({"got": request.json()})
    return 201

@post("/slow", verify=False)
def slow(request: Request):
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as conn:
        conn.execute("insert into here (pid) values (%s)", [os.getpid()])
        conn.execute("select pg_advisory_lock_shared(7)")
    events.append({"got": "slow"})
    return 201

@get("/pid")
def pid():
    return {"pid": os.getpid(), "says": "one"}
"""


class Served:
    """`anton serve` on an app in a folder. log: what it said on stderr is in folder/log."""

    def __init__(self, process: subprocess.Popen[str], conn: psycopg.Connection[Any], folder: Path) -> None:
        self.process, self.conn, self.folder, self.url = process, conn, folder, ""

    def said(self) -> str:
        """The address in its next line of output."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"http://[\d.]+:\d+", line)
        assert found, line + (self.folder / "log").read_text()
        return found[0]

    def pid(self) -> int:
        return int(httpx.get(f"{self.url}/pid", timeout=PATIENCE).json()["pid"])

    def pids(self, wanted: Callable[[set[int]], bool]) -> set[int]:
        """Pids that answer, asked for until `wanted` is true of them."""
        found: set[int] = set()
        while not wanted(found):
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):   # taken by a worker about to end
                found.add(self.pid())
        return found

    def slow(self, count: int) -> list[subprocess.Popen[bytes]]:
        """Requests that wait for a lock of the test's; they have arrived when this returns."""
        self.conn.execute("select pg_advisory_lock(7)")
        ask = "import httpx, sys; sys.exit(httpx.post(sys.argv[1], timeout=60).status_code != 201)"
        asking = [subprocess.Popen([sys.executable, "-c", ask, f"{self.url}/slow"]) for _ in range(count)]
        while self.value("select count(*) from here") != count:
            assert all(one.poll() is None for one in asking), (self.folder / "log").read_text()
        return asking

    def value(self, sql: str) -> Any:
        row = self.conn.execute(sql).fetchone()  # type: ignore[call-overload]
        return row[0]


@pytest.fixture
def serve(database: str, tmp_path: Path) -> Iterator[Any]:
    """Starts `anton serve` with these words on MAIN, migrated, and code added to it."""
    env = {**os.environ, "DATABASE_URL": database}
    conn = psycopg.connect(database, autocommit=True)
    conn.execute("create table here (pid int)")

    @contextmanager
    def start(*words: str, code: str = "") -> Iterator[Served]:
        (tmp_path / "main.py").write_text(MAIN)
        subprocess.run([*ANTON, "migrate"], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
        (tmp_path / "main.py").write_text(MAIN + code)
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([*ANTON, "serve", "--port", "0", *words], cwd=tmp_path, env=env, text=True,
                                       stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            served = Served(process, conn, tmp_path)
            served.url = "" if code else served.said()
            yield served
        finally:
            conn.execute("select pg_advisory_unlock_all()")
            process.terminate()
            process.communicate(timeout=PATIENCE)

    yield start
    conn.close()


@pytest.mark.parametrize("words", [(), ("--workers", "2")], ids=["one", "workers"])
def test_sigterm_finishes_the_requests_in_flight(serve: Any, words: tuple[str, ...]) -> None:
    with serve(*words) as served:
        asking = served.slow(3)
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):                      # nobody new is let in
            while True:
                httpx.get(f"{served.url}/health", timeout=1)
        assert [one.poll() for one in asking] == [None] * 3
        served.conn.execute("select pg_advisory_unlock(7)")
        assert [one.wait(PATIENCE) for one in asking] == [0, 0, 0]
        assert served.process.wait(PATIENCE) == 0
        assert served.value("select count(*) from events") == 3
        assert "Traceback" not in (served.folder / "log").read_text()


def test_workers_share_the_port_and_one_that_is_killed_is_replaced(serve: Any) -> None:
    with serve("--workers", "2") as served:
        first = served.pids(lambda found: len(found) == 2)
        assert served.process.pid not in first
        os.kill(min(first), signal.SIGKILL)
        then = served.pids(lambda found: bool(found - first))
        assert min(first) not in then - first
        for n in range(20):
            assert httpx.post(f"{served.url}/events", json=n, timeout=PATIENCE).status_code == 201
        assert served.value("select count(*) from events") == 20
    assert "died (-9) and was replaced" in (served.folder / "log").read_text()


def test_sighup_replaces_the_workers_with_the_code_of_now(serve: Any) -> None:
    with serve("--workers", "2") as served:
        first = served.pids(lambda found: len(found) == 2)
        (served.folder / "main.py").write_text(MAIN.replace('"one"', '"two"'))
        served.process.send_signal(signal.SIGHUP)
        served.pids(lambda found: len(found - first) == 2)
        says = ""
        while says != "two":
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):   # taken by a worker about to end
                says = httpx.get(f"{served.url}/pid", timeout=PATIENCE).json()["says"]


def test_workers_of_a_parent_that_was_killed_finish_and_end(serve: Any) -> None:
    with serve("--workers", "2") as served:
        asking = served.slow(2)
        served.process.kill()
        served.process.wait(PATIENCE)
        with pytest.raises(httpx.TransportError):                      # the port is given back
            while True:
                httpx.get(f"{served.url}/health", timeout=1)
        served.conn.execute("select pg_advisory_unlock(7)")
        assert [one.wait(PATIENCE) for one in asking] == [0, 0]
        assert served.value("select count(*) from events") == 2


def test_reload_serves_what_a_file_says_now_and_waits_when_it_cannot_be_loaded(serve: Any) -> None:
    with serve("--reload", code="oh no") as served:
        log, main = served.folder / "log", served.folder / "main.py"
        while "SyntaxError" not in log.read_text():
            assert served.process.poll() is None
        for word in ("one", "two"):
            main.write_text(MAIN.replace('"one"', f'"{word}"'))
            served.url = served.said()
            assert httpx.get(f"{served.url}/pid", timeout=PATIENCE).json()["says"] == word


def test_what_cannot_be_served_is_told_before_a_process_starts(database: str, tmp_path: Path) -> None:
    env = {**os.environ, "DATABASE_URL": database}
    (tmp_path / "main.py").write_text("from anton import get\n\n@get('/open')\ndef f(): return 200\n")

    def told(*words: str) -> tuple[int, str]:
        done = subprocess.run([*ANTON, "serve", "--port", "0", *words], cwd=tmp_path, env=env, text=True, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
        assert "Traceback" not in done.stdout
        return done.returncode, done.stdout

    assert told("--workers", "2", "--reload")[0] == 2
    assert told("--workers", "0")[0] == 2
    assert told("--port", "65536") == (2, "anton serve: argument --port: 65536 is not possible; allowed: 0 to 65535\n")
    status, text = told("--workers", "2", "--host", "0.0.0.0")
    assert status == 2 and "GET /open (main.py:3) would take requests from anybody on 0.0.0.0" in text
    (tmp_path / "autonomous.json").write_text(json.dumps({"name": "a", "deployment": {"workers": 0}}))
    status, text = told()
    assert status == 2 and '"deployment.workers" is 0' in text
