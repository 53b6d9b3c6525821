"""Limit: how much a service lets through, stated by the app or learnt from what it answers.

    limits_of("600 requests/min, 100000 tokens/min", "OpenAiCompletion")
    learnt(headers)                                    x-ratelimit-limit-requests and its like, in any spelling
    retry_after(headers)                               seconds

The counting is done in Postgres, for all processes together: quota in sql/80_call.sql.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from anton.errors import BadOption

Unit = Literal["requests", "tokens"]

LONGEST = 86400.0  # seconds of a Retry-After that is believed
_SECONDS = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "m": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0,
            "d": 86400.0, "day": 86400.0}
_STATED = re.compile(r"\s*(\d[\d_]*)\s*(requests?|tokens?)\s*(?:/|per|a)\s*(\d+)?\s*([a-z]+)\s*")
_RESET = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
# OpenAI and what speaks its protocol; Anthropic, whose windows are minutes.
_NAMES: dict[str, Unit] = {"x-ratelimit-limit-requests": "requests", "x-ratelimit-limit-tokens": "tokens",
                           "anthropic-ratelimit-requests-limit": "requests",
                           "anthropic-ratelimit-tokens-limit": "tokens"}


@dataclass(frozen=True)
class Limit:
    """So many in each window of seconds."""

    unit: Unit
    amount: int
    seconds: float = 60.0

    def facts(self) -> dict[str, Any]:
        """As end_calls() takes it."""
        return {"unit": self.unit, "amount": self.amount, "seconds": self.seconds}


def limits_of(text: str | None, of: str) -> tuple[Limit, ...]:
    """Limits as an app states them. Raises BadOption."""
    if text is None:
        return ()
    found: dict[str, Limit] = {}
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = _STATED.fullmatch(part.lower())
        seconds = _SECONDS.get(match[4].rstrip("s") or "s") if match else None
        if match is None or seconds is None or not int(match[1]):
            raise BadOption("limit", text, of, 'such as "600 requests/min" or "10 requests/s, 100000 tokens/min"')
        unit: Unit = "requests" if match[2].startswith("request") else "tokens"
        if unit in found:
            raise BadOption("limit", text, of, f"one number of {unit}")
        found[unit] = Limit(unit, int(match[1]), seconds * int(match[3] or 1))
    return tuple(found.values())


def learnt(headers: Mapping[str, str]) -> tuple[Limit, ...]:
    """The limits that an answer's headers name. They are a minute's, but for some services that count days: those are
    left to 429 and Retry-After, as a day's amount may be used up in a minute."""
    return tuple(Limit(unit, int(headers[name])) for name, unit in _NAMES.items()
                 if str(headers.get(name, "")).isdigit() and int(headers[name]) > 0 and not _of_a_day(headers, name))


def _of_a_day(headers: Mapping[str, str], name: str) -> bool:
    """Whether all of it takes more than ten minutes to come back, by what is missing and how long that takes."""
    remaining = headers.get(name.replace("-limit-", "-remaining-"), "")
    reset = headers.get(name.replace("-limit-", "-reset-"), "")
    parts = _RESET.findall(reset)
    if not remaining.isdigit() or not parts or "".join(map("".join, parts)) != reset:
        return False
    seconds = sum(float(n) * (0.001 if unit == "ms" else _SECONDS[unit]) for n, unit in parts)
    limit = int(headers[name])
    return seconds * limit > 600 * max(limit - int(remaining), 1)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After-Ms or Retry-After in seconds, at most a day; None without one that makes sense."""
    with suppress(TypeError, ValueError, OverflowError):
        if "retry-after-ms" in headers:
            return _within(float(headers["retry-after-ms"]) / 1000)
        text = headers.get("retry-after", "")
        if not text:
            return None
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return _within(float(text))
        return _within((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return None


def _within(seconds: float) -> float:
    return min(max(0.0, seconds), LONGEST)                             # in this order 0 for nan, too
