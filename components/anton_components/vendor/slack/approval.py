"""Slack: approvals as messages with buttons.

    Notices().on_new_records(SlackAskApproval(oauth_token=env("SLACK_TOKEN")), where="via = 'slack'")
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from anton_components.vendor.slack.action import _NAMESPACE, API, Word, _Sent, _Slack
from pydantic import BaseModel

from anton import Ctx, Discard
from anton.kit import Env, base_of, current_app, current_database

_PLAIN, _MARKED = "plain_text", "mrkdwn"
_MOST = 2900                                                           # characters of a section; Slack takes 3,000
_TITLE = 300                                                           # characters of a preview
_DECISIONS: tuple[tuple[str, dict[str, str]], ...] = (
    ("approve", {"style": "primary"}), ("edit", {}), ("reject", {"style": "danger"}))
_TYPED, _OPTION, _OPTIONS, _FIELDS = 3000, 70, 100, 90                 # characters of an input, of an option; how many


class Asked(_Sent):
    """Which approval is told of, where. text: as it was when it was told; what is posted is made where it is sent."""

    channel: Word
    text: str
    approval: int
    kind: Literal["asked", "reminder", "escalated", "edited", "decided"]


class SlackAskApproval(_Slack):
    """Asks in a channel, with buttons, for what `Approval(via=["slack:#finance"])` is to be decided.

    oauth_token: a value or env(…); default SLACK_TOKEN. It takes the records of `Notices()`. Who presses a button must
    be a person whose Slack id is known (`anton people add ann --slack U1`); set "Interactivity" of the Slack app to
    https://…/inbox/slack and SLACK_SIGNING_SECRET where it is served. "Edit" opens a dialog; what is sent from it is
    approved. Where its arguments are too long for a message it says so, and has a link to the inbox instead of buttons.
    api: where Slack is. timeout: seconds for one answer.
    """

    example = "ticket_triage"
    arguments: type[BaseModel] | None = Asked

    def __init__(self, *, connection: str | None = None, oauth_token: Env | str | None = None, api: str = API,
                 timeout: float = 30.0) -> None:
        super().__init__(oauth_token, api, timeout, None, connection)

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The message of a notice."""
        if record.via != "slack":
            raise Discard(f"notice {record.id} goes by {record.via}; say where=\"via = 'slack'\"")
        told = {"channel": record.to, "approval": record.approval_id, "kind": record.kind}
        return {**told, "text": (await self._message(told))["text"]}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One chat.postMessage, of the approval as it is now: no call, whoever wrote it, has a text of its own."""
        body = await self._message(args)
        reply = await self.call("chat.postMessage", {**body, "client_msg_id": str(uuid.uuid5(_NAMESPACE, key))})
        return {"ts": reply["ts"], "channel": reply["channel"]}

    async def _message(self, told: Mapping[str, Any]) -> dict[str, Any]:
        db = current_database()
        async with db.conn() as conn:
            found = await db.call_value(conn, "show_approval", told["approval"])
        if found is None or f"slack:{told['channel']}" not in found["via"]:
            raise Discard(f"no approval {told['approval']} is asked in {told['channel']}")
        return message(found, told["kind"], told["channel"], base_of(current_app()))

    async def ask_edit(self, trigger: str, approval: Mapping[str, Any], fields: Sequence[Any]) -> None:
        """One views.open: the dialog of an approval. fields: as form.py has them. Raises WorldError, Discard."""
        await self.call("views.open", {"trigger_id": trigger, "view": dialog(approval, fields)})


def dialog(approval: Mapping[str, Any], fields: Sequence[Any]) -> dict[str, Any]:
    """The dialog: an input for each argument that may be edited and is flat; others are shown, as they are."""
    blocks = [_input(field) or _section(f"*{_escaped(field.label)}*\n```{_fenced(field.value)}```") for field in fields]
    return {"type": "modal", "callback_id": "anton_edit", "title": _plain("Edit and approve"),
            "submit": _plain("Approve"), "close": _plain("Cancel"), "blocks": blocks,
            "private_metadata": json.dumps({"approval": approval["id"], "sha256": approval["args_sha256"]})}


def _input(field: Any) -> dict[str, Any] | None:
    """None for what Slack has no input for: JSON, what is too long, what may not be edited."""
    element: dict[str, Any] = {"action_id": "value"}
    if field.kind in ("text", "lines") and _size(field.text) <= _TYPED:
        element |= {"type": "plain_text_input", "multiline": field.kind == "lines"}
        element |= {"initial_value": field.text} if field.text else {}
    elif field.kind in ("choice", "flag") and len(field.choices) <= _OPTIONS and \
            max(map(_size, field.choices)) <= _OPTION:
        options = {choice: {"text": _plain(_escaped(choice) or "–"), "value": f"={choice}"} for choice in field.choices}
        element |= {"type": "static_select", "options": list(options.values())}
        element |= {"initial_option": options[field.text]} if field.text in options else {}
    else:
        return None
    return {"type": "input", "block_id": f"arg.{field.name}", "label": _plain(_escaped(field.label)), "optional": True,
            "element": element}


def _plain(text: str) -> dict[str, Any]:
    return {"type": _PLAIN, "text": text, "emoji": False}


def message(approval: Mapping[str, Any], kind: str, channel: str, base: str) -> dict[str, Any]:
    """A message about an approval, as show_approval() has it: with buttons while it waits.

    Its arguments are there as a whole, or not at all: then it says so, and has a link and no button that decides.
    """
    preview = _cut(str(approval["preview"]))
    url = f"{base}/inbox/{approval['id']}"
    if approval["state"] != "pending":
        by = f" by {approval['decided_by']}" if approval["decided_by"] else ""
        text = _escaped(f"{approval['state'].capitalize()}{by}: {preview}")
        return _message(channel, text, [_section(text, _PLAIN), _section(f"<{url}|See it>")])
    said = {"reminder": "It still waits: ", "escalated": "Nobody has decided it yet: ",
            "edited": "It was edited, and waits as it is now: "}.get(kind, "")
    text = _escaped(said + preview)
    args = "\n".join(f"*{_escaped(name)}*\n```{_fenced(value)}```" for name, value in approval["args"].items())
    seen = _size(args) <= _MOST
    if not seen:
        args = f"*Its arguments are too long for Slack.* <{url}|Open it> to read all of it, and decide there."
    value = json.dumps({"approval": approval["id"], "sha256": approval["args_sha256"]})
    editable = approval.get("editable")
    edits = (editable is None or editable) and 0 < len(approval["args"]) <= _FIELDS
    buttons = [_button(what, value=value, **style) for what, style in _DECISIONS if seen and (what != "edit" or edits)]
    blocks = [_section(text, _PLAIN), *([_section(args)] if args else []), {
        "type": "actions", "block_id": f"approval-{approval['id']}",
        "elements": [*buttons, _button("open", "Open" if seen else "Open, read, decide", url=url)]}]
    return _message(channel, text, blocks)


def _message(channel: str, text: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"channel": channel, "text": text, "mrkdwn": False, "blocks": blocks}


def _section(text: str, kind: str = _MARKED) -> dict[str, Any]:
    return {"type": "section", "text": _plain(text) if kind == _PLAIN else {
        "type": kind, "text": text, "verbatim": True}}                 # nothing of it becomes a link


def _button(what: str, text: str = "", **more: Any) -> dict[str, Any]:
    return {"type": "button", "action_id": f"anton_{what}", "text": {"type": _PLAIN, "text": text or what.capitalize()},
            **more}


def _fenced(value: Any) -> str:
    """A value for between three backticks: it shows as it is, and cannot end them, as Slack has no escape for those."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub("`(?=`)|`$", "`\u200b", re.sub("^`", "\u200b`", _escaped(text))) or " "


def _escaped(text: str) -> str:
    """Text that is shown as it is: nothing in it is a link, a mention or a channel to Slack."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cut(text: str) -> str:
    return text if len(text) <= _TITLE else f"{text[:_TITLE]}…"


def _size(text: str) -> int:
    """Characters as Slack counts them, of which an emoji may be two."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
