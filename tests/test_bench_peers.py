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
    return {"name": name, "version": "1", "settings": "s", "recovers": "r", **figures}


FOUND = {
    "run": {"wait_s": 90},
    "peers": [
        peer("ours", drain_per_s=10, lost=0, recovery_s=1.5),
        peer("theirs", drain_per_s=20, lost=3, recovery_s=None),
        peer("broken", error="rates: it ended"),
    ],
}


def test_a_peer_that_wins_is_in_bold() -> None:
    text = report.table(FOUND)
    assert "| theirs 1 | – | **20** | – | – | – | not in 90 | 3 | – |" in text
    assert "| ours 1 | – | 10 | – | – | – | **1.5** | **0** | – |" in text
    assert "| broken 1 | failed |" in text


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
