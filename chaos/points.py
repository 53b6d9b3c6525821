"""Points: named places in a worker's process where it is stopped, for the harness to kill it there or to wake it late.

install() wraps functions of the worker from outside. A process that reaches its point notes it in a file and stops
itself (SIGSTOP, all threads); what happens then is up to the harness.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

POINTS = (
    "after_claim",
    "mid_handler",
    "mid_each",
    "before_ack",
    "before_commit",
    "commit_sent_no_reply",
    "after_commit",
    "reaper_mid",
)
SESSIONS = "sessions"  # no place: nobody stops, and each ack is noted with its session
LATE = 3.0  # seconds at most that a worker which woke at before_late_ack waits for its heart to beat

_armed: str | None = None
_hits = 1
_left = 1
_log = -1
_world: Path | None = None
_calm: Path | None = None
_beat = threading.Event()  # a heartbeat was answered
_woken: set[tuple[int, ...]] = set()  # token and ids of acks that were held up; noted once, also when tried again


def arm(point: str | None, hits: int, log: str, world: str) -> None:
    """Stops this process's workers each time they come to `point` for about the hits-th time."""
    global _armed, _hits, _left, _log, _world, _calm
    _armed, _hits, _left = point, hits, hits
    _log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _world, _calm = Path(world), Path(log + ".calm")
    os.register_at_fork(after_in_child=_again)


def _again() -> None:
    """A worker that was forked: how often it passes first is its own."""
    global _left
    _left = Random(os.getpid()).randint(1, _hits)


def world_is_down() -> bool:
    """What the handler `call` needs is away."""
    return _world is not None and _world.exists()


def note(what: str, **more: Any) -> None:
    """A line in the harness's file; one write, so that lines of several processes do not mix."""
    line = json.dumps({"at": time.time(), "pid": os.getpid(), "what": what, **more})
    os.write(_log, line.encode() + b"\n")


def reach(point: str, **more: Any) -> bool:
    """Stops here if it is this point's turn and the harness has not asked for calm; True after it was woken."""
    global _left
    if point != _armed or (_calm is not None and _calm.exists()):
        return False
    _left -= 1
    if _left > 0:
        return False
    _left = _hits
    note("stopped", point=point, **more)
    os.kill(os.getpid(), signal.SIGSTOP)
    return True


Call = Callable[..., Awaitable[Any]]


def install() -> None:
    """Puts the points into the worker's modules."""
    import asyncpg

    from anton import load, queue, schedule, worker
    from anton.doorbell import Answer, Doorbell
    from anton.errors import LeaseLost
    from anton.settle import Settler

    def after(point: str, call: Call, some: bool = False) -> Call:
        async def wrapped(*args: Any, **named: Any) -> Any:
            found = await call(*args, **named)
            if found or not some:
                reach(point)
            return found

        return wrapped

    def fenced(call: Call) -> Call:
        async def wrapped(db: Any, conn: Any, token: int, *args: Any) -> Any:
            ids = args[0] if isinstance(args[0], list) else [args[0]]
            this = (token, *ids)
            if reach("before_ack", token=token, ids=ids):
                _woken.add(this)
            if _armed == SESSIONS:
                note("acking", token=token, session=conn.get_server_pid())
            if reach("before_late_ack", token=token, ids=ids):
                _woken.add(this)
                _beat.clear()
                await asyncio.to_thread(_beat.wait, LATE)
            try:
                found = await call(db, conn, token, *args)
            except LeaseLost:
                if _armed == SESSIONS:
                    note("lost", token=token)
                if this in _woken:
                    _woken.discard(this)
                    note("refused", token=token)
                raise
            if this in _woken:
                _woken.discard(this)
                note("accepted", token=token)
            return found

        return wrapped

    def beating(call: Call) -> Call:
        async def wrapped(*args: Any, **named: Any) -> Any:
            found = await call(*args, **named)
            _beat.set()
            return found

        return wrapped

    def dropping(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(tokens: set[int], lanes: Any, active: Any, settling: Any) -> None:
            if _armed == SESSIONS:
                held = {job.token for lane in lanes for job in lane.waiting}
                for task, run in active.items():
                    if task not in settling and not task.cancelling():
                        held |= {job.token for job in run.batch.jobs if job.left}
                for token in tokens & held:
                    note("lost", token=token)
            call(tokens, lanes, active, settling)

        return wrapped

    def saying(call: Call, if_: Callable[[Any], bool], what: str) -> Call:
        async def wrapped(*args: Any, **named: Any) -> Any:
            found = await call(*args, **named)
            if _armed == "before_announce" and if_(found):
                note(what)
            return found

        return wrapped

    def before(point: str, call: Call) -> Call:
        async def wrapped(*args: Any, **named: Any) -> Any:
            reach(point)
            return await call(*args, **named)

        return wrapped

    execute = asyncpg.Connection.execute

    async def sent(self: Any, query: str, *args: Any, **named: Any) -> str:
        if _armed != "commit_sent_no_reply" or query != "COMMIT;":
            return await execute(self, query, *args, **named)
        task = asyncio.ensure_future(execute(self, query, *args, **named))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        reach("commit_sent_no_reply")
        return await task

    wrapped: Any = queue
    wrapped.claim = after("after_claim", queue.claim, some=True)
    wrapped.reclaim_together = after("reaper_mid", queue.reclaim_together, some=True)
    wrapped.heartbeat = beating(queue.heartbeat)
    for name in ("ack", "ack_part", "run_sql"):
        setattr(wrapped, name, fenced(getattr(queue, name)))
    ticking: Any = schedule
    ticking.fire = after("mid_tick", schedule.fire)
    loading: Any = load._Load
    loading._copy, loading._write = after("mid_piece", loading._copy), after("after_piece", loading._write)
    beats: Any = worker
    beats.drop = dropping(beats.drop)
    bell: Any = Doorbell
    bell.announce = before("before_announce", saying(Doorbell.announce, lambda answer: answer is Answer.BELL, "bell"))
    wrapped.poll = saying(queue.poll, lambda look: True, "looked")
    settler: Any = Settler
    settler._write = after("before_commit", Settler._write)
    settler.transact = after("after_commit", Settler.transact)
    asyncpg.Connection.execute = sent  # type: ignore[method-assign]
