"""Outbox: senders killed at six points, against a service with idempotency keys and one without. What is known after?

    python -m chaos.outbox --calls 100 [--system] [--save]

    before intent, after intent, before request, request sent, after reply, in settle

Each call's sender is killed (SIGKILL) once, at its point; another process then works until nothing is left. The
service keeps the truth. wrong: a call whose effect was not there exactly once (with keys, or with probe=). doubled:
more than once. unlisted: a call that is neither settled as it truly was, nor unknown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "tests"))

import servers  # noqa: E402

from anton.action import set_effects  # noqa: E402
from anton.app import App, declaring  # noqa: E402
from anton.db import Database, set_database  # noqa: E402
from anton.migrate import migrate  # noqa: E402
from anton.outbox import Action  # noqa: E402
from anton.sender import Sender  # noqa: E402
from anton.table import Table  # noqa: E402
from anton.worker import Worker  # noqa: E402
from chaos.check import Verdict  # noqa: E402
from chaos.faults import Result  # noqa: E402
from chaos.report import save  # noqa: E402

POINTS = ("before intent", "after intent", "before request", "request sent", "after reply", "in settle")
KINDS = ("keyed", "unsafe", "probed")


class Service(BaseHTTPRequestHandler):
    """POST /pay {"order", "key"} pays; with "keyed" a key is paid once. GET /paid/ORDER: how often. Wrong asks: 400."""

    paid: Counter[int] = Counter()
    keys: dict[str, int] = {}
    lock = threading.Lock()

    def do_POST(self) -> None:
        """Pays."""
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        if self.path != "/pay" or set(body) != {"order", "key", "keyed"}:
            self._answer(400, {"error": "order, key and keyed"})
            return
        with self.lock:
            if not body["keyed"] or body["key"] not in self.keys:
                self.paid[body["order"]] += 1
                self.keys[body["key"]] = body["order"]
        self._answer(200, {"order": body["order"]})

    def do_GET(self) -> None:
        """How often an order was paid."""
        with self.lock:
            self._answer(200, {"times": self.paid[int(self.path.rpartition("/")[2])]})

    def _answer(self, status: int, facts: Any) -> None:
        body = json.dumps(facts).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass                                                       # who asked is dead

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def ask(port: int, method: str, path: str, facts: Any = None, sent: Callable[[], None] = lambda: None) -> Any:
    """One request over a socket of its own; sent is called when all of it is on its way."""
    body = b"" if facts is None else json.dumps(facts).encode()
    with socket.create_connection(("127.0.0.1", port), 10) as link:
        link.sendall(f"{method} {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        sent()
        answer = b""
        while part := link.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(head.decode())
    return json.loads(body)


def die() -> None:
    """As `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def declare(app: App, port: int, kind: str, point: str) -> Action:
    """The action that pays. point: where its sender dies; "": nowhere."""
    def here(name: str) -> None:
        if name == point:
            die()

    def pay(order: int, *, key: str) -> Any:
        here("before request")
        answer = ask(port, "POST", "/pay", {"order": order, "key": key, "keyed": kind == "keyed"},
                     lambda: here("request sent"))
        here("after reply")
        return answer

    def probe(call: Any) -> Any:
        times = ask(port, "GET", f"/paid/{call.args['order']}")["times"]
        return {"order": call.args["order"]} if times else False

    with declaring(app):
        into = Table("paid")
        made = Action(pay, into=into, effect="idempotent" if kind == "keyed" else "unsafe",
                      probe=probe if kind == "probed" else None)
    run, judge, call = made.run, Sender._judge, Database.call_value

    async def begun(args: Any, key: str) -> Any:
        here("after intent")
        return await run(args, key)

    async def judged(self: Sender, db: Database, one: Any) -> Any:
        here("before intent")
        return await judge(self, db, one)

    async def called(self: Database, conn: Any, function: str, *args: Any, **named: Any) -> Any:
        answer = await call(self, conn, function, *args, **named)
        if function == "end_action":
            here("in settle")                                          # it is done, and not committed
        return answer

    if point:
        made.run, Sender._judge, Database.call_value = begun, judged, called  # type: ignore[method-assign, assignment]
    return made


def work(url: str, folder: str, port: int, kind: str, point: str) -> int:
    """Works in a process of its own until nothing is left, or it dies. Its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            db = Database(url, source="the bench")
            set_database(db)
            set_effects("live")
            app = App("outbox", folder)
            declare(app, port, kind, point)
            asyncio.run(Worker(db, app).run_until_idle())
            os._exit(0)
        except BaseException as error:
            print(f"{kind}, {point or 'nowhere'}: {error!r}", file=sys.stderr)
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sql(url: str, text: str) -> list[Any]:
    """Rows."""
    async def fetch() -> list[Any]:
        db = Database(url, source="the bench")
        conn = await db.connect()
        try:
            return list(await conn.fetch(text))
        finally:
            await conn.close()

    return asyncio.run(fetch())


def measure(url: str, folder: str, port: int, kind: str, point: str, calls: int, first: int) -> Counter[str]:
    """Kills one sender for each call."""
    found: Counter[str] = Counter()
    killed = 0
    for order in range(first, first + calls):
        sql(url, "insert into anton.action (app, name, args) "
                 f"values ('outbox', 'pay', '{{\"order\": {order}}}')")
        killed += work(url, folder, port, kind, point) == -signal.SIGKILL
        sql(url, "select anton.worker_died(id) from anton.worker where stopped_at is null")
        assert work(url, folder, port, kind, "") == 0, "the second worker ended badly"
    rows = sql(url, "select (args ->> 'order')::int as n, state from anton.action")
    states = {row["n"]: row["state"] for row in rows if row["n"] >= first}
    written = Counter(row["n"] for row in sql(url, "select (data ->> 'order')::int as n from paid"))
    for order, state in states.items():
        times = ask(port, "GET", f"/paid/{order}")["times"]
        found[state] += 1
        found["doubled"] += times > 1
        found["wrong"] += times != 1 if kind != "unsafe" else False
        found["unlisted"] += state != "unknown" and (state, min(times, 1)) not in (("sent", 1), ("failed", 0))
        found["into wrong"] += written[order] != (1 if state == "sent" else 0)
    assert killed == calls, f"{killed} of {calls} senders were killed at {point}"
    return found


def result(total: Counter[str], doubts: Counter[str], wrong: int, n: int) -> Result:
    """As the report keeps it."""
    verdict = Verdict(acked=total["sent"], unknown=total["unknown"], doubled=total["doubled"],
                      wrong=[f"{name} {total[name]}" for name in ("wrong", "unlisted", "into wrong") if total[name]])
    return Result(n, verdict, {"wrong_effects": wrong, "unlisted": total["unlisted"], "in_doubt": dict(doubts)}, n)


def main() -> int:
    """Prints a line for each service and point; 1 when something is wrong."""
    words = argparse.ArgumentParser(prog="python -m chaos.outbox")
    words.add_argument("--calls", type=int, default=10)
    words.add_argument("--system", action="store_true")
    words.add_argument("--save", action="store_true", help="write benchmarks/results/chaos.json")
    given = words.parse_args()
    service = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    port, apart = service.server_address[1], os.fork()
    if apart == 0:                                                     # no threads where senders are forked
        service.serve_forever()
    service.server_close()
    total: Counter[str] = Counter()
    doubts: Counter[str] = Counter()
    try:
        kept = tempfile.TemporaryDirectory()
        with servers.running("system" if given.system else "embedded") as server, kept as folder:
            first = 1
            for kind in KINDS:
                server.sql(f"create database outbox_{kind}")
                url = server.url(f"outbox_{kind}")
                app = App("outbox", folder)
                declare(app, port, kind, "")
                asyncio.run(migrate(Database(url, source="the bench"), app))
                for point in POINTS:
                    found = measure(url, folder, port, kind, point, given.calls, first)
                    first += given.calls
                    total.update(found)
                    doubts[kind] += found["unknown"]
                    print(f"{kind:8}{point:16}", {name: n for name, n in sorted(found.items()) if n}, flush=True)
    finally:
        os.kill(apart, signal.SIGKILL)
        os.waitpid(apart, 0)
    bad = {name: total[name] for name in ("wrong", "doubled", "unlisted", "into wrong")}
    wrong = bad["wrong"] + bad["doubled"] + bad["into wrong"]
    print(f"outbox_wrong_effects {wrong}, outbox_unlisted {bad['unlisted']}, outbox_doubled {bad['doubled']}")
    if given.save:
        save({"outbox": result(total, doubts, wrong, given.calls * len(KINDS) * len(POINTS))}, 0)
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
