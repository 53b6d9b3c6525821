"""A dbt project as an app has it, with the real dbt: one warm child for the whole file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from servers import Server
from shop import Shop

import anton.chores
from anton.cli import main
from anton.db import Portal, set_database
from anton.dbt.project import DbtProject
from anton.dbt.requests import alone, wishes_of
from anton.errors import AntonError, ConfigError, DeclarationError, WriteError
from anton.migrate import migrate
from anton.rebuilt import Failed, Rebuilt
from anton.table import Table
from anton.worker import Worker
from anton.write import transaction

pytestmark = pytest.mark.once("dbt's processes: what its SQL does is tested by test_dbt_tables.py", "system")

PROJECT = Path(__file__).parent / "data" / "dbt_shop"


class Order(BaseModel):
    id: int
    customer: str
    total: Decimal


class Revenue(BaseModel):
    customer: str
    revenue: Decimal


class Live:
    """The app on a database of its own, its worker's loop, and what its handlers were told since the last look."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder / "dbt_project"
        shutil.copytree(PROJECT, self.folder)
        self.shop = Shop(url, folder)
        self.loop = Portal()
        self.told: list[Any] = []
        self.shop.declare(self.declare)
        set_database(self.shop.db)
        self.plan = self.loop.run(migrate(self.shop.db, self.shop.app))  # in the worker's loop, so that the child stays

    def declare(self) -> None:
        self.orders = Table("orders", Order)
        self.project = DbtProject("dbt_project")
        self.revenue = self.project.model("revenue", Revenue)
        self.total = self.project.model("total")
        self.revenue.on_rebuilt(self.told.append, name="rebuilt")
        self.revenue.on_failed(self.told.append, name="failed")
        self.revenue.on_changes(self.hear, name="changes")
        self.project.run_when(self.orders, debounce=0, max_wait=0)

    def hear(self, records: Any) -> None:
        self.told += [(change.op, change.key) for change in records.changes]

    def work(self) -> list[Any]:
        """Works until nothing is left; what was told meanwhile."""
        self.told.clear()

        async def work() -> None:
            await Worker(self.shop.db, self.shop.app).run_until_idle()

        self.loop.run(work())
        return list(self.told)

    def order(self, id: int, customer: str, total: int) -> list[Any]:
        self.shop.sql(f"insert into orders values ({id}, '{customer}', {total})")
        return self.work()

    def last_run(self) -> tuple[str, dict[str, str]]:
        """Its state, and the status of each node."""
        (id, state), = self.shop.sql("select id, state from anton.dbt_run order by id desc limit 1")
        nodes = self.shop.sql(f"select unique_id, status from anton.dbt_result where run_id = {id}")
        return state, {name.rpartition(".")[2]: status for name, status in nodes}

    @property
    def child(self) -> int:
        runner = self.project.work._runner
        assert runner is not None and runner.pid is not None
        return runner.pid

    def close(self) -> None:
        self.loop.run(self.shop.db.close())
        self.loop.stop()


