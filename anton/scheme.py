"""Scheme: how a service shows that a request is its own. Each checks raw bytes, before anything acts on them.

    Hmac        a keyed hash, in a header or in the body       (signed.py)
    PublicKey   Ed25519, ECDSA or RSA                          (signed.py)
    Jwt         a signed token, most of them with a hash of the body
    Token       a secret that is sent along
    Basic       a user name and a password
    Adyen       its own

All compare in constant time, try every secret, and refuse what is missing, doubled or malformed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import uuid
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from anton.errors import BadOption
from anton.handshake import Handshake
from anton.secret import among
from anton.sent import Sent


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is refused. stale: its signature is good, only its time is outside the tolerance."""

    why: str
    stale: bool = False


class BadKey(ValueError):
    """A secret that cannot be what its service gave out; the text says what is expected."""


@dataclass(frozen=True)
class Scheme:
    """What every scheme has.

    ids: where the delivery id is, the first of these that is there; places joined by " + ", "body": a hash of the
    body, "signed": a hash of what was signed, the time included. accepted: the body that a 2xx must have.
    bodyless: its events may come without a body; their payload is null.
    """

    ids: tuple[str, ...] = field(default=(), kw_only=True)
    handshakes: tuple[Handshake, ...] = field(default=(), kw_only=True)
    accepted: bytes = field(default=b"", kw_only=True)
    bodyless: bool = field(default=False, kw_only=True)

    @property
    def timed(self) -> bool:
        """Whether refusal() looks at the time."""
        return False

    @property
    def addressed(self) -> bool:
        """Whether refusal() looks at the URL."""
        return False

    @property
    def bound(self) -> bool:
        """Whether the URL alone says that a request is for us, so that its Host header must not be believed."""
        return False

    @property
    def secret_headers(self) -> frozenset[str]:
        """Lower-case names of the headers that hold the secret itself; they are kept nowhere."""
        return frozenset()

    @abstractmethod
    def refusal(self, sent: Sent, secrets: Sequence[str]) -> Refusal | None:
        """Why this request is refused, or None when one of the secrets fits."""

    @abstractmethod
    def sign(self, body: bytes, secret: str, timestamp: str = "", *, id: str = "", url: str = "",
             method: str = "POST") -> dict[str, str]:
        """The headers that a sender who knows `secret` would add. timestamp: see stamp(). id: "" for a new one.

        Raises BadOption for a scheme that signs inside the body.
        """

    def key(self, secret: str) -> Any:
        """The secret as what is computed with. Raises BadKey."""
        return secret

    def pair(self, text: str) -> tuple[str, str]:
        """Two secrets made of a text, for tests: what the sender signs with, and what we check with."""
        return text, text

    def stamp(self, now: float) -> str:
        """A time, Unix seconds, as this service writes it; "" where it sends none."""
        return ""

    def delivery(self, id: str) -> dict[str, str]:
        """The headers with a delivery id; all the same one."""
        places = next((place.split(" + ") for place in self.ids if place.startswith("header:")), [])
        id = id or str(uuid.uuid4())
        return {place.removeprefix("header:"): id for place in places if place.startswith("header:")}

    def delivery_id(self, sent: Sent) -> str | None:
        """The id of this delivery; None when nothing in the request says."""
        for place in self.ids:
            if place == "signed":
                return self.signed_id(sent)
            found = [[_hash(sent.body)] if part == "body" else sent.all(part) for part in place.split(" + ")]
            if all(found):
                return _short([value for part in found for value in part])
        return None

    def signed_id(self, sent: Sent) -> str | None:
        """A hash of what was signed: the same bytes again are the same delivery."""
        return None


