"""Delivery ids: the same over retries and replays, never the same for two events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anton.sent import Sent
from anton.verify import SCHEMES, Hmac, Verifier, public_url

Raw = list[tuple[bytes, bytes]]
FORM: Raw = [(b"content-type", b"application/x-www-form-urlencoded")]


def id_of(name: str, body: Any, headers: dict[str, str] | None = None) -> str | None:
    raw = [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()]
    made = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Verifier(name, SCHEMES[name].pair("a-secret-of-more-than-32-characters")[1]).delivery_id(raw, made)


@pytest.mark.parametrize("name, body, headers, id", [
    ("github", {}, {"X-GitHub-Delivery": "72d3162e-cc78"}, "72d3162e-cc78"),
    ("stripe", {"id": "evt_1"}, {}, "evt_1"),
    ("slack", {"event_id": "Ev1"}, {}, "Ev1"),
    ("standard_webhooks", {}, {"webhook-id": "msg_1"}, "msg_1"),
    ("telegram", {"update_id": 99}, {}, "99"),
    ("line", {"events": [{"webhookEventId": "01"}]}, {}, "01"),
    ("coinbase_commerce", {"event": {"id": "e"}}, {}, "e"),
    ("gitlab", {}, {"X-Gitlab-Event-UUID": "u", "Idempotency-Key": "k"}, "k"),
    ("gocardless", {"events": [{"id": "EV1"}, {"id": "EV2"}], "meta": {"webhook_id": "WB1"}}, {}, "WB1"),
    ("box", {"id": "b"}, {"BOX-DELIVERY-ID": "d"}, "b"),
])
def test_the_id_is_that_of_the_service(name, body, headers, id):
    assert id_of(name, body, headers) == id


@pytest.mark.parametrize("name, body, headers", [
    ("github", {"id": "1"}, {}), ("stripe", {}, {}), ("stripe", {"id": None}, {}), ("stripe", {"id": {"a": 1}}, {}),
    ("stripe", b"{", {}), ("stripe", b"\xff", {}), ("stripe", [], {}),
    ("stripe", {"id": 123456789012345678901}, {}), ("stripe", {"id": 1.5}, {}), ("line", {"events": []}, {}),
    ("line", {"events": [{"webhookEventId": "1"}, {}]}, {}), ("line", {"events": {"webhookEventId": "1"}}, {}),
    ("gitlab", {}, {"X-Gitlab-Event-UUID": "shared by hooks that hooks set off"}),
    ("dropbox", {"list_folder": {"accounts": ["dbid:1"]}}, {}), ("webex", {"id": "the hook's", "created": "its"}, {}),
    ("google_channels", b"", {"X-Goog-Channel-ID": "c"}),
    ("clickup", {"webhook_id": "w", "event": "taskDeleted", "task_id": "t"}, {}),
])
def test_without_one_every_request_is_a_delivery(name, body, headers):
    assert id_of(name, body, headers) is None


def test_a_doubled_header_is_no_id():
    one = Verifier("github", "k")
    assert one.delivery_id([(b"x-github-delivery", b"a"), (b"X-GitHub-Delivery", b"b")], b"{}") is None


@pytest.mark.parametrize("name, one, other", [
    ("line", {"events": [{"webhookEventId": "1"}]}, {"events": [{"webhookEventId": "1"}, {"webhookEventId": "2"}]}),
    ("line", {"events": [{"webhookEventId": "1,2"}]}, {"events": [{"webhookEventId": "1"}, {"webhookEventId": "2"}]}),
    ("facebook", {"entry": [{"id": "1", "time": 1, "changes": [1]}]},
     {"entry": [{"id": "1", "time": 1, "changes": [2]}]}),
    ("postmark", {"MessageID": "m", "RecordType": "Open", "ReceivedAt": "1"},
     {"MessageID": "m", "RecordType": "Open", "ReceivedAt": "2"}),
    ("clickup", {"webhook_id": "w", "event": "taskUpdated", "history_items": [{"id": "1"}]},
     {"webhook_id": "w", "event": "taskStatusUpdated", "history_items": [{"id": "1"}]}),
    ("clickup", {"webhook_id": "w", "event": "taskUpdated", "history_items": [{"id": "1"}]},
     {"webhook_id": "v", "event": "taskUpdated", "history_items": [{"id": "1"}]}),
    ("stripe", {"id": "a" * 500}, {"id": "a" * 501}), ("stripe", {"id": "a b"}, {"id": "a  b"}),
    ("stripe", {"id": "\x00"}, {"id": "\x01"}), ("stripe", {"id": "é"}, {"id": "è"}),
])
def test_two_events_have_two_ids(name, one, other):
    first, second = id_of(name, one), id_of(name, other)
    assert first and second and first != second and id_of(name, one) == first
    for id in (first, second):
        assert len(id) <= 200 and id.isascii() and id.isprintable()


def test_woocommerce_gives_one_id_to_all_of_a_second_so_the_body_counts():
    headers = {"X-WC-Webhook-Delivery-ID": "d"}
    assert id_of("woocommerce", {"id": 1}, headers) != id_of("woocommerce", {"id": 2}, headers)
    assert id_of("woocommerce", {"id": 1}, headers) == id_of("woocommerce", {"id": 1}, headers)


def test_hubspots_next_try_is_the_same_delivery():
    def batch(attempt: int, event: int = 1) -> list[dict[str, Any]]:
        return [{"eventId": event, "subscriptionId": 2, "objectId": 3, "occurredAt": 4, "attemptNumber": attempt}]

    assert id_of("hubspot", batch(0)) == id_of("hubspot", batch(1)) != id_of("hubspot", batch(0, event=9))


def test_a_slack_command_has_no_id_so_the_signed_bytes_are_it():
    scheme, one = SCHEMES["slack"], Verifier("slack", "k")
    body = b"command=%2Fx&trigger_id=1"

    def sent(at: str, text: bytes = body) -> Raw:
        return FORM + [(key.encode(), value.encode()) for key, value in scheme.sign(text, "k", at).items()]

    id = one.delivery_id(sent("1790000000"), body)
    assert id == one.delivery_id(sent("1790000000"), body)
    assert id != one.delivery_id(sent("1790000001"), body)
    assert id != one.delivery_id(sent("1790000000", body + b"2"), body + b"2")
    event = b'{"event_id": "Ev1"}'
    assert one.delivery_id(sent("1790000000", event)[1:], event) == "Ev1"


def test_rewriting_the_signature_header_makes_no_new_delivery():
    scheme = SCHEMES["elevenlabs"]
    made = scheme.sign(b"{}", "k", "1790000000")["ElevenLabs-Signature"]
    one = Verifier("elevenlabs", "k")
    ids = set()
    for text in (made, made.upper().replace("T=", "t=").replace("V0=", "v0="), made + ",v0=" + "0" * 64, made + ",x=1"):
        raw = [(b"elevenlabs-signature", text.encode())]
        assert one.check(b"{}", raw, 1_790_000_000.0) is None
        ids.add(one.delivery_id(raw, b"{}"))
    assert len(ids) == 1


def test_an_hmac_of_your_own_says_where_its_id_is():
    own = Hmac("X-Sig", ids=("header:X-Id", "body:meta.id"))
    assert Verifier(own, "k").delivery_id([(b"x-id", b"1")], b"{}") == "1"
    assert Verifier(own, "k").delivery_id([], b'{"meta": {"id": 2}}') == "2"
    assert Verifier(own, "k").delivery_id([], b"{}") is None
    assert Verifier(Hmac("X-Sig"), "k").delivery_id([], b"{}") is None
    assert Verifier(False).delivery_id([], b"{}") is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=3)), max_size=4))
def test_a_field_that_is_sent_twice_is_missing(pairs):
    body = "&".join(f"{name}={''.join(f'%{byte:02x}' for byte in value.encode())}" for name, value in pairs).encode()
    sent = Sent(body, FORM)
    for name in "ab":
        given = [value for key, value in pairs if key == name]
        assert sent.one(f"body:{name}") == (given[0] if len(given) == 1 else None)


@pytest.mark.parametrize("base, url", [
    ("", "http://shop.test:3000/in/%2F?a=%20"), ("https://hooks.example.com", "https://hooks.example.com/in/%2F?a=%20"),
    ("https://example.com/app/", "https://example.com/app/in/%2F?a=%20")])
def test_the_public_url_keeps_what_was_escaped(base, url):
    assert public_url(base, "http", [(b"Host", b"shop.test:3000")], b"/in/%2F", b"a=%20") == url
