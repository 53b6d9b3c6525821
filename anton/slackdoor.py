"""Slackdoor: what buttons of Slack ask for: signed, each once, by a person who is known. The rest is decide()'s.

    POST /inbox/slack     Slack's "Interactivity" request; SLACK_SIGNING_SECRET is what it is signed with

Approve, Reject: decided. Edit: a dialog is opened, made of the action's model (form.py); what is sent from it is
approved.

SLACK_TEAM_ID and SLACK_APP_ID, where set, say whose requests count: "T1", or several, "T1,T2". A request is noted as
seen in the transaction that decides, so that one whose transaction failed counts when it comes again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from anton.action import effects
from anton.app import App
from anton.component import components_of
from anton.db import current_database
from anton.errors import DecisionRefused, Discard, InvalidRecord, WorldError
from anton.form import Field, fields, read
from anton.outbox import decide
from anton.pages import HEADERS
from anton.secret import env
from anton.verify import Verifier

log = logging.getLogger("anton.web")

AGAIN = "this request came before"
MAX_BODY = 1_000_000                                                   # bytes


class SlackDoor:
    """The endpoint of one app."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.verifier = Verifier("slack", env("SLACK_SIGNING_SECRET"), of="POST /inbox/slack")

    async def __call__(self, request: Request) -> Response:
        """Decides what a button says, as the person who pressed it."""
        body, db = await request.body(), current_database()
        async with db.conn() as conn:
            now = (await db.call_value(conn, "now")).timestamp()
        refusal = self.verifier.check(body, request.headers.raw, now) if len(body) <= MAX_BODY else None
        if refusal is not None or len(body) > MAX_BODY:
            log.info("401 for POST /inbox/slack: %s", refusal.why if refusal else "it is too large")
            return _said(401, "the request is not signed as it must be")
        payload = _payload(body)
        if stranger := _stranger(payload):
            log.info("403 for POST /inbox/slack: %s", stranger)
            return _said(403, stranger)
        pressed = _pressed(payload)
        mark = hashlib.sha256(body + request.headers["x-slack-request-timestamp"].encode()).hexdigest()
        if pressed is None or pressed.what == "edit":                  # what decides nothing counts once as well
            async with db.tx() as conn:
                if not await db.call_value(conn, "first_time", mark):
                    return _said(409, AGAIN)
        if pressed is None:
            return _said(200, "nothing to decide")                     # such as the button that only opens a page
        async with db.conn() as conn:
            person = await db.call_value(conn, "person_of_slack", pressed.user)
            shown = await db.call_value(conn, "open_approval", pressed.approval, person)
            if shown is None and (there := await db.call_value(conn, "show_approval", pressed.approval)) is not None:
                shown = {**there, "may": False, "why_not": "you are not among those who may"}  # the channel shows it
        if person is None:
            return _said(403, f"Slack's {pressed.user} is nobody that is known: anton people add NAME --slack "
                              f"{pressed.user}")
        if shown is None or shown["app"] != self.app.name:
            return _said(404, f"there is no approval {pressed.approval}")
        if pressed.what == "edit":
            return await self._ask_edit(pressed, shown)
        edit = read(self._fields(shown), pressed.values) if pressed.values else {}
        async with db.tx() as conn:
            if not await db.call_value(conn, "first_time", mark):
                return _said(409, AGAIN)
            try:
                async with conn.transaction():                         # a refusal is an answer: it counts, too
                    row = await decide(db, self.app, pressed.approval, person, pressed.what, "slack", edit=edit,
                                       sha256=pressed.sha256, conn=conn)
            except InvalidRecord as error:
                return _wrong(pressed, error.reasons)
            except DecisionRefused as error:
                return _said(403, str(error)) if pressed.values is None else _wrong(pressed, [str(error)])
        said = f"{row['state']}" + (f" by {row['decided_by']}" if row["decided_by"] else "")
        if pressed.values is None:
            return _said(200, said)
        if row["next"] or not row["won"]:
            return _wrong(pressed, ["what it rests on has changed, so it is asked again" if row["next"] else
                                    f"it was decided before: {said}"])
        return JSONResponse({"response_action": "clear"}, headers=HEADERS)

    async def _ask_edit(self, pressed: Pressed, shown: Mapping[str, Any]) -> Response:
        """Opens the dialog, by the component of the app that asks in Slack."""
        asker = next((one for one in components_of(self.app).values() if hasattr(one, "ask_edit")), None)
        if not shown["may"] or pressed.sha256 != shown["args_sha256"]:
            return _said(403, shown["why_not"] or "its arguments are not those that were shown")
        if asker is None or effects() != "live":
            return _said(404, "no SlackAskApproval is live here, which could open a dialog")
        try:
            await asker.ask_edit(pressed.trigger, shown, self._fields(shown))
        except (WorldError, Discard) as error:
            log.warning("approval %s: no dialog: %s", pressed.approval, error)
            return _said(502, str(error))
        return Response(status_code=200, headers=HEADERS)

    def _fields(self, shown: Mapping[str, Any]) -> list[Field]:
        declared = self.app.actions.get(shown["name"])
        return fields(declared.model if declared is not None else None, shown["args"], shown["editable"])


