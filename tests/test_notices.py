"""Notices and Slack: who is told, and that a signed request counts once, by a person who is known."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from typing import Any, Literal
from urllib.parse import quote

import asyncpg
import pytest
from anton_components.vendor.slack.approval import SlackAskApproval, message
from desk import Person, asked, form_of, know, sql
from peers import served
from slack_sdk import WebClient
from slack_sdk.models.views import View
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anton import Approval, action
from anton.app import declaring
from anton.component import components_of
from anton.errors import BadOption, DecisionRefused
from anton.migrate import migrate
from anton.notices import Message, Notice, Notices, compose

SECRET = "8f742231b10e8888abcd99yyyzzz85a5"


@pytest.fixture
def told(live: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An app that asks @finance by Slack and e-mail. .sent, .notices."""
    monkeypatch.setenv("SLACK_SIGNING_SECRET", SECRET)
    live.sent, live.notices = [], []
    finance = Approval("@finance", via=["inbox", "slack:#finance", "email"], remind=["2h"], escalate={"4h": "@cfo"})
    with declaring(live.app):
        notices = Notices()

        @action(approve=finance)
        def refund(amount: int) -> None:
            live.sent.append(amount)

        @notices.on_new_records(each=True)
        def note(notice: Any) -> None:
            live.notices.append(notice)

    live.migrate()
    live.refund = refund
    know(live, "ann", "finance", email="ann@example.com", slack="U1")
    know(live, "eve", "sales", slack="U2")
    know(live, "cleo", "cfo", email="cleo@example.com")
    refund.send(5)
    live.run()
    return live


def press(app: Any, user: str, what: str, value: dict[str, Any], *, secret: str = SECRET, ago: int = 0,
          keep: dict[str, Any] | None = None) -> Any:
    """Slack's request for a button that was pressed. keep: gets it, to be sent again."""
    payload = {"type": "block_actions", "trigger_id": "1.2.3", "actions": [
        {"action_id": f"anton_{what}", "value": json.dumps(value)}]}
    return interact(app, user, payload, secret, ago, keep)


def interact(app: Any, user: str, payload: dict[str, Any], secret: str = SECRET, ago: int = 0,
             keep: dict[str, Any] | None = None) -> Any:
    payload |= {"user": {"id": user, "team_id": "T1"}, "team": {"id": "T1"}, "api_app_id": "A1"}
    body = f"payload={quote(json.dumps(payload))}"
    stamp = str(int(app.now.timestamp()) - ago)
    made = hmac.new(secret.encode(), f"v0:{stamp}:{body}".encode(), hashlib.sha256).hexdigest()
    request = {"content": body, "headers": {
        "content-type": "application/x-www-form-urlencoded", "x-slack-request-timestamp": stamp,
        "x-slack-signature": f"v0={made}"}}
    if keep is not None:
        keep.update(request)
    return app.post("/inbox/slack", **request)


def value_of(app: Any) -> dict[str, Any]:
    (row,) = sql(app, "select id, args_sha256 from anton.approval where state = 'pending'")
    return {"approval": row[0], "sha256": row[1]}


def test_each_channel_is_told_once_reminded_and_escalated(told):
    assert [(one.kind, one.via, one.to, one.person) for one in told.notices] == [
        ("asked", "slack", "#finance", None), ("asked", "email", "ann@example.com", "ann")]
    told.advance("2h")
    assert [(one.kind, one.to) for one in told.notices[2:]] == [
        ("reminder", "#finance"), ("reminder", "ann@example.com")]
    told.advance("2h")
    assert [(one.kind, one.to) for one in told.notices[4:]] == [
        ("escalated", "#finance"), ("escalated", "cleo@example.com")]
    assert [event[0] for event in sql(told, "select kind from anton.approval_event order by id")] == [
        "asked", "reminded", "escalated"]
    told.approvals[0].approve(by="cleo")
    told.run()
    assert [(one.kind, one.to) for one in told.notices[6:]] == [("decided", "#finance")] and told.sent == [5]


