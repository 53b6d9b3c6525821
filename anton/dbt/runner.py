"""Runner: the warm child process of a dbt project, seen from outside.

    async with Runner(...) as runner:
        done = await runner.invoke(["build", "--select", "revenue"], seconds=60, heard=print)

It starts with the first job (2 s, dbt's import), keeps the manifest, and starts anew after it died or after 500 jobs.
A cancelled or late job gets SIGINT, which cancels its query, and after 2 s SIGKILL; then its sessions are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Self

from anton.db import Database
from anton.dbt.profile import outputs, write_profile
from anton.errors import ConfigError, DbtFailed
from anton.share import share

JOBS = 500  # of one child
GRACE = 2.0  # seconds between SIGINT and SIGKILL
SCRATCH = "anton-dbt-"  # folders in the system's temp folder
LINE = 1 << 27  # bytes: the longest line, which holds what is known of the manifest
QUIET = ("--no-send-anonymous-usage-stats", "--no-version-check", "--no-use-colors", "--log-level", "none",
         "--log-level-file", "none")
BUILDS = ("run", "build", "seed", "snapshot")
ALONE = ("--no-populate-cache",)  # of one node; with several dbt has to know that a swapped table took its views along

Heard = Callable[[dict[str, Any]], None]
Logs = dict[str, list[str]]  # by node: what dbt said of it


@dataclass(frozen=True)
class Result:
    """One node of an invocation. status: dbt's: success, pass, warn, error, fail, skipped."""

    node: str
    name: str
    type: str
    status: str
    seconds: float
    message: str

    @property
    def ok(self) -> bool:
        """Whether it did what it was to do."""
        return self.status in ("success", "pass", "warn", "no-op")


@dataclass(frozen=True)
class Done:
    """What an invocation of dbt brought. error: why it broke, None when only nodes failed. lines: of `ls`.

    parse: it broke before anything was run, as the project cannot be read.
    """

    success: bool
    error: str | None = None
    parse: bool = False
    cancelled: bool = False
    results: list[Result] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    raw: list[Any] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    invocation: str | None = None


def note(logs: Logs, event: Mapping[str, Any]) -> None:
    """Adds what was heard to the log of the node that it is about."""
    if event.get("node") and event.get("text"):
        logs.setdefault(event["node"], []).append(event["text"])


def told(results: Iterable[Result], logs: Logs) -> list[dict[str, Any]]:
    """What dbt_finish() keeps of each node."""
    return [{"node": one.node, "status": one.status, "seconds": one.seconds, "message": one.message,
             "log": "\n".join(logs.get(one.node, ())) or None} for one in results]


class Died(Exception):
    """The child ended before its job did."""


