"""Dev: `anton dev`. One process watches the files, another runs the app and is replaced when they change.

    watch()  holds the database, waits for changes  ->  python -m anton.dev  migrates, serves, works, says what flows

What is being handled when a file changes is finished or given back: nothing is lost over a reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import watchfiles

from anton import config, flow, people, web
from anton.action import set_effects
from anton.app import App, load_app
from anton.component import check_credentials
from anton.db import Database, set_database
from anton.errors import AntonError
from anton.migrate import migrate
from anton.share import version
from anton.status import ask
from anton.worker import Worker

WATCHED = (".py", ".sql", ".json", ".md", ".toml")
PATIENCE = 15.0  # seconds for the old process to end
NOT_STARTED = 3  # exit code of a process whose app could not be loaded


def watch(settings: config.Config, target: config.Target, *, module: str | None, live: bool, port: int | None) -> int:
    """Runs the app of the folder and runs it anew when a file of it changes, until Ctrl-C. Returns the exit code."""
    port = settings.settings.deployment.port if port is None else port
    facts = {"folder": str(settings.folder), "url": target.url, "schema": target.schema, "pooled": target.pooled,
             "source": target.source, "module": module, "live": live, "port": port, "storage": settings.storage.name}
    where = "embedded, .anton/postgres" if target.embedded else config.hide_password(target.url)
    print(f"Anton {version()} · {settings.name} · {where} · "
          f"{'LIVE: effects are sent' if live else 'capturing: nothing leaves this machine'}", flush=True)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    env = {**os.environ, "ANTON_DEV": json.dumps(facts)}  # not on the command line: the URL may hold a password

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "anton.dev"], env=env)

    child = start()
    try:
        for changes in watchfiles.watch(settings.folder, watch_filter=_Watched(settings.folder), step=100,
                                        rust_timeout=500, yield_on_timeout=True, raise_interrupt=True):
            if changes:
                names = sorted({Path(name).relative_to(settings.folder).as_posix() for _, name in changes})
                print(f"changed: {', '.join(names[:5])}", flush=True)
                _end(child)
                child = start()
            elif child.poll() not in (None, NOT_STARTED):
                return 1 if child.returncode else 0                    # 0: Ctrl-C reached it before us
    except KeyboardInterrupt:
        return 0
    finally:
        _end(child)
    return 0


class _Watched(watchfiles.DefaultFilter):
    def __init__(self, folder: Path) -> None:
        super().__init__(ignore_dirs=[*watchfiles.DefaultFilter.ignore_dirs, ".anton", ".venv", "node_modules"])
        self._folder = folder

    def __call__(self, change: watchfiles.Change, path: str) -> bool:
        return path.endswith(WATCHED) and super().__call__(change, path)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def main() -> int:
    """The process that runs the app."""
    facts = json.loads(os.environ["ANTON_DEV"])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s  %(message)s", level=logging.WARNING)
    started = time.monotonic()
    try:
        app = load_app(facts["module"], facts["folder"])
        set_effects("live" if facts["live"] else "capture")
        check_credentials(app)
        db = Database(facts["url"], facts["schema"], facts["pooled"], source=facts["source"])
        set_database(db)
        return asyncio.run(_run(app, db, facts, started))
    except AntonError as error:
        print(f"anton: {error}\nWaiting for a change.", file=sys.stderr, flush=True)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename.startswith(facts["folder"])]
        print("".join(traceback.format_list(own or frames)) + f"{type(error).__name__}: {error}\nWaiting for a change.",
              file=sys.stderr, flush=True)
    return NOT_STARTED


async def _run(app: App, db: Database, facts: dict[str, Any], started: float) -> int:
    notes = (await migrate(db, app)).notes
    async with db.tx() as conn:
        await db.call(conn, "put_person", "you", None, None, ["*"])    # may decide everything here
    for note in notes:
        print(f"  {note}", flush=True)
    worker = Worker(db, app, capture=not facts["live"])
    server = web.server(app, "127.0.0.1", facts["port"])
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True
        worker.drain()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    working = asyncio.create_task(worker.run())
    serving = asyncio.create_task(server.serve())
    watching = asyncio.create_task(flow.follow(db, lambda text: print(text, flush=True)))
    if await flow.started(server, serving):
        async with db.conn() as conn:
            schedules = await ask(db, conn, "list_schedules")
            storage = f"{facts['storage']}  Postgres {conn.get_server_version().major}"
        url = f"http://localhost:{web.port_of(server)}"
        print(flow.banner(app, schedules, storage, url, time.monotonic() - started), flush=True)
        if any(action.approve for action in app.actions.values()):
            print(f"  Inbox            {await people.link(db, 'you', url)}   signs you in, once", flush=True)
    await serving
    worker.drain()
    await working
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    await db.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
