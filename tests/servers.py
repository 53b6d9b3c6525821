"""Throw-away Postgres servers for tests: real ones, of both kinds that Anton promises to run on.

    embedded   the server of the wheel, as anton.embedded starts it
    system     a private cluster of the system's Postgres 15 or newer, with pg_cron, on a free port

Both run without fsync (tests kill processes, not machines) in a new folder, and are stopped and removed at the end.
It is in memory where there is room, as a database is cloned ten times as fast there; else, and with fsync, under the
temporary one. What a killed run leaves behind, the next one clears away.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

import anton.migrate
from anton import embedded
from anton.app import App
from anton.db import Database

PREFIX = "anton-test-"
MEMORY = Path("/dev/shm")  # where Linux has it
ROOM = 4 << 30  # bytes that are free there: two servers with the deepest queue take half of it
FAST = {"fsync": "off", "synchronous_commit": "on", "full_page_writes": "off", "max_connections": "200",
        "max_wal_size": "512MB"}
INSTALL = "apt-get install -y postgresql-15 postgresql-15-cron"


class NoServer(Exception):
    """This kind cannot run here; the text is the reason and what to type."""


class Server:
    """A running server. url(name) is the URL of a database on it; sql() runs statements as superuser."""

    def __init__(self, kind: str, folder: Path, base: str, bin: Path, settings: dict[str, str]) -> None:
        self.kind = kind
        self.folder = folder
        self.base = base  # the URL with {} for the database
        self.bin = bin
        self._strategy = "file_copy" if settings["fsync"] == "off" else "wal_log"  # its checkpoints cost nothing then
        self._clones = 0

    def url(self, database: str = "postgres") -> str:
        return self.base.format(database)

    def sql(self, *statements: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Runs each statement by itself; returns the rows of the last."""
        with psycopg.connect(self.url(database), autocommit=True) as conn:
            for statement in statements:
                done = conn.execute(statement)
            return done.fetchall() if done.description else []

    @property
    def version(self) -> int:
        """The major version."""
        return int(self.sql("show server_version_num")[0][0]) // 10000

    def clone(self, template: str) -> str:
        """A new database with all that is in the template; returns its name."""
        self._clones += 1
        name = f"t{os.getpid()}_{self._clones}"
        self.sql(f"create database {name} template {template} strategy {self._strategy}")
        return name

    def drop(self, name: str) -> None:
        self.sql(f"drop database if exists {name} with (force)")


@contextmanager
def running(kind: str, **settings: str) -> Iterator[Server]:
    """A server of its own, with these settings. Raises NoServer with the reason when there can be none."""
    _clear_leftovers()
    settings = {**FAST, **settings}
    made = Path(tempfile.mkdtemp(prefix="anton-new-", dir=_place(settings)))
    owner = _own(made)
    folder = made.rename(made.with_name(made.name.replace("anton-new-", PREFIX)))  # owned before others clear it away
    folder.chmod(0o755)  # the server's account must reach into it
    start = {"embedded": _start_embedded, "system": _start_system}[kind]
    try:
        yield start(folder, settings)
    finally:
        _remove(folder)
        os.close(owner)


def _start_embedded(folder: Path, settings: dict[str, str]) -> Server:
    base = embedded.start(folder).replace(f"/{embedded.DATABASE}?", "/{}?")
    server = Server("embedded", folder, base, embedded.postgres_bin(), settings)
    server.sql(*(f"alter system set {name} = '{value}'" for name, value in settings.items()))
    restart(server)
    return server


def _start_system(folder: Path, settings: dict[str, str]) -> Server:
    bin = system_bin()
    data = folder / "data"
    data.mkdir(mode=0o700)
    account = embedded.unprivileged(data)
    if account:
        os.chown(data, account.pw_uid, account.pw_gid)
    port = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": str(data),
        "timezone": "UTC",
        "max_prepared_transactions": "10",  # so that two-phase commit is tried; the doorbell is off where it can be
        **settings,
    }
    if has_cron(bin):
        settings |= {"shared_preload_libraries": "pg_cron", "cron.database_name": "postgres", "cron.host": str(data)}
    _run(data, bin / "initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N", "-D", str(data))
    with (data / "postgresql.conf").open("a") as conf:
        conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
    _pg_ctl(bin, data, "start")
    return Server("system", folder, f"postgresql://postgres@127.0.0.1:{port}/{{}}", bin, settings)


