"""Proc: CPU and memory of process trees, read from /proc. Where there is no /proc the answer is None."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def _stats() -> dict[int, list[str]]:
    """pid -> the fields of /proc/<pid>/stat from the state on (field 3 of proc(5) is index 0)."""
    found = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
    return found


def _tree(roots: Iterable[int], stats: dict[int, list[str]]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    left = [pid for pid in roots if pid in stats]
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found


def cpu_seconds(*roots: int | None) -> float | None:
    """CPU seconds that these processes, their descendants and those they have reaped have used so far."""
    known = [root for root in roots if root is not None]
    if len(known) < len(roots) or not (_PROC / "self").is_dir():
        return None
    stats = _stats()
    ticks = sum(int(stats[pid][i]) for pid in _tree(known, stats) for i in (11, 12, 13, 14))
    return ticks / _TICK


def rss_mb(*roots: int) -> float | None:
    """Resident memory of these processes and their descendants; pages that forks share count once each (PSS)."""
    if not (_PROC / "self").is_dir():
        return None
    total = 0
    for pid in _tree(roots, _stats()):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def tree(pid: int) -> set[int]:
    """This process and its descendants; only itself where there is no /proc."""
    return (_tree([pid], _stats()) if (_PROC / "self").is_dir() else set()) | {pid}


@contextmanager
def peak_rss(*roots: int) -> Iterator[list[float]]:
    """While open, samples the memory of these trees 4 times a second; the list then holds the peak in MB.

    The kernel's own high-water mark of the largest process counts too, so no short peak of it is missed.
    """
    peak: list[float] = []
    ended = threading.Event()

    def note(now: float | None) -> None:
        if now is not None and (not peak or now > peak[0]):
            peak[:] = [now]

    def sample() -> None:
        while not ended.wait(0.25):
            note(rss_mb(*roots))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        note(rss_mb(*roots))
        note(_highest(*roots))


def _highest(*roots: int) -> float | None:
    """The largest resident set that any one of these processes ever had, in MB."""
    if not (_PROC / "self").is_dir():
        return None
    marks = [0.0]
    for pid in _tree(roots, _stats()):
        try:
            status = (_PROC / str(pid) / "status").read_text()
        except OSError:
            continue
        marks += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return max(marks)


class Meter:
    """CPU of these process trees from its making on."""

    def __init__(self, *roots: int | None) -> None:
        self._roots = roots
        self._began = cpu_seconds(*roots)

    def seconds(self) -> float | None:
        now = cpu_seconds(*self._roots)
        return None if now is None or self._began is None else now - self._began

    def per_million(self, records: int) -> float | None:
        used = self.seconds()
        return None if used is None else used * 1e6 / records
