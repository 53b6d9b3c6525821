"""Verify: what we sign, the services' own libraries accept; what they would refuse is refused by them here, too.

A judge gets headers by lower-case name and raises, or returns False, when it does not believe them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import Adyen.util
import discord_interactions
import pytest
import razorpay
import resend
import slack_sdk.signature
import standardwebhooks
import stripe
import svix
from gocardless_pro import webhooks as gocardless
from linebot.v3.webhook import SignatureValidator
from mailgun.security import SecurityGuard as Mailgun
from polar import webhooks as polar
from pyairtable.models.webhook import WebhookNotification
from sendgrid.helpers.eventwebhook import EventWebhook
from twilio.request_validator import RequestValidator
from workos.webhooks import _verification as workos

from anton.verify import SCHEMES, Verifier

URL = "https://hooks.example.com/in?a=1"
BODY = b'{"id": "evt_1", "type": "x", "events": [], "note": "caf\\u00e9"}'
FORM = b"To=%2B1555&From=%2B1444&Body=hi+there&Empty="
Headers = dict[str, str]
Judge = Callable[[Headers, bytes, str], Any]


def slack(headers: Headers, body: bytes, secret: str) -> Any:
    return slack_sdk.signature.SignatureVerifier(secret).is_valid_request(body, headers)


def stripe_(headers: Headers, body: bytes, secret: str) -> Any:
    return stripe.WebhookSignature.verify_header(body.decode(), headers["stripe-signature"], secret, 300)


def twilio(headers: Headers, body: bytes, secret: str) -> Any:
    fields = dict(part.split("=") for part in body.decode().replace("+", " ").replace("%2B", "+").split("&"))
    return RequestValidator(secret).validate(URL, fields, headers["x-twilio-signature"])


def twilio_shared_key(headers: Headers, body: bytes, secret: str) -> Any:
    fields = dict(part.split("=") for part in body.decode().replace("+", " ").replace("%2B", "+").split("&"))
    return RequestValidator(secret).validate(URL, fields, headers["x-twilio-signature"], "HMAC_SHA256")


def standard(headers: Headers, body: bytes, secret: str) -> Any:
    return standardwebhooks.Webhook(secret).verify(body, headers)


def svix_(headers: Headers, body: bytes, secret: str) -> Any:
    return svix.Webhook(secret).verify(body, headers)


def resend_(headers: Headers, body: bytes, secret: str) -> Any:
    given = {name: headers[f"svix-{name}"] for name in ("id", "timestamp", "signature")}
    return resend.Webhooks.verify({"payload": body.decode(), "headers": given, "webhook_secret": secret})  # type: ignore[typeddict-item]


def polar_(headers: Headers, body: bytes, secret: str) -> Any:
    return polar.validate_event(body, headers, secret, frozenset({"x"}), lambda data: data)


def line(headers: Headers, body: bytes, secret: str) -> Any:
    return SignatureValidator(secret).validate(body.decode(), headers["x-line-signature"])


def workos_(headers: Headers, body: bytes, secret: str) -> Any:
    return workos.verify_header(
        event_body=body, event_signature=headers["workos-signature"], secret=secret, tolerance=180)


def discord(headers: Headers, body: bytes, secret: str) -> Any:
    return discord_interactions.verify_key(
        body, headers["x-signature-ed25519"], headers["x-signature-timestamp"], secret)


def sendgrid(headers: Headers, body: bytes, secret: str) -> Any:
    name = "x-twilio-email-event-webhook-"
    return EventWebhook(secret).verify_signature(body.decode(), headers[name + "signature"],
                                                 headers[name + "timestamp"])


def razorpay_(headers: Headers, body: bytes, secret: str) -> Any:
    return razorpay.Utility().verify_webhook_signature(body.decode(), headers["x-razorpay-signature"], secret)


def gocardless_(headers: Headers, body: bytes, secret: str) -> Any:
    return gocardless.parse(body, secret, headers["webhook-signature"]) == []


def airtable(headers: Headers, body: bytes, secret: str) -> Any:
    return WebhookNotification.from_request(body.decode(), headers["x-airtable-content-mac"], secret)


JUDGES: dict[str, Judge] = {
    "slack": slack, "stripe": stripe_, "twilio": twilio, "twilio_shared_key": twilio_shared_key,
    "standard_webhooks": standard, "openai": standard, "replicate": standard, "dodopayments": standard,
    "svix": svix_, "clerk": svix_, "resend": resend_, "polar": polar_, "line": line,
    "workos": workos_, "discord": discord, "sendgrid": sendgrid, "razorpay": razorpay_, "gocardless": gocardless_,
    "airtable": airtable,
}
BODIES = {"twilio": FORM, "twilio_shared_key": FORM,
          "airtable": b'{"base": {"id": "b"}, "webhook": {"id": "w"}, "timestamp": "2026-01-01T00:00:00Z"}'}


def believes(judge: Judge, headers: Headers, body: bytes, secret: str) -> bool:
    try:
        return judge(headers, body, secret) is not False
    except Exception:                                                  # each has a class of its own
        return False


@pytest.mark.parametrize("name", JUDGES)
def test_the_services_own_library_accepts_what_we_sign_and_refuses_what_we_refuse(name):
    scheme, judge, body = SCHEMES[name], JUDGES[name], BODIES.get(name, BODY)
    private, secret = scheme.pair("a-secret-of-more-than-32-characters")
    now = time.time()
    headers = scheme.sign(body, private, scheme.stamp(now), url=URL)
    lower = {key.lower(): value for key, value in headers.items()}
    raw = [(key.encode(), value.encode()) for key, value in lower.items()]
    if body is FORM:
        raw.append((b"content-type", b"application/x-www-form-urlencoded"))
    verifier = Verifier(name, secret, of="/in")
    assert believes(judge, lower, body, secret)
    assert verifier.check(body, raw, now, url=URL) is None
    other = body.replace(b"hi", b"ho") if body is FORM else body.replace(b"i", b"j", 1)
    assert not believes(judge, lower, other, secret)
    assert verifier.check(other, raw, now, url=URL)


def test_mailguns_library_accepts_the_signature_that_we_accept():
    now, key, token = int(time.time()), "key-of-mailgun", "a8ce0edb2dd8301dee6c2405235584e45aa91d1e9f979f3de0"
    made = hmac.new(key.encode(), f"{now}{token}".encode(), hashlib.sha256).hexdigest()
    body = {"signature": {"timestamp": str(now), "token": token, "signature": made}, "event-data": {}}
    verifier = Verifier("mailgun", key, of="/mailgun")
    assert Mailgun.verify_webhook(key, token, now, made)
    assert verifier.check(json.dumps(body).encode(), [], now) is None
    assert verifier.delivery_id([], json.dumps(body).encode()) == token
    body["signature"]["token"] = "b" + token[1:]
    assert not Mailgun.verify_webhook(key, "b" + token[1:], now, made)
    assert verifier.check(json.dumps(body).encode(), [], now)


def adyen(**changes: Any) -> dict[str, Any]:
    return {"pspReference": "7914073381342284", "originalReference": "", "merchantAccountCode": "TestMerchant",
            "merchantReference": "TestPayment-1407325143704", "amount": {"value": 1130, "currency": "EUR"},
            "eventCode": "AUTHORISATION", "success": "true", "eventDate": "2026-01-01T00:00:00+01:00", **changes}


def test_adyens_library_makes_the_signature_that_we_accept_and_each_notification_needs_its_own():
    key = "44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056"

    def signed(item: dict[str, Any]) -> dict[str, Any]:
        made = Adyen.util.generate_notification_sig(item, key).decode()
        return {"NotificationRequestItem": item | {"additionalData": {"hmacSignature": made}}}

    def sent(*items: dict[str, Any]) -> bytes:
        return json.dumps({"live": "false", "notificationItems": list(items)}).encode()

    verifier, second = Verifier("adyen", key, of="/adyen"), signed(adyen(pspReference="8"))
    good = signed(adyen())
    # from Adyen's documentation of this key and these fields
    assert good["NotificationRequestItem"]["additionalData"]["hmacSignature"] == \
        "coqCmt/IZ4E3CzPvMY8zTjQVL5hYJUiBRg8UU+iCWo0="
    assert verifier.check(sent(good, second), [], 0) is None
    assert verifier.delivery_id([], sent(good)) != verifier.delivery_id([], sent(good, second))
    assert verifier.accepted == b"[accepted]"
    forged = json.loads(json.dumps(good))
    forged["NotificationRequestItem"]["amount"]["value"] = 1
    hidden = json.loads(json.dumps(good))                              # the true one where nobody reads it
    hidden["NotificationRequestItem"]["pspReference"] = "9"
    hidden["NotificationRequestItem"]["amount"]["pspReference"] = "7914073381342284"
    for items in ([forged], [good, forged], [hidden], [], [{}], [{"NotificationRequestItem": adyen()}]):
        assert verifier.check(sent(*items), [], 0)


# Accepted by the code of squareup 46.0.0, hubspot-api-client 12.0.0, elevenlabs 2.78.0 and box-sdk-gen 1.17.0, which
# are too large to install for this, and of paddle-python-sdk 1.16.1, which brings a package "examples" that hides ours.
AT = 1795620181.0
FROZEN = {
    "square": {"x-square-hmacsha256-signature": "msAlmi+g67od4u3NRDpiqlNJ90KARt/Tfc5G5vB3Rcw="},
    "hubspot": {"x-hubspot-signature-v3": "JbSx1lZIU1Tkt+0cVyX1BjOoXl2XeebYjjJdd3yibRI=",
                "x-hubspot-request-timestamp": "1795620181000"},
    "elevenlabs": {"elevenlabs-signature":
                   "t=1795620181,v0=c0de2d1fa6b533687c8f81d2c198aae7beb31b3bd274a459196546c02aecfaf8"},
    "paddle": {"paddle-signature":
               "ts=1795620181;h1=2fdc3f32683d755e6f18c429660a09e4f8b1b696c3d40925ab661c5c4e01a024"},
    "box": {"box-signature-primary": "nI6GJhHmSkXtvtSNWyA6+zVpooB6qHbIima7qMlUQGw=",
            "box-delivery-timestamp": "2026-11-25T15:23:01Z"},
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_signature_that_the_services_library_believed_passes(name):
    raw = [(key.encode(), value.encode()) for key, value in FROZEN[name].items()]
    verifier = Verifier(name, f"key-of-{name}", of="/in")
    assert verifier.check(BODY, raw, AT, url=URL) is None
    assert verifier.check(BODY + b" ", raw, AT, url=URL)
