"""All states of the small model of claim, ack, expiry, crash and lost reply; and that it tells a broken protocol."""

from __future__ import annotations

import pytest

from chaos.model import Rules, explore


def test_every_state_has_each_output_once_and_a_way_to_the_end() -> None:
    states, wrong = explore()
    assert not wrong and states > 100


@pytest.mark.parametrize("rules", [Rules(output_with_ack=False), Rules(ack_counts=False)])
def test_a_broken_protocol_doubles_outputs(rules: Rules) -> None:
    assert explore(rules)[1]
