"""Zygote: forks worker processes quickly, from one that has imported everything and done nothing.

    python -m chaos.zygote '{"url": …, "app": …, "log": …, "world": …, "files": …, "patched": {module: file}}'

Reads a line of JSON for each process to fork, answers with its pid. Ends when its input does, and its children with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any


class Planted:
    """Finds the modules that have a bug planted in them before those that are shipped."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What import asks."""
        file = self.files.get(name)
        return None if file is None else importlib.util.spec_from_file_location(name, file)


def main() -> None:
    """Until the input ends."""
    settings = json.loads(sys.argv[1])
    os.environ["CHAOS_FILES"] = "file://" + settings["files"]
    sys.meta_path.insert(0, Planted(settings["patched"]))
    import asyncpg  # noqa: F401
    import uvloop  # noqa: F401

    from anton import storage, supervisor, verbs  # noqa: F401
    from chaos import points

    points.install()
    sys.stdin.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    children: set[int] = set()
    print("ready", flush=True)
    data = b""
    while True:
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitpid(-1, os.WNOHANG)[0]:
                children.discard(ended)
        if not select.select([0], [], [], 0.05)[0]:
            continue
        got = os.read(0, 65536)
        if not got:
            break
        data += got
        while b"\n" in data:
            line, _, data = data.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                _be(settings, json.loads(line))
            children.add(pid)
            print(pid, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _be(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """The forked process: a supervisor with its workers, or a web server."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with the zygote
        out = os.open(settings["log"] + ".workers", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from anton import supervisor
        from anton.db import Database
        from chaos import points

        if given.get("net"):
            _enter(given["net"])
        if given.get("memory"):
            _limit(given["memory"])
        points.arm(given.get("point"), given.get("hits", 1), settings["log"], settings["world"])
        if given.get("skew"):
            real, skew = time.time, given["skew"]
            time.time = lambda: real() + skew
        db = Database(given.get("url") or settings["url"], pooled=given.get("pooled", False), source="chaos")
        if given.get("port"):
            status = _serve(db, settings["app"], given["port"])
        else:
            status = supervisor.work(
                db, folder=settings["app"], slots=given.get("slots"), lease=timedelta(seconds=given.get("lease", 1.0))
            )
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _enter(pid: int) -> None:
    """Into the network of another process."""
    with Path(f"/proc/{pid}/ns/net").open() as net:
        if ctypes.CDLL(None, use_errno=True).setns(net.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")


def _limit(megabytes: int) -> None:
    """How much more this process and its children may each take."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _serve(db: Any, folder: str, port: int) -> int:
    """The app's routes."""
    import asyncio

    from anton import web
    from anton.app import load_app
    from anton.db import set_database

    set_database(db)
    asyncio.run(web.server(load_app(folder=folder), port=port).serve())
    return 0


if __name__ == "__main__":
    main()
