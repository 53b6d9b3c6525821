"""Verify: forged, replayed, doubled and re-serialised requests are refused; the services' own vectors pass."""

from __future__ import annotations

import hashlib
import hmac
import json
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anton.errors import BadOption
from anton.secret import env, reveal
from anton.verify import SCHEMES, Hmac, Refusal, Verifier

NOW = 1531420618.0
SECRET = "8f742231b10e8888abcd99yyyzzz85a5"
BODY = (b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V"
        b"&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text="
        b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
        b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c")
SLACKS_OWN = "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"     # from Slack's documentation


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def slack(*secrets: object) -> Verifier:
    return Verifier("slack", list(secrets) or [SECRET], of="/slack")


def signed(body: bytes = BODY, secret: str = SECRET, at: float = NOW) -> list[tuple[bytes, bytes]]:
    return raw(SCHEMES["slack"].sign(body, secret, str(int(at))))


def why(refusal: Refusal | None) -> str:
    assert refusal is not None and not refusal.stale
    return refusal.why


def test_the_example_of_slacks_documentation_passes():
    headers = raw({"x-slack-signature": SLACKS_OWN, "x-slack-request-timestamp": "1531420618"})
    assert slack().check(BODY, headers, NOW) is None


def test_what_sign_makes_is_what_slack_makes():
    assert SCHEMES["slack"].sign(BODY, SECRET, "1531420618")["X-Slack-Signature"] == SLACKS_OWN


def test_githubs_own_vector_passes():
    sent = raw({"X-Hub-Signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"})
    assert Verifier("github", "It's a Secret to Everybody", of="/gh").check(b"Hello, World!", sent, NOW) is None


STANDARD = {"webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": "1614265330",
            "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}
STANDARD_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def standard(**changes: str) -> Refusal | None:
    headers = STANDARD | {name.replace("_", "-"): value for name, value in changes.items()}
    return Verifier("standard_webhooks", STANDARD_SECRET, of="/sw").check(
        b'{"test": 2432232314}', raw(headers), 1614265330.0)


def test_the_vector_of_standard_webhooks_passes():
    assert standard() is None


@pytest.mark.parametrize("signature", [
    "", "v1", "v1,", "v1, ", "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    "v1a,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE",
    "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=x", "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="])
def test_a_forged_standard_webhook_is_refused(signature):
    assert standard(webhook_signature=signature)


def test_one_good_signature_of_several_is_enough():
    good = STANDARD["webhook-signature"]
    assert standard(webhook_signature=f"v1,AAAA v1a,x {good}") is None
    assert standard(webhook_signature=" ".join([good.replace("g0", "g1")] * 1000))


@pytest.mark.parametrize("changes", [
    {"webhook_id": "msg_other"}, {"webhook_id": ""}, {"webhook_id": "msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330"},
    {"webhook_timestamp": "1614265331"}, {"webhook_timestamp": ""}, {"webhook_timestamp": "01614265330"}])
def test_id_and_time_are_signed(changes):
    assert standard(**changes)


def test_an_id_with_a_dot_could_reach_into_the_time_so_it_is_refused():
    scheme = SCHEMES["standard_webhooks"]
    made = scheme.sign(b"{}", STANDARD_SECRET, "1614265330", id="msg")
    shifted = made | {"webhook-id": "msg.1614265330", "webhook-timestamp": "1614265330"}
    assert Verifier("standard_webhooks", STANDARD_SECRET).check(b"{}", raw(shifted), 1614265330.0)


def test_a_digit_cannot_move_from_the_time_to_the_body():
    scheme = Hmac("X-Sig", signed="{ts}{body}", timestamp="X-At")
    made = scheme.sign(b"12345", "k", "1614265330")
    one = Verifier(scheme, "k")
    assert one.check(b"12345", raw(made), 1614265330.0) is None
    for moved, body in (("16142653301", b"2345"), ("161426533", b"012345")):
        refusal = one.check(body, raw(made | {"X-At": moved}), float(moved))
        assert refusal is not None and not refusal.stale


TWILIO = {"CallSid": "CA1234567890ABCDE", "Digits": "1234", "From": "+14158675309", "To": "+18005551212",
          "Caller": "+14158675309"}


@pytest.mark.parametrize("url", [
    "https://mycompany.com/myapp.php?foo=1&bar=2", "https://mycompany.com:443/myapp.php?foo=1&bar=2"])
def test_twilios_own_vectors_pass(url):
    form = [(b"content-type", b"application/x-www-form-urlencoded; charset=UTF-8")]
    one = Verifier("twilio", "12345", of="/sms")
    sent = [*form, (b"x-twilio-signature", b"RSOYDt4T1cUTdK1PDd93/VVr8B8=")]
    assert one.check(urlencode(TWILIO).encode(), sent, 0, url=url) is None
    assert one.check(urlencode(TWILIO | {"Digits": "1235"}).encode(), sent, 0, url=url)
    assert one.check(b"", sent, 0, url=url)


def test_twilios_json_is_bound_by_the_hash_in_the_url():
    url = ("https://mycompany.com/myapp.php?foo=1&bar=2&bodySHA256="
           "0a1ff7634d9ab3b95db5c9a2dfe9416e41502b283a80c7cf19632632f96e6620")
    body = b'{"property": "value", "boolean": true}'
    sent = [(b"content-type", b"application/json"), (b"x-twilio-signature", b"a9nBmqA0ju/hNViExpshrM61xv4=")]
    one = Verifier("twilio", "12345", of="/sms")
    assert one.check(body, sent, 0, url=url) is None
    as_form = [(b"content-type", b"application/x-www-form-urlencoded"), sent[1]]
    for other, headers in ((body + b" ", sent), (b"", sent), (b"", as_form), (b"", sent[1:])):
        assert one.check(other, headers, 0, url=url)
    assert one.check(body, sent, 0, url=url.replace("bodySHA256", "bodySHA25"))


def test_a_stale_request_says_so_only_when_its_signature_is_good():
    late = slack().check(BODY, signed(), NOW + 400)
    assert late is not None and late.stale and "300 s away" in late.why
    assert why(slack().check(BODY, signed(secret="other"), NOW + 400))
    assert why(slack().check(BODY + b" ", signed(), NOW + 400))


@pytest.mark.parametrize("seconds, good", [
    (0, True), (299, True), (300, True), (301, False), (-300, True), (-301, False)])
def test_a_timestamp_may_be_five_minutes_off(seconds, good):
    assert (slack().check(BODY, signed(), NOW + seconds) is None) is good


@pytest.mark.parametrize("headers", [
    {},
    {"x-slack-signature": SLACKS_OWN},
    {"x-slack-request-timestamp": "1531420618"},
    {"x-slack-signature": "", "x-slack-request-timestamp": "1531420618"},
    {"x-slack-signature": "v0=", "x-slack-request-timestamp": "1531420618"},
    {"x-slack-signature": SLACKS_OWN[3:], "x-slack-request-timestamp": "1531420618"},
    {"x-slack-signature": "v1" + SLACKS_OWN[2:], "x-slack-request-timestamp": "1531420618"},
    {"x-slack-signature": SLACKS_OWN[:-2], "x-slack-request-timestamp": "1531420618"},
    {"x-slack-signature": SLACKS_OWN, "x-slack-request-timestamp": "1531420619"},
    {"x-slack-signature": SLACKS_OWN, "x-slack-request-timestamp": "1531420618.0"},
    {"x-slack-signature": SLACKS_OWN, "x-slack-request-timestamp": "-1531420618"},
    {"x-slack-signature": SLACKS_OWN, "x-slack-request-timestamp": "١٥٣١٤٢٠٦١٨"},
])
def test_a_broken_header_is_refused(headers):
    assert slack().check(BODY, raw(headers), NOW)


def test_a_doubled_header_is_refused():
    for again in signed():
        assert "one" in why(slack().check(BODY, [*signed(), again], NOW))


def test_the_same_json_written_anew_is_refused():
    body = b'{"a":1}'
    assert slack().check(json.dumps(json.loads(body)).encode(), signed(body), NOW)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(BODY) * 8 - 1))
