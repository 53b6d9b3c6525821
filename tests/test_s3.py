"""S3Put on the wire: a peer that signs anew with botocore what it got, and boto3's own request beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import boto3
import pytest
from anton_components.vendor.s3.action import S3Put
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from kept import everything
from peers import served
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anton import Table
from anton.app import declaring

pytestmark = pytest.mark.once("wires of components: the server is asked for the same")

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "never-to-be-seen/wJalrXUtnFEMI"


class Peer:
    """A bucket: refuses whose signature is not what botocore makes of the same request."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}
        self.answers: list[Response] = []
        self.tokens: list[str | None] = []
        self.url = ""

    async def take(self, request: Request) -> Response:
        body, headers = await request.body(), request.headers
        given = re.fullmatch(r"AWS4-HMAC-SHA256 Credential=(\w+)/(\d{8})/([\w-]+)/s3/aws4_request, "
                             r"SignedHeaders=([a-z0-9;-]+), ?Signature=(\w{64})", headers.get("authorization", ""))
        if given is None or given[1] != KEY:
            return error(403, "InvalidAccessKeyId")
        path = request.scope["raw_path"].decode()
        asked = AWSRequest("PUT", f"{self.url}{path}", data=body, headers={
            name: headers[name] for name in given[4].split(";") if name not in ("host", "x-amz-date")})
        signer = S3SigV4Auth(Credentials(KEY, SECRET), "s3", given[3])
        asked.context["timestamp"] = headers["x-amz-date"]
        asked.headers["X-Amz-Date"] = headers["x-amz-date"]
        text = signer.string_to_sign(asked, signer.canonical_request(asked))
        if signer.signature(text, asked) != given[5] or "host" not in given[4].split(";"):
            return error(403, "SignatureDoesNotMatch")
        if self.answers:
            return self.answers.pop(0)
        self.tokens.append(headers.get("x-amz-security-token"))
        self.files[unquote(path)] = (body, headers["content-type"])
        return Response(headers={"etag": '"e1"'})


def error(status: int, code: str) -> Response:
    return Response(f"<Error><Code>{code}</Code></Error>", status, media_type="application/xml")


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    with served(Route("/{path:path}", made.take, methods=["PUT"])) as made.url:
        yield made


def put(live: Any, peer: Peer, record: dict[str, Any], **options: Any) -> None:
    with declaring(live.app):
        invoices, made = Table("invoices"), Table("made")
        given = {"access_key": KEY, "secret_key": SECRET, "endpoint": peer.url, "key": "{number}", **options}
        invoices.on_new_records(S3Put("shop", into=made, **given))
    live.migrate()
    invoices.append(record)
    live.run()


def states(live: Any) -> list[str]:
    return [call.state for call in live.calls]


NAMES = ["a.txt", "2026/ä b+c=d&e@f.json", "x/(1)!*'~_-$,:;%2F?.txt", "日本"]


def test_the_peer_takes_what_boto3_sends_and_refuses_another_secret(peer):
    for secret, good in ((SECRET, True), ("other", False)):
        client = boto3.client("s3", endpoint_url=peer.url, aws_access_key_id=KEY, aws_secret_access_key=secret,
                              region_name="eu-central-1", config=Config(
                                  s3={"addressing_style": "path", "payload_signing_enabled": True},
                                  request_checksum_calculation="when_required", retries={"max_attempts": 0}))
        for name in NAMES:
            if good:
                client.put_object(Bucket="shop", Key=name, Body=b"hi", ContentType="text/plain")
            else:
                with pytest.raises(client.exceptions.ClientError, match="SignatureDoesNotMatch"):
                    client.put_object(Bucket="shop", Key=name, Body=b"hi", ContentType="text/plain")
    assert peer.files == {f"/shop/{name}": (b"hi", "text/plain") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_put_where_boto3_puts_it(name, live, peer):
    put(live, peer, {"number": name, "text": "hé"}, body="{text}")
    assert peer.files == {f"/shop/{name}": ("hé".encode(), "text/plain; charset=utf-8")}
    (row,) = live.records("made")
    assert (row["key"], row["etag"], states(live)) == (name, "e1", ["sent"])
    assert not [where for where, rows in everything(live) if SECRET in rows]


def test_a_token_of_a_temporary_key_is_signed_too_and_a_record_is_json(live, peer):
    put(live, peer, {"number": "1"}, session_token="tok-12345678", region="eu-west-3")
    assert peer.tokens == ["tok-12345678"]
    body, kind = peer.files["/shop/1"]
    assert b'"number":"1"' in body.replace(b" ", b"") and kind == "application/json"


def test_a_lost_answer_puts_the_same_file_again(live, peer):
    peer.answers = [error(500, "InternalError")]
    put(live, peer, {"number": "1"})
    live.advance("1h")
    assert states(live) == ["sent"] and list(peer.files) == ["/shop/1"]


@pytest.mark.parametrize("status, code, state, dead", [
    (403, "AccessDenied", "retrying", 0), (404, "NoSuchBucket", "retrying", 0), (503, "SlowDown", "retrying", 0),
    (400, "EntityTooLarge", "failed", 1), (301, "PermanentRedirect", "failed", 1)])
def test_an_answer_says_what_became_of_the_call(status, code, state, dead, live, peer):
    peer.answers = [error(status, code)]
    put(live, peer, {"number": "1"})
    assert (states(live), len(live.dead)) == ([state], dead)


def test_a_wrong_secret_is_an_outage(live, peer):
    put(live, peer, {"number": "1"}, secret_key="other")
    assert states(live) == ["retrying"] and peer.files == {}


@pytest.mark.parametrize("number", ["../secret", "a/../../b", "./x", "x/.."])
def test_no_value_leads_out_of_its_path(number, live, peer):
    put(live, peer, {"number": number}, key="reports/{number}")
    assert peer.files == {} and len(live.dead) == 1


def test_only_keys_that_are_allowed_are_written(live, peer):
    put(live, peer, {"number": "secret/1"}, allow=["reports/*"])
    assert peer.files == {} and states(live) == ["refused"]


@pytest.mark.parametrize("bucket, url", [("shop", "https://shop.s3.eu-west-1.amazonaws.com/a%20b"),
                                         ("a.shop", "https://s3.eu-west-1.amazonaws.com/a.shop/a%20b")])
def test_amazons_own_addresses_are_those_of_boto3(bucket, url, app):
    client = boto3.client("s3", region_name="eu-west-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET)
    theirs = client.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "a b"})
    with declaring(app.app):
        assert S3Put(bucket, region="eu-west-1").url(bucket, "a b") == url
    assert theirs.partition("?")[0] in (url, url.replace(".eu-west-1.", "."))
    assert datetime.now(UTC).year > 2000
