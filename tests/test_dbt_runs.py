"""Runs of dbt that are typed, run beside each other, or lose their database; and what dbt compiles of the demo."""

from __future__ import annotations

import asyncio
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import BaseModel
from servers import Server, restart, running
from servers import migrate as migrate_runtime
from shop import Shop
from test_dbt_lineage import DEMO, EXPECTED
from test_dbt_project import WAITING, Live, live, seen, shared  # noqa: F401  (fixtures)

from anton.cli import main
from anton.db import Portal, set_database
from anton.dbt.project import DbtProject
from anton.dbt.requests import alone
from anton.dbt.runner import Runner
from anton.migrate import migrate
from anton.rebuilt import Rebuilt
from anton.table import Table

pytestmark = pytest.mark.once("dbt's processes: what its SQL does is tested by test_dbt_tables.py", "system")


class DemoOrder(BaseModel):
    id: int
    customer: str
    country: str
    total: Decimal
    status: str
    placed_at: datetime


def test_a_run_that_was_typed_is_listed_and_can_be_cancelled(live: Live,  # noqa: F811
                                                             monkeypatch: pytest.MonkeyPatch,
                                                             capfd: pytest.CaptureFixture[str]) -> None:
    (live.folder / "models" / "slow.sql").write_text("select 1 as id from pg_sleep(300)")
    monkeypatch.chdir(live.shop.folder)
    url = ["--database", live.shop.url]
    sleeping = "select count(*) from pg_stat_activity where query like '%pg_sleep(300)%' and state = 'active' " \
               "and application_name like 'anton-dbt-%-build-%'"
    typed = subprocess.Popen([sys.executable, "-c", "from anton.cli import main; raise SystemExit(main())", *url, "dbt",
                              "run", "--select", "slow"], cwd=live.shop.folder, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    try:
        async def begun() -> None:
            async with live.shop.db.conn() as look:
                await seen(look, sleeping)

        live.loop.run(begun())
        assert main([*url, "dbt", "runs", "--limit", "1"]) == 0 and "running" in capfd.readouterr().out
        assert main([*url, "dbt", "cancel"]) == 0
        assert "is cancelled" in capfd.readouterr().out
        _, said = typed.communicate(timeout=60)
    finally:
        typed.kill()
        typed.wait()
    set_database(live.shop.db)
    assert typed.returncode == 1 and "was cancelled" in said
    assert live.last_run()[0] == "cancelled" and live.shop.sql(sleeping) == [(0,)]
    assert main([*url, "dbt", "run", "--select", "total"]) == 0        # the lock is free again
    set_database(live.shop.db)
    assert live.last_run() == ("done", {"total": "success"})


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy that lets nothing through, and the first lines of what came to it."""
    asked: list[str] = []

    class Refuse(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline().decode().strip())
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()


def test_dbt_sends_nothing_home(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What a process of dbt sends to anybody but the database goes to a proxy, which hears nothing of Anton's."""
    for name in ("NO_PROXY", "no_proxy", "DO_NOT_TRACK", "DBT_SEND_ANONYMOUS_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    with proxy() as (url, asked):
        home = {"HOME": str(tmp_path), **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), url)}
        runner = Runner(live.shop.db, live.folder, tmp_path, name="shop", target="dev", schema="public", threads=1,
                        env=home)

        async def run() -> None:
            async with runner:
                done = await runner.invoke(["build", "--select", "revenue"])
                assert done.success, done
                assert runner._scratch is not None
                cookies = [runner._scratch / ".user.yml", tmp_path / ".dbt" / ".user.yml"]
                assert not asked and not any(cookie.exists() for cookie in cookies)
                # as it is without Anton: this would be seen
                args = ["parse", "--project-dir", live.folder, "--profiles-dir", runner._scratch, "--profile", "anton",
                        "--target-path", tmp_path / "target", "--log-path", tmp_path / "logs"]
                plain = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "dbt.cli.main", *map(str, args), env={**os.environ, **home},
                    stdout=asyncio.subprocess.DEVNULL)
                assert await plain.wait() == 0 and any(cookie.exists() for cookie in cookies)

        live.loop.run(run())
        assert asked and all(line.startswith(("CONNECT ", "POST ", "GET ")) for line in asked)


def test_two_real_runs_at_once_go_one_after_the_other(live: Live) -> None:  # noqa: F811
    """What is typed waits for the worker's; both build, and each change is told once."""
    live.shop.sql("insert into orders values (7, 'cleo', 70)")
    live.revenue.run()
    words = [sys.executable, "-c", "from anton.cli import main; raise SystemExit(main())", "--database", live.shop.url,
             "dbt", "run", "--select", "revenue"]
    both = [subprocess.Popen(words, cwd=live.shop.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}) for _ in range(2)]
    told = live.work()
    said = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    told += live.work()
    assert [one for one in told if not isinstance(one, Rebuilt)] == [("new", "cleo")]
    over = "select count(*) from anton.dbt_run a join anton.dbt_run b on a.id < b.id and a.finished_at > b.started_at"
    assert live.shop.sql(over) == [(0,)]
    assert live.shop.sql("select count(*) from anton.dbt_run where state not in ('done', 'failed', 'cancelled', 'died')"
                         ) == [(0,)]


