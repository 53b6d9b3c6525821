from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anton.duration import duration, say
from anton.errors import BadOption


@pytest.mark.parametrize(("value", "seconds"), [
    ("30s", 30), ("5m", 300), ("24h", 86400), ("7d", 604800), ("2w", 1209600), ("500ms", 0.5), ("1h30m", 5400),
    ("1.5h", 5400), (" 10 s ", 10), ("0s", 0), (5, 5), (0.25, 0.25), (timedelta(minutes=1), 60)])
def test_what_means_a_length_of_time(value: Any, seconds: float) -> None:
    assert duration(value) == timedelta(seconds=seconds)


@pytest.mark.parametrize("value", ["", "soon", "5", "5 minutes", "-5s", "5s x", -1, True, None, float("nan"), 1e300, [],
                                   timedelta(-1)])
def test_what_does_not_says_what_would(value: Any) -> None:
    with pytest.raises(BadOption, match=r'timeout=.* of handler "x" is not possible. Allowed: a text such as "500ms"'):
        duration(value, "timeout", 'handler "x"')


@given(st.integers(0, 10**12))
def test_what_is_said_is_read_back(milliseconds: int) -> None:
    length = timedelta(milliseconds=milliseconds)
    assert duration(say(length)) == length
