"""Handshakes: each service hears what it wants, forgers hear nothing, and no event is taken for one."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from typing import Any

import pytest

from anton.errors import BadOption
from anton.secret import env
from anton.verify import SCHEMES, Reply, Verifier

NOW = 1_790_000_000.0
URL = "https://hooks.example.com/in"
TEXT = "a-secret-of-more-than-32-characters"
Raw = list[tuple[bytes, bytes]]


def verifier(name: str) -> Verifier:
    secret = SCHEMES[name].pair(TEXT)[1]
    asks = any(shake.wants_token for shake in SCHEMES[name].handshakes)
    return Verifier(name, {"secret": secret, "token": "our-token"} if asks else secret, of=f"/{name}")


def raw(headers: dict[str, str]) -> Raw:
    return [(key.lower().encode(), value.encode()) for key, value in headers.items()]


def signed(name: str, body: bytes, secret: str = TEXT, **more: str) -> Raw:
    scheme = SCHEMES[name]
    return raw(scheme.sign(body, scheme.pair(secret)[0], scheme.stamp(NOW), url=URL) | more)


def ask(name: str, payload: Any, headers: Raw | None = None, *, method: str = "POST", query: str = "") -> Reply | None:
    body = b"" if payload is None else json.dumps(payload).encode()
    headers = signed(name, body) if headers is None else headers
    return verifier(name).handshake(body, headers, NOW, method=method, url=URL + query)


def told(reply: Reply | None) -> Any:
    assert reply is not None and reply.status == 200
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    kind = reply.headers.get("Content-Type", "")
    assert not reply.body or kind in ("text/plain; charset=utf-8", "application/json")
    return json.loads(reply.body) if kind == "application/json" else reply.body.decode()


# Signed ones: the same question with another signature is no handshake, and then refused

ASKED: dict[str, tuple[Any, dict[str, str], Any]] = {
    "slack": ({"type": "url_verification", "token": "t", "challenge": "3eZbrw1aB"}, {}, "3eZbrw1aB"),
    "discord": ({"type": 1, "id": "9", "version": 1}, {}, {"type": 1}),
    "github": ({"zen": "Keep it logically awesome."}, {"X-GitHub-Event": "ping"}, "pong"),
    "twitch": ({"challenge": "pogchamp", "subscription": {}},
               {"Twitch-Eventsub-Message-Type": "webhook_callback_verification"}, "pogchamp"),
    "front": ({}, {"X-Front-Challenge": "c1"}, "c1"),
    "google_channels": (None, {"X-Goog-Resource-State": "sync"}, ""),
    "zoom": ({"event": "endpoint.url_validation", "payload": {"plainToken": "qgg8vlvZRS6UYooatFL8Aw"}}, {},
             {"plainToken": "qgg8vlvZRS6UYooatFL8Aw",
              "encryptedToken": hmac.new(TEXT.encode(), b"qgg8vlvZRS6UYooatFL8Aw", "sha256").hexdigest()}),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_signed_question_is_answered_and_a_forged_one_is_not(name):
    payload, headers, reply = ASKED[name]
    body = b"" if payload is None else json.dumps(payload).encode()
    assert told(ask(name, payload, signed(name, body, **headers))) == reply
    for bad in (signed(name, body, "another-secret-of-more-than-32-characters", **headers), raw(headers)):
        assert ask(name, payload, bad) is None
        assert verifier(name).check(body, bad, NOW)
    if verifier(name).timed:
        late = verifier(name).handshake(body, signed(name, body, **headers), NOW + 10_000)
        assert late is None


def test_discord_asks_about_event_webhooks_in_another_way_and_its_events_are_none():
    reply = ask("discord", {"version": 1, "application_id": "1", "type": 0})
    assert reply is not None and (reply.status, reply.body) == (204, b"")
    assert ask("discord", {"version": 1, "type": 1, "event": {"type": "APPLICATION_AUTHORIZED"}}) is None
    assert ask("discord", {"type": 2, "id": "1"}) is None


def test_figma_proves_its_ping_with_the_passcode():
    asked = {"event_type": "PING", "passcode": TEXT, "timestamp": "2026-01-01T00:00:00Z"}
    assert told(ask("figma", asked, [])) == ""
    assert ask("figma", asked | {"passcode": "x"}, []) is None
    assert ask("figma", asked | {"event_type": "FILE_UPDATE"}, []) is None


# Those before anything is agreed

META = "?hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token="


@pytest.mark.parametrize("name", ["facebook", "facebook_lead_ads", "instagram", "whatsapp"])
def test_meta_must_know_our_verify_token(name, caplog):
    assert told(ask(name, None, [], method="GET", query=META + "our-token")) == "1158201444"
    for other in ("", "our-toke", "our-token2", TEXT):
        wrong = ask(name, None, [], method="GET", query=META + other)
        assert wrong is not None and wrong.status == 403 and b"1158201444" not in wrong.body
    assert verifier(name).methods == {"GET"} and verifier(name).addressed
    for query in ("", "?hub.mode=subscribe", META.replace("subscribe", "x") + "our-token",
                  META + "our-token&hub.verify_token=our-token"):
        assert ask(name, None, [], method="GET", query=query) is None
    without = Verifier(name, TEXT, of="/meta")
    refused = without.handshake(b"", [], NOW, method="GET", url=URL + META + "our-token")
    assert refused is not None and refused.status == 403
    assert 'secret={"secret": …, "token": env("…")}' in caplog.text


def test_the_verify_token_signs_no_event():
    body = b'{"object": "page"}'
    forged = raw(SCHEMES["facebook"].sign(body, "our-token"))
    assert verifier("facebook").check(body, forged, NOW)
    assert verifier("facebook").unset() is None
    assert Verifier("facebook", {"token": "our-token", "secret": env("NO_SUCH_SECRET")}, of="/x").unset()


def test_a_verify_token_is_only_for_services_that_ask_for_one():
    with pytest.raises(BadOption, match="only for a service that asks"):
        Verifier("github", {"secret": "a", "token": "b"}, of="/x")
    with pytest.raises(BadOption, match='Did you mean "token"'):
        Verifier("facebook", {"secret": "a", "tokn": "b"}, of="/x")
    with pytest.raises(BadOption, match="secret=env"):
        Verifier("facebook", {"token": "b"}, of="/x")


def test_strava_gets_json():
    assert told(ask("strava", None, [], method="GET", query=META + "our-token")) == {"hub.challenge": "1158201444"}


@pytest.mark.parametrize("name, method, query, headers, reply", [
    ("dropbox", "GET", "?challenge=abc%20d", {}, "abc d"),
    ("onfleet", "GET", "?check=1234", {}, "1234"),
    ("microsoft_graph", "POST", "?validationToken=Validation%3A+Testing", {}, "Validation: Testing"),
    ("okta", "GET", "", {"X-Okta-Verification-Challenge": "v"}, {"verification": "v"}),
    ("trello", "HEAD", "", {}, ""), ("intercom", "HEAD", "", {}, ""), ("surveymonkey", "HEAD", "", {}, ""),
    ("mandrill", "HEAD", "", {}, ""), ("mailchimp", "GET", "", {}, ""),
])
def test_an_unsigned_question_is_answered(name, method, query, headers, reply):
    assert told(ask(name, None, raw(headers), method=method, query=query)) == reply
    assert method == "POST" or verifier(name).methods == {method}
    assert ask(name, {"id": 1}, [], query="") is None                  # an event of the same service


def test_asana_gets_its_secret_back():
    reply = ask("asana", {}, raw({"X-Hook-Secret": "b537207f20cbfa02357cf448134da559"}))
    assert reply is not None and reply.headers["X-Hook-Secret"] == "b537207f20cbfa02357cf448134da559"
    assert ask("asana", {"events": []}) is None


def test_monday_gets_its_challenge_back_and_an_event_is_none():
    assert told(ask("monday", {"challenge": "c1"}, [])) == {"challenge": "c1"}
    assert ask("monday", {"challenge": "c1", "event": {"type": "create_item"}}, []) is None


def test_woocommerces_ping_is_a_form_without_a_signature():
    form = [(b"content-type", b"application/x-www-form-urlencoded")]
    one = verifier("woocommerce")
    assert told(one.handshake(b"webhook_id=42", form, NOW)) == ""
    body = b'{"webhook_id": 1}'
    assert one.handshake(body, signed("woocommerce", body), NOW) is None


def test_notions_token_is_shown_while_it_is_not_set_and_only_then(caplog, monkeypatch):
    monkeypatch.delenv("NOTION_TOKEN", raising=False)
    asked = json.dumps({"verification_token": "secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl"}).encode()
    one = Verifier("notion", env("NOTION_TOKEN"), of="/notion")
    with caplog.at_level(logging.WARNING):
        assert told(one.handshake(asked, [], NOW)) == ""
    assert 'env("NOTION_TOKEN"): secret_tMrlL1qK5' in caplog.text
    caplog.clear()
    monkeypatch.setenv("NOTION_TOKEN", "secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl")
    assert told(one.handshake(asked, [], NOW)) == "" and "secret_tMrlL1qK5" not in caplog.text
    event = b'{"id": "1", "verification_token": "x"}'
    made = raw(SCHEMES["notion"].sign(event, "secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl"))
    assert one.handshake(event, made, NOW) is None and one.check(event, made, NOW) is None


# What a handshake signs must never be an event

EVENTS = ['{"tweet_create_events": []}', "v0:1790000000:{}", "[1,2,3,4,5]", "12345678", "a=b&c=d-e-f", "true",
          '"a text"', "", "a" * 300, "1e000000000000000001", "-Infinity"]


def test_x_is_answered_and_signs_nothing_that_could_be_an_event():
    token = "MDYxNTk1YjEtNWRhYi00NDc0LWE3ZGYtYTNjZGZiYjRmNDQz"
    digest = hmac.new(TEXT.encode(), token.encode(), hashlib.sha256).digest()
    said = told(ask("x", None, [], method="GET", query=f"?crc_token={token}"))
    made = SCHEMES["x"].sign(token.encode(), TEXT)["X-Twitter-Webhooks-Signature"]
    assert said == {"response_token": made} and len(digest) == 32
    one = verifier("x")
    for event in EVENTS:
        reply = one.handshake(b"", raw({}), NOW, method="GET", url=f"{URL}?crc_token={_quoted(event)}")
        assert reply is None, event


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def test_zoom_signs_nothing_that_could_be_an_event():
    for event in EVENTS:
        asked = {"event": "endpoint.url_validation", "payload": {"plainToken": event}}
        assert ask("zoom", asked) is None, event


def test_no_long_or_doubled_text_is_sent_back():
    assert ask("dropbox", None, [], method="GET", query="?challenge=" + "a" * 5000) is None
    assert ask("dropbox", None, [], method="GET", query="?challenge=a&challenge=b") is None


def test_nobody_without_a_handshake_answers_one():
    for one in (Verifier(False), Verifier(None), Verifier(lambda body, headers: True), Verifier("stripe", "k")):
        asked = b'{"type": "url_verification", "challenge": "c"}'
        assert one.handshake(asked, [], NOW) is None and not one.methods
