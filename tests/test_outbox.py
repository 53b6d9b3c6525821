"""Outbox: a call commits with its cause, its body runs in the sender alone, and what became of it is known."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from datetime import timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pytest
from working import morning

from anton import Approval, Table, Webhook, action, env, flow, transaction
from anton.app import declaring
from anton.errors import BadOption, BadSignature, Discard, InvalidRecord, Retry, WorldError
from anton.secret import forget, reveal


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
    made = refund.send(7, 5, key="order-7")
    assert (made["idempotency_key"], made["args"]) == ("order-7", {"order_id": 7, "amount": "5"})
    refund.send(7, 6, key="order-7")
    app.run()
    assert [(call.amount, call.key) for call in app.outbox] == [("5", "order-7")]


def test_who_watches_sees_each_call_and_what_becomes_of_it_however_many_there_are(app, peer):
    refund = declare(app, peer)
    watch = app.db.run(flow.watch(app.db))
    with transaction():
        for order in range(60):                                        # more than one look brings
            refund.send(order, 5)
    app.run()
    refund.send(99, 5, approve=Approval("ann"))
    app.run()

    def seen() -> list[str]:
        lines: list[str] = []
        while more := app.db.run(watch.look()):
            lines += more
        return [line.partition("refund  ")[2].partition("{")[0].strip() for line in lines]

    assert seen() == ["captured"] * 60 + ["waiting"]
    app.approvals[0].approve(by="ann")
    app.run()
    assert seen() == ["captured"]


def test_a_call_that_is_put_off_is_there_and_sent_at_its_time(live, peer):
    refund = declare(live, peer)
    refund.send(7, 5, delay="1h")
    refund.send(8, 5, key="eight", at=live.now + timedelta(hours=2))
    refund.send(9, 5, at=live.now - timedelta(hours=1))
    with pytest.raises(BadOption, match="delay= or at=, not both"):
        refund.send(7, 5, delay="1h", at=live.now)
    with pytest.raises(InvalidRecord, match="after"):
        refund.send(7, 5, after="1h")
    with pytest.raises(Exception, match="due after the year 9999"):
        refund.send(7, 5, delay=timedelta(days=3_000_000))
    live.run()
    assert [order for order, _, _ in peer.got] == [9] and states(live) == ["new", "new", "sent"]
    listed = {row["id"]: row["due_at"] for row in sql(live, "select * from anton.list_actions()")}
    assert [due is not None for _, due in sorted(listed.items())] == [True, True, True]
    assert sql(live, f"select error from anton.why('anton.action', '{min(listed)}') where level > 0"
               )[0]["error"].startswith("due at")
    with pytest.raises(Exception, match="stay as they are"):
        sql(live, "update anton.action set due_at = null")
    live.advance("59m")
    assert len(peer.got) == 1
    live.advance("2m")
    assert [order for order, _, _ in peer.got] == [9, 7]
    live.advance("1h")
    assert [order for order, _, _ in peer.got] == [9, 7, 8] and states(live) == ["sent"] * 3 and not live.dead


def test_people_are_asked_at_once_about_a_call_that_is_put_off(app, peer):
    refund = declare(app, peer, approve=Approval("ann"))
    sql(app, "select anton.put_person('ann')")
    refund.send(7, 5, delay="1d")
    app.run()
    (asked,) = app.approvals
    asked.approve(by="ann")
    app.run()
    assert states(app) == ["ready"]
    app.advance("1d")
    assert states(app) == ["captured"]


def test_an_action_with_an_argument_of_that_name_gets_it(app):
    with declaring(app.app):
        @action
        def remind(at: str, *, key: str) -> None: ...

    app.migrate()
    remind.send(at="noon")
    remind.send("noon", delay="1h")
    app.run()
    assert [(call.at, call.state) for call in app._calls("true")] and states(app) == ["captured", "new"]
    app.advance("1h")
    assert states(app) == ["captured", "captured"]


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
    morning(live)
    refund = declare(live, peer, cap=["3/day", "100 amount/day"])
    for order in range(5):
        refund.send(order, 1)
    live.run()
    assert len(peer.got) == 3 and states(live).count("sent") == 3
    live.advance("25h")
    assert len(peer.got) == 5


def test_a_call_that_no_period_of_a_cap_can_take_is_refused_and_is_sent_when_the_cap_is_raised(live, peer):
    refund = declare(live, peer, cap="100 amount/day")
    for order, amount in enumerate((101, -1, 5)):
        refund.send(order, amount)
    live.run()
    assert states(live) == ["refused", "refused", "sent"]              # the last waited for none of them
    first = sql(live, "select min(id) from anton.action")[0][0]
    assert live.calls[0].error == (
        "the cap of 100 amount a day takes no call that needs 101. Nothing is sent: make it less, or raise cap=, anton "
        f"migrate, and then: anton actions retry {first}")
    assert "takes no call that needs -1" in live.calls[1].error
    call_sql(live, "retry_action", 1)
    live.run()
    assert states(live) == ["refused", "refused", "sent"]              # it is judged anew, by what there is
    refund.caps = [{"amount": "200", "of": "amount", "period": "day"}]
    live.migrate()
    call_sql(live, "retry_action", 1)
    live.run()
    assert states(live) == ["sent", "refused", "sent"] and [amount for _, amount, _ in peer.got] == [5, 101]


def test_a_call_that_waits_for_a_cap_says_so_and_goes_on_when_it_is_raised(live, peer):
    morning(live)
    refund = declare(live, peer, cap="1/day")
    refund.send(7, 5)
    live.run()
    refund.send(8, 5)
    live.run()
    assert states(live) == ["sent", "new"]
    assert live.calls[1].error == "the cap of 1 calls a day is used up: 1 of it are, and this call needs 1"
    refund.caps = [{"amount": "2", "of": None, "period": "day"}]
    live.migrate()
    live.run()
    assert states(live) == ["sent", "sent"] and live.calls[1].error is None


def test_a_captured_call_is_held_to_its_caps_size_too(app, peer):
    refund = declare(app, peer, cap="100 amount/day")
    refund.send(7, 101)
    refund.send(8, 100)
    app.run()
    assert states(app) == ["refused", "captured"]


def test_a_call_that_is_sent_again_in_another_period_counts_there(live, peer):
    morning(live)
    refund = declare(live, peer, cap="10 amount/day")
    peer.raises = [Discard("no such order")]
    refund.send(7, 6)
    live.run()
    live.advance("25h")
    call_sql(live, "retry_action", 1)
    live.run()
    refund.send(8, 5)
    live.run()
    assert states(live) == ["sent", "new"]
    assert [row["amount"] for row in sql(live, "select amount from anton.action_used order by since")] == [6, 6]
    live.advance("25h")
    assert states(live) == ["sent", "sent"]


def test_a_rate_holds_back_what_is_sent(live, peer):
    refund = declare(live, peer, rate="1/h")
    refund.send(7, 5)
    refund.send(8, 5)
    live.run()
    assert len(peer.got) == 1 and sorted(states(live)) == ["new", "sent"]
    live.advance("2h")
    assert len(peer.got) == 2


def test_of_two_calls_at_once_one_gets_what_is_left_of_a_cap(live, peer):
    morning(live)
    refund = declare(live, peer, cap="1/day")
    refund.send(7, 5)
    refund.send(8, 5)

    async def begin(conn: Any, first: bool) -> str:
        which = f"(select {'min' if first else 'max'}(id) from anton.action)"
        return str(await conn.fetchval(f"select verdict from anton.begin_action({which}, 5)"))

    async def race() -> list[str]:
        async with live.db.conn() as one, live.db.conn() as two, live.db.conn() as watch:
            pid = await two.fetchval("select pg_backend_pid()")
            async with one.transaction():
                first = await begin(one, True)
                second = asyncio.ensure_future(begin(two, False))
                while not second.done() and not await watch.fetchval("select pg_blocking_pids($1) <> '{}'", pid):
                    pass                                               # until the first holds it up
            return [first, await second]

    assert live.db.run(race()) == ["send", "capped"]


DEATH = """
do $$
declare j record;
begin
  select * into j from anton.claim(anton.register_worker('a', 'host', 1, 'v'), 5, array(
    select id from anton.handler where name = 'send_refund'), '{{1}}', '{{1}}', '{{0}}', '1 minute');
  {begun}
  perform anton.bury(5, j.id, j.lo, 'crashed', 'killed', null);
