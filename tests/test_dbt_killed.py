"""dbt killed -9 during its builds, in short; `python -m chaos B1` is the long form."""

from __future__ import annotations

from pathlib import Path

from pg import Pg

from chaos.builds import WHO, killed_builds
from chaos.dbts import Child


def test_a_killed_build_fires_nothing_and_a_committed_one_all(pg: Pg, dbt_child: Child, tmp_path: Path) -> None:
    tally = killed_builds(dbt_child, tmp_path / "shop", pg.url, 4, 1)
    assert (tally.wrong, tally.lost, tally.phantom, tally.left) == ([], 0, 0, {})
    assert tally.killed.total() >= 4 and set(tally.killed) == set(WHO)
