"""SendEmail on the wire: what a server is told, which answers mean what, and when nobody knows."""

from __future__ import annotations

import base64
import re
import socketserver
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
from anton_components.vendor.smtp.action import SendEmail
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from desk import Person, form_of, know
from kept import everything
from shop import lambda_named

from anton import Approval, Table, action
from anton.app import App, declaring
from anton.errors import BadOption, ConfigError
from anton.notices import Notices

pytestmark = pytest.mark.once("wires: the server is asked for the same")

PASSWORD = "never-to-be-seen-1f"


class Peer(socketserver.ThreadingTCPServer):
    """A server that keeps to RFC 5321 and refuses what does not: order, TLS before login, login before mail.

    answers: {verb: a line instead of its own}. cut: the verb, or "end" of the message, at which it hangs up.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.tls, self.login = tls, True
        self.got: list[tuple[str, list[str], bytes]] = []
        self.wrong: list[str] = []
        self.answers: dict[str, str] = {}
        self.cut = ""


class _Session(socketserver.StreamRequestHandler):
    server: Peer

    def say(self, line: str) -> None:
        self.wfile.write(line.encode() + b"\r\n")

    def finish(self) -> None:
        super().finish()
        self.request.close()                                           # what TLS is around of is another one

    def handle(self) -> None:
        peer, state = self.server, {"tls": False, "login": not self.server.login, "ehlo": False}
        sender: str | None = None
        to: list[str] = []
        self.say("220 peer ESMTP")
        while line := self.rfile.readline():
            if not line.endswith(b"\r\n"):
                peer.wrong.append(f"no CRLF: {line!r}")
                return
            verb, _, rest = line.decode().strip().partition(" ")
            verb = verb.upper()
            if peer.cut == verb:
                return
            if verb in peer.answers:
                self.say(peer.answers[verb])
            elif verb == "EHLO":
                state["ehlo"] = True
                more = [] if not peer.login else ["AUTH PLAIN"] if state["tls"] else ["STARTTLS"]
                for one in ["peer", *more[:-1]] if more else []:
                    self.say(f"250-{one}")
                self.say(f"250 {(more or ['peer'])[-1]}")
            elif verb == "STARTTLS" and state["ehlo"]:
                self.say("220 go on")
                self.request = peer.tls.wrap_socket(self.request, server_side=True)
                self.rfile, self.wfile = self.request.makefile("rb"), self.request.makefile("wb", buffering=0)
                state |= {"tls": True, "ehlo": False}
            elif verb == "AUTH" and state["tls"] and rest.startswith("PLAIN "):
                state["login"] = base64.b64decode(rest[6:]) == f"\0ann\0{PASSWORD}".encode()
                self.say("235 welcome" if state["login"] else "535 wrong password")
            elif verb == "MAIL" and state["login"] and state["ehlo"] and rest.startswith("FROM:<"):
                sender = rest[6:].partition(">")[0]
                self.say("250 ok")
            elif verb == "RCPT" and sender and rest.startswith("TO:<"):
                to.append(rest[4:].partition(">")[0])
                self.say("550 nobody here" if "nobody" in rest else "250 ok")
            elif verb == "DATA" and to and sender:
                self.say("354 go on")
                body = b""
                while (part := self.rfile.readline()) not in (b".\r\n", b""):
                    if b"\n" in part.replace(b"\r\n", b"") or b"\r" in part.replace(b"\r\n", b""):
                        peer.wrong.append(f"no CRLF: {part!r}")
                    body += part.removeprefix(b".") if part.startswith(b"..") else part
                if not part:
                    return
                peer.got.append((sender, to, body))
                if peer.cut == "end":
                    return
                self.say(peer.answers.get("end", "250 taken"))
                sender, to = None, []
            elif verb == "QUIT":
                return
            else:
                peer.wrong.append(line.decode())
                self.say("503 not now")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for localhost and its key, in a file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
            .sign(key, hashes.SHA256()))
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return file


@pytest.fixture
def peer(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Peer(context) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()
    assert made.wrong == []


def mail(live: Any, peer: Peer, record: dict[str, Any], **options: Any) -> None:
    given = {"sender": "Ann <ann@shop.example>", "username": "ann", "password": PASSWORD, "subject": "Re: {subject}",
             "text": "{text}", "port": peer.server_address[1], **options}
    with declaring(live.app):
        letters, sent = Table("letters"), Table("sent")
        letters.on_new_records(SendEmail("localhost", into=sent, **given))
    live.migrate()
    letters.append({"email": "bob@x.example", "subject": "Grüße", "text": "Hello\n.\n..dots\nbye", **record})
    live.run()


def states(live: Any) -> list[str]:
    return [call.state for call in live.calls]


def test_a_message_goes_out_encrypted_and_logged_in_with_an_id_made_of_its_key(live, peer):
    mail(live, peer, {}, to=["{email}", "eve@x.example"], html="<p>{text}</p>")
    ((sender, to, raw),) = peer.got
    message = message_from_bytes(raw, policy=policy.default)
    assert (sender, to) == ("ann@shop.example", ["bob@x.example", "eve@x.example"])
    assert message["subject"] == "Re: Grüße" and message["from"] == "Ann <ann@shop.example>"
    text = message.get_body(("plain",)).get_content()
    assert text.replace("\r\n", "\n") == "Hello\n.\n..dots\nbye\n"
    assert "<p>Hello" in message.get_body(("html",)).get_content()
    (row,) = live.records("sent")
    assert row["message_id"] == message["message-id"] and row["record_id"] is not None
    assert states(live) == ["sent"] and not [where for where, rows in everything(live) if PASSWORD in rows]


def test_a_second_attempt_has_the_same_message_id(live, peer):
    peer.cut = "end"
    mail(live, peer, {}, effect="idempotent")
    peer.cut = ""
    live.advance("1h")
    assert states(live) == ["sent"]
    assert len({message_from_bytes(raw)["message-id"] for _, _, raw in peer.got}) == 1 and len(peer.got) == 2


@pytest.mark.parametrize("cut, state, taken", [("MAIL", "retrying", 0), ("DATA", "retrying", 0), ("end", "unknown", 1)])
def test_whether_it_was_taken_is_unknown_only_after_its_end(cut, state, taken, live, peer):
    peer.cut = cut
    mail(live, peer, {})
    assert (states(live), len(peer.got)) == ([state], taken)
    peer.cut = ""
    live.advance("1h")
    assert (states(live), len(peer.got)) == (["unknown" if taken else "sent"], 1)


@pytest.mark.parametrize("answers, state, dead", [
    ({"RCPT": "450 busy"}, "retrying", 0), ({"DATA": "554 no"}, "failed", 1), ({"end": "452 full"}, "retrying", 0),
    ({"end": "554 spam"}, "failed", 1)])
def test_an_answer_says_what_became_of_the_call(answers, state, dead, live, peer):
    peer.answers = answers
    mail(live, peer, {})
    assert (states(live), len(live.dead)) == ([state], dead)


def test_one_recipient_who_is_refused_and_nobody_gets_it(live, peer):
    mail(live, peer, {}, to=["{email}", "nobody@x.example"])
    assert (states(live), peer.got) == (["failed"], [])
    assert "nobody@x.example: 550" in live.dead[0].error


def test_a_wrong_password_is_an_outage_and_is_not_shown(live, peer):
    mail(live, peer, {}, password=f"wrong-{PASSWORD}")
    assert states(live) == ["retrying"] and peer.got == []
    assert not [where for where, rows in everything(live) if PASSWORD in rows]


def test_a_certificate_of_nobody_is_not_trusted(live, peer, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    mail(live, peer, {})
    assert states(live) == ["retrying"] and peer.got == []


@pytest.mark.parametrize("record", [
    {"email": "bob@x.example, eve@y.example"}, {"email": "bob@x.example\r\nBcc: eve@y.example"},
    {"email": "Bob <bob@x.example>"}, {"email": "bob@x.example>\r\nRCPT TO:<eve@y.example"},
    {"subject": "a\r\nBcc: eve@y.example"}, {"subject": "a\u2028Bcc: eve@y.example"}])
def test_no_value_adds_a_recipient_or_a_header(record, live, peer):
    mail(live, peer, record)
    assert peer.got == [] and len(live.dead) == 1 and states(live) == []


def test_only_recipients_that_are_allowed_get_it_each_of_them(live, peer):
    mail(live, peer, {}, to=["{email}", "eve@y.example"], allow=["*@x.example"])
    live.tables["letters"].append({"email": "bob@x.example", "subject": "s", "text": "t"})
    live.run()
    assert (states(live), peer.got) == (["refused", "refused"], [])
    assert "eve@y.example" in live.calls[0].error


def test_what_cannot_be_is_refused_where_it_is_declared():
    with declaring(App("mail")):
        with pytest.raises(BadOption, match="read"):
            SendEmail("h", sender="a@b.example", username="ann", tls="none")
        with pytest.raises(BadOption, match="one address"):
            SendEmail("h", sender="a@b.example\nBcc: x@y.example")


# Notices of approvals


def asking(app: Any, note: bool = False) -> Any:
    with declaring(app.app):
        @action(approve=Approval("@finance", via=["inbox", "email"], remind=["2h"]))
        def refund(amount: int, why: str) -> None: ...

        if note:
            Notices().on_new_records(each=True, where="via = 'email'")(lambda_named("told"))
        app.app.finish()
    app.migrate()
    know(app, "ann", "finance", email="ann@shop.example")
    know(app, "bob", "finance")                                        # no address: by the inbox alone
    return refund


@pytest.fixture
def configured(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> Peer:
    for name, value in (("HOST", "localhost"), ("PORT", str(peer.server_address[1])), ("USERNAME", "ann"),
                        ("FROM", "Shop <desk@shop.example>"), ("PASSWORD", PASSWORD)):
        monkeypatch.setenv(f"SMTP_{name}", value)
    return peer


def test_with_smtp_set_an_approval_is_mailed_with_a_link_that_decides_it_and_is_kept_nowhere(live, configured):
    asking(live).send(amount=5, why="two\nlines")
    live.run()
    ((sender, to, raw),) = configured.got
    message = message_from_bytes(raw, policy=policy.default)
    assert (sender, to) == ("desk@shop.example", ["ann@shop.example"])
    assert message["subject"].startswith("To decide: refund: ") and "two lines" in message["subject"]
    path = re.search(r"http://localhost:3000(/inbox/link/(\S+))", message.get_content())
    assert not [where for where, rows in everything(live) if path[2] in rows or PASSWORD in rows]
    person = Person(live, "ann")
    person.post(path[1], {**form_of(person.get(path[1]).text), "decision": "approve"})
    live.advance("3h")                                                 # past the reminder
    assert len(configured.got) == 1 and not live.dead
    assert {call.name: call.state for call in live.calls} == {"refund": "sent", "mail_notice": "sent"}


def test_a_reminder_is_mailed_and_a_notice_of_what_was_decided_meanwhile_is_not(live, configured):
    asking(live).send(amount=5, why="-")
    live.advance("2h")
    assert len(configured.got) == 2
    configured.answers["MAIL"] = "450 busy"
    live.app.actions["refund"].send(amount=6, why="-")
    live.run()
    live.approvals[-1].reject(by="ann")
    del configured.answers["MAIL"]
    live.advance("1h")
    assert len(configured.got) == 2
    assert [call.result for call in live.calls if call.name == "mail_notice"][-1] == {"skipped": "it is rejected"}


def test_without_smtp_or_with_a_handler_of_its_own_an_app_has_no_mailer(live, configured, monkeypatch):
    asking(live, note=True)
    assert "mail_notice" not in live.app.actions
    monkeypatch.delenv("SMTP_HOST")
    with declaring(App("plain")) as plain:
        action(approve=Approval("ann", via=["email"]))(_pay)
        plain.finish()
        assert list(plain.actions) == ["_pay"]


@pytest.mark.parametrize(("where", "mails"), [
    (None, True), ("kind = 'asked'", True), ("via = 'slack'", True), ("via <> 'email'", True),
    ("not (via = 'email')", True), ("via not in ('email')", True), ("\"to\" like '%email%'", True),
    ("via = 'email'", False), ("kind = 'asked' and  VIA='email'", False), ("via in ('slack', 'email')", False)])
def test_mails_go_by_themselves_until_a_handler_says_that_it_takes_them(configured, where, mails):
    with declaring(App("email-desk")) as app:
        action(approve=Approval("ann", via=["email"]))(_pay)
        Notices().on_new_records(each=True, where=where)(lambda_named("log"))
        app.finish()
    assert ("mail_notice" in app.actions) is mails


@pytest.mark.parametrize(("variable", "value"), [("SMTP_FROM", ""), ("SMTP_PORT", "smtp"), ("SMTP_TLS", "ssl")])
def test_smtp_that_is_set_by_half_is_an_error(configured, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with declaring(App("half")) as half, pytest.raises(ConfigError, match=variable):
        action(approve=Approval("ann", via=["email"]))(_pay)
        half.finish()


def _pay(amount: int) -> None: ...
