"""Schedule: what happens by the clock.

    @cron.daily(at="03:00", tz="Europe/Berlin")   .hourly .weekly .monthly .every("30s"), cron("*/5 9-17 * * MON-FRI")
    def rebuild(ctx): ...                         or def rebuild(): ...

    plan (next_at, ahead)  --tick()-->  a row of tick + a job of the schedule's handler  --worker-->  the function, once

Due times live in the table schedule and are computed here (anton/due.py); tick() in sql/60_schedule.sql fires what is
due, whoever calls it, and UNIQUE (schedule_id, planned_at) lets each time fire once. From there a firing is a job like
any other: leased, retried, dead-lettered, its writes committed with its ack.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import chain, islice, takewhile
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack, overload

from anton.app import current_app, place_of_caller
from anton.db import Database
from anton.due import last_due, normal, rules, upcoming, zone
from anton.duration import duration, say
from anton.errors import BadOption, BadSignature, UnknownOption, one_of

if TYPE_CHECKING:
    from anton.db import Conn

F = TypeVar("F", bound=Callable[..., Any])

DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
AHEAD, CATCH_UP = 100, 1000                                            # times computed at once: to come, and missed
FAR = timedelta(days=40)                                               # the first beyond is the last to be computed
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


class Rules(TypedDict, total=False):
    """What every schedule may say.

    name: default the function's. misfire: what becomes of times that were missed. overlap: of a time that comes while
    the firing before is not done. jitter: each time is put off by a part of it. start, end: no time before, or after;
    a date, or a time as the clocks in tz show it. timeout, attempts, backoff: as a handler's.
    """

    name: str | None
    misfire: Literal["once", "all", "skip"]
    overlap: Literal["queue", "skip", "parallel"]
    jitter: str | float | timedelta
    start: str | date | datetime
    end: str | date | datetime
    timeout: str | float | timedelta
    attempts: int
    backoff: str | float | timedelta


class Options(Rules, total=False):
    """And where its clocks are. tz: an IANA name, default "UTC"."""

    tz: str


@dataclass(frozen=True)
class Schedule:
    """A function and when it runs.

    cron: five fields, or "@every SECONDS". tz: an IANA name. title: how people say it ("Daily, at 03:00").
    place: "main.py:12". rules: misfire, options and the like, as put_schedule() takes them. component: the one that is
    polled.
    """

    name: str
    cron: str
    tz: str
    title: str
    fn: Callable[..., Any]
    wants_ctx: bool
    place: str = ""
    rules: dict[str, Any] = field(default_factory=dict)
    component: object = None

    def definition(self, app: str) -> dict[str, Any]:
        """What put_schedule() takes."""
        return {"app": app, "name": self.name, "cron": self.cron, "tz": self.tz, "title": self.title,
                **self.rules}


class Cron:
    """The decorator `cron`: cron("*/5 9-17 * * MON-FRI"), cron.daily, cron.every("30s") and so on.

    The function takes nothing or (ctx); ctx.planned_at is the time it was due. Options: those of Rules and Options.
    """

    def __call__(self, cron: str, **options: Unpack[Options]) -> Callable[[F], F]:
        """Five cron fields: minute hour day month weekday."""
        if callable(cron):
            raise BadSignature(getattr(cron, "__name__", "?"), "no times: @cron", '@cron("0 3 * * *") or @cron.daily',
                               place_of_caller())
        return _declare(cron, cron, _options({**options}))

    def every(self, length: str | float | timedelta, **options: Unpack[Rules]) -> Callable[[F], F]:
        """Every 30 s: at the multiples of the length since 1970, so that all agree on the times."""
        given = _options({**options}, "tz")
        text = duration(length, "every", "@cron.every")
        return _declare(f"@every {text.total_seconds():g}", f"Every {say(text)}", given)

    @overload
    def hourly(self, fn: F, /) -> F: ...
    @overload
    def hourly(self, *, minute: int = 0, **options: Unpack[Options]) -> Callable[[F], F]: ...
    def hourly(self, *fn: Any, **options: Any) -> Any:
        """Each hour, at `minute`."""
        given = _options(options, minute=0)
        title = "Hourly" + (f", at :{given['minute']:02}" if given["minute"] else "")
        return _perhaps(fn, _declare(f"{given['minute']} * * * *", title, given))

    @overload
    def daily(self, fn: F, /) -> F: ...
    @overload
    def daily(self, *, at: str = "00:00", **options: Unpack[Options]) -> Callable[[F], F]: ...
    def daily(self, *fn: Any, **options: Any) -> Any:
        """Each day at `at`, "03:00"."""
        given = _options(options, at="00:00")
        return _perhaps(fn, _declare(f"{_at(given)} * * *", _title("Daily", given), given))

    @overload
    def weekly(self, fn: F, /) -> F: ...
    @overload
    def weekly(self, *, on: str = "sunday", at: str = "00:00",
               **options: Unpack[Options]) -> Callable[[F], F]: ...
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
    def monthly(self, *, day: int | str = 1, at: str = "00:00",
                **options: Unpack[Options]) -> Callable[[F], F]: ...
    def monthly(self, *fn: Any, **options: Any) -> Any:
        """Each month on `day` (1 to 31, or "last"; months without it are left out) at `at`."""
        given = _options(options, day=1, at="00:00")
        day = given["day"]
        title = _title(f"Monthly, day {day}" if options else "Monthly", given)
        return _perhaps(fn, _declare(f"{_at(given)} {'L' if day == 'last' else day} * *", title, given))


cron = Cron()


async def fire(db: Database, conn: Conn) -> datetime | None:
    """Fires what is due and plans what lacks times. Returns when to call again; None: no schedules.

    Any number of processes may call it at once. An expression of SQL's that is none is disabled, not retried.
    """
    await db.call(conn, "tick")
    for row in await db.call(conn, "unplanned"):
        times: list[datetime] = []
        error = None
        try:
            times = _ahead(row)
        except BadOption as wrong:
            error = str(wrong)
        await db.call(conn, "plan", row["id"], row["after"], times, times[-1] if times else None, error)
    due_at: datetime | None = await db.call_value(conn, "next_tick")
    return due_at


def times_of(row: Any, after: datetime) -> Iterator[datetime]:
    """The due times of a schedule as the database has it later than `after`, from its start to its end."""
    if row["starts_at"] is not None:
        after = max(after, row["starts_at"] - timedelta(microseconds=1))
    times = upcoming(row["cron"], row["tz"], after)
    return times if row["ends_at"] is None else takewhile(lambda at: at <= row["ends_at"], times)


def _ahead(row: Any) -> list[datetime]:
    """The next times after those that are known; none when there are no more."""
    now, times = row["at"], times_of(row, row["after"])
    first = next(times, None)
    if first is None:
        return []
    if first <= now and row["misfire"] != "all":                       # of many missed ones only the last can matter
        last = last_due(row["cron"], row["tz"], first, min(now, row["ends_at"] or now))
        times = chain([last] if last else [], times_of(row, now))
    found = [first]
    for at in islice(times, CATCH_UP):
        if found[-1] > now + FAR or (found[-1] > now and len(found) >= AHEAD):
            break
        found.append(at)
    return found


def _options(given: Mapping[str, Any], *without: str, **defaults: Any) -> dict[str, Any]:
    defaults = {**dict.fromkeys(Options.__annotations__), "tz": "UTC", **defaults}
    for option in given:
        if option not in defaults or option in without:
            raise UnknownOption(option, "@cron", tuple(name for name in defaults if name not in without))
    return {**defaults, **given}


def _declare(text: str, title: str, given: dict[str, Any]) -> Callable[[F], F]:
    text = normal(text, "@cron")
    zone(given["tz"], "@cron")
    kept = rules(given, text, given["tz"], "@cron")

    def declare(fn: F) -> F:
        place = place_of_caller()
        name = given["name"] or fn.__name__
        current_app().claim_name("handler", name, place)               # its jobs are a handler's
        wants = _wants_ctx(fn, name, place)
        current_app().schedules[name] = Schedule(name, text, given["tz"], title, fn, wants, place, kept)
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
