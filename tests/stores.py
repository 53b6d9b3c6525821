"""What the tests of files share: storages of both kinds, and an app in a folder of its own that has them.

    disk   file://data in the app's folder
    s3     s3://bucket/some/where on moto's server, which speaks S3 over HTTP
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psycopg
from moto.server import ThreadedMotoServer

from anton import config
from anton.app import App, declaring
from anton.db import Database
from anton.migrate import migrate
from anton.plan import Plan
from anton.storage import Storage, open_storage
from anton.worker import Worker


@contextmanager
def s3_server() -> Iterator[str]:
    """A server with one empty bucket, "bucket". Yields its endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        client(endpoint).create_bucket(Bucket="bucket")
        yield endpoint
    finally:
        server.stop()


def client(endpoint: str) -> Any:
    """Another S3 client than ours."""
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key",
                        aws_secret_access_key="secret")


def settings(endpoint: str, url: str = "s3://bucket/some/where") -> dict[str, Any]:
    """An autonomous.json with both storages; the secret is in the variable S3_SECRET."""
    s3 = {"endpoint": endpoint, "access_key_id": "key", "secret_access_key": "env:S3_SECRET"}
    return {"name": "store", "storages": [{"name": "disk", "type": "files", "url": "file://data"},
                                          {"name": "s3", "type": "files", "url": url, "options": s3}]}


class Store:
    """An app with both storages, on a database of its own. kind: the one a test is about."""

    def __init__(self, db: Database, folder: Path, endpoint: str, kind: str) -> None:
        self.db, self.folder, self.kind, self.endpoint = db, folder, kind, endpoint
        (folder / "autonomous.json").write_text(json.dumps(settings(endpoint, f"s3://bucket/{folder.name}")))
        self.app = App("store", folder)
        self.app.settings = config.load(folder).settings

    @property
    def storage(self) -> Storage:
        return open_storage(self.app, self.kind)

    def declare(self, code: Callable[[], Any]) -> Any:
        """Starts over with this code, and migrates."""
        self.app.clear()
        self.app.settings = config.load(self.folder).settings
        with declaring(self.app):
            made = code()
        self.migrate()
        return made

    def migrate(self) -> Plan:
        return asyncio.run(migrate(self.db, self.app))

    def put(self, path: str, data: bytes | str) -> None:
        self.db.run(self.storage.write(path, data.encode() if isinstance(data, str) else data))

    def drop(self, path: str) -> None:
        self.db.run(self.storage.delete(path))

    def work(self) -> None:
        """Everything that is due."""
        self.db.run(Worker(self.db, self.app).run_until_idle())

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(str(self.db.dsn), autocommit=True) as conn:
            for statement in statements:
                done = conn.execute(statement)
            return done.fetchall() if done.description else []
