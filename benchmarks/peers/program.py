"""Program: a peer's process, and the verbs that every peer answers to (node/common.mjs names them)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from benchmarks.harness import WrongResult
from benchmarks.peers.graphile import libpq
from benchmarks.peers.known import Peer
from benchmarks.proc import tree


class Program:
    """The programs of one peer on one database. lease: seconds of PEER_LEASE, 0 for the peer's default."""

    def __init__(self, peer: Peer, url: str, kind: str, lease: float = 0) -> None:
        self.peer = peer
        self.kind = kind
        self._environment = {
            **os.environ, **libpq(url), "PEER_URL": url, "PEER_KIND": kind, "PEER_LEASE": f"{lease:g}",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def install(self) -> None:
        words = [*self.peer.program, "install"]
        done = subprocess.run(
            words, cwd=self.peer.folder, env=self._environment, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode:
            raise WrongResult(f"{self.peer.name} install ended with {done.returncode}: {done.stderr[-800:]}")

    def enqueue(self, count: int, first: int = 0) -> float:
        """Seconds to enqueue `count` jobs in bulk, numbered from `first` on."""
        with self.process("enqueue", str(count), str(first)) as process:
            return float(process.go().answer())

    def single(self, count: int) -> float:
        """Seconds to enqueue jobs 0 .. count-1, each by a call and a commit of its own, 16 at a time."""
        with self.process("single", str(count)) as process:
            return float(process.go().answer())

    def work(self) -> Process:
        """A worker that is connected and waits for its go()."""
        return self.start("work", self.kind)

    def start(self, *words: str) -> Process:
        return Process(self.peer, [*self.peer.program, *words], self._environment)

    @contextmanager
    def process(self, *words: str) -> Iterator[Process]:
        process = self.start(*words)
        try:
            yield process
        finally:
            process.kill()


class Process:
    def __init__(self, peer: Peer, words: list[str], environment: dict[str, str]) -> None:
        self._name = f"{peer.name} {' '.join(words[len(peer.program):])}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the process
        self._process = subprocess.Popen(
            words, cwd=peer.folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        if (line := self.answer()) != "ready":
            self.kill()
            raise WrongResult(f"{self._name} said {line!r} and not that it is ready: {self._said()}")

    def go(self) -> Process:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self

    def answer(self) -> str:
        """The next line that it prints; empty when it ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def end(self) -> dict[str, Any]:
        """Ends a worker by the end of its input; what it saw."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        line = self.answer()
        if not line:
            raise WrongResult(f"{self._name} ended without an answer: {self._said()}")
        self._process.wait(30)
        seen: dict[str, Any] = json.loads(line)
        return seen

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-800:]

    def kill(self) -> None:
        """SIGKILL to it and all that it started, children included."""
        if self._process.poll() is None:
            _kill(tree(self._process.pid))
            self._process.wait()

    def kill_child(self) -> None:
        """SIGKILL to what it started that started nothing itself: not to the parents, who may see it."""
        _kill([pid for pid in tree(self._process.pid) if len(tree(pid)) == 1])


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
