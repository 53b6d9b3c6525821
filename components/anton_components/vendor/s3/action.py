"""S3: files in a bucket, of Amazon or of what speaks its protocol.

    invoices.on_new_records(S3Put("invoices", key="{year}/{number}.json", region="eu-central-1",
                                  access_key=env("AWS_ACCESS_KEY_ID"), secret_key=env("AWS_SECRET_ACCESS_KEY")))
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from anton import Approval, Ctx, Discard, Table, env
from anton.kit import ActionComponent, Call, Clients, Env, WorldError, fill, names_of, placeholders, reveal, to_json


def _straight(key: str) -> str:
    if any(part in (".", "..") for part in key.split("/")):
        raise ValueError(f"{key!r} has . or .. in it, which some read as another path")
    return key


Bucket = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
Key = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_straight)]
# What says nothing about the object: the key is not what it was, or S3 is busy.
_UNWELL = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AccessDenied", "SlowDown",
           "RequestTimeTooSkewed", "NoSuchBucket", "OperationAborted", "RequestTimeout"}


class Put(BaseModel):
    """What is written."""

    model_config = ConfigDict(extra="forbid")

    bucket: Bucket
    path: Key
    body: str
    content_type: Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]+$")]


class S3Put(ActionComponent):
    """Puts a file into a bucket for each record; {name} in key and body is the record's value.

    bucket: its name. key: the path in it; what is there is replaced. body: a text; None: the record as JSON.
    content_type: of the file; None: application/json or text/plain. region: of the bucket. access_key: its id, a value
    or env(…); default AWS_ACCESS_KEY_ID. secret_key: a value or env(…); default AWS_SECRET_ACCESS_KEY. session_token:
    of a temporary key. endpoint: another service than Amazon's, "https://s3.example.com"; the bucket is in the path
    then. The same file is put again where an answer is lost. allow: keys, "reports/*". timeout: seconds for one answer.
    into: gets {"bucket", "key", "etag", "record_id"}. approve, cap, rate: as of actions. map: the record's names for
    those in braces.
    """

    service = "S3"
    example = "order_desk"
    variable = "AWS_SECRET_ACCESS_KEY"
    issued = "https://console.aws.amazon.com/iam"
    effect = "idempotent"
    arguments = Put

    def __init__(self, bucket: str, *, key: str = "{id}.json", body: str | None = None, content_type: str | None = None,
                 region: str = "us-east-1", access_key: Env | str | None = None, secret_key: Env | str | None = None,
                 session_token: Env | str | None = None, endpoint: str | None = None, timeout: float = 60.0,
                 allow: Sequence[str] | None = None, into: Table[Any] | None = None, approve: Approval | None = None,
                 cap: str | Sequence[str] = (), rate: str | None = None, map: Mapping[str, str] | None = None,
                 connection: str | None = None) -> None:
        super().__init__(secret=secret_key, map=map, connection=connection)
        self.bucket, self.key, self.body, self.region = bucket, key, body, region
        self.content_type = content_type or ("application/json" if body is None else "text/plain; charset=utf-8")
        self.endpoint = self.address(endpoint)
        self.timeout, self.into, self.approve, self.allow = timeout, into, approve, list(allow or ())
        self.cap, self.rate = cap, rate
        self._access_key = env("AWS_ACCESS_KEY_ID") if access_key is None else access_key
        self._session_token = session_token
        self._clients = Clients(lambda _: importlib.import_module("httpx").AsyncClient(timeout=timeout))

    def unset(self) -> str | None:
        """What to set, when one of the two is not."""
        missing = isinstance(self._access_key, Env) and reveal(self._access_key) is None
        return self._access_key.name if missing and isinstance(self._access_key, Env) else super().unset()

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        return {**super().options(), "timeout": self.timeout * 2 + 5,
                "allow": {"bucket": [self.bucket], **({"path": self.allow} if self.allow else {})}}

    def inputs(self) -> Mapping[str, Any]:
        """What key and body name; of any type, for it becomes text."""
        return dict.fromkeys(placeholders(self.key) | placeholders(self.body or ""), Any)

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets."""
        return {"bucket": str, "key": str, "etag": str | None, "record_id": Any}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The file for one record."""
        key = fill(self.key, record, self.map)
        whole = {name: record[name] if isinstance(record, Mapping) else getattr(record, name)
                 for name in names_of(record)}
        body = to_json(whole).decode() if self.body is None else fill(self.body, record, self.map)
        return {"bucket": self.bucket, "path": key, "body": body, "content_type": self.content_type}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One PUT."""
        client, body = await self._clients.get(""), args["body"].encode()
        url = self.url(args["bucket"], args["path"])
        headers = signed("PUT", url, body, {"content-type": args["content_type"]}, self.region,
                         reveal(self._access_key) or "", self.credential() or "", reveal(self._session_token),
                         datetime.now(UTC))
        response = await client.put(url, content=body, headers=headers)
        if 300 <= response.status_code < 500:
            code = (re.search(r"<Code>(\w+)</Code>", response.text) or ["", ""])[1]
            said = f"S3 answered {response.status_code} {code} to PUT {args['bucket']}/{args['path']}"
            raise (WorldError if code in _UNWELL else Discard)(said)
        response.raise_for_status()
        return {"etag": response.headers.get("etag", "").strip('"') or None}

    def url(self, bucket: str, key: str) -> str:
        """Of a file."""
        path = quote(key, safe="/-_.~")
        if self.endpoint is not None:
            return f"{self.endpoint.rstrip('/')}/{bucket}/{path}"
        if "." in bucket:                                              # no certificate is for such a host
            return f"https://s3.{self.region}.amazonaws.com/{bucket}/{path}"
        return f"https://{bucket}.s3.{self.region}.amazonaws.com/{path}"

    def row(self, call: Call, result: Any) -> Any:
        """What `into` gets."""
        key = call.subject[1] if call.subject else [None]
        return {"etag": None, **(result or {}), "bucket": call.args["bucket"], "key": call.args["path"],
                "record_id": key[0] if len(key) == 1 else None}


def signed(method: str, url: str, body: bytes, headers: Mapping[str, str], region: str, access_key: str,
           secret_key: str, session_token: str | None, at: datetime) -> dict[str, str]:
    """The headers of a request, signed as AWS Signature Version 4 says. headers: lower-case names."""
    parts, day, stamp = urlsplit(url), f"{at:%Y%m%d}", f"{at:%Y%m%dT%H%M%SZ}"
    digest = hashlib.sha256(body).hexdigest()
    named = {**headers, "host": parts.netloc, "x-amz-content-sha256": digest, "x-amz-date": stamp}
    if session_token is not None:
        named["x-amz-security-token"] = session_token
    names = ";".join(sorted(named))
    lines = "".join(f"{name}:{' '.join(named[name].split())}\n" for name in sorted(named))
    request = "\n".join([method, parts.path or "/", parts.query, lines, names, digest])
    scope = f"{day}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    return {**named, "authorization": f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, "
                                      f"Signature={signature}"}
