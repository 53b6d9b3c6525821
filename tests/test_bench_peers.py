"""The tables of the side-by-side run: from its JSON, with the best of a column in bold and nothing hidden."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.harness import WrongResult
from benchmarks.peers import report
from benchmarks.peers.__main__ import waits
from benchmarks.peers.known import NODE, peers


def peer(name: str, **figures: Any) -> dict[str, Any]:
    return {"name": name, "version": "1", "settings": "s", "default": "d", "tuned": "t", "commits": "c", **figures}


def kill(recovery_s: float | None, lost: int, doubled: int) -> dict[str, Any]:
    return {"recovery_s": recovery_s, "jobs": 400, "lost": lost, "doubled": doubled}


FOUND = {
    "run": {"wait_s": 75, "at": "2026-01-02T03:04:05+00:00", "postgres": "18", "cores": 2, "pinned": "2026-01-01"},
    "peers": [
        peer("ours", drain_per_s=10, recovery={
            "own": {"default": kill(30.5, 0, 7), "tuned": kill(6.5, 0, 8)},
            "commit": {"tuned": kill(6.0, 0, 0)},
            "child": {"default": kill(1.0, 0, 9)},
        }),
        peer("theirs", drain_per_s=20, recovery={"own": {"default": kill(None, 3, 0), "tuned": kill(5.5, 0, 8)}}),
        peer("broken", error="rates: it ended"),
    ],
}


def test_a_peer_that_wins_is_in_bold() -> None:
    text = report.table(FOUND)
    assert "| theirs 1 | – | – | **20** | – | – | – |" in text
    assert "| ours 1 | – | – | 10 | – | – | – |" in text
    row = "| theirs | its own connection | not in 75 | 3 of 400 | **0 of 400** | **5.5** | **0 of 400** | 8 of 400 |"
    assert row in text
    assert "| broken 1 | failed |" in text
    assert "Measured 2026-01-02 on Postgres 18 with 2 cores; the versions were the newest on 2026-01-01." in text


def test_each_way_to_write_and_to_kill_has_a_row_and_a_kill_of_a_part_takes_no_bold() -> None:
    text = report.table(FOUND)
    assert "| ours | its own connection | **30.5** | **0 of 400** | 7 of 400 | 6.5 | **0 of 400** | 8 of 400 |" in text
    assert "| ours | commits with the job: c | – | – | – | 6.0 | **0 of 400** | **0 of 400** |" in text
    assert "| ours, its worker process only | its own connection | 1.0 | 0 of 400 | 9 of 400 | – | – | – |" in text
    assert "| broken | failed |" in text


def test_waits_leave_out_the_first_probes_and_refuse_a_missing_start() -> None:
    committed = {0: 0, 1: 1_000_000, 2: 2_000_000}
    assert waits(committed, [(0, 90_000_000), (1, 3_000_000), (2, 3_000_000)], 1) == {
        "pickup_p50_ms": 1.0, "pickup_p99_ms": 2.0}
    with pytest.raises(WrongResult, match="2 starts of 3 probes"):
        waits(committed, [(0, 1), (1, 1)], 1)


def test_every_peer_is_pinned_and_no_lock_file_names_a_host() -> None:
    assert len({one.name for one in peers()}) == 7
    assert "resolved" not in (NODE / "package-lock.json").read_text()


def test_the_docs_show_the_run_that_was_kept() -> None:
    if report.PATH.exists():
        found = json.loads(report.PATH.read_text())
        page = (report.REPO / "docs" / "benchmarks.md").read_text()
        assert report.filled(page, report.table(found)) == page
