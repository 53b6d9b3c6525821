"""Conformance: what every component keeps to, against one peer that speaks for all services and refuses who has no key.

A batch that comes again changes nothing; a secret is in no repr, log, table or error; options are of their types.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from anton_components.vendor.anthropic.cognition import AnthropicCompletion
from anton_components.vendor.fake.cognition import FakeModel
from anton_components.vendor.github.action import GitHubComment, GitHubIssue, GitHubLabel
from anton_components.vendor.http.action import HttpRequest
from anton_components.vendor.http.webhook import SendWebhook
from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.openai.embedding import OpenAiEmbedding
from anton_components.vendor.openai.tuning import OpenAiFineTune
from anton_components.vendor.postgres.action import PostgresWrite
from anton_components.vendor.rss.poll import Rss
from anton_components.vendor.s3.action import S3Put
from anton_components.vendor.slack.action import SlackPostMessage, SlackReact, SlackReply, SlackUpdateMessage
from anton_components.vendor.slack.approval import SlackAskApproval
from anton_components.vendor.smtp.action import SendEmail
from kept import everything
from llm import Llm
from peers import served
from standardwebhooks import Webhook as StandardWebhook
from standardwebhooks.webhooks import WebhookVerificationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from test_smtp import PASSWORD, certificate  # noqa: F401  (a fixture)
from test_smtp import peer as mailbox  # noqa: F401  (a fixture)

from anton import Approval, Table, action, poll, sql
from anton.app import App, declaring
from anton.cli import main
from anton.component import Component
from anton.config import Connection, Settings
from anton.ctx import Ctx
from anton.errors import BadOption, UnknownOption, WorldError
from anton.handler import HandlerSpec
from anton.installed import installed
from anton.notices import Notices
from anton.secret import hush_clients

pytestmark = pytest.mark.once("wires of components: the server is asked for the same")

SECRET = "sk-never-to-be-seen-7c1f"
HOOK = "whsec_bmV2ZXItdG8tYmUtc2Vlbi03YzFmLW5ldmVy"                    # of the form that webhooks want
FEED = '<rss version="2.0"><channel><title>n</title><item><guid>1</guid><title>one</title></item></channel></rss>'
EVENT = {"event": {"channel": "C1", "ts": "1.5"}}


class Peer(Llm):
    """All services. sent: (path, key of the request, body). wrong: a status that all get, with their secret in it.

    told: the values of wrong that a request with the secret met.
    """

    def __init__(self) -> None:
        super().__init__(key=SECRET)
        self.sent: list[tuple[str, str, Any]] = []
        self.wrong = 0
        self.told: set[int] = set()

    def routes(self) -> list[Route]:
        return [Route("/{path:path}", self.any, methods=["GET", "POST", "PUT"])]

    async def any(self, request: Request) -> Response:
        path, given = request.url.path, request.headers.get("authorization") or request.headers.get("x-api-key", "")
        raw = await request.body()
        body = json.loads(raw) if "json" in request.headers.get("content-type", "") else None
        named = request.headers.get("idempotency-key") or request.headers.get("webhook-id")
        key = named or str((body or {}).get("client_msg_id", ""))
        self.sent.append((path, key, body))
        signed = "Credential=AKIA1/" in given if path.startswith("/bucket/") else (
            path == "/hook" and _hooked(raw, request.headers))
        if given.removeprefix("Bearer ") != SECRET and not signed:
            return JSONResponse({"ok": False, "error": "invalid_auth"}, 401)
        self.told.add(self.wrong)
        if self.wrong:
            said = f"we were told {given}"
            return JSONResponse({"ok": False, "error": {"message": said, "type": "x"} if "/v1/" in path else said},
                                200 if "/api/" in path and self.wrong != 503 else self.wrong)
        if path == "/v1/chat/completions":
            return await self.openai(request)
        if path == "/v1/messages":
            return await self.anthropic(request)
        if path == "/v1/embeddings":
            return await self.embeddings(request)
        if path == "/v1/files":
            return JSONResponse({"id": "file-1", "object": "file", "bytes": 1, "created_at": 1, "filename": "x",
                                 "purpose": "fine-tune", "status": "processed"})
        if path.startswith("/v1/fine_tuning/jobs"):
            made = [one for at, _, one in self.sent if at == "/v1/fine_tuning/jobs" and one]
            job = {"id": "j1", "object": "fine_tuning.job", "created_at": 1, "status": "succeeded", "result_files": [],
                   "fine_tuned_model": "ft:x", "hyperparameters": {}, "organization_id": "o", "seed": 1,
                   **(made[0] if made else {"model": "m", "training_file": "f"})}
            if request.method == "GET" and path.endswith("jobs"):
                return JSONResponse({"object": "list", "data": [job] if made else [], "has_more": False})
            return JSONResponse(job)
        if path == "/hook" or path.startswith("/bucket/"):
            return Response()
        if path == "/orders":
            sent = dict(request.headers)
            return JSONResponse({"you sent": sent, given: [sent]}, headers={"x-sent": given})
        if path == "/feed.xml":
            return Response(FEED, headers={"content-type": "application/rss+xml"})
        if path.startswith("/repos/"):
            return JSONResponse([] if request.method == "GET" else {"id": 1, "number": 1, "html_url": "https://x"}, 201)
        return JSONResponse({"ok": True, "channel": "C1", "ts": "15.1"})


def _hooked(body: bytes, headers: Any) -> bool:
    """Whether its receiver's own library takes a webhook."""
    with suppress(WebhookVerificationError):
        return bool(StandardWebhook(HOOK).verify(body, dict(headers)) is not None)
    return False


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with served(*peer.routes(), ending=peer.ended.set) as peer.url:
        yield peer


