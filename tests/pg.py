"""Pg: the runtime as SQL alone sees it, for tests: a session, handlers put straight into the catalogue, what they get.

pg.listen("orders", "new")   puts a handler and writes the triggers
pg.events(handler)           claims and acks all it has, as Events in the order of its jobs
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

EVERYTHING = 1_000_000


@dataclass(frozen=True)
class Event:
    """A record as its handler gets it. key: an integer or a tuple; of a rebuild, what is said of it.

    old, new: images by column, None where none is.
    """

    op: str
    key: Any
    old: dict[str, Any] | None = None
    new: dict[str, Any] | None = None
    degraded: str | None = None


class Pg:
    """One session on a database that has the runtime."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.conn = psycopg.connect(url, autocommit=True)

    def sql(self, *statements: str, args: tuple[Any, ...] | None = None) -> list[tuple[Any, ...]]:
        """Runs each statement by itself; the rows of the last."""
        for statement in statements:
            done = self.conn.execute(statement, args)
        return done.fetchall() if done.description else []

    def value(self, statement: str, *args: Any) -> Any:
        """The first column of the first row."""
        return self.sql(statement, args=args or None)[0][0]

    def reset(self) -> None:
        """Takes away all tables of users and all that the runtime knows. A tenth of what a new database takes."""
        self.sql(
            "set search_path = anton, pg_catalog, pg_temp",
            """
          do $$
          declare f regprocedure; s name;
          begin
            for s in select nspname from pg_namespace where nspname !~ '^pg_|^information_schema$|^anton$' loop
              execute format('drop schema %I cascade', s);
            end loop;
            for f in select oid from pg_proc where pronamespace = 'anton'::regnamespace and proname ~ '^t[0-9]+_' loop
              execute format('drop function %s', f);
            end loop;
            perform set_config('anton.forget', 'on', true);            -- calls of actions are kept otherwise
            foreach s in array array['job', 'lease', 'delayed', 'debounce', 'change', 'receipt', 'output', 'dead',
                                     'fed', 'backfill', 'tick', 'schedule', 'action', 'worker', 'handler', 'dbt_result',
                                     'dbt_request', 'dbt_run', 'dbt_test', 'dbt_build', 'dbt_model', 'watched',
                                     'tenant'] loop
              execute format('delete from %I', s);
            end loop;
            delete from setting where name like 'xid of %';
          end $$""",
            "create or replace function now() returns timestamptz language sql volatile as"
            " $$ select pg_catalog.clock_timestamp() $$",
            "create schema public",
            "grant all on schema public to public",
            "reset search_path",
        )

    def clock(self, offset: str) -> None:
        """Moves the database's time to so much after the real one, until the next reset()."""
        body = f"select pg_catalog.clock_timestamp() + interval '{offset}'"
        self.sql(f"create or replace function anton.now() returns timestamptz language sql volatile as $${body}$$")

    @contextmanager
    def other(self, **settings: str) -> Iterator[Pg]:
        """Another session on the same database, with these settings."""
        other = Pg(self.url)
        try:
            for name, value in settings.items():
                other.sql(f"set {name} = '{value}'")
            yield other
        finally:
            other.conn.close()

    def put(self, name: str, table: str, *ops: str, **options: Any) -> int:
        """Puts a handler of Python into the catalogue and leaves the triggers as they are; its id."""
        definition = {"app": "test", "name": name, "table": table, "ops": ops, **options}
        return int(self.value("select anton.put_handler(%s)", json.dumps(definition)))

    def sync(self, table: str) -> None:
        """Writes the triggers of a table."""
        self.sql("select anton.sync_triggers(anton.watch(%s))", args=(table,))

    def listen(self, table: str, *ops: str, name: str = "", **options: Any) -> int:
        """Puts a handler and brings the triggers up to date; its id."""
        handler = self.put(name or f"h{random.getrandbits(32)}", table, *ops, **options)
        self.sync(table)
        return handler

    def claim(
        self, *handlers: int, jobs: int = EVERYTHING, records: int = EVERYTHING, lease: str = "30 s", worker: int = 1,
        turn: str | None = None
    ) -> tuple[int, list[Any]]:
        """The token and the rows of a claim. turn: the tenant that had the last one."""
        token = random.getrandbits(63)
        with self.conn.cursor(row_factory=psycopg.rows.namedtuple_row) as cursor:
            cursor.execute(
                "select * from anton.claim(%s, %s, %s::int[], %s::int[], %s::int[], %s::bigint[], %s::interval, "
                "false, %s::text[])",
                (
                    worker,
                    token,
                    list(handlers),
                    [jobs] * len(handlers),
                    [records] * len(handlers),
                    [0] * len(handlers),
                    lease,
                    [turn] * len(handlers),
                ),
            )
            return token, cursor.fetchall()

    def ack(self, token: int, *ids: int) -> int:
        """Settles jobs; the receipt."""
        return int(self.value("select anton.ack(%s, %s::bigint[], 1, 0)", token, list(ids)))

    def events(self, handler: int) -> list[Event]:
        """All that waits for a handler, claimed and acked."""
        token, jobs = self.claim(handler)
        found = [event for job in jobs for event in self._events(job)]
        for job in jobs:
            self.ack(token, job.id)
        return found

    def keys(self, handler: int, op: str | None = None) -> list[Any]:
        """The keys of events(), of one op or of all."""
        return [event.key for event in self.events(handler) if op in (None, event.op)]

    def _events(self, job: Any) -> list[Event]:
        images: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        if job.cols is not None:
            select = self.value("select anton.images_sql(%s, %s)", job.table_id, job.cols)
            with psycopg.RawCursor(self.conn) as cursor:
                rows = cursor.execute(select, ([job.change_id], [job.lo], [job.hi])).fetchall()
            for row in rows:
                images[row[1]] = (
                    dict(zip(job.cols, row[2::2], strict=True)),
                    dict(zip(job.cols, row[3::2], strict=True)),
                )
        out = []
        for ordinal in range(job.lo, job.hi + 1):
            new, old = images.get(ordinal, (None, None))
            key = job.ids[ordinal - job.lo] if job.ids else job.keys[ordinal - job.lo] if job.keys else None
            key = tuple(key) if isinstance(key, list) else key
            op = job.op.decode() if isinstance(job.op, bytes) else job.op
            out.append(Event(op, key, None if op == "n" else old, None if op == "d" else new, job.degraded))
        return out
