"""Slack's actions on the wire, beside the requests that slack_sdk makes for the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

import pytest
from anton_components.vendor.slack.action import SlackPostMessage, SlackReact, SlackReply, SlackUpdateMessage
from desk import know, sql
from peers import served
from slack_sdk import WebClient
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from working import morning

from anton import Approval, Table
from anton.app import declaring
from anton.errors import InvalidRecord

pytestmark = pytest.mark.once("wires of components: the server is asked for the same")

TOKEN = "xoxb-never-to-be-seen"
NEEDED = {"chat.postMessage": {"channel", "text"}, "chat.update": {"channel", "ts", "text"},
          "reactions.add": {"channel", "timestamp", "name"}}


class Peer:
    """Slack: refuses who has no token and what lacks an argument, in JSON or as a form."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, Any]]] = []
        self.url = ""

    async def take(self, request: Request) -> Response:
        method, raw = request.url.path.removeprefix("/api/"), await request.body()
        kind = request.headers.get("content-type", "")
        body = json.loads(raw) if kind.startswith("application/json") else dict(parse_qsl(raw.decode()))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"ok": False, "error": "invalid_auth"})
        if method not in NEEDED or not NEEDED[method] <= set(body):
            return JSONResponse({"ok": False, "error": "invalid_arguments"})
        self.got.append((method, body))
        return JSONResponse({"ok": True, "channel": body["channel"], "ts": "7.5"})


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    with served(Route("/api/{method}", made.take, methods=["POST"])) as url:
        made.url = f"{url}/api"
        yield made


EVENT = {"payload": {"event": {"channel": "C1", "ts": "1.5"}}}
CALLS = {
    "post": (lambda **given: SlackPostMessage(channel="C1", **given),
             lambda sdk: sdk.chat_postMessage(channel="C1", text="hi", thread_ts="1.5")),
    "reply": (lambda **given: SlackReply(broadcast=True, **given),
              lambda sdk: sdk.chat_postMessage(channel="C2", text="hi", thread_ts="3.5", reply_broadcast=True)),
    "update": (SlackUpdateMessage, lambda sdk: sdk.chat_update(channel="C2", ts="3.5", text="hi")),
    "react": (lambda **given: SlackReact("eyes", **given),
              lambda sdk: sdk.reactions_add(channel="C1", timestamp="1.5", name="eyes")),
}


def say_hi(live, component):
    with declaring(live.app):
        texts = Table("texts")
        texts.on_new_records(component)
    live.migrate()
    texts.append({"text": "hi", "channel": "C2", "ts": "3.5", **EVENT})
    live.run()


@pytest.mark.parametrize("what", CALLS)
def test_it_asks_for_what_slacks_own_library_asks_for(what, live, peer):
    make, theirs = CALLS[what]
    say_hi(live, make(oauth_token=TOKEN, api=peer.url))
    theirs(WebClient(token=TOKEN, base_url=f"{peer.url}/"))
    (method, ours), (wanted, body) = peer.got
    assert (ours.pop("client_msg_id", None) is not None) is (method == "chat.postMessage")
    assert (method, ours) == (wanted, body)
    assert [call.state for call in live.calls] == ["sent"]


def test_what_a_reply_gave_names_it_for_the_next(live, peer):
    with declaring(live.app):
        texts, posts = Table("texts"), Table("posts")
        texts.on_new_records(SlackReply(oauth_token=TOKEN, api=peer.url, into=posts, map={"ts": "posted"}))
    live.migrate()
    texts.append({"text": "hi", "channel": "C2", "posted": "3.5"})
    live.run()
    (row,) = live.records("posts")
    assert (row["channel"], row["thread_ts"], row["ts"], row["text"]) == ("C2", "3.5", "7.5", "hi")


def by_psql(app: Any, name: str, /, **args: Any) -> None:
    sql(app, "insert into anton.action (app, name, args) values ($1, $2, $3)", app.app.name, name, args)


@pytest.mark.parametrize("what", CALLS)
def test_only_channels_that_are_allowed_get_anything_and_no_more_than_the_cap(what, live, peer):
    morning(live)
    make, _ = CALLS[what]
    with declaring(live.app):
        texts = Table("texts")
        texts.on_new_records(make(oauth_token=TOKEN, api=peer.url, allow=["C1", "C2"], cap="1/day"))
    live.migrate()
    texts.append({"text": "hi", "channel": "C2", "ts": "3.5", **EVENT})
    live.run()
    (call,) = live.calls
    by_psql(live, call.name, **{**call.args, "channel": "C3"})
    by_psql(live, call.name, **call.args)
    live.run()
    assert [call.state for call in live.calls] == ["sent", "refused", "new"] and len(peer.got) == 1
    assert live.calls[1].error == "channel C3 is not among what is allowed: C1, C2"
    assert live.calls[2].error == "the cap of 1 calls a day is used up: 1 of it are, and this call needs 1"
    live.advance("25h")
    assert [method for method, _ in peer.got] == [peer.got[0][0]] * 2


@pytest.mark.parametrize("what", CALLS)
def test_a_call_by_psql_says_no_more_than_the_component_would(what, live, peer):
    say_hi(live, CALLS[what][0](oauth_token=TOKEN, api=peer.url))
    (call,) = live.calls
    by_psql(live, call.name, **call.args, blocks=[{"type": "divider"}])
    live.run()
    assert [call.state for call in live.calls] == ["sent", "refused"] and len(peer.got) == 1
    assert "blocks" in live.calls[1].error


def test_an_edit_of_a_message_is_checked_by_its_model(live, peer):
    with declaring(live.app):
        texts = Table("texts")
        texts.on_new_records(SlackPostMessage(oauth_token=TOKEN, api=peer.url, channel="C1", approve=Approval("ann")))
    live.migrate()
    know(live, "ann")
    texts.append({"text": "hi"})
    live.run()
    (asked,) = live.approvals
    with pytest.raises(InvalidRecord, match="channel"):
        asked.approve(by="ann", edit={"channel": "#two words"})
    with pytest.raises(InvalidRecord, match="username"):
        asked.approve(by="ann", edit={"username": "the boss"})
    asked.approve(by="ann", edit={"text": "ho"})
    live.run()
    assert [(method, body["text"]) for method, body in peer.got] == [("chat.postMessage", "ho")]
