"""Handshake: how a service asks "is this address yours?" before it sends events, and what it wants to hear.

    when     places of the request, and what must be there; None: anything, "{token}": our verify token
    unless   places that must be empty, so that an event is never taken for a handshake
    signed   whether it is signed as events are; it is then answered only when the signature is good
    reply    status, text or json; "{query:challenge}" is filled in from the request

"{hmac-hex:body:payload.plainToken}" fills in a keyed hash of what is there. Since that hash could be the signature of
a forged event, only letters, digits, "-" and "_" are signed so, and no number: no event is made of those alone.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from anton.secret import among
from anton.sent import Sent

_HOLE = re.compile(r"\{(?:hmac-(hex|base64):)?((?:body|query|header):[^{}]+)\}")
_SAFE = re.compile(r"[A-Za-z0-9_-]{8,200}", re.ASCII)
_LONGEST = 4096                                                        # characters of a reply's text


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a handshake, to be sent as it is."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Handshake:
    """One kind of it. tell: the place of a secret that the service sends just now, for the user to set."""

    method: str = "POST"
    when: Mapping[str, str | int | None] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    signed: bool = False
    reply: Mapping[str, Any] = field(default_factory=dict)
    tell: str | None = None

    @property
    def wants_token(self) -> bool:
        """Whether the sender must know our verify token."""
        return "{token}" in self.when.values()

    @property
    def addressed(self) -> bool:
        """Whether it is in the URL."""
        return any(place.startswith("query:") for place in self.when)

    def asked(self, sent: Sent) -> bool:
        """Whether this request is one; the token is not looked at. Cheap for events."""
        if sent.method != self.method:
            return False
        for place, wanted in self.when.items():
            where, _, name = place.partition(":")
            if where == "body":                                        # what is not in the bytes is not in the JSON
                needle = wanted if isinstance(wanted, str) else name.rpartition(".")[2]
                if needle.encode() not in sent.body:
                    return False
            found = sent.one(place)
            if found is None or (wanted not in (None, "{token}") and found != str(wanted)):
                return False
        return not any(sent.all(place) for place in self.unless)

    def knows(self, sent: Sent, tokens: Sequence[str]) -> bool:
        """Whether the sender knows the verify token, where it must."""
        places = [place for place, wanted in self.when.items() if wanted == "{token}"]
        return all(among(sent.one(place) or "", tokens) for place in places)

    def answer(self, sent: Sent, secret: str | None) -> Reply | None:
        """The reply, or None when it cannot be made: no secret to sign with, or something that must not be signed."""
        headers = {"X-Content-Type-Options": "nosniff"}
        try:
            for name, value in self.reply.get("headers", {}).items():
                headers[name] = _filled(value, sent, secret)
            body = b""
            if "text" in self.reply:
                headers["Content-Type"] = "text/plain; charset=utf-8"
                body = _filled(self.reply["text"], sent, secret).encode()
            elif "json" in self.reply:
                headers["Content-Type"] = "application/json"
                made = {name: _filled(value, sent, secret) if isinstance(value, str) else value
                        for name, value in self.reply["json"].items()}
                body = orjson.dumps(made)
        except LookupError:
            return None
        return Reply(self.reply.get("status", 200), body, headers)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)                                               # the standard one takes the most: Infinity, too
    except ValueError:
        return False
    return True


def _filled(text: str, sent: Sent, secret: str | None) -> str:
    """The text with its holes filled. Raises LookupError."""

    def fill(hole: re.Match[str]) -> str:
        value = sent.one(hole[2])
        if value is None or len(value) > _LONGEST:
            raise LookupError(hole[2])
        if hole[1] is None:
            return value
        if secret is None or not _SAFE.fullmatch(value) or _is_json(value):
            raise LookupError(hole[2])
        made = hmac.new(secret.encode(), value.encode(), "sha256").digest()
        return made.hex() if hole[1] == "hex" else base64.b64encode(made).decode()

    return _HOLE.sub(fill, text)
