"""Verify: what holds for every service of verify.json."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anton.errors import BadOption
from anton.scheme import Adyen, BadKey, Basic, Jwt, Scheme, Token
from anton.signed import Hmac, PublicKey, Signed
from anton.verify import DATA, SCHEMES, Verifier

NOW = 1_790_000_000.0
URL = "https://hooks.example.com/in?a=1"
TEXT = "a-secret-of-more-than-32-characters"
ENTRIES: dict[str, dict[str, Any]] = json.loads(DATA.read_text())
# No certificate, key or address has to be fetched for these; research calls their facts sure.
SURE = """
    adyen airtable asana attio box cal_com calendly chargebee clerk clickup connectwise customer_io discord dodopayments
    dropbox facebook facebook_lead_ads fathom figma folk fusionauth github gitlab gocardless google_channels help_scout
    hookdeck hubspot intercom jobber line linear mailgun microsoft_graph monday netlify openai paddle pagerduty polar
    postmark razorpay replicate resend sendgrid sentry shopify slack square standard_webhooks strava stripe surveymonkey
    svix telegram trello twilio twitch typeform webex webflow whatsapp woocommerce workos xero zendesk zoho_crm zoom
"""
Raw = list[tuple[bytes, bytes]]


def in_body(scheme: Scheme) -> bool:
    """Whether the proof stands in the body, or the URL, so that there is no header to make."""
    place = scheme.place if isinstance(scheme, Token) else scheme.headers[0] if isinstance(scheme, Signed) else ""
    return isinstance(scheme, Adyen) or place.startswith(("body:", "query:"))


HEADERS = sorted(name for name, scheme in SCHEMES.items() if not in_body(scheme))
SIGNED = [name for name in HEADERS if not isinstance(SCHEMES[name], Token | Basic | Jwt)]
BODY = json.dumps({"webhookTimestamp": int(NOW * 1000), "id": "1", "text": "é"}).encode()


def sent(name: str, body: bytes = BODY, at: float = NOW, secret: str | None = None, url: str = URL) -> Raw:
    """A request's headers, as the service would send them."""
    scheme = SCHEMES[name]
    made = scheme.sign(body, secret or scheme.pair(TEXT)[0], scheme.stamp(at), url=url)
    form = isinstance(scheme, Signed) and "{form}" in scheme.signed
    kind = [(b"Content-Type", b"application/x-www-form-urlencoded" if form else b"application/json")]
    return kind + [(key.encode(), value.encode()) for key, value in made.items()]


def verifier(name: str, secret: str | None = None) -> Verifier:
    return Verifier(name, secret or SCHEMES[name].pair(TEXT)[1], of=f"/{name}")


def test_the_services_whose_facts_are_sure_are_all_named():
    sure = SURE.split()
    assert len(sure) == 68
    assert {name for name, entry in ENTRIES.items() if entry["sure"] == "high"} == {*sure, "twilio_shared_key"}


@pytest.mark.parametrize("name", HEADERS)
def test_what_the_service_signs_passes_and_nothing_else_does(name):
    one, good = verifier(name), sent(name)
    assert one.check(BODY, good, NOW, url=URL) is None
    other = SCHEMES[name].pair("another-secret-of-more-than-32-characters")[1]
    assert verifier(name, other).check(BODY, good, NOW, url=URL)
    assert one.check(BODY, good[:1], NOW, url=URL)
    for index in range(1, len(good)):
        key, value = good[index]
        if key.decode() in _ids(SCHEMES[name]):
            continue                                                   # the id, where it is not signed
        for odd in (value[:-1], value + b"A", b"", b"\x00", b"v1,", value.swapcase()[::-1]):
            assert one.check(BODY, [*good[:index], (key, odd), *good[index + 1:]], NOW, url=URL), (key, odd)
        assert one.check(BODY, [*good, (key.upper(), value)], NOW, url=URL), "it is there twice"
        assert one.check(BODY, [*good[:index], *good[index + 1:]], NOW, url=URL), "it is missing"


def _ids(scheme: Scheme) -> set[str]:
    """The headers of the delivery id that are not signed."""
    bound = scheme.id_header if isinstance(scheme, Signed) else None
    return set(scheme.delivery("x")) - {bound}


@pytest.mark.parametrize("name", SIGNED)
def test_another_body_is_refused(name):
    one, good = verifier(name), sent(name)
    for other in (BODY + b" ", BODY[:-1], BODY.replace(b'"1"', b'"2"'), json.dumps(json.loads(BODY)).encode() + b"\n",
                  b"", b"{}"):
        assert one.check(other, good, NOW, url=URL)


@pytest.mark.parametrize("name", [name for name in HEADERS if SCHEMES[name].timed])
def test_an_old_time_is_told_from_a_bad_signature(name):
    one, scheme = verifier(name), SCHEMES[name]
    late = 10_000
    stale = one.check(BODY, sent(name), NOW + late, url=URL)
    assert stale is not None and stale.stale
    if not isinstance(scheme, Jwt):
        early = one.check(BODY, sent(name), NOW - late, url=URL)
        assert early is not None and early.stale
        assert one.check(BODY, sent(name), NOW + scheme.tolerance - 1, url=URL) is None   # type: ignore[attr-defined]
    forged = sent(name, secret=SCHEMES[name].pair("another-secret-of-more-than-32-characters")[0])
    refusal = one.check(BODY, forged, NOW + late, url=URL)
    assert refusal is not None and not refusal.stale


