"""Anton as a peer: a row of `jobs` is a job, written by plain SQL or COPY."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import asyncpg

from benchmarks.peers.python.common import CALLERS, LEASE, drip, enqueue, go, single
from benchmarks.subject import ANTON, environment

APP = "benchmarks.peers.anton_app"
URL = os.environ["PEER_URL"]
CALLS = "select coalesce(sum(n - gone), 0) from anton.receipt"


def _anton(*words: str) -> list[str]:
    return [*ANTON, "--database", URL, "--app", APP, *words]


async def main(words: list[str]) -> None:
    if words == ["install"]:
        conn = await asyncpg.connect(URL)
        table = "create table jobs (id bigint generated always as identity primary key, job bigint not null)"
        await conn.execute(table)
        await conn.close()
        subprocess.run(_anton("migrate"), env=environment(), check=True, stdout=subprocess.DEVNULL)  # noqa: ASYNC221
        return
    callers = CALLERS if words[0] == "single" else 1
    pool = await asyncpg.create_pool(URL, min_size=callers, max_size=callers)

    async def bulk(jobs: Sequence[int]) -> None:
        await pool.copy_records_to_table("jobs", records=[(job,) for job in jobs], columns=["job"])

    async def one(job: int) -> None:
        await pool.execute("insert into jobs (job) values ($1)", job)

    async def number(query: str) -> int:
        return int(await pool.fetchval(query))

    match words:
        case ["enqueue", count, first]:
            await enqueue(bulk, range(int(first), int(first) + int(count)))
        case ["single", count]:
            await single(one, int(count))
        case ["drip", count, rate]:
            await drip(one, int(count), float(rate))
        case ["work", *_]:
            # The others connect before they are ready; so does Anton, with its handler paused until the word comes.
            await pool.execute("select anton.pause('work')")
            before, registered = await number(CALLS), await number("select count(*) from anton.worker")
            lease = ["--lease", f"{LEASE:g}s"] if LEASE else []
            words = _anton("work", *lease)
            worker = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)  # noqa: ASYNC220
            while await number("select count(*) from anton.worker") == registered:
                if worker.poll() is not None:
                    raise SystemExit(f"anton work ended with {worker.returncode}")
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            go()
            await pool.execute("select anton.resume('work')")
            await asyncio.to_thread(sys.stdin.read)
            worker.send_signal(signal.SIGTERM)
            worker.wait()
            starts = [tuple(row) for row in await pool.fetch("select job, at from starts")]
            print(json.dumps({"calls": await number(CALLS) - before, "starts": starts}), flush=True)


asyncio.run(main(sys.argv[1:]))
