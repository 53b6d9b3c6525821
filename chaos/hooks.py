"""Hooks: senders of webhooks, while the web process and Postgres are killed under them."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from collections import Counter
from random import Random

from servers import free_port

from anton.verify import SCHEMES
from chaos.cell import Cell
from chaos.faults import Result, fault, kill_backend, kill_postmaster, percentile

SENDERS = 8
TRIES = 200  # of one delivery, until it is told 2xx
SECRET = "what the senders of chaos sign with"


class Senders:
    """Threads that deliver as services do: again with the same id until they are told 2xx; some once more after it.

    told: ids that got a 2xx. sent: all ids. answers: how often each status came.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.told: set[str] = set()
        self.sent: set[str] = set()
        self.answers: Counter[int | str] = Counter()
        self.gaps: list[float] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._main, args=(n, Random(seed * 100 + n))) for n in range(SENDERS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends them; what is under way is delivered first."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _main(self, number: int, random: Random) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        count = 0
        while not self._stop.is_set():
            count += 1
            id, body = f"{number}-{count}", json.dumps({"n": count, "by": number}).encode()
            headers = SCHEMES["github"].sign(body, SECRET, id=id) | {"Content-Type": "application/json"}
            self.sent.add(id)
            began = time.monotonic()
            wanted = 2 if random.random() < 0.1 else 1
            for _ in range(TRIES):
                status = self._post(connection, body, headers)
                self.answers[status] += 1
                if isinstance(status, int) and status < 300:
                    self.told.add(id)
                    wanted -= 1
                    if not wanted:
                        break
                else:
                    time.sleep(0.05)
            self.gaps.append(time.monotonic() - began)
        connection.close()

    def go_on(self) -> None:
        """Until 20 more were told 2xx, for 30 s at most."""
        before, patience = len(self.told), time.monotonic() + 30
        while len(self.told) < before + 20 and time.monotonic() < patience:
            time.sleep(0.01)

    def _post(self, connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]) -> int | str:
        try:
            connection.request("POST", "/hook", body, headers)
            reply = connection.getresponse()
            reply.read()
            return reply.status
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return type(error).__name__


@fault("H2", "the web process and Postgres killed with -9 in turn, while webhooks come in")
def deliveries(cell: Cell, n: int) -> Result:
    """n kills of each, a tenth of Postgres's of the postmaster. 2xx means: one record."""
    result = Result()
    port = free_port()
    (web,) = cell.start(port=port)
    senders = Senders(port, cell.seed)
    kills: Counter[str] = Counter()
    end = time.monotonic() + 60 + 10 * n
    try:
        while min(kills["web"], kills["Postgres"]) < n and time.monotonic() < end:
            senders.go_on()
            time.sleep(cell.random.uniform(0, 0.2))
            if kills["web"] <= kills["Postgres"]:
                cell.signal(web, signal.SIGKILL)
                kills["web"] += 1
                (web,) = cell.start(port=port)
            elif kills["Postgres"] % 10 == 9:
                kill_postmaster(cell)
                kills["Postgres"] += 1
            else:
                kills["Postgres"] += kill_backend(cell)
        senders.go_on()  # the server is up again
    finally:
        senders.stop()
        cell.signal(web, signal.SIGKILL)
    ids, kept = cell.one(
        "select (select array_agg(data->'headers'->>'x-github-delivery') from hooked), "
        "(select count(*) from anton.delivery)"
    )
    found = Counter[str](ids)
    expected, maybe = Counter(senders.told), senders.sent - senders.told
    result.verdict.acked, result.verdict.unknown = len(senders.told), len(maybe)
    result.verdict.compare("delivery", expected | Counter(maybe & found.keys()), found)
    result.verdict.require(kept == len(found), f"{kept} deliveries are kept, and {len(found)} records")
    odd = {status for status in senders.answers if isinstance(status, int) and status not in (200, 503)}
    result.verdict.require(not odd, f"answers other than 200 and 503: {sorted(odd)}")
    result.n = min(kills["web"], kills["Postgres"])
    result.more |= {
        "web_kills": kills["web"],
        "postgres_kills": kills["Postgres"],
        "answers": {str(status): times for status, times in senders.answers.items()},
        "delivered_p99_s": percentile(senders.gaps, 0.99),
    }
    return result
