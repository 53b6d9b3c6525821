"""Slack: posting messages, changing them, reacting to them.

    completions.on_new_records(SlackPostMessage(oauth_token=env("SLACK_TOKEN"), message_template="{completion}"))
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, StringConstraints, model_serializer

from anton import Approval, Ctx, Discard, Table
from anton.kit import ActionComponent, Call, Clients, Env, WorldError, fill, placeholders
from anton.meaning import SlackChannel

API = "https://slack.com/api"
_NAMESPACE = uuid.UUID("2b1f4f0e-6c2f-4a52-9d43-5f0f7b1c3c55")
# What says nothing about the message: Slack is busy, or the token is not what it was.
_UNWELL = {"ratelimited", "rate_limited", "internal_error", "fatal_error", "service_unavailable", "request_timeout",
           "invalid_auth", "not_authed", "account_inactive", "token_revoked", "token_expired", "missing_scope",
           "org_login_required", "ekm_access_denied", "team_access_not_granted"}


Word = Annotated[str, StringConstraints(pattern=r"^\S{1,200}$")]


class _Sent(BaseModel):
    """What is sent: what is None is left out."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}


class Message(_Sent):
    """A message. channel: an id, or "#name"."""

    channel: Word
    text: str
    thread_ts: Word | None = None


class Reply(Message):
    """A message in a thread."""

    thread_ts: Word
    reply_broadcast: bool | None = None


class Update(_Sent):
    """A message as it is to be."""

    channel: Word
    ts: Word
    text: str


class Reaction(_Sent):
    """A reaction to the message of a timestamp."""

    channel: Word
    timestamp: Word
    name: Word


class _Slack(ActionComponent):
    """What all calls of Slack have in common.

    oauth_token: a value or env(…); default SLACK_TOKEN. api: where Slack is. timeout: seconds for one answer. allow:
    channels, as calls name them: "C0123", "#ops-*". approve, cap, rate: as of actions.
    """

    service = "Slack"
    variable = "SLACK_TOKEN"
    issued = "https://api.slack.com/apps"
    effect = "idempotent"
    into: Table[Any] | None = None

    def __init__(self, oauth_token: Env | str | None, api: str, timeout: float, map: Mapping[str, str] | None,
                 connection: str | None, allow: Sequence[str] | None = None, approve: Approval | None = None,
                 cap: str | Sequence[str] = (), rate: str | None = None) -> None:
        super().__init__(secret=oauth_token, map=map, connection=connection)
        self.allow, self.approve, self.cap, self.rate = list(allow or ()), approve, cap, rate
        self.api = (self.address(None if api == API else api) or API).rstrip("/")
        self.timeout = timeout
        self._clients = Clients(lambda token: importlib.import_module("httpx").AsyncClient(
            timeout=timeout, headers={"Authorization": f"Bearer {token}"}))

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        return {**super().options(), "allow": {"channel": self.allow} if self.allow else None}

    async def call(self, method: str, body: Mapping[str, Any], fine: str = "") -> dict[str, Any]:
        """One request. fine: an error that says that it was done before. Raises WorldError, Discard."""
        client = await self._clients.get(self.credential() or "")
        given = {name: value for name, value in body.items() if value is not None}
        response = await client.post(f"{self.api}/{method}", json=given)
        response.raise_for_status()
        reply: dict[str, Any] = response.json()
        error = str(reply.get("error"))
        if reply.get("ok") or error == fine:
            return reply
        if error in _UNWELL:
            raise WorldError(f"Slack answered {error}")
        what = "message" if method == "chat.postMessage" else method
        where = f" to {body['channel']}" if "channel" in body else ""
        raise Discard(f"Slack refused the {what}{where}: {error}")


