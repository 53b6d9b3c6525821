"""Smtp: the notices of approvals, as mails with links. An app with SMTP_HOST set has it without a line of code.

    Approval("@finance", via=["inbox", "email"])        SMTP_HOST SMTP_FROM, SMTP_USERNAME SMTP_PASSWORD SMTP_PORT
                                                        SMTP_TLS
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from anton_components.vendor.smtp.action import Email, SendEmail
from pydantic import ValidationError

from anton import Ctx, Discard
from anton.kit import ConfigError, DecisionRefused, Notice, Notices, compose, current_app, current_database, one_of

TLS = ("starttls", "tls", "none")
SUBJECT = 200                                                          # characters


def wire(connection: str | None) -> None:
    """Has the current app's notices mailed. connection: of autonomous.json, for the password. Raises ConfigError."""
    Notices().on_new_records(_SendNotice(connection), where="via = 'email'")


class _SendNotice(SendEmail):
    """What sends them. The call has the notice; its link is made where it is sent, so that no table has one.

    A mail in doubt is sent again: its link is another, and one of them decides.
    """

    arguments = None

    def __init__(self, connection: str | None = None) -> None:
        given = {name: os.environ.get(f"SMTP_{name}", "").strip()
                 for name in ("HOST", "FROM", "USERNAME", "PORT", "TLS")}
        tls: Any = given["TLS"] or "starttls"
        for name, fine, allowed in (("FROM", given["FROM"], 'who mails are from, such as "Shop <shop@example.com>"'),
                                    ("TLS", tls in TLS, one_of(TLS)),
                                    ("PORT", given["PORT"].isdigit() or not given["PORT"], "a number")):
            if not fine:
                raise ConfigError(f'SMTP_{name}="{given[name]}" with SMTP_HOST is not possible. Allowed: {allowed}.')
        super().__init__(given["HOST"], sender=given["FROM"], username=given["USERNAME"] or None, tls=tls,
                         port=int(given["PORT"] or 0) or None, effect="idempotent", connection=connection)
        self._app = current_app()

    @property
    def name(self) -> str:
        """Of its handler and its action."""
        return "mail_notice"

    def inputs(self) -> Mapping[str, Any]:
        """It takes notices alone."""
        return {}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The notice."""
        return {"notice": record.model_dump(mode="json")}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One mail; none where somebody has decided meanwhile."""
        notice, db = Notice.model_validate(args["notice"]), current_database()
        async with db.conn() as conn:
            asked = await db.call_value(conn, "show_approval", notice.approval_id)
        if asked is None:
            raise Discard(f"no approval {notice.approval_id}")
        if asked["state"] != "pending":
            return {"skipped": f"it is {asked['state']}"}
        try:
            message = await compose(db, self._app, notice)
            subject = " ".join(message.subject.split())[:SUBJECT]
            mail = Email(to=[message.to], subject=subject, text=message.text)
        except (DecisionRefused, ValidationError) as error:
            raise Discard(str(error)) from error
        return await super().send(mail.model_dump(), key)
