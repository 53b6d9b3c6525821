"""Db: the way to Postgres. asyncpg is used here and nowhere else by name.

    db = Database("postgresql://…/app")
    async with db.tx() as conn:                        # one transaction, READ COMMITTED
        rows = await db.call(conn, "claim", 1, token)  # select * from anton.claim($1, $2)
    db.run(coro)                                       # the one sync edge: a background thread with its own loop

A Database may be used from any thread and any event loop of a process: it keeps one pool for each
running loop, which closes with its loop, and starts anew in a forked child. JSON comes and goes as Python
values. Behind PgBouncer in transaction mode say pooled=True: nothing is prepared by name, and what is
called outside a transaction gets one.

Errors: DatabaseUnreachable, DatabaseTooOld; SQLSTATEs of class NT become the classes of errors.py;
all others are asyncpg's.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import orjson
from asyncpg.pool import Pool
from pydantic_core import to_jsonable_python

from anton.errors import AntonError, DatabaseTooOld, DatabaseUnreachable, from_sqlstate

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

T = TypeVar("T")
Conn: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

CONNECT_SECONDS = 10.0
SLOW_SECONDS, AWAY_SECONDS = 1.0, 2.0  # who failed to connect, and slowly, spares others to try for so long
OLDEST = 15  # Postgres
# The server, too, notices a client that vanished: else its locks stay, on jobs as well, for a kernel's two hours.
_KEEP_ALIVE = ("set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 3; set tcp_keepalives_count = 3; "
               "set tcp_user_timeout = 20000")
_NEVER = 2**31 - 1
_NO_CONNECTION = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError,
                  asyncpg.TooManyConnectionsError, asyncpg.InvalidAuthorizationSpecificationError,
                  asyncpg.InvalidCatalogNameError, asyncpg.ClientConfigurationError,
                  asyncpg.ObjectNotInPrerequisiteStateError)          # the last: it lets nobody in at the moment

# What Postgres 15-18 do not take as a bare name everywhere (pg_get_keywords, all but unreserved).
_WORDS = """
all analyse analyze and any array as asc asymmetric authorization between bigint binary bit boolean both case cast
char character check coalesce collate collation column concurrently constraint create cross current_catalog
current_date current_role current_schema current_time current_timestamp current_user dec decimal default deferrable
desc distinct do else end except exists extract false fetch float for foreign freeze from full grant greatest group
grouping having ilike in initially inner inout int integer intersect interval into is isnull join json json_array
json_arrayagg json_exists json_object json_objectagg json_query json_scalar json_serialize json_table json_value
lateral leading least left like limit localtime localtimestamp merge_action national natural nchar none normalize
not notnull null nullif numeric offset on only or order out outer overlaps overlay placing position precision
primary real references returning right row select session_user setof similar smallint some substring symmetric
system_user table tablesample then time timestamp to trailing treat trim true union unique user using values varchar
variadic verbose when where window with xmlattributes xmlconcat xmlelement xmlexists xmlforest xmlnamespaces
xmlparse xmlpi xmlroot xmlserialize xmltable
"""
KEYWORDS = frozenset(_WORDS.split())


@lru_cache(10_000)
def quote(name: str) -> str:
    """An SQL identifier: bare where that is safe, else in double quotes."""
    if re.fullmatch(r"[a-z_][a-z0-9_]*", name) and name not in KEYWORDS:
        return name
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """An SQL string literal (standard_conforming_strings is on)."""
    return "'" + text.replace("'", "''") + "'"


def split_name(name: str) -> tuple[str | None, str]:
    """("shop", "orders") of "shop.orders", (None, "orders") of "orders". Taken as written: "Orders" is not "orders".

    Double quotes keep a dot: '"a.b"' is one name. Raises ValueError for an empty or a three-part name.
    """
    if not re.fullmatch(r'(?:"(?:[^"]|"")+"|[^".]+)(?:\.(?:"(?:[^"]|"")+"|[^".]+))?', name):
        raise ValueError(f'"{name}" is no table name. Allowed: orders, shop.orders, "with.dot"')
    parts = re.findall(r'"(?:[^"]|"")+"|[^".]+', name)
    plain = [part[1:-1].replace('""', '"') if part.startswith('"') else part for part in parts]
    return (plain[0], plain[1]) if len(plain) == 2 else (None, plain[0])


def identifier(name: str) -> str:
    """A table name as users write it, quoted for SQL: shop.orders, "order"."""
    return ".".join(quote(part) for part in split_name(name) if part is not None)


class Json(bytes):
    """JSON text that is sent to a json or jsonb column as it is."""

    __slots__ = ()


def to_json(value: Any) -> bytes:
    """A value as JSON: datetimes, UUIDs, Decimals (as text), models and the like included.

    Raises TypeError for what JSON cannot hold, an integer beyond 64 bits included.
    """
    if isinstance(value, Json):
        return value
    return orjson.dumps(value, to_jsonable_python, orjson.OPT_NON_STR_KEYS)


def translated(error: BaseException) -> AntonError | None:
    """The class of errors.py for an SQLSTATE of class NT, its hint included; None for all other errors."""
    if not isinstance(error, asyncpg.PostgresError):
        return None
    hint = getattr(error, "hint", None)
    if hint and not hint.startswith("anton "):                         # a command stays as it is typed
        hint = hint[:1].upper() + hint[1:]
    return from_sqlstate(error.sqlstate, f"{error.args[0]}. {hint}" if hint else str(error.args[0]))


def lacks_runtime(schema: str, error: BaseException) -> bool:
    """Whether this says that the database lacks what `anton migrate` makes in the runtime's schema, or some of it."""
    named = f"{schema}." in str(error) or f'"{schema}"' in str(error)
    return named and str(getattr(error, "sqlstate", "")) in ("3F000", "42883", "42P01")   # no schema, function, table


