"""PostgresWrite: rows in another database of a real server."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from anton_components.vendor.postgres.action import PostgresWrite
from desk import sql

from anton import Table
from anton.app import App, declaring
from anton.errors import BadOption


@pytest.fixture
def other(bare: str) -> Iterator[Any]:
    """The other database: sales."orders of all", and its URL."""
    with psycopg.connect(bare, autocommit=True) as conn:
        conn.execute('create schema sales; create table sales."orders of all" (id int primary key, total numeric(9,2) '
                     "not null check (total >= 0), tags text[], at timestamptz default now(), more jsonb)")
        conn.url = bare                                                # type: ignore[attr-defined]
        yield conn


def write(live: Any, url: str, *records: dict[str, Any], to: str = "sales.orders of all", **options: Any) -> None:
    with declaring(live.app):
        orders = Table("orders")
        given = {"row": {"id": "{number}", "total": "{total}", "tags": "{tags}", "more": "{more}"}, **options}
        orders.on_new_records(PostgresWrite(url, to, **given))
    live.migrate()
    orders.extend({"number": 1, "total": "4.50", "tags": ["a", "b,c"], "more": {"x": [1]}, **one} for one in records)
    live.run()


def states(live: Any) -> list[str]:
    return [call.state for call in live.calls]


def rows(other: Any) -> list[Any]:
    return other.execute('select id, total::text, tags, more from sales."orders of all" order by id').fetchall()


def test_a_row_is_written_with_the_types_of_its_table(live, other):
    write(live, other.url, {})
    assert rows(other) == [(1, "4.50", ["a", "b,c"], {"x": [1]})] and states(live) == ["sent"]
    assert other.execute('select at is not null from sales."orders of all"').fetchone() == (True,)


def test_with_unique_a_row_that_is_there_is_replaced(live, other):
    write(live, other.url, {}, unique=["id"])
    live.tables["orders"].append({"number": 1, "total": 7, "tags": None, "more": None})
    live.run()
    assert rows(other) == [(1, "7.00", None, None)]


@pytest.mark.parametrize("record", [{"number": "x"}, {"total": -1}, {"total": None}, {"total": "1'); drop table x--"}])
def test_a_row_that_is_refused_is_a_dead_letter(record, live, other):
    write(live, other.url, record)
    assert states(live) == ["failed"] and len(live.dead) == 1 and rows(other) == []


def test_a_second_row_without_unique_is_refused(live, other):
    write(live, other.url, {}, {})
    assert sorted(states(live)) == ["failed", "sent"]


def test_what_is_missing_there_holds_calls_up_and_blames_none(live, other):
    write(live, other.url, {}, to="sales.gone")
    assert states(live) == ["retrying"] and not live.dead
    other.execute('alter table sales."orders of all" rename to gone')
    live.advance("1h")
    assert states(live) == ["sent"]


class Wire(socketserver.ThreadingTCPServer):
    """Between: ends the connection in place of the answer to the first statement with a row."""

    allow_reuse_address = daemon_threads = True
    target: Any = None                                                 # the server's, or its socket file
    cuts = 1


class _Link(socketserver.BaseRequestHandler):
    server: Wire

    def handle(self) -> None:
        target, cutting = self.server.target, threading.Event()
        with socket.socket(socket.AF_UNIX if isinstance(target, str) else socket.AF_INET) as out:
            out.connect(target)
            def back() -> None:
                while data := out.recv(65536):
                    if cutting.is_set() and b"INSERT" in data:         # it is committed, and nobody hears of it
                        self.server.cuts -= 1
                        self.request.shutdown(socket.SHUT_RDWR)
                        return
                    self.request.sendall(data)

            thread = threading.Thread(target=back, daemon=True)
            thread.start()
            try:
                while data := self.request.recv(65536):
                    if b"insert into" in data and self.server.cuts:
                        cutting.set()
                    out.sendall(data)
            except OSError:
                pass
            out.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("unique, state", [((), "unknown"), (["id"], "sent")])
def test_whether_a_row_is_there_is_unknown_when_the_answer_is_lost(unique, state, live, other):
    parts = urlsplit(other.url)
    with psycopg.connect(other.url) as conn:
        host, port = conn.info.host, conn.info.port
    with Wire(("127.0.0.1", 0), _Link) as wire:
        wire.target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        thread = threading.Thread(target=wire.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        user = parts.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{wire.server_address[1]}" if user else f"127.0.0.1:{wire.server_address[1]}"
        write(live, urlunsplit(parts._replace(netloc=netloc)), {}, unique=unique)
        assert wire.cuts == 0
        live.advance("1h")
        wire.shutdown()
        thread.join()
    assert states(live) == [state] and len(rows(other)) == 1


def test_a_database_that_is_away_holds_calls_up_and_its_password_is_not_shown(live, other):
    write(live, "postgresql://ann:never-to-be-seen@127.0.0.1:1/x", {})
    assert states(live) == ["retrying"] and "never-to-be-seen" not in str(live.calls)


@pytest.mark.parametrize("table, more", [("public.secrets", {}), ("sales.orders of all", {"at": "2000-01-01"})])
def test_a_call_by_psql_chooses_no_other_table_and_no_other_columns(table, more, live, other):
    other.execute("create table public.secrets (id int)")
    write(live, other.url, {}, unique=["id"])
    (call,) = live.calls
    sql(live, "insert into anton.action (app, name, args) values ($1, 'PostgresWrite', $2)", live.app.name,
        {"table": table, "row": {**call.row, "id": 2, **more}})
    live.run()
    assert states(live) == ["sent", "refused"] and len(rows(other)) == 1


def test_what_cannot_be_is_refused_where_it_is_declared():
    with declaring(App("w")):
        with pytest.raises(BadOption, match="a table"):
            PostgresWrite("postgresql://x", "a.b.c")
        with pytest.raises(BadOption, match="columns of row="):
            PostgresWrite("postgresql://x", "a", {"id": "{id}"}, unique=["n"])