def test_an_edit_is_told_to_those_who_have_still_to_approve_it(live):
    with declaring(live.app):
        @action(approve=Approval("@finance", via=["slack:#finance", "email"], quorum=2))
        def refund(amount: int) -> None:
            pass

    live.migrate()
    for name in ("ann", "bob"):
        know(live, name, "finance", email=f"{name}@example.com")
    refund.send(5)
    live.run()
    live.approvals[0].approve(by="bob")
    live.approvals[0].approve(by="ann", edit={"amount": 3})
    rows = sql(live, "select kind, \"to\", subject from anton.notice where kind <> 'asked' order by \"to\"")
    assert [tuple(row) for row in rows] == [
        ("edited", "#finance", "refund: amount 3"), ("edited", "bob@example.com", "refund: amount 3")]
    assert live.approvals[0].approve(by="bob")["state"] == "approved"  # his voice for 5 did not count for 3
    assert len(sql(live, "select from anton.notice where kind = 'edited'")) == 2


def test_migrate_and_doctor_name_whom_an_action_asks_and_cannot_reach(live, monkeypatch):
    monkeypatch.delenv("SMTP_HOST", raising=False)
    with declaring(live.app):
        @action(approve=Approval("@finance", "zoe", via=["email"], escalate={"1h": "@cfo"}))
        def refund(amount: int) -> None:
            pass

    sql(live, "select anton.put_person('ann', p_groups => '{finance}')")
    notes = live.db.run(migrate(live.db, live.app)).notes
    for said in ("refund: it asks @cfo, and that is nobody; anton people add NAME --group cfo",
                 "refund: it asks zoe, and that is nobody; anton people add zoe",
                 "refund: it asks ann by e-mail, who has no address; anton people add ann --email ADDRESS",
                 'via=["email"] of an approval sends nothing: set SMTP_HOST'):
        assert any(said in note for note in notes), notes
    found = sql(live, "select problem from anton.findings() where kind = 'action'")
    assert [row["problem"] for row in found] == [
        "it asks @cfo, and that is nobody", "it asks ann by e-mail, who has no address",
        "it asks zoe, and that is nobody", "it asks by e-mail, and no handler of Notices() sends those"]
    with declaring(live.app):
        Approval("zoe", via=["slack:#finance"])
        assert any("via=['slack:#finance'] of an approval is posted by nothing" in note
                   for note in live.db.run(migrate(live.db, live.app)).notes)
        Notices().on_new_records(SlackAskApproval(oauth_token="xoxb"), where="via = 'slack'")
        assert not any("slack" in note for note in live.db.run(migrate(live.db, live.app)).notes)
    sql(live, "select anton.put_person('zoe', 'zoe@example.com'), anton.put_person('ann', 'ann@example.com'), "
              "anton.put_person('cleo', 'cleo@example.com', p_groups => '{cfo}')")
    assert [row[0] for row in sql(live, "select problem from anton.findings() where kind = 'action'")] == [
        "it asks by e-mail, and no handler of Notices() sends those"]


@pytest.mark.parametrize(("where", "silent"), [
    (None, ["email"]), ("via = 'slack'", ["email"]), ("via = 'email'", ["slack"]), ("not (via = 'email')", ["email"]),
    ("via in ('slack', 'email')", [])])
def test_doctor_names_channels_whose_notices_nobody_takes(where, silent, live, monkeypatch):
    monkeypatch.delenv("SMTP_HOST", raising=False)
    know(live, "ann", email="ann@example.com")
    with declaring(live.app):
        @action(approve=Approval("ann", via=["slack:#finance", "email"]))
        def refund(amount: int) -> None:
            pass

    live.migrate()
    problems = "select problem from anton.findings() where kind = 'action'"
    said = {"slack": "it asks in slack:#finance, and no handler of Notices() posts there",
            "email": "it asks by e-mail, and no handler of Notices() sends those"}
    assert {row[0] for row in sql(live, problems)} == set(said.values())
    with declaring(live.app):
        @Notices().on_new_records(where=where)
        def tell(notices: Any) -> None:
            pass

    live.migrate()
    assert {row[0] for row in sql(live, problems)} == {said[one] for one in silent}


