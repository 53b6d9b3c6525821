"""Due: the times a cron expression means, and the rules by which they are kept.

    upcoming("30 2 * * *", "Europe/Berlin", after)  ->  due times in UTC, in order, each later than `after`

cronsim does the arithmetic on the wall clock, where nothing is ever skipped or repeated; what the clocks' changes do
to a wall time is decided here, as Debian's cron does it. A time of day ("30 2 * * *") that is skipped is due right
after the gap, and one that comes twice is due once, the first time. What runs by the minute or by the hour (a minute
or hour field that begins with *) keeps its pace: it is due whenever the wall clock shows it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice, pairwise, takewhile
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from anton.duration import duration
from anton.errors import BadOption, one_of

SHORT = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
         "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *"}
MISFIRE = ("once", "all", "skip")
OVERLAP = ("queue", "skip", "parallel")
_EVERY = re.compile(r"@every (\d+(?:\.\d+)?)")
_DAY = timedelta(days=1)
_SECOND = timedelta(seconds=1)
_LATEST = datetime(9990, 1, 1, tzinfo=UTC)                             # calendars end soon after


def normal(cron: str, of: str = "the schedule") -> str:
    """The expression as it is kept: five upper-case fields, or "@every SECONDS". Raises BadOption."""
    text = " ".join(str(cron).split())
    if text.startswith("@every "):
        seconds = duration(text[7:] if not _EVERY.fullmatch(text) else float(text[7:]), "cron", of)
        if seconds < _SECOND:
            raise BadOption("cron", cron, of, "at least 1 s")
        return f"@every {round(seconds.total_seconds(), 3):.15g}"
    text = SHORT.get(text.lower(), text.upper())
    if len(text.split()) != 5:
        raise BadOption("cron", cron, of, 'five fields "minute hour day month weekday", such as '
                        f'"*/5 9-17 * * MON-FRI", "@every 30s", {one_of(list(SHORT))}')
    _sim(text, datetime(2026, 1, 1), of)
    return text


def zone(tz: str, of: str = "the schedule") -> ZoneInfo:
    """The time zone of an IANA name. Raises BadOption."""
    try:
        return ZoneInfo(tz)
    except (KeyError, ValueError, OSError, TypeError):                 # the file system's errors come through
        raise BadOption("tz", tz, of, 'an IANA name, such as "UTC" or "Europe/Berlin"') from None


def upcoming(cron: str, tz: str, after: datetime) -> Iterator[datetime]:
    """The due times later than `after`, in UTC and in order; ends when there is none in 50 years.

    Raises BadOption for a text that is no cron expression, or a time zone that is not known.
    """
    cron, place = normal(cron), zone(tz)
    every = _EVERY.fullmatch(cron)
    if every:
        times = _multiples(float(every[1]), after.timestamp())
    elif any(field.startswith("*") for field in cron.split()[:2]):
        times = _by_the_wall(cron, place, after.astimezone(UTC))
    else:
        times = _times_of_day(cron, place, after.astimezone(UTC))
    return takewhile(lambda at: at < _LATEST, times)


def next_due(cron: str, tz: str, after: datetime) -> datetime | None:
    """The first due time later than `after`, in UTC; None when there is none in the next 50 years."""
    return next(upcoming(cron, tz, after), None)


def last_due(cron: str, tz: str, after: datetime, until: datetime) -> datetime | None:
    """The newest due time in (after, until], found by looking back an hour, a day, a month and so on."""
    length = timedelta(hours=1)
    while True:
        start = max(after, until - length)
        found = deque(takewhile(lambda at: at <= until, upcoming(cron, tz, start)), maxlen=1)
        if found or start == after:
            return found[0] if found else None
        length *= 30


def rules(given: Mapping[str, Any], cron: str, tz: str, of: str) -> dict[str, Any]:
    """What a schedule says besides its times, as put_schedule() takes it. Missing and None mean the default.

    given: as typed. of: whose they are, for the errors. Raises BadOption.
    """
    kept: dict[str, Any] = {}
    for option, allowed in (("misfire", MISFIRE), ("overlap", OVERLAP)):
        value = given.get(option)
        if value is not None and value not in allowed:
            raise BadOption(option, value, of, one_of(allowed))
        kept[option] = value or allowed[0]
    kept["jitter"] = _jitter(given.get("jitter"), cron, tz, of)
    first, last = (_moment(option, given.get(option), tz, of) for option in ("start", "end"))
    if first and last and last < first:
        raise BadOption("end", given["end"], of, f"nothing before its start, {first}")
    kept["starts_at"], kept["ends_at"] = (at.isoformat() if at else None for at in (first, last))
    kept["options"] = {option: _seconds(duration(given[option], option, of)) for option in ("timeout", "backoff")
                       if given.get(option) is not None}
    attempts = given.get("attempts")
    if attempts is not None:
        if not str(attempts).isdecimal() or not int(attempts):
            raise BadOption("attempts", attempts, of, "a whole number from 1")
        kept["options"]["attempts"] = int(attempts)
    return kept


def _seconds(length: timedelta) -> str:
    return f"{length.total_seconds():.15g} s"


def _jitter(value: Any, cron: str, tz: str, of: str) -> str:
    length = duration(0 if value is None else value, "jitter", of)
    if length:
        times = list(islice(upcoming(cron, tz, datetime(2026, 1, 1, tzinfo=UTC)), 500))
        shortest = min((later - earlier for earlier, later in pairwise(times)), default=None)
        if shortest is not None and length >= shortest:
            raise BadOption("jitter", value, of, f"less than what lies between two times, here {shortest}")
    return _seconds(length)


def _moment(option: str, value: Any, tz: str, of: str) -> datetime | None:
    """A time as typed: aware, or as the clocks in `tz` show it. A date is its first moment, as an end its last."""
    allowed = 'a date or a time, such as "2026-12-24" or "2026-12-24 18:00", or a datetime'
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value) if len(value.strip()) > 10 else date.fromisoformat(value.strip())
        except ValueError:
            raise BadOption(option, value, of, allowed) from None
    if not isinstance(value, date):
        raise BadOption(option, value, of, allowed)
    if not isinstance(value, datetime):
        value = datetime.combine(value, time.max if option == "end" else time.min)
    if value.tzinfo is None:
        value = value.replace(tzinfo=zone(tz, of))
    utc: datetime = value.astimezone(UTC)
    return utc


def _sim(cron: str, wall: datetime, of: str = "the schedule") -> CronSim:
    try:
        return CronSim(cron, wall)
    except CronSimError as error:
        raise BadOption("cron", cron, of, f"five cron fields; {str(error).lower()}") from None


def _multiples(seconds: float, after: float) -> Iterator[datetime]:
    n = after // seconds
    while True:
        n += 1
        yield datetime.fromtimestamp(n * seconds, UTC)


def _times_of_day(cron: str, place: ZoneInfo, after: datetime) -> Iterator[datetime]:
    last = after
    for wall in _sim(cron, after.astimezone(place).replace(tzinfo=None)):
        first = wall.replace(tzinfo=place)                             # of a time that comes twice; fold=1 is the other
        at = first.astimezone(UTC)
        if at.astimezone(place).replace(tzinfo=None) != wall:          # the clocks skip it
            gap = _offset(place, at) - first.utcoffset()               # type: ignore[operator]
            at = _change(place, at - gap, at) or at
        if at > last:
            last = at
            yield at


def _by_the_wall(cron: str, place: ZoneInfo, after: datetime) -> Iterator[datetime]:
    at, offset = after, _offset(place, after)
    wall = (at + offset).replace(tzinfo=None)
    while True:
        for due in _sim(cron, wall):
            utc = (due - offset).replace(tzinfo=UTC)
            change = _change(place, at, utc)
            if change is not None:
                break
            yield utc
            at = utc
        else:
            return
        at, offset = change, _offset(place, change)
        wall = (at + offset - _SECOND).replace(tzinfo=None)            # what the clocks show then may be due itself


def _offset(place: ZoneInfo, at: datetime) -> timedelta:
    return at.astimezone(place).utcoffset() or timedelta()


def _change(place: ZoneInfo, after: datetime, until: datetime) -> datetime | None:
    """When the offset to UTC first changes in (after, until], None when it stays. No zone changes twice in a day."""
    offset, low = _offset(place, after), after
    while low < until:
        high = min(low + _DAY, until)
        if _offset(place, high) != offset:
            break
        low = high
    else:
        return None
    while high - low > _SECOND:
        middle = low + (high - low) / 2
        if _offset(place, middle) == offset:
            low = middle
        else:
            high = middle
    return high.replace(microsecond=0)
