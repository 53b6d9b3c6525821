"""Verify: who sent this request? Checked on the raw bytes, before anything parses them.

    verify="slack" | "github" | Hmac(header="X-Sig") | callable(body, headers) -> bool | False
    secret=env("NEW") or [env("NEW"), env("OLD")]: any of them will do, so a secret can be rotated

A request whose signature is missing, doubled, wrong, or older than the tolerance is refused, and so is
every request while no secret is set. Signatures are compared in constant time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from anton.errors import BadOption, did_you_mean, one_of
from anton.secret import Env, mask, reveal, several

log = logging.getLogger("anton.verify")

RawHeaders = Iterable[tuple[bytes, bytes]]
Check = Callable[[bytes, Mapping[str, str]], bool]


@dataclass(frozen=True)
class Hmac:
    """A keyed hash of the body in a header.

    header: where the signature stands, any case.
    algo: "sha256" (default), "sha1", "sha384" or "sha512".
    signed: what is signed; {body} is the raw body, {ts} the timestamp header's text.
    value: how the header wraps the signature {sig}, such as "sha256={sig}".
    encoding: "hex" (default) or "base64".
    timestamp: the header with the sender's time in Unix seconds; None: the scheme has none.
    tolerance: seconds that time may differ from the database's; default 300.
    delivery: the header with the id of a delivery; None: the scheme has none.
    challenge: the body's "type" that asks for its "challenge" back, as Slack's "url_verification"; None: no handshake.
    """

    header: str
    algo: str = "sha256"
    signed: str = "{body}"
    value: str = "{sig}"
    encoding: str = "hex"
    timestamp: str | None = None
    tolerance: float = 300.0
    challenge: str | None = None
    delivery: str | None = None

    def __post_init__(self) -> None:
        for option, allowed in (("algo", ("sha1", "sha256", "sha384", "sha512")), ("encoding", ("hex", "base64"))):
            if getattr(self, option) not in allowed:
                raise BadOption(option, getattr(self, option), "Hmac", one_of(allowed))
        for option, part in (("signed", "{body}"), ("value", "{sig}")):
            if getattr(self, option).count(part) != 1:
                raise BadOption(option, getattr(self, option), "Hmac", f"a text with one {part}")
        if ("{ts}" in self.signed) != (self.timestamp is not None):
            raise BadOption("timestamp", self.timestamp, "Hmac", "a header name, exactly when signed= contains {ts}")

    def sign(self, body: bytes, secret: str, timestamp: str = "") -> dict[str, str]:
        """The headers that a sender who knows `secret` would add."""
        before, after = self.signed.encode().split(b"{body}")
        text = before.replace(b"{ts}", timestamp.encode()) + body + after.replace(b"{ts}", timestamp.encode())
        digest = hmac.new(secret.encode(), text, self.algo).digest()
        shown = digest.hex() if self.encoding == "hex" else base64.b64encode(digest).decode()
        headers = {self.header: self.value.replace("{sig}", shown)}
        return headers | {self.timestamp: timestamp} if self.timestamp else headers

    def refusal(self, body: bytes, headers: RawHeaders, secrets: Iterable[str], now: float) -> str | None:
        """Why this request is refused, or None when one of the secrets made its signature."""
        given = _only(headers, self.header)
        if given is None:
            return f"exactly one {self.header} header is needed"
        stamp = b""
        if self.timestamp is not None:
            stamp = _only(headers, self.timestamp) or b""
            if not stamp.isdigit() or len(stamp) > 12:
                return f"{self.timestamp} must be one header with Unix seconds"
            if abs(now - int(stamp)) > self.tolerance:
                return f"{self.timestamp} is more than {self.tolerance:g} s away from now"
        digest = self._digest(given)
        if digest is None:
            return f"{self.header} must look like {self.value} in {self.encoding}"
        before, after = (part.replace(b"{ts}", stamp) for part in self.signed.encode().split(b"{body}"))
        good = False
        for secret in secrets:                                         # all of them, so time tells nothing
            made = hmac.new(secret.encode(), before, self.algo)
            made.update(body)
            made.update(after)
            good |= hmac.compare_digest(made.digest(), digest)
        return None if good else f"{self.header} was not made with this secret"

    def _digest(self, given: bytes) -> bytes | None:
        before, after = self.value.encode().split(b"{sig}")
        if not given.startswith(before) or not given.endswith(after):
            return None
        text = given[len(before):len(given) - len(after)]
        try:
            digest = binascii.unhexlify(text) if self.encoding == "hex" else base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return None
        return digest if len(digest) == hashlib.new(self.algo).digest_size else None


SCHEMES: dict[str, Hmac] = {
    "slack": Hmac("X-Slack-Signature", signed="v0:{ts}:{body}", value="v0={sig}",
                  timestamp="X-Slack-Request-Timestamp", challenge="url_verification"),
    "github": Hmac("X-Hub-Signature-256", value="sha256={sig}", delivery="X-GitHub-Delivery"),
}


class Verifier:
    """verify= and secret= of one route or Webhook, checked when declared."""

    def __init__(self, verify: str | Hmac | Check | bool | None, secret: object = None, *, of: str = "") -> None:
        """of: what carries it, for messages. Raises BadOption for an unknown scheme, or a scheme without secret=."""
        self.of = of
        self.secrets: tuple[Env | str, ...] = several(secret)  # type: ignore[arg-type]
        self.scheme: Hmac | None = None
        self.check: Check | None = None
        self.declared = verify is not None                             # False was said on purpose
        if isinstance(verify, str):
            if verify not in SCHEMES:
                raise BadOption("verify", verify, of, f"{one_of(sorted(SCHEMES))}, Hmac(…), a callable or False."
                                f"{did_you_mean(verify, SCHEMES)}")
            self.scheme = SCHEMES[verify]
        elif isinstance(verify, Hmac):
            self.scheme = verify
        elif callable(verify):
            self.check = verify
        elif verify not in (None, False):
            raise BadOption("verify", verify, of, f"{one_of(sorted(SCHEMES))}, Hmac(…), a callable or False")
        if self.scheme and not self.secrets:
            raise BadOption("secret", None, of, 'what the sender signs with, as secret=env("NAME"), or a list of them')
        if self.secrets and not self.scheme:
            allowed = "secret= only together with a scheme or Hmac(…) in verify="
            raise BadOption("secret", mask(self.secrets[0]), of, allowed)

    @property
    def active(self) -> bool:
        """Whether anything is checked at all."""
        return self.scheme is not None or self.check is not None

    @property
    def timed(self) -> bool:
        """Whether refusal() looks at the time."""
        return self.scheme is not None and self.scheme.timestamp is not None

    def unset(self) -> str | None:
        """The secret to set, when none of them is set: every request is refused until then."""
        if self.scheme is None or any(map(reveal, self.secrets)):
            return None
        return ", ".join(mask(secret) for secret in self.secrets)

    def refusal(self, body: bytes, headers: RawHeaders, now: float) -> str | None:
        """Why this request must get 401, or None. now: the database's time, Unix seconds."""
        headers = list(headers)
        if self.scheme is not None:
            known = [value for value in map(reveal, self.secrets) if value]
            if not known:
                return f"no secret is set: {self.unset()}"
            return self.scheme.refusal(body, headers, known, now)
        if self.check is None:
            return None
        try:
            text = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
            good = self.check(body, text)
        except Exception:
            log.exception("verify= of %s raised; the request is refused", self.of)
            good = False
        return None if good is True else "refused"

    def delivery_id(self, headers: RawHeaders, body: bytes) -> str | None:
        """The sender's id of this delivery, the same each time it is sent; None where the scheme has none."""
        if self.scheme is None or self.scheme.delivery is None:
            return None
        given = _only(headers, self.scheme.delivery)
        return given.decode("latin-1") if given else None

    def handshake(self, body: bytes) -> str | None:
        """The answer to the service's "is this address yours?", or None when this is an event. Ask after refusal()."""
        word = self.scheme.challenge if self.scheme else None
        if word is None or word.encode() not in body:
            return None
        try:
            asked = json.loads(body)
        except ValueError:
            return None
        if isinstance(asked, dict) and asked.get("type") == word and isinstance(asked.get("challenge"), str):
            return str(asked["challenge"])
        return None


def _only(headers: RawHeaders, name: str) -> bytes | None:
    wanted = name.lower().encode()
    found = [value for key, value in headers if key.lower() == wanted]
    return found[0] if len(found) == 1 else None
