"""Offer: writes rows at times that are fixed beforehand, whatever comes of them. In a process of its own.

    python -m chaos.offer URL TABLE FIRST ROWS SECONDS SHORTEST LONGEST

Each insert has ROWS ids, the first one FIRST, and comes SHORTEST to LONGEST seconds after the one before was due.
Prints a line for each: its first id, when its commit was known, and how late it was sent, both in ns (monotonic).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import psycopg

from chaos.cell import ROOT


@dataclass
class Offer:
    """A process that writes. wait() gives what it has done."""

    process: subprocess.Popen[str]
    rows: int
    committed: dict[int, int] = field(default_factory=dict)  # first id -> monotonic ns
    late: list[float] = field(default_factory=list)  # seconds

    def wait(self) -> Offer:
        """Until it ends by itself. Raises RuntimeError when it failed."""
        out, _ = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError(f"the writer ended with {self.process.returncode}")
        for line in out.splitlines():
            id, at, late = map(int, line.split())
            self.committed[id] = at
            self.late.append(late / 1e9)
        return self


@contextmanager
def offering(
    url: str, table: str, seconds: float, every: tuple[float, float], *, first: int = 1, rows: int = 1
) -> Iterator[Offer]:
    """Starts it; ends it at the latest with the block."""
    words = [table, first, rows, seconds, *every]
    process = subprocess.Popen(
        [sys.executable, "-m", "chaos.offer", url, *map(str, words)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    try:
        yield Offer(process, rows)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def main() -> None:
    """Until the seconds are over."""
    url, table, *given = sys.argv[1:]
    first, rows = map(int, given[:2])
    seconds, shortest, longest = map(float, given[2:])
    random, lines = Random(first), list[str]()
    insert = f"insert into {table} (id, kind) select n, 'load' from generate_series(%s::bigint, %s::bigint) n"
    with psycopg.connect(url, autocommit=True, prepare_threshold=1) as conn:
        due = began = time.monotonic()
        while due - began < seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            late = max(0.0, time.monotonic() - due)
            conn.execute(insert, (first, first + rows - 1))
            lines.append(f"{first} {time.monotonic_ns()} {round(late * 1e9)}")
            first += rows
            due += random.uniform(shortest, longest)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
