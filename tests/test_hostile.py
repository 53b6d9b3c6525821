"""Routes under hostile requests: no 5xx, no traceback, the process lives, and what was told 2xx is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psycopg
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from chaos import forged, hostile

pytestmark = pytest.mark.once("routes: the server is asked for the same", "system")

ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]
EXAMPLES = int(os.environ.get("ANTON_HOSTILE", "400"))                  # of each kind


@pytest.fixture
def port(database: str, tmp_path: Path) -> Iterator[int]:
    """Of `anton serve` on the app of hostile requests; it must live at the end, and have logged no traceback."""
    (tmp_path / "main.py").write_text((hostile.APP / "main.py").read_text())
    env = {**os.environ, "DATABASE_URL": database}
    subprocess.run([*ANTON, "migrate"], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*ANTON, "serve", "--port", "0"], cwd=tmp_path, env=env, text=True,
                                  stdout=subprocess.PIPE, stderr=log)
    try:
        assert server.stdout is not None
        found = re.match(r"http://127.0.0.1:(\d+)", server.stdout.readline())
        assert found, (tmp_path / "log").read_text()
        yield int(found[1])
        assert httpx.get(f"http://127.0.0.1:{found[1]}/ready", timeout=60).status_code == 200
        assert server.poll() is None
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    assert server.returncode == 0
    log_text = (tmp_path / "log").read_text()
    assert "Traceback" not in log_text, log_text[-3000:]


def test_no_hostile_request_gets_a_5xx_or_ends_the_process(port: int) -> None:
    count = hostile.attack(port, hostile.requests(hostile.TARGETS), EXAMPLES)
    assert count.sent == EXAMPLES and count.answered > EXAMPLES / 2
    assert not count.failures


def test_no_forged_delivery_is_kept_and_no_hostile_one_gets_a_5xx(port: int, database: str) -> None:
    count = hostile.attack(port, forged.deliveries(), EXAMPLES, 2, forged.forged)
    assert count.sent == EXAMPLES and count.answered > EXAMPLES / 2
    assert not count.failures
    with psycopg.connect(database) as conn:
        rows = conn.execute("select count(*), count(*) filter (where headers ->> 'x-chaos' is not null) from "
                            "anton.delivery").fetchone()
    assert rows is not None and rows[0] > 0 and rows[1] == 0


def test_what_a_hostile_request_was_told_is_stored_is_stored(port: int, database: str) -> None:
    told = []

    def judge(request: bytes, answer: bytes) -> str:
        if re.match(rb"POST|PUT", request) and re.search(rb"^HTTP/1.1 20[01] ", answer, re.M):
            told.append(request)
        return ""

    hostile.attack(port, hostile.requests(("POST /anything", "POST /orders", "PUT /notes/a")), EXAMPLES // 2, 1, judge)
    with psycopg.connect(database) as conn:
        rows = conn.execute("select (select count(*) from orders) + (select count(*) from notes)").fetchone()
    assert rows is not None and rows[0] >= len(told) > 0


def test_schemathesis_finds_no_5xx_in_what_openapi_json_describes(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/openapi.json", timeout=60).json()["openapi"].startswith("3.1")
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    tried = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        tried.add(operation.label)
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):                              # where nothing can be wrong
                _try(url, operation.as_strategy(generation_mode=mode))
    routes = re.findall(r"^@(?:get|post|put|patch|delete)\(", (hostile.APP / "main.py").read_text(), re.M)
    assert len(tried) == len(routes)


def _try(url: str, cases: st.SearchStrategy[schemathesis.Case]) -> None:
    @seed(1)
    @settings(max_examples=max(1, EXAMPLES // 40), deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def each(case: schemathesis.Case) -> None:
        answer = case.call(base_url=url)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    each()


@pytest.mark.parametrize("head", [
    b"POST /anything HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /anything HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 30\r\n\r\n{}",
    b"POST /anything HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: +5\r\n\r\n"])
def test_a_request_that_two_servers_may_read_differently_gets_one_400(port: int, head: bytes) -> None:
    answer = hostile.send(port, head + b"GET /health HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1, answer


def test_the_interface_is_described_with_its_errors_and_shown_at_docs(port: int) -> None:
    described = httpx.get(f"http://127.0.0.1:{port}/openapi.json", timeout=60).json()
    assert json.dumps(described["paths"]["/orders"]["post"]["requestBody"]).count("Order") == 1
    assert "422" in described["paths"]["/orders"]["post"]["responses"]
    assert "swagger" in httpx.get(f"http://127.0.0.1:{port}/docs", timeout=60).text.lower()


def test_a_5xx_and_a_traceback_are_failures() -> None:
    assert hostile.wrong(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Service Unavailable\r\n\r\n") == "status 503"
    assert hostile.wrong(b"HTTP/1.1 400 Bad Request\r\n\r\nTraceback (most recent") == "tells b'Traceback'"
    assert not hostile.wrong(b"HTTP/1.1 200 OK\r\n\r\nTraceback") and not hostile.wrong(b"")
