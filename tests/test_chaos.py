"""The short form of `make chaos`, on the system's server: what it finds in the engine, and in engines with a bug.

The long form has more faults, larger numbers, and the bugs that take minutes to catch: see docs/reliability.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from servers import NoServer, Server

from chaos.__main__ import catch, done
from chaos.bugs import BUGS, Bug, planted
from chaos.cell import cluster, make_template
from chaos.report import bound

SEED = 11
SHORT = {
    "P1": 60,
    "P5": 8,
    "R1": 10,
    "D1": 4,
    "D2": 3,
    "D5": 10,
    "D6": 15,
    "N1": 2,
    "A5": 20,
    "T1": 3,
    "L3": 1,
    "C1": 15,
    "H1": 30,
}

SLOW = {"ack without token", "attempt not counted on a crash", "claim without the row lock"}  # a minute or more each
ELSEWHERE = {"W1", "S1"}  # faults of other tests

QUICK = [bug for bug in BUGS if bug.fault not in ELSEWHERE and bug.name not in SLOW]

pytestmark = pytest.mark.skipif(os.environ.get("ANTON_TEST_SERVER") != "system", reason="on the system's server only")


@pytest.fixture(scope="module")
def chaos() -> Iterator[tuple[Server, str]]:
    try:
        with cluster() as server:
            yield server, make_template(server)
    except NoServer as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_lost_or_doubled_by(name: str, chaos: tuple[Server, str]) -> None:
    result = done(*chaos, name, SHORT[name], SEED)
    assert not result.verdict.text
    assert result.n >= SHORT[name]


@pytest.mark.parametrize("bug", QUICK, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug, chaos: tuple[Server, str]) -> None:
    assert catch(*chaos, bug, SEED)[0]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_still_be_planted(bug: Bug) -> None:
    with planted(bug) as (modules, statements):
        assert modules or statements


def test_no_failure_in_n_trials_says_less_than_three_in_n() -> None:
    assert bound(1000) == "< 0.3 %" and bound(0) == "-"
