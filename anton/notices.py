"""Notices: whom to tell of an approval, and where, as a Table: an app sends them on as it likes.

    notices = Notices()
    notices.on_new_records(SlackAskApproval(), where="via = 'slack'")

Approval(via=["inbox", "slack:#finance", "email"]) makes them: when it is asked, at remind=, when it escalates, and, for
channels, when it was decided. compose() makes the mail of one, with its link; no link is ever stored. With
SMTP_HOST set mails go by themselves.
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from anton import people
from anton.app import App, current_app, place_of_caller
from anton.calls import outbox_name
from anton.columns import Shape
from anton.db import Database, literal
from anton.errors import DecisionRefused
from anton.event import Event
from anton.record import ChangeOp
from anton.table import Table, _maker

MAILER = "anton_components.vendor.smtp.notice"
_MAILS = re.compile(r"(?<!\bnot )(?<!\bnot \()\bvia\s*(=\s*|in\s*\([^)]*)'email'", re.IGNORECASE)


class Notice(BaseModel):
    """kind: asked, reminder, escalated, edited, decided. via: "email" to a person's address, "slack" to a channel."""

    id: int
    at: datetime
    app: str
    approval_id: int
    kind: str
    via: str
    person: str | None = None
    to: str
    subject: str


class Notices(Table[Notice]):
    """The notices of the app. Read like a Table; nobody writes to it."""

    def __init__(self) -> None:
        app = current_app()
        name = outbox_name(app).replace(".action", ".notice")
        self.name, self.model = name, Notice
        self.shape = Shape(Notice, None, name)
        self.unique, self.index = (), ()
        self.make = _maker(self.shape)
        self._checks = {}
        self.read_only = "notices are made by approvals"
        self.place = place_of_caller()
        self.condition = f"app = {literal(app.name)}"
        app.tables.setdefault(name, self)

    def _event(self, verb: str, ops: tuple[ChangeOp, ...]) -> Event[Notice]:
        return _NoticeEvent(self, verb, ops)


class _NoticeEvent(Event[Notice]):
    """New notices of this app."""

    def _declare(self, fn: Any, name: str | None, options: dict[str, Any], body: str | None = None,
                 component: object = None) -> Any:
        assert isinstance(self._table, Notices)
        where = " and ".join(f"({one})" for one in (self._table.condition, options.get("where")) if one)
        return super()._declare(fn, name, {**options, "where": where}, body, component)


@dataclass(frozen=True)
class Message:
    """A mail, ready to be sent."""

    to: str
    subject: str
    text: str


def base_of(app: App) -> str:
    """Where people reach the app: deployment.url of autonomous.json, else this machine."""
    deployment = getattr(app.settings, "deployment", None)
    if deployment is None:
        return "http://localhost:3000"
    return str(deployment.url or f"http://localhost:{deployment.port}")


async def compose(db: Database, app: App, notice: Notice) -> Message:
    """The mail of a notice to a person, with a link that decides this approval, once. Call it where it is sent.

    It goes to their own address and says what the approval does, whatever the notice says: who writes one learns no
    link by it. Raises DecisionRefused where they may not decide it any more, or have no address.
    """
    async with db.conn() as conn:
        to = await db.call_value(conn, "address_of", notice.person)
        shown = await db.call_value(conn, "show_approval", notice.approval_id)
    if to is None or shown is None:
        raise DecisionRefused(f"notice {notice.id}: no approval {notice.approval_id}" if shown is None else
                              f"notice {notice.id}: {notice.person} has no e-mail address. anton people add "
                              f"{notice.person} --email ADDRESS")
    url = await people.link(db, str(notice.person), base_of(app), approval=notice.approval_id)
    again = {"reminder": "It still waits for you. ", "escalated": "Nobody has decided it yet. ",
             "edited": "It was edited since, and needs your voice as it is now. "}.get(notice.kind, "")
    text = f"{shown['preview']}\n\n{again}Look at it and decide, once, by this link, which is yours alone:\n{url}\n"
    return Message(to, f"To decide: {shown['preview']}", text)


def unmailed(app: App) -> bool:
    """Whether its approvals go by e-mail, and nothing sends those."""
    return not _by_hand(app) and not os.environ.get("SMTP_HOST", "").strip()


def unposted(app: App) -> list[str]:
    """Channels of Slack where its approvals are asked, and no handler of notices takes those."""
    wheres = [one.where or "" for one in app.handlers.values() if isinstance(one.table, Notices)]
    if any("'slack'" in where or not _MAILS.search(where) for where in wheres):
        return []
    return sorted(channel for channel in app.channels if channel.startswith("slack:"))


def _by_hand(app: App) -> bool:
    """No approval goes by e-mail, or a handler says that it sends those."""
    wheres = (one.where or "" for one in app.handlers.values() if isinstance(one.table, Notices))
    return "email" not in app.channels or any(_MAILS.search(where) for where in wheres)


def mail_by_default(app: App) -> None:
    """Has notices mailed, where SMTP_HOST is set, approvals go by e-mail, and no handler of the app says that it does.

    It says so by where="via = 'email'"; one of all notices may be but a log of them. Raises ConfigError for a variable
    of SMTP that is missing or wrong.
    """
    if _by_hand(app) or not os.environ.get("SMTP_HOST", "").strip():
        return
    connections = app.settings.connections if app.settings is not None else ()
    connection = next((one.name for one in connections if one.service.lower() == "smtp"), None)
    importlib.import_module(MAILER).wire(connection)
