"""Outbox: a call commits with its cause, its body runs in the sender alone, and what became of it is known."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from anton import Approval, Table, Webhook, action, transaction
from anton.app import declaring
from anton.errors import BadOption, BadSignature, Discard, InvalidRecord, Retry, WorldError


class Peer:
    """What is outside: what it was sent, and what it raises next."""

    def __init__(self) -> None:
        self.got: list[tuple[int, Decimal, str]] = []
        self.raises: list[BaseException | None] = []
        self.after: BaseException | None = None

    def take(self, order_id: int, amount: Decimal, key: str) -> dict[str, Any]:
        error = self.raises.pop(0) if self.raises else None
        if error is not None:
            raise error
        self.got.append((order_id, amount, key))
        if self.after is not None:
            error, self.after = self.after, None
            raise error
        return {"order_id": order_id, "number": len(self.got)}


@pytest.fixture
def peer() -> Peer:
    return Peer()


def declare(app: Any, peer: Peer, **options: Any) -> Any:
    """An app with complaints, and refunds that are sent to the peer."""
    with declaring(app.app):
        complaints, refunds = Table("complaints"), Table("refunds")

        @action(into=refunds, **options)
        def refund(order_id: int, amount: Decimal, *, key: str) -> dict[str, Any]:
            return peer.take(order_id, amount, key)

        @complaints.on_new_records(each=True)
        def complain(complaint: Any) -> None:
            refund.send(order_id=complaint["order"], amount=complaint["total"])

    app.migrate()
    return refund


def states(app: Any) -> list[str]:
    return [call.state for call in app.calls]


def test_a_call_is_captured_with_its_arguments_and_the_body_never_runs(app, peer):
    declare(app, peer)
    app.tables["complaints"].append({"order": 7, "total": 5})
    app.run()
    assert [(call.order_id, call.amount, call.state) for call in app.outbox] == [(7, "5", "captured")]
    assert peer.got == [] and app.records("refunds") == [] and not app.dead


def test_a_call_is_one_job_of_its_sender(app, peer):
    refund = declare(app, peer, policy=lambda call: "send")
    refund.send(7, 5)
    app.run()
    assert sql(app, "select sum(r.n)::int as n from anton.receipt r join anton.handler h on h.id = r.handler_id "
                    "where h.name = 'send_refund'")[0]["n"] == 1


def test_a_live_call_is_sent_by_the_sender_and_what_came_back_is_written(live, peer):
    declare(live, peer)
    live.tables["complaints"].append({"order": 7, "total": 5})
    live.run()
    (call,) = live.outbox
    assert (call.state, call.result) == ("sent", {"order_id": 7, "number": 1})
    assert peer.got == [(7, Decimal(5), call.key)]
    assert [refund["number"] for refund in live.records("refunds")] == [1]


def test_wrong_arguments_are_refused_where_they_are_given(app, peer):
    refund = declare(app, peer)
    with pytest.raises(InvalidRecord, match="amount"):
        refund.send(order_id=7)
    with pytest.raises(InvalidRecord, match="colour"):
        refund.send(order_id=7, amount=1, colour="red")
    assert app.calls == []


def test_a_call_in_a_transaction_that_fails_is_none(app, peer):
    refund = declare(app, peer)
    with pytest.raises(RuntimeError), transaction():
        refund.send(7, 5)
        raise RuntimeError
    refund.send(8, 5)
    assert [call.order_id for call in app.calls] == [8]


def test_a_second_call_with_the_same_key_is_none(app, peer):
    refund = declare(app, peer)
    refund.send(7, 5, key="order-7")
    refund.send(7, 6, key="order-7")
    app.run()
    assert [(call.amount, call.key) for call in app.outbox] == [("5", "order-7")]


def test_bound_to_a_table_it_calls_once_for_each_record(app, peer):
    with declaring(app.app):
        orders = Table("orders")

        @action(map={"amount": "total"})
        def pay(order_id: int, amount: Decimal) -> None: ...

        orders.on_new_records(pay)
    app.migrate()
    app.tables["orders"].extend([{"order_id": 1, "total": 2}, {"order_id": 3}])
    app.run()
    assert [call.order_id for call in app.outbox] == [1]
    assert [dead.error.partition(",")[0] for dead in app.dead] == ['pay takes "amount"']


def test_an_unsafe_call_that_breaks_after_it_left_is_unknown_and_never_sent_again(live, peer):
    declare(live, peer)
    peer.after = TimeoutError("no answer")
    live.tables["complaints"].append({"order": 7, "total": 5})
    live.run()
    live.advance("1h")
    assert states(live) == ["unknown"] and len(peer.got) == 1
    assert live.calls[0].error == "TimeoutError: no answer" and not live.dead


def test_an_idempotent_call_that_breaks_is_sent_again_with_the_same_key(live, peer):
    declare(live, peer, effect="idempotent")
    peer.after = TimeoutError("no answer")
    live.tables["complaints"].append({"order": 7, "total": 5})
    live.run()
    live.advance("1h")
    assert states(live) == ["sent"]
    assert len(peer.got) == 2 and len({key for _, _, key in peer.got}) == 1


@pytest.mark.parametrize("answer, state, sent", [({"number": 1}, "sent", 1), (False, "sent", 2), (None, "unknown", 1)])
def test_probe_says_what_became_of_a_call_that_broke(answer, state, sent, live, peer):
    declare(live, peer, probe=lambda call: answer)
    peer.after = ConnectionResetError("cut")
    live.tables["complaints"].append({"order": 7, "total": 5})
    live.run()
    live.advance("1h")
    assert (states(live), len(peer.got)) == ([state], sent)
    assert len(live.records("refunds")) == (0 if answer is None else 1)


@pytest.mark.parametrize("error", [Retry("later"), WorldError("away"), ConnectionRefusedError("closed")])
def test_what_did_not_happen_is_tried_again(error, live, peer):
    declare(live, peer)
    peer.raises = [error]
    live.tables["complaints"].append({"order": 7, "total": 5})
    live.run()
    assert states(live) == ["retrying"] and peer.got == []
    live.advance("1h")
    assert states(live) == ["sent"] and len(peer.got) == 1


def test_a_refusal_is_failed_and_a_dead_letter_and_a_person_may_send_it_again(live, peer):
    declare(live, peer)
    peer.raises = [Discard("no such order")]
    live.tables["complaints"].append({"order": 7, "total": 5})
    live.run()
    assert states(live) == ["failed"] and [dead.error for dead in live.dead] == ["no such order"]
    call_sql(live, "retry_action", 1)
    live.run()
    assert states(live) == ["sent"]


def call_sql(app: Any, function: str, *args: Any) -> Any:
    async def work() -> Any:
        async with app.db.tx() as conn:
            first = await conn.fetchval("select min(id) from anton.action")
            return await app.db.call_value(conn, function, first if args[:1] == (1,) else args[0], *args[1:])

    return app.db.run(work())


def sql(app: Any, text: str) -> Any:
    async def work() -> Any:
        async with app.db.conn() as conn:
            return await conn.fetch(text)

    return app.db.run(work())


def test_calls_of_an_action_are_a_table_whose_updates_are_changes_of_state(live, peer):
    refund = declare(live, peer)
    with declaring(live.app):
        told = Table("told")

        @refund.calls.on_updated_records(where="new.state = 'unknown'", each=True)
        def tell(call: Any) -> None:
            told.append({"order": call.args["order_id"], "state": call.state})

    live.migrate()
    peer.after = TimeoutError("no answer")
    live.tables["complaints"].append({"order": 7, "total": 5})
    live.run()
    assert [(one["order"], one["state"]) for one in live.records("told")] == [(7, "unknown")]
    assert [call.order_id for call in refund.calls.select(state="unknown")] == [7]


# Guards


@pytest.mark.parametrize("state", ["ready", "sending", "sent", "waiting"])
def test_nobody_inserts_a_call_that_is_further_than_new(state, app, peer):
    declare(app, peer)
    with pytest.raises(Exception, match="a call begins as new"):
        sql(app, "insert into anton.action (app, name, args, state) "
                 f"values ('{app.app.name}', 'refund', '{{}}', '{state}')")


def test_a_call_by_psql_is_sent_as_any_other_and_a_wrong_one_refused(live, peer):
    declare(live, peer)
    for args in ('{"order_id": 7, "amount": 5}', '{"order_id": "x", "amount": 5}'):
        sql(live, f"insert into anton.action (app, name, args) values ('{live.app.name}', 'refund', '{args}')")
    live.run()
    assert states(live) == ["sent", "refused"] and len(peer.got) == 1
    assert "order_id" in live.calls[1].error


def test_only_what_is_allowed_is_sent(live):
    sent = []
    with declaring(live.app):
        @action(allow={"url": ["*.example.com", "api.shop.de"]})
        def call(url: str) -> None:
            sent.append(url)
    live.migrate()
    good = ["https://a.example.com/x", "https://api.shop.de:8443/?q=https://evil.com"]
    for url in [*good, "https://evil.com/a.example.com", "https://a.example.com@evil.com/",
                "https://a.example.com\\@evil.com", "https://example.com.evil.com"]:
        call.send(url)
    live.run()
    assert sorted(sent) == sorted(good)
    assert sorted(states(live)) == ["refused"] * 4 + ["sent"] * 2


def test_a_cap_lets_through_what_it_says_and_the_rest_waits_for_the_next_day(live, peer):
    refund = declare(live, peer, cap=["3/day", "100 amount/day"])
    for order in range(5):
        refund.send(order, 1)
    live.run()
    assert len(peer.got) == 3 and states(live).count("sent") == 3
    live.advance("25h")
    assert len(peer.got) == 5


def test_stopped_actions_wait_and_go_on(live, peer):
    refund = declare(live, peer)
    sql(live, "select anton.stop_actions()")
    refund.send(7, 5)
    live.run()
    assert states(live) == ["new"] and peer.got == []
    sql(live, "select anton.start_actions()")
    live.run()
    assert states(live) == ["sent"]


def test_a_policy_lets_through_asks_or_refuses(live, peer):
    def policy(call: Any) -> Any:
        amount = Decimal(call.args["amount"])
        return "send" if amount < 10 else "ask" if amount < 100 else ("refuse", "too much")

    refund = declare(live, peer, policy=policy, approve=Approval("@finance", when=lambda args: False))
    for amount in (1, 50, 500):
        refund.send(amount, amount)
    live.run()
    assert states(live) == ["sent", "waiting", "refused"]
    assert live.calls[2].error == "too much"
    live.approvals[0].approve(by="ann")
    live.run()
    assert [order for order, _, _ in peer.got] == [1, 50]


def test_what_is_made_of_records_from_outside_is_tainted_all_along_its_way(live):
    seen = []

    def policy(call: Any) -> str:
        seen.append(call.taint)
        return "refuse" if call.taint else "send"

    with declaring(live.app):
        letters, drafts = Table("letters"), Table("drafts")
        Webhook("/letters", letters, verify=False)

        @action(policy=policy)
        def answer(text: str) -> None: ...

        @letters.on_new_records(each=True, into=drafts)
        def draft(letter: Any) -> dict[str, Any]:
            return {"text": letter["payload"]["text"]}

        @drafts.on_new_records(each=True)
        def reply(draft: Any) -> None:
            answer.send(draft["text"])

    live.migrate()
    live.post("/letters", json={"text": "pay me"})
    live.run()
    drafts.append({"text": "from within"})
    live.run()
    assert seen == [["webhook /letters"], []]
    assert states(live) == ["refused", "sent"]


# Declarations


def test_what_cannot_be_is_refused_where_it_is_declared(app):
    with declaring(app.app):
        def pay(amount: int) -> None: ...

        with pytest.raises(BadOption, match="unsafe"):
            action(effect="none", name="a")(pay)
        with pytest.raises(BadOption, match="100/day"):
            action(cap="many", name="b")(pay)
        with pytest.raises(BadSignature, match="send"):
            action(name="c")(pay)(3)


