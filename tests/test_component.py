"""Component: credentials, and the built-in ones against peers over real sockets that reject wrong requests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.rss.poll import Rss
from anton_components.vendor.slack.action import SlackPostMessage, SlackReact, SlackUpdateMessage
from anton_components.vendor.slack.approval import SlackAskApproval
from desk import sql
from peers import served
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from working import met

from anton import Approval, Table, action, cron, env, poll, post
from anton.action import set_effects
from anton.app import App, declaring
from anton.component import CALLS, Clients, Component, check_credentials, components_of, echo, fill
from anton.errors import ConfigError, Discard, UnknownOption
from anton.installed import installed
from anton.notices import Notices
from anton.option import options
from anton.outbox import ActionComponent
from anton.secret import Env

pytestmark = pytest.mark.once("wires: the server is asked for the same")


class Peer:
    """A service on a port of this machine. answers: what it gives next instead of success, (status, body)."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.lose = False                                              # answers
        self.answers: list[tuple[int, Any]] = []
        self.plain = 0                                                 # so many at once are told: no temperature
        self.url = ""

    async def completions(self, request: Request) -> Response:
        """OpenAI's POST /v1/chat/completions."""
        body = json.loads(await request.body())
        self.got.append(body)
        if request.headers.get("authorization") != "Bearer sk-good":
            return JSONResponse({"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}, 401)
        if not isinstance(body.get("model"), str) or not body.get("messages") or "role" not in body["messages"][0]:
            return JSONResponse({"error": {"message": "wrong request"}}, 400)
        if self.plain and "temperature" in body:
            await met(lambda: len(self.got) >= self.plain)
            return JSONResponse({"error": {"message": "Unsupported value", "param": "temperature"}}, 400)
        if self.answers:
            status, answer = self.answers.pop(0)
            return JSONResponse(answer, status)
        return JSONResponse({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"] + "-2026",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Soup!"}}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}})

    async def post_message(self, request: Request) -> Response:
        """Slack's POST /api/chat.postMessage: refuses with 200 and ok false, and knows a message it has seen."""
        body = json.loads(await request.body())
        if request.headers.get("authorization") != "Bearer xoxb-good":
            return JSONResponse({"ok": False, "error": "invalid_auth"})
        if not request.headers["content-type"].startswith("application/json") or not body.get("text"):
            return JSONResponse({"ok": False, "error": "no_text"})
        if self.answers:
            status, answer = self.answers.pop(0)
            return JSONResponse(answer, status)
        if body["client_msg_id"] not in [seen.get("client_msg_id") for seen in self.got]:
            self.got.append(body)
        if self.lose:
            return JSONResponse({}, 503)
        channel = "C0" + body["channel"].strip("#").upper()
        return JSONResponse({"ok": True, "channel": channel, "ts": "1503435956.000247"})


    async def other(self, request: Request) -> JSONResponse:
        """chat.update and reactions.add, which refuse what Slack refuses."""
        body = await request.json()
        needs = {"chat.update": {"channel", "ts", "text"}, "reactions.add": {"channel", "timestamp", "name"}}
        method = request.url.path.rpartition("/")[2]
        if request.headers.get("authorization") != "Bearer xoxb-good":
            return JSONResponse({"ok": False, "error": "invalid_auth"})
        if set(body) != needs[method]:
            return JSONResponse({"ok": False, "error": "invalid_arguments"})
        if method == "reactions.add" and body in self.got:
            return JSONResponse({"ok": False, "error": "already_reacted"})
        self.got.append(body)
        if self.lose:
            return JSONResponse({}, 503)
        return JSONResponse({"ok": True, "channel": body["channel"], "ts": body.get("ts", "")})


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with served(Route("/v1/chat/completions", peer.completions, methods=["POST"]),
                Route("/api/chat.update", peer.other, methods=["POST"]),
                Route("/api/reactions.add", peer.other, methods=["POST"]),
                Route("/api/chat.postMessage", peer.post_message, methods=["POST"])) as peer.url:
        yield peer


