"""Every verb of the command line, against a database."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from anton import cli, template
from anton.app import app as implicit
from anton.app import load_app
from anton.db import Database, current_database, set_database
from anton.worker import Worker

REPO = Path(__file__).parent.parent


class Shell:
    """anton(…) runs a command in the app's folder. code, out, err: of the last one."""

    def __init__(self, folder: Path, url: str, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.url, self._capfd = folder, url, capfd

    def __call__(self, *words: str) -> int:
        self._capfd.readouterr()
        try:
            self.code = cli.main([*words, "--database", self.url])
        except SystemExit as ended:
            self.code = int(ended.code or 0)
        if current_database_is_set():
            current_database().run(current_database().close())
        set_database(None)
        self.out, self.err = self._capfd.readouterr()
        return self.code

    def json(self, *words: str) -> Any:
        self(*words, "--json")
        return json.loads(self.out)

    def sql(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            done = conn.execute(sql)
            return done.fetchall() if done.description else []

    def work(self) -> None:
        """Works all that is due, as `anton work` would."""

        async def run() -> None:
            db = Database(self.url)
            set_database(db)
            await Worker(db, load_app(None, self.folder), capture=True).run_until_idle()
            await db.close()

        asyncio.run(run())
        set_database(None)


def current_database_is_set() -> bool:
    from anton import db
    return db._current is not None


@pytest.fixture
def anton(tmp_path: Path, bare: str, monkeypatch: pytest.MonkeyPatch,
          capfd: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    """The app that `anton new` makes, on an empty database."""
    folder = template.make(tmp_path / "my-bot")
    monkeypatch.chdir(folder)
    yield Shell(folder, bare, capfd)
    implicit.clear()
    set_database(None)


@pytest.fixture
def migrated(anton: Shell) -> Shell:
    assert anton("migrate") == 0, anton.err
    return anton


def test_before_it_is_migrated_a_database_is_told_what_it_lacks(anton: Shell) -> None:
    assert anton("approvals", "list") == 2
    assert 'schema "anton" does not exist' in anton.err and "anton migrate" in anton.err


BROKEN = """
from anton import Discard, Records, Table, cron
from pydantic import BaseModel

class Order(BaseModel):
    id: int | None = None
    n: int

orders = Table("orders", Order)

@orders.on_new_records(attempts=1)
def divide(records: Records[Order]) -> None:
    for order in records:
        print(1 / order.n)

@cron.daily(at="03:00", tz="Europe/Berlin")
def rebuild() -> None:
    print("rebuilt")
"""


@pytest.fixture
def broken(anton: Shell) -> Shell:
    """An app whose handler fails for n = 0."""
    (anton.folder / "main.py").write_text(BROKEN)
    (anton.folder / "sql" / "flag_big.sql").unlink()
    assert anton("migrate") == 0, anton.err
    return anton


def test_new_makes_an_app_whose_test_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capfd: pytest.CaptureFixture[str], bare: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "my-bot"]) == 0
    assert "cd my-bot" in capfd.readouterr().out
    folder = tmp_path / "my-bot"
    assert {path.name for path in folder.iterdir()} == {
        "main.py", "autonomous.json", "migrations", "sql", "tests", ".gitignore"}
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'components'}", "ANTON_TEST_DATABASE": bare}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "anton.testing", "-W", "error", "--rootdir", str(folder)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_new_never_writes_over_what_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bot").mkdir()
    (tmp_path / "bot" / "precious").touch()
    assert cli.main(["new", str(tmp_path / "bot")]) == 2
    assert "is there already and is not empty" in capfd.readouterr().err
    assert cli.main(["new", str(tmp_path / "My Bot")]) == 2
    assert '"My Bot" is no name for an app' in capfd.readouterr().err


def test_migrate_makes_what_its_plan_says_and_then_finds_no_drift(anton: Shell) -> None:
    assert anton("migrate", "--check") == 1
    assert anton.sql("select to_regclass('orders')") == [(None,)]
    assert anton("migrate", "--plan") == 0
    assert "create table" in anton.out
    assert anton.sql("select to_regclass('orders')") == [(None,)]
    assert anton("migrate") == 0, anton.err
    assert anton.sql("select to_regclass('orders')::text") == [("orders",)]
    assert anton("migrate", "--check") == 0
    assert "is as declared" in anton.out


