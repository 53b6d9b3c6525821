"""Clocks: the due times of schedules against a scan of every minute, through 400 days in 20 time zones.

The scan knows nothing of anton/due.py: it asks zoneinfo what the clocks show in each minute, and says of a minute
whether an expression is due in it. An hour or minute field that begins with * is due whenever the clocks show it. Of
others a time that is shown twice is due the first time, and one that is never shown in the minute after the gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from zoneinfo import ZoneInfo

from anton.due import upcoming
from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench

MINUTE = timedelta(minutes=1)
START = datetime(2026, 1, 1, tzinfo=UTC)
ZONES = ("UTC", "Europe/Berlin", "Europe/London", "Europe/Dublin", "Europe/Istanbul", "America/New_York",
         "America/Los_Angeles", "America/St_Johns", "America/Santiago", "America/Havana", "America/Sao_Paulo",
         "America/Nuuk", "Africa/Cairo", "Africa/Casablanca", "Asia/Beirut", "Asia/Kathmandu", "Asia/Gaza",
         "Australia/Lord_Howe", "Pacific/Chatham", "Antarctica/Troll")
CRONS = ("0 0 * * *", "30 0 * * *", "30 2 * * *", "0,15,45 1-3 * * *", "59 23 * * *", "*/20 * * * *", "7 * * * *",
         "0 */2 * * *", "*/30 1-2 * * SUN", "0 */3 29 2,3 *", "15 3 1,15 * MON", "0 12 * * 1-5", "0 0 31 * *",
         "45 1 * 3,10 0", "5/25 4 */7 * *")
_NAMES = {name: n for names in ("SUN MON TUE WED THU FRI SAT", "_ JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC")
          for n, name in enumerate(names.split())}
_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


@dataclass(frozen=True)
class Minute:
    """What the clocks show in a minute. again: for the second time. skipped: what they never showed just before it."""

    at: datetime
    wall: datetime
    again: bool
    skipped: tuple[datetime, ...]


def minutes(zone: str, start: datetime, days: int) -> Iterator[Minute]:
    """Each minute of so many days."""
    place, before = ZoneInfo(zone), (start - MINUTE).astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    for n in range(days * 1440):
        at = start + n * MINUTE
        shown = at.astimezone(place)
        wall = shown.replace(tzinfo=None)
        gap = int((wall - before) / MINUTE)
        yield Minute(at, wall, bool(shown.fold), tuple(before + k * MINUTE for k in range(1, gap)) if gap > 1 else ())
        before = wall


class Expression:
    """Five fields, read in the plainest way."""

    def __init__(self, cron: str) -> None:
        self.fields = cron.split()
        self.minute, self.hour, self.day, self.month, self.weekday = (
            frozenset(_values(field, *limits)) for field, limits in zip(self.fields, _RANGES, strict=True))
        self.both = self.fields[2].startswith("*") or self.fields[4].startswith("*")
        self.by_the_wall = self.fields[0].startswith("*") or self.fields[1].startswith("*")

    def shows(self, wall: datetime) -> bool:
        """Whether a wall time is one of its times."""
        if wall.minute not in self.minute or wall.hour not in self.hour or wall.month not in self.month:
            return False
        day, weekday = wall.day in self.day, bool({wall.isoweekday() % 7, wall.isoweekday()} & self.weekday)
        return (day and weekday) if self.both else (day or weekday)

    def due(self, minute: Minute) -> bool:
        """Whether it is due in a minute."""
        if self.by_the_wall:
            return self.shows(minute.wall)
        return (not minute.again and self.shows(minute.wall)) or any(self.shows(wall) for wall in minute.skipped)


def _values(field: str, low: int, high: int) -> Iterator[int]:
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        start = low if first == "*" else int(_NAMES.get(first, first))
        end = high if first == "*" or (step and not last) else int(_NAMES.get(last, last or start))
        yield from range(start, end + 1, int(step or 1))


def compare(crons: tuple[str, ...], zones: tuple[str, ...], start: datetime, days: int) -> tuple[int, int, int]:
    """How many times were due, how many of them upcoming() misses, and how many it has more, or twice."""
    due = missed = doubled = 0
    end = start + timedelta(days=days)
    for zone in zones:
        expressions = {cron: Expression(cron) for cron in crons}
        wanted: dict[str, list[datetime]] = {cron: [] for cron in crons}
        for minute in minutes(zone, start, days):
            for cron, expression in expressions.items():
                if expression.due(minute):
                    wanted[cron].append(minute.at)
        for cron in crons:
            found = list(takewhile(lambda at: at < end, upcoming(cron, zone, start - MINUTE)))
            right = set(wanted[cron])
            due += len(right)
            missed += len(right - set(found))
            doubled += len(found) - len(right & set(found))
    return due, missed, doubled


@bench(at_most("cron_missed", 0, "times"), at_most("cron_doubled", 0, "times"))
def cron(run: Run) -> Rows:
    """400 days of 15 expressions in 20 time zones."""
    days = run.size(400, 100)
    due, missed, doubled = compare(CRONS, ZONES if not run.quick else ZONES[1:4], START, days)
    if due < 1000:
        raise WrongResult(f"only {due} times were due")
    detail = {"due": due, "zones": len(ZONES), "expressions": len(CRONS), "days": days}
    return {"cron_missed": Row(missed, detail=detail), "cron_doubled": Row(doubled, detail=detail)}