@pytest.fixture(scope="module")
def shared(server: Server, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    name = server.clone(template)
    live = Live(server.url(name), tmp_path_factory.mktemp("shop"))
    try:
        yield live
    finally:
        live.close()
        set_database(None)
    server.drop(name)


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The app with three orders, all built; what a test put into the project is taken out again."""
    set_database(shared.shop.db)
    before = {file for file in shared.folder.rglob("*") if file.is_file()}
    shared.shop.sql("truncate orders", "insert into orders values (1, 'ann', 50), (2, 'bob', 200), (3, 'ann', 0)")
    shared.work()
    yield shared
    for file in {file for file in shared.folder.rglob("*") if file.is_file()} - before:
        file.unlink()
    set_database(None)


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_change_builds_what_is_downstream_and_the_records_that_differ_are_events(live: Live) -> None:
    before = content(live.folder)
    rebuilt, *changes = live.order(4, "ann", 100)
    assert isinstance(rebuilt, Rebuilt) and (rebuilt.new, rebuilt.updated, rebuilt.deleted) == (0, 1, 0)
    assert changes == [("updated", "ann")]
    assert live.last_run() == ("done", {"revenue": "success", "big": "success", "total": "success"})
    found = live.revenue.select().order_by("customer")
    assert [(one.customer, one.revenue) for one in found] == [("ann", 150), ("bob", 200)]
    assert content(live.folder) == before                              # hooks were put in in memory


def test_what_is_asked_for_commits_with_what_surrounds_it_and_becomes_one_run(live: Live) -> None:
    runs = "select count(*) from anton.dbt_run"
    before = live.shop.sql(runs)
    with pytest.raises(RuntimeError), transaction():
        live.revenue.run()
        raise RuntimeError
    live.work()
    assert live.shop.sql(runs) == before
    for _ in range(3):
        live.revenue.run()
    live.total.run(upstream=True)
    live.work()
    assert live.shop.sql(runs)[0][0] == before[0][0] + 1
    assert live.last_run() == ("done", {"revenue": "success", "total": "success"})
    assert live.shop.sql("select distinct state from anton.dbt_request") == [("done",)]


def test_a_failing_test_rolls_a_gated_build_back_and_the_old_table_stays(live: Live) -> None:
    live.shop.sql("alter table orders disable trigger user", "insert into orders values (9, 'eve', 2000000)",
                  "alter table orders enable trigger user")
    live.revenue.run(gate=True)
    (failed,) = live.work()
    assert isinstance(failed, Failed) and "no_millions" in failed.error
    assert live.shop.sql("select count(*) from revenue where customer = 'eve'") == [(0,)]
    assert live.last_run() == ("failed", {"revenue": "error"})
    live.revenue.run()
    assert ("new", "eve") in live.work()                               # without gate= nothing stands in its way


def test_a_test_of_models_built_side_by_side_is_run_after_them_and_told(live: Live) -> None:
    write = (live.folder / "models" / "side.sql").write_text
    write("select customer from {{ source('app', 'orders') }} where total > {{ var('least', 0) }} group by 1")
    (live.folder / "tests" / "both.sql").write_text(
        "select customer from {{ ref('revenue') }} except select customer from {{ ref('side') }}")
    live.shop.sql("select anton.pause('dbt:shop when orders')")
    set_database(live.shop.db)
    live.project.run("revenue", "side", gate=True)
    live.work()
    assert live.last_run() == ("done", {"revenue": "success", "side": "success", "both": "pass"})
    live.shop.sql("insert into orders values (8, 'dan', 8)")
    live.project.run("revenue", "side", gate=True)                     # inside of one of the builds it would fail
    live.work()
    assert live.last_run() == ("done", {"revenue": "success", "side": "success", "both": "pass"})
    live.project.run("revenue", "side", gate=True, vars={"least": 100})
    failed = [one for one in live.work() if isinstance(one, Failed)]
    assert live.last_run() == ("failed", {"revenue": "success", "side": "success", "both": "fail"})
    assert len(failed) == 1 and "test both failed after the build" in failed[0].error
    live.revenue.run(gate=True)                                        # with one of them it stands in its way
    live.shop.sql("insert into orders values (9, 'fay', 9)")
    (refused,) = live.work()
    live.shop.sql("select anton.resume('dbt:shop when orders')")
    assert isinstance(refused, Failed) and "test both of model.shop.revenue failed" in refused.error


def test_a_test_gates_with_the_vars_of_its_build(live: Live) -> None:
    (live.folder / "tests" / "small.sql").write_text(
        "select * from {{ ref('revenue') }} where revenue > {{ var('most', 1000000) }} -- a remark")
    for most, state in ((10_000, "done"), (100, "failed"), (10_000, "done")):
        live.project.run("revenue", gate=True, vars={"most": most})
        live.work()
        assert live.last_run()[0] == state


def test_a_gate_that_cannot_be_compiled_keeps_back_what_it_gates_and_nothing_else(live: Live) -> None:
    broken = live.folder / "tests" / "broken.sql"
    broken.write_text("{% if execute %}{{ exceptions.raise_compiler_error('no such thing') }}{% endif %}"
                      "select * from {{ ref('revenue') }}")
    live.project.run("revenue", gate=True)
    live.project.run("total")
    failed = [one for one in live.work() if isinstance(one, Failed)]
    assert live.last_run() == ("failed", {"revenue": "error", "total": "success"})
    assert len(failed) == 1 and "no such thing" in failed[0].error
    assert live.shop.sql("select (select count(*) from anton.job) + (select count(*) from anton.delayed) "
                         "+ (select count(*) from anton.dbt_request where state not in ('done', 'failed'))") == [(0,)]
    broken.unlink()


def test_a_run_that_is_cancelled_ends_its_query_and_is_not_tried_again(live: Live, monkeypatch: pytest.MonkeyPatch,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    (live.folder / "models" / "revenue_slow.sql").write_text(
        "select r.customer from {{ ref('revenue') }} r, pg_sleep(300)")
    sleeping = f"select count(*) from pg_stat_activity where query like '%{'pg_sleep'}(300)%' and state = 'active' " \
               "and application_name like 'anton-dbt-%-build-%'"
    monkeypatch.chdir(live.shop.folder)

    async def cancel() -> int:
        async with live.shop.db.conn() as look:
            await seen(look, sleeping)
        return await asyncio.to_thread(main, ["--database", live.shop.url, "dbt", "cancel"])

    live.project.run("revenue_slow")
    live.project.run("revenue_slow", vars={"other": 1})
    cancelling = asyncio.run_coroutine_threadsafe(cancel(), live.loop.loop)
    live.work()
    assert cancelling.result(60) == 0 and "is cancelled" in capsys.readouterr().out
    set_database(live.shop.db)
    assert live.last_run() == ("cancelled", {})
    assert live.shop.sql(sleeping) == [(0,)]
    assert live.shop.sql("select state, count(*) from anton.dbt_request where 'revenue_slow' = any (models) "
                         "group by 1") == [("cancelled", 2)]
    assert live.shop.sql("select (select count(*) from anton.job) + (select count(*) from anton.delayed) "
                         "+ (select count(*) from anton.dead)") == [(0,)]
    assert main(["--database", live.shop.url, "dbt", "cancel", "1"]) == 1
    assert "run 1 is not running" in capsys.readouterr().out
    set_database(live.shop.db)


def test_what_only_reads_and_what_builds_do_not_end_each_other(live: Live) -> None:
    (live.folder / "models" / "slow.sql").write_text("select 1 as id from pg_sleep(300)")
    runner = live.project.work._runner
    assert runner is not None
    reading = "select count(*) from pg_stat_activity where query like '%pg_sleep(300)%' and state = 'active' " \
              "and application_name like 'anton-dbt-%-read-%'"

    async def both() -> Any:
        other = live.project.runner(live.shop.db, runner.schema)       # anton dbt show, in another process
        show = asyncio.ensure_future(other.invoke(["show", "--select", "slow"]))
        async with live.shop.db.conn() as look:
            await seen(look, reading)
            async with alone(live.shop.db, runner.application):        # which ends what is left of builds
                pass
            await runner.invoke(["build", "--select", "total"], seconds=0.0)   # cancelled at once
            left = await look.fetchval(reading)
        show.cancel()
        await asyncio.wait({show})
        async with live.shop.db.conn() as look:
            gone = await look.fetchval(reading)
        await other.close()
        return left, gone

    assert live.loop.run(both()) == (1, 0)


def test_a_model_that_fails_is_told_and_leaves_the_others_alone(live: Live) -> None:
    bad = live.folder / "models" / "revenue.sql"
    good = bad.read_text()
    try:
        bad.write_text("select customer, 1/0 as revenue from {{ ref('good') }}")
        live.project.run()
        (failed,) = live.work()
    finally:
        bad.write_text(good)
    assert isinstance(failed, Failed) and "division by zero" in failed.error
    state, nodes = live.last_run()
    assert state == "failed" and nodes == {"revenue": "error", "big": "skipped", "total": "skipped"}


def test_a_project_that_cannot_be_read_makes_requests_wait_until_it_can(live: Live) -> None:
    bad = live.folder / "models" / "wrong.sql"
    bad.write_text("select * from {{ ref('nowhere') }}")
    live.revenue.run()
    told = live.work()
    assert [type(one) for one in told] == [Failed] and "nowhere" in told[0].error
    assert live.shop.sql("select state from anton.dbt_request order by id desc limit 1") == [("waiting",)]
    bad.unlink()
    live.shop.sql("update anton.delayed set run_at = now()")
    assert [type(one) for one in live.work()] == [Rebuilt]
    assert live.shop.sql("select state from anton.dbt_request order by id desc limit 1") == [("done",)]


def test_what_reads_a_model_that_did_not_change_is_left_out(live: Live) -> None:
    live.project.work.seconds = dict.fromkeys(("model.shop.total", "model.shop.big"), 60.0)   # so that it pays
    (rebuilt,) = live.order(5, "bob", 0)
    assert isinstance(rebuilt, Rebuilt) and not rebuilt and live.last_run() == ("done", {"revenue": "success"})
    live.project.work.seconds = dict.fromkeys(("model.shop.total", "model.shop.big"), 60.0)
    live.order(6, "bob", 1)
    assert live.last_run() == ("done", {"revenue": "success", "big": "success", "total": "success"})


def test_what_has_not_seen_a_change_of_another_run_is_built_though_nothing_changed_in_this_one(live: Live) -> None:
    live.shop.sql("select anton.pause('dbt:shop when orders')", "insert into orders values (6, 'cleo', 1)")
    set_database(live.shop.db)
    live.revenue.run()
    live.work()
    assert live.last_run() == ("done", {"revenue": "success"})
    live.shop.sql("select anton.resume('dbt:shop when orders')")
    live.project.work.seconds = dict.fromkeys(("model.shop.total", "model.shop.big"), 60.0)
    live.order(7, "bob", 0)
    assert live.last_run() == ("done", {"revenue": "success", "big": "success", "total": "success"})


EVE = {"customer": "eve", "revenue": 1}


@pytest.mark.parametrize("write", [
    lambda table: table.append(EVE), lambda table: table.extend([EVE]), lambda table: table.upsert(EVE),
    lambda table: table.select().delete(), lambda table: table.select(customer="ann").update(revenue=1)],
    ids=["append", "extend", "upsert", "delete", "update"])
def test_a_model_is_read_only_and_says_who_writes_it(shared: Live, write: Callable[[Any], None]) -> None:
    set_database(shared.shop.db)
    with pytest.raises(WriteError, match=r'dbt writes it, as model "revenue"'):
        write(shared.revenue)


def test_a_build_that_takes_too_long_is_ended_with_its_query(live: Live) -> None:
    (live.folder / "models" / "slow.sql").write_text("select 1 as id from pg_sleep(60)")
    live.project.run("slow", timeout=0.3)
    live.work()
    assert live.last_run() == ("failed", {"slow": "error"})
    ((state, error),) = live.shop.sql("select state, error from anton.dbt_request order by id desc limit 1")
    assert state == "failed" and "longer than" in error
    assert live.shop.sql("select count(*) from pg_stat_activity where query like '%pg_sleep(60)%' "
                         "and pid <> pg_backend_pid()") == [(0,)]


def test_a_child_that_is_killed_in_a_build_is_replaced_and_nothing_fires_twice(live: Live) -> None:
    killing = asyncio.run_coroutine_threadsafe(hold(live), live.loop.loop)
    live.shop.sql("insert into orders values (7, 'cleo', 70)")
    told = live.work()
    killed = killing.result(60)
    assert killed != live.child
    assert [one for one in told if not isinstance(one, Rebuilt)] == [("new", "cleo")]
    assert live.shop.sql("select count(*) from revenue where customer = 'cleo'") == [(1,)]


async def seen(look: Any, query: str) -> None:
    """Waits until the query's value is true."""
    end = time.monotonic() + 60
    while not await look.fetchval(query):
        assert time.monotonic() < end, query


WAITING = "select count(*) from pg_stat_activity where application_name like 'anton-dbt-%' and wait_event_type = 'Lock'"


async def hold(live: Live) -> int:
    """Keeps the build at its table until the child at work on it is killed; its number."""
    conn = await live.shop.db.connect()
    async with conn.transaction():
        await conn.execute("lock table revenue in access exclusive mode")
        async with live.shop.db.conn() as look:                        # in no transaction, which would see what it saw
            await seen(look, WAITING)
        child = live.child
        os.kill(child, signal.SIGKILL)
    await conn.close()
    return child


def test_what_a_dead_worker_was_at_is_built_by_the_next(live: Live) -> None:
    live.shop.sql("insert into anton.dbt_run (app, project, started_at) values ('shop', 'shop', now())",
                  "insert into anton.dbt_request (app, project, models, state, run_id, first_at, due_at) "
                  "select 'shop', 'shop', '{total}', 'running', max(id), now(), now() from anton.dbt_run")
    live.revenue.run()
    live.work()
    assert live.last_run() == ("done", {"revenue": "success", "total": "success"})
    assert live.shop.sql("select count(*) from anton.dbt_run where state = 'died'") == [(1,)]


def test_one_run_at_a_time(live: Live) -> None:
    async def race() -> list[str]:
        told: list[str] = []
        entered, leave = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            async with alone(live.shop.db, "x"):
                told.append("first in")
                entered.set()
                await leave.wait()
                told.append("first out")

        async def second() -> None:
            await entered.wait()
            asyncio.get_running_loop().call_soon(leave.set)
            async with alone(live.shop.db, "x"):
                told.append("second in")

        await asyncio.gather(first(), second())
        return told

    assert live.loop.run(race()) == ["first in", "first out", "second in"]


def test_a_table_that_was_made_without_hooks_is_found_by_housekeeping(live: Live) -> None:
    live.shop.sql("begin; create table r2 as table revenue; drop table revenue cascade; "
                  "alter table r2 rename to revenue; commit")
    done = list(iter(lambda: live.shop.sql("select anton.maintain()")[0][0], None))
    assert "1 tables found that dbt made anew without hooks" in done
    (rebuilt,) = live.work()
    assert isinstance(rebuilt, Rebuilt) and rebuilt.changed is None
    assert live.shop.sql("select 1 from pg_trigger where tgrelid = 'revenue'::regclass and not tgisinternal")
    found = live.shop.sql("select problem from anton.findings() where subject = 'public.revenue'")
    assert found == [("built without Anton's hooks: records were not compared",)]
    live.revenue.run()
    live.work()
    assert live.shop.sql("select problem from anton.findings() where kind = 'dbt'") == []


def test_a_worker_at_work_finds_such_a_table_within_a_minute(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 * anton.chores.WATCH <= 60                                # since the last look, and asleep until the next
    monkeypatch.setattr(anton.chores, "WATCH", 0.01)
    monkeypatch.setattr(anton.chores, "HOUSEKEEPING", float("inf"))    # which would find it, too
    built = live.shop.sql("select max(id) from anton.dbt_build")[0][0]

    async def watch() -> None:
        worker = Worker(live.shop.db, live.shop.app)
        working = asyncio.create_task(worker.run())
        async with live.shop.db.conn() as look:
            await look.execute("begin; create table r2 as table revenue; drop table revenue cascade; "
                               "alter table r2 rename to revenue; commit")
            await seen(look, f"select exists (select from anton.dbt_build where id > {built} and note ~ 'without')")
        worker.drain()
        await working

    live.loop.run(watch())
    live.revenue.run()
    live.work()


def test_a_name_that_is_no_model_is_refused_with_the_likely_one(live: Live) -> None:
    def declare() -> None:
        DbtProject("dbt_project").model("revenu")

    shop = Shop(live.shop.url, live.shop.folder, "other").declare(declare)
    with pytest.raises(DeclarationError, match='Did you mean "revenue"'):
        shop.migrate()


@pytest.mark.parametrize(("model", "remedy"), [
    ("loose", "Give one column the tests unique and not_null, or the model a primary_key constraint in its contract"),
    ("big", "It is a view: listen to on_rebuilt"),
])
def test_records_of_a_model_without_a_key_are_refused_with_what_to_add(live: Live, model: str, remedy: str) -> None:
    (live.folder / "models" / "loose.sql").write_text("select 1 as n")
    shop = Shop(live.shop.url, live.shop.folder, "sixth").declare(
        lambda: DbtProject("dbt_project").model(model).on_new_records(print, name="never"))
    with pytest.raises(AntonError, match=f"{model} has no key, so nobody can tell") as e:
        live.loop.run(migrate(shop.db, shop.app))
    assert remedy in str(e.value)
    assert shop.sql("select 1 from anton.handler where name = 'never'") == []


def test_a_table_that_the_project_does_not_read_is_refused_with_what_to_write(live: Live) -> None:
    def declare() -> None:
        Table("orders", Order)
        DbtProject("dbt_project").run_when(Table("order_lines", Order))

    shop = Shop(live.shop.url, live.shop.folder, "fourth").declare(declare)
    with pytest.raises(ConfigError, match=r"does not read public\.order_lines: nothing would be built") as e:
        live.loop.run(migrate(shop.db, shop.app))
    assert "models/sources.yml: sources: [{name: app, schema: public, tables: [{name: order_lines}]}]" in str(e.value)
    assert "Its sources are public.orders" in str(e.value)
    assert shop.sql("select to_regclass('order_lines')") == [(None,)]


def test_a_handler_of_a_model_that_changes_what_it_is_made_of_is_a_loop_that_is_said(live: Live) -> None:
    def declare(op: str) -> None:
        orders = Table("orders", Order)
        project = DbtProject("dbt_project")
        project.run_when(orders)
        event = getattr(project.model("revenue", Revenue), f"on_{op}")
        event.sql("insert into orders select 1, 'ann', 1", name="again")

    for op in ("updated_records", "rebuilt"):
        shop = Shop(live.shop.url, live.shop.folder, "fifth").declare(lambda op=op: declare(op))
        plan = live.loop.run(migrate(shop.db, shop.app, plan=True))
        assert [note for note in plan.notes if note.startswith("a loop: ") and "again" in note], (op, plan.notes)


def test_a_model_whose_build_changed_nothing_builds_nothing_that_waits_for_it(live: Live) -> None:
    def wanted() -> set[str]:
        row = {"id": 1, "models": [], "tables": ["public.revenue"], "gate": False, "full_refresh": False, "vars": {},
               "upstream": False}
        manifest = live.project.manifest
        assert manifest is not None
        (wish,), _ = wishes_of(manifest, [row])
        return live.loop.run(live.project.work._due(live.shop.db, manifest, wish))

    live.shop.sql("select anton.pause('dbt:shop when orders')")
    live.project.run()
    live.work()
    live.revenue.run()
    live.work()
    assert wanted() == set()
    live.shop.sql("insert into orders values (6, 'cleo', 1)")
    live.revenue.run()
    live.work()
    assert {id.rpartition(".")[2] for id in wanted()} == {"big", "total"}
    live.shop.sql("select anton.resume('dbt:shop when orders')")


def test_what_is_downstream_of_a_model_can_wait_for_its_builds(live: Live) -> None:
    def declare() -> None:
        project = DbtProject("dbt_project")
        project.run_when(project.model("big"))
        project.run_on("0 3 * * *", models=["total"])

    shop = Shop(live.shop.url, live.shop.folder, "third").declare(declare)
    live.loop.run(migrate(shop.db, shop.app))
    found = shop.sql("select name, ops from anton.handler where app = 'third' and enabled order by name")
    assert found == [("dbt:shop", []), ("dbt:shop at 0 3 * * * total", []), ("dbt:shop when big", ["rebuilt"])]
    live.project.run("big")
    live.work()
    waiting = "select count(*) from anton.job j join anton.handler h on h.id = j.handler_id where h.app = 'third'"
    assert shop.sql(waiting) == [(1,)]
    shop.declare(lambda: None)
    live.loop.run(migrate(shop.db, shop.app))


def test_columns_are_followed_through_what_dbt_compiled(shared: Live) -> None:
    found = shared.project.graph().columns
    assert found["public.revenue", "revenue"] == {("public.orders", "total")}      # through an ephemeral model
    assert found["public.total", "total"] == {("public.revenue", "revenue")}


def test_commands_that_build_nothing_answer_in_lines(live: Live) -> None:
    runner = live.project.work._runner
    assert runner is not None
    done = live.loop.run(runner.invoke(["ls", "--resource-type", "source"]))
    assert (done.success, done.lines) == (True, ["source:shop.app.orders"])
    (live.folder / "models" / "said.sql").write_text("select '{{ var('word', 'none') }}' as word")
    for given in (["--vars", "word: yes it is"], ["--vars=word: yes it is"], ["--vars={}", "--vars={word: yes it is}"]):
        done = live.loop.run(runner.invoke(["compile", "--select", "said", *given]))
        assert [raw["code"] for raw in done.raw] == ["select 'yes it is' as word"]
    done = live.loop.run(runner.invoke(["compile", "--vars=word"]))
    assert not done.success and "--vars: 'word' is no mapping" in (done.error or "")
    done = live.loop.run(runner.invoke(["ls", "--wrong"]))
    assert not done.success and "--wrong" in (done.error or "")


def test_what_dbt_says_of_each_model_is_kept_and_shown(live: Live, monkeypatch: pytest.MonkeyPatch,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    live.project.run("revenue", "total")
    live.work()
    logs = dict(live.shop.sql("select unique_id, log from anton.dbt_result where run_id = "
                              "(select max(id) from anton.dbt_run)"))
    assert "OK created sql table model public.revenue" in logs["model.shop.revenue"]
    assert "public.total" in logs["model.shop.total"] and "public.total" not in logs["model.shop.revenue"]
    monkeypatch.chdir(live.shop.folder)
    assert main(["--database", live.shop.url, "dbt", "log", "revenue"]) == 0
    shown = capfd.readouterr().out
    assert ": success\n" in shown and logs["model.shop.revenue"] in shown and "public.total" not in shown
    set_database(live.shop.db)
    (live.folder / "tests" / "no_total.sql").write_text("select * from {{ ref('total') }}")
    assert main(["--database", live.shop.url, "dbt", "build", "--select", "total"]) == 1
    capfd.readouterr()
    assert main(["--database", live.shop.url, "dbt", "log", "total"]) == 0
    shown = capfd.readouterr().out
    (last,), = live.shop.sql("select max(id) from anton.dbt_run")      # what was typed, too
    assert shown.startswith(f"run {last}, ") and "model public.total" in shown
    assert main(["--database", live.shop.url, "dbt", "log", "no_total"]) == 0
    shown = capfd.readouterr().out
    assert shown.startswith(f"run {last}, ") and ": fail\n" in shown and "no_total" in shown.partition("\n")[2]
    set_database(live.shop.db)


def test_anton_dbt_hands_arguments_on_and_shows_progress(live: Live, monkeypatch: pytest.MonkeyPatch,
                                                         capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(live.shop.folder)
    url = ["--database", live.shop.url]
    assert main([*url, "dbt", "run", "--select", "revenue", "--full-refresh"]) == 0
    out = capfd.readouterr().out
    assert "1 of 1 OK created sql table model public.revenue" in out and "Done. PASS=1" in out
    assert main([*url, "dbt", "changes", "revenue", "--limit", "1"]) == 0
    assert "table" in capfd.readouterr().out
    assert main([*url, "dbt", "lineage", "total"]) == 0
    out = capfd.readouterr().out
    assert "from revenue" in out and "total <- public.revenue.revenue" in out
    set_database(live.shop.db)