Make = Callable[[Table[Any], str], Component]

MADE: dict[str, Make] = {                                              # of the output table and the peer's address
    "AnthropicCompletion": lambda to, url: AnthropicCompletion(to, api_key=SECRET, base_url=url),
    "FakeModel": lambda to, url: FakeModel(to),
    "GitHubComment": lambda to, url: GitHubComment("acme/shop", issue="7", body="{prompt}",
                                                   token=SECRET, api=url, into=to),
    "GitHubIssue": lambda to, url: GitHubIssue("acme/shop", title="{prompt}", body="x",
                                               token=SECRET, api=url, into=to),
    "GitHubLabel": lambda to, url: GitHubLabel("acme/shop", ["bug"], issue="7", token=SECRET, api=url, into=to),
    "HttpRequest": lambda to, url: HttpRequest(f"{url}/orders", secret=SECRET, effect="idempotent", private=True,
                                               into=to),
    "OpenAiCompletion": lambda to, url: OpenAiCompletion(to, api_key=SECRET, base_url=f"{url}/v1"),
    "OpenAiEmbedding": lambda to, url: OpenAiEmbedding(to, api_key=SECRET, base_url=f"{url}/v1",
                                                       map={"text": "prompt"}),
    "S3Put": lambda to, url: S3Put("bucket", access_key="AKIA1", secret_key=SECRET, endpoint=url, body="{prompt}",
                                   into=to),
    "SendWebhook": lambda to, url: SendWebhook(f"{url}/hook", secret=HOOK, private=True, into=to),
    "SlackPostMessage": lambda to, url: SlackPostMessage(oauth_token=SECRET, api=f"{url}/api", into=to, channel="#c",
                                                         message_template="{prompt}"),
    "SlackReact": lambda to, url: SlackReact(oauth_token=SECRET, api=f"{url}/api"),
    "SlackReply": lambda to, url: SlackReply(oauth_token=SECRET, api=f"{url}/api", into=to,
                                             message_template="{prompt}"),
    "SlackUpdateMessage": lambda to, url: SlackUpdateMessage(oauth_token=SECRET, api=f"{url}/api",
                                                             message_template="{prompt}"),
}
APART = {"Rss", "OpenAiFineTune"}                                      # polled; run by hand: declared below
BESIDES = {"PostgresWrite", "SendEmail", "SlackAskApproval"}            # their peer does not speak HTTP; Notices alone
RECORD = {"prompt": "hi", "channel": "C1", "ts": "1.5", "payload": EVENT}