def test_makemigration_writes_what_migrate_refuses(migrated: Shell) -> None:
    main = migrated.folder / "main.py"
    main.write_text(main.read_text().replace("    text: str\n", "    text: int\n"))
    assert migrated("migrate") == 1
    assert "makemigration" in migrated.err
    assert migrated("makemigration", "letters_as_numbers") == 0
    assert "text" in (migrated.folder / "migrations" / "0002_letters_as_numbers.sql").read_text()


def test_psql_runs_sql_and_says_how_it_went(migrated: Shell) -> None:
    insert = "insert into orders (customer, total) values ('Ann', 5)"
    assert migrated("psql", "-c", insert, "-c", "table letters") == 0
    assert "INSERT 0 1" in migrated.out
    assert migrated.sql("select customer from orders") == [("Ann",)]
    assert migrated("psql", "-c", "nonsense") == 1
    assert "syntax error" in migrated.err


def test_status_counts_what_waits_and_exits_1_beyond_max_lag(migrated: Shell) -> None:
    migrated.sql("insert into orders (customer, total) values ('Ann', 5), ('Bob', 7)")
    rows = {row["handler"]: row for row in migrated.json("status")}
    assert rows["thank"]["ready"] == 2
    assert rows["thank"]["table"] == "orders"
    assert migrated.code == 0
    migrated.sql("update anton.handler set max_lag = '0' where name = 'thank'")
    assert migrated("status") == 1
    assert re.search(r"my-bot +thank +orders +\w+ +2", migrated.out)


def test_doctor_finds_and_mends_a_disabled_trigger(migrated: Shell) -> None:
    assert migrated("doctor") == 0
    assert migrated.out == "nothing is wrong\n" and migrated.json("doctor") == {"done": [], "found": [], "notes": []}
    migrated.sql("alter table orders disable trigger all")
    assert migrated("doctor") == 1
    assert "anton doctor --fix" in migrated.out
    assert migrated("doctor", "--fix") == 0
    migrated.sql("insert into orders (customer, total) values ('Ann', 5)")
    assert migrated.sql("select count(*) from anton.job") == [(1,)]


def test_why_prints_the_chain(migrated: Shell) -> None:
    migrated.sql("insert into orders (customer, total) values ('Ann', 5)")
    migrated.work()
    assert migrated("why", "letters/1") == 0
    lines = migrated.out.splitlines()
    assert lines[0].startswith("  orders/1  written outside of handlers")
    assert lines[1].startswith(">   letters/1  written by thank")
    assert migrated("why", "orders") == 2
    assert "names no record" in migrated.err


def test_handlers_are_paused_resumed_shown_and_listed(migrated: Shell) -> None:
    assert migrated("handlers", "pause", "thank") == 0
    assert migrated.sql("select paused from anton.handler where name = 'thank'") == [(True,)]
    assert {row["handler"]: row["state"] for row in migrated.json("handlers", "list")}["thank"] == "paused"
    assert migrated("handlers", "resume", "thank") == 0
    assert migrated.sql("select paused from anton.handler where name = 'thank'") == [(False,)]
    assert migrated.json("handlers", "show", "thank")["table"] == "orders"
    assert migrated("handlers", "pause", "thnk") == 2
    assert 'no handler "thnk"' in migrated.err


def test_handlers_backfill_feeds_the_rows_that_exist(anton: Shell) -> None:
    main = anton.folder / "main.py"
    whole = main.read_text()
    main.write_text(whole.replace("@orders.on_new_records", ""))
    assert anton("migrate") == 0, anton.err
    anton.sql("insert into orders (customer, total) select 'c' || i, 1 from generate_series(1, 5) i")
    main.write_text(whole)
    assert anton("migrate") == 0
    assert "anton handlers backfill thank" in anton.out
    anton.work()
    assert anton.sql("select count(*) from letters") == [(0,)]
    assert anton("handlers", "backfill", "thank") == 0
    anton.work()
    assert anton.sql("select count(*) from letters") == [(5,)]


