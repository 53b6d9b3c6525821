"""Verify: forged, replayed, doubled and re-serialised requests are refused; the services' own vectors pass."""

from __future__ import annotations

import hashlib
import hmac
import json

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
