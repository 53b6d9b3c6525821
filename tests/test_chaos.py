"""The short form of `make chaos`, on the system's server: what it finds in the engine, and in engines with a bug.

The long form has more faults, larger numbers, and the bugs that take minutes to catch: see docs/reliability.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chaos.__main__ import catch, done
from chaos.bugs import BUGS, MORE, Bug, planted
from chaos.cell import cluster, make_template
from chaos.faults import Result, bound
from chaos.history import Conn, History, attempt
from chaos.page import faults, filled
from chaos.report import FULL, rows, table

SEED = 11
PLANTED = (*BUGS, *MORE)
SHORT = [  # fault, how often, seed; those that take long come first
    ("P1", 12, SEED),
    ("P1a", 60, SEED),
    ("P3a", 8, SEED),
    ("P3b", 6, SEED),
    ("P3c", 3, SEED),
    ("D1", 4, SEED),
    ("D2", 3, SEED),
    ("N1", 2, SEED),
    ("T1", 3, SEED),
    ("D5", 10, SEED),
    ("D6", 15, SEED),
    ("P5", 8, SEED),
    ("A5", 20, SEED),
    ("S1", 10, SEED),
    ("S2", 7, SEED),
    ("S3", 5, SEED),
    ("L3", 1, SEED),
    ("A3", 3, SEED),
    ("A4", 50_000, SEED),
    ("H1", 12, SEED),
    ("H2", 4, SEED),
    *(
        (fault, n, SEED)
        for fault, n in {bug.fault: bug.n for bug in PLANTED}.items()
        if fault not in ("P1a", "P3a", "P3b", "P5", "H1", "H2")
    ),
]
SERVER = {"D1", "D2", "H2"}  # these harm all databases of a server: they have one of their own, one after the other
AT_ONCE = 2  # databases with their workers; most of what they do is to wait

pytestmark = pytest.mark.system("it brings servers of its own, of the system's kind")


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """What came of a fault or a bug. All that were chosen are begun at once, several at a time."""
    futures: dict[Any, Future[Any]] = {}
    with ExitStack() as stack:
        one, other = (stack.enter_context(cluster(max_connections="1000")) for _ in range(2))
        shared, own = (one, make_template(one)), (other, make_template(other))
        several = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        single = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(lambda: [future.cancel() for future in futures.values()])
        for item in request.session.items:
            given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            if item.path != request.path or "outcome" not in getattr(item, "fixturenames", ()):
                continue
            if "bug" in given:
                bug = given["bug"]
                pool, place = (single, own) if bug.fault in SERVER else (several, shared)
                futures[bug] = pool.submit(catch, *place, bug, SEED)
            elif given["fault"] in SERVER:
                futures[tuple(given.values())] = single.submit(done, *own, *given.values())
            else:
                futures[tuple(given.values())] = several.submit(done, *shared, *given.values())
        yield lambda *key: futures[key if len(key) > 1 else key[0]].result()


@pytest.mark.parametrize(("fault", "n", "seed"), SHORT)
def test_nothing_is_lost_or_doubled_by(fault: str, n: int, seed: int, outcome: Callable[..., Any]) -> None:
    result = outcome(fault, n, seed)
    assert not result.verdict.text
    assert result.n >= n


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught_for_its_own_reason(bug: Bug, outcome: Callable[..., Any]) -> None:
    trial, found = outcome(bug)
    assert trial, found


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_bug_can_still_be_planted(bug: Bug) -> None:
    with planted(bug) as (modules, statements):
        assert modules or statements


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
@pytest.mark.parametrize(
    "found",
    [
        "",
        "lost 2, out_near: 1 is missing, out_shaky: 3 is missing, 2 rows are left in job, not drained",
        "lost 2, out_shaky: 3 is missing, not drained, and nothing acked for 60 s",
        "record 1 was not picked up in 60 s",
        "0 workers slept, not 2, 2 zombies did not try their ack",
        "the harness came by 0 leases, not 2, in 20 s for each",
        "a lease of None s, not of 30",
    ],
)
def test_no_bug_is_caught_by_what_the_harness_waited_for_in_vain(bug: Bug, found: str) -> None:
    assert not re.search(bug.sign, found)


def test_no_failure_in_n_trials_says_less_than_three_in_n() -> None:
    assert bound(1000) == "< 0.3 %" and bound(0) == "-"


def test_a_connection_that_breaks_at_a_rollback_leaves_its_producer_going(database: str, tmp_path: Path) -> None:
    def end(conn: Conn) -> None:
        with psycopg.connect(database, autocommit=True) as other:
            other.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))

    history = History(tmp_path / "history")
    with psycopg.connect(database, autocommit=True) as conn:
        assert not attempt(history, history.begin("src", "rollback", [1]), conn, end)
    assert [operation.state for operation in history.read()] == ["fail"]
    history.close()


def test_the_page_has_a_line_for_each_fault_that_was_done_and_names_the_others() -> None:
    verdict = {"acked": 1234, "unknown": 0, "lost": 1, "doubled": 0, "wrong": ["lost 1"]}
    made = {"n": 40, "trials": 38, "seed": 7, "date": "2026-11-26", "commit": "abc1234", "bound_95": "-"}
    text = faults({"D2": {**made, "first_ack_p99_s": 1.2345, **verdict}})
    (line,) = [line for line in text.splitlines() if line.startswith("| D2 ")]
    assert line.endswith(
        "| 40 | 38 | 1,234 | 0 | 1 | 0 | - | first_ack_p99_s 1.23 **lost 1** | 2026-11-26, abc1234, seed 7 |"
    )
    assert "Not in here: A3" in text and " D2," not in text
    page = "before\n<!-- chaos: x -->\nold\n<!-- /chaos -->\nafter\n"
    assert filled(page, text) == f"before\n<!-- chaos: x -->\n{text}<!-- /chaos -->\nafter\n"


def test_a_fault_that_raised_is_in_the_table_and_misses_its_bars() -> None:
    raised = Result()
    raised.verdict.wrong.append("KeyError: 'x'")
    for name in FULL:
        assert name in table({name: raised}, 1, "fsync=on")
        assert not any(row["ok"] or row["value"] is not None for row in rows({name: raised}))
