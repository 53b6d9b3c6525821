"""What the Python peers share. Each is a program with the commands of node/common.mjs; needs nothing but Python."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

KIND = os.environ.get("PEER_KIND", "noop")
LEASE = float(os.environ.get("PEER_LEASE", 0))  # seconds; 0: the peer's default
CALLERS = 16


def go() -> None:
    """Says that this process is ready, and waits for the line that starts the clock."""
    print("ready", flush=True)
    sys.stdin.readline()


def pause(job: int) -> float:
    """Seconds that a job waits before it writes: 0.01 to 0.2 by its number, so that some are always under way."""
    return 0.01 * (1 + job % 20)


class Handler:
    """What a job does, by PEER_KIND; write: its number into `effects`, by a connection of its own or as it commits."""

    def __init__(self, write: Callable[[int], Awaitable[Any]]) -> None:
        self.write = write
        self.calls = 0
        self.starts: list[tuple[int, int]] = []

    async def __call__(self, job: int) -> None:
        at = time.monotonic_ns()
        self.calls += 1
        if KIND == "start":
            self.starts.append((job, at))
        elif KIND in ("own", "commit"):
            await asyncio.sleep(pause(job))
            await self.write(job)

    async def until_end(self) -> None:
        """Waits until standard input ends, prints what was seen and ends the process."""
        await asyncio.to_thread(sys.stdin.read)
        print(json.dumps({"calls": self.calls, "starts": self.starts}), flush=True)
        os._exit(0)


async def enqueue(bulk: Callable[[Sequence[int]], Awaitable[Any]], jobs: Sequence[int]) -> None:
    go()
    began = time.perf_counter()
    await bulk(jobs)
    print(time.perf_counter() - began, flush=True)


async def single(one: Callable[[int], Awaitable[Any]], count: int) -> None:
    """Each by a call of its own, CALLERS at a time."""
    left = iter(range(count))

    async def caller() -> None:
        for job in left:
            await one(job)

    go()
    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    print(time.perf_counter() - began, flush=True)


async def drip(one: Callable[[int], Awaitable[Any]], count: int, rate: float) -> None:
    committed = []
    go()
    began = time.monotonic()
    for job in range(count):
        await asyncio.sleep(max(0.0, began + job / rate - time.monotonic()))
        await one(job)
        committed.append((job, time.monotonic_ns()))
    print(json.dumps(committed), flush=True)


async def command(
    words: list[str],
    install: Callable[[], Awaitable[Any]],
    bulk: Callable[[Sequence[int]], Awaitable[Any]],
    one: Callable[[int], Awaitable[Any]],
    work: Callable[[Handler], Awaitable[Any]],
    write: Callable[[int], Awaitable[Any]],
) -> None:
    """Runs the command that this process was given. work(handler) returns once it has begun."""
    match words:
        case ["install"]:
            await install()
        case ["enqueue", count, first]:
            await enqueue(bulk, range(int(first), int(first) + int(count)))
        case ["single", count]:
            await single(one, int(count))
        case ["drip", count, rate]:
            await drip(one, int(count), float(rate))
        case ["work", _]:
            handler = Handler(write)
            go()
            await work(handler)
            await handler.until_end()