def is_away(error: BaseException) -> bool:
    """Whether this says that the database is away: not reachable, starting, stopping, full, or the connection broke."""
    if isinstance(error, asyncpg.InterfaceError):                      # asyncpg's own; also raised for wrong arguments
        return not isinstance(error, ValueError) and "connection" in str(error)
    if isinstance(error, (DatabaseUnreachable, ConnectionError, asyncpg.InternalClientError)):
        return True                                                    # the last: it broke in the middle of a message
    return isinstance(error, asyncpg.PostgresError) and str(error.sqlstate)[:2] in ("08", "53", "57")


@contextmanager
def translating() -> Iterator[None]:
    """Raises the classes of errors.py for what SQL raises with a SQLSTATE of class NT."""
    try:
        yield
    except asyncpg.PostgresError as error:
        mine = translated(error)
        if mine is None:
            raise
        raise mine from error


class _Direct(asyncpg.Connection):
    """A connection whose pool resets nothing: Anton sets nothing beyond a transaction."""

    def get_reset_query(self) -> str:
        return ""


class _Pooled(_Direct):
    """Behind a transaction pooler each call needs a transaction, lest its steps reach two servers."""

    async def _in_tx(self, call: Callable[..., Awaitable[T]], args: Any, options: Any) -> T:
        if self.is_in_transaction():
            return await call(*args, **options)
        async with self.transaction(isolation="read_committed"):
            return await call(*args, **options)

    async def execute(self, *args: Any, **options: Any) -> str:
        if len(args) == 1:                                             # simple query: BEGIN itself, a CALL that commits
            return await super().execute(*args, **options)
        return await self._in_tx(super().execute, args, options)

    async def executemany(self, *args: Any, **options: Any) -> None:
        return await self._in_tx(super().executemany, args, options)

    async def fetch(self, *args: Any, **options: Any) -> list[Any]:
        return await self._in_tx(super().fetch, args, options)

    async def fetchrow(self, *args: Any, **options: Any) -> Any:
        return await self._in_tx(super().fetchrow, args, options)

    async def fetchval(self, *args: Any, **options: Any) -> Any:
        return await self._in_tx(super().fetchval, args, options)

    async def copy_records_to_table(self, *args: Any, **options: Any) -> str:
        return await self._in_tx(super().copy_records_to_table, args, options)


