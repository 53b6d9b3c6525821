"""What the tests of people share: an app whose refunds a person approves, and browsers that post its forms."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from html import unescape
from typing import Any, Literal

from anton import Approval, Table, action, people, web
from anton.app import declaring


class Person:
    """A browser of one person: keeps its cookies, follows what a page posts."""

    def __init__(self, app: Any, name: str) -> None:
        self.app, self.name, self.cookie = app, name, ""

    def get(self, path: str) -> Any:
        return self.app.get(path, headers=self._headers())

    def post(self, path: str, data: dict[str, str], **headers: str) -> Any:
        answer = self.app.post(path, data=data, headers={**self._headers(), **headers})
        for cookie in answer.headers.get_list("set-cookie"):
            self.cookie = cookie.partition(";")[0]
        return answer

    def sign_in(self) -> Person:
        path = link(self.app, self.name)
        assert f"Sign in as {self.name}" in self.get(path).text
        answer = self.post(path, {})
        assert (answer.status_code, answer.headers["location"]) == (303, "/inbox")
        self.set_cookie = answer.headers["set-cookie"]
        return self

    def decide(self, approval: int, decision: str, **changed: str) -> Any:
        """Opens the page, fills its form in and sends it."""
        page = self.get(f"/inbox/{approval}").text
        return self.post(f"/inbox/{approval}", {**form_of(page), **changed, "decision": decision})

    def _headers(self) -> dict[str, str]:
        return {"cookie": self.cookie} if self.cookie else {}


def link(app: Any, person: str, approval: int | None = None) -> str:
    async def make() -> str:
        return await people.link(app.db, person, "", approval=approval)

    return str(app.db.run(make()))


def form_of(page: str) -> dict[str, str]:
    """What the decision's form of a page holds, as a browser would send it."""
    form = next((one for one in re.findall(r"<form.*?</form>", page, re.S) if "decision" in one), "")
    found = {}
    for tag in re.findall(r"<input[^>]*>", form):
        given = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        found[given["name"]] = unescape(given.get("value", ""))
    for name, text in re.findall(r'<textarea[^>]*name="([^"]*)"[^>]*>\n?(.*?)</textarea>', form, re.S):
        found[name] = unescape(text)
    for name, inside in re.findall(r'<select[^>]*name="([^"]*)".*?>(.*?)</select>', form, re.S):
        chosen = re.search(r'<option value="([^"]*)" selected', inside)
        found[name] = unescape(chosen[1]) if chosen else ""
    return found


def sql(app: Any, text: str, *args: Any) -> Any:
    async def work() -> Any:
        async with app.db.conn() as conn:
            return await conn.fetch(text, *args)

    return app.db.run(work())


def know(app: Any, name: str, *groups: str, **facts: str) -> Person:
    app.db.run(people.put(app.db, name, groups=groups or None, **facts))
    return Person(app, name)


def declare(live: Any) -> Any:
    """An app whose refunds @finance approves; ann is of them, and eve is not. .sent: what was sent."""
    live.sent = sent = []
    with declaring(live.app):
        complaints = Table("complaints")

        finance = Approval("@finance", editable=["amount", "how"], preview="Refund {amount} for order {order_id}")

        @action(approve=finance)
        async def refund(order_id: int, amount: Decimal, how: Literal["card", "voucher"] = "card",
                         note: str = "") -> None:
            sent.append((order_id, amount, how))

        @complaints.on_new_records(each=True)
        def complain(complaint: Any) -> None:
            refund.send(order_id=complaint["order"], amount=complaint["total"], note=complaint.get("note", ""))

    live.migrate()
    live.refund = refund
    live.ann, live.eve = know(live, "ann", "finance").sign_in(), know(live, "eve", "sales").sign_in()
    return live


def asked(desk: Any, order: int = 7, total: int = 5, **more: Any) -> int:
    desk.tables["complaints"].append({"order": order, "total": total, **more})
    desk.run()
    return int(desk.approvals[-1].id)


@contextmanager
def served(desk: Any) -> Iterator[str]:
    """Serves it on a port of this machine; the address."""
    server = web.server(desk.app, port=0)
    task = asyncio.run_coroutine_threadsafe(server.serve(), desk._loop.loop)
    while not server.started:
        assert not task.done(), task.result()
    try:
        yield f"http://127.0.0.1:{web.port_of(server)}"
    finally:
        server.should_exit = True
        task.result(30)
