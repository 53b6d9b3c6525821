"""Signed: schemes that sign a text made of the request: a keyed hash, or a signature of the service's private key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import urlsplit

from anton.errors import BadOption, one_of
from anton.scheme import BadKey, Refusal, Scheme
from anton.sent import Sent

HASHES = ("sha256", "sha1", "sha384", "sha512")
SIGNERS = ("ed25519", "ecdsa-sha256", "rsa-sha256", "rsa-sha1")
ENCODINGS = ("hex", "base64", "base64url")
UNITS = ("s", "ms", "iso8601")
_SIZES = {name: hashlib.new(name).digest_size for name in HASHES}
_ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII)
_SIGNATURES = 16                                                       # in one request; more are not looked at
# HubSpot writes these as they are in the URL that it signs; other escapes stay.
_HUBSPOT = re.compile("%(?:3A|2F|3F|40|21|24|27|28|29|2A|2C|3B)", re.IGNORECASE)


@dataclass(frozen=True)
class Signed(Scheme):
    """A signature over a text that is made of the request. Options: see Hmac."""

    header: str | tuple[str, ...]
    algo: str = "sha256"
    signed: str = "{body}"
    value: str = "{sig}"
    encoding: str = "hex"
    timestamp: str | None = None
    tolerance: float = 300.0
    unit: str = "s"
    separator: str | None = None
    id_header: str | None = None
    key_encoding: str | tuple[str, ...] = "utf8"
    ports: bool = False

    def __post_init__(self) -> None:
        of = type(self).__name__
        for option, allowed in (("encoding", ENCODINGS), ("unit", UNITS), ("key_encoding", tuple(_KEYS))):
            given = getattr(self, option)
            if not set(given if isinstance(given, tuple) else (given,)) <= set(allowed):
                raise BadOption(option, given, of, one_of(allowed))
        if not self.header or not all(isinstance(name, str) and name for name in self.headers):
            raise BadOption("header", self.header, of, "the name of a header, or several")
        if "{form}" not in self.signed and "{body:" not in self.signed and self.signed.count("{body}") != 1:
            raise BadOption("signed", self.signed, of, "a text with one {body}")
        if self.value.count("{sig}") != 1:
            raise BadOption("value", self.value, of, "a text with one {sig}")
        bound = "{ts}" in self.signed or (self.timestamp or "").startswith("body:")
        if bound != (self.timestamp is not None or "{ts}" in self.value):
            raise BadOption("timestamp", self.timestamp, of, "a header name, exactly when signed= contains {ts}")
        if ("{id}" in self.signed) != (self.id_header is not None):
            raise BadOption("id_header", self.id_header, of, "a header name, exactly when signed= contains {id}")

    @cached_property
    def headers(self) -> tuple[str, ...]:
        """The places of the signature; any of them will do."""
        return (self.header,) if isinstance(self.header, str) else tuple(self.header)

    @property
    def timed(self) -> bool:
        """Whether the request carries a time that is signed."""
        return self.timestamp is not None or "{ts}" in self.value

    @property
    def addressed(self) -> bool:
        """Whether the URL is signed."""
        return "{url}" in self.signed or "{hubspot_url}" in self.signed

    @cached_property
    def _parts(self) -> list[str]:
        return [part for part in re.split(r"(\{[^{}]+\})", self.signed) if part]

    @cached_property
    def _adjacent(self) -> bool:
        """Nothing stands between time and body: a digit could move from one to the other, so their number is fixed."""
        return "{ts}{body}" in self.signed or "{body}{ts}" in self.signed

    @cached_property
    def _items(self) -> list[tuple[str, str, str]]:
        """(before, sig or ts, after) of each item of the value."""
        texts = [self.value] if self.separator is None else self.value.split(self.separator)
        found = [re.fullmatch(r"(.*)\{(sig|ts)\}(.*)", text.strip()) for text in texts]
        return [(item[1], item[2], item[3]) for item in found if item]

    def stamp(self, now: float) -> str:
        if not self.timed:
            return ""
        if self.unit == "iso8601":
            return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return str(int(now * (1000 if self.unit == "ms" else 1)))

    def sign(self, body: bytes, secret: str, timestamp: str = "", *, id: str = "", url: str = "",
             method: str = "POST") -> dict[str, str]:
        name = self.headers[0]
        if name.startswith("body:"):
            raise BadOption("sign", name, type(self).__name__, "a scheme that signs in a header, not in the body")
        headers = self.delivery(id)
        if self.timestamp and not self.timestamp.startswith("body:"):
            headers[self.timestamp] = timestamp
        if self.id_header:
            headers[self.id_header] = id or headers.get(self.id_header, f"msg_{uuid.uuid4().hex}")
        raw = [(b"content-type", b"application/x-www-form-urlencoded")] if "{form}" in self.signed else []
        raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        message = next(self._messages(Sent(body, raw, 0.0, method, url), timestamp.encode()), None)
        assert message is not None, "a text to sign"
        shown = _encoded(self._make(self.private_key(secret), message), self.encoding)
        return headers | {name: self.value.replace("{ts}", timestamp).replace("{sig}", shown)}

    def refusal(self, sent: Sent, secrets: Sequence[str]) -> Refusal | None:
        given = self._given(sent)
        if given is None:
            return Refusal(f"exactly one {' or '.join(self.headers)} header is needed")
        signatures, stamp = self._read(given)
        if not signatures:
            return Refusal(f"{self.headers[0]} must look like {self.value} in {self.encoding}")
        at: float | None = None
        if self.timed:
            if self.timestamp is not None:
                stamp = self._timestamp(sent)
            at = self._time(stamp)
            if at is None:
                what = {"s": "Unix seconds", "ms": "Unix milliseconds", "iso8601": "an ISO 8601 time"}[self.unit]
                return Refusal(f"{self.timestamp or self.headers[0]} must be one header with {what}")
        message = None
        good = False
        for message in self._messages(sent, stamp):
            for secret in secrets:                                     # all of them, so time tells nothing
                good |= self._proves(self.key(secret), message, signatures)
        if message is None:
            return Refusal("the request lacks something that is signed")
        if not good:
            return Refusal(f"{self.headers[0]} was not made with this secret")
        if at is not None and abs(sent.now - at) > self.tolerance:
            return Refusal(f"{self.timestamp or self.headers[0]} is more than {self.tolerance:g} s away from now", True)
        return None

    def signed_id(self, sent: Sent) -> str | None:
        stamp = self._timestamp(sent) if self.timestamp is not None else self._read(self._given(sent) or [])[1]
        message = next(self._messages(sent, stamp), None)
        return None if message is None else f"sha256:{hashlib.sha256(b''.join(message)).hexdigest()}"

    def _given(self, sent: Sent) -> list[str] | None:
        """The signatures' texts; None when there is none, or one of the places holds more than one."""
        found = []
        for name in self.headers:
            if name.startswith("body:"):
                found += sent.all(name)
            elif (value := sent.header(name.lower().encode())) is not None:
                found.append(value.decode("latin-1"))
            elif any(key.lower() == name.lower().encode() for key, _ in sent.headers):
                return None                                            # it is there, and doubled
        return found or None

    def _read(self, given: list[str]) -> tuple[list[bytes], bytes]:
        """The signatures, decoded, and the time that stands beside them."""
        signatures: list[bytes] = []
        stamps: list[str] = []
        for text in given:
            items = [text] if self.separator is None else [item.strip() for item in text.split(self.separator)]
            for item in items:
                for before, kind, after in self._items:
                    if len(item) < len(before) + len(after) or not item.startswith(before) or not item.endswith(after):
                        continue
                    inner = item[len(before):len(item) - len(after)]
                    if kind == "ts":
                        stamps.append(inner)
                    elif (raw := _decoded(inner, self.encoding)) is not None and self._fits(raw):
                        signatures.append(raw)
        return signatures[:_SIGNATURES], stamps[0].encode("latin-1") if len(stamps) == 1 else b""

    def _timestamp(self, sent: Sent) -> bytes:
        assert self.timestamp is not None
        if self.timestamp.startswith("body:"):
            return (sent.one(self.timestamp) or "").encode("utf-8", "replace")
        return sent.header(self.timestamp.lower().encode()) or b""

    def _time(self, stamp: bytes) -> float | None:
        """The time in Unix seconds, or None when it is malformed."""
        if self.unit == "iso8601":
            text = stamp.decode("latin-1")
            try:
                return datetime.fromisoformat(text).timestamp() if _ISO.fullmatch(text) else None
            except (ValueError, OverflowError):
                return None
        digits = 10 if self.unit == "s" else 13
        if not stamp.isdigit() or len(stamp) > digits + 2 or (self._adjacent and len(stamp) != digits):
            return None
        return int(stamp) / (1000 if self.unit == "ms" else 1)

    def _messages(self, sent: Sent, stamp: bytes) -> Iterator[list[bytes]]:
        """What may have been signed, in pieces; nothing when a piece is missing."""
        for url in (_ports(sent.url) if self.ports else (sent.url,)):
            pieces = []
            for part in self._parts:
                piece = sent.body if part == "{body}" else stamp if part == "{ts}" else self._piece(part, sent, url)
                if piece is None:
                    return
                pieces.append(piece)
            yield pieces

    def _piece(self, part: str, sent: Sent, url: str) -> bytes | None:
        match part:
            case "{url}":
                return url.encode() or None
            case "{hubspot_url}":
                return _HUBSPOT.sub(lambda found: chr(int(found[0][1:], 16)), url).encode() or None
            case "{method}":
                return sent.method.encode()
            case "{form}":
                return _form(sent)
            case "{id}":
                assert self.id_header is not None
                id = sent.header(self.id_header.lower().encode())
                return None if id and b"." in id and "{id}." in self.signed else id    # else it could reach beyond
        if part.startswith("{body:"):
            value = sent.one(part[1:-1])
            return None if value is None else value.encode("utf-8", "surrogatepass")
        return part.encode()

    def private_key(self, secret: str) -> Any:
        """What the sender signs with."""
        return self.key(secret)

    def _fits(self, raw: bytes) -> bool:
        """Whether these bytes can be a signature at all."""
        return True

    @abstractmethod
    def _make(self, key: Any, message: list[bytes]) -> bytes: ...

    @abstractmethod
    def _proves(self, key: Any, message: list[bytes], signatures: list[bytes]) -> bool: ...


