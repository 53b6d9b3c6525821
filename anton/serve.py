"""Serve: the processes of `anton serve`.

    one            loads the app and serves it
    --workers N    parent: loads the app, to see that it can be; holds the socket; replaces who dies
                     └── N processes that load the app and serve it
    --reload       the same with one process, replaced when a file changes

SIGTERM and Ctrl-C finish the requests in flight, for at most 30 s. SIGHUP to a parent replaces its workers one by one.
When the parent is killed, its processes finish and end. No request is refused meanwhile: the socket stays open.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess
from uvicorn.supervisors.watchfilesreload import WatchFilesReload

from anton import flow, web
from anton.action import set_effects
from anton.app import App, load_app, while_loading
from anton.component import check_credentials
from anton.db import Database, set_database
from anton.errors import AntonError
from anton.secret import hush_clients

log = logging.getLogger("anton.serve")

LOG = "%(asctime)s %(levelname)s %(name)s  %(message)s"
WATCHED = ["*.py", "*.sql", "*.json", "*.md", "*.toml"]
_UNWATCHED = (".anton", ".venv", "node_modules")
_TOLD = "ANTON_SERVE"  # what a process is told: in the environment, for the URL may hold a password


def serve(db: Database, target: str | None = None, *, host: str = "127.0.0.1", port: int = 3000, workers: int = 1,
          reload: bool = False, folder: Path | str = ".") -> int:
    """Serves the app of the folder until SIGTERM or SIGINT; returns the exit status. port 0: any free one.

    target: the app's module. reload: anew when a file changes; workers count for nothing then. Raises ConfigError,
    and what loading the app raises, the latter not with reload: that waits for a change.
    """
    set_database(db)
    if not reload:
        app = _load(target, folder)
        if workers == 1:
            return _one(app, host, port)
        web.check_public(app, host)
    folder = Path(folder).resolve()
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    told = {"folder": str(folder), "module": target, "host": host, "url": db.dsn, "schema": db.schema,
            "pooled": db.pooled, "source": db.source, "say": _url(host, port) if reload else ""}
    os.environ[_TOLD] = json.dumps(told)
    options: dict[str, Any] = {**web.OPTIONS, "host": host, "port": port, "factory": True}
    try:
        if reload:
            logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells each file, also those nobody watches
            away = [str(place) for name in _UNWATCHED if (place := folder / name).is_dir()]
            config = uvicorn.Config("anton.serve:child", reload=True, reload_dirs=str(folder),
                                    reload_includes=WATCHED, reload_excludes=away, **options)
            WatchFilesReload(config, uvicorn.Server(config).run, [listening]).run()
            return 0
        print(f"{_url(host, port)}  {flow.endpoints(app)}", flush=True)
        parent = Workers(uvicorn.Config("anton.serve:child", workers=workers, **options), [listening])
        parent.run()
        return int(any(process.exitcode == STARTUP_FAILURE for process in parent.processes))
    finally:
        del os.environ[_TOLD]
        listening.close()


class Workers(Multiprocess):
    """Uvicorn's parent of several processes, which says so when it had to replace one."""

    def keep_subprocess_alive(self) -> None:
        before = {process.pid: process for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before.keys() - {process.pid for process in self.processes}:
            log.warning("the process %s that served died (%s) and was replaced", pid, before[pid].exitcode)


def child() -> ASGIApp:
    """The app in a process of a parent's, which tells it by the environment what to load."""
    told = json.loads(os.environ[_TOLD])
    logging.basicConfig(format=LOG, level=logging.INFO)
    hush_clients()
    web.own_lines()
    _end_with_parent()
    set_database(Database(told["url"], told["schema"], told["pooled"], source=told["source"]))
    try:
        app = _load(told["module"], told["folder"])
        web.check_public(app, told["host"])
        if told["say"]:
            print(f"{told['say']}  {flow.endpoints(app)}", flush=True)
        return web.asgi(app)
    except Exception as error:
        text = str(error) if isinstance(error, AntonError) else while_loading(error)
        if text is None:
            raise
        print(f"anton: {text}", file=sys.stderr, flush=True)
        sys.exit(STARTUP_FAILURE)


def _load(target: str | None, folder: Path | str) -> App:
    app = load_app(target, folder)
    set_effects("live")
    check_credentials(app)
    return app


def _one(app: App, host: str, port: int) -> int:
    server = web.server(app, host, port)

    async def run() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn, when done, raises the one that ended it again
            asyncio.get_running_loop().add_signal_handler(number, lambda: None)
        serving = asyncio.create_task(server.serve())
        if await flow.started(server, serving):
            print(f"{_url(host, web.port_of(server))}  {flow.endpoints(app)}", flush=True)
        await serving

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(run())
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                                         backlog=2048)
    except OSError as error:
        raise web.cannot_listen(host, port, error) from error
    listening.set_inheritable(True)
    return listening


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its processes to end; without it they would hold the port."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="anton-parent", daemon=True).start()
