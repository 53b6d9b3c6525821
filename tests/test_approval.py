"""Approval: nothing leaves unapproved, one voice wins, and what was decided is kept."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import psycopg
import pytest
from working import morning

from anton import Approval, Table, action, sender
from anton import sql as read
from anton.app import declaring
from anton.errors import AntonError, BadOption, DecisionRefused, Discard, InvalidRecord, QueryError


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


def by_order(app: Any) -> list[Any]:
    """Its approvals: calls at once are asked about in no promised order."""
    return sorted(app.approvals, key=lambda approval: approval.order_id)


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


def test_rejections_and_edits_are_records_and_nothing_before_the_gate_runs_again(live, sent):
    refund, ran = declare(live, sent, Approval("@finance", editable=["amount"])), []
    with declaring(live.app):
        heard = Table("heard")

        @refund.calls.on_updated_records(where="state = 'rejected'", each=True)
        def rejected(call: Any) -> None:
            heard.append({"order": call.order_id, "why": call.error})

        @refund.calls.on_updated_records(where="new.args <> old.args", each=True)
        def edited(call: Any) -> None:
            heard.append({"order": call.order_id, "amount": call.amount})

        @live.app.tables["complaints"].on_new_records(each=True)
        def count(complaint: Any) -> None:
            ran.append(complaint["order"])

    live.migrate()
    for order in range(3):
        live.tables["complaints"].append({"order": order, "total": 5})
        live.run()
    for table in ("job", "lease", "delayed"):
        assert sql(live, f"select id from anton.{table} where handler_id <> 0") == []
    no, edit, yes = live.approvals                                     # they wait, and hold nothing
    no.reject(by="ann", why="no receipt")
    edit.approve(by="ann", edit={"amount": 3})
    yes.approve(by="bob")
    live.run()
    live.advance("25h")
    assert sorted(sent) == [(1, 3), (2, 5)] and sorted(ran) == [0, 1, 2]
    told = [{**row["data"]} for row in sql(live, "select data from heard order by data ->> 'order'")]
    assert told == [{"order": 0, "why": "no receipt"}, {"order": 1, "amount": "3"}]


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


ANN = ("ann", "Ann", "ANN@Example.com", "u012abc", " ann ", "\tann\r\n")


def test_nobody_approves_what_they_asked_for_in_another_spelling_nor_gives_two_voices(live, sent):
    refund = declare(live, sent, Approval("@finance", quorum=2))
    refund.send(6, 5, by="Bob")                                        # before anybody knows bob
    sql(live, "select anton.put_person('ann', 'Ann@example.com', 'U012ABC', '{finance}'), "
              "anton.put_person('bob', p_groups => '{finance}')")
    for spelling in ANN:
        refund.send(7, 5, by=spelling)
    live.run()
    of_bob, *of_ann = by_order(live)
    for approval, spelling in zip(of_ann, ANN, strict=True):
        with pytest.raises(DecisionRefused, match="ann asked for it, and nobody approves their own"):
            approval.approve(by=spelling)
    with pytest.raises(DecisionRefused, match="bob asked for it"):
        of_bob.approve(by="bob")
    for spelling in ANN:
        assert of_bob.approve(by=spelling)["state"] == "pending"
    assert [tuple(row) for row in sql(live, "select person, count(*) from anton.approval_event where kind = 'voted' "
                                            "group by 1")] == [("ann", 1)]
    assert {row[0] for row in sql(live, "select requested_by from anton.action")} == {"Bob", "ann"}
    live.run()
    assert sent == []


def test_two_people_that_differ_in_case_alone_as_older_releases_took_them_have_one_voice(live, sent):
    refund = declare(live, sent, Approval("@finance", quorum=2))
    sql(live, "alter table anton.person disable trigger all")
    sql(live, "select anton.put_person(name, p_groups => '{finance}') from unnest(array['ann', 'Ann', 'bob']) name")
    sql(live, "alter table anton.person enable trigger all")
    refund.send(7, 5)
    refund.send(8, 5, by="ANN")
    live.run()
    first, second = by_order(live)
    for name in ("ann", "Ann"):
        assert first.approve(by=name)["state"] == "pending"
        with pytest.raises(DecisionRefused, match="nobody approves their own"):
            second.approve(by=name)
    assert first.approve(by="bob")["state"] == "approved"
    sql(live, "select anton.put_person('ann', p_groups => '{finance,cfo}')")    # and still can be changed


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


def test_time_approves_nothing_that_changed_and_people_have_all_of_it_again(live, sent):
    asked(live, sent, Approval("@finance", timeout="2h", on_timeout="approve"))
    (first,) = live.approvals
    live.tables["complaints"].select().update(total=1)
    live.advance("2h")
    (second,) = live.approvals
    assert sent == [] and second.id != first.id
    assert second.difference["evidence"][0]["changed"]["data"][1] == {"order": 7, "total": 1}
    live.advance("1h")
    assert sent == [] and len(live.approvals) == 1
    late = first.approve(by="ann")
    assert (late["won"], late["state"], late["next"]) == (False, "superseded", second.id)
    live.advance("2h")
    assert sent == [(7, 5)]


@pytest.mark.parametrize("captured", [False, True])
def test_what_changed_after_it_was_approved_is_asked_about_again_and_not_sent(captured, request, sent):
    live = request.getfixturevalue("app" if captured else "live")
    asked(live, sent)
    (first,) = live.approvals
    first.approve(by="ann")
    live.tables["complaints"].select().update(total=1)
    live.run()
    (second,) = live.approvals
    assert sent == [] and [call.state for call in live.calls] == ["waiting"]
    assert second.difference["evidence"][0]["changed"]["data"][1] == {"order": 7, "total": 1}
    second.approve(by="ann")
    live.run()
    assert [call.state for call in live.calls] == ["captured" if captured else "sent"] and len(sent) == (not captured)


class Refusing(list[Any]):
    """Takes nothing the first time."""

    def append(self, one: Any) -> None:
        if self:
            self.clear()
            raise Discard("no such order")
        super().append(one)


def test_a_retry_sends_nothing_that_rests_on_what_has_changed(live):
    sent = Refusing([0])
    asked(live, sent, probe=lambda call: False)
    live.approvals[0].approve(by="ann")
    live.run()
    assert [call.state for call in live.calls] == ["failed"]
    live.tables["complaints"].select().update(total=1)
    sql(live, "select anton.retry_action(id) from anton.action")
    live.run()
    assert sent == [] and len(live.approvals) == 1
    live.approvals[0].approve(by="ann")
    sql(live, "select anton.begin_action(id, 5) from anton.action")                    # its sender was killed
    live.tables["complaints"].select().update(total=2)
    live.run()
    assert sent == [] and [(call.state, call.error) for call in live.calls] == [
        ("failed", "a record it rests on has changed since it was approved")]


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
    rows = sql(live, "select args, evidence -> 0 as one from anton.approval order by args ->> 'order_id'")
    assert [(row["args"]["order_id"], row["one"]["table"], row["one"]["record"]["data"]) for row in rows] == [
        (0, "public.Orders of all", {"n": 0}), (1, "public.Orders of all", {"n": 1})]


def test_the_preview_is_of_the_arguments_as_they_are_after_an_edit_and_no_value_is_a_template(live, sent):
    refund = asked(live, sent, Approval("@finance", quorum=2, preview="Refund {amount} for {order_id} {of} {"))
    assert live.approvals[0].preview == "Refund 5 for 7 {of} {"
    live.approvals[0].approve(by="bob", edit={"amount": 4})
    assert live.approvals[0].preview == "Refund 4 for 7 {of} {"
    with pytest.raises(Exception, match="what is asked"):
        sql(live, "update anton.approval set preview = 'Refund 1 for 7'")
    live.approvals[0].reject(by="bob")
    sql(live, "insert into anton.action (app, name, args) values ($1, 'refund', $2)", refund.app.name,
        {"order_id": "{amount}", "amount": "{order_id} {amount}", "note": None})
    sql(live, "insert into anton.approval (action_id, app, name, args, args_sha256, approvers, quorum, preview) select "
              "id, app, name, args, anton.args_hash(args), '{@finance}', 2, '' from anton.action order by id desc "
              "limit 1")
    assert sql(live, "select preview from anton.approval order by id desc")[0]["preview"] == (
        "Refund {order_id} {amount} for {amount} {of} {")


@pytest.mark.parametrize("declared, shown", [
    ("Refund {amount}", "Refund 500"), (None, "refund: amount 500, order_id 7 (its call says: Refund 5)")])
def test_a_preview_of_a_call_alone_hides_nothing_of_its_arguments(declared, shown, live, sent):
    refund = declare(live, sent, Approval("@finance", preview=declared))
    refund.send(7, 500, approve=Approval("ann", preview="Refund 5"))
    sql(live, "insert into anton.action (app, name, args, approve) values ($1, 'refund', $2, $3)", refund.app.name,
        {"order_id": 7, "amount": "500"}, {**Approval("ann").definition(), "preview": "Refund 5"})
    live.run()
    assert [approval.preview for approval in live.approvals] == [shown] * 2


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


@pytest.mark.parametrize("edit, state", [(3, "sent"), (9, "failed")])
def test_a_sender_that_comes_late_sends_what_was_approved_and_not_what_it_read(edit, state, live, sent, monkeypatch):
    refund = declare(live, sent, Approval("@finance", when=lambda call: True),
                     policy=lambda call: "refuse" if Decimal(call.amount) > 8 else "send")
    begin, read = sender._call, []

    async def late(db: Any, function: str, *args: Any) -> Any:
        if function == "begin_action" and not read:                    # it stood still, and another one asked
            read.append(await sender._value(db, "ask_approval", args[0], refund.approve.definition()))
            async with db.tx() as conn:
                await db.call(conn, "put_person", "ann", None, None, ["finance"])
                await conn.fetch("select anton.decide(id, 'ann', 'approve', 'psql', args_sha256, args || $1) "
                                 "from anton.approval", {"amount": str(edit)})
        return await begin(db, function, *args)

    monkeypatch.setattr(sender, "_call", late)
    refund.send(7, 5)
    live.run()
    assert sent == [(7, 3)] * (state == "sent") and [call.state for call in live.calls] == [state]


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
    "update anton.approval set args = args || '{\"amount\": \"1\"}', before = args, after = args || '{\"amount\": "
    "\"1\"}', args_sha256 = anton.args_hash(args || '{\"amount\": \"1\"}')",
    "update anton.approval set state = 'approved', on_timeout = 'approve', decided_via = 'timeout', "
    "expires_at = anton.now()",
    "update anton.approval set approvers = approvers || 'eve'::text",
    "update anton.approval set escalate = '[{\"at\": \"2020-01-01\", \"to\": \"eve\"}]'",
    "update anton.action set requested_by = 'eve'",
    "insert into anton.approval (action_id, app, name, args, args_sha256, preview, approvers, quorum, on_timeout, "
    "expires_at) select action_id, app, name, '{}', anton.args_hash('{}'), '', approvers, quorum, on_timeout, "
    "expires_at from anton.approval",
])
def test_no_statement_sends_what_nobody_approved(statement, live, sent):
    asked(live, sent)
    try:
        sql(live, statement)
    except Exception as error:
        assert "NT008" in str(getattr(error, "sqlstate", "")) or "NT009" in str(getattr(error, "sqlstate", ""))
    else:
        assert "anton.action" in statement, "it was carried out"
    live.run()
    live.advance("1h")
    assert sent == []


BY_HAND = [
    "update anton.action_rule set gate = 'open', approval = '{}'", "update anton.action_rule set missing_at = null",
    "insert into anton.action_rule (app, name) values ('other', 'refund')", "delete from anton.action_rule",
    "truncate anton.action_rule", "update anton.action_used set amount = 0", "delete from anton.action_used",
    "update anton.action set attempt = 1", "update anton.action set approval_id = null",
    "update anton.action set verdict = jsonb_build_object('verdict', 'pass', 'args_sha256', anton.args_hash(args))",
    "update anton.action set counted = '[]', in_doubt = true", "update anton.action set trace = 1, depth = 0",
    "update anton.action set state = 'rejected', error = 'no'", "update anton.action set settled_at = anton.now()",
    "delete from anton.action where approval_id is null", "truncate anton.action cascade",
    "do $$ begin perform anton.mark_action(id) from anton.action; update anton.action set state = 'ready'; end $$",
    "do $$ begin perform anton.mark_action(id) from anton.action; update anton.action set state = 'expired'; end $$"]


def test_neither_rules_nor_calls_nor_what_caps_have_used_change_by_a_statement(live, sent):
    asked(live, sent, cap="5 amount/day")
    tables = "(select to_jsonb(r) from anton.action_rule r), (select to_jsonb(a) from anton.action a)"
    before = [tuple(row) for row in sql(live, f"select {tables}")]
    for statement in BY_HAND:
        with pytest.raises(Exception, match="by hand|changes by what becomes of it|stay as they are|no approval of it"
                                            "|that approval asks nobody|append-only") as refused:
            sql(live, statement)
        assert refused.value.sqlstate in ("NT008", "NT009"), statement
    assert [tuple(row) for row in sql(live, f"select {tables}")] == before
    live.approvals[0].approve(by="ann")
    live.run()
    assert sent == [(7, 5)]


RULES = ["select anton.put_action(to_jsonb(r) || '{\"gate\": \"open\", \"approval\": {}}') from anton.action_rule r",
         "select anton.put_action(to_jsonb(r) || '{\"gate\": \"when\", \"policy\": true, \"policy_sql\": "
         "\"''send''\"}') from anton.action_rule r",
         "do $$ begin perform set_config('anton.rule', 'on', true); update anton.action_rule set gate = 'open', "
         "approval = '{}', policy = false, policy_sql = null; end $$",
         "select anton.put_action(to_jsonb(r) || jsonb_build_object('approval', r.approval || "
         "'{\"approvers\": [\"eve\"]}')) from anton.action_rule r"]


def test_a_sender_asks_whom_its_code_says_whatever_was_made_of_the_rule(live, sent):
    refund = declare(live, sent, Approval("@finance"))
    for order, rule in enumerate(RULES):
        sql(live, rule)
        refund.send(order, 5)
        live.run()
    live.advance("1h")
    assert sent == [] and [call.state for call in live.calls] == ["waiting", "waiting", "waiting", "new"]
    assert {tuple(row["approvers"]) for row in sql(live, "select approvers from anton.approval")} == {("@finance",)}
    live.migrate()
    live.approvals[0].approve(by="ann")
    live.run()
    assert sent == [(0, 5)]


@pytest.mark.parametrize("old", [Approval("@finance"), None])
def test_while_a_release_that_asks_others_ends_calls_wait_for_a_process_of_the_migrated_one(old, live, sent):
    new = Approval("@cfo")
    refund = declare(live, sent, new)
    refund.approve = old
    refund.send(7, 5)
    live.run()
    live.advance("1h")
    assert [call.state for call in live.calls] == ["new"] and live.dead == []
    refund.approve = new
    live.advance("1h")
    (asked,) = live.approvals
    refund.approve = old
    asked.approve(by="carl")
    live.run()
    live.advance("1h")
    assert [call.state for call in live.calls] == (["ready"] if old else ["sent"]) and live.dead == []
    refund.approve = new
    live.advance("1h")
    assert sent == [(7, 5)] and len(sql(live, "select id from anton.approval")) == 1


WEAKENED = [
    ({"policy": "'refuse: no'"}, {"policy_sql": "'send'"}, "refused"),
    ({"policy": "'refuse: no'"}, {"policy": False, "policy_sql": None}, "refused"),
    ({"approve": Approval("@finance"), "policy": "'send'"}, {"gate": "open", "approval": {}}, "waiting"),
    ({"approve": Approval("@finance", when=lambda call: False), "policy": "'ask: who?'"},
     {"gate": "open", "approval": {}, "policy_sql": "'send'"}, "waiting"),
    ({"allow": {"order_id": ["8"]}}, {"allow": {}}, "refused"),
    ({"allow": {"order_id": ["8"]}}, {"allow": {"order_id": ["*"]}}, "refused"),
    ({"cap": "4 amount/day"}, {"caps": []}, "refused"),
    ({"cap": "4 amount/day"}, {"caps": [{"amount": "900", "of": "amount", "period": "day"}]}, "refused")]


@pytest.mark.parametrize("options, by_hand, state", WEAKENED)
def test_what_the_senders_code_declares_holds_whatever_put_action_is_told(options, by_hand, state, live, sent):
    options = dict(options)
    refund = declare(live, sent, options.pop("approve", None), **options)
    sql(live, "select anton.put_action(to_jsonb(r) || $1) from anton.action_rule r", by_hand)
    refund.send(7, 5)
    live.run()
    live.advance("1h")
    assert sent == [] and [call.state for call in live.calls] == [state]


def test_an_unsafe_call_is_not_sent_again_whatever_put_action_says_of_its_effect(live, sent):
    refund = declare(live, sent, None)
    refund.send(7, 5)
    sql(live, "select anton.begin_action(id, 5) from anton.action")                    # its sender was killed
    sql(live, "select anton.put_action(to_jsonb(r) || '{\"effect\": \"idempotent\"}') from anton.action_rule r")
    live.run()
    assert sent == [] and [call.state for call in live.calls] == ["unknown"]


BY_EVE = """
do $$
declare v_rule jsonb; v_was jsonb;
begin
  select to_jsonb(r), r.approval into v_rule, v_was from anton.action_rule r;
  perform anton.put_action(v_rule || jsonb_build_object('approval', v_was || '{given}'));
  perform anton.put_person('eve', null, null, '{{finance}}');
  perform anton.ask_approval(id, v_was || '{given}') from anton.action;
  {decided}
  perform anton.put_action(v_rule);
