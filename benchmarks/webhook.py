"""Webhook: durable deliveries over http, against the same app without a database and one INSERT a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.app_webhook import SECRET
from benchmarks.harness import MissingPeer, Row, Rows, Run, WrongResult, at_least, at_most, bench, median, percentile
from benchmarks.proc import Meter
from benchmarks.server import Conn, connect
from benchmarks.subject import environment, migrate, number, wait_for

CLIENTS = 64
# GitHub's example of an issue that was opened, shortened.
BODY = json.dumps({
    "action": "opened",
    "issue": {
        "id": 73464126, "number": 1347, "title": "Spelling error in the README file", "state": "open", "locked": False,
        "user": {"login": "Codertocat", "id": 21031067, "type": "User", "site_admin": False},
        "labels": [{"id": 1362934389, "name": "bug", "color": "d73a4a", "default": True}], "comments": 0,
        "created_at": "2019-05-15T15:20:18Z", "updated_at": "2019-05-15T15:20:18Z", "assignee": None,
        "body": "It looks like you accidently spelled 'commit' with two 't's."},
    "repository": {"id": 186853002, "name": "Hello-World", "full_name": "Codertocat/Hello-World", "private": False},
    "sender": {"login": "Codertocat", "id": 21031067, "type": "User"},
}).encode()
HEADERS = {
    "Content-Type": "application/json", "User-Agent": "GitHub-Hookshot/044aadd", "X-GitHub-Event": "issues",
    "X-GitHub-Hook-ID": "292430182",
    "X-Hub-Signature-256": "sha256=" + hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()}
_SCRIPT = """
local n, head = 0, {{ {head} }}
function request()
  n = n + 1
  head["X-GitHub-Delivery"] = string.format("{run}-%012d", n)
  return wrk.format("POST", "/hook", head, [==[{body}]==])
