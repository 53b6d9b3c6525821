"""Handlers with a limit over all processes: a record calls the receiver, which counts, or holds a locked file."""

import asyncio
import fcntl
import os
from typing import Any

from anton import Table

LIMIT = 10


@Table("limited").on_new_records(each=True, concurrency=LIMIT)
async def call(record: Any) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(os.environ["BENCH_RECEIVER"]))
    await reader.read(1)
    writer.close()


@Table("locked").on_new_records(each=True, concurrency=LIMIT)
async def lock(record: Any) -> None:
    """Holds one of as many locked files as the limit; the kernel frees those of a killed process."""
    folder = os.environ["BENCH_LOCKS"]
    for n in range(LIMIT):
        file = os.open(f"{folder}/{n}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        try:
            await asyncio.sleep(0)
        finally:
            os.close(file)
        return
    over = os.open(f"{folder}/over", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(over, b"1")
    os.close(over)
