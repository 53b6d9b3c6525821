"""Secret: a reference to a value that is never stored, shown or logged.

    env("SLACK_SIGNING_SECRET")     read when it is used, so a rotated value counts at once
    "xxxx", "", None, unset         not set: what stands in an example is no credential
    revealed({"X-Key": env("K")})   headers as they are sent
    {"secret": …, "token": …}       for services that ask for a verify token besides
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import unquote

from anton.errors import BadOption, did_you_mean

SHORTEST = 8  # characters of a secret that is hidden in texts: a shorter one may be a word
_revealed: set[str] = set()
_URLSAFE = str.maketrans("+/", "-_")
_TELLING = re.compile(r"auth|token|key|secret|cookie|passw|credential|signature", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"[xX]{3,}|\*{3,}|<[^<>]*>|")


def hush_clients() -> None:
    """HTTP clients log the URL of each request, and its query or user may hold a secret: they only warn."""
    for name in ("httpx", "httpx2", "httpcore", "httpcore2"):          # the latter of headers, for DEBUG
        logging.getLogger(name).setLevel(logging.WARNING)


@dataclass(frozen=True, repr=False)
class Env:
    """The environment variable `name`, read each time it is needed."""

    name: str

    def __repr__(self) -> str:
        return f'env("{self.name}")'


def env(name: str) -> Env:
    """A reference to the environment variable `name`; its value is never stored and never shown."""
    return Env(name)


@dataclass(frozen=True, repr=False)
class VerifyToken:
    """What a service sends back when it asks whether an address is ours. It proves no event."""

    value: Env | str

    def __repr__(self) -> str:
        return f"VerifyToken({mask(self.value)})"


One = Env | VerifyToken | str
Many = Env | str | Iterable[Env | str]


def reveal(secret: One | None) -> str | None:
    """The value, or None when it is not set: None, empty, or a placeholder such as "xxxx"."""
    if isinstance(secret, VerifyToken):
        secret = secret.value
    value = os.environ.get(secret.name) if isinstance(secret, Env) else secret
    if value is None or _PLACEHOLDER.fullmatch(value.strip()):
        return None
    value = value.strip()
    if len(value) >= SHORTEST:
        _revealed.add(value)
    return value


def hide(text: str) -> str:
    """The text with *** for every secret that this process has used: services repeat in errors what they were sent."""
    for value in sorted(_revealed, key=len, reverse=True) if _revealed else ():
        text = text.replace(value, "***")
    return text


def hide_within(value: Any) -> Any:
    """The same for all texts of a JSON value, names among them."""
    match value:
        case str():
            return hide(value)
        case Mapping():
            return {hide_within(name): hide_within(one) for name, one in value.items()}
        case list() | tuple():
            return [hide_within(one) for one in value]
    return value


def revealed(headers: Mapping[str, Env | str]) -> dict[str, str]:
    """Headers as they are sent, without those that are not set.

    The value of an env(…), and of a header whose name says that it is a credential, is hidden from now on; so is what
    stands after "Bearer".
    """
    found: dict[str, str] = {}
    for name, value in headers.items():
        if not isinstance(value, Env) and not _TELLING.search(name):
            found[name] = value
        elif text := reveal(value):
            found[name] = text
            reveal(text.rpartition(" ")[2])
    return found


def unset_of(*secrets: object) -> str | None:
    """The variable of the first env(…) among them that is not set; None: all are."""
    return next((one.name for one in secrets if isinstance(one, Env) and reveal(one) is None), None)


def forget(value: str) -> None:
    """It is no secret any more: a process that lasts has rotated it."""
    _revealed.discard(value)


def has_secret(text: str) -> bool:
    """Whether a text has a secret in it that this process has used: plain, quoted, in hex or base64, or backwards."""
    seen = {text.lower(), unquote(text).lower()}
    return any(one.lower() in some for value in _revealed for one in _spelled(value) for some in seen)


@cache
def _spelled(value: str) -> frozenset[str]:
    data, made = value.encode(), {value, value[::-1], value.encode().hex()}
    for before in range(3):                                            # as part of a longer text, at each place in it
        whole = base64.b64encode(bytes(before) + data).decode().rstrip("=")
        core = whole[-(-before * 8 // 6):len(whole) - 1]
        made |= {core, core.translate(_URLSAFE)}
    return frozenset(made)


def several(secret: Many | Mapping[str, Many] | None) -> tuple[One, ...]:
    """One secret or many, as given to secret=, as a tuple.

    Raises BadOption for a mapping with other keys than "secret" and "token".
    """
    if secret is None:
        return ()
    if isinstance(secret, Mapping):
        if odd := next((name for name in secret if name not in ("secret", "token")), None):
            raise BadOption("secret", f"{odd}=***", "verify=", 'the keys "secret" and "token".'
                            f'{did_you_mean(odd, ("secret", "token"))}')
        tokens = several(secret.get("token"))
        return (*several(secret.get("secret")), *(VerifyToken(one) for one in tokens if isinstance(one, (Env, str))))
    return (secret,) if isinstance(secret, (Env, VerifyToken, str)) else tuple(secret)


def among(value: str, secrets: Iterable[str]) -> bool:
    """Whether a value that somebody sent is one of the secrets. The time it takes tells nothing about them."""
    made = _hash(value)
    found = False
    for secret in secrets:                                             # all of them
        found |= hmac.compare_digest(made, _hash(secret))
    return found


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def mask(secret: One | None) -> str:
    """How a secret is shown: env("NAME") by its name, a value as ***."""
    if isinstance(secret, VerifyToken):
        secret = secret.value
    return repr(secret) if isinstance(secret, Env) else "None" if secret is None else "***"