def declare(app: Any, *components: Any, model: Any = None) -> None:
    """asked -> the first component -> answers -> the second."""
    with declaring(app.app):
        tables = [Table("asked"), Table("answers", model) if model else Table("answers"), Table("posts")]
        for table, following, make in zip(tables, tables[1:], components, strict=False):
            table.on_new_records(make(following))
    app.migrate()


def ask(app: Any, **record: Any) -> None:
    app.tables["asked"].append(record)
    app.run()


# OpenAI


def test_a_completion_is_asked_for_and_written(live, peer):
    declare(live, lambda to: OpenAiCompletion(to, api_key="sk-good", model="m", temperature=0.8,
                                              base_url=f"{peer.url}/v1"))
    ask(live, prompt="what's for lunch?")
    assert peer.got == [
        {"model": "m", "temperature": 0.8, "messages": [{"role": "user", "content": "what's for lunch?"}]}]
    (answer,) = live.records("answers")
    assert {name: answer[name] for name in ("prompt", "completion", "model", "usage", "cost")} == {
        "prompt": "what's for lunch?", "completion": "Soup!", "model": "m-2026", "usage": {"input": 11, "output": 2},
        "cost": None}


def test_a_model_that_knows_no_temperature_is_asked_without_and_it_is_said_once(live, peer, caplog):
    declare(live, lambda to: OpenAiCompletion(to, api_key="sk-good", temperature=0.8, base_url=f"{peer.url}/v1"))
    peer.answers = [(400, {"error": {"message": "Unsupported value", "param": "temperature"}})]
    ask(live, prompt="hi")
    assert ["temperature" in body for body in peer.got] == [True, False] and len(live.records("answers")) == 1
    ask(live, prompt="ho")
    assert caplog.text.count("temperature=0.8 is left out") == 1


def test_requests_that_are_under_way_when_a_model_is_found_to_know_no_temperature_are_asked_again(live, peer):
    declare(live, lambda to: OpenAiCompletion(to, api_key="sk-good", temperature=0.8, base_url=f"{peer.url}/v1"))
    peer.plain = 3
    live.tables["asked"].extend([{"prompt": f"q{n}"} for n in range(3)])
    live.run()
    assert len(live.records("answers")) == 3 and not live.dead