def restart(server: Server, mode: str = "fast") -> None:
    """Stops ("immediate": as a crash would) and starts the server on its data."""
    _pg_ctl(server.bin, _data(server.folder), "restart", "-m", mode)


def stop(server: Server, mode: str = "fast") -> None:
    _pg_ctl(server.bin, _data(server.folder), "stop", "-m", mode)


def start(server: Server) -> None:
    _pg_ctl(server.bin, _data(server.folder), "start")


def kill(server: Server) -> None:
    """Ends the server's first process by SIGKILL, and starts it on what that leaves."""
    os.kill(int((_data(server.folder) / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    end = time.monotonic() + 60
    while True:
        try:
            return restart(server, "immediate")
        except NoServer:                                               # they hold its memory until they have ended
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def log(server: Server) -> str:
    """What the system's server has logged."""
    return (_data(server.folder) / "server.log").read_text(errors="replace")


def system_bin() -> Path:
    """The newest Postgres of the system that is 15 or more. Raises NoServer."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/opt/homebrew/opt").glob("postgresql@*/bin")]
    places += [*Path("/usr/local/opt").glob("postgresql@*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    found = {int(re.sub(r"\D", "", place.parent.name) or 0): place for place in places if (place / "initdb").exists()}
    good = {version: place for version, place in found.items() if version >= 15}
    if not good:
        raise NoServer(f"no Postgres 15 or newer on this system; type: {INSTALL}")
    with_cron = {version: place for version, place in good.items() if has_cron(place)}
    return max((with_cron or good).items())[1]


def has_cron(bin: Path) -> bool:
    words = [str(bin / "pg_config"), "--sharedir"]
    folder = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return (Path(folder) / "extension" / "pg_cron.control").exists()


def free_port() -> int:
    """A port that nobody has, also while its server is being started again: none that connections are given."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _data(folder: Path) -> Path:
    return next(path for path in (folder / "data", folder / ".anton" / "postgres") if path.exists())


def _pg_ctl(bin: Path, data: Path, verb: str, *words: str) -> None:
    _run(data, bin / "pg_ctl", "-D", str(data), "-w", "-s", "-l", str(data / "server.log"), *words, verb)


def _run(data: Path, *words: str | Path) -> None:
    done = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        **embedded.as_account(embedded.unprivileged(data)),
    )
    if done.returncode:
        log = data / "server.log"
        raise NoServer(f"{words[0]} failed: {done.stderr}{log.read_text() if log.exists() else ''}")


def _own(folder: Path) -> int:
    """Marks the folder as in use for as long as this process lives."""
    owner = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return owner


def _remove(folder: Path) -> None:
    with suppress(StopIteration, NoServer):
        data = _data(folder)
        bin = system_bin() if data.name == "data" else embedded.postgres_bin()
        if (data / "postmaster.pid").exists():
            _pg_ctl(bin, data, "stop", "-m", "immediate")
    shutil.rmtree(folder, ignore_errors=True)


def _place(settings: dict[str, str]) -> Path:
    if settings["fsync"] == "off" and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
        return MEMORY
    return Path(tempfile.gettempdir())


def _clear_leftovers() -> None:
    for place in (MEMORY, Path(tempfile.gettempdir())):
        for folder in place.glob(PREFIX + "*"):
            with suppress(OSError):
                os.close(_own(folder))
                _remove(folder)


def migrate(url: str) -> None:
    """Makes Anton's runtime in a database."""

    async def run() -> None:
        db = Database(url, source="the tests")
        with tempfile.TemporaryDirectory() as folder:
            await anton.migrate.migrate(db, App("nothing", folder))

    asyncio.run(run())
