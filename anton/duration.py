"""Duration: "30s" "5m" "24h", wherever Anton takes a length of time."""

from __future__ import annotations

import re
from datetime import timedelta

from anton.errors import BadOption

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*")
_ALLOWED = 'a text such as "500ms", "30s", "5m", "1h30m", "24h", "7d" or "2w", a number of seconds, or a timedelta'


def duration(value: str | float | timedelta, option: str = "duration", of: str = "") -> timedelta:
    """The length of time that `value` means: "30s", "1h30m", seconds as a number, or a timedelta. Never negative.

    option, of: whose value it is, for the error. Raises BadOption.
    """
    if isinstance(value, timedelta):
        length = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        length = _seconds(float(value), value, option, of)
    elif isinstance(value, str) and value.strip() and not _PART.sub("", value.strip()):
        total = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value))
        length = _seconds(total, value, option, of)
    else:
        raise BadOption(option, value, of, _ALLOWED)
    if length < timedelta(0):
        raise BadOption(option, value, of, f"{_ALLOWED}, not negative")
    return length


def say(length: timedelta) -> str:
    """The shortest text that `duration` reads back as the same length: "5m", "1h30m", "0s"."""
    left, text = round(length / timedelta(milliseconds=1)), ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def _seconds(seconds: float, value: object, option: str, of: str) -> timedelta:
    try:
        return timedelta(seconds=seconds)
    except (OverflowError, ValueError):
        raise BadOption(option, value, of, _ALLOWED) from None
