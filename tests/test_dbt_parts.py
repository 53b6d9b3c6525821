"""What of a dbt project needs no dbt: its manifest, its profile, what `anton dbt init` writes, requests in SQL."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pg import Pg

from anton.cli import main
from anton.dbt.gate import after, gates
from anton.dbt.init import hooks_missing, init, macro_folder, stamp, with_hooks
from anton.dbt.manifest import Manifest, fingerprint
from anton.dbt.profile import outputs, write_profile
from anton.dbt.project import name_of
from anton.dbt.requests import wishes_of
from anton.dbt.runner import check_version, scratch, sweep
from anton.dbt.verbs import _absolute
from anton.errors import ConfigError, DeclarationError


def node(name: str, *parents: str, materialized: str = "table", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "model", "schema": "public", "alias": name, "materialized": materialized,
            "file": f"models/{name}.sql", "parents": list(parents), "key": [], "tags": [], "columns": {}, **more}


@pytest.fixture
def manifest() -> Manifest:
    """orders -> clean (ephemeral) -> a -> c, and a -> d (view) -> e; b reads nothing of it."""
    def id(name: str) -> str:
        return f"model.shop.{name}"

    return Manifest({
        "project": "shop", "tests": {}, "exposures": {}, "macros": [], "stamp": [],
        "sources": {"source.shop.app.orders": {"schema": "public", "alias": "orders", "name": "orders"}},
        "nodes": {id("clean"): node("clean", "source.shop.app.orders", materialized="ephemeral"),
                  id("a"): node("a", id("clean")), id("b"): node("b"), id("c"): node("c", id("a"), id("b")),
                  id("d"): node("d", id("a"), materialized="view"), id("e"): node("e", id("d"))}})


def names(ids: Any) -> list[str]:
    return sorted(id.rpartition(".")[2] for id in ids)


def test_what_is_downstream_of_a_table(manifest: Manifest) -> None:
    (source,) = manifest.of_tables([("public", "orders"), ("public", "unknown")])
    assert names(manifest.downstream([source])) == ["a", "c", "clean", "d", "e"]
    assert names(manifest.upstream(["model.shop.c"])) == ["a", "b", "clean"]


def test_levels_come_in_the_order_of_building_and_look_through_ephemeral_models(manifest: Manifest) -> None:
    ids = {f"model.shop.{name}" for name in "acde"}
    assert [names(level) for level in manifest.levels(ids)] == [["a"], ["c", "d"], ["e"]]
    assert manifest.reads("model.shop.a") == {"source.shop.app.orders"}


def test_a_model_is_found_by_its_name_and_a_slip_is_named(manifest: Manifest) -> None:
    assert manifest.node("a").id == "model.shop.a"
    with pytest.raises(DeclarationError, match='no model "cleen".*Did you mean "clean"'):
        manifest.node("cleen")


def test_any_other_file_is_another_project_and_only_what_dbt_writes_at_its_root_is_not(tmp_path: Path) -> None:
    def written(name: str, text: str = "select 1") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    project = written("dbt_project.yml", "name: shop\n")
    model = written("models/logs/daily.sql")
    before = fingerprint(tmp_path)
    model.write_text("select 2")
    assert (now := fingerprint(tmp_path)) != before
    os.utime(model, ns=(1, 1))                                         # as cp -p and checkouts leave it
    assert fingerprint(tmp_path) != now and fingerprint(tmp_path) == (now := fingerprint(tmp_path))
    model.rename(model.with_name("hourly.sql"))
    assert fingerprint(tmp_path) != now
    for folder in ("target", "logs"):
        now = fingerprint(tmp_path)
        written(f"{folder}/manifest.json")
        assert fingerprint(tmp_path) == now
        written(f"models/{folder}/more.sql")
        assert fingerprint(tmp_path) != now
    project.write_text("name: shop\ntarget-path: \"out/target\"  # ours\n")
    now = fingerprint(tmp_path)
    written("out/target/manifest.json")
    assert fingerprint(tmp_path) == now
    written("target/ours.sql")
    assert fingerprint(tmp_path) != now


def request(id: int, **more: Any) -> dict[str, Any]:
    return {"id": id, "models": [], "tables": [], "upstream": False, "gate": False, "full_refresh": False, "vars": {},
            **more}


def test_requests_become_as_few_invocations_as_can_be(manifest: Manifest) -> None:
    wishes, refused = wishes_of(manifest, [
        request(1, models=["a"]), request(2, tables=["public.orders"]), request(3, models=["c"], upstream=True),
        request(4, models=["b"], gate=True), request(5, models=["nowhere"])])
    assert [(wish.ids, names(wish.nodes), names(wish.whole)) for wish in wishes] == [
        ([1, 2, 3], ["a", "b", "c", "d", "e"], ["a", "b", "c"]), ([4], ["b"], ["b"])]
    assert list(refused) == [5] and "nowhere" in refused[5]


def test_a_test_gates_the_last_of_its_models_or_waits_for_those_that_are_side_by_side(manifest: Manifest) -> None:
    def id(name: str) -> str:
        return f"model.shop.{name}"

    reads = {"of_a": "a", "of_a_and_c": "ac", "of_a_and_b": "ab", "of_d_and_e": "de", "of_c_and_d": "cd"}
    manifest.tests = {test: {"name": test, "parents": [*map(id, models)]} for test, models in reads.items()}
    manifest.tests["of_clean"] = {"name": "of_clean", "parents": [id("clean"), id("b")]}
    every = {id(name) for name in "abcde"}
    gate, stale = gates(manifest, every)
    assert stale == set() and {test: names([model])[0] if model else "" for test, model in gate.items()} == {
        "of_a": "a", "of_a_and_c": "c", "of_a_and_b": "", "of_d_and_e": "e", "of_c_and_d": "", "of_clean": "b"}
    assert after(manifest, gate, every, []) == ["of_a_and_b", "of_c_and_d"]
    assert after(manifest, gate, every - {id("c")}, [id("c")]) == ["of_a_and_b"]
    assert after(manifest, gate, {id("a")}, []) == ["of_a_and_b", "of_a_and_c"]   # nobody built c
    gate, stale = gates(manifest, {id("a")})
    assert gate == {"of_a": id("a"), "of_a_and_b": id("a")} and stale == {"of_a_and_c"}


def test_folders_that_are_typed_are_those_of_who_typed_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert _absolute(["--select", "state:new", "--state", "old", "--defer-state=/x/y", "--vars", "--state"]) == [
        "--select", "state:new", "--state", f"{tmp_path}/old", "--defer-state=/x/y", "--vars", "--state"]


@pytest.mark.parametrize(("typed", "said"), [
    (["--target", "prod"], r'it is "dev", of DbtProject\(target=…\)'), (["-t", "prod"], 'it is "dev"'),
    (["-tprod"], 'it is "dev"'), (["--profile", "x"], "--database URL"), (["--profiles-dir=/x"], "--database URL"),
    (["--project-dir", "/x"], "--project NAME"), (["--target-path", "/x"], r"\.anton/dbt"),
    (["--log-path=/x"], "anton dbt log MODEL")])
def test_an_option_of_dbts_that_anton_sets_is_refused_with_what_to_do(
        typed: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    init(tmp_path / "dbt_project")
    assert main(["--database", "postgresql://127.0.0.1:9/x", "dbt", "run", "--select", "a", *typed]) == 2
    assert re.search(rf"anton dbt run {typed[0]}: Anton sets --.*{said}", capsys.readouterr().err)


def test_a_profile_is_what_the_url_says_and_holds_no_password(tmp_path: Path) -> None:
    output, needed = outputs("postgresql://ann:s%40fe@db.example:5433/shop?sslmode=require", "marts", 4)
    write_profile(tmp_path, "prod", output)
    assert (output["host"], output["port"], output["user"], output["dbname"], output["sslmode"]) == (
        "db.example", 5433, "ann", "shop", "require")
    assert needed == {"ANTON_DBT_PASSWORD": "s@fe"} and "s@fe" not in (tmp_path / "profiles.yml").read_text()
    assert (tmp_path / "profiles.yml").stat().st_mode & 0o777 == 0o600


def test_options_of_the_url_reach_the_server_by_dbts_words_or_libpqs(
        pg: Pg, monkeypatch: pytest.MonkeyPatch) -> None:
    more = "options=-c%20statement_timeout%3D4321&connect_timeout=7&target_session_attrs=read-write"
    output, needed = outputs(f"{pg.url}{'&' if '?' in pg.url else '?'}{more}", "public", 1)
    assert output["connect_timeout"] == 7 and needed["PGTARGETSESSIONATTRS"] == "read-write"
    for name, value in needed.items():
        monkeypatch.setenv(name, value)
    to = {name: output[name] for name in ("host", "port", "user", "dbname", "connect_timeout")}
    with psycopg.connect(**to, password=needed["ANTON_DBT_PASSWORD"]) as conn:
        assert conn.execute("show statement_timeout").fetchone() == ("4321ms",)


@pytest.mark.parametrize(("url", "said"), [
    ("postgresql://ann@a:5432,b:5433/shop", 'several hosts, "a:5432,b:5433".*dbt connects to one'),
    ("postgresql://ann@/shop?host=a,b", 'several hosts, "a,b"'),
    ("postgresql://a:x/shop", 'port of the database is "x"; allowed'),
    ("postgresql://a/shop?connect_timeout=soon", 'connect_timeout of the database is "soon"; allowed'),
    ("postgresql://a/shop?ssl_mode=require", '"ssl_mode".*Did you mean "sslmode".*Allowed with dbt: .*sslmode'),
    ("postgresql://a/shop?tcp_user_timeout=9", 'the option "tcp_user_timeout", which dbt cannot be given')])
def test_what_of_a_url_dbt_cannot_be_given_is_named(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        outputs(url, "public", 1)


def test_the_folder_of_a_killed_process_is_swept_and_none_that_is_in_use(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import sys; from anton.dbt.runner import scratch; kept = scratch(); print(kept[0], flush=True); input()"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    other = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "profiles.yml").write_text("{}")
        ours, lock = scratch()
        (tmp_path / "anton-dbt-half-made").mkdir()
        sweep()
        assert theirs.is_dir() and ours.stat().st_mode & 0o077 == 0
        other.kill()
    sweep()
    assert {one.name for one in tmp_path.iterdir()} == {ours.name, "anton-dbt-half-made"}
    lock.close()
    sweep()
    assert [one.name for one in tmp_path.iterdir()] == ["anton-dbt-half-made"]


def test_a_profile_finds_a_unix_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = outputs("postgresql://ann@/shop?host=/run/pg&port=5439", "public", 1)
    assert (output["host"], output["port"], output["dbname"]) == ("/run/pg", 5439, "shop")
    monkeypatch.setenv("PGHOST", "/tmp/s")
    monkeypatch.setenv("PGUSER", "bob")
    output, _ = outputs(None, "public", 1)
    assert (output["host"], output["port"], output["user"], output["dbname"]) == ("/tmp/s", 5432, "bob", "bob")


@pytest.mark.parametrize(("version", "said"), [("2.0.9", "which Anton cannot use"), (None, "is not installed")])
def test_a_dbt_that_cannot_be_used_is_named_with_the_one_that_can(version: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{said}.*anton-framework\[dbt\]"):
        check_version(version)
    check_version("1.11.16")


GIVEN = """name: 'shop'   # ours
version: "1.0"
macro-paths: ["our_macros"]