@pytest.mark.parametrize("name", [name for name in HEADERS if SCHEMES[name].addressed])
def test_another_url_is_refused(name):
    assert verifier(name).addressed
    for url in ("https://hooks.example.com/other", URL + "&b=2", URL.replace("hooks", "evil"), ""):
        assert verifier(name).check(BODY, sent(name), NOW, url=url)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_secret_and_an_unusable_one_let_nobody_in(name, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    raw = sent(name) if name in HEADERS else []
    for secret in ("", "xxxx"):
        one = Verifier(name, secret, of="/x")
        assert one.unset()
        refusal = one.check(BODY, raw, NOW, url=URL)
        assert refusal is not None and "no secret is set" in refusal.why


@pytest.mark.parametrize("name, secret", [
    ("standard_webhooks", "whsec_ "), ("standard_webhooks", "not base64!"), ("adyen", "xyz1"), ("discord", "abcd"),
    ("discord", "zz" * 32), ("sendgrid", "MFkw"), ("chargebee", "ann"), ("wise", "-----BEGIN PUBLIC KEY-----")])
def test_a_secret_that_cannot_be_one_is_named_before_the_first_request(name, secret):
    one = Verifier(name, secret, of="/x")
    assert "it must be" in (one.unset() or "") and secret not in (one.unset() or "")
    good = Verifier(name, [secret, SCHEMES[name].pair(TEXT)[1]], of="/x")
    assert good.unset() is None
    refusal = good.check(BODY, sent(name, secret=SCHEMES[name].pair("another secret")[0]), NOW, url=URL) \
        if name in HEADERS else good.check(BODY, [], NOW)
    assert refusal is not None and "*** is not used: it must be" in refusal.why
    assert one.check(BODY, [], NOW, url=URL)


TOKENS: dict[str, Callable[[str], tuple[bytes, str]]] = {
    "figma": lambda token: (json.dumps({"passcode": token}).encode(), URL),
    "zoho_crm": lambda token: (json.dumps({"token": token}).encode(), URL),
    "mattermost": lambda token: (json.dumps({"token": token, "text": "hi"}).encode(), URL),
    "strava": lambda token: (json.dumps({"subscription_id": token}).encode(), URL),
    "mailchimp": lambda token: (b"", f"https://hooks.example.com/in?secret={token}"),
    "microsoft_graph": lambda token: (json.dumps({"value": [{"clientState": token}] * 2}).encode(), URL),
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_in_the_body_or_the_url(name):
    one, make = verifier(name, "right"), TOKENS[name]

    def check(token: str) -> Any:
        body, url = make(token)
        return one.check(body, [], NOW, url=url)

    assert check("right") is None
    for wrong in ("", "wrong", "right+", "Right", "é"):
        assert check(wrong)
    for body in (b"", b"{", b"[]", b'{"value": []}', b'{"value": [{"clientState": "right"}, {}]}',
                 b'{"passcode": null}', b'{"token": ["right"]}',
                 b'{"value": [{"clientState": "right"}, {"clientState": "x"}]}'):
        assert one.check(body, [], NOW, url=URL)


def test_every_service_but_those_in_the_body_makes_its_headers_and_those_say_so():
    for name, scheme in SCHEMES.items():
        if name not in HEADERS:
            with pytest.raises(BadOption):
                scheme.sign(BODY, TEXT)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SCHEMES)), st.binary(max_size=200), st.lists(st.tuples(
    st.sampled_from([b"authorization", b"webhook-signature", b"webhook-id", b"webhook-timestamp", b"x-signature",
                     b"stripe-signature", b"x-hub-signature-256", b"content-type", b"x-twilio-signature"]),
    st.binary(max_size=60) | st.sampled_from([b"application/x-www-form-urlencoded", b"Basic Og==", b"v1,"]))),
    st.text(max_size=40))
def test_whatever_is_sent_nothing_raises_and_nothing_gets_in(name, body, headers, url):
    one = verifier(name)
    now = NOW if one.timed else 0.0
    assert one.check(body, headers, now, url=url) is not None
    for method in ("GET", "POST", "HEAD"):
        one.handshake(body, headers, now, method=method, url=url)
    id = one.delivery_id(headers, body)
    assert id is None or (0 < len(id) <= 200 and id.isascii() and id.isprintable() and " " not in id)


FLIPPED = [name for name in SIGNED if "{form}" not in SCHEMES[name].signed]  # type: ignore[attr-defined]