@pytest.mark.parametrize("via", ["mail", "emial", "slack", "slack:", "slak:#finance", "slack:#fi nance"])
def test_a_channel_that_is_none_is_refused_where_it_is_declared(via):
    with pytest.raises(BadOption, match="or a channel of Slack"):
        Approval("@finance", via=["inbox", via])


def test_the_mail_of_a_notice_has_a_link_that_decides_it(told):
    notice = next(one for one in told.notices if one.via == "email")
    mail: Message = told.db.run(compose(told.db, told.app, Notice.model_validate(notice.model_dump())))
    assert (mail.to, mail.subject) == ("ann@example.com", "To decide: refund: amount 5")
    path = re.search(r"(/inbox/link/\S+)", mail.text)[1]
    person = Person(told, "ann")
    person.post(path, {**form_of(person.get(path).text), "decision": "approve"})
    told.run()
    assert told.sent == [5]
    assert path.rpartition("/")[2] not in str(sql(told, "select n::text from anton.notice n"))


def test_a_mail_goes_to_its_persons_own_address_and_says_what_is_asked_whatever_a_notice_says(told):
    notice = next(one for one in told.notices if one.via == "email").model_dump()
    forged = Notice.model_validate({**notice, "to": "eve@evil.example", "subject": "nothing much"})
    mail: Message = told.db.run(compose(told.db, told.app, forged))
    assert (mail.to, mail.subject) == ("ann@example.com", "To decide: refund: amount 5")
    assert "nothing much" not in mail.text
    with pytest.raises(DecisionRefused, match="eve has no e-mail address"):
        told.db.run(compose(told.db, told.app, Notice.model_validate({**notice, "person": "eve"})))


def test_a_button_decides_as_the_person_who_pressed_it(told):
    answer = press(told, "U1", "approve", value_of(told))
    assert (answer.status_code, answer.json()) == (200, {"text": "approved by ann"})
    told.run()
    assert told.sent == [5]
    (row,) = sql(told, "select decided_by, decided_via from anton.approval")
    assert tuple(row) == ("ann", "slack")


@pytest.mark.parametrize(("user", "why"), [("U2", "not among those who may"), ("U9", "nobody that is known")])
def test_who_is_not_known_or_may_not_decides_nothing(told, user, why):
    answer = press(told, user, "approve", value_of(told))
    assert answer.status_code == 403 and why in answer.json()["text"] and len(told.approvals) == 1


def test_a_request_that_is_forged_old_or_about_other_arguments_decides_nothing(told):
    value = value_of(told)
    assert press(told, "U1", "approve", value, secret="another").status_code == 401
    assert press(told, "U1", "approve", value, ago=600).status_code == 401
    assert press(told, "U1", "approve", {**value, "sha256": "0" * 64}).status_code == 403
    assert press(told, "U1", "open", value).status_code == 200
    assert told.post("/inbox/slack", content="payload={}").status_code == 401
    assert len(told.approvals) == 1


def test_the_same_request_counts_once(told):
    value = value_of(told)
    app = told
    for what in ("open", "reject"):
        first = press(app, "U1", what, value)
        assert first.status_code == 200
        again = app.post("/inbox/slack", content=first.request.content, headers=dict(first.request.headers))
        assert again.status_code == 409


def test_a_request_whose_transaction_failed_counts_when_it_comes_again(told):
    sql(told, "alter table anton.approval_event add constraint full_disk check (kind <> 'approved')")
    request: dict[str, Any] = {}
    with pytest.raises(asyncpg.CheckViolationError):
        press(told, "U1", "approve", value_of(told), keep=request)
    sql(told, "alter table anton.approval_event drop constraint full_disk")
    answers = [told.post("/inbox/slack", **request) for _ in range(2)]
    assert answers[0].json() == {"text": "approved by ann"} and answers[1].status_code == 409


@pytest.mark.parametrize(("variable", "mine", "theirs"), [
    ("SLACK_TEAM_ID", "T0, T1", "T2"), ("SLACK_APP_ID", "A1", "A2")])