def test_one_flipped_bit_is_refused(bit):
    flipped = bytearray(BODY)
    flipped[bit // 8] ^= 1 << bit % 8
    assert slack().check(bytes(flipped), signed(), NOW)


def test_either_secret_of_a_rotation_passes(monkeypatch):
    monkeypatch.setenv("NEW_SECRET", "new")
    monkeypatch.setenv("OLD_SECRET", "old")
    both = slack(env("NEW_SECRET"), env("OLD_SECRET"))
    assert both.check(BODY, signed(secret="new"), NOW) is None
    assert both.check(BODY, signed(secret="old"), NOW) is None
    assert both.check(BODY, signed(secret="other"), NOW)
    monkeypatch.delenv("OLD_SECRET")
    assert both.check(BODY, signed(secret="old"), NOW)


@pytest.mark.parametrize("value", [None, "", "  ", "xxxx", "XXX", "***", "<your secret>"])
def test_a_placeholder_is_not_set_and_everything_is_refused(value, monkeypatch):
    monkeypatch.delenv("SIGNING", raising=False)
    if value is not None:
        monkeypatch.setenv("SIGNING", value)
    verifier = slack(env("SIGNING"))
    assert reveal(env("SIGNING")) is None
    assert verifier.unset() == 'env("SIGNING")'
    for forged in ("", "xxxx", value or ""):
        assert why(verifier.check(BODY, signed(secret=forged), NOW)) == 'no secret is set: env("SIGNING")'


def test_a_value_is_never_shown():
    verifier = slack("", "s3cret")
    assert "s3cret" not in repr(vars(verifier.scheme)) and verifier.unset() is None
    assert slack("xxxx").unset() == "***"


def test_hmac_of_any_service():
    custom = Hmac(header="X-Sig", algo="sha512", encoding="base64", signed="{ts}.{body}", timestamp="X-At",
                  tolerance=10)
    verifier = Verifier(custom, "k", of="/any")
    assert verifier.check(b"\xff\x00", raw(custom.sign(b"\xff\x00", "k", "100")), 105) is None
    assert verifier.check(b"\xff\x00", raw(custom.sign(b"\xff\x00", "k", "100")), 111)
    plain = Hmac("X-Sig")
    assert plain.sign(b"a", "k")["X-Sig"] == hmac.new(b"k", b"a", hashlib.sha256).hexdigest()


def test_a_callable_gets_the_raw_body_and_lower_case_headers_and_fails_closed():
    seen: list[object] = []

    def check(body, headers):
        seen.append((body, headers["x-token"]))
        return headers["x-token"] == "t"

    verifier = Verifier(check, of="/any")
    assert verifier.check(b"b", raw({"X-Token": "t"}), NOW) is None
    assert verifier.check(b"b", raw({"X-Token": "u"}), NOW)
    assert verifier.check(b"b", [], NOW)                             # it raised KeyError
    assert seen == [(b"b", "t"), (b"b", "u")]


def test_only_true_passes_a_callable():
    assert Verifier(lambda body, headers: "yes", of="/any").check(b"", [], NOW)  # type: ignore[arg-type, return-value]


def test_what_cannot_be_checked_is_refused_where_it_is_declared():
    with pytest.raises(BadOption, match='verify=\'slak\' of /x .*Did you mean "slack"'):
        Verifier("slak", "k", of="/x")
    with pytest.raises(BadOption, match="secret=env"):
        Verifier("slack", of="/x")
    with pytest.raises(BadOption, match="only together with"):
        Verifier(False, "k", of="/x")
    with pytest.raises(BadOption, match="md5"):
        Hmac("X", algo="md5")
    with pytest.raises(BadOption, match="timestamp"):
        Hmac("X", signed="{ts}{body}")


def test_false_is_said_on_purpose_and_none_is_not():
    assert Verifier(False).declared and not Verifier(False).active
    assert not Verifier(None).declared and not Verifier(None).active
