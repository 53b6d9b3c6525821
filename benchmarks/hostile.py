"""Hostile: requests that no honest sender makes, to routes and to webhooks (chaos/hostile.py, chaos/forged.py)."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
import urllib.request

from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench
from benchmarks.server import connect
from benchmarks.subject import ANTON, environment, number
from chaos import forged, hostile


@bench(at_most("hostile_failures", 0, "reqs"))
def hostile_requests(run: Run) -> Rows:
    """10,000 of them: answers of 5xx or with a traceback, forged deliveries that were kept; the process has to live."""
    each = run.size(5_000, 200)
    with run.server.database("hostile") as url, connect(url) as conn, tempfile.TemporaryFile("w+") as log:
        words = [*ANTON, "--database", url]
        subprocess.run([*words, "migrate"], cwd=hostile.APP, env=environment(), check=True, capture_output=True)
        server = subprocess.Popen([*words, "serve", "--port", "0"], cwd=hostile.APP, env=environment(), text=True,
                                  stdout=subprocess.PIPE, stderr=log)
        try:
            assert server.stdout is not None
            found = re.match(r"http://127.0.0.1:(\d+)", server.stdout.readline())
            assert found
            port = int(found[1])
            counts = [hostile.attack(port, hostile.requests(hostile.TARGETS), each, 1),
                      hostile.attack(port, forged.deliveries(), each, 2, forged.forged)]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as ready:
                alive = ready.status == 200 and server.poll() is None
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)
        log.seek(0)
        text = log.read()
        kept = number(conn, "select count(*) from anton.delivery where headers ->> 'x-chaos' is not null")
    if not alive or "Traceback" in text:
        raise WrongResult(f"the process died, or logged a traceback: {text[-500:]}")
    failures = [failure for count in counts for failure in count.failures]
    detail = {"sent": sum(count.sent for count in counts), "answered": sum(count.answered for count in counts),
              "forged_kept": kept, "first": [f"{why}: {request[:200]!r}" for why, request in failures[:5]]}
    return {"hostile_failures": Row(len(failures) + kept, None, detail)}
