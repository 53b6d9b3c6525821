"""Schedule: what happens by the clock.

    @cron.daily(at="03:00", tz="Europe/Berlin")   .hourly .weekly .monthly .every("30s"), cron("*/5 9-17 * * MON-FRI")
    def rebuild(ctx): ...                         or def rebuild(): ...

    plan (next_at)  --tick()-->  a row of tick + a job for the schedule's handler  --worker-->  the function, once

Due times live in the table schedule and are computed here; tick() in sql/60_schedule.sql fires what is due,
whoever calls it, and UNIQUE (schedule_id, planned_at) lets each time fire once. From there a firing is a job
like any other: leased, retried, dead-lettered, its writes committed with its ack. Times missed while nobody
was there fire once, late; then the plan goes on from now.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, overload
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from anton.app import current_app, place_of_caller
from anton.db import Database
from anton.duration import duration, say
from anton.errors import BadOption, BadSignature, UnknownOption, one_of

if TYPE_CHECKING:
    from anton.db import Conn

F = TypeVar("F", bound=Callable[..., Any])

SHORT = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
         "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *"}
DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")
_EVERY = re.compile(r"@every (\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Schedule:
    """A function and when it runs.

    cron: five fields, or "@every SECONDS". tz: an IANA name. title: how people say it ("Daily, at 03:00").
    place: "main.py:12". more: what else put_schedule() takes: its handler's options, for one.
    """

    name: str
    cron: str
    tz: str
    title: str
    fn: Callable[..., Any]
    wants_ctx: bool
    place: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def definition(self, app: str) -> dict[str, Any]:
        """What put_schedule() takes."""
        return {"app": app, "name": self.name, "cron": self.cron, "tz": self.tz, "title": self.title, **self.more}


def next_due(cron: str, tz: str, after: datetime) -> datetime | None:
    """The first due time later than `after`, in UTC; None when there is none in the next 50 years.

    On the days the clocks change this follows Debian's cron: a time that is skipped runs right after the gap, a
    time that comes twice runs once, and what runs every hour or every few minutes keeps its pace.
    Raises BadOption for a text that is no cron expression, or a time zone that is not known.
    """
    cron = normal(cron)
    every = _EVERY.fullmatch(cron)
    if every:
        seconds = float(every[1])
        return datetime.fromtimestamp((after.timestamp() // seconds + 1) * seconds, UTC)
    for due in _sim(cron, after.astimezone(_zone(tz))):
        utc = due.astimezone(UTC)
        if utc > after:                                                # in a repeated hour it may lie behind
            return utc
    return None


def normal(cron: str) -> str:
    """The expression as it is kept: five upper-case fields, or "@every SECONDS". Raises BadOption."""
    text = " ".join(str(cron).split())
    if text.startswith("@every "):
        seconds = duration(text[7:] if not _EVERY.fullmatch(text) else float(text[7:]), "cron", "the schedule")
        if seconds < timedelta(seconds=1):
            raise BadOption("cron", cron, "the schedule", "at least 1 s")
        return f"@every {seconds.total_seconds():g}"
    text = SHORT.get(text.lower(), text.upper())
    if len(text.split()) != 5:
        raise BadOption("cron", cron, "the schedule", 'five fields "minute hour day month weekday", such as '
                        f'"*/5 9-17 * * MON-FRI", "@every 30s", {one_of(list(SHORT))}')
    _sim(text, datetime(2026, 1, 1, tzinfo=UTC))
    return text


def _sim(cron: str, start: datetime) -> CronSim:
    try:
        return CronSim(cron, start)
    except CronSimError as error:
        raise BadOption("cron", cron, "the schedule", f"five cron fields; {str(error).lower()}") from None


def _zone(tz: str) -> ZoneInfo:
    try:
        return ZoneInfo(tz)
    except (KeyError, ValueError, OSError, TypeError):                 # the file system's errors come through
        raise BadOption("tz", tz, "the schedule", 'an IANA name, such as "UTC" or "Europe/Berlin"') from None


class Cron:
    """The decorator `cron`: cron("*/5 9-17 * * MON-FRI"), cron.daily, cron.every("30s") and so on.

    tz: an IANA time zone, default "UTC". name: default the function's. The function takes nothing or (ctx);
    ctx.planned_at is the time it was due.
    """

    def __call__(self, cron: str, *, tz: str = "UTC", name: str | None = None, **unknown: Any) -> Callable[[F], F]:
        """Five cron fields: minute hour day month weekday."""
        if callable(cron):
            raise BadSignature(getattr(cron, "__name__", "?"), "no times: @cron", '@cron("0 3 * * *") or @cron.daily',
                               place_of_caller())
        given = _options({"tz": tz, "name": name, **unknown})
        return _declare(cron, cron, given)

    def every(self, length: str | float | timedelta, *, name: str | None = None, **unknown: Any) -> Callable[[F], F]:
        """Every 30 s: at the multiples of the length since 1970, so that all agree on the times."""
        given = _options({"name": name, **unknown}, tz="UTC")
        text = duration(length, "every", "@cron.every")
        return _declare(f"@every {text.total_seconds():g}", f"Every {say(text)}", given)

    @overload
    def hourly(self, fn: F, /) -> F: ...
    @overload
    def hourly(self, *, minute: int = 0, tz: str = "UTC", name: str | None = None) -> Callable[[F], F]: ...
    def hourly(self, *fn: Any, **options: Any) -> Any:
        """Each hour, at `minute`."""
        given = _options(options, minute=0)
        title = "Hourly" + (f", at :{given['minute']:02}" if given["minute"] else "")
        return _perhaps(fn, _declare(f"{given['minute']} * * * *", title, given))

    @overload
    def daily(self, fn: F, /) -> F: ...
    @overload
    def daily(self, *, at: str = "00:00", tz: str = "UTC", name: str | None = None) -> Callable[[F], F]: ...
    def daily(self, *fn: Any, **options: Any) -> Any:
        """Each day at `at`, "03:00"."""
        given = _options(options, at="00:00")
        return _perhaps(fn, _declare(f"{_at(given)} * * *", _title("Daily", given), given))

    @overload
    def weekly(self, fn: F, /) -> F: ...
    @overload
    def weekly(self, *, on: str = "sunday", at: str = "00:00", tz: str = "UTC",
               name: str | None = None) -> Callable[[F], F]: ...
    def weekly(self, *fn: Any, **options: Any) -> Any:
        """Each week on a day ("monday") at `at`."""
        given = _options(options, on="sunday", at="00:00")
        word = str(given["on"]).lower()
        day = next((number for number, known in enumerate(DAYS) if len(word) > 2 and known.startswith(word)), None)
        if day is None:
            raise BadOption("on", given["on"], "@cron.weekly", one_of(DAYS))
        title = _title(f"Weekly, {DAYS[day].capitalize()}" if options else "Weekly", given)
        return _perhaps(fn, _declare(f"{_at(given)} * * {day}", title, given))

    @overload
    def monthly(self, fn: F, /) -> F: ...
    @overload
    def monthly(self, *, day: int | str = 1, at: str = "00:00", tz: str = "UTC",
                name: str | None = None) -> Callable[[F], F]: ...
    def monthly(self, *fn: Any, **options: Any) -> Any:
        """Each month on `day` (1 to 31, or "last"; months without it are left out) at `at`."""
        given = _options(options, day=1, at="00:00")
        day = given["day"]
        title = _title(f"Monthly, day {day}" if options else "Monthly", given)
        return _perhaps(fn, _declare(f"{_at(given)} {'L' if day == 'last' else day} * *", title, given))


cron = Cron()


async def fire(db: Database, conn: Conn) -> datetime | None:
    """Fires what is due and plans what has no next time. Returns when to call again; None: no schedules.

    Any number of processes may call it at once. An expression of SQL's that is none is disabled, not retried.
    """
    await db.call(conn, "tick")
    for row in await db.call(conn, "unplanned"):
        try:
            due = next_due(row["cron"], row["tz"], row["after"])
        except BadOption:
            due = None
        await db.call(conn, "plan", row["id"], row["cron"], row["tz"], due)
    due_at: datetime | None = await db.call_value(conn, "next_tick")
    return due_at


def _options(given: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    defaults = {"tz": "UTC", "name": None, **defaults}
    for option in given:
        if option not in defaults:
            raise UnknownOption(option, "@cron", tuple(defaults))
    return defaults | given


def _declare(text: str, title: str, given: dict[str, Any]) -> Callable[[F], F]:
    text = normal(text)
    _zone(given["tz"])

    def declare(fn: F) -> F:
        place = place_of_caller()
        name = given["name"] or fn.__name__
        current_app().claim_name("handler", name, place)               # its jobs are a handler's
        wants = _wants_ctx(fn, name, place)
        current_app().schedules[name] = Schedule(name, text, given["tz"], title, fn, wants, place)
        return fn

    return declare


def _wants_ctx(fn: Callable[..., Any], name: str, place: str) -> bool:
    if not callable(fn) or inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise BadSignature(name, "yield", "def NAME() or def NAME(ctx), also async", place)
    needed = [p for p in inspect.signature(fn).parameters.values()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1 or any(p.kind == p.KEYWORD_ONLY for p in needed):
        found = f"({', '.join(p.name for p in needed)})"
        raise BadSignature(name, found, "def NAME() or def NAME(ctx), also async", place)
    return bool(needed)


def _perhaps(fn: tuple[Any, ...], declare: Callable[[Any], Any]) -> Any:
    return declare(*fn) if fn else declare


def _at(given: dict[str, Any]) -> str:
    found = _CLOCK.fullmatch(given["at"]) if isinstance(given["at"], str) else None
    if found is None:
        raise BadOption("at", given["at"], "@cron", 'a time of day, such as "03:00"')
    return f"{int(found[2])} {int(found[1])}"


def _title(word: str, given: dict[str, Any]) -> str:
    clock = "" if given["at"] == "00:00" else f", at {given['at']}"
    return word + clock + ("" if given["tz"] == "UTC" else f" ({given['tz']})")
