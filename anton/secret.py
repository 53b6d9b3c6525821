"""Secret: a reference to a value that is never stored, shown or logged.

    env("SLACK_SIGNING_SECRET")     read when it is used, so a rotated value counts at once
    "xxxx", "", None, unset         not set: what stands in an example is no credential
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

_PLACEHOLDER = re.compile(r"[xX]{3,}|\*{3,}|<[^<>]*>|")


@dataclass(frozen=True, repr=False)
class Env:
    """The environment variable `name`, read each time it is needed."""

    name: str

    def __repr__(self) -> str:
        return f'env("{self.name}")'


def env(name: str) -> Env:
    """A reference to the environment variable `name`; its value is never stored and never shown."""
    return Env(name)


def reveal(secret: Env | str | None) -> str | None:
    """The value, or None when it is not set: None, empty, or a placeholder such as "xxxx"."""
    value = os.environ.get(secret.name) if isinstance(secret, Env) else secret
    if value is None or _PLACEHOLDER.fullmatch(value.strip()):
        return None
    return value.strip()


def several(secret: Env | str | Iterable[Env | str] | None) -> tuple[Env | str, ...]:
    """One secret or many, as given to secret=, as a tuple."""
    if secret is None:
        return ()
    return (secret,) if isinstance(secret, (Env, str)) else tuple(secret)


def mask(secret: Env | str | None) -> str:
    """How a secret is shown: env("NAME") by its name, a value as ***."""
    return repr(secret) if isinstance(secret, Env) else "None" if secret is None else "***"