def test_all_that_are_installed_are_looked_at():
    assert {one.name for one in installed()} == set(MADE) | APART | BESIDES


def outputs(app: Any) -> list[Any]:
    return [json.dumps(json.loads(row[0]), sort_keys=True) for row in app._fetch(
        "select (to_jsonb(m) - 'created_at')::text from made m order by id")]


def lose_an_ack(source: Table[Any], component: Component, handled: list[str], **options: Any) -> HandlerSpec:
    """Wires a component so that its first ack is lost. handled: the keys it was called with."""
    spec = component.bind(source)                                      # type: ignore[attr-defined]

    async def first_in_vain(record: Any, ctx: Ctx) -> Any:
        done = await spec.fn(record, ctx)
        handled.append(ctx.key)
        if len(handled) == 1:                                          # what it wrote goes with its ack
            raise WorldError("the ack is lost")
        return done

    source.on_new_records(first_in_vain, each=True, into=spec.into, **options)
    return spec


@pytest.mark.parametrize("name", MADE)
def test_a_record_that_is_handled_again_after_a_lost_ack_changes_nothing(name, live, peer):
    handled: list[str] = []
    with declaring(live.app):
        asked, made = Table("asked"), Table("made")
        spec = lose_an_ack(asked, MADE[name](made, peer.url), handled)
    live.migrate()
    asked.append(RECORD)
    live.run()
    assert len(handled) == 1 and outputs(live) == []
    live.advance("5m")
    assert len(handled) == 2 and len(set(handled)) == 1 and not live.dead
    effects = 0 if name == "FakeModel" else 1
    assert len(peer.sent) == effects, peer.sent
    assert len(outputs(live)) == (0 if name in ("SlackReact", "SlackUpdateMessage") else 1)
    assert len(live.outbox) == (effects if spec.into is None else 0)


@pytest.mark.parametrize("name", ["HttpRequest", "SlackPostMessage"])
def test_a_call_whose_answer_is_lost_is_made_again_with_the_same_key(name, live, peer):
    with declaring(live.app):
        asked, made = Table("asked"), Table("made")
        asked.on_new_records(MADE[name](made, peer.url))
    live.migrate()
    peer.wrong = 503
    asked.append(RECORD)
    live.run()
    peer.wrong = 0
    live.advance("5m")
    keys = [key for _, key, _ in peer.sent]
    assert len(keys) > 1 and "" not in keys and len(set(keys)) == 1 and len(outputs(live)) == 1


def test_a_feed_that_comes_again_changes_nothing(live, peer):
    with declaring(live.app):
        poll(Rss(Table("made"), f"{peer.url}/feed.xml", headers={"Authorization": SECRET}), every="1m")
    live.migrate()
    live.advance("5m")
    assert len(peer.sent) >= 2 and len(outputs(live)) == 1


class InVain(OpenAiFineTune):
    """One whose first ack is lost."""

    begun = 0

    async def begin(self, row: Any, ctx: Ctx) -> None:
        await super().begin(row, ctx)
        self.begun += 1
        if self.begun == 1:
            raise WorldError("the ack is lost")


def test_a_run_that_is_begun_again_after_a_lost_ack_makes_one_job(live, peer):
    with declaring(live.app):
        tune = InVain("replies", api_key=SECRET, base_url=f"{peer.url}/v1", least=1,
                      examples=sql("select 'hi' as prompt, 'ho' as completion"))
    live.migrate()
    tune.run()
    live.run()
    assert tune.begun == 1 and [run.state for run in live.records("tunings")] == ["new"]
    live.advance("5m")
    assert tune.begun == 2 and [run.state for run in live.records("tunings")] == ["succeeded"] and not live.dead
    assert len([body for path, _, body in peer.sent if path == "/v1/fine_tuning/jobs" and body]) == 1
    assert [tuple(row) for row in live._fetch("select count(*) from {schema}.call")] == [(1,)]