def test_models_are_listed_shown_and_run(broken: Shell) -> None:
    broken.sql("create table sales (id int primary key, n int)")
    (broken.folder / "sql").mkdir(exist_ok=True)
    (broken.folder / "sql/best.sql").write_text("-- anton: model\n-- refresh: sales\n-- key: n\n"
                                                "-- incremental: sales.n\nselect n, count(*) from sales group by n")
    assert broken("migrate") == 0
    broken.sql("insert into sales values (1, 5), (2, 5)")
    assert [(row["name"], row["state"], row["pending"]) for row in broken.json("models", "list")] == [
        ("best", "pending", 2)]
    assert broken("models", "run", "best") == 0
    assert broken.out == "best: what changed, 1 new, 0 updated, 0 deleted\n"
    assert broken.sql("table best") == [(5, 2)] and broken.json("models", "show", "best")["state"] == "fresh"
    broken.sql("update best set count = 9")
    assert broken("models", "run", "best", "--full") == 0
    assert broken.out == "best: all rows, 0 new, 1 updated, 0 deleted\n" and broken.sql("table best") == [(5, 2)]
    assert broken("models", "show", "bst") == 2
    assert 'no model "bst". Known: ' in broken.err
    broken.sql("insert into sales values (3, null)")
    assert broken("models", "run", "best") == 1
    assert 'null value in column "n"' in broken.err and broken.sql("table best") == [(5, 2)]


def test_schedules_are_paused_resumed_run_shown_and_foretold(broken: Shell) -> None:
    broken.work()
    assert [row["name"] for row in broken.json("schedules", "list")] == ["rebuild"]
    assert broken("schedules", "pause", "rebuild") == 0
    assert broken.sql("select paused from anton.schedule") == [(True,)]
    assert broken("schedules", "resume", "rebuild") == 0
    assert broken.sql("select paused from anton.schedule") == [(False,)]
    assert broken("schedules", "run", "rebuild") == 0
    assert broken.sql("select count(*) from anton.tick") == [(1,)]
    assert len(broken.json("schedules", "show", "rebuild")["ticks"]) == 1
    assert broken("schedules", "show", "rebuild") == 0
    assert "{" not in broken.out and "planned at" in broken.out and max(map(len, broken.out.splitlines())) < 120
    due = broken.json("schedules", "next", "rebuild", "3")
    assert len({row["due"] for row in due}) == 3
    assert broken("schedules", "pause", "rebild") == 2


def test_jobs_are_listed_shown_and_cancelled(migrated: Shell) -> None:
    migrated.sql("insert into orders (customer, total) values ('Ann', 5), ('Bob', 7)")
    [job] = migrated.json("jobs", "list", "--handler", "thank")
    assert (job["records"], job["state"], job["op"]) == (2, "ready", "new")
    assert migrated.json("jobs", "show", str(job["id"]))["keys"] == [[1], [2]]
    assert migrated("jobs", "cancel", str(job["id"])) == 0
    assert migrated.sql("select count(*) from anton.job") == [(0,)]
    assert migrated("jobs", "cancel", str(job["id"])) == 1
    assert migrated("jobs", "show", str(job["id"])) == 1
    assert "no job" in migrated.out


def test_dead_letters_are_listed_shown_replayed_and_dropped(broken: Shell) -> None:
    broken.sql("insert into orders (n) values (1), (0), (0), (0)")
    broken.work()
    dead = broken.json("dead", "list", "--handler", "divide")
    assert [row["record"] for row in dead] == ["orders/4", "orders/3", "orders/2"]
    shown = broken.json("dead", "show", str(dead[0]["id"]))
    assert "ZeroDivisionError" in shown["error"]
    assert "divide" in shown["traceback"]
    broken.sql("update orders set n = 5 where id = 4")
    assert broken("dead", "replay", str(dead[0]["id"])) == 0
    broken.work()
    assert broken.sql("select count(*) from anton.dead") == [(2,)]
    assert broken("dead", "replay", "divide", "--error", "no such text") == 1
    assert broken("dead", "replay", "divide", "--error", "division") == 0
    assert broken.sql("select count(*) from anton.dead") == [(0,)]
    broken.work()
    assert broken.sql("select count(*) from anton.dead") == [(2,)]
    assert broken("dead", "drop", "divide") == 0
    assert broken.sql("select count(*) from anton.dead") == [(0,)]
    assert broken("dead", "show", "1") == 1


