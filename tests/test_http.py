"""HttpRequest on the wire: what is sent, what comes back, and where it does not go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from anton_components.vendor.http.action import HttpRequest
from anton_components.vendor.rss.poll import Rss
from desk import know, sql
from kept import everything
from peers import served
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from anton import Approval, Table, action, env
from anton.app import App, declaring
from anton.errors import BadOption, InvalidRecord
from anton.reach import addresses, is_public
from anton.secret import hush_clients
from anton.verify import Verifier

pytestmark = pytest.mark.once("wires of components: the server is asked for the same")

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Peer:
    def __init__(self) -> None:
        self.got: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: list[Response] = []
        self.url = ""

    async def take(self, request: Request) -> Response:
        """Refuses what has no key; else notes the request."""
        body = await request.body()
        if not request.headers.get("idempotency-key"):
            return JSONResponse({"error": "no key"}, 400)
        answer = self.answers.pop(0) if self.answers else JSONResponse({"id": 9})
        self.got.append((request.method, request.url.path, dict(request.headers), body))
        return answer


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    with served(Route("/{path:path}", made.take, methods=["GET", "POST", "PUT"])) as url:
        made.url = url
        yield made


def ask(app: Any, *records: dict[str, Any], **options: Any) -> None:
    with declaring(app.app):
        orders, answers = Table("orders"), Table("answers")
        path = options.pop("url")
        orders.on_new_records(HttpRequest(path, into=answers, **options))
    app.migrate()
    orders.extend(records)
    app.run()


def test_a_request_is_made_of_the_record_and_what_comes_back_is_written(live, peer):
    ask(live, {"number": "a/b", "total": 5}, url=f"{peer.url}/orders/{{number}}", private=True, secret="tok",
        json={"sum": "{total}", "text": "total {total}"}, headers={"X-Shop": "1"})
    ((method, path, headers, body),) = peer.got
    assert (method, path, body) == ("POST", "/orders/a/b", b'{"sum":5,"text":"total 5"}')
    assert (headers["authorization"], headers["x-shop"]) == ("Bearer tok", "1")
    (call,) = live.outbox
    assert call.key == headers["idempotency-key"] and "tok" not in str(call.args)
    (answer,) = live.records("answers")
    assert (answer["status"], answer["body"]) == (200, {"id": 9}) and answer["record_id"] is not None


@pytest.mark.parametrize("answer", [
    lambda url: JSONResponse({"told": ["sesame-open-1 Bearer key-of-shop-2", {"key-of-shop-2": 1}]}),
    lambda url: Response("x" * 999_990 + "key-of-shop-2 key-of-shop-2"),
    lambda url: Response("key-of-shop-2 is wrong, so is sesame-open-1", 401),
    lambda url: RedirectResponse(f"{url}/there?key=key-of-shop-2", 303, headers={"x-told": "sesame-open-1"})])
def test_a_secret_in_a_header_is_hidden_where_the_service_repeats_it(answer, live, peer, monkeypatch, caplog):
    monkeypatch.setenv("SHOP_KEY", "Bearer key-of-shop-2")
    caplog.set_level("DEBUG")
    hush_clients()
    peer.answers = [answer(peer.url)]
    ask(live, {"total": 5}, url=f"{peer.url}/x", private=True, allow=["127.0.0.1"],
        headers={"X-Shop": env("SHOP_KEY"), "X-Token": "sesame-open-1", "Accept": "application/json"})
    sent = peer.got[0][2]
    assert (sent["x-shop"], sent["x-token"]) == ("Bearer key-of-shop-2", "sesame-open-1")
    kept = "".join(rows for _, rows in everything(live)) + caplog.text + str(live.dead) + str(live.app.handlers)
    assert "key-of-sho" not in kept and "sesame-open" not in kept
    assert all(len(row["body"]) <= 1_000_000 for row in live.records("answers") if isinstance(row["body"], str))


def test_a_header_whose_variable_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("SHOP_KEY", raising=False)
    with declaring(App("shop")):
        made = HttpRequest("https://api.example.com/x", headers={"X-Shop": env("SHOP_KEY")})
        feed = Rss(Table("news"), "https://example.com/feed.xml", headers={"X-Shop": env("SHOP_KEY")})
    assert made.unset() == feed.unset() == "SHOP_KEY"


def test_a_signed_one_is_a_standard_webhook(live, peer):
    ask(live, {"total": 5}, url=f"{peer.url}/hook", private=True, secret=SECRET, sign="standard_webhooks")
    ((_, _, headers, body),) = peer.got
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert Verifier("standard_webhooks", SECRET).check(body, pairs, now=time.time()) is None
    assert headers["webhook-id"] == live.outbox[0].key


@pytest.mark.parametrize("status, state, dead", [(404, "failed", 1), (500, "unknown", 0), (429, "retrying", 0)])
def test_an_answer_says_what_became_of_the_call(status, state, dead, live, peer):
    peer.answers = [JSONResponse({}, status)]
    ask(live, {"total": 5}, url=f"{peer.url}/x", private=True)
    assert ([call.state for call in live.calls], len(live.dead)) == ([state], dead)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.7", "[::ffff:10.0.0.7]",
                                  "0.0.0.0"])
def test_nothing_goes_into_a_private_network(host, live, peer):
    port = peer.url.rpartition(":")[2]
    ask(live, {"total": 5}, url=f"http://{host}:{port}/x")
    assert peer.got == [] and [call.state for call in live.calls] == ["failed"]


def test_a_secret_stays_with_its_origin_and_is_not_brought_back_from_another(live, peer):
    other = peer.url.replace("127.0.0.1", "localhost")
    peer.answers = [RedirectResponse(f"{other}/there", 307), RedirectResponse(f"{peer.url}/back", 307)]
    ask(live, {"total": 5}, url=f"{peer.url}/x", private=True, secret="tok", headers={"X-Shop": "1"},
        allow=["127.0.0.1", "localhost"])
    assert [path for _, path, _, _ in peer.got] == ["/x", "/there", "/back"]
    assert peer.got[0][2]["authorization"] == "Bearer tok"
    assert [name for _, _, sent, _ in peer.got[1:] for name in ("authorization", "x-shop") if name in sent] == []


@pytest.mark.parametrize("secret, allow, there", [
    (False, None, "{other}/there"), (True, None, "{other}/there"), (False, ["http://127.0.0.1:*/x*"], "/y")])
def test_a_redirect_leads_to_nothing_that_is_not_allowed(secret, allow, there, live, peer, monkeypatch):
    monkeypatch.setenv("PARTNER_URL", f"{peer.url}/x")
    peer.answers = [RedirectResponse(there.format(other=peer.url.replace("127.0.0.1", "localhost")), 307)]
    ask(live, {"total": 5}, url=env("PARTNER_URL") if secret else f"{peer.url}/x", private=True, allow=allow)
    assert len(peer.got) == 1 and [call.state for call in live.calls] == ["unknown"]


@pytest.mark.parametrize("there, answer", [("/done", 404), ("/done", 429), ("http://127.0.0.1:1/done", None)])
def test_what_was_taken_before_a_redirect_that_fails_is_not_sent_again(there, answer, live, peer):
    peer.answers = [RedirectResponse(there, 303)] + ([JSONResponse({}, answer)] if answer else [])
    ask(live, {"total": 5}, url=f"{peer.url}/x", private=True, allow=["127.0.0.1"])
    live.advance("1h")
    assert [call.state for call in live.calls] == ["unknown"]
    assert [method for method, _, _, _ in peer.got].count("POST") == 1


def test_what_cannot_be_is_refused_where_it_is_declared():
    with pytest.raises(BadOption, match="host is fixed"):
        HttpRequest("https://{host}/x")
    with pytest.raises(BadOption, match="POST"):
        HttpRequest("https://a.example.com", method="TRACE")


async def test_an_address_inside_of_another_counts_as_itself():
    for text in ("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"):
        assert not is_public((await addresses(text, 80))[0])
    assert is_public((await addresses("1.1.1.1", 80))[0])


def test_an_address_that_is_a_secret_is_in_no_table_error_or_log(live, peer, monkeypatch, caplog):
    monkeypatch.setenv("PARTNER_URL", f"{peer.url}/hooks/T0/s3cr3t?k=s3cr3t")
    caplog.set_level("DEBUG")
    peer.answers = [JSONResponse({"error": "busy"}, 503), JSONResponse({"id": 9}), JSONResponse({}, 404)]
    ask(live, {"total": 5}, url=env("PARTNER_URL"), private=True, effect="idempotent")
    live.advance("5m")
    live.tables["orders"].append({"total": 6})
    live.run()
    assert [path for _, path, _, _ in peer.got] == ["/hooks/T0/s3cr3t"] * 3
    (answer,) = live.records("answers")
    assert answer["url"] == f"{peer.url}/***"
    assert [call.state for call in live.calls] == ["sent", "failed"]
    kept = dict(everything(live))
    assert any("/***" in rows for rows in kept.values())
    assert [where for where, rows in kept.items() if "s3cr3t" in rows] == []
    assert "s3cr3t" not in caplog.text


def test_a_secret_address_that_leads_elsewhere_now_is_not_called(live, peer, monkeypatch):
    monkeypatch.setenv("PARTNER_URL", f"{peer.url}/a")
    peer.answers = [JSONResponse({"error": "busy"}, 503)]
    ask(live, {"total": 5}, url=env("PARTNER_URL"), private=True, effect="idempotent")
    monkeypatch.setenv("PARTNER_URL", "http://other.example/a")
    live.advance("5m")
    assert len(peer.got) == 1 and [call.state for call in live.calls] == ["unknown"]  # a 503 may have happened
    assert "PARTNER_URL" in live.dead[0].error


def test_what_an_answer_says_comes_from_outside(live, peer):
    seen = []
    with declaring(live.app):
        orders, answers = Table("orders"), Table("answers")
        orders.on_new_records(HttpRequest(f"{peer.url}/x", into=answers, private=True))

        @action(policy=lambda call: seen.append(call.taint) or "send")
        def tell(text: str) -> None: ...

        @answers.on_new_records(each=True)
        def pass_on(answer: Any) -> None:
            tell.send(str(answer["body"]))

    live.migrate()
    orders.append({"total": 5})
    live.run()
    assert seen == [["answers HttpRequest"]]


def test_a_call_by_psql_leads_to_no_other_host(live, peer):
    ask(live, {"total": 5}, url=f"{peer.url}/x", private=True)
    other = peer.url.replace("127.0.0.1", "localhost")
    live._fetch("insert into anton.action (app, name, args) values ('" + live.app.name + "', 'HttpRequest', "
                f"jsonb_build_object('method', 'POST', 'url', '{other}/x', 'json', null)) returning id")
    live.run()
    assert len(peer.got) == 1 and [call.state for call in live.calls] == ["sent", "refused"]


@pytest.mark.parametrize("wrong", [{"method": "DELETE"}, {"url": "ftp://x"}, {"headers": {"X-Shop": "2"}}])
def test_a_call_by_psql_or_an_edit_is_of_the_method_and_the_shape_of_its_component(wrong, live, peer):
    ask(live, {"total": 5}, url=f"{peer.url}/x", private=True, approve=Approval("ann"))
    know(live, "ann")
    (asked,) = live.approvals
    with pytest.raises(InvalidRecord, match=next(iter(wrong))):
        asked.approve(by="ann", edit=wrong)
    asked.approve(by="ann", edit={"json": {"total": 4}})
    sql(live, "insert into anton.action (app, name, args) values ($1, 'HttpRequest', $2)", live.app.name,
        {"method": "POST", "url": f"{peer.url}/x", "json": None, **wrong})
    live.run()
    assert [(method, body) for method, _, _, body in peer.got] == [("POST", b'{"total":4}')]
    assert [call.state for call in live.calls] == ["sent", "refused"] and next(iter(wrong)) in live.calls[1].error
