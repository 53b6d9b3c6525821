"""RSS: feeds, RSS 0.9 to 2.0 and Atom, as records.

    poll(Rss(articles, "https://example.com/feed.xml"), every="15m")

The package `feedparser` reads them; it and httpx are imported when the first feed is asked for.
"""

from __future__ import annotations

import asyncio
import importlib
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from anton import Table
from anton.kit import (
    BadOption,
    Clients,
    Component,
    ConfigError,
    Env,
    WorldError,
    addresses,
    effects,
    is_public,
    revealed,
    unset_of,
)

MOST = 10_000_000  # bytes of a feed
LONGEST = timedelta(days=1)  # of a Retry-After that is believed
REDIRECTS = 5
_ACCEPT = "application/atom+xml, application/rss+xml, application/xml;q=0.9, text/xml;q=0.9, */*;q=0.1"


class Rss(Component):
    """A feed, for poll(). Each entry that was not there before becomes a record of `into`:

    {"guid", "title", "link", "summary", "author", "published", "updated", "tags", "feed"}. published, updated: UTC,
    or None. tags: a list of text. feed: the URL without its query. guid: the entry's own id, else its link, else
    its title; the key. Texts are "" where the entry has none, and their HTML is sanitized. Where `into` has a
    model, only its fields. into: where they go; the first argument. url: an address, such as
    "https://example.com/feed.xml". map: {"guid": "id"} when the table calls a field otherwise. headers: sent along,
    such as Authorization, texts or env(…); to the url's origin only, not to where a redirect leads. timeout: seconds
    for one answer. private: whether redirects may lead into private networks (10.0.0.1, localhost); where the url
    itself does, they may. A feed that did not change is not sent again (ETag, Last-Modified). Raises BadOption.
    """

    service = "RSS"
    example = "feed_reader"

    def __init__(self, into: Table[Any], url: str, *, headers: Mapping[str, Env | str] | None = None,
                 timeout: float = 30.0, map: Mapping[str, str] | None = None, private: bool = False) -> None:
        super().__init__(map=map)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadOption("url", url, "Rss", 'an address, such as "https://example.com/feed.xml"')
        self.into = into
        self.feed = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # a query may hold a secret
        self.key = self.map.get("guid", "guid")
        self.timeout = timeout
        self._url = url
        self._headers = dict(headers or {})
        self._private = private
        self._clients = Clients(lambda _: importlib.import_module("httpx").AsyncClient(timeout=timeout))

    @property
    def name(self) -> str:
        """What its poll is called: "rss example.com/feed.xml". Two that differ in their query alone need name=."""
        return f"rss {self.feed.partition('://')[2]}"

    def unset(self) -> str | None:
        """What to set, when a header is a reference to what is not there."""
        return unset_of(*self._headers.values())

    def outputs(self) -> Mapping[str, Any]:
        """What its Table gets, by the names that map= gives."""
        made: dict[str, Any] = {**dict.fromkeys(("guid", "title", "link", "summary", "author", "feed"), str),
                                **dict.fromkeys(("published", "updated"), datetime | None), "tags": list[str]}
        return {self.map.get(name, name): kind for name, kind in made.items()}

    async def poll(self, cursor: Any) -> tuple[list[dict[str, Any]], Any]:
        """The feed's entries, and {"feed", "etag", "modified"}; nothing when it has not changed.

        Raises WorldError when the feed cannot be had, or is none. Where nothing may leave, or a header is not set,
        there is nothing new.
        """
        if effects() == "offline" or self.unset():
            return [], cursor
        before = cursor if isinstance(cursor, Mapping) and cursor.get("feed") == self.feed else {}
        asked = {"If-None-Match": before.get("etag"), "If-Modified-Since": before.get("modified")}
        async with self._answer({name: value for name, value in asked.items() if value}) as (response, url):
            if response.status_code == 304:
                return [], cursor
            if response.status_code != 200:
                raise WorldError(f"{self.feed} answered {response.status_code}", after=_after(response.headers))
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MOST:
                    raise WorldError(f"{self.feed} is larger than {MOST // 1_000_000} MB")
        read, whole = await asyncio.to_thread(_parse, bytes(body), response.headers.get("content-type", ""))
        if not read.get("version") and not read.entries:
            raise WorldError(f"{self.feed} is no feed; it begins with {bytes(body[:40])!r}")
        rows = [row for row in (self._row(entry, url) for entry in read.entries) if row[self.key]]
        if not whole:                                                  # ask for all of it again
            return rows, {"feed": self.feed}
        return rows, {"feed": self.feed, "etag": response.headers.get("etag"),
                      "modified": response.headers.get("last-modified")}

    @asynccontextmanager
    async def _answer(self, asked: Mapping[str, str]) -> AsyncIterator[tuple[Any, str]]:
        """What the feed answers in the end, and from which address. Redirects are followed with care:

        who answers may be a stranger, who is told no secret and must not have us knock at doors that only we can reach.
        """
        httpx = importlib.import_module("httpx")
        client, home, url = await self._clients.get(""), httpx.URL(self._url), httpx.URL(self._url)
        known = True                                                   # whether it is still the url's own origin
        for _ in range(REDIRECTS + 1):
            target, extensions = url, {}
            if not known and not self._private:
                address = await self._checked(home, url)
                if address is not None:                                # asked again, a name may say something else
                    target, extensions = url.copy_with(host=address), {"sni_hostname": url.host}
            headers = {"Accept": _ACCEPT, "User-Agent": "Anton", "Host": url.netloc.decode(), **asked}
            auth = (home.username, home.password) if known and home.userinfo else None
            async with client.stream("GET", target.copy_with(userinfo=b""), auth=auth, extensions=extensions,
                                     headers=headers | revealed(self._headers) if known else headers) as response:
                if not response.has_redirect_location:
                    yield response, str(url.copy_with(userinfo=b""))
                    return
                location = response.headers["location"]
            url = url.copy_with(userinfo=b"").join(location)
            if url.scheme not in ("http", "https") or not url.host:
                raise WorldError(f"{self.feed} redirects to {str(url)[:200]!r}, which is no web address")
            known = known and (_origin(url) == _origin(home) or url.host == home.host and (home.scheme, _port(home),
                               url.scheme, _port(url)) == ("http", 80, "https", 443))
        raise WorldError(f"{self.feed} redirects more than {REDIRECTS} times")

    async def _checked(self, home: Any, url: Any) -> str | None:
        """The address to connect to for a redirect's host; None: as it comes. Raises WorldError for a private one."""
        found = await addresses(url.host, _port(url))
        if all(map(is_public, found)):
            return str(found[0])
        if not all(map(is_public, await addresses(home.host, _port(home)))):
            return None
        raise WorldError(f"{self.feed} redirects to {_origin(url)}, which is in a private network. To allow that: "
                         "Rss(…, private=True)")

    def _row(self, entry: Any, base: str) -> dict[str, Any]:
        link = _text(entry.get("link"))
        with suppress(ValueError):                                     # what is no address stays as it is
            link = link and urljoin(base, link)
        row = {
            "guid": _text(entry.get("id")) or link or _text(entry.get("title")), "title": _text(entry.get("title")),
            "link": link, "summary": _text(entry.get("summary")), "author": _text(entry.get("author")),
            "published": _time(entry, "published_parsed"), "updated": _time(entry, "updated_parsed"),
            "tags": [_text(tag.get("term")) for tag in entry.get("tags", ()) if tag.get("term")], "feed": self.feed}
        row = {self.map.get(name, name): value for name, value in row.items()}
        names = row.keys() if self.into.model is None else self.into.model.model_fields.keys()
        return {name: value for name, value in row.items() if name in names}