@pytest.mark.parametrize("status", [401, 429, 500])
def test_when_openai_is_unwell_no_record_is_blamed_and_it_resumes(status, live, peer):
    key = "sk-good" if status != 401 else "sk-bad"
    declare(live, lambda to: OpenAiCompletion(to, api_key=env("A_KEY"), base_url=f"{peer.url}/v1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_KEY", key)
        peer.answers = [(status, {"error": {"message": "not now"}})] * 4 if status != 401 else []
        ask(live, prompt="hi")
        assert live.records("answers") == [] and not live.dead
        peer.answers.clear()
        patch.setenv("A_KEY", "sk-good")
        live.advance("2m")
    assert len(live.records("answers")) == 1 and not live.dead


def test_a_prompt_that_openai_refuses_is_a_dead_letter_of_its_own(live, peer):
    declare(live, lambda to: OpenAiCompletion(to, api_key="sk-good", base_url=f"{peer.url}/v1"))
    peer.answers = [(400, {"error": {"message": "content policy"}})] * 9
    ask(live, prompt="bad")
    for _ in range(6):
        live.advance("1h")
    peer.answers.clear()
    ask(live, prompt="good")
    assert [dead.reason for dead in live.dead] == ["failed"] and "content policy" in live.dead[0].error
    assert [answer["prompt"] for answer in live.records("answers")] == ["good"]


def test_without_a_key_an_echo_answers_and_nobody_is_asked(app, peer, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    set_effects("capture")
    declare(app, lambda to: OpenAiCompletion(to, api_key="xxxx", base_url=f"{peer.url}/v1"))
    ask(app, prompt="Reply: hi")
    (answer,) = app.records("answers")
    assert (answer["completion"], answer["model"], answer["cost"]) == ("Friendly echo: hi", "echo", 0.0)
    assert not peer.got


def test_where_nothing_may_leave_a_key_changes_nothing(app, peer):
    declare(app, lambda to: OpenAiCompletion(to, api_key="sk-good", base_url=f"{peer.url}/v1"))
    ask(app, prompt="hi")
    assert app.records("answers")[0]["model"] == "echo" and not peer.got


class Answer(BaseModel):
    id: int | None = None
    customer: str
    prompt: str
    completion: str
    model: str
    usage: dict[str, int] | None
    cost: float | None


def test_fields_are_renamed_and_those_of_the_output_are_carried_over(app):
    declare(app, lambda to: OpenAiCompletion(to, map={"prompt": "question"}), model=Answer)
    ask(app, question="hi", customer="ann", other=1)
    (answer,) = app.records("answers")
    assert (answer.customer, answer.prompt, answer.completion) == ("ann", "hi", "Friendly echo: hi")
    ask(app, body="no question")
    assert 'OpenAiCompletion reads "question"' in app.dead[0].error


# Slack


EVENT = {"payload": {"event": {"channel": "#lunch", "ts": "1.5"}}}


def test_a_message_goes_where_its_trace_began(live, peer):
    declare(live, lambda to: OpenAiCompletion(to, api_key="sk-good", base_url=f"{peer.url}/v1", map={"prompt": "text"}),
            lambda to: SlackPostMessage(oauth_token="xoxb-good", message_template="{completion}", into=to,
                                        api=f"{peer.url}/api"))
    ask(live, text="hi", **EVENT)
    sent = peer.got[-1]
    assert (sent["channel"], sent["thread_ts"], sent["text"]) == ("#lunch", "1.5", "Soup!")
    (answer,), (post,) = live.records("answers"), live.records("posts")
    assert (post["channel"], post["ts"], post["record_id"]) == ("C0LUNCH", "1503435956.000247", answer.id)
    assert [(call.name, call.state, call.result["ts"]) for call in live.outbox] == [
        ("SlackPostMessage", "sent", "1503435956.000247")]


def test_a_message_without_a_beginning_in_slack_goes_to_the_channel(app):
    declare(app, lambda to: SlackPostMessage(message_template="{text}", channel="#general"))
    ask(app, text="hi")
    assert [(call.channel, call.text) for call in app.outbox] == [("#general", "hi")]


def test_no_channel_names_the_line_to_mend(app):
    declare(app, lambda to: SlackPostMessage(message_template="{text}"))
    ask(app, text="hi")
    (dead,) = app.dead
    assert dead.error.startswith("no channel (set channel=, tests/test_component.py:") and dead.reason == "discarded"
    assert app.outbox == []


def slack(live: Any, peer: Peer) -> None:
    declare(live, lambda to: SlackPostMessage(oauth_token="xoxb-good", message_template="{text}", channel="#c",
                                              api=f"{peer.url}/api"))


@pytest.mark.parametrize("answer", [(429, {}), (500, {}), (200, {"ok": False, "error": "ratelimited"}),
                                    (200, {"ok": False, "error": "token_revoked"})])
def test_when_slack_is_unwell_no_record_is_blamed_and_it_resumes(answer, live, peer):
    slack(live, peer)
    peer.answers = [answer]
    ask(live, text="hi")
    assert not peer.got and not live.dead
    live.advance("2m")
    assert len(peer.got) == 1 and not live.dead


def test_a_message_that_slack_refuses_is_a_dead_letter_at_once(live, peer):
    slack(live, peer)
    peer.answers = [(200, {"ok": False, "error": "channel_not_found"})]
    ask(live, text="hi")
    assert [dead.error for dead in live.dead] == ["Slack refused the message to #c: channel_not_found"]


def test_a_message_that_arrived_and_whose_answer_was_lost_is_not_posted_twice(live, peer):
    slack(live, peer)
    peer.lose = True
    ask(live, text="hi")
    assert len(peer.got) == 1 and live.outbox == []
    peer.lose = False
    live.advance("2m")
    assert len(peer.got) == 1 and [call.state for call in live.outbox] == ["sent"]


def test_a_message_is_changed(live, peer):
    declare(live, lambda to: SlackUpdateMessage(oauth_token="xoxb-good", message_template="now {text}",
                                                api=f"{peer.url}/api"))
    ask(live, text="soup", channel="C1", ts="15.1")
    assert peer.got == [{"channel": "C1", "ts": "15.1", "text": "now soup"}]
    assert [call.state for call in live.outbox] == ["sent"]


def test_a_reaction_that_is_there_already_is_fine(live, peer):
    declare(live, lambda to: SlackReact("eyes", oauth_token="xoxb-good", api=f"{peer.url}/api"))
    peer.lose = True
    ask(live, **EVENT)
    peer.lose = False
    live.advance("2m")
    assert peer.got == [{"channel": "#lunch", "timestamp": "1.5", "name": "eyes"}]
    assert [call.state for call in live.outbox] == ["sent"]
    ask(live, text="from nowhere")
    assert [dead.error.partition(":")[0] for dead in live.dead] == ["no message to react to"]


def ask_for_a_refund(live, peer):
    with declaring(live.app):
        @action(approve=Approval("ann", via=["slack:#c"]))
        def refund(amount: int) -> None: ...

        Notices().on_new_records(SlackAskApproval(oauth_token="xoxb-good", api=f"{peer.url}/api"))
    live.migrate()
    refund.send(5)
    live.run()


def test_an_approval_is_asked_with_buttons(live, peer):
    ask_for_a_refund(live, peer)
    (message,) = peer.got
    assert (message["channel"], message["text"]) == ("#c", "refund: amount 5")
    pressed = message["blocks"][-1]["elements"]
    assert [one["action_id"] for one in pressed] == [
        "anton_approve", "anton_edit", "anton_reject", "anton_open"]
    assert json.loads(pressed[0]["value"])["approval"] == live.approvals[0].id
    live.approvals[0].reject(by="ann")
    live.run()
    assert [block["type"] for block in peer.got[1]["blocks"]] == ["section"] * 2 and not live.dead


@pytest.mark.parametrize("more, state", [
    ({"blocks": [{"type": "divider"}]}, "refused"), ({"channel": "#all"}, "failed"), ({}, "sent")])
def test_no_call_by_psql_asks_with_a_text_of_its_own_or_elsewhere(more, state, live, peer):
    ask_for_a_refund(live, peer)
    args = {"channel": "#c", "text": "all is well", "approval": live.approvals[0].id, "kind": "asked", **more}
    sql(live, "insert into anton.action (app, name, args) values ($1, 'SlackAskApproval', $2)", live.app.name, args)
    live.run()
    assert [call.state for call in live.calls if call.name == "SlackAskApproval"] == ["sent", state]
    assert {one["text"] for one in peer.got} == {"refund: amount 5"}


# All of them


async def test_many_calls_at_a_time_share_several_clients_which_are_closed_when_the_key_changes():
    closed = []

    class Client:
        def __init__(self, key: str) -> None:
            self.key = key

        async def aclose(self) -> None:
            closed.append(self.key)

    clients = Clients(Client)
    async with AsyncExitStack() as stack:
        lent = [await stack.enter_async_context(clients.lend("old")) for _ in range(2 * CALLS + 1)]
        assert list(Counter(map(id, lent)).values()) == [CALLS, CALLS, 1]
    assert await clients.get("old") is lent[0]
    async with clients.lend("old") as again:
        assert again is lent[0]
    assert (await clients.get("new")).key == "new" and closed == ["old"] * 3


def test_a_secret_is_never_shown(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "xoxb-secret")
    with declaring(App("shown")):
        table = Table("t")
    for component in (OpenAiCompletion(table, api_key="sk-secret"), SlackPostMessage(oauth_token=env("A_TOKEN"))):
        assert "secret" not in repr(component).replace("secret=", "")
        assert component.credential() in ("sk-secret", "xoxb-secret")
    assert 'secret=env("A_TOKEN")' in repr(component)


@pytest.mark.parametrize("given, usual, found", [
    ("sk-given", "sk-usual", "sk-given"), ("xxxx", "sk-usual", "sk-usual"), (None, "sk-usual", "sk-usual"),
    (env("UNSET_KEY"), "sk-usual", "sk-usual"), ("xxxx", "xxxx", None), (None, None, None), ("", "", None)])
def test_what_is_given_goes_before_the_usual_variable_and_a_placeholder_is_neither(given, usual, found, monkeypatch):
    monkeypatch.delenv("UNSET_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if usual is not None:
        monkeypatch.setenv("OPENAI_API_KEY", usual)
    with declaring(App("keys")):
        component = OpenAiCompletion(Table("t"), api_key=given)
    assert component.credential() == found
    assert (component.unset() is None) is (found is not None)


def test_a_live_process_refuses_to_start_without_credentials(monkeypatch, app):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("SLACK_TOKEN", raising=False)
    declare(app, OpenAiCompletion, lambda to: SlackPostMessage(oauth_token=env("MY_TOKEN"), channel="#c"))
    assert set(components_of(app.app)) == {"OpenAiCompletion", "SlackPostMessage"}
    check_credentials(app.app)
    set_effects("live")
    with pytest.raises(ConfigError, match=r"OpenAiCompletion \(tests/test_component.py:\d+\) needs OPENAI_API_KEY, "
                                          r"from https://platform.openai.com/api-keys; "
                                          r"SlackPostMessage .* needs MY_TOKEN, from https://api.slack.com/apps"
                                          r".*anton dev"):
        check_credentials(app.app)
    monkeypatch.setenv("OPENAI_API_KEY", "sk")
    monkeypatch.setenv("MY_TOKEN", "xoxb")
    check_credentials(app.app)


class Inbox(Component):
    """Polled, with a key."""

    variable, issued, key, name = "ACME_API_KEY", "https://acme.example/keys", None, "acme inbox"

    def __init__(self, into: Table[Any], *, api_key: Env | str | None = None) -> None:
        super().__init__(secret=api_key)
        self.into = into

    async def poll(self, cursor: Any) -> Any:
        return [], cursor


def test_a_live_process_refuses_to_start_without_the_credential_of_what_is_polled(monkeypatch, live):
    monkeypatch.delenv("ACME_API_KEY", raising=False)
    with declaring(live.app):
        poll(Inbox(Table("mails")), every="1m")
    with pytest.raises(ConfigError, match=r"acme inbox \(tests/test_component.py:\d+\) needs ACME_API_KEY, "
                                          r"from https://acme.example/keys"):
        check_credentials(live.app)
    monkeypatch.setenv("ACME_API_KEY", "key-1")
    check_credentials(live.app)


@pytest.mark.parametrize("prompt, said", [
    ("Respond with a friendly reply: <@U0LAN0Z89> what's for lunch?", "what's for lunch?"),
    ("hello from SQL", "hello from SQL"), ("Rules: be kind.\n\nReply: @anton note: bring milk", "note: bring milk"),
    ("", ""), ("ends with a colon:", "ends with a colon:")])
def test_the_echo_repeats_the_last_part(prompt, said):
    assert echo(None, prompt) == f"Friendly echo: {said}"  # type: ignore[arg-type]


def test_a_template_takes_names_and_nothing_else():
    assert fill("{a} and {b}, {0} {a.b} {{c}", {"a": 1, "b": "{a}", "c": 3}) == "1 and {a}, {0} {a.b} {3"
    with pytest.raises(Discard, match='{compltion} in "{compltion}".*Did you mean "completion"'):
        fill("{compltion}", {"completion": "x"})


def test_approve_of_what_acts_not_is_refused_with_where_it_goes(live):
    with declaring(live.app):
        prompts, ann = Table("prompts"), Approval("ann")
        for declare in (
            lambda: OpenAiCompletion(prompts, approve=ann), lambda: Rss("https://a.example", prompts, approve=ann),
            lambda: prompts.on_new_records(approve=ann)(print), lambda: cron.daily(approve=ann),
            lambda: post("/x", approve=ann),
        ):
            with pytest.raises(UnknownOption, match="say approve= of the @action"):
                declare()


def test_each_component_whose_calls_leave_takes_approve():
    acting = [one.cls for one in installed() if one.cls and issubclass(one.cls, ActionComponent)]
    assert len(acting) > 10
    assert [cls.__name__ for cls in acting if "approve" not in options(cls)] == ["SlackAskApproval"]  # it asks for one