def test_a_run_is_over_before_the_next_may_begin_although_its_ack_comes_later(live: Live) -> None:  # noqa: F811
    """Its ack is held up: it is done by then, and not taken for dead by who has the lock next."""
    running = "select count(*) from anton.dbt_request where state = 'running'"
    last = "select state from anton.dbt_run order by id desc limit 1"

    async def next_one() -> str:
        conn, look = await live.shop.db.connect(), await live.shop.db.connect()
        try:
            await seen(look, running)
            async with conn.transaction():
                await conn.execute("select from anton.dbt_request where state = 'running' for update")
                await seen(look, f"select ({last}) <> 'running'")
                runner = live.project.work._runner
                assert runner is not None
                async with alone(live.shop.db, runner.application):
                    return str(await look.fetchval(last))
        finally:
            await conn.close()
            await look.close()

    live.revenue.run()
    beside = asyncio.run_coroutine_threadsafe(next_one(), live.loop.loop)
    live.work()
    assert beside.result(60) == "done"
    assert live.shop.sql(running) == [(0,)]


def test_a_run_in_which_the_database_restarts_is_done_by_the_next_try(server: Server, tmp_path: Path) -> None:
    with running(server.kind) as own:
        own.sql("create database shop")
        migrate_runtime(own.url("shop"))
        live = Live(own.url("shop"), tmp_path)
        try:
            live.shop.sql("insert into orders values (1, 'ann', 50)")
            live.work()
            (live.folder / "models" / "held.sql").write_text(
                "select count(*) as n, pg_advisory_xact_lock(4711)::text as held from {{ ref('revenue') }}")
            live.project.run("revenue", "held")
            conn = live.loop.run(live.shop.db.connect())
            live.loop.run(conn.execute("select pg_advisory_lock(4711)"))

            async def crash() -> None:
                async with live.shop.db.conn() as look:
                    await seen(look, WAITING)
                await asyncio.to_thread(restart, own, "immediate")
                conn.terminate()

            crashing = asyncio.run_coroutine_threadsafe(crash(), live.loop.loop)
            with suppress(Exception):                                  # its connections broke
                live.work()
            crashing.result(60)
            live.shop.sql("update anton.delayed set run_at = now()", "update anton.lease set lease_until = '-infinity'",
                          "update anton.handler set probe_at = now() where failing_since is not null")
            set_database(live.shop.db)
            live.work()
            live.work()
            left = live.shop.sql("select 'job', null, null from anton.job union all select 'lease', lease_until::text, "
                                 "crashes::text from anton.lease union all select 'delayed', run_at::text, "
                                 "attempt::text from anton.delayed union all select 'dead', null, null from anton.dead")
            assert (left, live.last_run()[0]) == ([], "done")
            assert live.shop.sql("select n from held") == [(1,)]
            assert live.shop.sql("select count(*) from anton.dbt_request where state <> 'done'") == [(0,)]
            assert live.shop.sql("select count(*) from pg_class where relname ~ '__dbt_' and relkind = 'r'") == [(0,)]
        finally:
            live.close()
            set_database(None)


def test_each_column_of_the_demo_is_followed_through_what_dbt_compiles(database: str, tmp_path: Path) -> None:
    """The real dbt compiles it; expectations were written by hand."""
    folder = tmp_path / "demo"
    folder.mkdir()
    shutil.copytree(DEMO, folder / "dbt_project", ignore=shutil.ignore_patterns("target", "logs", "dbt_packages"))
    shop = Shop(database, folder)
    loop = Portal()
    projects: list[DbtProject] = []

    def declare() -> None:
        Table("orders", DemoOrder)
        projects.append(DbtProject("dbt_project"))

    shop.declare(declare)
    try:
        loop.run(migrate(shop.db, shop.app))
        found = projects[0].graph().columns
    finally:
        loop.run(shop.db.close())
        loop.stop()
        set_database(None)
    models = {(f"public.{table}", column): sources for (table, column), sources in EXPECTED.items()}
    assert {name: sources for name, sources in found.items() if name in models} == models
    manifest = projects[0].manifest
    assert manifest is not None
    named = {node.name for node in manifest.nodes.values() if node.type == "model"}
    assert named == {table for table, _ in EXPECTED}                   # every model of it