def _port(url: Any) -> int:
    return int(url.port or (443 if url.scheme == "https" else 80))


def _origin(url: Any) -> str:
    return f"{url.scheme}://{url.host}:{_port(url)}"


def _parse(body: bytes, kind: str) -> tuple[Any, bool]:
    """What feedparser reads, and whether it was well-formed: else it may be cut off."""
    try:
        package = importlib.import_module("feedparser")
    except ImportError as error:
        raise ConfigError("Rss needs the package feedparser: pip install 'anton-framework[rss]'") from error
    # Bytes alone would be taken for a file's name. An id stays as it is: resolved, it would change with the address.
    read = package.parse(io.BytesIO(body), response_headers={"content-type": kind}, resolve_relative_uris=False)
    return read, not read.bozo or isinstance(read.bozo_exception, package.ThingsNobodyCaresAboutButMe)


def _text(value: Any) -> str:
    """Text as Postgres takes it: no NUL, no half characters."""
    return str(value or "").replace("\0", "").encode(errors="replace").decode()


def _time(entry: Any, name: str) -> datetime | None:
    if name not in entry:                                              # get() would take another time for it
        return None
    with suppress(TypeError, ValueError):
        year, month, day, hour, minute, second = entry[name][:6]
        return datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC)
    return None


def _after(headers: Mapping[str, str]) -> timedelta | None:
    """Retry-After, in seconds or as a date."""
    text = headers.get("retry-after", "")
    with suppress(TypeError, ValueError, OverflowError):
        wait = timedelta(seconds=int(text)) if text.isdigit() else parsedate_to_datetime(text) - datetime.now(UTC)
        return min(max(wait, timedelta(0)), LONGEST)
    return None
