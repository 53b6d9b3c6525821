"""Forged: deliveries that no honest service makes. Some are signed, so that what they hold is looked at.

    attack(port, deliveries(), 5_000, judge=forged)   as in hostile.py; a forged one that gets a 2xx is a failure too
"""

from __future__ import annotations

import re

from hypothesis import strategies as st

from anton.verify import SCHEMES
from chaos import hostile

SECRET = "what the senders of chaos sign with"
PATHS = (b"/hook", b"/hooked-orders")
_MARK = b"\r\nx-chaos: forged\r\n"
_GOOD = re.compile(rb"^HTTP/1\.1 2\d\d ", re.M)
_IDS = st.one_of(st.integers(0, 30).map(lambda n: b"id-%d" % n), hostile.TEXT.map(
    lambda text: re.sub(rb"[\x00-\x1f\x7f]", b"?", text.encode("utf-8", "surrogatepass"))), st.just(b"x" * 3000))


def _signature(body: bytes, secret: str = SECRET) -> bytes:
    return SCHEMES["github"].sign(body, secret)["X-Hub-Signature-256"].encode()


@st.composite
def _forgeries(draw: st.DrawFn, body: bytes) -> list[bytes]:
    """The lines with a signature that is not one of this body by this secret."""
    good = _signature(body)
    at = draw(st.integers(len(b"sha256="), len(good) - 1))
    flipped = good[:at] + (b"1" if good[at:at + 1] == b"0" else b"0") + good[at + 1:]
    return draw(st.sampled_from([
        [], [b""], [flipped], [good, good], [good + b", " + good], [good[7:]], [b"sha1=" + good[7:47]], [good[:-2]],
        [good + b"00"], [_signature(body, "another")], [_signature(body + b" ")], [b"sha256=" + b"\xff" * 64],
        [b"sha256="], [b"null"], [b"sha256=" + b"0" * 64]]))


@st.composite
def deliveries(draw: st.DrawFn) -> bytes:
    """One request to a webhook; those that are not signed as they should be bear a mark."""
    body = draw(hostile.BODIES)
    forged = draw(st.booleans())
    signed = draw(_forgeries(body)) if forged else [_signature(body)]
    lines = [b"POST %b HTTP/1.1" % draw(st.sampled_from(PATHS)), b"host: localhost", b"connection: close",
             b"content-type: " + draw(st.sampled_from(hostile.KINDS)), b"content-length: %d" % len(body)]
    lines += [b"x-hub-signature-256: " + signature for signature in signed]
    lines += [b"x-github-delivery: " + draw(_IDS) for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2])))]
    lines += draw(st.lists(hostile.HEADERS, max_size=2)) if draw(st.integers(0, 3)) == 0 else []
    request: bytes = b"\r\n".join(lines) + (_MARK if forged else b"\r\n") + b"\r\n" + body
    return request


def forged(request: bytes, answer: bytes) -> str:
    """What is wrong with an answer; "" when nothing is."""
    if _MARK in request and _GOOD.search(answer):
        return "a forged one was accepted"
    return hostile.wrong(answer)
