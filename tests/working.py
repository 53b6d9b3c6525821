"""What the tests of the worker share: an app made in the test, its database, and ways to wait for facts in it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from servers import free_port

from anton import Table, relation
from anton.app import App, declaring
from anton.db import Database, quote
from anton.migrate import migrate
from anton.testing import TestApp
from anton.worker import Worker

PATIENCE = 20.0


class Bench:
    """An app under test: `declare` is called with its declarations in force, then it is migrated."""

    def __init__(self, db: Database, app: App) -> None:
        self.db = db
        self.app = app

    @classmethod
    async def make(cls, db: Database, declare: Callable[[], Any], name: str = "t") -> Bench:
        app = App(name)
        with declaring(app):
            declare()
        await migrate(db, app)
        return cls(db, app)

    async def sql(self, text: str, *args: Any) -> list[Any]:
        async with self.db.conn() as conn:
            return await conn.fetch(text, *args)

    async def value(self, text: str, *args: Any) -> Any:
        rows = await self.sql(text, *args)
        return rows[0][0] if rows else None

    async def column(self, text: str, *args: Any) -> list[Any]:
        return [row[0] for row in await self.sql(text, *args)]

    async def add(self, table: str, rows: Iterable[dict[str, Any]]) -> None:
        """One statement that inserts documents."""
        await self.sql(f"insert into {table} (data) select v from jsonb_array_elements($1) v", list(rows))

    async def count(self, table: str) -> int:
        return int(await self.value(f"select count(*) from {table}"))

    def worker(self, **options: Any) -> Worker:
        return Worker(self.db, self.app, **options)

    async def work(self, **options: Any) -> None:
        await asyncio.wait_for(self.worker(**options).run_until_idle(), PATIENCE)

    async def advance(self, length: timedelta) -> None:
        """Moves anton.now(), from now on."""
        schema = quote(self.db.schema)
        seconds = await self.value(f"select extract(epoch from {schema}.now() - clock_timestamp())::float8")
        ahead = timedelta(seconds=seconds) + length
        await self.sql(f"create or replace function {schema}.now() returns timestamptz language sql volatile as "
                       f"$$select pg_catalog.clock_timestamp() + interval '{ahead.total_seconds()} s'$$")

    async def full_hour(self) -> None:
        """Moves anton.now() to the next full hour, so that what is due by the clock is not due by chance."""
        await self.advance(timedelta(seconds=3600 - await self.value(
            f"select extract(epoch from {quote(self.db.schema)}.now())::float8") % 3600))

    async def left(self) -> dict[str, int]:
        """What is not done, by state; {} when all is."""
        found = {name: await self.count(f"anton.{name}") for name in ("job", "lease", "delayed", "dead")}
        return {name: n for name, n in found.items() if n}

    async def until(self, text: str, *args: Any, patience: float = PATIENCE) -> Any:
        """Waits until the query's first value is true, and returns it."""
        end = time.monotonic() + patience
        while not (value := await self.value(text, *args)):
            if time.monotonic() > end:
                raise AssertionError(f"after {patience:g} s still not: {text}; left: {await self.left()}")
            await asyncio.sleep(0.01)
        return value

    async def until_done(self, patience: float = PATIENCE) -> None:
        await self.until("select not exists (select from anton.job) and not exists (select from anton.lease) "
                         "and not exists (select from anton.delayed)", patience=patience)

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator[Worker]:
        """A worker that runs meanwhile."""
        worker = self.worker(**options)
        task = asyncio.create_task(worker.run())
        try:
            await self.until("select exists (select from anton.worker where stopped_at is null and id = $1)",
                             await _id(worker))
            yield worker
        finally:
            worker.drain()
            await asyncio.wait_for(task, PATIENCE)


def morning(app: TestApp) -> None:
    """Moves the clock of the fixture `app` to one hour after the next midnight, so that no day ends by chance."""
    app.advance(90_000 - app.now.timestamp() % 86_400)


async def one_handler(db: Database, handle: Callable[..., Any], table: str = "a", **options: Any) -> Bench:
    def declare() -> None:
        Table("b")
        Table(table).on_new_records(**{"name": "handle", **options})(handle)

    return await Bench.make(db, declare)


def numbers(records: Any) -> list[int]:
    return [record["n"] for record in records]


async def met(condition: Callable[[], bool], patience: float = PATIENCE, pause: float = 0.005) -> None:
    """Waits until something in this process holds."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(pause)


async def _id(worker: Worker) -> int:
    end = time.monotonic() + PATIENCE
    while not worker.id:
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
    return worker.id


def forget(db: Database) -> None:
    """What the process knows of this database's tables."""
    relation.forget(db)


@asynccontextmanager
async def cutting(
    db: Database, when: bytes, hold: asyncio.Event | None = None
) -> AsyncIterator[tuple[Database, list[bytes]]]:
    """A database behind a wire that is cut right after it carried `when` to the server, while cuts are asked for.

    hold: the wire is not cut, the answer waits until this is set. b"COMMIT;": a BEGIN says "committed" too.
    """
    cuts: list[bytes] = []
    held: set[asyncio.StreamWriter] = set()

    async def pipe(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter, watch: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                if hold is not None and writer in held:
                    await hold.wait()
                cut = watch and bool(cuts) and when in data
                if cut:
                    cuts.pop()
                    if hold is not None:
                        held.add(other)
                writer.write(data)
                await writer.drain()
                if cut and hold is None:
                    other.transport.abort()                             # the answer never arrives
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = db.host, int(db.port)
        upstream = await (asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}") if host.startswith("/")
                          else asyncio.open_connection(host, port))
        await asyncio.gather(pipe(reader, upstream[1], writer, True), pipe(upstream[0], writer, writer, False))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Database(f"postgresql://postgres@127.0.0.1:{port}/{db.name}?sslmode=disable"), cuts
    finally:
        server.close()


@contextmanager
def pooled(server: Any, name: str, folder: Path, size: int = 2) -> Iterator[str]:
    """The URL of this database behind a pgbouncer in transaction mode, of `size` connections. name "*": any."""
    binary = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/opt/homebrew/bin")
    if binary is None:
        raise RuntimeError("no pgbouncer on this machine. Type: sudo apt-get install -y pgbouncer")
    parts = urlsplit(server.url("postgres" if name == "*" else name))
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    host, at = query.get("host") or parts.hostname or "localhost", query.get("port") or parts.port or 5432
    port = free_port()
    (folder / "users.txt").write_text('"postgres" ""\n')
    (folder / "bouncer.ini").write_text(
        f"[databases]\n{name} = host={host} port={at} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"logfile = {folder}/bouncer.log\n"
        f"auth_type = any\nauth_file = {folder}/users.txt\npool_mode = transaction\ndefault_pool_size = {size}\n"
    )
    for path in (folder, *folder.iterdir()):
        path.chmod(0o777)
    for parent in folder.parents:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    sock = Path(host) / f".s.PGSQL.{at}"                               # only its owner may use it
    user = ["-u", sock.owner() if sock.exists() else "nobody"] if os.geteuid() == 0 else []
    process = subprocess.Popen([binary, "-q", *user, str(folder / "bouncer.ini")], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.01)
        yield f"postgresql://postgres@127.0.0.1:{port}/{name}"
    finally:
        process.terminate()
        process.wait(PATIENCE)
