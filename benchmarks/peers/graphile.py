"""Graphile Worker: jobs enqueued by one add_jobs and drained by node processes with a call each."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from benchmarks.harness import WrongResult
from benchmarks.peers.known import NODE, node_installed
from benchmarks.server import Server, connect
from benchmarks.subject import number

_ENQUEUE = """
select count(*) from graphile_worker.add_jobs(array(
  select row('trivial', json_build_object('id', i), null, null, null, null, null, null)::graphile_worker.job_spec
    from generate_series(1, %s::int) i))
"""


@dataclass(frozen=True)
class Drain:
    """One run: seconds to enqueue, seconds from there until the last job is gone."""

    jobs: int
    enqueue: float
    drain: float

    @property
    def per_second(self) -> float:
        return self.jobs / (self.enqueue + self.drain)


def drain(server: Server, jobs: int, processes: int) -> Drain:
    """Enqueues and drains `jobs` jobs with this many node processes, in a database of its own."""
    node_installed()
    with server.database("graphile") as url, connect(url) as conn:
        environment = {**os.environ, **libpq(url)}
        subprocess.run(["node", "graphile.mjs", "migrate"], cwd=NODE, env=environment, check=True)
        running = [
            subprocess.Popen(
                ["node", "graphile.mjs", "once"],
                cwd=NODE,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(processes)
        ]
        try:
            for process in running:
                if _line(process) != "ready":
                    raise WrongResult("a graphile process did not start")
            conn.execute("checkpoint")
            began = time.perf_counter()
            conn.execute(_ENQUEUE, (jobs,))
            enqueued = time.perf_counter()
            for process in running:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            calls = sum(int(_line(process) or 0) for process in running)
            ended = time.perf_counter()
        finally:
            for process in running:
                process.kill()
                process.wait()
        left = number(conn, "select count(*) from graphile_worker.jobs")
        if calls != jobs or left:
            raise WrongResult(f"graphile made {calls} calls for {jobs} jobs and left {left}")
        return Drain(jobs, enqueued - began, ended - enqueued)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def libpq(url: str) -> dict[str, str]:
    """The environment that makes node's driver connect where `url` says; it reads no socket folder from a URL."""
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    found = {
        "PGHOST": parts.hostname or query.get("host"),
        "PGPORT": parts.port or query.get("port"),
        "PGUSER": parts.username or query.get("user"),
        "PGPASSWORD": parts.password or query.get("password"),
        "PGDATABASE": parts.path.lstrip("/"),
    }
    return {name: unquote(str(value)) for name, value in found.items() if value}
