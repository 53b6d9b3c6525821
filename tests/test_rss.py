"""Rss: feeds of a local peer over real sockets, with ETag and Last-Modified, and all that a feed can have wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from typing import Any

import pytest
from anton_components.vendor.rss import poll as rss
from anton_components.vendor.rss.poll import Rss
from peers import served
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from working import morning

from anton import Table, poll
from anton.app import App, declaring
from anton.errors import BadOption, DuplicateName, UnknownOption
from anton.reach import is_public

pytestmark = pytest.mark.once("wires: the server is asked for the same")

ATOM = """<?xml version="1.0" encoding="utf-8"?>
<feed xmlns="http://www.w3.org/2005/Atom"><title>Café</title><updated>2026-11-01T00:00:00Z</updated>
<entry><id>urn:1</id><title>Über &amp; out</title><link href="/one"/><updated>2026-11-01T10:00:00+02:00</updated>
<author><name>Ann</name></author><category term="db"/><category term="news"/>
<summary type="html">&lt;b&gt;bold&lt;/b&gt;&lt;script&gt;alert(1)&lt;/script&gt;</summary></entry></feed>"""


def item(n: int, more: str = "") -> str:
    return f"<item><guid>g{n}</guid><title>item {n}</title>{more}</item>"


def feed(*items: str) -> str:
    return f'<rss version="2.0"><channel><title>news</title>{"".join(items)}</channel></rss>'


class Peer:
    """A server of one feed. got: the requests' headers; sent: the statuses. answers: what it gives next instead."""

    def __init__(self) -> None:
        self.body: str | bytes = feed(item(1), item(2))
        self.kind = "application/rss+xml"
        self.validators = ("etag", "last-modified")
        self.changed = datetime(2026, 11, 1, tzinfo=UTC)
        self.got: list[dict[str, str]] = []
        self.sent: list[int] = []
        self.answers: list[Response] = []
        self.url = ""

    async def serve(self, request: Request) -> Response:
        self.got.append(dict(request.headers))
        response = self.answers.pop(0) if self.answers else self.answer(request)
        self.sent.append(response.status_code)
        return response

    def answer(self, request: Request) -> Response:
        body = self.body.encode() if isinstance(self.body, str) else self.body
        known = {"etag": f'"{hashlib.sha256(body).hexdigest()}"',
                 "last-modified": format_datetime(self.changed, usegmt=True)}
        headers = {name: known[name] for name in self.validators}
        asked = request.headers.get("if-none-match") or request.headers.get("if-modified-since")
        if asked and asked in headers.values():
            return Response(status_code=304, headers=headers)
        return Response(body, headers={"content-type": self.kind, **headers})

    async def moved(self, request: Request) -> Response:
        return RedirectResponse("/feed.xml", 301)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with served(Route("/feed.xml", peer.serve), Route("/old", peer.moved)) as peer.url:
        yield peer


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """The whole Internet: a proxy that answers for every host."""
    peer = Peer()
    peer.kind = "application/rss+xml"
    with served(Route("/{path:path}", peer.serve)) as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        peer.url = "http://93.184.215.14"                              # public, and not asked
        yield peer


def declare(app: Any, peer: Peer, path: str = "/feed.xml", model: Any = None, every: str = "24h",
            **options: Any) -> None:
    morning(app)
    with declaring(app.app):
        table = Table("articles", model) if model else Table("articles")
        poll(Rss(table, peer.url + path, **options), every=every, name="news")
    app.migrate()
    app.run()


def again(app: Any) -> None:
    app.advance("24h")


def guids(app: Any) -> list[str]:
    return [article["guid"] for article in app.records("articles")]


def cursor(app: Any) -> Any:
    return app._fetch("select cursor from {schema}.poll")[0][0]


def failing(app: Any) -> str:
    return str(app._fetch("select failing_error from {schema}.handler")[0][0])