@dataclass(frozen=True)
class Hmac(Signed):
    """A keyed hash of the request.

    header: where the signature stands, any case; several: any of them.
    algo: "sha256" (default), "sha1", "sha384" or "sha512".
    signed: what is signed; {body} is the raw body, {ts} the time's text, {id} that of id_header, {url} the public URL,
        {method} the method.
    value: how the header wraps the signature {sig}, such as "sha256={sig}" or "t={ts},v1={sig}".
    separator: what stands between the items of such a value; an item may then come more than once.
    encoding: "hex" (default), "base64" or "base64url".
    timestamp: the header with the sender's time; None: there is none, or it stands in the value.
    unit: of that time, "s" (Unix seconds, default), "ms" or "iso8601".
    tolerance: seconds that time may differ from the database's; default 300.
    key_encoding: how the secret is written: "utf8" (default: as it is), "hex", "base64", "whsec" (base64 after an
        optional "whsec_") or "sha256" (the key is its hash); several: as any of them.
    ids: places of the delivery id, such as ("header:X-Delivery",) or ("body:id",): a second request with the same one
        is no new delivery. Default: none; with a timestamp ("signed",), the very same request.
    """

    def __post_init__(self) -> None:
        if self.algo not in HASHES:
            raise BadOption("algo", self.algo, "Hmac", one_of(HASHES))
        super().__post_init__()
        if not self.ids and self.timed:
            object.__setattr__(self, "ids", ("signed",))

    @cached_property
    def _encodings(self) -> tuple[str, ...]:
        return (self.key_encoding,) if isinstance(self.key_encoding, str) else self.key_encoding

    def key(self, secret: str) -> list[bytes]:
        keys = []
        for name in self._encodings:
            try:
                keys.append(_KEYS[name](secret))
            except ValueError:
                continue
        if not any(keys):
            shown = 'base64, such as "whsec_…"' if "whsec" in self._encodings else " or ".join(self._encodings)
            raise BadKey(f"it must be {shown}, and not empty")
        return [key for key in keys if key]

    def private_key(self, secret: str) -> bytes:
        return _KEYS[self._encodings[0]](secret)

    def pair(self, text: str) -> tuple[str, str]:
        made = {"hex": text.encode().hex(), "base64": base64.b64encode(text.encode()).decode()}
        made["whsec"] = "whsec_" + made["base64"]
        secret = made.get(self._encodings[0], text)
        return secret, secret

    def _fits(self, raw: bytes) -> bool:
        return len(raw) == _SIZES[self.algo]

    def _make(self, key: bytes, message: list[bytes]) -> bytes:
        made = hmac.new(key, None, self.algo)
        for piece in message:
            made.update(piece)
        return made.digest()

    def _proves(self, key: list[bytes], message: list[bytes], signatures: list[bytes]) -> bool:
        good = False
        for one in key:
            made = self._make(one, message)
            for signature in signatures:
                good |= hmac.compare_digest(made, signature)
        return good