end $$"""
DECIDED = "perform anton.decide(id, 'eve', 'approve', 'psql', args_sha256) from anton.approval;"
TIMED = "perform anton.expire_approval(id) from anton.approval;"


@pytest.mark.parametrize("declared, given, decided", [
    (Approval("@finance"), '{"approvers": ["eve"]}', DECIDED),
    (Approval("@finance", quorum=2), '{"quorum": 1}', DECIDED),
    (Approval("@finance"), '{"timeout": "0 s", "on_timeout": "approve"}', TIMED),
    (Approval("@finance", on_timeout="approve"), '{"timeout": "0 s"}', TIMED)])
def test_an_approval_counts_where_it_asked_no_less_than_the_senders_code_declares(declared, given, decided, live, sent):
    declare(live, sent, declared).send(7, 5)
    sql(live, BY_EVE.format(given=given, decided=decided))
    assert [call.state for call in live.calls] == ["ready"]            # as far as the database knows
    live.run()
    assert sent == [] and [call.state for call in live.calls] == ["waiting"]
    (again,) = live.approvals
    assert again.approvers == declared.who
    for person in ("ann", "bob")[:declared.quorum]:
        again.approve(by=person)
    live.run()
    assert sent == [(7, 5)]


# Who may do what by SQL


def forged(approval: int, sha256: str) -> list[str]:
    """What a model would run that may run SQL: each makes it somebody, decides, or changes what is asked."""
    return [
        f"select anton.decide({approval}, 'ann', 'approve', 'psql', '{sha256}')",
        f"select * from anton.decide_by_link('{sha256}', 'approve', 'psql') d",
        "select anton.put_person('eve', null, null, '{finance}')", "select anton.put_person('ann', 'eve@evil.example')",
        f"select anton.make_link('ann', '{sha256}', '1 hour', {approval})",
        f"select anton.open_session('{sha256}', '{sha256}', '1 hour')",
        f"select anton.note_event({approval}, 'voted', 'ann', 'psql', '{sha256}')",
        f"with x as (select anton.decide({approval}, 'ann', 'approve', 'psql', '{sha256}')) select * from x",
        "select anton.put_action(to_jsonb(r) || '{\"gate\": \"open\"}') from anton.action_rule r",
        "select set_config('anton.rule', 'on', false), anton.put_action(to_jsonb(r)) from anton.action_rule r",
        "select set_config('transaction_read_only', 'off', true), anton.put_person('eve')",
        "select anton.start_actions()", f"select anton.expire_approval({approval})",
        "select 'eve' as name into anton.someone", "values (anton.put_person('eve'))"]


def kept(app: Any) -> list[Any]:
    return [sql(app, f"select to_jsonb(x) as row from anton.{table} x order by 1") for table in (
        "person", "link", "session", "approval", "approval_event", "action", "action_rule")]


def test_sql_reads_whatever_the_select_calls(live, sent):
    asked(live, sent)
    sql(live, "select anton.put_person('ann', null, null, '{finance}')")
    (row,), before = sql(live, "select id, args_sha256 from anton.approval"), kept(live)
    for text in forged(row["id"], row["args_sha256"]):
        with pytest.raises((QueryError, asyncpg.ActiveSQLTransactionError),
                           match="read-only transaction|read-write mode must be set|sql\\(\\) reads"):
            list(read(re.sub(r"\{(\w+)\}", r"{{\1}}", text)))
    was = read("select current_user::text as role, current_setting('search_path') as path")
    (own,) = was
    list(read("select set_config('role', 'anton_owner', false), set_config('search_path', 'anton', false)"))
    assert [dict(row) for row in was] == [dict(own)]                   # the connection is as it was
    assert kept(live) == before and list(read("select count(*) as n from anton.person"))[0]["n"] == 1
    live.run()
    assert sent == []


def test_a_role_that_only_writes_to_the_apps_tables_decides_nothing_and_is_nobody(live, sent, server):
    asked(live, sent)
    sql(live, "select anton.put_person('ann', null, null, '{finance}')")
    (row,), before = sql(live, "select id, args_sha256 from anton.approval"), kept(live)
    server.sql("drop role if exists scribe", "create role scribe login")
    try:
        sql(live, "grant select, insert, update, delete on all tables in schema public to scribe")
        with psycopg.connect(re.sub(r"//postgres(:[^@/]*)?@", "//scribe@", live.db.dsn), autocommit=True) as conn:
            texts = [f"insert into anton.{one} select * from anton.{one}" for one in ("person", "session", "link")]
            for text in [*forged(row["id"], row["args_sha256"]), *texts, "set role anton_owner"]:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    conn.execute(text)
            conn.execute("insert into complaints (data) values ('{\"order\": 8, \"total\": 5}')")
    finally:
        sql(live, "drop owned by scribe")
        server.sql("drop role scribe")
    assert kept(live) == before
    live.run()
    assert sent == [] and [call.state for call in live.calls] == ["waiting"] * 2


UNDECIDED = [
    ("state = 'rejected', decided_by = 'ann', decided_via = 'psql'", "becomes rejected with its event"),
    ("state = 'superseded'", "becomes superseded with its event"),
    ("state = 'expired', decided_via = 'timeout'", "becomes expired with its event"),
    ("decided_by = 'ann', why = 'no'", "nobody has decided it yet"),
    ("retry_at = anton.now() + interval '1 day'", "tried again in a minute"),
    ("escalate = escalate - 0", "each noted")]


def test_a_decision_without_its_event_is_none(live, sent):
    asked(live, sent, Approval("@finance", escalate={"1h": "@cfo"}))
    for given, said in UNDECIDED:
        with pytest.raises(Exception, match=said) as refused:
            sql(live, f"update anton.approval set {given}")
        assert refused.value.sqlstate == "NT009"
    with pytest.raises(Exception, match="its time is not over"):
        sql(live, "do $$ begin perform anton.note_event(id, 'expired', null, null, args_sha256) from anton.approval; "
                  "update anton.approval set state = 'expired'; end $$")
    live.approvals[0].approve(by="ann")
    (row,) = sql(live, "select count(*) from anton.approval a join anton.approval_event e on e.approval_id = a.id "
                       "where a.state = 'approved' and e.kind = 'approved' and e.xid is not null")
    assert row["count"] == 1


def test_until_when_and_what_follows_is_as_declared_whatever_an_insert_says(live, sent):
    refund = declare(live, sent, Approval("@finance", timeout="2h", escalate={"1h": "@cfo"}))
    refund.send(7, 5)
    sql(live, "insert into anton.approval (action_id, app, name, args, args_sha256, preview, approvers, due_at, at, "
              "expires_at, escalate) select id, app, name, args, anton.args_hash(args), '', '{@finance}', '2000-01-01',"
              " '2000-01-01', '2000-01-02', '[{\"at\": \"2000-01-01\", \"to\": \"eve\"}]' from anton.action")
    (row,) = sql(live, "select due_at - at as due, expires_at - at as over, escalate -> 0 ->> 'to' as to, "
                       "at > anton.now() - interval '1 day' as now from anton.approval")
    assert (row["due"], row["over"], row["to"]) == (timedelta(hours=1), timedelta(hours=2), "@cfo") and row["now"]


def test_one_approval_that_cannot_be_worked_on_says_why_and_holds_up_no_other(live, sent):
    refund = declare(live, sent, Approval("@finance", via=["slack:#finance"], timeout="1h"))
    for order in range(3):
        refund.send(order, 5)
    live.run()
    first, *_ = by_order(live)
    sql(live, f"alter table anton.notice add constraint broken check (approval_id <> {first.id}) not valid")
    live.advance("2h")
    assert [call.state for call in live.calls] == ["waiting", "expired", "expired"]
    (row,) = sql(live, "select error from anton.approval where state = 'pending'")
    assert "broken" in row["error"]
    assert "what is due of approval" in str(sql(live, "select problem from anton.findings()"))
    sql(live, "alter table anton.notice drop constraint broken")
    live.advance("2m")
    assert [call.state for call in live.calls] == ["expired"] * 3
    assert sql(live, "select from anton.approval where error is not null or due_at is not null") == []


def test_a_key_column_that_was_renamed_breaks_nothing(live, sent):
    asked(live, sent)
    table = live.tables["complaints"].name
    sql(live, f"alter table {table} rename column id to number")
    first = live.approvals[0].approve(by="ann")
    assert (first["won"], first["state"]) == (False, "superseded")
    (second,) = live.approvals
    assert sql(live, "select evidence #>> '{0,record,number}' from anton.approval where state = 'pending'")[0][0] == "1"
    second.approve(by="ann")
    live.run()
    assert sent == [(7, 5)]


class Never(list[Any]):
    """Takes nothing."""

    def append(self, one: Any) -> None:
        raise Discard("no such order")


def test_a_cap_counts_an_amount_as_it_was_edited_and_each_call_once(live):
    morning(live)
    asked(live, Never(), cap="10 amount/day")
    live.approvals[0].approve(by="ann")
    live.run()
    assert [call.state for call in live.calls] == ["failed"]
    for amount in (8, 3):
        live.tables["complaints"].select().update(total=amount)        # so that it is asked about again
        sql(live, "select anton.retry_action(id) from anton.action")
        live.run()
        live.approvals[0].approve(by="ann", edit={"amount": amount})
        live.run()
        (row,) = sql(live, "select amount from anton.action_used")
        assert (row["amount"], [call.state for call in live.calls]) == (amount, ["failed"])


def test_what_would_be_refused_at_once_is_not_approved_and_who_decides_hears_why(live, sent):
    asked(live, sent, cap="10 amount/day", allow={"order_id": ["7"]})
    (approval,) = live.approvals
    with pytest.raises(DecisionRefused, match="the cap of 10 amount a day takes no call that needs 11"):
        approval.approve(by="ann", edit={"amount": 11})
    with pytest.raises(DecisionRefused, match="order_id 8 is not among what is allowed: 7"):
        approval.approve(by="ann", edit={"order_id": 8})
    approval.approve(by="ann", edit={"amount": 10})
    live.run()
    assert sent == [(7, 10)]


def test_an_approved_call_that_its_cap_cannot_take_any_more_ends_as_refused_and_stays_approved(live, sent):
    refund = asked(live, sent, cap="10 amount/day")
    live.approvals[0].approve(by="ann")
    refund.caps = [{"amount": "4", "of": "amount", "period": "day"}]
    live.migrate()
    live.run()
    assert [(call.state, "takes no call that needs 5" in call.error) for call in live.calls] == [("refused", True)]
    refund.caps = [{"amount": "10", "of": "amount", "period": "day"}]
    live.migrate()
    sql(live, "select anton.retry_action(id) from anton.action")
    live.run()
    assert sent == [(7, 5)] and live.approvals == []


def test_neither_a_backfill_nor_a_retry_nor_another_handler_sends_what_nobody_approved(live, sent):
    refund = asked(live, sent)
    with pytest.raises(Exception, match="waiting"):
        sql(live, "select anton.retry_action((select id from anton.action))")
    refund.send(1, 1)
    sql(live, "select anton.backfill('send_refund')")
    with declaring(live.app):
        @live.app.tables["complaints"].on_new_records(each=True)
        def again(complaint: Any) -> None:
            refund.send(order_id=complaint["order"], amount=complaint["total"])
    live.migrate()
    live.tables["complaints"].append({"order": 8, "total": 5})
    live.run()
    assert sent == [] and len(live.approvals) == 4
    with pytest.raises(TypeError):
        asyncio.run(refund.fn())
    with pytest.raises(AntonError):
        refund(1, 2)


def test_an_action_that_its_app_gave_up_sends_nothing_more(live, sent):
    refund = declare(live, sent, None)
    refund.send(7, 5)
    sql(live, "select anton.retire_actions($1, '{}')", live.app.name)
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


def test_nobody_has_a_right_to_change_what_happened_to_approvals(live):
    granted = sql(live, "select relowner::regrole::text, has_table_privilege(relowner, oid, 'insert') as adds, "
                        "has_table_privilege(relowner, oid, 'update, delete, truncate') as changes "
                        "from pg_class where oid = 'anton.approval_event'::regclass")
    assert [tuple(row) for row in granted] == [("anton_owner", True, False)]


FORGED = [
    ({}, "noted as it happens"),
    ({"person": "'zoe'"}, 'nobody is called "zoe"'),
    ({"person": "'eve'"}, "eve is not among those who may: @finance"),
    ({"person": "'gus'"}, "gus asked for it"),
    ({"person": "null"}, "a voice is somebody's"),
    ({"args_sha256": "anton.args_hash('{}')"}, "not those that were shown"),
    ({"kind": "'approved'", "person": "null", "via": "'timeout'"}, "time approves nothing"),
    ({"kind": "'asked'", "person": "null"}, "noted as it happens"),
    ({"approval_id": "0"}, "there is no such approval")]


def test_a_voice_is_not_made_by_an_insert(live, sent):
    refund = declare(live, sent, Approval("@finance"))
    refund.send(7, 5, by="gus")
    live.run()
    sql(live, "select anton.put_person(name, p_groups => array[g]) from (values ('ann', 'finance'), ('eve', 'sales'), "
              "('gus', 'finance')) x (name, g)")
    for event, said in FORGED:
        given = {"approval_id": "id", "kind": "'voted'", "person": "'ann'", "via": "'psql'",
                 "args_sha256": "args_sha256", **event}
        with pytest.raises(Exception, match=said) as refused:
            sql(live, f"insert into anton.approval_event ({', '.join(given)}) select {', '.join(given.values())} "
                      "from anton.approval")
        assert refused.value.sqlstate == "NT009" and "select decide(" in refused.value.hint
    assert [row["kind"] for row in sql(live, "select kind from anton.approval_event")] == ["asked"]


def test_a_voice_that_is_given_again_is_one_event_and_one_after_the_end_none(live, sent):
    asked(live, sent, Approval("@finance", quorum=2))
    (approval,) = live.approvals
    approval.approve(by="ann")
    approval.approve(by="ann")
    assert [row["kind"] for row in sql(live, "select kind from anton.approval_event order by id")] == ["asked", "voted"]
    approval.reject(by="bob")
    with pytest.raises(Exception, match="it is rejected"):
        sql(live, "insert into anton.approval_event (approval_id, kind, person) select id, 'voted', 'bob' "
                  "from anton.approval")


def test_what_cannot_be_is_refused_where_it_is_declared():
    with pytest.raises(BadOption, match="people or groups"):
        Approval()
    with pytest.raises(BadOption, match="reject"):
        Approval("ann", on_timeout="explode")
    with pytest.raises(BadOption, match="1 or more"):
        Approval("ann", quorum=0)


def test_a_dead_letter_of_the_sender_that_is_replayed_waits_for_a_person(live, sent):
    broken = [True]

    def when(args: Any) -> bool:
        if broken:
            raise ValueError("no rates")
        return True

    refund = declare(live, sent, Approval("@finance", when=when))
    refund.send(7, 5)
    live.advance("1h")
    assert len(live.dead) == 1 and sent == [] and live.approvals == []
    broken.clear()
    sql(live, "select anton.replay(id) from anton.dead")
    live.run()
    assert sent == [] and len(live.approvals) == 1
    live.approvals[0].approve(by="ann")
    live.run()
    assert sent == [(7, 5)]


@pytest.mark.parametrize("column, value, said", [
    ("approvers", "'{eve}'", "its action is approved by @finance"), ("quorum", "1", "needs 2 voices"),
    ("on_timeout", "'approve'", "not approved by time"), ("state", "'approved'", "begins as pending")])
def test_an_approval_by_psql_asks_for_no_less_than_is_declared(column, value, said, live, sent):
    refund = declare(live, sent, Approval("@finance", quorum=2))
    refund.send(7, 5)
    given = {"approvers": "'{@finance}'", "quorum": "2", "on_timeout": "'reject'", "state": "'pending'", column: value}
    with pytest.raises(Exception, match=said):
        sql(live, "insert into anton.approval (action_id, app, name, args, args_sha256, preview, expires_at, "
                  f"{', '.join(given)}) select id, app, name, args, anton.args_hash(args), '', anton.now(), "
                  f"{', '.join(given.values())} from anton.action")


def test_an_approval_of_one_call_adds_to_what_is_declared(live, sent):
    refund = declare(live, sent, Approval("@finance", on_timeout="approve", timeout="1h"))
    refund.send(7, 5, approve=Approval("eve", quorum=2, timeout="1s"))
    live.run()
    (approval,) = live.approvals
    assert approval.approvers == ("@finance", "eve")
    approval.approve(by="ann")
    live.advance("1m")
    assert sent == [] and len(live.approvals) == 1
    live.advance("2h")
    assert sent == [] and [call.state for call in live.calls] == ["expired"]


def test_who_is_named_for_one_call_is_told_and_asked_besides_those_of_its_action(live, sent):
    refund = declare(live, sent, Approval("@finance", escalate={"1h": "@cfo"}))
    sql(live, "select anton.put_person(name, name || '@x.com', p_groups => array[g]) from (values ('ann', 'finance'), "
              "('lea', 'legal'), ('cleo', 'cfo')) x (name, g)")
    refund.send(7, 5, approve=Approval("@legal", via=["email", "slack:#legal"], editable=["amount"]))
    live.run()
    (approval,) = live.approvals
    assert approval.approvers == ("@finance", "@legal")
    assert [row["id"] for row in sql(live, "select id from anton.inbox($1, 'lea')", live.app.name)] == [approval.id]
    assert {row["to"] for row in sql(live, 'select "to" from anton.notice')} == {"#legal", "ann@x.com", "lea@x.com"}
    with pytest.raises(DecisionRefused, match="order_id may not be changed; amount may"):
        approval.approve(by="lea", edit={"order_id": 8})
    approval.approve(by="lea")
    with pytest.raises(Exception, match="0 of 1 voices of @finance approve it"):
        sql(live, "update anton.approval set state = 'approved'")
    with pytest.raises(Exception, match="asked for one call grow as escalate says"):
        sql(live, "update anton.approval set needs = needs - 0")
    live.advance("61m")
    assert sent == [] and live.approvals[0].approvers == ("@finance", "@legal", "@cfo")
    approval.approve(by="cleo")
    live.run()
    assert sent == [(7, 5)]
    refund.send(8, 5, approve=Approval("@legal"))
    live.run()
    live.approvals[0].approve(by="ann")
    live.run()
    assert len(sent) == 1 and len(live.approvals) == 1


def test_an_approval_by_psql_asks_those_of_the_call_too(live, sent):
    refund = declare(live, sent, Approval("@finance"))
    refund.send(7, 5, approve=Approval("@legal"))
    for needs in ([], [{"approvers": ["@legal"], "quorum": 1}], [{"approvers": ["@finance", "@legal"], "quorum": 2}]):
        with pytest.raises(Exception, match="its call is approved by @legal, too"):
            sql(live, "insert into anton.approval (action_id, app, name, args, args_sha256, preview, expires_at, "
                      "approvers, needs) select id, app, name, args, anton.args_hash(args), '', anton.now(), "
                      "'{@finance, @legal}', $1::jsonb from anton.action", needs)


def test_a_call_by_psql_waits_for_a_person_as_any_other(live, sent):
    declare(live, sent, Approval("@finance"))
    sql(live, "insert into anton.action (app, name, args, requested_by, approve) values "
              f"('{live.app.name}', 'refund', '{{\"order_id\": 7, \"amount\": 5}}', 'eve', "
              "'{\"approvers\": [\"eve\"], \"timeout\": \"1 second\", \"on_timeout\": \"approve\"}')")
    live.run()
    live.advance("1h")
    assert sent == []
    (approval,) = live.approvals
    with pytest.raises(DecisionRefused):
        approval.approve(by="eve")
    live.run()
    assert sent == []