end $$"""


@pytest.mark.parametrize("effect, begun, state", [
    ("unsafe", True, "unknown"), ("idempotent", True, "unknown"), ("unsafe", False, "failed")])
def test_a_call_whose_job_died_is_unknown_where_it_was_begun_and_else_failed(effect, begun, state, live, peer):
    refund = declare(live, peer, effect=effect)
    refund.send(7, 5)
    sql(live, DEATH.format(begun="perform anton.begin_action(min(id), 9) from anton.action;" if begun else ""))
    assert states(live) == [state] and live.calls[0].error.endswith("killed")
    live.run()
    assert peer.got == []
    if begun:
        call_sql(live, "retry_action", 1)
    else:
        sql(live, "select anton.replay(id) from anton.dead")
    live.run()
    assert states(live) == ["sent"] and len(peer.got) == 1


@pytest.mark.parametrize("answer, state", [
    ({"number": 1}, "sent"), (False, "failed"), (None, "unknown"), (ValueError("what?"), "unknown"),
    (WorldError("away"), "unknown")])
def test_of_a_call_whose_last_attempt_died_its_probe_is_asked_before_it_is_unknown(answer, state, live, peer):
    asked, told = [], []

    def probe(call: Any) -> Any:
        asked.append(call.order_id)
        if isinstance(answer, Exception):
            raise answer
        return answer

    refund = declare(live, peer, probe=probe, attempts=2)
    with declaring(live.app):
        @refund.calls.on_updated_records(each=True)
        def tell(call: Any) -> None:
            told.append(call.state)

    live.migrate()
    refund.send(7, 5)
    sql(live, DEATH.format(begun="perform anton.begin_action(min(id), 9) from anton.action;"))
    assert states(live) == ["sending"]
    live.run()
    live.advance("1h")
    assert states(live) == [state] and peer.got == [] and "unknown" not in told[:-1]
    assert len(asked) == (2 if isinstance(answer, WorldError) else 1)  # by the attempts, then there is an end to it
    assert len(live.records("refunds")) == (state == "sent")


def test_a_call_whose_probe_died_too_is_unknown(live, peer):
    declare(live, peer, probe=lambda call: False).send(7, 5)
    sql(live, DEATH.format(begun="perform anton.begin_action(min(id), 9) from anton.action;"))
    sql(live, DEATH.format(begun=""))
    live.run()
    assert states(live) == ["unknown"] and peer.got == []


@pytest.mark.parametrize("answer, state", [(False, "failed"), (None, "unknown")])
def test_a_sender_that_is_late_says_that_a_call_was_sent_whatever_its_probe_said(answer, state, live, peer):
    declare(live, peer, probe=lambda call: answer).send(7, 5)
    sql(live, "select anton.begin_action(id, 9) from anton.action")
    sql(live, "select anton.cancel(id) from anton.job")
    live.run()
    assert states(live) == [state]
    ends = "select anton.end_action(id, {}, 'sent', '{{\"number\": 3}}') from anton.action"
    assert [sql(live, ends.format(token))[0][0] for token in (8, 9, 9)] == [False, True, False]
    assert states(live) == ["sent"] and live.calls[0].error is None
    live.run()
    assert [row["data"]["number"] for row in sql(live, "select data from refunds")] == [3] and peer.got == []


@pytest.mark.parametrize("answer, state", [({"number": 1}, "sent"), (False, "failed"), (None, "unknown")])
@pytest.mark.parametrize("last", [RuntimeError("broke"), Retry("later"), Discard("no")])
def test_an_idempotent_call_that_is_tried_no_more_is_what_its_probe_says(last, answer, state, live, peer):
    refund = declare(live, peer, effect="idempotent", attempts=2, probe=lambda call: answer)
    peer.raises = [RuntimeError("broke"), last]
    refund.send(7, 5)
    live.run()
    live.advance("1h")
    assert states(live) == [state] and peer.got == [] and not peer.raises


@pytest.mark.parametrize("begun, state", [(False, "failed"), (True, "unknown")])
def test_a_call_whose_job_is_cancelled_ends_and_can_be_sent_again(begun, state, live, peer):
    refund = declare(live, peer)
    with transaction():
        for order in range(3):
            refund.send(order, 5)
    if begun:
        sql(live, "select anton.begin_action(id, id) from anton.action")
    assert [row[0] for row in sql(live, "select anton.cancel(id) from anton.job")] == [True]
    assert states(live) == [state] * 3 and all(call.error.endswith("its job was cancelled") for call in live.calls)
    live.run()
    assert peer.got == []
    call_sql(live, "retry_action", 2)
    live.run()
    assert sorted(states(live)) == sorted([state, "sent", state]) and [order for order, _, _ in peer.got] == [1]


def test_a_call_that_is_cancelled_while_it_waits_to_be_tried_again_is_failed(live, peer):
    declare(live, peer).send(7, 5)
    peer.raises = [Retry("later")]
    live.run()
    assert states(live) == ["retrying"]
    assert sql(live, "select anton.cancel(id) from anton.delayed")[0][0]
    live.advance("1h")
    assert states(live) == ["failed"] and peer.got == []


def test_a_process_that_captures_says_of_what_another_began_that_nobody_knows(app, peer):
    declare(app, peer).send(7, 5)
    sql(app, "select anton.begin_action(id, 5) from anton.action")
    app.run()
    assert states(app) == ["unknown"] and peer.got == []


def test_a_captured_call_whose_dead_letter_is_replayed_is_captured(app, peer):
    refund = declare(app, peer)
    refund.send(7, 5)
    sql(app, DEATH.format(begun=""))
    assert states(app) == ["failed"]
    sql(app, "select anton.replay(id) from anton.dead")
    app.run()
    assert states(app) == ["captured"] and peer.got == []


@pytest.mark.parametrize("raised, state", [
    ([RuntimeError("broke")] * 2, "unknown"), ([RuntimeError("broke"), Retry("later")], "unknown"),
    ([RuntimeError("broke"), Discard("no")], "unknown"), ([Retry("later")] * 2, "failed"),
    ([RuntimeError("broke"), TimeoutError("no answer")], "sent")])     # while the world is away it is tried on
def test_an_idempotent_call_that_is_tried_no_more_is_unknown_where_any_attempt_is_in_doubt(raised, state, live, peer):
    refund = declare(live, peer, effect="idempotent", attempts=2)
    peer.raises = list(raised)
    refund.send(7, 5)
    live.run()
    live.advance("1h")
    assert states(live) == [state] and not peer.raises
    if state != "sent":
        call_sql(live, "retry_action", 1)
        live.run()
    assert states(live) == ["sent"] and len(peer.got) == 1


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


def test_taint_is_known_when_a_call_is_made_and_a_chain_that_cannot_be_followed_is_tainted(live):
    with declaring(live.app):
        letters, notes = Table("letters"), Table("notes")
        Webhook("/letters", letters, verify=False)

        @action(policy="case when taint = '{}' then 'send' else 'refuse: ' || taint[1] end")
        def answer(text: str) -> None: ...

        @letters.on_new_records(each=True)
        def reply(letter: Any) -> None:
            answer.send("letter")

        @notes.on_new_records(each=True)
        def note(note: Any) -> None:
            answer.send("note")

    live.migrate()
    sql(live, "select anton.stop_actions()")
    live.post("/letters", json={})
    notes.append({})
    live.run()
    assert sorted(row["taint"] for row in sql(live, "select taint from anton.action")) == [[], ["webhook /letters"]]
    sql(live, "delete from anton.receipt")                             # as time does, while calls may still wait
    sql(live, "select anton.start_actions()")
    live.run()
    assert {(call.text, call.state, call.error) for call in live.calls} == {
        ("letter", "refused", "webhook /letters"), ("note", "sent", None)}
    sql(live, "insert into anton.receipt (id, slot, at, handler_id, n, change_ids, los, his, causes) select -n, 0, "
              "anton.now(), h.id, 1, '{}', '{}', '{}', array[case when n > 1 then 1 - n end] "
              "from generate_series(1, 66) n, anton.handler h where h.name = 'note'")
    (row,) = sql(live, "select anton.taint_of(-65), anton.taint_of(-66) as longer, anton.taint_of(-99) as gone")
    assert tuple(row) == ([], ["unknown"], ["unknown"])


# Declarations


def test_what_cannot_be_is_refused_where_it_is_declared(app):
    with declaring(app.app):
        def pay(amount: int) -> None: ...

        with pytest.raises(BadOption, match="unsafe"):
            action(effect="none", name="a")(pay)
        for cap in ("many", "nan/day", "inf/day", "-1/day"):
            with pytest.raises(BadOption, match="100/day"):
                action(cap=cap, name="b")(pay)
        with pytest.raises(BadSignature, match="send"):
            action(name="c")(pay)(3)


# Policies in SQL


POLICY = """case when (args ->> 'amount')::numeric > 100 then 'refuse: too much'
                 when requested_by = 'eve' or taint <> '{}' then 'ask: who asks?'   -- a remark
                 when (select count(*) from anton.action a where a.name = call.name and a.state = 'sent') > 1 then 'ask'
                 else 'send' end"""


def test_a_policy_in_sql_sees_who_what_how_much_and_taint(live, peer):
    with declaring(live.app):
        letters = Table("letters")
        Webhook("/letters", letters, verify=False)

        @action(policy=POLICY, approve=Approval("@finance", when=lambda args: False), concurrency=1)
        def refund(order_id: int, amount: Decimal, *, key: str) -> Any:
            return peer.take(order_id, amount, key)

        @letters.on_new_records(each=True)
        def ask(letter: Any) -> None:
            refund.send(4, 1)

    live.migrate()
    refund.send(1, 5)
    refund.send(2, 500)
    refund.send(3, 5, by="eve")
    live.run()
    live.post("/letters", json={})
    live.run()
    refund.send(5, 5)
    live.run()
    refund.send(6, 5)
    live.run()
    assert {call.order_id: call.state for call in live.calls} == {
        1: "sent", 2: "refused", 3: "waiting", 4: "waiting", 5: "sent", 6: "waiting"}
    assert live.calls[1].error == "too much"
    live.approvals[0].approve(by="ann")
    live.run()
    assert [order for order, _, _ in peer.got] == [1, 5, 3]


def test_a_policy_in_sql_that_says_nothing_known_or_asks_nobody_refuses(live, peer):
    refund = declare(live, peer, policy="case when (args ->> 'order_id')::int = 1 then null else 'ask' end")
    refund.send(1, 5)
    refund.send(2, 5)
    live.run()
    assert states(live) == ["refused", "refused"] and peer.got == []
    assert "send, ask, refuse" in live.calls[0].error and "no approve= says whom" in live.calls[1].error


@pytest.mark.parametrize("policy", ["amuont > 5", "'send'; drop table x", "select 1 from", "'send') from x --"])
def test_a_policy_that_postgres_cannot_ask_is_refused_at_migrate(policy, live, peer):
    with pytest.raises(Exception, match="policy of action refund"):
        declare(live, peer, policy=policy)


@pytest.mark.parametrize("policy", [lambda call: ("refuse", "no"), "'refuse: no'"])
def test_a_captured_call_is_judged_too(policy, app, peer):
    refund = declare(app, peer, policy=policy)
    refund.send(1, 5)
    app.run()
    assert [(call.state, call.error) for call in app.calls] == [("refused", "no")]


@pytest.mark.parametrize("options", [
    {"policy": "'ask'"}, {"policy": lambda call: "ask"}, {"approve": Approval("@finance", when=lambda args: True)}])
@pytest.mark.parametrize("effect", ["unsafe", "idempotent"])
def test_a_verdict_and_a_token_by_psql_send_nothing(effect, options, live, peer):
    refund = declare(live, peer, effect=effect, **{"approve": Approval("@finance", when=lambda args: False), **options})
    refund.send(7, 5)
    with pytest.raises(Exception, match="call 1 of action refund"):
        sql(live, "update anton.action set state = 'sending', token = 5, attempt = 1, verdict = jsonb_build_object("
                  "'verdict', 'pass', 'args_sha256', anton.args_hash(args))")
    live.run()
    assert peer.got == [] and states(live) == ["waiting"]


def test_a_secret_among_the_arguments_is_refused_in_any_spelling(live, peer, monkeypatch):
    monkeypatch.setenv("SHOP_TOKEN", "tok-73ab91-c0ffee+/")
    token = reveal(env("SHOP_TOKEN"))
    sent = []
    with declaring(live.app):
        @action
        def tell(text: str) -> None:
            sent.append(text)
    live.migrate()
    for text in (token, f"a{token}b", token.upper(), quote(token), token.encode().hex(), token[::-1],
                 *(base64.b64encode(b"x" * n + token.encode() + b"yz").decode() for n in range(3)), "tok-73ab91"):
        tell.send(text)
    live.run()
    forget(token)
    assert sent == ["tok-73ab91"] and states(live) == ["refused"] * 9 + ["sent"]


ALLOWED = [
    ("*.example.com", "https://a.example.com/x", True), ("*.example.com", "https://A.Example.Com:8443", True),
    ("*.Example.com", "https://user:word@a.example.com/?q=@evil.com", True),
    ("*.example.com", "https://evil.com%2f.example.com/", False),
    ("*.example.com", "https:/evil.com/.example.com", False), ("*.example.com", "https:evil.com/.example.com", False),
    ("*.example.com", "//evil.com/a.example.com", False), ("*.example.com", "\x01//evil.com/a.example.com", False),
    ("*.example.com", "ht\ttps://evil.com/a.example.com", False),
    ("*.example.com", "https://evil.com\uff0f.example.com", False),
    ("*.example.com", "https://[::1].example.com/", False),
    ("*.example.com", "https://a.example.com%00.evil.com", False),
    ("*.example.com", "https://a.example.com@b.example.com@evil.com/", False),
    ("https://*.example.com", "https://a.example.com/x?y#z", True),
    ("https://*.example.com", "https://a.example.com:443", True),
    ("https://*.example.com:*", "https://a.example.com:8", True),
    ("https://*.example.com", "https://a.example.com:8443/", False),
    ("https://*.example.com", "http://a.example.com", False),
    ("https://*.example.com", "https://evil.com/.example.com", False),
    ("https://*.example.com", "https://evil.com#.example.com", False),
    ("https://*.example.com", "https://evil.com?.example.com", False),
    ("https://*.example.com", "https://evil.com:443.example.com", False),
    ("https://*.example.com", "https://a.example.com@evil.com", False),
    ("https://*.example.com", "https://evil.com@a.example.com@evil.com", False),
    ("https://*.example.com", "https://evil.com\\.example.com", False),
    ("https://api.example.com*", "https://api.example.com.evil.com", False),
    ("https://api.x.com/v1/*", "https://api.x.com/v1/a?b=/v2/", True),
    ("https://api.x.com/v1/*", "https://api.x.com/v2/v1/", False),
    ("https://api.x.com/v1/*", "https://api.x.com/v1/../admin", False),
    ("https://api.x.com/v1/*", "https://api.x.com/v1/.%2E%2fadmin", False),
    ("https://api.x.com/v1/*", "https://api.x.com/?/v1/", False),
    ("https://api.x.com/v1?id=*", "https://api.x.com/v1?id=7", True),
    ("https://api.x.com/v1?id=*", "https://api.x.com/v1?all&id=7", False),
    ("*@x.com", "a@x.com", True), ("*@x.com", "Ann <a@X.com>, \"B, C\" <b@x.com>; d@x.com", True),
    ("*@x.com", "a@x.com, b@evil.com", False), ("*@x.com", "b@evil.com, a@x.com", False),
    ("*@x.com", "b@evil.com;a@x.com", False), ("*@x.com", "b@evil.com a@x.com", False),
    ("*@x.com", "\"a@x.com\" <b@evil.com>", False), ("*@x.com", "b@evil.com <a@x.com>", False),
    ("*@x.com", "b@evil.com\n, a@x.com", False), ("*@x.com", "us: b@evil.com, a@x.com", False),
    ("*@x.com", "b@evil.com (, a@x.com", False), ("*@x.com", "\"b@evil.com,\"@x.com", False),
    ("*x.com", "b@evil.com, a@x.com", False), ("#general", "#general", True), ("@ann", "@ann", True)]


def test_a_value_is_allowed_by_its_parts_as_all_clients_read_them(live):
    async def ask() -> Any:
        async with live.db.conn() as conn:
            return [await conn.fetchval("select anton.allowed($1, array[$2])", value, pattern)
                    for pattern, value, _ in ALLOWED]

    assert [one for one, ok in zip(ALLOWED, live.db.run(ask()), strict=True) if one[2] is not ok] == []


# Threads and keeping


def test_a_body_that_hangs_keeps_no_process_from_ending():
    code = ("import asyncio, threading; from anton.threads import in_thread\n"
            "async def main():\n"
            "    stuck = asyncio.ensure_future(in_thread(threading.Event().wait))\n"
            "    print(await in_thread(lambda: 'other'))\n"
            "    stuck.cancel()\n"
            "asyncio.run(main())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "other\n"


def test_done_calls_are_forgotten_and_what_waits_failed_is_unknown_or_was_approved_is_kept(live, peer):
    refund = declare(live, peer, approve=Approval("@finance", when=lambda args: args.amount > 10, timeout="365d"))
    refund.send(1, 5)
    live.run()
    peer.raises = [Discard("no")]
    refund.send(2, 5)
    live.run()
    peer.after = TimeoutError("no answer")
    refund.send(3, 5)
    live.run()
    for order in (4, 5):
        refund.send(order, 50)
    live.run()
    next(one for one in live.approvals if one.order_id == 4).approve(by="ann")   # which was asked for first is open
    live.run()
    assert states(live) == ["sent", "failed", "unknown", "sent", "waiting"]
    live.advance("89d")
    assert call_sql(live, "forget_actions", live.now) == 0
    live.advance("2d")
    call_sql(live, "forget_actions", live.now)
    assert [(call.order_id, call.state) for call in live.calls] == [
        (2, "failed"), (3, "unknown"), (4, "sent"), (5, "waiting")]