def _hash(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _short(values: list[str]) -> str:
    """One printable text of at most 200 characters, different for different values."""
    if len(values) == 1 and len(values[0]) <= 200 and re.fullmatch(r"[!-~]+", values[0]):
        return values[0]
    return _hash(b"".join(b"%d:%s," % (len(raw), raw) for raw in map(_raw, values)))


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Token(Scheme):
    """A secret that is sent along. place: of it; every value there must be one of the secrets."""

    place: str

    @property
    def addressed(self) -> bool:
        return self.place.startswith("query:")

    @property
    def secret_headers(self) -> frozenset[str]:
        where, _, name = self.place.partition(":")
        return frozenset([name.lower()]) if where == "header" else frozenset()

    def refusal(self, sent: Sent, secrets: Sequence[str]) -> Refusal | None:
        found = sent.all(self.place)
        if not found:
            return Refusal(f"{self.place} is missing")
        good = all(among(value, secrets) for value in found)
        return None if good else Refusal(f"{self.place} is not the secret")

    def sign(self, body: bytes, secret: str, timestamp: str = "", *, id: str = "", url: str = "",
             method: str = "POST") -> dict[str, str]:
        if not self.place.startswith("header:"):
            raise BadOption("sign", self.place, "Token", "a scheme that sends a header: put the token there yourself")
        return self.delivery(id) | {self.place.removeprefix("header:"): secret}


@dataclass(frozen=True)
class Basic(Scheme):
    """A user name and a password. The secret is "user:password"."""

    def key(self, secret: str) -> str:
        if ":" not in secret:
            raise BadKey('it must be "user:password"')
        return secret

    @property
    def secret_headers(self) -> frozenset[str]:
        return frozenset(["authorization"])

    def pair(self, text: str) -> tuple[str, str]:
        return f"test:{text}", f"test:{text}"

    def refusal(self, sent: Sent, secrets: Sequence[str]) -> Refusal | None:
        kind, _, text = (sent.header(b"authorization") or b"").partition(b" ")
        if kind.lower() != b"basic":
            return Refusal("exactly one Authorization header with Basic is needed")
        try:
            given = base64.b64decode(text, validate=True).decode()
        except ValueError:
            return Refusal("Authorization must be base64")
        return None if among(given, secrets) else Refusal("Authorization is not this user and password")

    def sign(self, body: bytes, secret: str, timestamp: str = "", *, id: str = "", url: str = "",
             method: str = "POST") -> dict[str, str]:
        return self.delivery(id) | {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}


@dataclass(frozen=True)
class Jwt(Scheme):
    """A signed token in a header. The secret is the key: a text for HS256 and its like, or a public key as PEM.

    A public key in another form is refused: everybody knows it, and as a text it would make HS256 tokens.
    claims: what it must say. body_claim: the one with the body's SHA-256, in body_encoding. aud: it must be for our
    URL, deployment.url. tolerance: seconds past its "exp", and around its "iat" where max_age is set (seconds).
    """

    header: str
    claims: Mapping[str, str] = field(default_factory=dict)
    body_claim: str | None = None
    body_encoding: str = "hex"
    aud: bool = False
    max_age: float | None = None
    tolerance: float = 60.0

    @property
    def timed(self) -> bool:
        return True

    @property
    def addressed(self) -> bool:
        return self.aud

    @property
    def bound(self) -> bool:
        return self.aud

    def key(self, secret: str) -> str:
        if secret.startswith(_PEM):
            _pem(secret)
        elif _is_public(secret):
            raise BadKey("a public key must be PEM, from -----BEGIN PUBLIC KEY----- on")
        return secret

    @property
    def secret_headers(self) -> frozenset[str]:
        return frozenset() if self.body_claim else frozenset([self.header.lower()])    # good for any body until it ends

    def refusal(self, sent: Sent, secrets: Sequence[str]) -> Refusal | None:
        given = sent.header(self.header.lower().encode())
        if given is None:
            return Refusal(f"exactly one {self.header} header is needed")
        token = given.decode("latin-1").removeprefix("Bearer ").strip()
        said = next((claims for secret in secrets if (claims := _claims(token, secret)) is not None), None)
        if said is None:
            return Refusal(f"{self.header} was not made with this secret")
        for name, wanted in self.claims.items():
            if said.get(name) != wanted:
                return Refusal(f'{self.header}: "{name}" must be "{wanted}"')
        if self.body_claim is not None:
            made = hashlib.sha256(sent.body).digest()
            shown = made.hex() if self.body_encoding == "hex" else base64.b64encode(made).decode()
            if not hmac.compare_digest(str(said.get(self.body_claim, "")).encode(), shown.encode()):
                return Refusal(f'{self.header}: "{self.body_claim}" is not the hash of this body')
        if self.aud and not sent.url:
            return Refusal('the address it must be for is not known; say it: {"deployment": {"url": "https://…"}}')
        if self.aud and said.get("aud") != sent.url:
            return Refusal(f'{self.header}: "aud" is not {sent.url}')
        return self._late(said, sent.now)

    def _late(self, said: Mapping[str, Any], now: float) -> Refusal | None:
        exp, iat = said.get("exp"), said.get("iat")
        if isinstance(exp, (int, float)) and now > exp + self.tolerance:
            return Refusal(f"{self.header} has expired", True)
        if self.max_age is not None:
            if not isinstance(iat, (int, float)):
                return Refusal(f'{self.header}: "iat" is missing')
            if abs(now - iat) > self.max_age:
                return Refusal(f"{self.header} is more than {self.max_age:g} s away from now", True)
        return None

    def sign(self, body: bytes, secret: str, timestamp: str = "", *, id: str = "", url: str = "",
             method: str = "POST") -> dict[str, str]:
        import jwt

        said: dict[str, Any] = dict(self.claims)
        if timestamp:
            said |= {"iat": int(timestamp), "exp": int(timestamp) + 300}
        if self.body_claim is not None:
            made = hashlib.sha256(body).digest()
            said[self.body_claim] = made.hex() if self.body_encoding == "hex" else base64.b64encode(made).decode()
        if self.aud:
            said["aud"] = url
        return self.delivery(id) | {self.header: jwt.encode(said, secret, "HS256")}

    def stamp(self, now: float) -> str:
        return str(int(now))


def _claims(token: str, secret: str) -> dict[str, Any] | None:
    """What the token says, or None when this key did not sign it. Its times are looked at by the caller."""
    import jwt  # of the extra web

    pem = secret.startswith(_PEM)
    allowed = ["RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA"] if pem else ["HS256", "HS384", "HS512"]
    no: Any = {f"verify_{name}": False for name in ("exp", "iat", "nbf", "aud", "iss", "sub", "jti")}
    try:
        said: dict[str, Any] = jwt.decode(token, secret.replace("\\n", "\n"), algorithms=allowed, options=no)
        return said
    except jwt.PyJWTError:
        return None


_PEM = "-----BEGIN"


@lru_cache(maxsize=64)
def _pem(text: str) -> None:
    """Raises BadKey for what is no public key."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        load_pem_public_key(text.replace("\\n", "\n").encode())
    except ValueError:
        raise BadKey("it begins as PEM and is no public key") from None


@lru_cache(maxsize=64)
def _is_public(text: str) -> bool:
    """Whether a text is a public key in another form than PEM: a JWK or a list of them, ssh's, DER in base64 or hex."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    if text.startswith(("ssh-", "ecdsa-sha2-")):
        return True
    try:
        made = json.loads(text)
    except ValueError:
        made = None
    if isinstance(made, dict) and ("keys" in made or made.get("kty", "oct") != "oct"):
        return True
    plain = "".join(text.split()).replace("\\n", "")
    for decode in (bytes.fromhex, lambda text: base64.urlsafe_b64decode(text.replace("+", "-").replace("/", "_")
                                                                        + "=" * (-len(text) % 4))):
        try:
            load_der_public_key(decode(plain))
            return True
        except UnsupportedAlgorithm:
            return True
        except ValueError:                                             # binascii.Error is one
            continue
    return False


@dataclass(frozen=True)
class Adyen(Scheme):
    """A keyed hash inside each notification of the body, over eight of its fields. The secret is the key as hex.

    Only those fields are covered; the rest of a notification is not.
    """

    def key(self, secret: str) -> bytes:
        try:
            return bytes.fromhex(secret)
        except ValueError:
            raise BadKey("it must be hex") from None

    def pair(self, text: str) -> tuple[str, str]:
        return text.encode().hex(), text.encode().hex()

    def refusal(self, sent: Sent, secrets: Sequence[str]) -> Refusal | None:
        items = sent.fields.get("notificationItems") if isinstance(sent.fields, dict) else None
        if not isinstance(items, list) or not items:
            return Refusal("notificationItems is missing")
        for item in items:
            made = _adyen(item)
            if made is None:
                return Refusal("a notification lacks its hmacSignature or something that is signed")
            text, given = made
            good = False
            for secret in secrets:
                digest = hmac.new(self.key(secret), text, "sha256").digest()
                good |= hmac.compare_digest(base64.b64encode(digest), given)
            if not good:
                return Refusal("hmacSignature was not made with this secret")
        return None

    def sign(self, body: bytes, secret: str, timestamp: str = "", *, id: str = "", url: str = "",
             method: str = "POST") -> dict[str, str]:
        raise BadOption("sign", "adyen", "Adyen", "a scheme that signs in a header, not in the body")


def _adyen(item: Any) -> tuple[bytes, bytes] | None:
    """The text that is signed, and its signature."""
    item = item.get("NotificationRequestItem") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(item.get("amount"), dict):
        return None
    amount = item["amount"]
    fields = [*(item.get(name, "") for name in ("pspReference", "originalReference", "merchantAccountCode",
                                                "merchantReference")),
              amount.get("value", ""), amount.get("currency", ""), item.get("eventCode", ""), item.get("success", "")]
    given = item["additionalData"].get("hmacSignature") if isinstance(item.get("additionalData"), dict) else None
    if not isinstance(given, str) or not all(isinstance(value, (str, int)) for value in fields):
        return None
    if any(":" in str(value) for value in (*fields[:3], *fields[4:])):
        return None                                                    # it could reach into its neighbours
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in fields]
    return ":".join(texts).encode(), given.encode()
