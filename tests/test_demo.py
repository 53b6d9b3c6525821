"""The demo, run as users run it, on a copy of the examples that someone edited: the output follows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once("what the demo prints: the server is asked for the same")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def edited() -> Iterator[Path]:
    """A folder with examples/ as someone changed it: other names, other words, another channel."""
    folder = Path(tempfile.mkdtemp(prefix="anton-demo-"))
    folder.chmod(0o755)                                                # the server's account must reach into it
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns(".anton", "__pycache__"))
    changes = {
        "slack_ai_bot/main.py": [
            ("handle_new_slack_mentions", "ponder"), ("slack_mentions", "remarks"), ("completions", "answers"),
            ('"/slack-mentions"', '"/said"'), ("#general", "#town"), ("rebuild_model", "learn"),
            ("{completion}", "Bot says: {completion}")],
        "slack_ai_bot/autonomous.json": [("slack-ai-bot", "town-crier")],
        "throughput/main.py": [("readings", "samples")],
        "demo.py": [
            ("what's for lunch?", "is it raining?"), ('"#lunch"', '"#weather"'), ("hello from SQL", "psql speaks")]}
    for name, pairs in changes.items():
        path = folder / "examples" / name
        text = path.read_text()
        for old, new in pairs:
            assert old in text, (name, old)
            text = text.replace(old, new)
        path.write_text(text)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_an_edited_demo_prints_what_was_edited_and_sends_nothing(edited):
    keys = {"OPENAI_API_KEY": "sk-live", "SLACK_TOKEN": "xoxb-live", "SLACK_SIGNING_SECRET": "live",
            "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/production", "PGHOST": "production"}
    done = subprocess.run([sys.executable, "-m", "examples.demo", "--mentions", "60", "--records", "5000"],
                          cwd=edited, env={**os.environ, **keys}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
            r"^Anton \S+ · town-crier · Postgres \d+ \(embedded",
            r"Live endpoints +http://localhost:\d+ +/said POST · /slack-reactions POST$",
            r"Live schedules +learn +Daily, next \d{4}-\d\d-\d\d 00:00 UTC$",
            r"Storages online +local-pg +ready in [\d.]+ s$",
            r'^1\. .* POST /said  "@anton is it raining\?"$',
            r"sense +remarks/1 +committed, then 200 +[\d.]+ ms$",
            r"think +prompts/1 +ponder +\+[\d.]+ ms$",
            r"think +answers/1 +OpenAiCompletion \(echo.*\) +\+[\d.]+ ms +\$0\.0000$",
            r'act +slack → #weather +"Bot says: Friendly echo: is it raining\?" +\+[\d.]+ ms +captured +[\d.]+ ms in',
            r'\$ anton psql -c "insert into prompts \(data\) values \(.*psql speaks',
            r'act +slack → #town +"Bot says: Friendly echo: psql speaks" +\+[\d.]+ ms +captured$',
            r"^3\. .*: 60 more mentions", r"60 in, 60 replies\. Lost 0, doubled 0\.",
            r"^4\. .*: 5,000 records through a Python handler, exactly once: [\d.]+ s = [\d,]+/s on this machine$",
            r'ask +approval/\d+ +"Reply in #weather: Bot says: Friendly echo: may I have a refund\?" +waits',
            r"act +POST /inbox/\d+ +approved by you, via inbox +\+[\d.]+ ms +captured$",
            r"^The inbox, .*: http://localhost:\d+/inbox ", r"anton why remarks/1\)"):
        assert re.search(line, done.stdout, re.MULTILINE), f"{line}\n{done.stdout}"


def test_a_dead_letter_is_said_with_what_to_do(edited):
    main = edited / "examples" / "slack_ai_bot" / "main.py"
    main.write_text(main.read_text().replace('"Bot says: {completion}"', '"{complexion}"'))
    done = subprocess.run([sys.executable, "-m", "examples.demo", "--mentions", "10", "--records", "10"],
                          cwd=edited, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"dead +answers/1 +SlackPostMessage: .*complexion.*completion.* +fix, then: anton dead replay",
                     done.stderr), done.stderr
