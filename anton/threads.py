"""Threads: where sync handlers run.

The threads are daemons: one that is stuck in user code is given up, and never keeps its process from ending
(those of concurrent.futures would).
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from anton.errors import WorldError

IDLE = 30.0  # seconds after which a thread without work ends


class NoThread(WorldError):
    """This process can make no more threads."""


class Threads:
    """Runs functions in threads for one event loop. Makes a thread when none is free: callers bound their number."""

    def __init__(self, name: str = "anton-handler") -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]] = queue.SimpleQueue()
        self._free = 0
        self._lock = threading.Lock()

    def submit(self, fn: Callable[[], Any]) -> asyncio.Future[Any]:
        """Starts fn in a thread. Cancelling the future gives the thread up; what fn then returns is dropped.

        Raises NoThread when none can be made.
        """
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            spare = self._free > self._tasks.qsize()
            self._tasks.put((fn, future))
        if not spare:
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except (RuntimeError, MemoryError) as error:               # no memory for its stack, or too many
                future.cancel()
                raise NoThread(f"no thread for a handler: {error}. Give the process more memory, or lower "
                                 "concurrency= and --slots.") from error
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                self._free += 1
            try:
                fn, future = self._tasks.get(timeout=IDLE)
            except queue.Empty:
                with self._lock:
                    self._free -= 1
                    if self._tasks.empty() or self._free:
                        return
                continue
            with self._lock:
                self._free -= 1
            if not future.cancelled():
                self._run(fn, future)
            del fn, future

    def _run(self, fn: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        try:
            result, error = fn(), None
        except BaseException as raised:
            result, error = None, raised
        try:
            future.get_loop().call_soon_threadsafe(_settle, future, result, error)
        except RuntimeError:                                           # the loop has ended: nobody waits
            pass


async def in_thread(fn: Callable[..., Any], *args: Any) -> Any:
    """What fn(*args) returns, from a thread that never keeps its process from ending. Cancelled, it is given up."""
    context = copy_context()
    return await _shared.submit(lambda: context.run(fn, *args))


_shared = Threads("anton-call")


def _afresh() -> None:
    global _shared
    _shared = Threads("anton-call")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_afresh)                        # a child has none of its parent's threads


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):                             # a future cannot carry it
        future.set_exception(RuntimeError(f"StopIteration: {error}"))
    else:
        future.set_exception(error)
