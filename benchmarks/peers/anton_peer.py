"""Anton as a peer: a row of `jobs` is a job, written by plain SQL; what a job writes goes through its outputs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import psycopg

from benchmarks.peers.python.common import LEASE, drip, enqueue, go
from benchmarks.subject import ANTON, environment

APP = "benchmarks.peers.anton_app"
CALLS = "select coalesce(sum(n - gone), 0) from anton.receipt"


def _anton(*words: str) -> list[str]:
    return [*ANTON, "--database", os.environ["PEER_URL"], "--app", APP, *words]


async def main(words: list[str]) -> None:
    if words == ["install"]:
        with psycopg.connect("", autocommit=True) as plain:
            plain.execute("create table jobs (id bigint generated always as identity primary key, job bigint not null)")
        subprocess.run(_anton("migrate"), env=environment(), check=True, stdout=subprocess.DEVNULL)  # noqa: ASYNC221
        return
    conn = await psycopg.AsyncConnection.connect("", autocommit=True)

    async def bulk(count: int) -> None:
        await conn.execute("insert into jobs (job) select generate_series(0, %s::int - 1)", (count,))

    async def one(job: int) -> None:
        await conn.execute("insert into jobs (job) values (%s)", (job,))

    async def number(query: str) -> int:
        row = await (await conn.execute(query)).fetchone()
        assert row is not None
        return int(row[0])

    match words:
        case ["enqueue", count]:
            await enqueue(bulk, int(count))
        case ["drip", count, rate]:
            await drip(one, int(count), float(rate))
        case ["work", *_]:
            # The others connect before they are ready; so does Anton, with its handler paused until the word comes.
            await conn.execute("select anton.pause('work')")
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
            await conn.execute("select anton.resume('work')")
            await asyncio.to_thread(sys.stdin.read)
            worker.send_signal(signal.SIGTERM)
            worker.wait()
            starts = await (await conn.execute("select job, at from starts")).fetchall()
            print(json.dumps({"calls": await number(CALLS) - before, "starts": starts}), flush=True)


asyncio.run(main(sys.argv[1:]))