def test_a_request_of_another_workspace_or_app_decides_nothing(told, monkeypatch, variable, mine, theirs):
    monkeypatch.setenv(variable, theirs)
    answer = press(told, "U1", "approve", value_of(told))
    assert answer.status_code == 403 and variable in answer.json()["text"] and len(told.approvals) == 1
    monkeypatch.setenv(variable, mine)
    assert press(told, "U1", "approve", value_of(told)).status_code == 200


def test_a_reminder_is_a_length_of_time():
    with pytest.raises(BadOption, match="remind"):
        Approval("ann", remind=["soon"])
    with pytest.raises(BadOption, match="remind"):
        Approval("ann", remind="2h")


def test_in_slack_no_value_is_a_link_or_a_mention():
    shown = message({"id": 7, "preview": "<!channel> & <https://evil.example|pay>", "state": "pending",
                     "args_sha256": "0", "args": {"note": "<@U1>"}}, "asked", "#finance", "https://shop.example.com")
    text = json.dumps(shown)
    assert "<!channel>" not in text and "<@U1>" not in text and "<https://evil" not in text
    *values, none = [one.get("value") for one in shown["blocks"][-1]["elements"]]
    assert [json.loads(one) for one in values] == [{"approval": 7, "sha256": "0"}] * 3 and none is None


def shown(**args: Any) -> dict[str, Any]:
    return message({"id": 7, "preview": "pay", "state": "pending", "args_sha256": "0", "args": args}, "asked",
                   "#finance", "https://shop.example.com")


@pytest.mark.parametrize("text", ["```*x*", "a```\n*amount*\n```5```b", "`", "``````", "<@U1> & `x`", ""])
def test_in_slack_an_argument_stays_inside_its_fence(text):
    section = shown(note=text, amount=5)["blocks"][1]["text"]
    before, _, rest = section["text"].partition("```")
    inside, _, after = rest.rpartition("```\n*amount*")
    assert (before, after) == ("*note*\n", "\n```5```") and section["verbatim"]
    assert "```" not in inside and not inside.startswith("`") and not inside.endswith("`")
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"), ("\u200b", "")):
        inside = inside.replace(entity, sign)
    assert inside == (text or " ")


def test_arguments_that_slack_cannot_show_as_a_whole_have_a_link_and_no_button_that_decides():
    fits, long = shown(note="x" * 2800), shown(note="x" * 2800 + "<" * 30)
    assert [one["action_id"] for one in fits["blocks"][-1]["elements"]] == [
        "anton_approve", "anton_edit", "anton_reject", "anton_open"]
    assert [(one["action_id"], one["url"]) for one in long["blocks"][-1]["elements"]] == [
        ("anton_open", "https://shop.example.com/inbox/7")]
    assert "too long for Slack" in json.dumps(long) and "xx" not in json.dumps(long)


def test_an_ended_approval_has_no_button(desk):
    id = asked(desk)
    desk.approvals[0].reject(by="ann")
    (row,) = sql(desk, "select anton.show_approval($1)", id)
    assert [one["type"] for one in message(row[0], "decided", "#finance", "")["blocks"]] == ["section", "section"]


# The dialog


class Slack:
    """Slack's views.open: refuses a view that its own library finds wrong, and a trigger that is not one of its own."""

    def __init__(self) -> None:
        self.views: list[dict[str, Any]] = []

    async def open(self, request: Request) -> Response:
        body = await request.json()
        if request.headers.get("authorization") != "Bearer xoxb-1":
            return JSONResponse({"ok": False, "error": "invalid_auth"})
        if set(body) != {"trigger_id", "view"} or body["trigger_id"] != "1.2.3":
            return JSONResponse({"ok": False, "error": "invalid_trigger_id"})
        view = View(**body["view"]).to_dict()                          # raises for lengths, and for what it has not
        inputs = [block for block in view["blocks"] if block["type"] == "input"]
        if view != body["view"] or not view["title"] or inputs and not view["submit"] or len(view["blocks"]) > 100:
            return JSONResponse({"ok": False, "error": "invalid_arguments"})
        self.views.append(view)
        return JSONResponse({"ok": True, "view": {"id": "V1", **view}})

    def sent(self, **changed: str | None) -> dict[str, Any]:
        """What Slack sends when the person has changed these inputs and submits the newest view."""
        view, values = self.views[-1], {}
        for block in (block for block in view["blocks"] if block["type"] == "input"):
            element, name = block["element"], block["block_id"].removeprefix("arg.")
            if element["type"] == "static_select":
                chosen = next((one for one in element["options"] if one["value"] == f"={changed.get(name)}"), None)
                state = {"selected_option": chosen or element.get("initial_option")}
            else:
                state = {"value": changed.get(name, element.get("initial_value"))}
            values[block["block_id"]] = {"value": {"type": element["type"], **state}}
        return {"type": "view_submission", "view": {**view, "id": "V1", "state": {"values": values}}}