end
"""


@contextmanager
def _serving(side: str, url: str) -> Iterator[tuple[int, int]]:
    """One uvicorn process with a side of benchmarks/sides.py: its pid and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "uvicorn", "--factory", f"benchmarks.sides:{side}", "--port", str(port),
             "--no-access-log", "--log-level", "warning"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, env={**environment(), "DATABASE_URL": url}, stdout=log, stderr=log)
        try:
            wait_for(lambda: _listens(port), 20, f"{side} to listen", process, log)
            yield process.pid, port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _wrk(port: int, seconds: float) -> tuple[int, float]:
    """Requests answered, and a second, by 64 clients that each send when they are answered."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise MissingPeer("wrk is not installed: apt-get install wrk")
    head = ", ".join(f'["{name}"] = "{value}"' for name, value in HEADERS.items())
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT.format(head=head, run=str(uuid.uuid4())[:23], body=BODY.decode()))
        script.flush()
        words = [wrk, "-t1", f"-c{CLIENTS}", f"-d{seconds:g}", "-s", script.name, f"http://127.0.0.1:{port}/hook"]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise WrongResult(out)
    done, rate = re.search(r"(\d+) requests in", out), re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert done and rate, out
    return int(done[1]), float(rate[1])


def _check(conn: Conn, answered: int) -> None:
    """Every delivery that was answered is one row, and one record. Some were under way when wrk ended, each time."""
    for table in ("anton.delivery", "bench_events"):
        rows = number(conn, f"select count(*) from {table}")
        if not answered <= rows <= answered + 2 * CLIENTS:
            raise WrongResult(f"{answered} were answered, {table} has {rows}")
    if number(conn, "select count(distinct data->'headers'->>'x-github-delivery') from bench_events") != rows:
        raise WrongResult("records are doubled")


@bench(at_least("webhook_vs_bare", 0.70), at_least("webhook_vs_insert_per_request", 2))
def webhook(run: Run) -> Rows:
    """Durable POSTs a second, 64 clients, one uvicorn process; see benchmarks/sides.py. In turns, short ones."""
    seconds = run.size(4, 1)
    rates: dict[str, list[float]] = {side: [] for side in ("bare", "kept", "insert", "plain")}
    cpu: dict[str, list[float]] = {side: [] for side in rates}
    with run.server.database("webhook") as url, connect(url) as conn:
        migrate(url, "app_webhook")
        conn.execute("create table bench_plain (id bigint generated always as identity primary key, "
                     "created_at timestamptz not null default now(), data jsonb)")
        for _ in range(run.times):
            for side in rates:
                for table in ("anton.delivery", "bench_events", "bench_plain"):
                    conn.execute(f"truncate {table}")
                with _serving(side, url) as (pid, port):
                    warm, _ = _wrk(port, 1)
                    conn.execute("checkpoint")
                    meter = Meter(run.server.postmaster, pid)
                    done, rate = _wrk(port, seconds)
                    cpu[side].append(meter.per_million(done) or 0.0)
                rates[side].append(rate)
                if side == "kept":
                    _check(conn, warm + done)
    kept = median(rates["kept"])
    detail = {"per_s": {side: [round(rate) for rate in found] for side, found in rates.items()},
              "cpu_us": {side: round(median(found)) for side, found in cpu.items()},
              "vs_plain_route": kept / median(rates["plain"]), "bytes": len(BODY)}
    return {"webhook_vs_bare": Row(kept / median(rates["bare"]), median(cpu["kept"]), detail),
            "webhook_vs_insert_per_request": Row(kept / median(rates["insert"]))}


@bench(at_most("webhook_p99_ms", 25, "ms"))
def webhook_latency(run: Run) -> Rows:
    """At half of what it can do: each request is sent when it is due, and timed from then, whoever is late."""
    seconds = run.size(10, 2)
    found, rates = [], []
    with run.server.database("webhook_latency") as url, connect(url) as conn:
        migrate(url, "app_webhook")
        for _ in range(run.times):
            for table in ("anton.delivery", "bench_events"):
                conn.execute(f"truncate {table}")
            with _serving("kept", url) as (_, port):
                warm, capacity = _wrk(port, seconds / 2)
                conn.execute("checkpoint")
                times = _paced(port, capacity / 2, seconds)
            _check(conn, warm + len(times))
            rates.append(round(capacity / 2))
            found.append(percentile(times, 99) * 1000)
    return {"webhook_p99_ms": Row(median(found), None, {"ms": [round(ms, 1) for ms in found], "per_s": rates})}


def _paced(port: int, rate: float, seconds: float) -> list[float]:
    """Seconds from when each was due until its answer, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.webhook", str(port), str(rate), str(seconds)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60 + 9 * seconds)
    if done.returncode:
        raise WrongResult(done.stderr[-500:])
    times: list[float] = json.loads(done.stdout)
    return times


class _Client(asyncio.Protocol):
    """A connection: takes what is due next as soon as it is free."""

    def __init__(self, load: _Load) -> None:
        self.load = load

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.load.free.append(self)

    def send(self, due: float) -> None:
        self.due = due
        self.transport.write(self.load.head + str(uuid.uuid4()).encode() + b"\r\n\r\n" + BODY)

    def connection_lost(self, error: Exception | None) -> None:
        if len(self.load.times) < self.load.n:
            raise SystemExit(f"a connection was lost: {error}")

    def data_received(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(data.decode())
        self.load.times.append(time.perf_counter() - self.due)
        self.load.free.append(self)


class _Load:
    """64 connections, a request each 1/rate seconds."""

    def __init__(self, port: int, rate: float, seconds: float) -> None:
        self.port, self.rate, self.n = port, rate, int(rate * seconds)
        self.free: deque[_Client] = deque()  # each in its turn, so that none idles for long
        self.times: list[float] = []
        lines = {"Host": f"127.0.0.1:{port}", "Content-Length": str(len(BODY)), **HEADERS}
        self.head = ("POST /hook HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
                     + "X-GitHub-Delivery: ").encode()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(CLIENTS):
            await loop.create_connection(lambda: _Client(self), "127.0.0.1", self.port)
        began, sent = time.perf_counter(), 0
        while len(self.times) < self.n:
            now = time.perf_counter()
            while sent < self.n and self.free and began + sent / self.rate <= now:
                self.free.popleft().send(began + sent / self.rate)
                sent += 1
            await asyncio.sleep(max(0.0, min(0.001, began + sent / self.rate - time.perf_counter())))


def main() -> None:
    load = _Load(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
    asyncio.run(load.run())
    print(json.dumps(load.times))


if __name__ == "__main__":
    main()
