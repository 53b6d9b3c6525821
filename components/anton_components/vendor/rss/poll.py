"""RSS: feeds, RSS 0.9 to 2.0 and Atom, as records.

    poll(Rss(articles, "https://example.com/feed.xml"), every="15m")

The package `feedparser` reads them; it and httpx are imported when the first feed is asked for.
"""

from __future__ import annotations

import asyncio
import importlib
import io
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from anton.action import effects
from anton.component import Clients, Component
from anton.errors import BadOption, ConfigError, WorldError
from anton.table import Table

MOST = 10_000_000  # bytes of a feed
LONGEST = timedelta(days=1)  # of a Retry-After that is believed
_ACCEPT = "application/atom+xml, application/rss+xml, application/xml;q=0.9, text/xml;q=0.9, */*;q=0.1"


class Rss(Component):
    """A feed, for poll(). Each entry that was not there before becomes a record of `table`:

    {"guid", "title", "link", "summary", "author", "published", "updated", "tags", "feed"}. published, updated: UTC, or
    None. tags: a list of text. feed: the URL without its query. guid: the entry's own id, else its link, else its
    title; the key. Texts are "" where the entry has none, and their HTML is sanitized. Where `table` has a model,
    only its fields. map: {"guid": "id"} when the table calls a field otherwise. headers: sent along, such as
    Authorization. timeout: seconds for one answer. A feed that did not change is not sent again (ETag, Last-Modified).
    Raises BadOption.
    """

    service = "RSS"

    def __init__(self, table: Table[Any], url: str, *, headers: Mapping[str, str] | None = None,
                 timeout: float = 30.0, map: Mapping[str, str] | None = None) -> None:
        super().__init__(map=map)
        parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadOption("url", url, "Rss", 'an address, such as "https://example.com/feed.xml"')
        self.into = table
        self.feed = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # a query may hold a secret
        self.key = self.map.get("guid", "guid")
        self.timeout = timeout
        self._url = url
        self._headers = {"Accept": _ACCEPT, "User-Agent": "Anton", **(headers or {})}
        self._clients = Clients(lambda _: importlib.import_module("httpx").AsyncClient(
            timeout=timeout, follow_redirects=True, max_redirects=5))

    @property
    def name(self) -> str:
        """What its poll is called: "rss example.com/feed.xml". Two that differ in their query alone need name=."""
        return f"rss {self.feed.partition('://')[2]}"

    async def poll(self, cursor: Any) -> tuple[list[dict[str, Any]], Any]:
        """The feed's entries, and {"feed", "etag", "modified"}; nothing when it has not changed.

        Raises WorldError when the feed cannot be had, or is none. Where nothing may leave, there is nothing new.
        """
        if effects() == "offline":
            return [], cursor
        before = cursor if isinstance(cursor, Mapping) and cursor.get("feed") == self.feed else {}
        asked = {"If-None-Match": before.get("etag"), "If-Modified-Since": before.get("modified")}
        headers = self._headers | {name: value for name, value in asked.items() if value}
        client = await self._clients.get("")
        async with client.stream("GET", self._url, headers=headers) as response:
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
        rows = [row for row in (self._row(entry, str(response.url)) for entry in read.entries) if row[self.key]]
        if not whole:                                                  # ask for all of it again
            return rows, {"feed": self.feed}
        return rows, {"feed": self.feed, "etag": response.headers.get("etag"),
                      "modified": response.headers.get("last-modified")}

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
