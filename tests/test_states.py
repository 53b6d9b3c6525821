"""All states of the small protocol in chaos/states.py: nothing is wrong in any, and a missing rule is told."""

from __future__ import annotations

from dataclasses import fields

import pytest

from chaos.states import FIRST, Job, Rules, State, explore, wrong

BREAKS = {  # the rule that is switched off -> the invariant that does not hold then
    "ack_needs_token": "I4",
    "ack_counts": "I4",
    "ack_takes_all": "I12",
    "ack_writes_outputs": "I6",
    "output_waits_for_ack": "I5",
    "answer_after_commit": "I14",
    "job_with_commit": "I2",
    "claim_locks": "I3",
    "rescue_looks_again": "I7",
    "heartbeat_needs_token": "I4",
    "split_keeps_all": "I1",
    "retry_drops_output": "I5",
    "second_look": "I9",
    "cancel_only_waiting": "I7",
    "pause_stops_claims": "I10",
    "crash_counts": "I8",
}


def test_with_all_rules_nothing_is_wrong_in_any_state_and_each_has_a_way_to_the_end() -> None:
    found = explore()
    assert not found.wrong, found
    assert found.states > 50_000


@pytest.mark.parametrize("rule", [field.name for field in fields(Rules)])
def test_a_rule_that_is_missing_breaks_its_invariant(rule: str) -> None:
    found = explore(Rules(**{rule: False}))
    assert any(text.startswith(BREAKS[rule] + ":") for text in found.wrong), found
    assert found.path


DONE = State((), fates=("done", "done", ""), outputs=(1, 1, 0))


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (DONE, ()),
        (DONE._replace(outputs=(2, 1, 0)), ("I6: two outputs of one record",)),
        (DONE._replace(fates=("done", "", "")), ("I1: a record is nowhere", "I5: an output of what is not done")),
        (DONE._replace(queue=(Job(FIRST[:1]),)), ("I7: done and in the queue",)),
    ],
)
def test_what_is_wrong_in_a_state_is_named(state: State, says: tuple[str, ...]) -> None:
    assert wrong(state) == says