@dataclass(frozen=True)
class PublicKey(Signed):
    """A signature that only the service can make; the secret is its public key. Options: see Hmac.

    algo: "ed25519" (the key as hex), "ecdsa-sha256", "rsa-sha256" or "rsa-sha1" (the key as PEM, or base64 of DER).
    sign() wants the private key, in the same form.
    """

    algo: str = "ed25519"

    def __post_init__(self) -> None:
        if self.algo not in SIGNERS:
            raise BadOption("algo", self.algo, "PublicKey", one_of(SIGNERS))
        super().__post_init__()

    def key(self, secret: str) -> Any:
        return _public_key(secret, self.algo)

    def private_key(self, secret: str) -> Any:
        return _private_key(secret, self.algo)

    def pair(self, text: str) -> tuple[str, str]:
        return _pair(text, self.algo)

    def _make(self, key: Any, message: list[bytes]) -> bytes:
        made: bytes = key.sign(b"".join(message), *_how(self.algo))
        return made

    def _proves(self, key: Any, message: list[bytes], signatures: list[bytes]) -> bool:
        from cryptography.exceptions import InvalidSignature  # of the extra web

        text = b"".join(message)
        for signature in signatures:
            try:
                key.verify(signature, text, *_how(self.algo))
                return True
            except InvalidSignature:
                continue
        return False


