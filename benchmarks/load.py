"""Load: single-row inserts by pgbench, the client that costs the least."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anton import embedded
from anton.errors import AntonError
from benchmarks.harness import MissingPeer

CLIENTS = 16


def _pgbench() -> str:
    with suppress(AntonError):
        own = embedded.postgres_bin("pgbench")
        if own.exists():
            return str(own)
    found = shutil.which("pgbench")
    if not found:
        raise MissingPeer("pgbench is neither in the embedded Postgres nor on the PATH")
    return found


@contextmanager
def inserting(url: str, statement: str, seconds: float, rate: float | None = None) -> Iterator[subprocess.Popen[str]]:
    """pgbench running `statement` (which may use :i, a random integer) in 16 clients, at most `rate` times a second."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"\\set i random(1, 2000000000)\n{statement};\n")
        script.flush()
        words = [
            _pgbench(),
            "-n",
            "-M",
            "prepared",
            "-c",
            str(CLIENTS),
            "-j",
            "2",
            "-T",
            str(round(seconds)),
            "-f",
            script.name,
        ]
        words += ["-R", f"{rate:.0f}"] if rate else []
        process = subprocess.Popen(
            [*words, url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path("/")
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()


def insert(url: str, statement: str, seconds: float, rate: float | None = None) -> tuple[int, float]:
    """Runs that load; returns (transactions done, transactions a second)."""
    with inserting(url, statement, seconds, rate) as process:
        out, _ = process.communicate()
    done = re.search(r"actually processed: (\d+)", out)
    tps = re.search(r"tps = ([\d.]+)", out)
    failed = re.search(r"failed transactions: (\d+)", out)
    if process.returncode or not done or not tps or (failed and int(failed[1])):
        raise RuntimeError(f"pgbench ended with {process.returncode}: {out[-1500:]}")
    return int(done[1]), float(tps[1])
