"""Verify: who sent this request? Checked on the raw bytes, before anything acts on them.

    verify="slack" | "github" | … | Hmac(header="X-Sig") | callable(body, headers) -> bool | False
    secret=env("NEW") or [env("NEW"), env("OLD")]: any of them will do, so a secret can be rotated
    secret={"secret": …, "token": env("VERIFY_TOKEN")}: where the service asks for a verify token, too

The services are data, verify.json: how each signs (scheme.py, signed.py), where the delivery id is, which handshakes
it makes. A request whose signature is missing, doubled or wrong is refused, and so is every request while no secret
is set. That a good signature is too old is said apart, since a delivery that was already answered may come again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anton.config import is_loopback, is_public
from anton.errors import BadOption, did_you_mean
from anton.handshake import Handshake, Reply
from anton.scheme import Adyen, BadKey, Basic, Jwt, Refusal, Scheme, Token
from anton.secret import Env, VerifyToken, mask, reveal, several
from anton.sent import RawHeaders, Sent, readable
from anton.signed import Hmac, PublicKey

__all__ = ["SCHEMES", "Hmac", "RawHeaders", "Refusal", "Reply", "Verifier", "public_url"]

log = logging.getLogger("anton.verify")

Check = Callable[[bytes, Mapping[str, str]], bool]
DATA = Path(__file__).with_name("verify.json")
_KINDS: dict[str, Callable[..., Scheme]] = {
    "hmac": Hmac, "public_key": PublicKey, "jwt": Jwt, "token": Token, "basic": Basic, "adyen": Adyen}
_SECRET_HEADERS = {b"authorization", b"proxy-authorization", b"cookie"}  # never kept
_SAID = ("name", "scheme", "sure", "secret", "notes")                  # for people: what docs/verify.md is made of


def _scheme(entry: Mapping[str, Any]) -> Scheme:
    options = _frozen({name: value for name, value in entry.items() if name not in _SAID})
    options["handshakes"] = tuple(Handshake(**_frozen(shake)) for shake in entry.get("handshakes", ()))
    options["accepted"] = entry.get("accepted", "").encode()
    return _KINDS[entry["scheme"]](**options)


def _frozen(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


SCHEMES: dict[str, Scheme] = {name: _scheme(entry) for name, entry in json.loads(DATA.read_text("utf-8")).items()}


class Verifier:
    """verify= and secret= of one route or Webhook, checked when declared."""

    def __init__(self, verify: str | Scheme | Check | bool | None, secret: object = None, *, of: str = "") -> None:
        """of: what carries it, for messages. Raises BadOption for an unknown scheme, or a scheme without secret=."""
        self.of = of
        given = several(secret)  # type: ignore[arg-type]
        self.secrets: tuple[Env | str, ...] = tuple(one for one in given if not isinstance(one, VerifyToken))
        self.tokens = tuple(one for one in given if isinstance(one, VerifyToken))
        self._looked_at: tuple[str | None, ...] = ()
        self._usable: list[str] = []
        self.scheme: Scheme | None = None
        self.callable: Check | None = None
        self.declared = verify is not None                             # False was said on purpose
        allowed = 'a service of docs/verify.md such as "github", "slack" or "stripe", Hmac(…), a callable or False'
        if isinstance(verify, str):
            if verify not in SCHEMES:
                raise BadOption("verify", verify, of, f"{allowed}.{did_you_mean(verify, SCHEMES)}")
            self.scheme = SCHEMES[verify]
        elif isinstance(verify, Scheme):
            self.scheme = verify
        elif callable(verify):
            self.callable = verify
        elif verify not in (None, False):
            raise BadOption("verify", verify, of, allowed)
        if self.scheme and not self.secrets:
            raise BadOption("secret", None, of, 'what the sender signs with, as secret=env("NAME"), or a list of them')
        if given and not self.scheme:
            raise BadOption("secret", mask(given[0]), of, "secret= only together with a scheme or Hmac(…) in verify=")
        shakes = self.scheme.handshakes if self.scheme else ()
        if self.tokens and not any(shake.wants_token for shake in shakes):
            raise BadOption("secret", '{"token": …}', of, "a verify token only for a service that asks for one")
        self.active = bool(self.scheme or self.callable)               # whether anything is checked at all
        self.timed = self.scheme is not None and self.scheme.timed     # whether `now` is looked at
        self.methods = frozenset(shake.method for shake in shakes) - {"POST"}
        self.addressed = self.scheme is not None and (         # whether `url` is looked at
            self.scheme.addressed or any(shake.addressed for shake in shakes))
        self.bound = self.scheme is not None and self.scheme.bound     # whether deployment.url is needed
        secret_headers = self.scheme.secret_headers if self.scheme else frozenset()
        self.hidden = _SECRET_HEADERS | {name.encode() for name in secret_headers}         # headers kept in no record
        self.bodyless = self.scheme is not None and self.scheme.bodyless                   # whether "" is an event
        self.accepted = self.scheme.accepted if self.scheme else b""   # the body that a 2xx must have

    def closed(self, scope: Mapping[str, Any]) -> str | None:
        """The public address that an ASGI request came to, where nobody said who may call; None lets it in.

        `anton serve` does not start on one; another server is first known by its requests.
        """
        server = scope.get("server")
        return server[0] if not self.declared and server and is_public(server[0]) else None

    def url(self, base: str, scope: Mapping[str, Any]) -> str:
        """The URL of an ASGI request for check() and handshake(); "" where nobody looks at it.

        base: deployment.url. Without it the Host header is believed, for a scheme that is bound only when it is ours.
        """
        if not self.addressed:
            return ""
        url = public_url(base, scope["scheme"], scope["headers"], scope["raw_path"], scope["query_string"])
        return "" if self.bound and not base and not is_loopback(urlsplit(url).hostname or "?") else url

    def unset(self) -> str | None:
        """The secret to set, when none of them is set, and one that cannot be used: such requests are refused."""
        if self.scheme is None or self.usable():
            return None
        shown = []
        for secret in self.secrets:
            why = self._unusable(secret)
            shown.append(mask(secret) + (f" ({why})" if why else ""))
        return ", ".join(shown)

    def usable(self) -> list[str]:
        """The values of the secrets that are set and can be used."""
        values = tuple(map(reveal, self.secrets))
        if self._looked_at != values:                                  # seldom: each is read anew for every request
            found = [value for value, secret in zip(values, self.secrets, strict=True)
                     if value and not self._unusable(secret)]
            self._looked_at, self._usable = values, found
        return self._usable

    def _unusable(self, secret: Env | str) -> str | None:
        value = reveal(secret)
        try:
            if value is not None and self.scheme is not None:
                self.scheme.key(value)
        except BadKey as error:
            return str(error)
        return None

    def handshake(self, body: bytes, headers: RawHeaders, now: float, *, method: str = "POST",
                  url: str = "") -> Reply | None:
        """The answer when this is a handshake and no event: send it, keep no record. Ask before check().

        now, url: as for check(). One that is signed is answered only when its signature is good.
        """
        if self.scheme is None or not self.scheme.handshakes:
            return None
        sent = Sent(body, headers, now, method, url)
        for shake in self.scheme.handshakes:
            if shake.asked(sent):
                return self._answer(shake, sent)
        return None

    def _answer(self, shake: Handshake, sent: Sent) -> Reply | None:
        assert self.scheme is not None
        known = self.usable()
        if shake.signed:
            known = [secret for secret in known if self.scheme.refusal(sent, [secret]) is None]
            if not known:
                return None
        if shake.wants_token and not shake.knows(sent, [value for value in map(reveal, self.tokens) if value]):
            log.warning("403 for the handshake of %s: %s", self.of, "the verify token is another" if self.tokens else
                        'it has no verify token; say secret={"secret": …, "token": env("…")}')
            return Reply(403, b"wrong verify token", {"Content-Type": "text/plain; charset=utf-8"})
        if shake.tell is not None and not known:
            # The service says it only here, and only to us; a person must copy it.
            log.warning("%s: whoever called sent this secret to set as %s: %.200s", self.of,
                        ", ".join(map(mask, self.secrets)), str(sent.one(shake.tell)).encode("unicode_escape").decode())
        return shake.answer(sent, known[0] if known else None)

    def check(self, body: bytes, headers: RawHeaders, now: float, *, method: str = "POST",
              url: str = "") -> Refusal | None:
        """Why this request must get 401, or None.

        now: the database's time, Unix seconds. url: as the sender addressed it, see public_url().
        """
        if self.scheme is None and self.callable is None:
            return None
        sent = Sent(body, headers, now, method, url)
        try:
            if self.scheme is not None:
                return self._refusal(self.scheme, sent)
            assert self.callable is not None
            good = self.callable(body, readable((name.lower(), value) for name, value in sent.headers))
        except Exception:
            log.exception("verify= of %s raised; the request is refused", self.of)
            good = False
        return None if good is True else Refusal("refused")

    def _refusal(self, scheme: Scheme, sent: Sent) -> Refusal | None:
        known = self.usable()
        if not known:
            return Refusal(f"no secret is set: {self.unset()}")
        refusal = scheme.refusal(sent, known)
        if refusal is None:
            return None
        odd = [f"{mask(secret)} is not used: {why}" for secret in self.secrets if (why := self._unusable(secret))]
        return Refusal("; ".join([refusal.why, *odd]), refusal.stale)

    def delivery_id(self, headers: RawHeaders, body: bytes) -> str | None:
        """The sender's id of this delivery: the same over retries and replays, at most 200 printable characters.

        None: the service sends none, so that each request is a record. Only after check() found the signature good.
        """
        if self.scheme is None or not self.scheme.ids:
            return None
        return self.scheme.delivery_id(Sent(body, headers))


def public_url(base: str, scheme: str, headers: RawHeaders, raw_path: bytes, query: bytes) -> str:
    """The URL as its sender knows it, for services that sign it.

    base: deployment.url of autonomous.json; "": the scheme and the Host header of the request.
    """
    if not base:
        host = Sent(b"", headers).header(b"host") or b""
        base = f"{scheme}://{host.decode('latin-1')}"
    return base.rstrip("/") + raw_path.decode("latin-1") + (f"?{query.decode('latin-1')}" if query else "")
