"""The pages in a real Chromium: phone and desktop, by keyboard, without JavaScript; nothing leaves the server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from browser import PROGRAM, WHY_NOT, Chromium, Page, browser
from desk import asked, know, link, served, sql

pytestmark = [
    pytest.mark.once("pages in a browser: the server is asked for the same"),
    pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT),
]

SERIOUS = ("serious", "critical")
PICTURES = os.environ.get("ANTON_TEST_PICTURES")                       # a folder: what the pages look like
BOTH = pytest.mark.parametrize("phone", [True, False], ids=["phone", "desktop"])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with browser() as started:
        yield started


@pytest.fixture
def url(desk: Any) -> Iterator[str]:
    with served(desk) as address:
        yield address


def enter(page: Page, desk: Any, url: str) -> None:
    page.open(url + link(desk, "ann"))
    page.click("button")


def look(page: Page, name: str) -> None:
    if PICTURES:
        page.picture(Path(PICTURES, f"{name}.png"))


def is_fine(page: Page, url: str) -> None:
    """No finding that is serious, all on one screen's width, no complaint, and no request but to the server."""
    assert [one for one in page.axe() if one["impact"] in SERIOUS] == []
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
    assert [one for one in page.requests if not one.startswith(url + "/")] == [] and page.faults == []


@BOTH
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_pages_have_no_serious_finding_and_ask_no_other_server(desk, url, chromium, phone, dark):
    id = asked(desk, note="The box arrived wet.\nPhotos are attached to the ticket.")
    asked(desk, order=8, total=120)
    with chromium.page(phone=phone, dark=dark) as page:
        kind = f"{'phone' if phone else 'desktop'}-{'dark' if dark else 'light'}"
        page.open(url + link(desk, "ann"))
        look(page, f"sign-in-{kind}")
        is_fine(page, url)
        page.click("button")
        for name, path in (("inbox", "/inbox"), ("approval", f"/inbox/{id}"), ("flow", "/inbox/flow")):
            page.open(url + path)
            look(page, f"{name}-{kind}")
            is_fine(page, url)
        sql(desk, "update complaints set data = data || '{\"total\": 9}' where id = 1")
        page.open(f"{url}/inbox/{id}")
        is_fine(page, url)
        page.click("button.go")
        look(page, f"changed-{kind}")
        is_fine(page, url)
        page.tell("Runtime.evaluate", expression="document.querySelector('[name=\"arg.amount\"]').value = 'much'")
        page.click("button.go")
        assert "aria-invalid" in page.html()
        look(page, f"refused-{kind}")
        is_fine(page, url)
        page.click("button.stop")
        look(page, f"decided-{kind}")
        page.open(f"{url}/inbox/history")
        look(page, f"history-{kind}")
        is_fine(page, url)


@BOTH
def test_a_decision_takes_two_clicks(desk, url, chromium, phone):
    asked(desk)
    with chromium.page(phone=phone) as page:
        enter(page, desk, url)
        page.click("a.row")
        page.click("button.go")
        assert "Noted" in page.html()
    desk.run()
    assert desk.sent == [(7, Decimal(5), "card")]


@BOTH
def test_by_keyboard_alone_arguments_are_edited_and_approved(desk, url, chromium, phone):
    asked(desk)
    with chromium.page(phone=phone) as page:
        enter(page, desk, url)
        page.tab_to("a.row")
        _load(page, "Enter")
        page.tab_to('[name="arg.amount"]')
        page.press("Tab")
        page.tell("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9, modifiers=8)
        page.press("4")                                                # the field's text is selected when it is entered
        page.tab_to("button.go")
        _load(page, "Enter")
        assert "Noted" in page.html()
    desk.run()
    assert desk.sent == [(7, Decimal(4), "card")]


def _load(page: Page, key: str) -> None:
    before = page.loads
    page.press(key)
    page.wait(before + 1)


@BOTH
def test_without_javascript_everything_works(desk, url, chromium, phone):
    asked(desk)
    with chromium.page(phone=phone, script=False) as page:
        enter(page, desk, url)
        page.click('a[href="/inbox/flow"]')
        assert 'http-equiv="refresh"' in page.html() and "What is going on" in page.html()
        page.click('a[href="/inbox"]')
        page.click("a.row")
        page.click("button.stop")
        assert "Noted" in page.html()
    assert [call.state for call in desk.calls] == ["rejected"]


def test_the_flow_is_live(desk, url, chromium):
    with chromium.page() as page:
        enter(page, desk, url)
        page.open(f"{url}/inbox/flow")
        assert "1 wait for a person" not in page.html()
        asked(desk)
        page.run("""new Promise(done => {
          const live = document.querySelector("[data-live]");
          const look = () => live.innerHTML.includes("1 wait for a person") && done(1);
          new MutationObserver(look).observe(live, {childList: true});
          look();
        })""")
        assert page.loads == 3


def test_a_link_from_a_mail_is_decided_with_one_click(desk, url, chromium):
    id = asked(desk)
    know(desk, "bob", "finance")
    with chromium.page(phone=True) as page:
        page.open(url + link(desk, "bob", id))
        is_fine(page, url)
        page.click("button.go")
        assert "Noted" in page.html()
        is_fine(page, url)
    assert desk.approvals == []