def test_actions_are_listed_and_shown(migrated: Shell) -> None:
    migrated.sql("insert into anton.action (app, name, args, state) "
                 "values ('my-bot', 'Post', '{\"to\": \"ann\"}', 'captured')")
    [row] = migrated.json("actions", "list", "--name", "Post")
    assert (row["state"], row["args"]) == ("captured", {"to": "ann"})
    assert migrated.json("actions", "show", str(row["id"]))["name"] == "Post"
    assert migrated("actions", "show", "999") == 1


def call_in(shell: Shell, state: str) -> int:
    """A call of an action in this state; its number."""
    [(id,)] = shell.sql("insert into anton.action (app, name, args) values ('my-bot', 'Post', '{\"to\": \"ann\"}') "
                        "returning id")
    shell.sql("select anton.put_action(jsonb_build_object('app', 'my-bot', 'name', 'Post', 'effect', 'unsafe', "
              "'gate', 'open', 'policy', false, 'probe', false))")
    shell.sql(f"select anton.begin_action({id}, 5)")
    shell.sql(f"select anton.end_action({id}, 5, '{state}')")
    return int(id)


def test_a_call_that_is_unknown_is_listed_and_a_person_says_what_became_of_it(migrated: Shell) -> None:
    first, second, third = (call_in(migrated, "unknown") for _ in range(3))
    assert {row["id"] for row in migrated.json("actions", "list", "--state", "unknown")} == {first, second, third}
    assert "3 calls are unknown" in str(migrated.sql("select problem from anton.findings()"))
    assert migrated("actions", "resolve", str(first), "--sent", "--by", "ann") == 0
    assert migrated("actions", "resolve", str(second), "--failed") == 0
    assert migrated("actions", "retry", str(third)) == 0
    assert migrated.sql("select state, resolved_by from anton.action order by id") == [
        ("sent", "ann"), ("failed", None), ("ready", None)]
    assert migrated("actions", "resolve", str(first), "--failed") == 1
    assert migrated("actions", "retry", str(first)) == 1


def test_actions_are_stopped_and_started(migrated: Shell) -> None:
    assert migrated("actions", "stop") == 0
    assert migrated.sql("select value from anton.setting where name = 'actions'") == [("stopped",)]
    assert "actions are stopped: no call leaves" in str(migrated.sql("select problem from anton.findings()"))
    assert migrated("actions", "start") == 0
    assert migrated.sql("select value from anton.setting where name = 'actions'") == []


def asked(shell: Shell) -> int:
    """An approval that waits for ann or bob; its number."""
    [(id,)] = shell.sql("insert into anton.action (app, name, args) values ('my-bot', 'Post', '{\"to\": \"ann\"}') "
                        "returning id")
    shell.sql("select anton.put_person('ann'), anton.put_person('bob'), anton.put_person('eve')")
    [(approval,)] = shell.sql(f"select anton.ask_approval({id}, '{{\"approvers\": [\"ann\", \"bob\"]}}', 'post it')")
    return int(approval)


def test_approvals_are_listed_shown_and_decided(migrated: Shell) -> None:
    first, second = asked(migrated), asked(migrated)
    assert [row["id"] for row in migrated.json("approvals", "list")] == [second, first]
    assert migrated.json("approvals", "show", str(first))["people"] == ["ann", "bob"]
    migrated.sql(f"update anton.approval set error = 'no room' where id = {first}")
    assert migrated("approvals", "show", str(first)) == 0 and re.search(r"error +no room", migrated.out)
    assert migrated("approvals", "approve", str(first), "--by", "eve") == 1
    assert migrated("approvals", "approve", str(first), "--by", "ann", "--set", "to=bob") == 1
    assert "does not declare the action Post of the app my-bot" in migrated.err
    (migrated.folder / "main.py").write_text("from anton import action\n\n@action\ndef Post(to: str) -> None: ...\n")
    assert migrated("approvals", "approve", str(first), "--by", "ann", "--set", "cc=bob") == 1 and "cc" in migrated.err
    assert migrated("approvals", "approve", str(first), "--by", "ann", "--set", "to=bob") == 0
    assert migrated("approvals", "reject", str(second), "--by", "bob", "--why", "too late") == 0
    assert migrated.sql("select state, decided_by, why, args ->> 'to' from anton.approval order by id") == [
        ("approved", "ann", None, "bob"), ("rejected", "bob", "too late", "ann")]
    assert migrated.sql("select state from anton.action order by id") == [("ready",), ("rejected",)]
    assert migrated("approvals", "approve", str(second), "--by", "ann") == 1
    assert migrated.json("approvals", "list") == []


