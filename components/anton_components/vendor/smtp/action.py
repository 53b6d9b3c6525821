"""Smtp: e-mail.

    replies.on_new_records(SendEmail("smtp.example.com", sender="Ann <ann@example.com>", username="ann",
                                     password=env("SMTP_PASSWORD"), to="{email}", text="{reply}"))
"""

from __future__ import annotations

import hashlib
import re
import smtplib
import ssl
from collections.abc import Mapping, Sequence
from email.message import EmailMessage
from email.utils import formatdate, parseaddr
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from anton import Approval, Ctx, Discard, Retry, Table
from anton.kit import ActionComponent, BadOption, Call, Env, WorldError, fill, in_thread, placeholders

PORTS = {"starttls": 587, "tls": 465, "none": 25}
# One address, and nothing that a server could read as another one or as a second.
Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*$", max_length=900)]


class Email(BaseModel):
    """What is sent."""

    model_config = ConfigDict(extra="forbid")

    to: list[Address]
    subject: Line
    text: str
    html: str | None = None


class SendEmail(ActionComponent):
    """An e-mail for each record; {name} in to, subject, text and html is the record's value.

    host: of the SMTP server. port: default 587 for tls="starttls", 465 for "tls", 25 for "none" (no encryption; only
    without username). username: who logs in, with password: a value or env(…); default SMTP_PASSWORD. sender: "ann@…"
    or "Ann <ann@…>". to: one address, or several. html: an HTML form besides the text. effect: "unsafe", or
    "idempotent" where the server drops a second message with the same Message-ID, which is made of the call's key.
    Whether it was taken is unknown only when the connection breaks after the message's end and before the server's
    answer. It goes to all recipients or to none: one that is refused is a dead letter. allow: recipients,
    "*@example.com". timeout: seconds for each answer. into: gets {"message_id", "to", "record_id"}. approve, cap, rate:
    as of actions. map: the record's names for those in braces. Raises BadOption.
    """

    service = "SMTP"
    example = "order_desk"
    variable = "SMTP_PASSWORD"
    arguments: type[BaseModel] | None = Email

    def __init__(self, host: str, *, sender: str, to: str | Sequence[str] = "{email}", subject: str = "{subject}",
                 text: str = "{text}", html: str | None = None, username: str | None = None,
                 password: Env | str | None = None, tls: Literal["starttls", "tls", "none"] = "starttls",
                 port: int | None = None, effect: Literal["unsafe", "idempotent"] = "unsafe",
                 allow: Sequence[str] | None = None, timeout: float = 30.0, into: Table[Any] | None = None,
                 approve: Approval | None = None, cap: str | Sequence[str] = (), rate: str | None = None,
                 map: Mapping[str, str] | None = None, connection: str | None = None) -> None:
        super().__init__(secret=password, map=map, connection=connection)
        if not re.fullmatch(r"[^@\s<>,]+@[A-Za-z0-9.-]+", parseaddr(sender)[1]) or re.search(r"[\r\n]", sender):
            raise BadOption("sender", sender, "SendEmail", 'one address: "ann@example.com" or "Ann <ann@example.com>"')
        if tls == "none" and username is not None:
            raise BadOption("tls", tls, "SendEmail", '"starttls" or "tls" where there is a username: else the password '
                            "is sent for all to read")
        self.host, self.port, self.tls, self.username, self.sender = host, port or PORTS[tls], tls, username, sender
        self.to = (to,) if isinstance(to, str) else tuple(to)
        self.subject, self.text, self.html = subject, text, html
        self.effect, self.timeout, self.into, self.approve = effect, timeout, into, approve
        self.allow, self.cap, self.rate = list(allow or ()), cap, rate
        self._tls = ssl.create_default_context()

    def unset(self) -> str | None:
        """What to set, when it logs in."""
        return None if self.username is None else super().unset()

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        return {**super().options(), "allow": {"to": self.allow} if self.allow else None,
                "timeout": self.timeout * 8 + 5}

    def inputs(self) -> Mapping[str, Any]:
        """What the templates name; of any type, for it becomes text."""
        return dict.fromkeys(set().union(*map(placeholders, self._templates())), Any)

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets."""
        return {"message_id": str, "to": list[str], "record_id": Any}

    def _templates(self) -> list[str]:
        return [*self.to, self.subject, self.text, *([self.html] if self.html is not None else [])]

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The message for one record."""
        made: dict[str, Any] = {"to": [fill(one, record, self.map) for one in self.to],
                                "subject": fill(self.subject, record, self.map),
                                "text": fill(self.text, record, self.map)}
        return made if self.html is None else {**made, "html": fill(self.html, record, self.map)}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One message."""
        message_id = self.message_id(key)
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = self.sender, ", ".join(args["to"]), args["subject"]
        message["Message-ID"], message["Date"] = message_id, formatdate()
        message.set_content(args["text"])
        if args.get("html") is not None:
            message.add_alternative(args["html"], subtype="html")
        await in_thread(self._deliver, list(args["to"]), message.as_bytes(policy=message.policy.clone(linesep="\r\n")))
        return {"message_id": message_id, "to": args["to"]}

    def message_id(self, key: str) -> str:
        """Of the message that is sent with this key: always the same."""
        domain = parseaddr(self.sender)[1].partition("@")[2]
        return f"<{hashlib.sha256(key.encode()).hexdigest()[:32]}@{domain}>"

    def _deliver(self, to: list[str], data: bytes) -> None:
        server = self._begin(to)
        try:
            server.send(re.sub(rb"(?m)^\.", b"..", data).removesuffix(b"\r\n") + b"\r\n.\r\n")
            _look(*server.getreply(), "the message")                   # a break from here on: nobody knows
        finally:
            server.close()

    def _begin(self, to: list[str]) -> smtplib.SMTP:
        """A server that waits for the message. Raises WorldError, Retry, Discard: nothing was sent."""
        server: smtplib.SMTP | None = None
        try:
            if self.tls == "tls":
                server = smtplib.SMTP_SSL(self.host, self.port, timeout=self.timeout, context=self._tls)
            else:
                server = smtplib.SMTP(self.host, self.port, timeout=self.timeout)
            if self.tls == "starttls":
                server.ehlo()
                server.starttls(context=self._tls)
            server.ehlo()
            if self.username is not None:
                server.login(self.username, self.credential() or "")
            _look(*server.mail(parseaddr(self.sender)[1]), "the sender")
            for one in to:
                _look(*server.rcpt(one), one)
            code, said = server.docmd("DATA")
            if code != 354:
                _look(code, said, "the message")
            return server
        except (Discard, Retry):
            if server is not None:
                server.close()
            raise
        except (smtplib.SMTPException, OSError) as error:              # ssl's and timeouts are OSErrors
            if server is not None:
                server.close()
            text = "refused the login" if isinstance(error, smtplib.SMTPAuthenticationError) else \
                f"{type(error).__name__}: {error}"
            raise WorldError(f"SMTP server {self.host}: {text}") from None

    def row(self, call: Call, result: Any) -> Any:
        """What `into` gets."""
        key = call.subject[1] if call.subject else [None]
        return {"message_id": self.message_id(call.idempotency_key), "to": call.args["to"],
                "record_id": key[0] if len(key) == 1 else None}


def _look(code: int, said: bytes, what: str) -> None:
    """Raises Discard for a refusal for good (5xx), Retry for one for now."""
    if 200 <= code < 300:
        return
    text = f"SMTP server refused {what}: {code} {said.decode(errors='replace')}"
    raise (Discard if code >= 500 else Retry)(text)
