"""Server: the Postgres that benches run on, and databases of their own on it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from anton import embedded

Conn = psycopg.Connection[tuple[object, ...]]


class Server:
    """A running Postgres, by the URL of a database from which others can be made.

    postmaster: pid of the server when it runs on this machine, else None (no CPU figures then).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with psycopg.connect(url, autocommit=True) as conn:
            row = conn.execute("select pg_backend_pid(), current_setting('server_version')").fetchone()
            assert row is not None
            self.version = str(row[1])
            self.postmaster = _parent(int(str(row[0])))

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        """A new, empty database; yields its URL and drops it at the end."""
        name = f"bench_{name}"
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
            conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            url = urlsplit(self.url)
            yield f"{url.scheme}://{url.netloc}/{name}" + (f"?{url.query}" if url.query else "")
        finally:
            with psycopg.connect(self.url, autocommit=True) as conn:
                conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


@contextmanager
def server(database: str | None) -> Iterator[Server]:
    """The server at this URL, or the embedded one with its data in a new temporary folder."""
    if database:
        yield Server(database)
        return
    folder = Path(tempfile.mkdtemp(prefix="anton-bench-"))
    folder.chmod(0o755)  # run as root, the server runs as another account
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # last in, first out: the server stops before
    yield Server(embedded.start(folder))


def connect(url: str) -> Conn:
    """A connection in autocommit."""
    return psycopg.connect(url, autocommit=True)


def _parent(pid: int) -> int | None:
    """The postmaster of a backend on this machine."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None
    return int(fields[1]) if name == "postgres" and Path(f"/proc/{fields[1]}").is_dir() else None