def test_new_entries_become_records_once(live, peer):
    declare(live, peer)
    again(live)
    peer.body = feed(item(3), item(2), item(1))
    again(live)
    assert guids(live) == ["g1", "g2", "g3"] and not live.dead


@pytest.mark.parametrize("validators", [("etag",), ("last-modified",), ("etag", "last-modified"), ()])
def test_a_feed_that_did_not_change_is_not_sent_again(validators, live, peer):
    peer.validators = validators
    declare(live, peer)
    again(live)
    again(live)
    assert peer.sent == ([200, 304, 304] if validators else [200, 200, 200]) and guids(live) == ["g1", "g2"]
    asked = {"etag": "if-none-match", "last-modified": "if-modified-since"}
    assert [asked[name] in peer.got[1] for name in asked] == [name in validators for name in asked]


def test_an_entry_is_read_as_it_is_meant(live, peer):
    peer.body, peer.kind = ATOM, "application/atom+xml"
    declare(live, peer)
    (article,) = live.records("articles")
    assert dict(article) | {"id": 0, "created_at": None} == {
        "id": 0, "created_at": None, "guid": "urn:1", "title": "Über & out", "link": f"{peer.url}/one",
        "summary": "<b>bold</b>", "author": "Ann", "published": None, "updated": "2026-11-01T08:00:00+00:00",
        "tags": ["db", "news"], "feed": f"{peer.url}/feed.xml"}


class Article(BaseModel):
    id: str
    title: str
    published: datetime | None


def test_a_model_takes_the_fields_it_has_under_the_names_it_has(live, peer):
    peer.body = feed(item(1, "<pubDate>Mon, 02 Nov 2026 13:00:00 GMT</pubDate>"))
    declare(live, peer, model=Article, map={"guid": "id"})
    assert live.records("articles") == [
        Article(id="g1", title="item 1", published=datetime(2026, 11, 2, 13, tzinfo=UTC))]


def test_an_entry_without_an_id_goes_by_its_link_else_its_title(live, peer):
    peer.body = feed("<item><link>http://a/1</link><title>t</title></item>", "<item><title>only</title></item>",
                     "<item><author>nobody</author></item>")
    declare(live, peer)
    assert guids(live) == ["http://a/1", "only"]


def test_a_feed_that_has_moved_is_followed_and_its_headers_are_sent(live, peer):
    declare(live, peer, "/old?token=s3cret", headers={"Authorization": "Bearer x"})
    assert guids(live) == ["g1", "g2"] and peer.got[0]["authorization"] == "Bearer x"
    assert {article["feed"] for article in live.records("articles")} == {f"{peer.url}/old"}


def to(where: str, status: int = 302) -> Response:
    return Response(status_code=status, headers={"location": where})


def test_headers_stay_with_the_origin_they_were_given_for(live, peer, proxy):
    proxy.answers = [to("http://93.184.215.14/b"), to("http://8.8.8.8/c"), to("http://93.184.215.14/d")]
    declare(live, proxy, "/a", headers={"Authorization": "Bearer x", "X-Key": "k", "Cookie": "c=1"})
    again(live)
    assert guids(live) == ["g1", "g2"]
    kept = [{name for name in ("authorization", "x-key", "cookie") if name in got} for got in proxy.got[:4]]
    assert kept == [{"authorization", "x-key", "cookie"}] * 2 + [set()] * 2
    assert [got["host"] for got in proxy.got] == ["93.184.215.14"] * 2 + ["8.8.8.8"] + ["93.184.215.14"] * 2
    assert {"accept", "user-agent"} <= proxy.got[2].keys() and "if-none-match" in proxy.got[4]


def test_a_password_in_the_address_stays_with_its_origin(live, proxy):
    proxy.url = "http://ann:pw@93.184.215.14"
    proxy.answers = [to("/b"), to("http://8.8.8.8/c")]
    declare(live, proxy, "/a")
    assert ["authorization" in got for got in proxy.got] == [True, True, False] and len(guids(live)) == 2


