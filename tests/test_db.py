"""Db: pools per loop and process, the sync edge, SQLSTATEs as classes, a transaction pooler in between."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from working import met, pooled

from anton.app import App, declaring
from anton.db import (
    KEYWORDS,
    Conn,
    Database,
    Json,
    current_database,
    identifier,
    literal,
    quote,
    set_database,
    split_name,
    translating,
)
from anton.errors import (
    SQLSTATES,
    BadOption,
    DatabaseUnreachable,
    LeaseLost,
    UnknownHandler,
    UnknownOption,
    UnknownTable,
    WorldError,
    distance,
    near,
)
from anton.migrate import migrate
from anton.table import Table


async def value(db: Database, sql: str, *args: object) -> object:
    async with db.conn() as conn:
        return await conn.fetchval(sql, *args)


async def test_json_comes_and_goes_as_python_values(db):
    there = {"a": [1, None, "ü"], "b": {"c": 1.5}}
    assert await value(db, "select $1::jsonb", there) == there
    assert await value(db, "select $1::json", there) == there
    assert await value(db, "select $1::jsonb", Json(b'{"ready": true}')) == {"ready": True}
    assert await value(db, "select array[$1::jsonb]", [1]) == [[1]]
    await db.close()


async def test_a_server_keeps_no_session_of_a_client_that_vanished_for_hours(db):
    async with db.conn() as conn:
        network = await conn.fetchval("select inet_client_addr() is not null")
        found = [await conn.fetchval(f"show {name}") for name in
                 ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")]
    assert found == (["10", "3", "3", "20000"] if network else ["0"] * 4)


async def test_a_transaction_commits_whole_or_not_at_all(db):
    with pytest.raises(ZeroDivisionError):
        async with db.tx() as conn:
            await conn.execute("create table half (id int)")
            raise ZeroDivisionError
    async with db.tx() as conn:
        assert await conn.fetchval("show transaction_isolation") == "read committed"
        assert await conn.fetchval("select to_regclass('half')") is None
    await db.close()


async def test_sql_functions_are_called_by_name_and_their_errors_are_classes(db):
    async with db.conn() as conn:
        assert await db.call_value(conn, "setting", "lease") == "30 s"
        assert await db.call_value(conn, "setting", name="depth_limit") == "32"
        with pytest.raises(UnknownHandler, match='no handler "nobody"'):
            await db.call(conn, "find_handler", "nobody")
        with pytest.raises(UnknownTable, match='no table "nothing"'), translating():
            await conn.execute("select anton.watch('nothing')")
        with pytest.raises(asyncpg.UndefinedFunctionError):
            await db.call(conn, "no_such_function")
    await db.close()


def test_sync_code_runs_coroutines_from_any_thread(db):
    assert db.run(value(db, "select 1")) == 1
    answers: list[object] = []
    threads = [threading.Thread(target=lambda n=n: answers.append(db.run(value(db, "select $1::int", n))))
               for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == list(range(8))  # type: ignore[type-var]


def test_the_sync_edge_refuses_to_wait_for_itself(db):
    async def inner() -> None:
        db.run(value(db, "select 1"))

    with pytest.raises(RuntimeError, match="await the coroutine"):
        db.run(inner())


def test_a_pool_closes_with_its_loop(db, server):
    async def several() -> None:
        await asyncio.gather(*(value(db, "select pg_backend_pid()") for _ in range(5)))

    asyncio.run(several())
    asyncio.run(several())
    left = f"select count(*) from pg_stat_activity where datname = '{db.name}'"
    wait_for(lambda: server.sql(left)[0][0] == 0)


def test_a_forked_child_has_connections_of_its_own(db):
    mine = db.run(value(db, "select pg_backend_pid()"))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(db.run(value(db, "select pg_backend_pid()"))).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    theirs = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    assert theirs != mine
    assert db.run(value(db, "select pg_backend_pid()")) == mine


def test_a_script_ends_without_a_word_about_open_connections(database):
    script = (f"import asyncio; from anton.db import Database; db = Database({database!r})\n"
              "async def one():\n  async with db.conn() as conn: return await conn.fetchval('select 1')\n"
              "print(db.run(one()), asyncio.run(one()))")
    done = subprocess.run([sys.executable, "-W", "default", "-c", script], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert (done.stdout, done.stderr) == ("1 1\n", "")


@pytest.mark.parametrize("url, says", [
    ("postgresql://u:hidden@127.0.0.1:1/shop", 'cannot reach database "shop" on 127.0.0.1:1 (from DATABASE_URL)'),
    ("postgresql:///shop?host=/nowhere&port=5", 'database "shop" on /nowhere:5'),
    ("mysql://x/shop", "invalid DSN"),
])
def test_an_unreachable_database_is_named_with_where_its_url_came_from(url, says):
    db = Database(url, source="DATABASE_URL")
    with pytest.raises(DatabaseUnreachable) as error:
        db.run(value(db, "select 1"))
    assert says in str(error.value) and "hidden" not in str(error.value) + repr(db)
    assert isinstance(error.value, WorldError)


def test_a_database_that_is_not_there_is_named(server):
    db = Database(server.url("nothing_here"), source="--database")
    with pytest.raises(DatabaseUnreachable, match='"nothing_here" does not exist'):
        db.run(value(db, "select 1"))


async def test_a_server_that_does_not_answer_is_tried_by_one_and_the_others_hear_of_it(monkeypatch):
    """Else each of a crowd would wait for its own connection to time out, some of them one after the other."""
    for name, seconds in (("CONNECT_SECONDS", 0.5), ("SLOW_SECONDS", 0.1), ("AWAY_SECONDS", 3600.0)):
        monkeypatch.setattr(f"anton.db.{name}", seconds)
    came: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: came.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    db = Database(f"postgresql://u@127.0.0.1:{port}/x?sslmode=disable", size=3)

    async def crowd(n: int) -> set[str]:
        said = await asyncio.gather(*(value(db, "select 1") for _ in range(n)), return_exceptions=True)
        assert {type(one) for one in said} == {DatabaseUnreachable}
        return {str(one).partition("): ")[2] for one in said}

    async def tried() -> int:
        """How many have come since the last look: who comes now is the last of them."""
        _, last = await asyncio.open_connection("127.0.0.1", port)
        await met(lambda: any(one.get_extra_info("peername") == last.get_extra_info("sockname") for one in came))
        for writer in (last, *came):
            writer.close()
        count = len(came) - 1
        came.clear()
        return count

    try:
        await crowd(20)
        assert await tried() == 3                                      # as many as the pool has places
        await crowd(20)
        assert await tried() == 0
        db._away = 0.0, "long ago"                                     # its time is over: one tries again
        await crowd(20)
        assert await tried() == 1
    finally:
        await db.close()
        silent.close()


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), asyncio.CancelledError()])
async def test_a_connection_that_breaks_while_it_is_set_up_is_not_left_open(database, error):
    came: list[Conn] = []

    class Breaks(Database):
        async def _set_up(self, conn: Conn) -> None:
            came.append(conn)
            raise error

    with pytest.raises((DatabaseUnreachable, asyncio.CancelledError)):
        await Breaks(database).connect()
    assert came[0].is_closed()


def test_the_process_database_is_the_one_that_was_set(db):
    assert current_database() is db
    other = Database("postgresql://elsewhere/x")
    set_database(other)
    assert current_database() is other


# Names

@pytest.mark.parametrize("name, parts, sql", [
    ("orders", (None, "orders"), "orders"), ("shop.orders", ("shop", "orders"), "shop.orders"),
    ("order", (None, "order"), '"order"'), ("Orders", (None, "Orders"), '"Orders"'),
    ('"a.b"', (None, "a.b"), '"a.b"'), ('"S x"."t""q"', ("S x", 't"q'), '"S x"."t""q"'),
    ("two words", (None, "two words"), '"two words"'),
])
def test_table_names_are_taken_as_written(name, parts, sql):
    assert split_name(name) == parts and identifier(name) == sql


@pytest.mark.parametrize("name", ["", "a.b.c", "a.", ".a", 'a"b'])
def test_a_name_that_cannot_be_one_is_refused(name):
    with pytest.raises(ValueError, match="is no table name"):
        split_name(name)


async def test_every_word_that_postgres_reserves_is_quoted(db):
    async with db.conn() as conn:
        words = [row[0] for row in await conn.fetch("select word from pg_get_keywords() where catcode <> 'U'")]
        assert set(words) <= KEYWORDS
        for text in ("plain", "Mixed", "order", "a b", 'q"q', "über", "1st"):
            assert await conn.fetchval(f"select {literal(text)} as {quote(text)}") == text
        assert await conn.fetchval("select " + literal("it's \\ 'quoted'")) == "it's \\ 'quoted'"
    await db.close()


# Errors

def test_a_slip_finds_what_was_meant():
    assert near("promtps", ["prompts", "orders"], 2) == "prompts"
    assert near("xyz", ["prompts"], 2) is None
    assert distance("ab", "ba") == 1 and distance("", "abc") == 3
    assert 'Did you mean "batch"?' in str(UnknownOption("bacth", 'handler "x"', ["batch", "each"]))


def test_errors_travel_between_processes_with_their_facts():
    error = pickle.loads(pickle.dumps(BadOption("batch", 0, 'handler "x"', "1 to 4096")))
    assert (error.option, error.value) == ("batch", 0)
    assert str(error) == 'batch=0 of handler "x" is not possible. Allowed: 1 to 4096.'
    assert SQLSTATES["NT001"] is LeaseLost


# PgBouncer

@pytest.fixture(scope="module")
def bouncer(server, tmp_path_factory) -> Iterator[str]:
    """The URL of a database of its own behind a pgbouncer in transaction mode."""
    name = server.clone("template1")
    with pooled(server, name, tmp_path_factory.mktemp("bouncer")) as url:
        yield url
    server.drop(name)


def test_every_call_works_through_a_transaction_pooler(bouncer):
    db = Database(bouncer, pooled=True, size=4)

    async def calls(n: int) -> None:
        async with db.conn() as conn:
            assert await conn.fetchval("select $1::int", n) == n
            assert await conn.fetchrow("select $1::jsonb as a, $2::text[] as b", {"n": n}, ["x"]) == ({"n": n}, ["x"])
            await conn.executemany("insert into passed values ($1, $2)", [(n, "many"), (n, "more")])
            await conn.copy_records_to_table("passed", records=[(n, "copied")])
            await conn.execute("update passed set s = s || '!' where n = $1", n)
        async with db.tx() as conn:
            await conn.execute("insert into passed values ($1, 'tx')", n)

    async def all_calls() -> int:
        async with db.conn() as conn:
            await conn.execute("create table passed (n int, s text)")
        await asyncio.gather(*(calls(n) for n in range(12)))
        async with db.conn() as conn:
            return int(await conn.fetchval("select count(*) from passed"))

    assert db.run(all_calls()) == 48
    db.run(db.close())


def test_migrate_works_through_a_transaction_pooler(bouncer, tmp_path):
    db, app = Database(bouncer, pooled=True), App("shop", tmp_path)
    with declaring(app):
        Table("orders").on_new_records.sql("select 1 from new_records", name="seen")
    asyncio.run(migrate(db, app))
    assert not asyncio.run(migrate(db, app, check=True)).drift
    db.run(value(db, "insert into orders default values"))
    assert db.run(value(db, "select count(*) from anton.job")) == 1
    db.run(db.close())


def reachable(db: Database) -> bool:
    try:
        return db.run(value(db, "select 1")) == 1
    except DatabaseUnreachable:
        return False


def wait_for(condition) -> None:
    """Asks again until it holds, for 10 s at most."""
    tick = threading.Event()
    for _ in range(200):
        if condition():
            return
        tick.wait(0.05)
    raise AssertionError("it never came true")
