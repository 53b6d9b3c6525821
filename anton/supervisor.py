"""Supervisor: the processes of `anton work`.

    parent: loads the app, forks; no event loop, no thread, no connection kept
      ├── worker × N         a Worker each; one that dies is replaced, one with a stuck thread is drained and replaced
      └── suspects           only while there are jobs whose worker died: runs them one by one, and may die of it

A death that the parent saw frees the jobs at once, else they are free when their lease ends. When the parent is
killed its children die with it. First signal: drain. Second: stop now.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import asyncpg

from anton import queue
from anton.app import App, load_app
from anton.component import check_credentials
from anton.db import Database, set_database
from anton.errors import AntonError, NotMigrated
from anton.fate import starved
from anton.worker import GRACE, SLOTS, Worker

log = logging.getLogger("anton.supervisor")

PULSE = 2.0  # seconds between two signs of life of a child
DEAF = 60.0  # without one for so long, its interpreter is stuck: it has lost its leases and is killed
STUBBORN = GRACE + 15.0  # so long after it was told to drain it is killed: a handler blocks its loop
QUICK = 10.0  # a child that lived shorter is replaced after a pause
AGAIN = 0.2  # seconds between two starts of the process for suspects
CANNOT = 78  # exit status of a child that cannot start
SWITCH = 0.0005  # seconds that a handler's thread keeps the interpreter from the loop; Python's 5 ms add up

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SUSPECTS, REPLACE, ALIVE = b"s", b"r", b"."  # what a child says on its pipe, besides its worker id: b"w17\n"


@dataclass(eq=False)
class Child:
    """A forked process. worker: its id in the database, 0 before it registered. told: when to drain, 0: not yet."""

    kind: Literal["worker", "suspects"]
    pid: int
    pipe: int
    born: float
    worker: int = 0
    heard: float = 0.0
    replaced: bool = False
    told: float = 0.0
    text: bytes = b""


@dataclass(eq=False)
class Supervisor:
    """Keeps `processes` workers running. run() returns the exit status when all have ended after a signal."""

    db: Database
    app: App
    processes: int = 1
    slots: int = SLOTS
    lease: timedelta | None = None
    children: dict[int, Child] = field(default_factory=dict)
    signals: int = 0
    _quick: int = 0
    _suspected_at: float = 0.0
    _start_at: float = 0.0
    _failed: bool = False

    def run(self) -> int:
        """Forks, waits, replaces, until told to stop."""
        self._life, self._keep = os.pipe()
        bell, self._bell = socket.socketpair()
        for end in (bell, self._bell):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell, selectors.EVENT_READ)
        before = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        fd = signal.set_wakeup_fd(self._bell.fileno())
        try:
            while not self.signals and not self._failed or self.children:
                self._fill()
                for key, _ in self._selector.select(1.0):
                    if key.fileobj is bell:
                        with contextlib.suppress(BlockingIOError):
                            bell.recv(4096)
                    else:
                        self._hear(key.data)
                self._check()
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            for end in (bell, self._bell):
                end.close()
            os.close(self._life)
            os.close(self._keep)
        return 1 if self._failed else 0

    def _signalled(self, number: int, _: object) -> None:
        self.signals += 1
        tell = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[min(self.signals, 3) - 1]
        for child in self.children.values():
            child.told = child.told or time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, tell)

    def _fill(self) -> None:
        """As many workers as there should be; after a quick death not at once."""
        alive = sum(child.kind == "worker" and not child.replaced for child in self.children.values())
        if self.signals or self._failed or time.monotonic() < self._start_at:
            return
        for _ in range(self.processes - alive):
            self._fork("worker")

    def _fork(self, kind: Literal["worker", "suspects"]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)              # one that comes now is the parent's, or waits
        if self.signals:                                               # one came since: nobody would tell a new child
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return
        ear, mouth = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for other in (ear, self._keep, *(child.pipe for child in self.children.values())):
                    os.close(other)
                status = self._be(kind, mouth)
            except AntonError as error:
                print(f"anton: {error}", file=sys.stderr, flush=True)
                status = CANNOT
            except BaseException:
                logging.getLogger("anton.worker").exception("the worker ended")
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)                                       # a stuck thread keeps nobody waiting
        os.close(mouth)
        os.set_blocking(ear, False)
        child = Child(kind, pid, ear, time.monotonic(), heard=time.monotonic())
        self.children[pid] = child
        self._selector.register(ear, selectors.EVENT_READ, child)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)            # from here on who is told to stop tells it, too

    def _hear(self, child: Child) -> None:
        try:
            text = os.read(child.pipe, 4096)
        except BlockingIOError:
            return
        if not text:
            self._ended(child)
            return
        child.heard = time.monotonic()
        child.text += text
        while child.text:
            head = child.text[:1]
            if head == b"w":
                line, newline, rest = child.text[1:].partition(b"\n")
                if not newline:
                    return
                child.worker, child.text = int(line), rest
                continue
            child.text = child.text[1:]
            if head == SUSPECTS:
                self._suspects()
            elif head == REPLACE and not child.replaced:
                child.replaced, child.told = True, child.told or time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)

    def _suspects(self) -> None:
        """Starts the process that runs them, not at once again: they may not be to be had yet."""
        there = any(child.kind == "suspects" for child in self.children.values())
        if not there and not self.signals and time.monotonic() - self._suspected_at > AGAIN:
            self._suspected_at = time.monotonic()
            self._fork("suspects")

    def _ended(self, child: Child) -> None:
        """Its pipe is closed: it has died, or is about to."""
        self._selector.unregister(child.pipe)
        os.close(child.pipe)
        del self.children[child.pid]
        _, state = os.waitpid(child.pid, 0)
        status = os.waitstatus_to_exitcode(state)
        if status == CANNOT and not child.worker and child.kind == "worker":
            self._failed = True
            for other in self.children.values():
                os.kill(other.pid, signal.SIGTERM)
            return
        freed = 0
        if status != 0 and child.worker:
            log.warning("%s %s (pid %s) died: %s", child.kind, child.worker, child.pid,
                        signal.Signals(-status).name if status < 0 else f"exit {status}")
            freed = self._free(child.worker)
        if freed and not self.signals and not any(other.kind == "suspects" for other in self.children.values()):
            self._suspected_at = time.monotonic()
            self._fork("suspects")                                     # at once, whoever else may look
        if child.kind == "suspects":
            return
        quick = status != 0 and time.monotonic() - child.born < QUICK
        self._quick = self._quick + 1 if quick else 0
        if quick:
            self._start_at = time.monotonic() + min(5.0, 0.05 * 2**self._quick) * random.uniform(0.5, 1.0)

    def _free(self, worker: int) -> int:
        """Ends the leases of a worker that is dead; how many. 0 when the database is away: they end by themselves."""

        async def free() -> int:
            conn = await self.db.connect()
            try:
                return await queue.worker_died(self.db, conn, worker)
            finally:
                await conn.close(timeout=2)

        try:
            return asyncio.run(free())
        except Exception as error:
            log.warning("could not free the jobs of worker %s: %s", worker, error)
            return 0

    def _check(self) -> None:
        """Kills children whose interpreter is stuck, or whose loop is."""
        now = time.monotonic()
        for child in list(self.children.values()):
            if (child.worker and now - child.heard > DEAF) or (child.told and now - child.told > STUBBORN):
                log.warning("%s %s (pid %s) is stuck and is killed", child.kind, child.worker, child.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
                child.heard = child.told = now

    # In the child

    def _be(self, kind: Literal["worker", "suspects"], mouth: int) -> int:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)                                           # Ctrl-C reaches the parent alone
        threading.Thread(target=_pulse, args=(self._life, mouth), name="anton-pulse", daemon=True).start()

        def say(word: bytes) -> None:
            with contextlib.suppress(OSError):
                os.write(mouth, word)

        worker = Worker(self.db, self.app, slots=self.slots, lease=self.lease, on_stuck=lambda: say(REPLACE),
                        on_error=_end_starved, on_suspects=lambda: say(SUSPECTS),
                        started=lambda id: say(f"w{id}\n".encode()))
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)                             # rows come and go in batches, without cycles
        sys.setswitchinterval(SWITCH)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_told(worker, worker.run() if kind == "worker" else worker.run_suspects()))
        return 0


async def _told(worker: Worker, work: Coroutine[Any, Any, Any]) -> None:
    """Runs a worker that drains at SIGTERM and stops at SIGINT."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, worker.drain)
    loop.add_signal_handler(signal.SIGINT, worker.stop)
    loop.set_exception_handler(_failed)
    await work
    await worker.db.close()