@pytest.mark.parametrize("private", ["127.0.0.1:1", "localhost:1"])
def test_a_redirect_into_a_private_network_is_not_followed(private, live, proxy):
    proxy.answers = [to("http://8.8.8.8/b"), to(f"http://{private}/latest/meta-data")]
    declare(live, proxy, "/a")
    assert "which is in a private network" in failing(live) and "private=True" in failing(live)
    assert len(proxy.got) == 2 and guids(live) == []


@pytest.mark.parametrize("address", [
    "10.0.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "240.0.0.1", "::1", "fe80::1",
    "fd00::1", "ff0e::1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::"])
def test_an_address_that_not_all_may_ask_is_private_however_it_is_written(address):
    assert not is_public(ip_address(address))
    assert all(is_public(ip_address(one)) for one in ("8.8.8.8", "2600::1", "::ffff:8.8.8.8", "64:ff9b::808:808"))


def test_a_redirect_into_a_private_network_is_followed_where_that_is_allowed(live, peer, proxy):
    proxy.answers = [to(peer.url + "/feed.xml")]
    declare(live, proxy, "/a", private=True, headers={"X-Key": "k"})
    assert guids(live) == ["g1", "g2"] and "x-key" not in peer.got[0]


def test_a_feed_of_a_private_network_may_move_within_it(live, peer):
    other = Peer()
    with served(Route("/feed.xml", other.serve)) as url:
        peer.answers = [to(url + "/feed.xml")]
        declare(live, peer, headers={"X-Key": "k"})
    assert guids(live) == ["g1", "g2"] and ["x-key" in got[0] for got in (peer.got, other.got)] == [True, False]


@pytest.mark.parametrize(("where", "said"), [
    ("ftp://8.8.8.8/x", "is no web address"), ("file:///etc/passwd", "is no web address"), ("http://", "redirects"),
    ("http://8.8.8.8:x/", "Invalid port")])
def test_a_redirect_to_what_cannot_be_asked_makes_the_poll_wait(where, said, live, proxy):
    proxy.answers = [to(where)] * 9
    declare(live, proxy, "/a")
    assert said in failing(live) and guids(live) == [] and not live.dead


def test_a_feed_that_redirects_for_ever_makes_the_poll_wait(live, peer):
    peer.answers = [to("/feed.xml")] * 9
    declare(live, peer)
    assert "redirects more than 5 times" in failing(live) and len(peer.got) == 6


@pytest.mark.parametrize("status", [401, 404, 410, 429, 500, 503])
def test_when_the_feed_cannot_be_had_the_poll_waits_and_comes_back(status, live, peer):
    peer.answers = [Response(status_code=status)] * 2
    declare(live, peer, every="10m")
    live.advance("10m")
    assert failing(live) == f"PollFailed: {peer.url}/feed.xml answered {status}"
    assert guids(live) == [] and not live.dead
    live.advance("1h")
    assert guids(live) == ["g1", "g2"] and peer.sent[2] == 200


@pytest.mark.parametrize(("said", "least"), [("7200", 7200), ("date", 7000), ("999999999", 86400), ("-5", 0), ("", 0)])
def test_a_feed_that_says_when_to_come_back_is_not_asked_before(said, least, live, peer):
    when = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    peer.answers = [Response(status_code=429, headers={"retry-after": when if said == "date" else said})]
    declare(live, peer, every="10m")
    (wait,) = live._fetch("select extract(epoch from probe_at - failed_at)::float8 from {schema}.handler")[0]
    assert max(least, 600) - 1 <= wait <= max(least, 600) * 1.05 + 210


@pytest.mark.parametrize("body", [b"", b"<html><body>Maintenance</body></html>", b'{"error": 1}', b"\xff\xfe\x00",
                                  b"/etc/passwd", b"%PDF-1.7"])
