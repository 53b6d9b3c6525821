"""Action: effects leave only from a live process, once each, and a row says what became of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anton.action import effects, set_effects
from anton.errors import ConfigError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("ANTON_EFFECTS", raising=False)
    before = effects()
    yield
    monkeypatch.undo()
    set_effects(before)


def test_nothing_is_sent_until_someone_says_so():
    words = [sys.executable, "-c", "from anton.action import effects; print(effects())"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "capture\n"


@pytest.mark.parametrize("limit, wanted, is_", [
    ("", "live", "live"), ("live", "live", "live"), ("capture", "live", "capture"), ("offline", "live", "offline"),
    ("offline", "capture", "offline"), ("live", "capture", "capture"), ("capture", "offline", "offline")])
def test_the_environment_holds_back_and_never_lets_loose(limit, wanted, is_, monkeypatch):
    if limit:
        monkeypatch.setenv("ANTON_EFFECTS", limit)
    assert set_effects(wanted) == effects() == is_


def test_a_mistyped_limit_is_an_error_and_sends_nothing(monkeypatch):
    set_effects("capture")
    monkeypatch.setenv("ANTON_EFFECTS", "caputre")
    with pytest.raises(ConfigError, match='"live", "capture" or "offline"'):
        set_effects("live")
    assert effects() == "capture"