class Database:
    """One Postgres database, seen by one process.

    dsn: postgresql:// URL; None: the PG* environment variables. schema: where the runtime lives.
    pooled: behind a transaction pooler. size: most connections of one pool. source: where the dsn was said, for errors.
    """

    def __init__(self, dsn: str | None, schema: str = "anton", pooled: bool = False, *,
                 size: int = 10, source: str = "the caller") -> None:
        self.dsn = dsn
        self.schema = schema
        self.pooled = pooled
        self.size = size
        self.source = source
        self.host, self.port, self.name = _where(dsn)
        self._pools: dict[asyncio.AbstractEventLoop, tuple[Pool[asyncpg.Record], AsyncGenerator[None]]] = {}
        self._lock = threading.Lock()
        self._sql: dict[tuple[str, int, tuple[str, ...]], str] = {}
        self._away: tuple[float, str] | None = None                    # until when nobody tries to connect, and why
        _databases.add(self)

    def __repr__(self) -> str:
        return f"Database({self.name!r} on {self.host}:{self.port}, schema={self.schema!r})"

    async def connect(self, database: str | None = None) -> asyncpg.Connection[asyncpg.Record]:
        """A connection of its own, for LISTEN and session locks. The caller closes it.

        database: another one of the same cluster.
        """
        with self._reachable():
            conn: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
                self.dsn, database=database, timeout=CONNECT_SECONDS, **self._how())
            try:
                await self._set_up(conn)
            except BaseException:                                      # the server went away meanwhile, or who asked
                conn.terminate()
                raise
            return conn

    @asynccontextmanager
    async def conn(self) -> AsyncIterator[PoolConnectionProxy[asyncpg.Record]]:
        """A connection from this loop's pool; waits when all `size` are out."""
        pool = await self._pool()
        with self._reachable():
            conn = await pool.acquire()
        try:
            yield conn
        finally:
            await pool.release(conn)

    @asynccontextmanager
    async def tx(self) -> AsyncIterator[PoolConnectionProxy[asyncpg.Record]]:
        """A connection inside a READ COMMITTED transaction; nothing is retried."""
        async with self.conn() as conn, conn.transaction(isolation="read_committed"):
            yield conn

    async def call(self, conn: Conn, function: str, *args: Any, **named: Any) -> list[asyncpg.Record]:
        """The rows of one of the runtime's SQL functions. named: p_<name> => value."""
        key = (function, len(args), tuple(named))
        sql = self._sql.get(key)
        if sql is None:
            given = [f"${n + 1}" for n in range(len(args))]
            given += [f"{quote('p_' + name)} => ${n + 1}" for n, name in enumerate(named, len(args))]
            sql = self._sql[key] = f"select * from {quote(self.schema)}.{quote(function)}({', '.join(given)})"
        try:
            return await conn.fetch(sql, *args, *named.values())
        except asyncpg.PostgresError as error:
            mine = translated(error)
            if mine is None:
                raise
            raise mine from error

    async def call_value(self, conn: Conn, function: str, *args: Any, **named: Any) -> Any:
        """The first column of the first row, None when there is no row."""
        rows = await self.call(conn, function, *args, **named)
        return rows[0][0] if rows else None

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the process's background loop and waits for it. Callable from any other thread."""
        return portal().run(coro)

    async def close(self) -> None:
        """Closes this loop's pool. Those of other loops close with their loops."""
        entry = self._pools.pop(asyncio.get_running_loop(), None)
        if entry is not None:
            await entry[1].aclose()

    async def _pool(self) -> Pool[asyncpg.Record]:
        loop = asyncio.get_running_loop()
        entry = self._pools.get(loop)
        if entry is not None:
            return entry[0]
        with self._lock:
            for old in [old for old in self._pools if old.is_closed()]:
                del self._pools[old]
        with self._reachable():
            pool = await asyncpg.create_pool(
                self.dsn, min_size=0, max_size=self.size, max_queries=_NEVER, init=self._set_up,
                connect=self._connect, timeout=CONNECT_SECONDS, **self._how())
        guard = _close_with_loop(pool)
        await anext(guard)
        with self._lock:
            kept = self._pools.setdefault(loop, (pool, guard))
        if kept[0] is not pool:                                        # another task was quicker
            await guard.aclose()
        return kept[0]

    async def _connect(self, *args: Any, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
        """A new connection of a pool. Where the last one failed slowly, one caller tries and the others hear of it.

        Else each would wait for a server that does not answer, one after the other.
        """
        begun, away = time.monotonic(), self._away
        if away is not None:
            if begun < away[0]:
                raise ConnectionError(away[1])
            self._away = begun + CONNECT_SECONDS, away[1]
        try:
            conn: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(*args, **options)
        except (OSError, asyncpg.PostgresError) as error:              # TimeoutError is an OSError
            slow, why = time.monotonic() - begun >= SLOW_SECONDS, str(error) or type(error).__name__
            self._away = (time.monotonic() + AWAY_SECONDS, why) if slow else None
            raise
        except BaseException:                                          # whoever asked has left
            self._away = away
            raise
        self._away = None
        return conn

    def _how(self) -> dict[str, Any]:
        if self.pooled:
            return {"connection_class": _Pooled, "statement_cache_size": 0}
        return {"connection_class": _Direct}

    async def _set_up(self, conn: Conn) -> None:
        version = conn.get_server_version()
        if version.major < OLDEST:
            raise DatabaseTooOld(f"{version.major}.{version.minor}")
        if _keep_alive(conn) and not self.pooled:
            await conn.execute(_KEEP_ALIVE)
        await conn.set_type_codec("jsonb", schema="pg_catalog", format="binary",
                                  encoder=lambda value: b"\x01" + to_json(value),
                                  decoder=lambda data: orjson.loads(data[1:]))
        await conn.set_type_codec("json", schema="pg_catalog", format="binary", encoder=to_json, decoder=orjson.loads)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except _NO_CONNECTION as error:
            reason = str(error) or type(error).__name__
            raise DatabaseUnreachable(self.host, self.port, self.name, self.source, reason) from error


async def _close_with_loop(pool: Pool[asyncpg.Record]) -> AsyncGenerator[None]:
    """Closes the pool when it is closed itself, which an ending loop does (shutdown_asyncgens)."""
    try:
        yield
    finally:
        try:
            await asyncio.wait_for(pool.close(), 2)
        except TimeoutError:
            pool.terminate()


def _keep_alive(conn: Conn) -> bool:
    """A server that vanished is noticed in about 20 s. False when there is no network between."""
    transport = getattr(conn, "_transport", None)
    sock = transport.get_extra_info("socket") if transport else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return True


def _where(dsn: str | None) -> tuple[str, str, str]:
    """Host, port and database of a URL, PG* variables where it is silent. Never the password."""
    parts = urlsplit(dsn or "")
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    hosts = parts.netloc.rpartition("@")[2]
    alone = re.fullmatch(r"(.*?)(?::(\d+))?", hosts) if "," not in hosts else None
    host = query.get("host") or (unquote(alone[1]) if alone else hosts) or os.environ.get("PGHOST") or "localhost"
    port = query.get("port") or (alone[2] if alone else "") or os.environ.get("PGPORT") or "5432"
    user = unquote(parts.username or "") or query.get("user") or os.environ.get("PGUSER") or ""
    name = unquote(parts.path.lstrip("/")) or query.get("dbname") or os.environ.get("PGDATABASE") or user
    return host, port, name


class Portal:
    """A daemon thread with an event loop, through which sync code runs coroutines."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._main, name="anton-portal", daemon=True)
        self.thread.start()

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        if threading.current_thread() is self.thread:
            coro.close()
            raise RuntimeError("db.run() inside the loop that it would wait for: await the coroutine instead")
        # in no context: a connection keeps the one it was made in, with all that a handler was called with
        future = contextvars.Context().run(asyncio.run_coroutine_threadsafe, coro, self.loop)
        try:
            return future.result()
        except BaseException:                                          # Ctrl-C while waiting: take the work along
            future.cancel()
            raise

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(3)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_lock = threading.Lock()
_portal: Portal | None = None
_current: Database | None = None
_resolve: Callable[[], Database] | None = None
_inherited: list[Any] = []


def portal() -> Portal:
    """The process's one Portal, started at first use."""
    global _portal
    if _portal is None:
        with _lock:
            if _portal is None:
                _portal = Portal()
    return _portal


def set_database(database: Database | None) -> None:
    """What current_database() returns in this process; None: ask the resolver again."""
    global _current
    _current = database


def set_resolver(resolve: Callable[[], Database]) -> None:
    """How to find the database when nobody has set one: anton.config's order of flag, environment, file, embedded."""
    global _resolve
    _resolve = resolve


def current_database() -> Database:
    """The process's database: the one that was set, else the configured one."""
    global _current
    if _current is None:
        if _resolve is None:
            raise DatabaseUnreachable("?", "?", "?", "nowhere", "no database was named")
        _current = _resolve()
    return _current


@atexit.register
def _close_portal() -> None:
    if _portal is not None and _portal.thread.is_alive():
        _portal.stop()


def _after_fork() -> None:
    """The parent's sockets and selectors are not ours: keep them unused, so that nothing closes or unregisters them."""
    global _portal, _lock
    _inherited.append(_portal)
    _portal = None
    _lock = threading.Lock()
    for database in list(_databases):
        _inherited.append(database._pools)
        database._pools = {}
        database._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