def test_what_is_no_feed_makes_the_poll_wait_and_keeps_its_cursor(body, live, peer):
    declare(live, peer)
    before = cursor(live)
    peer.body = body
    again(live)
    assert "is no feed; it begins with" in failing(live) and cursor(live) == before and not live.dead


def test_a_feed_that_is_cut_off_is_asked_for_in_full_again(live, peer):
    whole = feed(item(1), item(2), item(3))
    peer.body = whole[:whole.index("<item><guid>g3") + 20]
    declare(live, peer)
    assert guids(live)[:2] == ["g1", "g2"] and cursor(live) == {"feed": f"{peer.url}/feed.xml"}
    peer.body = whole
    again(live)
    assert guids(live)[-1] == "g3" and len(guids(live)) == 3 and "etag" in cursor(live)


def test_a_feed_that_grows_without_end_is_not_read_to_its_end(live, peer, monkeypatch):
    monkeypatch.setattr(rss, "MOST", 1_000_000)
    peer.body = feed(*(item(n, "<description>" + "x" * 1000 + "</description>") for n in range(1000)))
    declare(live, peer)
    assert "is larger than 1 MB" in failing(live) and guids(live) == []


@pytest.mark.parametrize("body", [
    '<!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + feed(item(1, "<author>&x;</author>")),
    feed(item(1, "<author>a&#0;b\0</author>")), feed(item(1, "<pubDate>yesterday</pubDate>")),
    feed(item(1, "<pubDate>Wed, 31 Feb 2026 25:61:61 GMT</pubDate>")), feed(item(1, "<author>&undefined; &</author>"))])
def test_odd_things_in_an_entry_neither_stop_the_feed_nor_read_a_file(body, live, peer):
    peer.body = body
    declare(live, peer)
    (article,) = live.records("articles")
    assert (article["guid"], article["published"]) == ("g1", None) and "root:" not in article["author"]


def test_a_service_that_is_away_is_an_outage(live, peer):
    peer.url = "http://127.0.0.1:1"
    declare(live, peer)
    assert "ConnectError" in failing(live) and not live.dead


def test_where_nothing_may_leave_nobody_is_asked(app, peer):
    declare(app, peer)
    assert peer.got == [] and app.records("articles") == [] and not app.dead


def test_another_feed_under_the_same_name_is_asked_for_in_full(live, peer):
    declare(live, peer)
    before = dict(live.app.schedules)                                  # its client is closed with the loop, not before
    live.app.schedules.clear()
    live.app._places.clear()
    with declaring(live.app):
        poll(Rss(live.tables["articles"], peer.url + "/old"), every="24h", name="news")
    again(live)
    assert "if-none-match" not in peer.got[-1] and guids(live) == ["g1", "g2"] and before


def test_a_feed_is_named_by_its_address_without_what_may_be_secret():
    with declaring(App("names")) as app:
        articles = Table("articles")
        one = Rss(articles, "https://ann:pw@example.com/feed.xml?token=t0ken")
        assert poll(one, every="15m") is one
        poll(Rss(articles, "https://example.com/other.xml"), every="15m", name="other")
        assert set(app.schedules) == {"rss example.com/feed.xml", "other"}
        assert not any(secret in repr(one) for secret in ("pw", "t0ken"))
        with pytest.raises(DuplicateName, match="test_rss.py:.*test_rss.py:"):
            poll(one, every="15m")


@pytest.mark.parametrize("url", ["example.com/feed", "ftp://example.com/x", "", None, "https://"])
def test_what_is_no_address_is_refused(url):
    with declaring(App("names")), pytest.raises(BadOption, match="https://example.com/feed.xml"):
        Rss(Table("articles"), url)


def test_a_table_without_the_guid_needs_a_map():
    with declaring(App("names")), pytest.raises(UnknownOption, match='"guid".*id, published, title'):
        poll(Rss(Table("articles", Article), "https://example.com/feed.xml"), every="15m")
