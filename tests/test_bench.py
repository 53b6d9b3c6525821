"""The benches' own checks: a wrong output, left-over work or a missing peer never yields a figure."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__  # noqa: F401  registers all benches
from benchmarks.harness import (
    Bench,
    MissingPeer,
    Row,
    Rows,
    Run,
    WrongResult,
    at_least,
    at_most,
    benches,
    measure,
    percentile,
    save,
)
from benchmarks.llm import excused_by, ledger_gap
from benchmarks.readme import REPO, filled, table
from benchmarks.server import connect
from benchmarks.subject import check, same_rows, wait_idle
from chaos import page, report
from chaos.check import Verdict
from chaos.faults import Result
from chaos.report import BARS


def test_paid_again_may_be_only_what_a_killed_process_asked_and_was_not_answered_long_before():
    counts = {"answered": {"late": 1, "just now": 1, "once more": 1, "another's": 1},
              "recent": ["just now", "another's"], "inflight": ["once more", "another's too"]}
    assert excused_by({"late": 1, "just now": 1, "once more": 1, "unsent": 1}, counts) == {
        "just now", "once more", "unsent"}


@pytest.mark.parametrize("kept, arrived, left, gap, unsent", [
    ({"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1}, 0, 0),
    ({"a": 2}, {"a": 1}, {}, 1, 0),                                    # one too many in the ledger
    ({"a": 1}, {"a": 2}, {"a": 5}, 1, 0),                              # one that it does not know of
    ({"a": 2, "b": 1}, {"a": 1, "b": 2}, {}, 2, 0),                    # they do not make up for each other
    ({"a": 3}, {"a": 1}, {"a": 1}, 1, 1)])                             # a kill excuses no more than it left
def test_a_gap_of_the_ledger_counts_in_both_directions(kept, arrived, left, gap, unsent):
    differ, found = ledger_gap(kept, arrived, left)
    assert (sum(differ.values()), found) == (gap, unsent)


EXPECTED = "select n, s from (values (1, 'a'), (2, 'b'), (2, 'b')) x (n, s)"


@pytest.mark.parametrize(
    "found",
    [
        "(1, 'a'), (2, 'b')",
        "(1, 'a'), (2, 'b'), (2, 'b'), (2, 'b')",
        "(1, 'a'), (1, 'a'), (2, 'b')",
        "(1, 'a'), (2, 'b'), (2, null)",
    ],
)
def test_an_output_with_other_rows_or_other_counts_is_wrong(database: str, found: str) -> None:
    with connect(database) as conn, pytest.raises(WrongResult, match="expected rows"):
        same_rows(conn, EXPECTED, f"select n, s from (values {found}) x (n, s)")


def test_an_equal_output_with_nothing_left_passes(database: str) -> None:
    with connect(database) as conn:
        check(conn, EXPECTED, "select n, s from (values (2, 'b'), (1, 'a'), (2, 'b')) x (n, s)")


@pytest.mark.parametrize("table", ["job", "delayed", "lease"])
def test_work_that_is_left_over_is_wrong(database: str, table: str) -> None:
    more: dict[str, dict[str, object]] = {
        "lease": {"token": 1, "lease_until": "now()", "worker_id": 1},
        "delayed": {"run_at": "now()"},
    }
    row: dict[str, object] = {"handler_id": 1, "id": 1, "change_id": 1, "at": "now()", "lo": 1, "hi": 1, "op": "'n'"}
    row |= {"attempt": 0, "crashes": 0, "depth": 0, **more.get(table, {})}
    with connect(database) as conn:
        conn.execute(f"insert into anton.{table} ({', '.join(row)}) values ({', '.join(map(str, row.values()))})")
        with pytest.raises(WrongResult, match=f"anton.{table} holds 1 rows"):
            check(conn, EXPECTED, EXPECTED)
        with pytest.raises(WrongResult, match=f"still work in anton.{table}"):
            wait_idle(conn, seconds=0)


@pytest.mark.parametrize("problem", [WrongResult("lost 1"), MissingPeer("no npm"), RuntimeError("work ended with 1")])
def test_a_bench_that_cannot_end_well_reports_null_and_not_ok(problem: Exception) -> None:
    def broken(run: Run) -> Rows:
        raise problem

    for row in measure(Bench("broken", (at_least("a", 1), at_most("b", 1)), broken), None):  # type: ignore[arg-type]
        assert row["value"] is None
        assert row["ok"] is False
        assert str(problem) in row["detail"]["error"]


def test_the_report_has_the_five_keys_and_keeps_rows_that_were_not_measured_again(tmp_path: Path) -> None:
    def fine(run: Run) -> Rows:
        return {"python_batch_vs_floor": Row(0.5, 3.0), "peak_rss_mb": Row(251.0)}

    bars = at_least("python_batch_vs_floor", 0.4), at_most("peak_rss_mb", 250, "MB")
    save(measure(Bench("fine", bars, fine), None), tmp_path)  # type: ignore[arg-type]
    save(measure(Bench("fine", bars[:1], fine), None), tmp_path)  # type: ignore[arg-type]
    first, second = json.loads((tmp_path / "latest.json").read_text())
    assert list(first.items())[:5] == [
        ("name", "python_batch_vs_floor"),
        ("value", 0.5),
        ("unit", "ratio"),
        ("bar", 0.4),
        ("ok", True),
    ]
    assert first["cpu_s_per_1m"] == 3.0
    assert second == {"name": "peak_rss_mb", "value": 251.0, "unit": "MB", "bar": 250, "ok": False}


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile(range(1, 101), 99) == 99
    assert percentile([5.0], 50) == 5.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def test_the_readme_shows_the_figures_that_were_measured() -> None:
    readme = (REPO / "README.md").read_text()
    report = json.loads((REPO / "benchmarks/results/latest.json").read_text())
    assert filled(readme, report) == readme
    assert len(table(report).splitlines()) > 2


def test_the_page_on_benchmarks_says_what_each_figure_is() -> None:
    page, names = (REPO / "docs/benchmarks.md").read_text(), [bar.name for one in benches for bar in one.bars]
    assert len(names) >= 60 and [name for name in names if f"`{name}`" not in page] == []


def test_each_bar_of_actions_and_approvals_has_a_figure() -> None:
    found = {row["name"]: row for row in json.loads((REPO / "benchmarks/results/latest.json").read_text())}
    found |= {row["name"]: row for row in json.loads((REPO / "benchmarks/results/chaos.json").read_text())}
    names = ["approval_wrong", "approve_to_sent_p99_ms", "injection_out_of_policy", "injection_canary_out",
             "outbox_wrong_effects", "outbox_doubled", "outbox_unlisted"]
    assert [name for name in names if name not in found or found[name]["value"] is None] == []


def test_each_bar_of_flow_has_a_figure() -> None:
    found = {row["name"]: row for row in json.loads((REPO / "benchmarks/results/latest.json").read_text())}
    names = ["limit_violations", "limit_used", "order_violations", "ordered_vs_unordered", "per_key_vs_none",
             "rate_violations", "rate_used", "rate_key_violations", "fair_tenant_p99_ms", "flow_free_cost"]
    assert [name for name in names if name not in found or found[name]["value"] is None] == []


def test_the_readme_shows_what_was_survived() -> None:
    text = (REPO / "README.md").read_text()
    found = json.loads((REPO / "benchmarks/results/chaos.json").read_text())
    shown = page.table(found, json.loads((REPO / "benchmarks/results" / report.DETAIL).read_text()))
    assert page.filled(text, shown) == text
    assert len(found) == len(BARS) and len(shown.splitlines()) > 2


def _restarts(asked: int, n: int, **verdict: int) -> dict[str, Result]:
    return {"D1": Result(n, Verdict(**verdict), {"first_ack_p99_s": 1.0}, asked)}


def _kept(folder: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in json.loads((folder / "chaos.json").read_text())}


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ((100, 100), (8, 8), 100),
        ((8, 8), (100, 100), 100),
        ((100, 103), (100, 100), 100),  # it need not be done oftener than asked to count
        ((100, 100), (100, 60), 60),  # as long, and came to less
        ((8, 8), (8, 9), 9),
        ((100, 100), (0, 0), None),  # it raised
    ],
)
def test_a_shorter_run_leaves_the_figures_of_a_longer_one(
    first: tuple[int, int], second: tuple[int, int], kept: int | None, tmp_path: Path
) -> None:
    report.save(_restarts(*first), 1, tmp_path)
    found = _restarts(*second)
    if kept is None:
        found["D1"].verdict.require(False, "KeyError: 'x'")
    report.save(found, 2, tmp_path)
    assert _kept(tmp_path)["restarts"] == kept


def test_a_shorter_run_that_finds_something_wrong_replaces_a_longer_clean_one(tmp_path: Path) -> None:
    report.save(_restarts(100, 100), 1, tmp_path)
    report.save(_restarts(8, 8, lost=1), 2, tmp_path)
    assert _kept(tmp_path)["restarts"] == 8
    report.save(_restarts(8, 8), 3, tmp_path)
    assert _kept(tmp_path)["restart_lost"] == 0


@pytest.mark.parametrize("wrong", [{"phantom": 1}, {"wrong": ["not drained"]}])
def test_what_no_figure_of_a_bar_shows_misses_all_bars_of_its_fault(wrong: dict[str, Any]) -> None:
    result = Result(100, Verdict(**wrong), {"first_ack_p99_s": 1.0})
    assert {row["name"]: row["ok"] for row in report.rows({"D1": result})} == dict.fromkeys(
        ("restarts", "restart_lost", "restart_doubled", "first_ack_p99_s"), False
    )


def test_a_row_says_when_and_of_which_commit_it_is(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    report.save(_restarts(100, 100), 1, tmp_path)
    found = json.loads((tmp_path / report.DETAIL).read_text())["D1"]
    assert found["date"] in {f"{at:%Y-%m-%d}" for at in (before, datetime.now(UTC))}
    assert found["commit"] == report.commit()


def test_seconds_and_rows_are_no_trials() -> None:
    assert Result(60, trials=0).bound == "-" and Result(1001, trials=600).bound == "< 0.5 %"


def test_the_page_on_reliability_shows_what_was_measured() -> None:
    text = (REPO / "docs/reliability.md").read_text()
    found = json.loads((REPO / "benchmarks/results" / report.DETAIL).read_text())
    assert page.filled(text, page.faults(found)) == text


def test_fewer_bugs_that_are_caught_replace_more(tmp_path: Path) -> None:
    report.save({"bugs": Result(12)}, 1, tmp_path)
    report.save({"bugs": Result(11)}, 2, tmp_path)
    assert _kept(tmp_path) == {"planted_caught": 11}


def test_growth_is_from_the_first_measure_to_the_highest(tmp_path: Path) -> None:
    more = {"goodput": 1.0, "neighbour_ratio": 1.0, "rss_mb": [41.5, 42.0, 43.5]}
    report.save({"L1": Result(60, more=more)}, 1, tmp_path)
    assert _kept(tmp_path)["overload_rss_mb"] == 2.0


@pytest.mark.parametrize(("lost", "chance"), [(0, "< 3 %"), (1, "-")])
def test_the_chance_of_a_failure_is_told_only_where_there_was_none(lost: int, chance: str, tmp_path: Path) -> None:
    report.save(_restarts(100, 100, lost=lost), 1, tmp_path)
    assert json.loads((tmp_path / report.DETAIL).read_text())["D1"]["bound_95"] == chance
    assert chance in report.line("D1", _restarts(100, 100, lost=lost)["D1"]).split("  ")
    counts = {bar.name: 0 for bar in BARS} | {"restarts": 100, "restart_lost": lost}
    rows = [
        {"name": bar.name, "value": counts[bar.name], "bar": bar.limit, "ok": bar.name != "restart_lost" or not lost}
        for bar in BARS
    ]
    detail = {fault: {"bound_95": chance} for fault in page.TIMES.values()}
    [told] = [one for one in page.table(rows, detail).splitlines() if "-m immediate" in one]
    assert f"| {chance} |" in told
