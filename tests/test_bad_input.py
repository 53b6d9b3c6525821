"""Bad input, as people type it: the message names the thing and what to do, and shows no code of ours."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import Server

from anton import Table
from anton.app import App, declaring
from anton.db import Database
from anton.errors import SyncInLoop

pytestmark = pytest.mark.once("the app's own process: the server is asked for the same")

REPO = Path(__file__).resolve().parent.parent
ANTON = "import sys; from anton.cli import main; sys.exit(main())"
OURS = re.compile(r'File "[^"]*(anton/|anton\.|importlib|site-packages)')

MAIN = """
from decimal import Decimal
from pydantic import BaseModel
from anton import Ctx, Records, Table, get

class Order(BaseModel):
    id: int | None = None
    customer: str
    total: Decimal

orders, letters = Table("orders", Order), Table("letters")
"""

Anton = Callable[..., tuple[int, str]]


def run(folder: Path, code: str, url: str, *words: str) -> tuple[int, str]:
    """Runs a command on an app with this code; its exit code and all that it printed."""
    (folder / "main.py").write_text(MAIN + code)
    (folder / "autonomous.json").write_text('{"name": "shop"}')
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'components'}", "DATABASE_URL": url}
    done = subprocess.run([sys.executable, "-c", ANTON, *words], cwd=folder, env=env, check=False, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.fixture
def anton(database: str, tmp_path: Path) -> Anton:
    return lambda *words, code="", url=database: run(tmp_path, code, url, *words)


@pytest.fixture(scope="module")
def _migrated(server: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    name = server.clone(template)
    assert run(tmp_path_factory.mktemp("app"), "", server.url(name), "migrate")[0] == 0
    yield name
    server.drop(name)


@pytest.fixture
def migrated(server: Server, _migrated: str) -> Iterator[str]:
    """A database that the app was migrated into."""
    name = server.clone(_migrated)
    yield server.url(name)
    server.drop(name)


@pytest.mark.parametrize(("code", "says"), [
    ("@orders.on_new_records\ndef f(): pass",
     r'"f" \(main.py:12\) takes \(\). Allowed: \(records\) or \(records, ctx\)'),
    ("@orders.on_new_records(each=True)\ndef f(records: Records): pass", r"and each=True. Allowed: \(record\)"),
    ('@orders.on_new_records(wher="x")\ndef f(records): pass', 'unknown option "wher" of .* Did you mean "where"'),
    ('@orders.on_new_records(where="totl > 3")\ndef f(records): pass', r'"totl > 3" does not fit .*"totl".*\. It is'),
    ('Table("leters")', r'table "leters" \(main.py:12\) does not exist, and "letters" does'),
    ('Table("orders")', r'table "orders" is declared twice: main.py:11 and main.py:12'),
    ("@ordres.on_new_records\ndef f(records): pass", "line 12.*\n.*\nNameError: name 'ordres' is not defined"),
    ("def f(:", r"line 12\n.*def f\(:\n.*\nSyntaxError"),
    ("import nothing_like_it", "line 12.*\n.*\nModuleNotFoundError: No module named 'nothing_like_it'"),
])
def test_a_wrong_program_is_told_at_migrate_with_its_line(anton: Anton, migrated: str, code: str, says: str) -> None:
    status, told = anton("migrate", code=code, url=migrated)
    assert status == 2
    assert re.search(says, told), told
    assert told.startswith("anton: ") and not OURS.search(told), told


@pytest.mark.parametrize(("words", "status", "says"), [
    (["handlers", "pause", "nosuch"], 2, 'no handler "nosuch". Known: none; run: anton migrate'),
    (["why", "nosuch/1"], 2, 'no table "nosuch" in database'),
    (["schedules", "run", "nosuch"], 2, 'no schedule "nosuch". Known: none'),
    (["dead", "show", "7"], 1, "no dead letter 7; anton dead list"),
    (["work", "--lease", "fast"], 2, "--lease='fast' of anton work is not possible. Allowed: a text such as"),
    (["migrate", "--app", "mian"], 2, 'no module "mian" in .* Did you mean "main"'),
])
def test_a_name_that_is_not_there_is_told_with_those_that_are(anton: Anton, words: list[str], status: int,
                                                              says: str) -> None:
    found, told = anton(*words)
    assert (found, bool(re.search(says, told))) == (status, True), told
    assert "Traceback" not in told


@pytest.mark.parametrize("verb", ["status", "migrate", "work", "serve"])
def test_a_database_that_is_not_there_is_named_with_where_its_address_comes_from(anton: Anton, verb: str) -> None:
    if verb == "serve":
        pytest.importorskip("uvicorn")
    words = [verb] if verb != "serve" else ["serve", "--host", "0.0.0.0"]
    code = "" if verb != "serve" else '@get("/")\ndef root(): return 200'
    status, told = anton(*words, url="postgresql://me:s3cret@127.0.0.1:1/shop", code=code)
    if verb == "serve":                                                # starts without one, and answers 503
        assert "GET / (main.py:12) would take requests from anybody on 0.0.0.0" in told
    else:
        assert 'cannot reach database "shop" on 127.0.0.1:1 (from DATABASE_URL)' in told
    assert status in (1, 2) and "s3cret" not in told and "Traceback" not in told


def test_a_port_in_use_is_named(anton: Anton) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, told = anton("serve", "--port", str(port), code='@get("/")\ndef root(): return 200')
    assert status == 2
    assert f"anton: cannot listen on port {port} of 127.0.0.1: " in told and "or take another: --port" in told
    assert "Traceback" not in told


def test_what_a_route_raises_is_logged_with_its_own_lines_only(db: Database) -> None:
    web = pytest.importorskip("anton.web")

    async def route() -> int:
        return Table("letters").select().count()

    with declaring(App("bad")):
        try:
            asyncio.run(route())
        except SyncInLoop:
            record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 1, "oh", None, sys.exc_info())
    assert web._own_lines(record)
    told = logging.Formatter().format(record)
    assert "test_bad_input.py" in told and "await ….acount()" in told and not OURS.search(told), told


def test_a_folder_without_a_program_is_told(anton: Anton, database: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'components'}", "DATABASE_URL": database}
    done = subprocess.run([sys.executable, "-c", ANTON, "migrate"], cwd=empty, env=env, capture_output=True, text=True,
                          check=True)
    assert f"is as declared (nothing: there is no {empty / 'main.py'})" in done.stdout
