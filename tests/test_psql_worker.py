"""A worker that is psql and nothing else: examples/worker.sql, steered from psql too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from pg import Pg
from servers import Server

WORKER = Path(__file__).resolve().parent.parent / "examples" / "worker.sql"


class Shop:
    """Orders, which a worker in psql answers with letters."""

    def __init__(self, pg: Pg, server: Server) -> None:
        self.pg = pg
        self.words = [str(server.bin / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", pg.url]
        pg.sql(
            "create table orders (id bigint generated always as identity primary key, customer text, total int)",
            "create table letters (id bigint generated always as identity primary key, data jsonb)",
        )
        self.run(
            """select anton.put_handler('{"app": "other", "name": "greet", "table": "orders", "ops": ["new"]}')""",
            "select anton.sync_triggers(table_id) from anton.handler where name = 'greet'",
        )

    def run(self, *commands: str) -> str:
        """Runs commands with psql, and returns what it says."""
        words = [*self.words, "-A", "-t", *(word for command in commands for word in ("-c", command))]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.words, "-f", str(WORKER)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def work(self, workers: int = 1) -> None:
        """So many workers at once, until they have nothing to do."""
        started = [self.start() for _ in range(workers)]
        for worker in started:
            said = worker.communicate(timeout=60)[1]
            assert worker.returncode == 0, said

    def answered(self) -> list[int]:
        return [row[0] for row in self.pg.sql("select (data -> 'order')::int from letters order by 1")]

    def open(self) -> dict[str, int]:
        counts = {
            name: int(self.pg.value(f"select count(*) from anton.{name}"))
            for name in ("job", "lease", "delayed", "dead")
        }
        return {name: n for name, n in counts.items() if n}


@pytest.fixture
def shop(pg: Pg, server: Server) -> Shop:
    return Shop(pg, server)


def test_two_workers_answer_each_record_once(shop: Shop) -> None:
    for n in range(1, 31):
        shop.run(f"insert into orders (customer, total) select 'Ada', g from generate_series(1, {n}) g")
    shop.work(workers=2)
    assert shop.answered() == list(range(1, 466)) and shop.open() == {}
    assert shop.pg.value("select count(*) from anton.worker where stopped_at is null") == 0
    [made] = shop.pg.sql("select from_key, owner from anton.made_by(anton.watch('letters'), '[1]')")
    assert made[1] == 0


def test_records_that_fail_wait_or_die_and_the_others_are_done(shop: Shop) -> None:
    shop.run("insert into orders (customer, total) values ('Ada', 1), ('Ben', null), ('Cy', -1), ('Dee', 4)")
    shop.work()
    assert shop.answered() == [1, 4] and shop.open() == {"delayed": 1, "dead": 1}
    shop.pg.sql("update orders set total = 2 where id in (2, 3)")
    shop.work()
    assert shop.answered() == [1, 4]
    shop.pg.clock("61 s")
    shop.work()
    assert shop.answered() == [1, 2, 4] and shop.open() == {"dead": 1}
    assert shop.run("select error from anton.dead", "select anton.replay('greet')") == "total is wrong\n1"
    shop.work()
    assert shop.answered() == [1, 2, 3, 4] and shop.open() == {}


def test_a_record_that_never_gets_better_is_a_dead_letter_after_three_runs(shop: Shop) -> None:
    shop.run("insert into orders (customer) values ('Ada')")
    for minute in range(3):
        assert shop.open() == ({"job": 1} if minute == 0 else {"delayed": 1})
        shop.pg.clock(f"{61 * minute} s")
        shop.work()
    assert shop.open() == {"dead": 1} and shop.pg.value("select attempt from anton.dead") == 3


def test_a_paused_handler_waits_and_a_cancelled_job_is_gone(shop: Shop) -> None:
    shop.run("select anton.pause('greet')", "insert into orders (customer, total) values ('Ada', 1)")
    shop.run("insert into orders (customer, total) values ('Ben', 2)")
    shop.work()
    assert shop.answered() == [] and shop.open() == {"job": 2}
    assert shop.run("select anton.cancel(min(id)) from anton.job", "select anton.resume('greet')") == "t"
    shop.work()
    assert shop.answered() == [2] and shop.open() == {}


def test_what_a_killed_worker_held_is_answered_once_by_another(shop: Shop) -> None:
    shop.run("insert into orders (customer, total) values ('Ada', 1), ('Ben', 2)")
    with shop.pg.other() as clerk:
        clerk.sql("begin", "lock table letters in share row exclusive mode")
        worker = shop.start()
        waiting = "select pid from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'insert into letters'"
        while not (pids := shop.pg.sql(waiting)):
            assert worker.poll() is None
        worker.kill()
        worker.communicate()
        clerk.sql("commit")
    while shop.pg.sql(f"select from pg_stat_activity where pid = {pids[0][0]}"):
        pass  # the server ends its session and what it began
    shop.work()
    assert shop.answered() == [] and shop.open() == {"lease": 1}
    shop.pg.clock("31 s")
    shop.work()
    assert shop.answered() == [1, 2] and shop.open() == {}