models:
  # all of them
  shop:
    +materialized: table

seeds: {}
"""


def test_init_adds_two_lines_a_kind_keeps_comments_and_does_nothing_the_second_time(tmp_path: Path) -> None:
    (tmp_path / "dbt_project.yml").write_text(GIVEN)
    assert stamp(tmp_path)[0] is None and hooks_missing(GIVEN) == ["models", "seeds", "snapshots"]
    assert init(tmp_path)
    text = (tmp_path / "dbt_project.yml").read_text()
    added = '  +pre-hook: "{{ anton_before() }}"\n  +post-hook: "{{ anton_after() }}"\n'
    wanted = GIVEN.replace("models:\n", f"models:\n{added}").replace("seeds: {}\n", f"seeds:\n{added}")
    assert text == wanted + f"\nsnapshots:\n{added}"
    assert (tmp_path / "our_macros" / "anton" / "anton.sql").exists() and len(set(stamp(tmp_path))) == 1
    assert init(tmp_path) == [] and hooks_missing(text) == []


def test_init_brings_older_macros_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "dbt_project.yml").write_text(GIVEN)
    init(tmp_path)
    (tmp_path / "our_macros" / "anton" / "anton.sql").write_text("{#- Anton's dbt macros, version 0. -#}")
    assert stamp(tmp_path)[0] == 0
    assert init(tmp_path) == ["our_macros/anton/anton.sql: brought up to date"]


def test_init_does_not_touch_hooks_that_are_there_and_says_what_to_add() -> None:
    with pytest.raises(ConfigError, match=r"models: has a post-hook of its own.*anton_after"):
        with_hooks('name: shop\nmodels:\n  +post-hook: "analyze {{ this }}"\n')
    kept = ('name: shop\nmodels:\n  +pre-hook: "{{ anton_before() }}"\n  +post-hook:\n    - "analyze {{ this }}"\n'
            '    - "{{ anton_after() }}"\n')
    assert with_hooks(kept).startswith(kept)


@pytest.mark.parametrize(("text", "folder"), [
    ("name: x", "macros/anton"), ('macro-paths: ["m"]', "m/anton"), ("macro-paths:\n  - more\n", "more/anton")])
def test_macros_go_where_the_project_keeps_its_own(text: str, folder: str) -> None:
    assert macro_folder(text) == folder


def test_init_makes_a_project_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["dbt", "init"]) == 0
    assert "a new project" in capsys.readouterr().out and name_of(tmp_path / "dbt_project") == "dbt_project"
    assert main(["dbt", "init"]) == 0 and "is up to date" in capsys.readouterr().out


def test_doctor_names_a_project_with_other_macros_and_none_that_has_nothing_of_antons(
        tmp_path: Path, pg: Pg, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    init(tmp_path / "dbt_project")
    (tmp_path / "main.py").write_text("from anton import DbtProject\nDbtProject()\n")
    main(["--database", pg.url, "doctor"])
    assert "dbt dbt_project" not in capsys.readouterr().out
    (tmp_path / "dbt_project" / "macros" / "anton" / "anton.sql").write_text("{#- version 0. -#}")
    assert main(["--database", pg.url, "doctor"]) == 1
    assert "dbt dbt_project: has Anton's macros in version 0" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "dbt_project" / "macros")
    main(["--database", pg.url, "doctor"])
    assert "has Anton's hooks, and the macros are not there" in capsys.readouterr().out
    (tmp_path / "dbt_project" / "dbt_project.yml").write_text("name: shop\n")
    main(["--database", pg.url, "doctor"])
    assert "dbt dbt_project" not in capsys.readouterr().out


@pytest.fixture
def ask(pg: Pg) -> Any:
    pg.sql("select anton.put_dbt_project('{\"app\": \"shop\", \"name\": \"dbt:shop\"}')")

    def ask(**what: Any) -> int:
        return int(pg.value("select anton.dbt_ask('shop', 'shop', %s::jsonb)", json.dumps(what)))

    return ask


WHEN = {"merge": "when", "debounce": "2 s", "max_wait": "5 s"}


def test_changes_in_quick_succession_put_one_request_off_until_max_wait(pg: Pg, ask: Any) -> None:
    first = ask(**WHEN, tables=["public.orders"])
    due = "select extract(epoch from due_at - first_at)::float from anton.dbt_request"
    assert pg.value(due) == 2
    pg.sql("update anton.dbt_request set first_at = first_at - interval '1 s', due_at = due_at - interval '1 s'")
    assert ask(**WHEN, tables=["public.items"]) == first and 2.9 < pg.value(due) < 5
    pg.sql("update anton.dbt_request set first_at = first_at - interval '9 s', due_at = due_at - interval '9 s'")
    assert ask(**WHEN, tables=["public.orders"]) == first and pg.value(due) == 5
    assert pg.value("select tables from anton.dbt_request") == ["public.items", "public.orders"]
    assert pg.value("select run_at = due_at from anton.delayed, anton.dbt_request")
    assert pg.value("select count(*) from anton.job") == 0


def test_a_run_takes_what_is_due_and_what_a_dead_one_left_and_no_more(pg: Pg, ask: Any) -> None:
    left, due, later = ask(models=["a"]), ask(models=["b"]), ask(**WHEN, tables=["public.orders"])
    pg.sql("insert into anton.dbt_run (app, project, started_at) values ('shop', 'shop', now())",
           f"update anton.dbt_request set state = 'running', run_id = (select id from anton.dbt_run) where id = {left}")
    begun = "select array_agg(id order by id) from anton.dbt_begin('shop', 'shop', %s)"
    assert pg.value(begun, []) == [left, due]
    assert pg.value("select state from anton.dbt_run order by id limit 1") == "died"
    assert pg.value(begun, [later]) == [left, due, later]


def test_a_model_is_behind_a_build_that_committed_after_it_began_to_read(pg: Pg) -> None:
    def build(model: str, note: str = "null") -> None:
        pg.sql("insert into anton.dbt_build (project, unique_id, relation, materialized, initial, changed, "
               "schema_changed, at, xid, snapshot) values "
               f"('shop', '{model}', '{model}', 'table', false, true, false, now(), pg_current_xact_id(), {note})")

    def behind() -> list[Any]:
        return [row[0] for row in pg.sql("select * from anton.dbt_behind('shop', '{\"child\": [\"parent\"]}')")]

    assert behind() == []
    build("parent")
    assert behind() == ["child"]                                       # never built
    build("child", "pg_current_snapshot()")
    assert behind() == []
    before = pg.value("select pg_current_snapshot()::text")
    build("parent")
    build("child", f"'{before}'")                                      # the later row, and it did not see the other
    assert behind() == ["child"]
    build("child", "pg_current_snapshot()")
    assert behind() == []


def test_a_build_whose_hook_before_did_not_run_has_seen_what_its_invocation_built_and_no_more(pg: Pg) -> None:
    def build(model: str, invocation: str) -> None:
        pg.sql("insert into anton.dbt_build (project, unique_id, relation, invocation_id, materialized, initial, "
               "changed, schema_changed, at, xid) values "
               f"('shop', '{model}', '{model}', '{invocation}', 'table', false, true, false, now(), "
               "pg_current_xact_id())")

    behind = "select count(*) from anton.dbt_behind('shop', '{\"child\": [\"parent\"]}')"
    build("parent", "one")
    build("child", "one")
    assert pg.value(behind) == 0
    build("child", "two")                                              # the parent's may have committed meanwhile
    assert pg.value(behind) == 1


@pytest.fixture
def holder(pg: Pg) -> Iterator[psycopg.Connection[Any]]:
    """A session that has the lock of a project, as a worker has."""
    conn = psycopg.connect(pg.url)
    yield conn
    conn.close()


def held(conn: psycopg.Connection[Any], name: str = "anton-dbt-x") -> int:
    row = conn.execute("select anton.dbt_lock(%s)", [name]).fetchone()
    assert row is not None
    return int(row[0])


def test_cancelling_ends_the_session_that_has_the_lock_of_that_run_and_no_other(
        pg: Pg, ask: Any, holder: psycopg.Connection[Any]) -> None:
    pid = held(holder)
    ask(models=["a"])
    run = pg.value("select run_id from anton.dbt_begin('shop', 'shop', '{}', %s, 'anton-dbt-other')", pid)
    assert pg.sql("select id, problem from anton.dbt_cancel('{}')") == [(run, None)]
    assert pg.sql("select * from anton.dbt_end_holders(%s)", args=([run],)) == []
    assert holder.execute("select 1").fetchone() == (1,)               # its process has another lock by now
    ask(models=["a"])
    run = pg.value("select run_id from anton.dbt_begin('shop', 'shop', '{}', %s, 'anton-dbt-x')", pid)
    assert pg.sql("select id, problem from anton.dbt_cancel('{}')") == [(run, None)]
    assert pg.sql("select * from anton.dbt_end_holders(%s)", args=([run],)) == [(run,)]
    with pytest.raises(psycopg.OperationalError):
        holder.execute("select 1")
    assert pg.sql("select distinct state from anton.dbt_request") == [("cancelled",)]


def test_a_run_that_cannot_be_ended_is_not_said_to_be_cancelled(
        pg: Pg, ask: Any, holder: psycopg.Connection[Any]) -> None:
    ask(models=["a"])
    run = pg.value("select run_id from anton.dbt_begin('shop', 'shop', '{}')")   # a worker of the release before
    ((id, problem),) = pg.sql("select id, problem from anton.dbt_cancel('{}')")
    assert id == run and "older Anton" in problem
    assert pg.sql("select state from anton.dbt_run") == [("running",)]
    run = pg.value("select run_id from anton.dbt_begin('shop', 'shop', '{}', %s, 'anton-dbt-x')", held(holder))
    pg.sql("do $$ begin create role passer; exception when duplicate_object then null; end $$",
           "grant usage on schema anton to passer", "grant all on all tables in schema anton to passer",
           "set role passer")
    try:
        ((id, problem),) = pg.sql("select id, problem from anton.dbt_cancel('{}')")
    finally:
        pg.sql("reset role", "revoke all on all tables in schema anton from passer",
               "revoke all on schema anton from passer")
    assert id == run and "passer" in problem and "may not end sessions" in problem
    assert pg.sql("select state from anton.dbt_request") == [("running",)]


def test_what_waits_can_be_cancelled_and_is_asked_for_anew_after_that(pg: Pg, ask: Any) -> None:
    first = ask(**WHEN, tables=["public.orders"])
    assert pg.sql("select * from anton.dbt_cancel_waiting('other')") == []
    assert pg.sql("select * from anton.dbt_cancel_waiting('shop')") == [(first, "shop")]
    assert pg.sql("select * from anton.dbt_begin('shop', 'shop', %s)", args=([first],)) == []
    assert ask(**WHEN, tables=["public.orders"]) != first


def test_a_run_under_another_lock_is_not_dead_because_this_one_begins(pg: Pg, ask: Any) -> None:
    """Another target, or what was typed for it."""
    typed = pg.value("select anton.dbt_open('shop', 'shop', 1, 'anton-dbt-y')")
    ask(models=["a"])
    pg.sql("select * from anton.dbt_begin('shop', 'shop', '{}', 1, 'anton-dbt-x')")
    assert pg.value("select state from anton.dbt_run where id = %s", typed) == "running"
    pg.sql("select anton.dbt_open('shop', 'shop', 1, 'anton-dbt-y')")
    assert pg.value("select state from anton.dbt_run where id = %s", typed) == "died"


def test_what_runs_under_another_lock_is_taken_over_when_its_holder_has_that_no_more(
        pg: Pg, ask: Any, holder: psycopg.Connection[Any]) -> None:
    pid = held(holder, "anton-dbt-prod")
    theirs = ask(models=["a"])
    begin = "select array_agg(id order by id) from anton.dbt_begin('shop', 'shop', %s, %s, %s)"
    assert pg.value(begin, [], pid, "anton-dbt-prod") == [theirs]
    run = "select state from anton.dbt_run where lock = hashtext('anton-dbt-prod')"
    mine = ask(models=["b"])
    assert pg.value(begin, [theirs], 1, "anton-dbt-dev") == [mine] and pg.value(run) == "running"
    holder.rollback()                                                  # the lock goes with its transaction
    assert pg.value(begin, [], 1, "anton-dbt-dev") == [theirs, mine] and pg.value(run) == "died"


def test_a_run_that_was_taken_over_notes_nothing_more(pg: Pg, ask: Any) -> None:
    ask(models=["a"])
    first = pg.value("select run_id from anton.dbt_begin('shop', 'shop', '{}')")
    second = pg.value("select run_id from anton.dbt_begin('shop', 'shop', '{}')")
    finish = "select anton.dbt_finish(%s, 'done', null, '{}', '[]')"
    assert [pg.value(finish, run) for run in (first, second)] == [False, True]
    assert pg.sql("select state from anton.dbt_request") == [("done",)]


def test_a_run_that_is_finished_stays_so_while_its_requests_wait_for_the_ack(pg: Pg, ask: Any) -> None:
    """Who begins by then may build them once more, and then they are that run's."""
    ask(models=["a"])
    begin = "select run_id from anton.dbt_begin('shop', 'shop', '{}', 1, 'anton-dbt-x')"
    settle, states = "select anton.dbt_settle(%s, '{}', null)", "select array_agg(state order by id) from anton.dbt_run"
    first = pg.value(begin)
    assert pg.value("select anton.dbt_finish(%s, 'done', null, null, '[]')", first)
    pg.sql("select anton.dbt_open('shop', 'shop', 1, 'anton-dbt-x')")
    assert pg.value(states) == ["done", "running"]
    second = pg.value(begin)
    assert [pg.value(settle, run) for run in (first, second)] == [False, True]
    assert pg.sql("select state from anton.dbt_request") == [("done",)]


def test_what_is_put_back_joins_the_request_that_waits_by_now(pg: Pg, ask: Any) -> None:
    ask(**WHEN, tables=["public.orders"])
    run = pg.value("select run_id from anton.dbt_begin('shop', 'shop', (select array_agg(id) from anton.dbt_request))")
    newer = ask(**WHEN, tables=["public.items"])
    pg.sql(f"select anton.dbt_put_back({run}, 'broken', 'shop', '{{}}')")
    waiting = pg.sql("select id, tables from anton.dbt_request where state = 'waiting'")
    assert waiting == [(newer, ["public.items", "public.orders"])]


def test_a_project_that_was_never_migrated_is_named(pg: Pg) -> None:
    with pytest.raises(Exception, match='no dbt project "shop" in app "shop"'):
        pg.sql("select anton.dbt_ask('shop', 'shop', '{}')")