def _failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a callback raised, which nobody waits for."""
    _end_starved(context.get("exception"))
    loop.default_exception_handler(context)


def _end_starved(error: BaseException | None) -> None:
    """Ends a process that has no memory left for its own work: its leases are free, and its successor starts empty."""
    if starved(error):
        try:
            log.error("worker: this process has no memory left, and ends")
        finally:
            os._exit(1)


def _pulse(life: int, mouth: int) -> None:
    """Tells the parent now and then that the interpreter runs; ends the process when the parent is gone."""
    with selectors.DefaultSelector() as selector:
        selector.register(life, selectors.EVENT_READ)
        while True:
            if selector.select(PULSE):
                os._exit(1)
            with contextlib.suppress(OSError):
                os.write(mouth, ALIVE)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:                                                # not on every system
        return None
    return uvloop.new_event_loop


def work(db: Database, target: str | None = None, *, folder: Path | str = ".", processes: int = 1,
         slots: int | None = None, lease: timedelta | None = None) -> int:
    """Loads the app and works its jobs in `processes` processes, until SIGTERM or SIGINT. Returns the exit status.

    slots: calls at a time in each. Raises DatabaseUnreachable, NotMigrated, and what loading the app raises.
    """
    set_database(db)
    app = load_app(target, folder)
    check_credentials(app)
    asyncio.run(_migrated(db))
    return Supervisor(db, app, processes, slots or SLOTS, lease).run()


async def _migrated(db: Database) -> None:
    conn = await db.connect()
    try:
        await db.call(conn, "worker_settings")
    except (asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError) as error:
        raise NotMigrated(db.schema, db.name) from error
    finally:
        await conn.close(timeout=2)
