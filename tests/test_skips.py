"""A test that is left out where CI is set fails, unless its reason is one of those that may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("ci", "why", "fails"),
    [("1", "no tool here", True), ("", "no tool here", False), ("1", "this server has no pgvector", False)],
)
@pytest.mark.parametrize(
    "how",
    [
        "@pytest.mark.skip(reason='{}')\ndef test_it(): pass",
        "def test_it(): pytest.skip('{}')",
        "pytest.skip('{}', allow_module_level=True)",
    ],
)
def test_a_test_left_out_for_an_unknown_reason_fails_in_ci(
    how: str, ci: str, why: str, fails: bool, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(f"import pytest\n\n{how.format(why)}\n")
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "CI": ci, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    words = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-p", "no:schemathesis"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    assert ("was left out in CI" in done.stdout) == fails
