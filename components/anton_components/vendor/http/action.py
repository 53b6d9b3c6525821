"""Http: requests to any service, and webhooks of your own.

    orders.on_new_records(HttpRequest("https://api.shop.com/orders/{id}", json={"total": "{total}"}))
    orders.on_new_records(HttpRequest(env("PARTNER_URL"), sign="standard_webhooks", secret=env("PARTNER_SECRET"),
                                      effect="idempotent"))
"""

from __future__ import annotations

import asyncio
import importlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

import orjson

from anton.approval import Approval
from anton.calls import Call
from anton.component import Clients, fill, names_of, placeholders
from anton.ctx import Ctx
from anton.db import to_json
from anton.errors import BadOption, Discard, WorldError, one_of
from anton.outbox import ActionComponent
from anton.reach import addresses, is_public
from anton.secret import Env, reveal
from anton.table import Table
from anton.verify import SCHEMES

METHODS = ("POST", "PUT", "PATCH", "DELETE", "GET")
REDIRECTS = 5
MOST = 1_000_000  # bytes of an answer that are kept
_ONE = re.compile(r"\{([A-Za-z_]\w*)\}")


class HttpRequest(ActionComponent):
    """A request for each record; {name} in the url and in json is the record's value (in the url quoted).

    url: a text or env(…). method: POST PUT PATCH DELETE GET. json: what is sent, in any shape; None: the record.
    headers: sent along, to the url's own origin only; so is secret, as "Authorization: Bearer …" or, with sign=,
    what it is signed with: "standard_webhooks" and other services of verify=. map: the record's names for those in
    braces. Each request has the header Idempotency-Key. effect: "unsafe", or "idempotent" where the other side
    drops a second one with the same key. allow: hosts, "*.example.com". private: whether it may lead into private
    networks (10.0.0.1, localhost); redirects are looked at, too. timeout: seconds for all of it. into: gets
    {"status", "body", "url", "record_id"}; body is JSON or text, the first MB of it. approve, cap: as of actions.
    An answer of 4xx is a dead letter. Raises BadOption.
    """

    service = "HTTP"

    def __init__(self, url: str | Env, *, method: str = "POST", json: Any = None,
                 headers: Mapping[str, str] | None = None, secret: Env | str | None = None, sign: str | None = None,
                 effect: Literal["unsafe", "idempotent"] = "unsafe", allow: Sequence[str] | None = None,
                 private: bool = False, timeout: float = 30.0, into: Table[Any] | None = None,
                 approve: Approval | None = None, cap: str | Sequence[str] = (),
                 map: Mapping[str, str] | None = None) -> None:
        super().__init__(secret=secret, map=map)
        for option, value, known in (("method", method, METHODS), ("sign", sign, (None, *SCHEMES))):
            if value not in known:
                raise BadOption(option, value, "HttpRequest", one_of([str(one) for one in known if one]))
        if not isinstance(url, Env) and not re.match(r"https?://[^/{}]+", url):
            raise BadOption("url", url, "HttpRequest", 'an address whose host is fixed: "https://api.x.com/orders/{id}"')
        self.method, self.json, self.sign, self.timeout, self.into = method, json, sign, timeout, into
        self.effect, self.approve, self.private = effect, approve, private
        self.allow, self.cap = list(allow or ()), cap
        self._url, self._headers = url, dict(headers or {})
        self._clients = Clients(lambda _: importlib.import_module("httpx").AsyncClient(timeout=timeout))

    def unset(self) -> str | None:
        """What to set, when its secret or address is a reference to what is not there."""
        return next((one.name for one in (self._secret, self._url) if isinstance(one, Env) and not reveal(one)), None)

    def credential(self) -> str | None:
        """Its secret, read now; None without one."""
        return reveal(self._secret)

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        return {**super().options(), "approve": self.approve, "cap": self.cap,
                "allow": {"url": self.allow} if self.allow else None, "timeout": self.timeout * 2 + 5}

    def inputs(self) -> Mapping[str, Any]:
        """What url and json name; of any type."""
        named = set() if isinstance(self._url, Env) else placeholders(self._url)
        return dict.fromkeys(named | placeholders(str(self.json or "")), Any)

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The request for one record."""
        url = reveal(self._url) or ""

        def quoted(found: re.Match[str]) -> str:
            return quote(fill(found[0], record, self.map), safe="")

        body = _plain(record) if self.json is None else _filled(self.json, record, self.map)
        return {"method": self.method, "url": _ONE.sub(quoted, url), "json": None if self.method == "GET" else body}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """The request, and what came back. Redirects are followed with care: each is looked at anew."""
        async with asyncio.timeout(self.timeout):
            return await self._send(args, key)

    async def _send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        httpx = importlib.import_module("httpx")
        client, home = await self._clients.get(""), httpx.URL(args["url"])
        method, url = args["method"], home
        body = b"" if args["json"] is None else to_json(args["json"])
        for hop in range(REDIRECTS + 1):
            target, extensions = url, {}
            if not self.private:
                try:
                    address = await self._public(url)
                except (Discard, WorldError):
                    if hop == 0:
                        raise
                    raise RuntimeError(f"{home.host} redirects to {url.host}, where a request may not go") from None
                target, extensions = url.copy_with(host=address), {"sni_hostname": url.host}
            headers = {"User-Agent": "Anton", "Host": url.netloc.decode(), "Idempotency-Key": key}
            headers |= {"Content-Type": "application/json"} if body else {}
            if (url.scheme, url.host, url.port) == (home.scheme, home.host, home.port):
                headers |= self._headers | self._signed(body, key, str(url), method)
            async with client.stream(method, target, content=body, headers=headers, extensions=extensions,
                                     follow_redirects=False) as response:
                if response.has_redirect_location and hop < REDIRECTS:
                    url = url.join(response.headers["location"])
                    if response.status_code not in (307, 308):
                        method, body = "GET", b""
                    if url.scheme in ("http", "https"):
                        continue
                response.raise_for_status()
                return {"status": response.status_code, "url": str(url), **await _answer(response)}
        raise RuntimeError(f"{home.host} redirects more than {REDIRECTS} times")

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


async def _answer(response: Any) -> dict[str, Any]:
    """The first MB of what came back, as JSON or text."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part[:MOST - len(body)]
        if len(body) >= MOST:
            break
    text = bytes(body).decode(errors="replace").replace("\0", "")
    if "json" in response.headers.get("content-type", ""):
        try:
            return {"body": orjson.loads(text)}
        except ValueError:
            pass
    return {"body": text}


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
