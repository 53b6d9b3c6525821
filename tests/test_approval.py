"""Approval: nothing leaves unapproved, one voice wins, and what was decided is kept."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest

from anton import Approval, Table, action
from anton.app import declaring
from anton.errors import AntonError, BadOption, DecisionRefused, InvalidRecord


@pytest.fixture
def sent() -> list[tuple[int, Decimal]]:
    return []


def declare(app: Any, sent: list[tuple[int, Decimal]], approval: Approval | None, **options: Any) -> Any:
    with declaring(app.app):
        complaints = Table("complaints")

        @action(approve=approval, **options)
        async def refund(order_id: int, amount: Decimal) -> dict[str, Any]:
            sent.append((order_id, amount))
            return {"number": len(sent)}

        @complaints.on_new_records(each=True)
        def complain(complaint: Any) -> None:
            refund.send(order_id=complaint["order"], amount=complaint["total"])

    app.migrate()
    return refund


def sql(app: Any, text: str, *args: Any) -> Any:
    async def work() -> Any:
        async with app.db.conn() as conn:
            return await conn.fetch(text, *args)

    return app.db.run(work())


def asked(app: Any, sent: list[Any], approval: Approval | None = None, **options: Any) -> Any:
    """The approval of one refund of 5 for order 7."""
    refund = declare(app, sent, approval or Approval("@finance"), **options)
    app.tables["complaints"].append({"order": 7, "total": 5})
    app.run()
    return refund


def test_a_call_waits_for_a_person_and_is_sent_when_they_approve(live, sent):
    asked(live, sent)
    assert sent == [] and [call.state for call in live.calls] == ["waiting"]
    (approval,) = live.approvals
    assert (approval.amount, approval.preview) == ("5", "refund: amount 5, order_id 7")
    decision = approval.approve(by="ann")
    assert decision["won"] and decision["decided_by"] == "ann"
    live.run()
    assert sent == [(7, 5)] and live.approvals == []


def test_an_edit_is_checked_by_the_actions_types_and_is_what_is_sent(live, sent):
    asked(live, sent, Approval("@finance", editable=["amount"]))
    (approval,) = live.approvals
    with pytest.raises(InvalidRecord, match="amount"):
        approval.approve(by="ann", edit={"amount": "much"})
    with pytest.raises(DecisionRefused, match="order_id may not be changed; amount may"):
        approval.approve(by="ann", edit={"order_id": 8})
    approval.approve(by="ann", edit={"amount": 3})
    live.run()
    assert sent == [(7, 3)]
    (row,) = sql(live, "select before ->> 'amount' as before, after ->> 'amount' as after from anton.approval")
    assert tuple(row) == ("5", "3")


def test_what_is_rejected_is_never_sent(live, sent):
    refund = asked(live, sent)
    live.approvals[0].reject(by="ann", why="no receipt")
    live.run()
    live.advance("48h")
    assert sent == [] and [(call.state, call.error) for call in live.calls] == [("rejected", "no receipt")]
    assert [call.state for call in refund.calls.select()] == ["rejected"]


def test_nobody_approves_what_they_asked_for_nor_what_is_not_theirs(live, sent):
    refund = declare(live, sent, Approval("@finance", "bob"))
    refund.send(7, 5, by="ann")
    live.run()
    (approval,) = live.approvals
    with pytest.raises(DecisionRefused, match="nobody approves their own"):
        approval.approve(by="ann")
    sql(live, "select anton.put_person('eve')")
    with pytest.raises(DecisionRefused, match="eve is not among those who may: @finance, bob"):
        approval.approve(by="eve")
    with pytest.raises(DecisionRefused, match='nobody is called "zoe"'):
        decide(live, approval.id, "zoe")
    live.run()
    assert sent == []


def decide(app: Any, approval: int, person: str, sha256: str | None = None) -> Any:
    async def work() -> Any:
        async with app.db.tx() as conn:
            digest = sha256 or await conn.fetchval("select args_sha256 from anton.approval where id = $1", approval)
            return (await app.db.call(conn, "decide", approval, person, "approve", "web", digest))[0]

    return app.db.run(work())


def test_a_voice_for_other_arguments_than_those_that_are_there_does_not_count(live, sent):
    asked(live, sent)
    sql(live, "select anton.put_person('ann', p_groups => '{finance}')")
    with pytest.raises(DecisionRefused, match="not those that were shown"):
        decide(live, live.approvals[0].id, "ann", "0" * 64)


def test_of_eight_channels_at_once_one_wins_and_the_others_hear_who_did(live, sent):
    asked(live, sent)
    sql(live, "select anton.put_person('p' || n, p_groups => '{finance}') from generate_series(1, 8) n")
    approval = live.approvals[0].id

    async def race() -> list[Any]:
        async def one(n: int) -> Any:
            async with live.db.tx() as conn:
                digest = await conn.fetchval("select args_sha256 from anton.approval where id = $1", approval)
                what = "approve" if n % 2 else "reject"
                return (await live.db.call(conn, "decide", approval, f"p{n}", what, f"channel {n}", digest))[0]

        return await asyncio.gather(*(one(n) for n in range(1, 9)))

    rows = live.db.run(race())
    winner = [row for row in rows if row["won"]]
    assert len(winner) == 1 and {row["decided_by"] for row in rows} == {winner[0]["decided_by"]}
    live.run()
    assert len(sent) == (1 if winner[0]["state"] == "approved" else 0)


def test_quorum_counts_different_people_for_the_same_arguments(live, sent):
    asked(live, sent, Approval("@finance", quorum=2))
    (approval,) = live.approvals
    approval.approve(by="ann")
    approval.approve(by="ann")
    live.run()
    assert sent == []
    approval.approve(by="bob", edit={"amount": 4})
    live.run()
    assert sent == []
    approval.approve(by="ann")
    live.run()
    assert sent == [(7, 4)]


@pytest.mark.parametrize("on_timeout, state", [("reject", "expired"), ("approve", "sent")])
def test_what_nobody_decides_in_time_ends_as_on_timeout_says(on_timeout, state, live, sent):
    asked(live, sent, Approval("@finance", timeout="2h", on_timeout=on_timeout))
    (approval,) = live.approvals
    live.advance("1h")
    assert sent == [] and len(live.approvals) == 1
    live.advance("2h")
    assert [call.state for call in live.calls] == [state] and live.approvals == []
    assert approval.approve(by="ann")["won"] is False


def test_an_escalation_adds_who_may_decide(live, sent):
    asked(live, sent, Approval("@finance", escalate={"1h": "@cfo"}))
    assert live.approvals[0].approvers == ("@finance",)
    live.advance("61m")
    assert live.approvals[0].approvers == ("@finance", "@cfo")


def test_a_record_that_changed_meanwhile_supersedes_and_is_asked_about_again(live, sent):
    asked(live, sent)
    (first,) = live.approvals
    live.tables["complaints"].select().update(total=1)
    answer = first.approve(by="ann")
    assert (answer["won"], answer["state"]) == (False, "superseded")
    (second,) = live.approvals
    assert second.id == answer["next"]
    assert second.difference["evidence"][0]["changed"]["data"][1] == {"order": 7, "total": 1}
    second.approve(by="ann")
    live.run()
    assert sent == [(7, 5)]


def test_a_batch_handlers_call_rests_on_the_record_at_hand(live, sent):
    refund = declare(live, sent, Approval("@finance"))
    with declaring(live.app):
        orders = Table('"Orders of all"')

        @orders.on_new_records(name="all")
        def refund_all(records: Any) -> None:
            for order in records:
                refund.send(order["n"], 5)

    live.migrate()
    orders.extend({"n": n} for n in range(2))
    live.run()
    rows = sql(live, "select evidence -> 0 as one from anton.approval order by id")
    assert [(row["one"]["table"], row["one"]["record"]["data"]) for row in rows] == [
        ("public.Orders of all", {"n": 0}), ("public.Orders of all", {"n": 1})]


def test_when_says_for_which_arguments_a_person_is_asked(live, sent):
    refund = declare(live, sent, Approval("@finance", when=lambda call: call.amount > 50))
    refund.send(1, 5)
    refund.send(2, 500)
    live.run()
    assert sent == [(1, 5)] and [approval.order_id for approval in live.approvals] == [2]


def test_one_call_alone_can_ask_for_an_approval(live, sent):
    refund = declare(live, sent, None)
    refund.send(1, 5)
    refund.send(2, 5, approve=Approval("ann"))
    live.run()
    assert sent == [(1, 5)] and live.approvals[0].approvers == ("ann",)
    live.approvals[0].approve(by="ann")
    live.run()
    assert sent == [(1, 5), (2, 5)]


def test_captured_calls_are_asked_for_too(app, sent):
    asked(app, sent)
    assert app.outbox == []
    app.approvals[0].approve(by="ann", edit={"amount": 3})
    app.run()
    assert [call.amount for call in app.outbox] == ["3"] and sent == []


# Nothing leaves unapproved, however it is tried


@pytest.mark.parametrize("statement", [
    "update anton.action set state = 'ready'",
    "update anton.action set state = 'sending', token = 5",
    "update anton.action set state = 'ready', args = args || '{\"amount\": 1}'",
    "insert into anton.action (app, name, args, state) select app, name, args, 'ready' from anton.action",
    "insert into anton.action (app, name, args) select app, name, args from anton.action",
    "update anton.action set name = 'other'",
    "update anton.action set approval_id = null",
    "update anton.approval set state = 'approved'",
    "update anton.approval set state = 'approved', args = '{}', args_sha256 = anton.args_hash('{}')",
    "insert into anton.approval (action_id, app, name, args, args_sha256, preview, approvers, state) select action_id, "
    "app, name, args, args_sha256, '', '{x}', 'approved' from anton.approval",
    "delete from anton.approval",
])
def test_no_statement_sends_what_nobody_approved(statement, live, sent):
    asked(live, sent)
    try:
        sql(live, statement)
    except Exception as error:
        assert "NT008" in str(getattr(error, "sqlstate", "")) or "NT009" in str(getattr(error, "sqlstate", ""))
    live.run()
    live.advance("1h")
    assert sent == []


def test_neither_a_replay_nor_a_retry_nor_another_handler_sends_what_nobody_approved(live, sent):
    refund = asked(live, sent)
    with pytest.raises(Exception, match="waiting"):
        sql(live, "select anton.retry_action((select id from anton.action))")
    with declaring(live.app):
        @live.app.tables["complaints"].on_new_records(each=True)
        def again(complaint: Any) -> None:
            refund.send(order_id=complaint["order"], amount=complaint["total"])
    live.migrate()
    live.tables["complaints"].append({"order": 8, "total": 5})
    live.run()
    assert sent == [] and len(live.approvals) == 3
    with pytest.raises(TypeError):
        asyncio.run(refund.fn())
    with pytest.raises(AntonError):
        refund(1, 2)


def test_an_action_that_its_app_gave_up_sends_nothing_more(live, sent):
    refund = declare(live, sent, None)
    refund.send(7, 5)
    sql(live, "update anton.action_rule set missing_at = anton.now()")
    live.run()
    assert sent == [] and live.calls[0].state == "refused"


@pytest.mark.parametrize("statement", [
    "update anton.approval_event set person = 'x'", "delete from anton.approval_event",
    "truncate anton.approval_event", "truncate anton.approval cascade"])
def test_what_happened_to_approvals_stays(statement, live, sent):
    asked(live, sent)
    with pytest.raises(Exception, match="append-only"):
        sql(live, statement)
    assert [row["kind"] for row in sql(live, "select kind from anton.approval_event")] == ["asked"]


def test_what_cannot_be_is_refused_where_it_is_declared():
    with pytest.raises(BadOption, match="people or groups"):
        Approval()
    with pytest.raises(BadOption, match="reject"):
        Approval("ann", on_timeout="explode")
    with pytest.raises(BadOption, match="1 or more"):
        Approval("ann", quorum=0)