class Runner:
    """A child for a project and a target. One job at a time; others wait.

    folder: the project's. home: where .anton is. schema: of the models.
    env: more of the child's environment.
    """

    def __init__(self, db: Database, folder: Path, home: Path, *, name: str, target: str, schema: str, threads: int,
                 env: Mapping[str, str] | None = None) -> None:
        self.db, self.folder, self.home = db, folder, home
        self.name, self.target, self.schema, self.threads = name, target, schema, threads
        self.env = dict(env or {})
        self.started = 0                                               # children so far
        self.migrated = True                                           # the runtime is in the database
        self._child: asyncio.subprocess.Process | None = None
        self._jobs = 0
        self._turn = asyncio.Lock()
        self._scratch: Path | None = None
        self._owned: IO[bytes] | None = None
        self._slot: IO[bytes] | None = None
        self._at: Path | None = None
        self._stderr: asyncio.Task[None] | None = None
        self._last: list[str] = []                                     # of what it printed
        self._token = secrets.token_hex(4)
        self._sessions = ""                                            # how those of the job are named

    @property
    def application(self) -> str:
        """The name of the lock for who builds this project, the same for every process. Its sessions in
        pg_stat_activity are named so with -build-… or -read-…, each command's for itself.
        """
        of = "\0".join((self.db.schema, self.name, self.target, self.schema))
        return "anton-dbt-" + hashlib.blake2b(of.encode(), digest_size=8).hexdigest()

    @property
    def pid(self) -> int | None:
        """The child's, None when there is none."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def manifest(self) -> dict[str, Any]:
        """What there is to know of the project, read again when a file of it changed. Raises DbtFailed."""
        done = await self.invoke(["parse"])
        if done.manifest is None:
            raise DbtFailed(f"dbt cannot read {self.folder}: {done.error}", project=self.name)
        return done.manifest

    async def invoke(self, args: Sequence[str], *, seconds: float | None = None, heard: Heard | None = None,
                     alone: bool = False, keep: bool = False, settings: Mapping[str, str] | None = None) -> Done:
        """One dbt command. heard: called with what happens. alone: it builds one node. keep: artefacts are written.

        settings: of the transactions that build.

        Raises DbtFailed when the child cannot start, or died twice.
        """
        async with self._turn:
            for attempt in (1, 2):
                try:
                    return await self._invoke(list(args), seconds, heard, alone, keep, settings)
                except Died as error:
                    await self._end()
                    with contextlib.suppress(Exception):               # where the database is away it has ended them
                        await self.end_sessions()
                    if attempt == 2:
                        raise DbtFailed(f"dbt's process died: {error}", project=self.name) from None
            raise AssertionError

    async def _invoke(self, args: list[str], seconds: float | None, heard: Heard | None, alone: bool,
                      keep: bool, settings: Mapping[str, str] | None) -> Done:
        if self._jobs >= JOBS:
            await self._end()
        child = await self._started()
        self._jobs += 1
        own = [*QUIET, "--project-dir", str(self.folder), "--profiles-dir", str(self._scratch), "--profile", "anton",
               "--target", self.target, "--target-path", str(self._at), "--log-path", str(self._at)]
        warm = (*(ALONE if alone else ()), *(() if keep else ("--no-write-json",))) if args[0] != "parse" else ()
        self._sessions = f"{self.application}-{'build' if args[0] in BUILDS else 'read'}-{self._token}{self.started:x}"
        job = {"id": self._jobs, "args": args, "parse_flags": own, "flags": [*own, *warm],
               "settings": dict(settings or {}), "application": self._sessions}
        assert child.stdin is not None
        with contextlib.suppress(ConnectionError):                     # its end is seen below
            child.stdin.write(json.dumps(job).encode() + b"\n")
            await child.stdin.drain()
        task = asyncio.ensure_future(self._answer(child, heard))
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if done:
                return task.result()
            await self._stop(child, task)
            return Done(False, f"it took longer than {seconds:g} s", cancelled=True)
        except asyncio.CancelledError:
            await self._stop(child, task)
            raise

    async def _answer(self, child: asyncio.subprocess.Process, heard: Heard | None) -> Done:
        assert child.stdout is not None
        invocation = None
        while line := await child.stdout.readline():
            said = json.loads(line)
            if said.get("id") != self._jobs:                           # of one before that was cancelled
                continue
            if said.get("done"):
                found = said["results"]
                rows = [one for one in found if isinstance(one, dict)]
                return Done(said["success"], said["error"], said.get("parse", False),
                            said.get("kind") in ("KeyboardInterrupt",), [Result(
                                one["node"], one["name"], one["type"], one["status"], one["seconds"], one["message"])
                                for one in rows], [one for one in found if isinstance(one, str)], rows,
                            said.get("manifest"), invocation)
            if "event" in said:
                invocation = said.get("invocation")
                if heard is not None:
                    heard(said)
        await child.wait()
        raise Died("\n".join(self._last[-5:]) or f"exit code {child.returncode}")

    async def _stop(self, child: asyncio.subprocess.Process, task: asyncio.Task[Done]) -> None:
        """Ends a job: SIGINT cancels its query; who does not hear it is killed, and its sessions end."""
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT)
        done, _ = await asyncio.wait({task}, timeout=GRACE)
        if not done:
            task.cancel()
            await self._end()
        elif task.exception() is not None:
            await self._end()
        with contextlib.suppress(Exception):                           # where the database is away the next run does
            await self.end_sessions()

    async def end_sessions(self) -> int:
        """Ends what sessions of its last job are left in the database, and nobody else's. How many there were."""
        if not self.migrated or not self._sessions:
            return 0
        async with self.db.conn() as conn:
            return int(await self.db.call_value(conn, "dbt_end_sessions", self._sessions) or 0)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        check_installed()
        if not (self.folder / "dbt_project.yml").is_file():
            raise ConfigError(f"there is no dbt_project.yml in {self.folder}. anton dbt init makes one",
                              folder=str(self.folder))
        await self._end()
        if self._scratch is None:
            sweep()
            self._scratch, self._owned = scratch()
            self._at = self._place()
        output, needed = outputs(self.db.dsn, self.schema, self.threads)
        write_profile(self._scratch, self.target, output)
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, **self.env, **needed, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
               "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", "DBT_SEND_ANONYMOUS_USAGE_STATS": "false"}
        assert self._at is not None
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "anton.dbt.child", str(self.folder), str(share("dbt_project") / "macros"),
            self.db.schema, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, env=env, cwd=self.folder, limit=LINE, start_new_session=True)
        self.started += 1
        self._jobs = 0
        self._last = []
        self._stderr = asyncio.create_task(self._listen(self._child))
        assert self._child.stdout is not None
        if not await self._child.stdout.readline():
            await self._child.wait()
            await asyncio.wait({self._stderr}, timeout=1)
            raise DbtFailed("dbt's process cannot start: " + "\n".join(self._last[-5:]), project=self.name)
        return self._child

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        """Keeps the last of what dbt prints, for errors; else a full pipe would stop it."""
        assert child.stderr is not None
        while chunk := await child.stderr.read(1 << 16):
            self._last = [*self._last, *chunk.decode(errors="replace").splitlines()][-50:]

    def _place(self) -> Path:
        """A folder for dbt's own files that no other process uses: slots, so that a partial parse is found again."""
        base = self.home / ".anton" / "dbt" / re.sub(r"\W+", "_", f"{self.name}_{self.target}")
        try:
            for slot in range(1000):
                place = base / str(slot)
                place.mkdir(parents=True, exist_ok=True)
                lock = (place / "lock").open("wb")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    continue
                self._slot = lock
                return place
        except OSError:                                                # a folder that may not be written to
            pass
        assert self._scratch is not None
        return self._scratch

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await child.wait()
        if self._stderr is not None:
            await asyncio.wait({self._stderr}, timeout=1)
        child._transport.close()  # type: ignore[attr-defined]  # asyncio leaves its pipes to the collector

    async def close(self) -> None:
        """Ends the child and forgets its profile."""
        child = self._child
        if child is not None and child.returncode is None and child.stdin is not None and not self._turn.locked():
            child.stdin.close()                                        # it leaves by itself
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), GRACE)
        await self._end()
        if self._slot is not None:
            self._slot.close()
            self._slot = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        if self._owned is not None:
            self._owned.close()
            self._owned = None


def scratch() -> tuple[Path, IO[bytes]]:
    """A new folder for this user alone, and the open lock in it that says that it is in use: see sweep()."""
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
    lock = (folder / "new").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")                           # nobody sees it unlocked
    return folder, lock


def sweep() -> None:
    """Removes the folders of processes that were killed, and no other: the kernel let go of their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):                             # in use, or half made
            if folder.lstat().st_uid != os.getuid():
                continue
            with (folder / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def check_installed() -> None:
    """Raises ConfigError when dbt is not installed, or is one that Anton cannot use."""
    try:
        metadata.version("dbt-postgres")
        check_version(metadata.version("dbt-core"))
    except metadata.PackageNotFoundError:
        check_version(None)


def check_version(found: str | None) -> None:
    """Raises ConfigError for a version of dbt-core that Anton cannot use; None: there is none."""
    wanted = "pip install 'anton-framework[dbt]'"
    if found is None:
        raise ConfigError(f"dbt-core with dbt-postgres is not installed. {wanted}")
    if int(found.partition(".")[0]) >= 2:
        raise ConfigError(f"dbt-core {found} is installed, which Anton cannot use: it has no Python API and no "
                          f"Postgres adapter. {wanted} brings 1.11")