@pytest.mark.parametrize("name", [*MADE, *sorted(APART)])
def test_a_secret_is_in_no_table_log_error_or_repr_whether_it_works_or_not(name, live, peer, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    hush_clients()                                                     # as every process does
    with declaring(live.app):
        asked, made = Table("asked"), Table("made")
        if name == "Rss":
            component: Component = Rss(made, f"{peer.url}/feed.xml", headers={"Authorization": SECRET})
            poll(component, every="1m")
        elif name == "OpenAiFineTune":
            component = OpenAiFineTune("replies", api_key=SECRET, base_url=f"{peer.url}/v1", least=1,
                                       examples=sql("select 'hi' as prompt, 'ho' as completion"))
        else:
            component = MADE[name](made, peer.url)
            asked.on_new_records(component)
    live.migrate()
    for wrong in (0, 400, 401, 500):                                   # of the last two it waits for the world
        peer.wrong = wrong
        if isinstance(component, OpenAiFineTune):
            component.run()
        else:
            asked.append({**RECORD, "prompt": f"hi {wrong}"})
        if isinstance(component, Rss):
            live.advance("2m")
        else:                                                          # each probe more is a worker more, and seconds
            live.advance("10s") if wrong == 500 else live.run()
    assert name == "FakeModel" or peer.told >= {0, 400, 401}
    hidden = (SECRET, HOOK)
    assert not any(one in repr(component) for one in hidden)
    assert [where for where, rows in everything(live) if any(one in rows for one in hidden)] == []
    assert not any(one in f"{dead.error} {dead.traceback}" for dead in live.dead for one in hidden)
    assert [record.name for record in caplog.records for one in hidden
            if one in record.getMessage() + str(record.exc_text)] == []
    main(["components", "show", name])
    for row in live._fetch("select id from asked order by id"):
        main(["why", f"asked/{row[0]}", "--database", live.db.dsn])
    said = "".join(capsys.readouterr())
    assert not any(one in said for one in hidden)


# Those besides: a mailbox, another database, approvals


class Beside:
    """What a component of BESIDES is wired to. ask: gives it something to do; came: how often that arrived.

    refuse: the other side refuses from now on, with the secret in its words.
    """

    def __init__(self, live: Any, handled: list[str] | None, request: pytest.FixtureRequest) -> None:
        self.live, self.handled, self.request, self.secret, self.number = live, handled, request, SECRET, 0

    def wire(self, source: Table[Any], component: Component, **options: Any) -> None:
        self.component = component
        if self.handled is None:
            source.on_new_records(component, **options)
        else:
            lose_an_ack(source, component, self.handled, **options)

    def declare(self, name: str) -> None:
        getattr(self, name)(Table("asked"), Table("made"))

    def ask(self) -> None:
        self.number += 1
        if isinstance(self.component, SlackAskApproval):
            self.refund.send(self.number)
        else:
            self.live.tables["asked"].append({**RECORD, "number": self.number})

    def SendEmail(self, asked: Table[Any], made: Table[Any]) -> None:
        smtp, self.secret = self.request.getfixturevalue("mailbox"), PASSWORD
        self.wire(asked, SendEmail("localhost", to="bob@x.example", sender="ann@shop.example", username="ann",
                                   subject="hi", text="{prompt}", password=PASSWORD, port=smtp.server_address[1],
                                   into=made))
        self.came = lambda: len(smtp.got)
        self.refuse = lambda: smtp.answers.update({"MAIL": f"550 we were told {PASSWORD}"})

    def PostgresWrite(self, asked: Table[Any], made: Table[Any]) -> None:
        other, parts = self.request.getfixturevalue("other"), urlsplit(self.request.getfixturevalue("bare"))
        user, host = parts.username or "postgres", parts.netloc.rpartition("@")[2]
        url = parts._replace(netloc=f"{user}:{SECRET}@{host}").geturl()
        self.wire(asked, PostgresWrite(url, "taken", {"id": "{number}"}, into=made))
        self.came = lambda: other.execute("select count(*) from taken").fetchone()[0]
        self.refuse = lambda: other.execute(
            f"alter table taken add constraint small check (id < 0) not valid; alter table taken rename constraint "
            f"small to \"told {SECRET}\"")

    def SlackAskApproval(self, asked: Table[Any], made: Table[Any]) -> None:
        peer = self.request.getfixturevalue("peer")

        @action(approve=Approval("ann", via=["slack:#c"]))
        def refund(number: int) -> None: ...

        self.refund = refund
        self.wire(Notices(), SlackAskApproval(oauth_token=SECRET, api=f"{peer.url}/api"))
        self.came = lambda: sum(path.endswith("chat.postMessage") for path, _, _ in peer.sent)
        self.refuse = lambda: setattr(peer, "wrong", 401)


@pytest.fixture
def other(bare: str) -> Iterator[Any]:
    with psycopg.connect(bare, autocommit=True) as conn:
        conn.execute("create table taken (id int primary key)")
        yield conn


@pytest.mark.parametrize("name", sorted(BESIDES))
def test_what_is_besides_changes_nothing_either_when_it_is_handled_again(name, live, request):
    handled: list[str] = []
    with declaring(live.app):
        beside = Beside(live, handled, request)
        beside.declare(name)
    live.migrate()
    beside.ask()
    live.run()
    assert len(handled) == 1 and outputs(live) == [] and beside.came() == 0
    live.advance("5m")
    assert len(handled) == 2 and len(set(handled)) == 1 and not live.dead and beside.came() == 1
    assert len(outputs(live)) == (name != "SlackAskApproval")


@pytest.mark.parametrize("name", sorted(BESIDES))
def test_a_secret_of_what_is_besides_is_nowhere_either(name, live, request, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with declaring(live.app):
        beside = Beside(live, None, request)
        beside.declare(name)
    live.migrate()
    beside.ask()
    live.run()
    assert beside.came() == 1
    beside.refuse()
    beside.ask()
    live.run()
    assert live.dead or [call for call in live.calls if call.state not in ("sent", "pending")]
    assert beside.secret not in repr(beside.component)
    assert [where for where, rows in everything(live) if beside.secret in rows] == []
    assert [record.name for record in caplog.records
            if beside.secret in record.getMessage() + str(record.exc_text)] == []
    main(["components", "show", name])
    main(["actions", "list", "--database", live.db.dsn])
    assert beside.secret not in "".join(capsys.readouterr())


# Options


@pytest.mark.parametrize("make, said", [
    (lambda to: OpenAiCompletion(to, timeout="soon"), r"timeout='soon' of OpenAiCompletion \(tests/test_conf\S+:\d+\).*"
                                                      r"Allowed: a valid number \(seconds for one answer"),
    (lambda to: OpenAiCompletion(to, mode="scheme"), 'mode=.*Did you mean "schema"'),
    (lambda to: OpenAiCompletion(to, max_tokens=True), "a valid integer or None"),
    (lambda to: OpenAiCompletion("answers"), "into='answers' of OpenAiCompletion.*an instance of Table"),
    (lambda to: SlackPostMessage(channel=7), "channel=7 of SlackPostMessage.*a valid string or None"),
    (lambda to: HttpRequest("https://x.example.com", effect="safe"), "effect='safe'.*unsafe"),
    (lambda to: FakeModel(to, map={"prompt": 1}), "map=.*a valid string"),
    (lambda to: Rss(to, "https://x.example.com/f", private="yes"), "private='yes' of Rss")])
def test_a_value_of_a_wrong_type_is_refused_where_it_is_declared(make, said):
    with declaring(App("typed")), pytest.raises(BadOption, match=said):
        make(Table("answers"))


@pytest.mark.parametrize("make", [
    lambda **to: AnthropicCompletion(**to), lambda **to: FakeModel(**to), lambda **to: OpenAiCompletion(**to),
    lambda **to: OpenAiEmbedding(**to), lambda **to: Rss(url="https://x.example.com/f", **to)])
def test_the_output_table_is_the_first_argument_or_into(make):
    with declaring(App("into")):
        answers = Table("answers")
        assert make(into=answers).into is answers
        with pytest.raises(UnknownOption, match='"table" of .*It takes: .*into, '):
            make(table=answers)


def test_a_secret_of_a_wrong_type_is_not_shown():
    with declaring(App("typed")), pytest.raises(BadOption) as caught:
        OpenAiCompletion(Table("answers"), api_key={"value": SECRET})  # type: ignore[arg-type]
    assert SECRET not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize("one", installed(), ids=lambda one: one.name)
def test_an_unknown_keyword_is_refused_with_component_and_place(one):
    with declaring(App("typed")), pytest.raises(UnknownOption, match=rf'"tiemout" of {one.name}'):
        MADE_WITH.get(one.name, lambda cls: cls(Table("t"), tiemout=1))(one.cls)


MADE_WITH: dict[str, Callable[[Any], Any]] = {
    "OpenAiFineTune": lambda cls: cls("x", examples=sql("select 1"), tiemout=1),
    "Rss": lambda cls: cls(Table("t"), "https://x.example.com/f", tiemout=1),
    "HttpRequest": lambda cls: cls("https://x.example.com", tiemout=1),
    "SlackPostMessage": lambda cls: cls(tiemout=1), "SlackReact": lambda cls: cls(tiemout=1),
    "SlackUpdateMessage": lambda cls: cls(tiemout=1), "SlackReply": lambda cls: cls(tiemout=1),
    "SendWebhook": lambda cls: cls(secret="x", tiemout=1), "S3Put": lambda cls: cls("b", tiemout=1),
    "SendEmail": lambda cls: cls("h", sender="a@b.example", tiemout=1),
    "PostgresWrite": lambda cls: cls("x", "t", tiemout=1),
    "GitHubComment": lambda cls: cls("a/b", tiemout=1), "GitHubIssue": lambda cls: cls("a/b", tiemout=1),
    "GitHubLabel": lambda cls: cls("a/b", ["c"], tiemout=1)}


# Connections


@pytest.fixture
def connected(monkeypatch) -> Iterator[App]:
    monkeypatch.delenv("EU_KEY", raising=False)
    app = App("connected")
    app.settings = Settings(name="connected", connections=(
        Connection(name="openai-eu", service="openai", api_key="env:EU_KEY", base_url="https://eu.example.com/v1"),
        Connection(name="team", service="Slack", oauth_token="env:TEAM_TOKEN")))
    with declaring(app):
        yield app


def test_a_connection_goes_before_a_key_that_is_given_and_brings_its_address(connected, monkeypatch):
    monkeypatch.setenv("EU_KEY", "sk-eu")
    made = OpenAiCompletion(Table("t"), connection="openai-eu", api_key="sk-given")
    assert (made.credential(), made.base_url, made.host) == ("sk-eu", "https://eu.example.com/v1", "eu.example.com")
    assert OpenAiCompletion(Table("u"), connection="openai-eu", base_url="https://x/v1").base_url == "https://x/v1"
    assert "sk-eu" not in repr(made) and "openai-eu" in repr(made)


def test_no_other_key_goes_to_a_connection_that_is_not_set(connected, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-usual")
    made = OpenAiCompletion(Table("t"), connection="openai-eu", api_key="sk-given")
    assert made.credential() is None and made.unset() == "EU_KEY" and made.stands_in()


@pytest.mark.parametrize("name, said", [
    ("openai-ue", 'Did you mean "openai-eu".*It has: openai-eu, team.*To add one'),
    ("team", 'of the service "openai": openai-eu. "team" is of "Slack"')])
def test_a_connection_that_is_not_there_or_of_another_service_is_refused(name, said, connected):
    with pytest.raises(BadOption, match=said):
        OpenAiCompletion(Table("t"), connection=name)


def test_a_token_is_of_a_connection_too(connected, monkeypatch):
    monkeypatch.setenv("TEAM_TOKEN", "xoxb-team")
    assert SlackPostMessage(connection="team").credential() == "xoxb-team"
    assert SlackReact(connection="team").credential() == "xoxb-team"