class SlackPostMessage(_Slack):
    """Posts a message for each record: where its trace began (the channel and thread of the event), else to `channel`.

    oauth_token: a value or env(…); default SLACK_TOKEN. message_template: {name} is the record's value. map: {"text":
    "body"} when it has another name. channel: an id or "#name", for records that did not begin in Slack. into: a
    Table that gets {"channel", "thread_ts", "ts", "text", "record_id"} for each message; ts is what reactions and
    replies refer to. A record whose message cannot be posted at all (no channel, unknown channel, too long) is a dead
    letter. allow: channels, as calls name them: "C0123", "#ops-*". approve, cap, rate: as of actions. api: where Slack
    is. timeout: seconds for one answer. Slack drops a second message with the same client_msg_id, so a call whose
    outcome is not known is made again with the same.
    """

    example = "slack_ai_bot"
    arguments: type[BaseModel] | None = Message

    def __init__(self, *, oauth_token: Env | str | None = None, message_template: str = "{text}",
                 channel: str | None = None, into: Table[Any] | None = None, api: str = API,
                 timeout: float = 30.0, allow: Sequence[str] | None = None, approve: Approval | None = None,
                 cap: str | Sequence[str] = (), rate: str | None = None, map: Mapping[str, str] | None = None,
                 connection: str | None = None) -> None:
        super().__init__(oauth_token, api, timeout, map, connection, allow, approve, cap, rate)
        self.message_template = message_template
        self.channel = channel
        self.into = into

    def inputs(self) -> Mapping[str, Any]:
        """What the template names; of any type, for it becomes text."""
        return dict.fromkeys(placeholders(self.message_template), Any)

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets."""
        return {"channel": SlackChannel, "thread_ts": str | None, "ts": str, "text": str, "record_id": Any}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The message for one record, and the record's id."""
        text = fill(self.message_template, record, self.map)
        channel, thread = self.channel, None
        began = await ctx.aorigin(record)
        if began.record is not None:
            channel, thread = _place(began.record) or (channel, thread)
        if not channel:
            raise Discard(f"no channel (set channel=, {self.place})")
        message: dict[str, Any] = {"channel": channel, "text": text}
        if thread is not None:
            message["thread_ts"] = thread
        return message

    def row(self, call: Call, result: Any) -> Any:
        """What `into` gets; a message that was captured has a ts of its own."""
        posted = {"ts": f"captured-{call.idempotency_key}"} if result is None else result
        key = call.subject[1] if call.subject else [None]
        return {"thread_ts": call.args.get("thread_ts"), "channel": call.args["channel"], "text": call.args["text"],
                **posted, "record_id": key[0] if len(key) == 1 else None}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One chat.postMessage."""
        reply = await self.call("chat.postMessage", {**args, "client_msg_id": str(uuid.uuid5(_NAMESPACE, key))})
        return {"ts": reply["ts"], "channel": reply["channel"]}


class SlackReply(_Slack):
    """Replies in the thread of a message, for each record: what SlackPostMessage's `into` holds names the message.

    oauth_token: a value or env(…); default SLACK_TOKEN. message_template: {name} is the record's value. The record has
    "channel" and "ts"; map: {"ts": "posted"} when they have other names. broadcast: whether the channel sees it, too.
    into: a Table that gets {"channel", "thread_ts", "ts", "text", "record_id"}. allow: channels, as calls name them:
    "C0123". approve, cap, rate: as of actions. api: where Slack is. timeout: seconds for one answer. A reply whose
    outcome is not known is made again with the same client_msg_id, which Slack drops.
    """

    example = "order_desk"
    arguments = Reply

    def __init__(self, *, oauth_token: Env | str | None = None, message_template: str = "{text}",
                 broadcast: bool = False, into: Table[Any] | None = None, api: str = API, timeout: float = 30.0,
                 allow: Sequence[str] | None = None, approve: Approval | None = None, cap: str | Sequence[str] = (),
                 rate: str | None = None, map: Mapping[str, str] | None = None,
                 connection: str | None = None) -> None:
        super().__init__(oauth_token, api, timeout, map, connection, allow, approve, cap, rate)
        self.message_template, self.broadcast, self.into = message_template, broadcast, into

    def inputs(self) -> Mapping[str, Any]:
        """What the template names, and the message."""
        return {**dict.fromkeys(placeholders(self.message_template), Any), "channel": str, "ts": str}

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets."""
        return {"channel": SlackChannel, "thread_ts": str, "ts": str, "text": str, "record_id": Any}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The reply for one record."""
        return {"channel": self.read(record, "channel"), "thread_ts": self.read(record, "ts"),
                "text": fill(self.message_template, record, self.map),
                **({"reply_broadcast": True} if self.broadcast else {})}

    row = SlackPostMessage.row
    send = SlackPostMessage.send


class SlackUpdateMessage(_Slack):
    """Changes a message that was posted, for each record: what SlackPostMessage's `into` holds names it.

    oauth_token: a value or env(…); default SLACK_TOKEN. message_template: {name} is the record's value. The record has
    "channel" and "ts"; map: {"ts": "posted"} when they have other names. allow: channels, as calls name them: "C0123".
    approve, cap, rate: as of actions. api: where Slack is. timeout: seconds for one answer.
    """

    example = "incident_room"
    arguments = Update

    def __init__(self, *, oauth_token: Env | str | None = None, message_template: str = "{text}", api: str = API,
                 timeout: float = 30.0, allow: Sequence[str] | None = None, approve: Approval | None = None,
                 cap: str | Sequence[str] = (), rate: str | None = None, map: Mapping[str, str] | None = None,
                 connection: str | None = None) -> None:
        super().__init__(oauth_token, api, timeout, map, connection, allow, approve, cap, rate)
        self.message_template = message_template

    def inputs(self) -> Mapping[str, Any]:
        """What the template names, and the message."""
        return {**dict.fromkeys(placeholders(self.message_template), Any), "channel": str, "ts": str}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The message as it is to be."""
        return {"channel": self.read(record, "channel"), "ts": self.read(record, "ts"),
                "text": fill(self.message_template, record, self.map)}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One chat.update: a second one changes nothing."""
        reply = await self.call("chat.update", args)
        return {"ts": reply["ts"], "channel": reply["channel"]}


class SlackReact(_Slack):
    """Adds a reaction to the message that a record's trace began with, such as 👀 before the answer is thought about.

    emoji: its name, "eyes". oauth_token: a value or env(…); default SLACK_TOKEN. A record that did not begin with a
    message in Slack is a dead letter. map: as of other components. allow: channels, as calls name them: "C0123".
    approve, cap, rate: as of actions. api: where Slack is. timeout: seconds for one answer.
    """

    example = "incident_room"
    arguments = Reaction

    def __init__(self, emoji: str = "eyes", *, oauth_token: Env | str | None = None, api: str = API,
                 timeout: float = 30.0, allow: Sequence[str] | None = None, approve: Approval | None = None,
                 cap: str | Sequence[str] = (), rate: str | None = None, map: Mapping[str, str] | None = None,
                 connection: str | None = None) -> None:
        super().__init__(oauth_token, api, timeout, map, connection, allow, approve, cap, rate)
        self.emoji = emoji.strip(":")

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The message and the emoji."""
        payload = _payload((await ctx.aorigin(record)).record)
        event = payload.get("event") if payload else None
        if not isinstance(event, Mapping) or not event.get("channel") or not event.get("ts"):
            raise Discard(f"no message to react to: its trace did not begin with one ({self.place})")
        return {"channel": event["channel"], "timestamp": event["ts"], "name": self.emoji}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One reactions.add; a reaction that is there already is fine."""
        await self.call("reactions.add", args, fine="already_reacted")
        return {"ok": True}


def _payload(record: Any) -> Mapping[str, Any] | None:
    """What Slack sent, of a record that holds it."""
    payload = record.get("payload") if isinstance(record, Mapping) else getattr(record, "payload", None)
    return payload if isinstance(payload, Mapping) else None


def _place(record: Any) -> tuple[str, str | None] | None:
    """Channel and thread of a record that holds a Slack event or command; None for all others."""
    payload = _payload(record)
    if payload is None:
        return None
    event = payload.get("event")
    if isinstance(event, Mapping) and isinstance(event.get("channel"), str):
        return event["channel"], event.get("thread_ts") or event.get("ts")
    if isinstance(payload.get("channel_id"), str):
        return payload["channel_id"], None
    return None