@dataclass(frozen=True)
class Pressed:
    """What a person pressed. values: of a dialog that was sent, by block; None: a button. trigger: opens a dialog."""

    user: str
    what: Any                                                          # approve, reject, edit
    approval: int
    sha256: str
    trigger: str
    values: dict[str, str] | None = None


def _payload(body: bytes) -> Mapping[str, Any]:
    """What Slack sends; {} for what is nothing of the kind."""
    try:
        payload = json.loads(parse_qs(body.decode(), max_num_fields=100)["payload"][0])
    except (KeyError, ValueError):
        return {}
    return payload if isinstance(payload, dict) else {}


def _stranger(payload: Mapping[str, Any]) -> str | None:
    """Why it does not come from where it must: another workspace, or another app of Slack's; None: it does."""
    team, user = payload.get("team") or payload.get("enterprise") or {}, payload.get("user") or {}
    for variable, given in (("SLACK_APP_ID", [payload.get("api_app_id")]),
                            ("SLACK_TEAM_ID", [team.get("id"), user.get("team_id", team.get("id"))])):
        allowed = [one.strip() for one in os.environ.get(variable, "").split(",") if one.strip()]
        for one in given:
            if allowed and one not in allowed:
                return f"it comes from {one}, which is not in {variable}"
    return None


def _pressed(payload: Mapping[str, Any]) -> Pressed | None:
    """What it asks for; None for all that decides nothing."""
    try:
        values = None
        if payload["type"] == "view_submission" and payload["view"]["callback_id"] == "anton_edit":
            what, about = "approve", json.loads(payload["view"]["private_metadata"])
            values = {block: _value(one["value"]) for block, one in payload["view"]["state"]["values"].items()}
        elif payload["type"] == "block_actions":
            pressed = payload["actions"][0]
            what, about = str(pressed["action_id"]).removeprefix("anton_"), json.loads(pressed.get("value", "{}"))
        else:
            return None
        if what not in ("approve", "reject", "edit"):
            return None
        return Pressed(str(payload["user"]["id"]), what, int(about["approval"]), str(about["sha256"]),
                       str(payload.get("trigger_id", "")), values)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return None


def _value(typed: Mapping[str, Any]) -> str:
    """The text of an input: what was typed, or the option, which begins with "="."""
    if typed["type"] == "static_select":
        return str((typed.get("selected_option") or {}).get("value", "="))[1:]
    return str(typed.get("value") or "")


def _wrong(pressed: Pressed, reasons: Sequence[str]) -> Response:
    """What Slack shows in the dialog, each at its input; at the first what is about none."""
    if not pressed.values:
        return _said(403, "; ".join(reasons))
    found: dict[str, str] = {}
    for reason in reasons:
        name, _, text = reason.partition(": ")
        at = f"arg.{name.partition('.')[0]}"
        block, text = (at, text) if at in pressed.values else (next(iter(pressed.values)), reason)
        found[block] = f"{found[block]}; {text}" if block in found else text
    return JSONResponse({"response_action": "errors", "errors": found}, headers=HEADERS)


def _said(status: int, text: str) -> Response:
    return JSONResponse({"text": text}, status, HEADERS)