def test_people_are_added_listed_signed_in_and_removed(migrated: Shell) -> None:
    assert migrated("people", "add", "ann", "--email", "ann@example.com", "--group", "finance", "--group", "@cfo") == 0
    assert migrated("people", "add", "ann", "--slack", "U1") == 0
    (ann,) = migrated.json("people", "list")
    assert (ann["email"], ann["slack_id"], ann["groups"]) == ("ann@example.com", "U1", ["finance", "cfo"])
    assert migrated("people", "add", "bob", "--email", "ann@example.com") == 2
    assert migrated("people", "add", "@bob") == 2
    for words in (["Ann"], ["ANN@example.com"], ["u1"], ["bob", "--email", "ANN@example.com"],
                  ["bob", "--slack", "Ann"]):
        assert migrated("people", "add", *words) == 2
    assert [row["name"] for row in migrated.json("people", "list")] == ["ann"]
    made = migrated.json("people", "link", "ann", "--url", "https://shop.example.com/")
    token = made["url"].removeprefix("https://shop.example.com/inbox/in/")
    assert migrated.sql("select token_sha256 from anton.link") == [(hashlib.sha256(token.encode()).hexdigest(),)]
    assert migrated("people", "link", "zoe") == 1
    assert migrated("people", "link", "ANN@example.com") == 0
    assert migrated("people", "remove", "Ann") == 0
    assert migrated.sql("select active, (select count(*) from anton.link) from anton.person") == [(False, 0)]
    assert migrated("people", "remove", "ann") == 1


def run(words: list[str], folder: Path, url: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'components'}", "PYTHONUNBUFFERED": "1"}
    code = "import sys; from anton.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code, *words, "--database", url], cwd=folder, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(check: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Asks the database until it is so; the suite's own timeout ends what never comes."""
    while not check():
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            pytest.fail(process.communicate()[0])


def test_serve_takes_and_work_handles(migrated: Shell) -> None:
    serving = run(["serve", "--port", "0"], migrated.folder, migrated.url)
    working = run(["work"], migrated.folder, migrated.url)
    try:
        assert serving.stdout is not None
        url = serving.stdout.readline().split()[0]
        request = urllib.request.Request(f"{url}/orders", b'{"customer": "Ann", "total": 200}',
                                         {"content-type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            assert json.load(reply)["id"] == 1
        wait_for(lambda: migrated.sql("select 1 from letters, big_orders"), working)
    finally:
        for process in (serving, working):
            process.terminate()
    outputs = [process.communicate()[0] for process in (serving, working)]
    assert (serving.returncode, working.returncode) == (0, 0), outputs
    assert migrated.sql("select count(*) from anton.worker where stopped_at is null") == [(0,)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["migrat"], '"migrat" is not known. Did you mean "migrate"?'),
        (["migrate", "--chek"], 'unrecognized arguments: --chek'),
        (["jobs", "lst"], 'Did you mean "list"?'),
        (["jobs", "list", "--limit", "0"], "allowed: 1 or more"),
        ([], "the following arguments are required: VERB"),
    ],
)
def test_what_is_mistyped_exits_2(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert message in capfd.readouterr().err


def test_an_unreachable_database_is_an_error_that_names_it(anton: Shell) -> None:
    assert cli.main(["status", "--database", "postgresql://nobody@127.0.0.1:1/nowhere"]) == 1
    set_database(None)


def test_an_error_is_json_when_json_was_asked_for(anton: Shell) -> None:
    assert anton.json("why", "orders")["kind"] == "ConfigError"
    assert anton.code == 2


def test_dev_leaves_other_machines_alone_unless_told(anton: Shell, monkeypatch: pytest.MonkeyPatch,
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://ann:s3cret@db.example/prod")
    assert cli.main(["dev"]) == 2
    told = capfd.readouterr().err
    assert "unless you say so: --database URL" in told
    assert "s3cret" not in told


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "anton", "--version"], cwd=REPO, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and done.stdout.strip()
