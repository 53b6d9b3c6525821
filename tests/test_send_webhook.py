"""SendWebhook on the wire: signed as the service's own library checks, tried for three days, one address at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from anton_components.vendor.http.webhook import WAITS, SendWebhook
from peers import served
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anton import Table
from anton.app import App, declaring
from anton.errors import BadOption

pytestmark = pytest.mark.once("wires of components: the server is asked for the same")

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Peer:
    """Customers' endpoints: refuse with 401 what standardwebhooks does not verify. status: what a path answers."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []
        self.status: dict[str, int] = {}
        self.refused = 0
        self.url = ""

    async def take(self, request: Request) -> Response:
        body = await request.body()
        try:
            Webhook(SECRET).verify(body, dict(request.headers))
        except WebhookVerificationError:
            self.refused += 1
            return JSONResponse({}, 401)
        self.got.append((request.url.path, request.headers["webhook-id"]))
        return JSONResponse({}, self.status.get(request.url.path, 204))


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    with served(Route("/{path:path}", made.take, methods=["POST"])) as made.url:
        yield made
    assert made.refused == 0


def declare(live: Any, **options: Any) -> Table[Any]:
    with declaring(live.app):
        events: Table[Any] = Table("events")
        events.on_new_records(SendWebhook(secret=SECRET, **{"private": True, **options}))
    live.migrate()
    return events


def test_the_schedule_is_that_of_standard_webhooks():
    assert tuple(timedelta(**one) for one in (
        {"seconds": 5}, {"minutes": 5}, {"minutes": 30}, {"hours": 2}, {"hours": 5}, {"hours": 10}, {"hours": 14},
        {"hours": 20}, {"hours": 24})) == WAITS


def run_at(live: Any) -> datetime | None:
    return live._fetch("select min(run_at) from anton.delayed")[0][0]


@pytest.mark.parametrize("status", [404, 500])
def test_it_is_tried_ten_times_over_three_days_with_one_id_and_is_then_a_dead_letter(status, live, peer):
    peer.status["/a"] = status
    events, began = declare(live), live.now
    events.append({"url": f"{peer.url}/a"})
    last, tries, started = began, list[int](), time.monotonic()
    live.run()
    while (due := run_at(live)) is not None and len(tries) < 20:
        tries.append(len(peer.got))
        wait, took = WAITS[tries[-1] - 1], timedelta(seconds=time.monotonic() - started)
        assert wait <= due - last and due - live.now <= wait * 1.1 + took   # it was tried in between
        last, started = due, time.monotonic()
        live.advance(max(due - live.now, timedelta(milliseconds=1)))
    assert tries[-8:] == [*range(2, 10)]                               # on a slow machine the first 5 s are over
    assert len(peer.got) == 10 and len({id for _, id in peer.got}) == 1
    assert timedelta(days=3) < live.now - began < timedelta(days=4)
    assert [call.state for call in live.calls] == ["failed"] and len(live.dead) == 1


def test_one_that_comes_back_gets_it_once_and_holds_up_no_other(live, peer):
    peer.status["/a"] = 503
    declare(live).extend([{"url": f"{peer.url}/a"}, {"url": "http://127.0.0.1:1/x"}, {"url": f"{peer.url}/b"}])
    live.run()
    assert [path for path, _ in peer.got].count("/b") == 1
    peer.status.clear()
    live.advance("1h")
    assert [call.state for call in live.calls] == ["sent", "retrying", "sent"]
    assert [path for path, _ in peer.got].count("/b") == 1


def test_gone_is_gone(live, peer):
    peer.status["/a"] = 410
    declare(live).append({"url": f"{peer.url}/a"})
    live.advance("96h")
    assert len(peer.got) == 1 and [call.state for call in live.calls] == ["failed"] and len(live.dead) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "https://", "javascript:x", "//x.example/y", "ftp://x.example"])
def test_what_is_no_address_of_a_webhook_is_a_dead_letter(url, live, peer):
    declare(live).append({"url": url})
    live.run()
    assert live.calls == [] and len(live.dead) == 1


def test_an_address_in_a_private_network_is_not_called(live, peer):
    declare(live, private=False).append({"url": f"{peer.url}/a"})
    live.advance("96h")
    assert peer.got == [] and [call.state for call in live.calls] == ["failed"]


def test_what_cannot_be_is_refused_where_it_is_declared():
    with declaring(App("w")), pytest.raises(BadOption, match="a URL"):
        SendWebhook("x.example", secret=SECRET)
