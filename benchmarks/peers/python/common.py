"""What the Python peers share. Each is a program with the commands of node/common.mjs; needs nothing but Python."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

LEASE = float(os.environ.get("PEER_LEASE", 0))  # seconds; 0: the peer's default


def go() -> None:
    """Says that this process is ready, and waits for the line that starts the clock."""
    print("ready", flush=True)
    sys.stdin.readline()


class Handler:
    """What a job does: noop, start (notes when it started) or insert (a row, then 5 ms of waiting)."""

    def __init__(self, kind: str, insert: Callable[[int], Awaitable[Any]]) -> None:
        self.kind, self.insert = kind, insert
        self.calls = 0
        self.starts: list[tuple[int, int]] = []

    async def __call__(self, job: int) -> None:
        at = time.monotonic_ns()
        self.calls += 1
        if self.kind == "start":
            self.starts.append((job, at))
        elif self.kind == "insert":
            await self.insert(job)
            await asyncio.sleep(0.005)

    async def until_end(self) -> None:
        """Waits until standard input ends, prints what was seen and ends the process."""
        await asyncio.to_thread(sys.stdin.read)
        print(json.dumps({"calls": self.calls, "starts": self.starts}), flush=True)
        os._exit(0)


async def enqueue(bulk: Callable[[int], Awaitable[Any]], count: int) -> None:
    go()
    began = time.perf_counter()
    await bulk(count)
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
    bulk: Callable[[int], Awaitable[Any]],
    one: Callable[[int], Awaitable[Any]],
    work: Callable[[Handler], Awaitable[Any]],
    insert: Callable[[int], Awaitable[Any]],
) -> None:
    """Runs the command that this process was given. work(handler) returns once it has begun."""
    match words:
        case ["install"]:
            await install()
        case ["enqueue", count]:
            await enqueue(bulk, int(count))
        case ["drip", count, rate]:
            await drip(one, int(count), float(rate))
        case ["work", kind]:
            handler = Handler(kind, insert)
            go()
            await work(handler)
            await handler.until_end()
