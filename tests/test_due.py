"""Due: what a cron expression means, in every time zone, also on the days that clocks change."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anton.due import last_due, next_due, normal, rules, upcoming
from anton.errors import BadOption
from benchmarks import clocks

ZONES = sorted(available_timezones())


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def all_due(expression: str, tz: str, start: datetime, end: datetime) -> list[datetime]:
    return list(takewhile(lambda at: at < end, upcoming(expression, tz, start)))


@pytest.mark.parametrize("expression, after, due", [
    ("0 0 * * *", "2026-11-22 10:00", "2026-11-23 00:00"),
    ("0 0 * * *", "2026-11-23 00:00", "2026-11-24 00:00"),              # strictly later
    ("*/5 9-17 * * MON-FRI", "2026-11-20 17:55", "2026-11-23 09:00"),
    ("*/5 9-17 * * mon-fri", "2026-11-23 09:01:30.5", "2026-11-23 09:05"),
    ("0 0 29 2 *", "2026-11-22", "2028-02-29"),
    ("0 0 L * *", "2026-02-01", "2026-02-28"),
    ("@daily", "2026-11-22 10:00", "2026-11-23 00:00"),
    ("@every 30", "2026-11-22 10:00:29.9", "2026-11-22 10:00:30"),
    ("@every 30", "2026-11-22 10:00:30", "2026-11-22 10:01:00"),
])
def test_the_next_due_time(expression, after, due):
    assert next_due(expression, "UTC", utc(after)) == utc(due)


def test_a_time_the_clocks_skip_runs_right_after_the_gap():
    due = all_due("30 2 * * *", "Europe/Berlin", utc("2026-03-28 12:00"), utc("2026-03-31"))
    assert due == [utc("2026-03-29 01:00"), utc("2026-03-30 00:30")]


def test_a_time_that_comes_twice_runs_once():
    due = all_due("30 2 * * *", "Europe/Berlin", utc("2026-10-24 12:00"), utc("2026-10-27"))
    assert due == [utc("2026-10-25 00:30"), utc("2026-10-26 01:30")]


def test_an_hour_that_clocks_change_by_half_is_neither_lost_nor_doubled():
    due = all_due("0 */2 * * *", "Australia/Lord_Howe", utc("2026-04-04 12:00"), utc("2026-04-04 20:00"))
    assert due == [utc("2026-04-04 13:00"), utc("2026-04-04 15:30"), utc("2026-04-04 17:30"), utc("2026-04-04 19:30")]


def test_a_midnight_that_is_skipped_is_no_time_of_the_day_before():
    due = all_due("0 */6 * * *", "Asia/Beirut", utc("2026-03-28 20:00"), utc("2026-03-29 10:00"))
    assert due == [utc("2026-03-29 03:00"), utc("2026-03-29 09:00")]


@pytest.mark.parametrize("seconds", range(0, 3 * 3600, 600))
def test_what_is_next_is_never_in_the_past_while_an_hour_repeats(seconds):
    after = utc("2026-10-24 23:30") + timedelta(seconds=seconds)
    for expression in ("30 2 * * *", "*/20 * * * *", "15 * * * *", "@every 600"):
        due = next_due(expression, "Europe/Berlin", after)
        assert due is not None and due > after


@pytest.mark.parametrize("tz", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
def test_what_runs_by_the_minute_keeps_its_pace_while_clocks_change(tz):
    due = all_due("*/15 * * * *", tz, utc("2026-03-01"), utc("2026-04-10"))
    zone = ZoneInfo(tz)
    assert {due.astimezone(zone).minute % 15 for due in due} == {0}
    assert {later - earlier for earlier, later in pairwise(due)} == {timedelta(minutes=15)}


@pytest.mark.parametrize("tz", ["Europe/Berlin", "America/New_York", "Australia/Sydney", "Pacific/Chatham"])
def test_a_daily_time_runs_once_on_each_local_day(tz):
    zone = ZoneInfo(tz)
    due = all_due("30 3 * * *", tz, datetime(2026, 1, 1, tzinfo=zone), datetime(2027, 1, 1, tzinfo=zone))
    days = [due.astimezone(zone).date() for due in due]
    assert len(days) == len(set(days)) == 365


@pytest.mark.parametrize("tz", clocks.ZONES)
def test_a_scan_of_every_minute_finds_the_same_times_around_each_change_of_the_clocks(tz):
    zone, year = ZoneInfo(tz), [utc("2026-01-01") + timedelta(days=n) for n in range(400)]
    changes = [day for day, then in pairwise(year)
               if day.astimezone(zone).utcoffset() != then.astimezone(zone).utcoffset()]
    for day in changes or year[-1:]:
        due, missed, doubled = clocks.compare(clocks.CRONS, (tz,), day - timedelta(days=1), 3)
        assert due > 300
        assert (missed, doubled) == (0, 0)


@given(st.sampled_from(ZONES), st.sampled_from((*clocks.CRONS, "@every 17", "@every 1800", "0 0 29 2 *", "0 8 L * *")),
       st.datetimes(datetime(1985, 1, 1), datetime(2045, 1, 1), timezones=st.just(UTC)))
@settings(max_examples=300, deadline=None)
def test_times_are_later_than_asked_in_order_and_the_same_from_wherever_one_looks(tz, expression, after):
    times = list(islice(upcoming(expression, tz, after), 30))
    assert times[0] > after
    assert all(earlier < later for earlier, later in pairwise(times))
    for at, later in pairwise(times):
        assert next_due(expression, tz, at) == later
        assert next_due(expression, tz, later - timedelta(microseconds=1)) == later
    assert last_due(expression, tz, after, times[-1]) == times[-1]
    assert last_due(expression, tz, times[-2], times[-1] - timedelta(microseconds=1)) is None


@pytest.mark.parametrize("wrong", [
    "60 * * * *", "0 0 31 2 *", "0 0 * * MOO", "@fortnightly", "@every 0", "@every 1 moon", "*/0 * * * *",
    "", "* * * *", "5-1 * * * *", "* * * * * *"])
def test_what_is_no_cron_expression_is_refused(wrong):
    with pytest.raises(BadOption):
        normal(wrong)


def test_a_zone_that_is_not_known_is_refused():
    with pytest.raises(BadOption, match="Europe/Belin"):
        next_due("0 0 * * *", "Europe/Belin", utc("2026-01-01"))


def test_rules_are_those_of_sql_and_have_defaults():
    assert rules({}, "0 0 * * *", "UTC", "x") == {
        "misfire": "once", "overlap": "queue", "jitter": "0 s", "starts_at": None, "ends_at": None, "options": {}}
    kept = rules({"misfire": "all", "overlap": "skip", "jitter": "5m", "timeout": "1h", "attempts": "3", "backoff": 2},
                 "0 0 * * *", "UTC", "x")
    assert (kept["misfire"], kept["overlap"], kept["jitter"]) == ("all", "skip", "300 s")
    assert kept["options"] == {"timeout": "3600 s", "backoff": "2 s", "attempts": 3}


def test_start_and_end_are_dates_or_times_as_the_clocks_of_the_zone_show_them():
    def ends(start: object, end: object) -> tuple[str, str]:
        kept = rules({"start": start, "end": end}, "0 0 * * *", "Europe/Berlin", "x")
        return kept["starts_at"][:19], kept["ends_at"][:19]

    assert ends("2026-07-01", date(2026, 12, 24)) == ("2026-06-30T22:00:00", "2026-12-24T22:59:59")
    assert ends("2026-07-01 09:00", utc("2026-12-24")) == ("2026-07-01T07:00:00", "2026-12-24T00:00:00")
    assert ends("2026-07-01T09:00Z", datetime(2026, 7, 1, 12)) == ("2026-07-01T09:00:00", "2026-07-01T10:00:00")


@pytest.mark.parametrize("wrong, match", [
    ({"misfire": "twice"}, '"once", "all"'), ({"overlap": "no"}, '"queue", "skip"'), ({"jitter": "5 moons"}, "jitter"),
    ({"jitter": "20m"}, "less than what lies between two times, here 0:15:00"), ({"jitter": -1}, "jitter"),
    ({"start": "soon"}, '"2026-12-24'), ({"end": 5}, '"2026-12-24'), ({"attempts": 0}, "whole number"),
    ({"start": "2026-02-02", "end": "2026-02-01"}, "start"), ({"timeout": "soon"}, "timeout")])
def test_a_wrong_rule_names_what_is_allowed(wrong, match):
    with pytest.raises(BadOption, match=match):
        rules(wrong, "*/15 * * * *", "UTC", "x")
