"""Http: requests to any service, and webhooks of your own.

    orders.on_new_records(HttpRequest("https://api.shop.com/orders/{id}", json={"total": "{total}"}))
    orders.on_new_records(HttpRequest(env("PARTNER_URL"), sign="standard_webhooks", secret=env("PARTNER_SECRET"),
                                      effect="idempotent"))
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, Literal, cast
from urllib.parse import quote

import orjson
from pydantic import BaseModel, ConfigDict, StringConstraints, create_model

from anton import Approval, Ctx, Discard, Table
from anton.kit import (
    SCHEMES,
    ActionComponent,
    BadOption,
    Call,
    Clients,
    Env,
    WorldError,
    addresses,
    current_database,
    fill,
    hide_within,
    is_public,
    names_of,
    one_of,
    placeholders,
    reveal,
    revealed,
    to_json,
    unset_of,
)

METHODS = ("POST", "PUT", "PATCH", "DELETE", "GET")
REDIRECTS = 5
UNSET = "https://not-set"  # stands in for an address whose variable is not set, where calls are captured
MOST = 1_000_000  # bytes of an answer that are kept,
MORE = 10_000  # and that are read besides: a secret that is cut in two would not be seen
_QUIET = ContextVar("_QUIET", default=False)  # what httpx logs has the address in it
_HOST = re.compile(r"https?://(?:[^/?#]*@)?([A-Za-z0-9._-]+)(?=[:/?#]|$)")
_ONE = re.compile(r"\{([A-Za-z_]\w*)\}")
Address = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/?#][^\s]*$")]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)                       # "json" is a method of models, long deprecated
    # What is sent: method, url, json. A call is of the method that its component was declared with.
    REQUESTS: dict[str, type[BaseModel]] = {
        method: create_model("Request", __config__=ConfigDict(extra="forbid"), method=(cast(Any, Literal[method]), ...),
                             url=(Address, ...), json=(Any, None)) for method in METHODS}


class HttpRequest(ActionComponent):
    """A request for each record; {name} in the url and in json is the record's value (in the url quoted).

    url: a text, or env(…) for one that is a secret: then only its host is kept and shown. method: POST PUT PATCH DELETE
    GET. json: what is sent, in any shape; None: the record. headers: sent along, texts or env(…), to the url's own
    origin only; so is secret, as "Authorization: Bearer …" or, with sign=, what it is signed with: "standard_webhooks"
    and other services of verify=. map: the record's names for those in braces. Each request has the header
    Idempotency-Key. effect: "unsafe", or "idempotent" where the other side drops a second one with the same key. allow:
    hosts, "*.example.com", or "https://*.example.com/api/*"; default the url's host. private: whether it may lead into
    private networks (10.0.0.1, localhost). Each redirect is held to both, and headers and secret are left behind.
    timeout: seconds for all of it. into: gets {"status", "body", "url", "record_id"}; body is JSON or text, the first
    MB of it, with *** for a secret that the service repeats. approve, cap, rate: as of actions. An answer of 4xx is a
    dead letter. Raises BadOption.
    """

    service = "HTTP"
    outside = True
    example = "incident_room"

    def __init__(self, url: str | Env, *, method: str = "POST", json: Any = None,
                 headers: Mapping[str, Env | str] | None = None, secret: Env | str | None = None,
                 sign: str | None = None, effect: Literal["unsafe", "idempotent"] = "unsafe",
                 allow: Sequence[str] | None = None, private: bool = False, timeout: float = 30.0,
                 into: Table[Any] | None = None, approve: Approval | None = None, cap: str | Sequence[str] = (),
                 rate: str | None = None, map: Mapping[str, str] | None = None,
                 connection: str | None = None) -> None:
        super().__init__(secret=secret, map=map, connection=connection)
        if self.address(None) is not None:
            raise BadOption("connection", connection, "HttpRequest", "one without base_url: the url says where")
        for option, value, known in (("method", method, METHODS), ("sign", sign, (None, *SCHEMES))):
            if value not in known:
                raise BadOption(option, value, "HttpRequest", one_of([str(one) for one in known if one]))
        if not isinstance(url, Env) and not re.match(r"https?://[^/{}]+", url):
            raise BadOption("url", url, "HttpRequest", 'an address whose host is fixed: "https://api.x.com/orders/{id}"')
        self.method, self.json, self.sign, self.timeout, self.into = method, json, sign, timeout, into
        self.effect, self.approve, self.private, self.arguments = effect, approve, private, REQUESTS[method]
        self.allow, self.cap, self.rate = list(allow or ()), cap, rate
        self._url, self._headers = url, dict(headers or {})
        self._clients = Clients(lambda _: importlib.import_module("httpx").AsyncClient(timeout=timeout))

    def unset(self) -> str | None:
        """What to set, when its secret, its address or a header is a reference to what is not there."""
        return unset_of(self._secret, self._url, *self._headers.values())

    def credential(self) -> str | None:
        """Its secret, read now; None without one."""
        return reveal(self._secret)

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        allow = self.allow or self._hosts()
        return {**super().options(), "allow": {"url": allow} if allow else None, "timeout": self.timeout * 2 + 5}

    def _hosts(self) -> list[str]:
        """The host that its url has: no call by psql leads to another one."""
        found = _HOST.match(self._url) if isinstance(self._url, str) else None
        return [found[1].lower()] if found else []

    def inputs(self) -> Mapping[str, Any]:
        """What url and json name; of any type."""
        named = set() if isinstance(self._url, Env) else placeholders(self._url)
        return dict.fromkeys(named | placeholders(str(self.json or "")), Any)

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets."""
        return {"status": int | None, "body": Any, "url": str, "record_id": Any}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The request for one record."""

        def quoted(found: re.Match[str]) -> str:
            return quote(fill(found[0], record, self.map), safe="")

        body = _plain(record) if self.json is None else _filled(self.json, record, self.map)
        url = _hidden(reveal(self._url) or UNSET) if isinstance(self._url, Env) else _ONE.sub(quoted, self._url)
        return {"method": self.method, "url": url, "json": None if self.method == "GET" else body}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """The request, and what came back. Redirects are followed with care: each is looked at anew."""
        async with asyncio.timeout(self.timeout):
            if not isinstance(self._url, Env):
                return await self._send(args, args["url"], key)
            secret = reveal(self._url) or ""
            if _hidden(secret) != args["url"]:                         # what was asked for, and perhaps approved
                raise Discard(f"the call is for {args['url']}, and {self._url.name} says {_hidden(secret)} now")
            status, was = importlib.import_module("httpx").HTTPStatusError, _QUIET.set(True)
            try:
                return {**await self._send(args, secret, key), "url": args["url"]}
            except status as error:                                    # its text has the address
                text = f"{error.response.status_code} of {args['url']}"
                raise status(text, request=error.request, response=error.response) from None
            finally:
                _QUIET.reset(was)

    async def _send(self, args: Mapping[str, Any], address: str, key: str) -> dict[str, Any]:
        home = importlib.import_module("httpx").URL(address)
        method, url, at_home, taken = args["method"], home, True, False
        body = b"" if args["json"] is None else to_json(args["json"])
        for hop in range(REDIRECTS + 1):
            at_home = at_home and _origin(url) == _origin(home)        # who was away may return with another's errand
            if hop > 0 and not await self._allowed(url, home):
                raise RuntimeError(f"{home.host} redirects to {url.host}, which is not among what is allowed")
            try:
                found = await self._once(method, url, body, key, at_home, last=hop == REDIRECTS)
            except Exception as error:
                if hop > 0 and isinstance(error, (Discard, WorldError)):
                    raise RuntimeError(f"{home.host} redirects to {url.host}, where a request may not go") from None
                if not taken:
                    raise                                              # else whoever refuses now, the first one did not
                what = type(error).__name__
                raise RuntimeError(f"{home.host} took it and redirects to {url.host}: {what}") from None
            if isinstance(found, dict):
                return found
            url, keeps = found
            if not keeps:
                taken = taken or method != "GET"
                method, body = "GET", b""
        raise RuntimeError(f"{home.host} redirects more than {REDIRECTS} times")

    async def _once(self, method: str, url: Any, body: bytes, key: str, at_home: bool, last: bool) -> Any:
        """One request: what came back, or where it redirects to and whether method and body stay as they are."""
        client, target, extensions = await self._clients.get(""), url, {}
        if not self.private:
            target, extensions = url.copy_with(host=await self._public(url)), {"sni_hostname": url.host}
        headers = {"User-Agent": "Anton", "Host": url.netloc.decode(), "Idempotency-Key": key}
        headers |= {"Content-Type": "application/json"} if body else {}
        headers |= revealed(self._headers) | self._signed(body, key, str(url), method) if at_home else {}
        async with client.stream(method, target, content=body, headers=headers, extensions=extensions,
                                 follow_redirects=False) as response:
            if response.has_redirect_location and not last:
                there = url.join(response.headers["location"])
                if there.scheme in ("http", "https"):
                    return there, response.status_code in (307, 308)
            response.raise_for_status()
            return {"status": response.status_code, "url": hide_within(str(url)), **await _answer(response)}

    async def _allowed(self, url: Any, home: Any) -> bool:
        """Whether a redirect may go there: what the database says of calls."""
        db = current_database()
        text = _hidden(str(url)) if isinstance(self._url, Env) else str(url)
        async with db.conn() as conn:
            return bool(await db.call_value(conn, "allowed", text, self.allow or self._hosts() or [home.host]))

    async def _public(self, url: Any) -> str:
        """The address to connect to: asked again, a name may say something else. Raises Discard for a private one."""
        found = await addresses(url.host, url.port or (443 if url.scheme == "https" else 80))
        if not all(map(is_public, found)):
            raise Discard(f"{url.host} is in a private network. To allow that: HttpRequest(…, private=True)")
        return str(found[0])

    def _signed(self, body: bytes, key: str, url: str, method: str) -> dict[str, str]:
        secret = self.credential()
        if secret is None:
            return {}
        if self.sign is None:
            return {"Authorization": f"Bearer {secret}"}
        scheme = SCHEMES[self.sign]
        return scheme.sign(body, secret, scheme.stamp(time.time()), id=key, url=url, method=method)

    def row(self, call: Call, result: Any) -> Any:
        """What `into` gets."""
        key = call.subject[1] if call.subject else [None]
        return {"status": None, "body": None, "url": call.args["url"], **(result or {}),
                "record_id": key[0] if len(key) == 1 else None}


logging.getLogger("httpx").addFilter(lambda _: not _QUIET.get())


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _hidden(url: str) -> str:
    """Where a secret address leads, and no more of it."""
    found = importlib.import_module("httpx").URL(url)
    return f"{found.scheme}://{found.netloc.decode()}/***"


async def _answer(response: Any) -> dict[str, Any]:
    """The first MB of what came back, as JSON or text."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part[:MOST + MORE - len(body)]
        if len(body) >= MOST + MORE:
            break
    text = bytes(body).decode(errors="replace").replace("\0", "")
    if "json" in response.headers.get("content-type", ""):
        try:
            return {"body": hide_within(orjson.loads(text))}
        except ValueError:
            pass
    return {"body": hide_within(text).encode()[:MOST].decode(errors="ignore")}


def _filled(value: Any, record: Any, names: Mapping[str, str]) -> Any:
    """json= with the record's values: "{total}" alone keeps its type."""
    if isinstance(value, str):
        alone = _ONE.fullmatch(value)
        if alone and names.get(alone[1], alone[1]) in names_of(record):
            name = names.get(alone[1], alone[1])
            return record[name] if isinstance(record, Mapping) else getattr(record, name)
        return fill(value, record, names)
    if isinstance(value, Mapping):
        return {key: _filled(one, record, names) for key, one in value.items()}
    return [_filled(one, record, names) for one in value] if isinstance(value, list) else value


def _plain(record: Any) -> dict[str, Any]:
    return dict(record) if isinstance(record, Mapping) else record.model_dump(mode="json")
