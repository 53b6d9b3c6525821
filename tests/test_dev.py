"""`anton dev`: one command that migrates, serves, works, tells, and starts again when a file changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from anton import template

pytestmark = pytest.mark.once("the app's own process: the server is asked for the same")

REPO = Path(__file__).parent.parent


class Dev:
    """A running `anton dev`. until(text) reads its lines up to the one with the text."""

    def __init__(self, folder: Path, url: str) -> None:
        env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'components'}", "PYTHONUNBUFFERED": "1"}
        code = "import sys; from anton.cli import main; sys.exit(main())"
        words = [sys.executable, "-W", "error", "-c", code, "dev", "--port", "0", "--database", url]
        self.process = subprocess.Popen(words, cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        self.lines: list[str] = []

    def until(self, text: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        pytest.fail(f"{text!r} never came:\n" + "".join(self.lines))

    def order(self, line: str, customer: str) -> None:
        url = line.split()[2]
        body = f'{{"customer": "{customer}", "total": 1}}'.encode()
        request = urllib.request.Request(f"{url}/orders", body, {"content-type": "application/json"})
        urllib.request.urlopen(request).close()


@pytest.fixture
def dev(tmp_path: Path, bare: str) -> Iterator[Dev]:
    running = Dev(template.make(tmp_path / "my-bot"), bare)
    yield running
    with_group = os.getpgid(running.process.pid) if running.process.poll() is None else 0
    if with_group:
        os.killpg(with_group, signal.SIGKILL)
    running.process.communicate()


def test_dev_handles_what_comes_and_starts_again_when_a_file_changes(dev: Dev, tmp_path: Path, bare: str) -> None:
    assert "capturing: nothing leaves this machine" in dev.until("my-bot")
    live = dev.until("Live endpoints")
    assert "/orders POST" in live
    dev.order(live, "Ann")
    assert "orders/1  thank -> letters/1" in dev.until("thank")
    with psycopg.connect(bare) as conn:
        conn.execute("insert into orders (customer, total) values ('Bob', 2)")
    assert "orders/2  thank -> letters/2" in dev.until("thank")
    main = tmp_path / "my-bot" / "main.py"
    main.write_text(main.read_text().replace("Thank you", "Thanks"))
    dev.until("changed: main.py")
    dev.order(dev.until("Live endpoints"), "Cem")
    dev.until("orders/3  thank -> letters/")
    with psycopg.connect(bare) as conn:
        assert conn.execute("select text from letters order by id").fetchall() == [
            ("Thank you, Ann!",), ("Thank you, Bob!",), ("Thanks, Cem!",)]
    os.killpg(os.getpgid(dev.process.pid), signal.SIGINT)
    assert dev.process.wait() == 0


def test_dev_says_where_the_code_is_wrong_and_waits_for_the_fix(dev: Dev, tmp_path: Path) -> None:
    dev.until("Live endpoints")
    main = tmp_path / "my-bot" / "main.py"
    whole = main.read_text()
    main.write_text(whole + "\nnonsense\n")
    assert "NameError: name 'nonsense' is not defined" in dev.until("nonsense' is")
    assert not any("importlib" in line for line in dev.lines)
    main.write_text(whole)
    dev.until("Live endpoints")
