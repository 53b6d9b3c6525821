"""Hostile: requests that no honest sender makes, written by Hypothesis and sent as raw bytes.

    attack(port, TARGETS, 10_000, seed)  -> Count: how many were sent, and those that got a 5xx or a traceback

APP is the app they are sent to: a route of each kind, that stores what it is sent.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

APP = Path(__file__).parent / "routes"
TARGETS = ("POST /orders", "GET /orders/1", "GET /orders", "PATCH /orders/1?total=2", "DELETE /orders/1",
           "PUT /notes/a/b", "POST /anything", "POST /form", "POST /upload", "GET /search?q=a", "GET /health",
           "GET /openapi.json", "GET /docs")

SOON = 0.5  # seconds until the server is told that nothing more comes
PATIENCE = 30.0
_STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.M)
_OURS = b"Traceback|asyncpg|File \""

_WORDS = ["customer", "total", "at", "tags", "more", "score", "mark", "id", "title", "n", "file", "q", "since", "limit"]
_NASTY = st.sampled_from([
    "\x00", "a\x00b", "\ud800", "\udfff\ud800", "\ufeff", "\u202e", "😀" * 50, "' or 1=1 --", "%s%n{id}{0}",
    "../../etc/passwd", "\r\nx: y", "9" * 400, "-0", "1e999", "NaN", "Infinity", "0x10", "1_000", "٣", "null",
    "9999-12-31T23:59:59-23:59", "0000-00-00", "-4713-01-01", "infinity", "10000-01-01", "a" * 5000, "{", "[]", "%00",
    "%ff%fe", "&a=b", "\\u0000"])
TEXT = st.one_of(_NASTY, st.text(max_size=20), st.sampled_from(_WORDS))
_NUMBERS = st.one_of(st.integers(), st.sampled_from([2**31, 2**63, -(2**63) - 1, 2**64, 10**400]), st.floats())
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8)
_ORDER = st.fixed_dictionaries({"customer": st.one_of(TEXT, _JSON)}, optional=dict.fromkeys(_WORDS[1:], _JSON))
_RAW_JSON = st.sampled_from([
    b"", b"{", b"nul", b'{"customer": "a",}', b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000, b'{"a":' * 10_000,
    b'"\\ud800"', b'"\xed\xa0\x80"', b"\xff\xfe{\x00}\x00", b"1" * 5000, b"1e99999", b'{"customer": "\\u0000"}',
    b"\xef\xbb\xbf{}", b'{"customer": "a", "customer": "b"}', b'{"customer": "' + b"x" * 9000 + b'"}', b"{}" * 3,
    b"\x1f\x8b\x08\x00"])
_FORMS = st.lists(st.tuples(TEXT, TEXT), max_size=5).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs).encode("utf-8", "surrogatepass"))
_PARTS = st.lists(st.tuples(
    st.sampled_from([
        b'form-data; name="file"; filename="a"', b'form-data; name="title"', b'form-data; name="n"', b"form-data", b"",
        b'form-data; name="file"; filename*=utf-8\'\'%ff%00', b'form-data; name="\xff"; filename="\xff\x00"']),
    st.binary(max_size=30)), max_size=4)
_ENDS = st.sampled_from([b"--x--\r\n", b"--x", b"", b"--x\r\n" * 1200])
KINDS = [b"application/json"] * 4 + [
    b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"multipart/form-data", b"text/plain",
    b"application/json; charset=utf-16", b"application/x-www-form-urlencoded; charset=raw_unicode_escape", b"",
    b"application/x-www-form-urlencoded; charset=idna", b"multipart/form-data; boundary=\xff", b"a/b+json", b"\xff"]
HEADERS = st.sampled_from([
    b"host: [", b"host: \xff", b"expect: 100-continue", b"content-encoding: gzip", b"x-forwarded-for: a, b", b": x",
    b"x-forwarded-proto: x", b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"content-length: 0",
    b"content-length: 5", b"content-length: -1", b"content-length: 99999999999999999999", b"range: bytes=0-",
    b"upgrade: websocket\r\nconnection: upgrade", b"user-agent: \xff\xfe", b"user-agent: " + b"a" * 9000, b"x: a\r\n b",
    b"cookie: " + b"a=b; " * 500, b"accept: \xff", b"bad header", b"x\x00: y", b"authorization: Basic \xff",
    b"origin: null", b"if-none-match: *"])
_METHODS = st.sampled_from([
    b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"get", b"\xff", b"PRI"])


def _as_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _multipart(parts: list[tuple[bytes, bytes]], end: bytes) -> bytes:
    return b"".join(b"--x\r\ncontent-disposition: %b\r\n\r\n%b\r\n" % part for part in parts) + end


BODIES = st.one_of(_ORDER.map(_as_bytes), _JSON.map(_as_bytes), _RAW_JSON, _FORMS,
                    st.builds(_multipart, _PARTS, _ENDS), st.binary(max_size=50))


@st.composite
def paths(draw: st.DrawFn, path: bytes) -> bytes:
    """The path with something else in its place of an id, in its query or at its end."""
    for _ in range(draw(st.integers(0, 2))):
        value = draw(TEXT).encode("utf-8", "surrogatepass")
        if draw(st.booleans()):
            value = b"".join(b"%%%02x" % byte for byte in value)
        value = re.sub(rb"[\x00-\x20]", b"+", value)
        word = draw(st.sampled_from(_WORDS)).encode()
        ways = [path + (b"&" if b"?" in path else b"?") + word + b"=" + value, path + b"/" + value]
        if b"/1" in path:
            ways.append(path.replace(b"/1", b"/" + value, 1))
        path = draw(st.sampled_from(ways))
    return path


@st.composite
def requests(draw: st.DrawFn, targets: tuple[str, ...], bodies: st.SearchStrategy[bytes] | None = None) -> bytes:
    """One request: mostly well-formed around something that is not. targets: "POST /orders"."""
    method, _, path = draw(st.sampled_from(targets)).encode().partition(b" ")
    rarely = st.integers(0, 9).map(lambda n: n == 0)
    if draw(rarely):
        method = draw(_METHODS)
    body = draw(bodies or BODIES) if method != b"GET" or draw(rarely) else b""
    lines = [b"%b %b HTTP/1.1" % (method, draw(paths(path))), b"host: localhost", b"connection: close"]
    if body or method in (b"POST", b"PUT"):
        lines += [b"content-type: " + draw(st.sampled_from(KINDS)), b"content-length: %d" % len(body)]
    lines += draw(st.lists(HEADERS, max_size=2)) if draw(st.booleans()) else []
    if any(line.startswith(b"transfer-encoding") for line in lines) and draw(st.booleans()):
        lines = [line for line in lines if not line.startswith(b"content-length")]
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def send(port: int, request: bytes) -> bytes:
    """All that the server answers; b"" when it hangs up, or waits for more."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as conn, suppress(ConnectionError):
        conn.sendall(request)
        conn.settimeout(SOON)
        while True:
            try:
                got = conn.recv(65536)
            except TimeoutError:                                       # it was no whole request
                conn.settimeout(PATIENCE)
                conn.shutdown(socket.SHUT_WR)
                continue
            if not got:
                break
            answer += got
    return answer


def wrong(answer: bytes) -> str:
    """What is wrong with an answer; "" when nothing is."""
    statuses = [int(status) for status in _STATUS.findall(answer)]
    if any(status >= 500 for status in statuses):
        return f"status {max(statuses)}"
    told = re.search(_OURS, answer) if statuses and statuses[-1] >= 400 else None
    return f"tells {told[0]!r}" if told else ""


@dataclass
class Count:
    """What came of an attack. failures: what was wrong, with the request."""

    sent: int = 0
    answered: int = 0
    failures: list[tuple[str, bytes]] = field(default_factory=list)


def attack(port: int, strategy: st.SearchStrategy[bytes], examples: int, number: int = 0,
           judge: Callable[[bytes, bytes], str] = lambda request, answer: wrong(answer)) -> Count:
    """Sends so many requests of the strategy to a server of this machine. number: the seed. judge: what is wrong."""
    count = Count()

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def each(request: bytes) -> None:
        answer = send(port, request)
        count.sent += 1
        count.answered += bool(answer)
        if why := judge(request, answer):
            count.failures.append((why, request))

    each()
    return count