def _how(algo: str) -> tuple[Any, ...]:
    """What sign() and verify() of such a key want besides the text."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding

    match algo:
        case "ecdsa-sha256":
            return (ec.ECDSA(hashes.SHA256()),)
        case "rsa-sha256":
            return padding.PKCS1v15(), hashes.SHA256()
        case "rsa-sha1":
            return padding.PKCS1v15(), hashes.SHA1()                   # noqa: S303
    return ()


@lru_cache(maxsize=64)
def _public_key(text: str, algo: str) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        if algo == "ed25519":
            return ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
        key = load_der_public_key(_der(text))
        if isinstance(key, ec.EllipticCurvePublicKey if algo.startswith("ecdsa") else rsa.RSAPublicKey):
            return key
    except ValueError:
        pass
    form = "64 hex digits" if algo == "ed25519" else "PEM, or its base64"
    raise BadKey(f"it must be a public key for {algo}: {form}")


@lru_cache(maxsize=64)
def _private_key(text: str, algo: str) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    if algo == "ed25519":
        return ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text))
    return load_der_private_key(_der(text), None)


@lru_cache(maxsize=64)
def _pair(text: str, algo: str) -> tuple[str, str]:
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    seed = hashlib.sha256(text.encode())
    if algo == "ed25519":
        return seed.hexdigest(), _private_key(seed.hexdigest(), algo).public_key().public_bytes_raw().hex()
    private = ec.derive_private_key(int(seed.hexdigest(), 16) >> 1, ec.SECP256R1()) if algo.startswith("ecdsa") \
        else rsa.generate_private_key(65537, 2048)
    der = private.private_bytes(to.Encoding.DER, to.PrivateFormat.PKCS8, to.NoEncryption())
    public = private.public_key().public_bytes(to.Encoding.DER, to.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(der).decode(), base64.b64encode(public).decode()


def _der(text: str) -> bytes:
    """What is in PEM, whose lines an environment variable may have lost."""
    inner = re.sub(r"-----[A-Z ]+-----|\\n|\s", "", text)
    return base64.b64decode(inner, validate=True)


def _whsec(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix("whsec_"), validate=True)


_KEYS: dict[str, Callable[[str], bytes]] = {
    "utf8": str.encode,
    "hex": bytes.fromhex,
    "base64": lambda secret: base64.b64decode(secret, validate=True),
    "whsec": _whsec,
    "sha256": lambda secret: hashlib.sha256(secret.encode()).digest(),
}


def _encoded(raw: bytes, encoding: str) -> str:
    if encoding == "hex":
        return raw.hex()
    made = base64.b64encode(raw) if encoding == "base64" else base64.urlsafe_b64encode(raw).rstrip(b"=")
    return made.decode()


def _decoded(text: str, encoding: str) -> bytes | None:
    try:
        if encoding == "hex":
            return binascii.unhexlify(text)
        if encoding == "base64url":
            text = text.replace("-", "+").replace("_", "/")
            text += "=" * (-len(text) % 4)
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _ports(url: str) -> tuple[str, ...]:
    """The URL as it is, with the port written out, and without: senders differ."""
    try:
        parts = urlsplit(url)
        host, port = parts.netloc.rpartition(":")[0] if parts.port else parts.netloc, parts.port
    except ValueError:
        return (url,)
    full = f"{host}:{port or (443 if parts.scheme == 'https' else 80)}"
    return tuple(dict.fromkeys((url, parts._replace(netloc=full).geturl(), parts._replace(netloc=host).geturl())))


def _form(sent: Sent) -> bytes | None:
    """Names and values of a form, sorted. Another body counts when the URL, which is signed, has its bodySHA256."""
    digest = [value for name, value in sent.query if name == "bodySHA256"]
    if digest:
        made = hashlib.sha256(sent.body).hexdigest()
        return b"" if len(digest) == 1 and hmac.compare_digest(made.encode(), digest[0].lower().encode()) else None
    if sent.form is None:
        return None
    return "".join(name + value for name, value in sorted(set(sent.form))).encode()