@pytest.fixture
def slack(live: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An app whose refunds are asked for in Slack, and Slack."""
    monkeypatch.setenv("SLACK_SIGNING_SECRET", SECRET)
    made, live.sent = Slack(), []
    with served(Route("/api/views.open", made.open, methods=["POST"])) as url, declaring(live.app):
        Notices().on_new_records(SlackAskApproval(oauth_token="xoxb-1", api=f"{url}/api"), where="via = 'none'")

        @action(approve=Approval("@finance", editable=["amount", "how", "note", "parts"]))
        def refund(order: int, amount: int, how: Literal["card", "voucher"], note: str | None,
                   parts: list[int]) -> None:
            live.sent.append((order, amount, how, note, parts))

        live.migrate()
        know(live, "ann", "finance", slack="U1")
        know(live, "eve", "sales", slack="U2")
        refund.send(7, 5, "card", "two\nlines & <b>", [1, 2])
        live.run()
        yield made


def test_edit_opens_a_dialog_made_of_the_actions_model_whose_arguments_are_approved(live, slack):
    assert press(live, "U1", "edit", value_of(live)).status_code == 200
    (view,) = slack.views
    assert [block.get("block_id") or block["text"]["text"] for block in view["blocks"]] == [
        "*order*\n```7```", "arg.amount", "arg.how", "arg.note", "*parts*\n```[1, 2]```"]
    assert view["blocks"][3]["element"]["initial_value"] == "two\nlines & <b>"
    answer = interact(live, "U1", slack.sent(amount="much"))
    assert list(answer.json()["errors"]) == ["arg.amount"] and len(live.approvals) == 1
    answer = interact(live, "U1", slack.sent(amount="3", how="voucher"))
    assert (answer.status_code, answer.json()) == (200, {"response_action": "clear"})
    live.run()
    assert live.sent == [(7, 3, "voucher", "two\nlines & <b>", [1, 2])]
    (row,) = sql(live, "select before ->> 'amount', after ->> 'amount', decided_by, decided_via from anton.approval")
    assert tuple(row) == ("5", "3", "ann", "slack")
    late = interact(live, "U1", slack.sent(amount="4")).json()
    assert late == {"response_action": "errors", "errors": {
        "arg.amount": "it was decided before: approved by ann"}} and not live.dead


def test_a_dialog_is_opened_for_who_may_decide_and_decides_as_they_alone(live, slack):
    assert press(live, "U2", "edit", value_of(live)).status_code == 403
    assert press(live, "U1", "edit", {**value_of(live), "sha256": "0" * 64}).status_code == 403
    assert slack.views == []
    press(live, "U1", "edit", value_of(live))
    assert "not among those who may" in str(interact(live, "U2", slack.sent(amount="3")).json())
    assert len(live.approvals) == 1 and live.sent == []


def test_our_request_for_a_dialog_is_that_of_slacks_own_library(live, slack):
    press(live, "U1", "edit", value_of(live))
    (component,) = (one for one in components_of(live.app).values() if isinstance(one, SlackAskApproval))
    WebClient(token="xoxb-1", base_url=f"{component.api}/").views_open(trigger_id="1.2.3", view=slack.views[0])
    assert slack.views[0] == slack.views[1]