def test_one_flipped_bit_of_the_body_is_refused_whatever_the_service():
    """More than 10,000 flips; what a public key has signed takes longer, so of those there are fewer."""
    flips = 0
    for name in FLIPPED:
        one, good = verifier(name), sent(name)
        for bit in range(0, len(BODY) * 8, 1 if isinstance(SCHEMES[name], Hmac) else 29):
            flipped = bytearray(BODY)
            flipped[bit // 8] ^= 1 << bit % 8
            assert one.check(bytes(flipped), good, NOW, url=URL), (name, bit)
            flips += 1
    assert flips > 10_000


def test_base64_of_the_secret_is_not_the_secret():
    secret = SCHEMES["standard_webhooks"].pair(TEXT)[1]
    text = Hmac("webhook-signature", signed="{id}.{ts}.{body}", value="v1,{sig}", separator=" ", encoding="base64",
                timestamp="webhook-timestamp", id_header="webhook-id")
    made = text.sign(BODY, secret, str(int(NOW)))
    assert verifier("standard_webhooks").check(BODY, [(k.encode(), v.encode()) for k, v in made.items()], NOW)


def test_a_public_key_does_not_pass_as_the_secret_of_a_keyed_hash():
    """The confusion that JWT libraries fell for."""
    private, public = PublicKey("x", algo="rsa-sha256").pair("jwt")
    pem = f"-----BEGIN PUBLIC KEY-----\n{public}\n-----END PUBLIC KEY-----"
    jwt = SCHEMES["fusionauth"]
    forged = jwt.sign(BODY, public, str(int(NOW)))
    assert Verifier(jwt, pem, of="/x").check(BODY, [(k.encode(), v.encode()) for k, v in forged.items()], NOW)
    one = Verifier(jwt, public, of="/x")                              # pasted without its PEM frame
    assert one.check(BODY, [(k.encode(), v.encode()) for k, v in forged.items()], NOW) and "PEM" in str(one.unset())
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=") + b"." \
        + base64.urlsafe_b64encode(b'{"iss":"netlify"}').rstrip(b"=") + b"."
    assert verifier("netlify").check(BODY, [(b"x-webhook-signature", none)], NOW)


RSA = PublicKey("x", algo="rsa-sha256").pair("jwt")[1]
ED = "302a300506032b6570032100" + PublicKey("x", algo="ed25519").pair("jwt")[1]


@pytest.mark.parametrize("secret", [
    RSA, RSA.replace("+", "-").replace("/", "_").rstrip("="), f"{RSA[:64]}\\n{RSA[64:]}",
    ED, base64.b64decode(RSA).hex(),
    '{"kty": "RSA", "n": "AQAB", "e": "AQAB"}', '{"keys": [{"kty": "EC"}]}', "ssh-ed25519 AAAA me@here",
    "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"])
def test_a_public_key_that_is_not_pem_is_no_secret_of_a_jwt(secret):
    for name in ("netlify", "fusionauth", "monday"):
        scheme = SCHEMES[name]
        with pytest.raises(BadKey, match="public key"):
            scheme.key(secret)
        one = Verifier(name, secret, of="/x")
        said = {"iss": "netlify", "aud": URL, "sha256": hashlib.sha256(BODY).hexdigest(), "exp": NOW + 60,
                "request_body_sha256": base64.b64encode(hashlib.sha256(BODY).digest()).decode()}
        made = {scheme.header: hs256(said, secret)}
        assert one.unset() and one.check(BODY, [(k.encode(), v.encode()) for k, v in made.items()], NOW, url=URL)


def hs256(said: dict[str, Any], secret: str) -> str:
    """A token as anybody can make one who has a text."""
    parts = [base64.urlsafe_b64encode(json.dumps(one).encode()).rstrip(b"=") for one in ({"alg": "HS256"}, said)]
    made = hmac.new(secret.encode(), b".".join(parts), "sha256").digest()
    return b".".join([*parts, base64.urlsafe_b64encode(made).rstrip(b"=")]).decode()


def test_such_a_token_passes_with_a_text():
    said = {"iss": "netlify", "sha256": hashlib.sha256(BODY).hexdigest(), "exp": NOW + 60}
    made = [(b"x-webhook-signature", hs256(said, TEXT).encode())]
    assert verifier("netlify").check(BODY, made, NOW) is None


@pytest.mark.parametrize("secret", [
    TEXT, "a" * 64, "0" * 64, '{"kty": "oct", "k": "x"}', "cGxhaW4gdGV4dCBvZiBhIGtleQ=="])
def test_a_text_stays_a_secret_of_a_jwt(secret):
    assert SCHEMES["netlify"].key(secret) == secret


@pytest.mark.parametrize(("base", "host", "good"), [
    ("https://hooks.example.com", "evil.example", True), ("", "evil.example", False), ("", "localhost:3000", True)])
def test_a_token_for_our_url_is_not_ours_because_its_sender_says_so(base, host, good):
    one = verifier("monday")
    scope = {"scheme": "https", "headers": [(b"host", host.encode())], "raw_path": b"/hook", "query_string": b""}
    url = f"{base or f'https://{host}'}/hook"
    made = SCHEMES["monday"].sign(BODY, TEXT, str(int(NOW)), url=url)
    refusal = one.check(BODY, [(k.encode(), v.encode()) for k, v in made.items()], NOW, url=one.url(base, scope))
    assert (refusal is None) == good and (good or "deployment" in str(refusal))
