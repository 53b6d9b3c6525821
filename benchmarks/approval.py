"""Approval: eight channels decide one approval at once, scanners open every link, and nine wrong ways are tried.

approval_wrong counts what must never be: a decision that is not exactly one, or of which the others do not hear, a
GET that changed anything, a wrong way that was not refused, an effect that does not belong to an approval.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from anton import people
from anton.db import Database
from anton.errors import AntonError
from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench
from benchmarks.reaction import working
from benchmarks.server import Conn, connect
from benchmarks.subject import ANTON, environment, number, wait_for

_APP = """
from anton import Approval, Table, action

refunds = Table("refunds")
desk = Approval("@desk", editable=["amount"], preview="Refund {amount} for order {order}")

@action(approve=desk, into=refunds)
def refund(order: int, amount: int) -> dict:
    return {"order": order, "amount": amount}
"""
SECRET = "a-signing-secret-of-slack-for-the-bench"
CHANNELS = 8
ROUNDS, QUICK_ROUNDS = 200, 4
MORE_ROUNDS = 60
SCANS, QUICK_SCANS = 1000, 20
TRIES, QUICK_TRIES = 20, 2                                             # of each wrong way


class Desk:
    """The served app: people with sessions, and what each channel sends. wrong: what must not be, with how often."""

    def __init__(self, url: str, conn: Conn, db: Database, http: httpx.AsyncClient) -> None:
        self.url, self.conn, self.db, self.http = url, conn, db, http
        self.sessions: dict[str, str] = {}
        self.wrong: dict[str, int] = {}

    def note(self, what: str, n: int = 1) -> None:
        if n:
            self.wrong[what] = self.wrong.get(what, 0) + n

    async def link(self, person: str, approval: int | None = None) -> str:
        return await people.link(self.db, person, self.url, approval=approval)

    async def sign_in(self, person: str) -> None:
        answer = await self.http.post(await self.link(person))
        self.sessions[person] = answer.headers["set-cookie"].partition(";")[0]

    async def get(self, person: str, path: str) -> httpx.Response:
        return await self.http.get(f"{self.url}{path}", headers={"cookie": self.sessions[person]})

    async def form(self, person: str, approval: int) -> dict[str, str]:
        """What the page of an approval would send."""
        return filled((await self.get(person, f"/inbox/{approval}")).text)

    async def post(self, person: str, approval: int, form: dict[str, str], **headers: str) -> httpx.Response:
        return await self.http.post(f"{self.url}/inbox/{approval}", data=form,
                                    headers={"cookie": self.sessions[person], **headers})

    def slack(self, user: str, decision: str, approval: int, sha256: str, *, secret: str = SECRET,
              ago: int = 0) -> tuple[bytes, dict[str, str]]:
        """Slack's request for a button."""
        payload = {"type": "block_actions", "user": {"id": user}, "trigger_id": str(time.monotonic_ns()), "actions": [
            {"action_id": f"anton_{decision}", "value": json.dumps({"approval": approval, "sha256": sha256})}]}
        body, stamp = f"payload={quote(json.dumps(payload))}", str(int(time.time()) - ago)
        made = hmac.new(secret.encode(), f"v0:{stamp}:{body}".encode(), hashlib.sha256).hexdigest()
        return body.encode(), {"content-type": "application/x-www-form-urlencoded", "x-slack-signature": f"v0={made}",
                               "x-slack-request-timestamp": stamp}

    async def press(self, request: tuple[bytes, dict[str, str]]) -> httpx.Response:
        return await self.http.post(f"{self.url}/inbox/slack", content=request[0], headers=request[1])

    def asked(self, n: int, by: str | None = None) -> list[tuple[int, str]]:
        """New approvals, with the hashes of their arguments."""
        last = number(self.conn, "select coalesce(max(id), 0) from anton.approval")
        self.conn.execute("insert into anton.action (app, name, args, requested_by) select 'desk', 'refund', "
                          "jsonb_build_object('order', n, 'amount', 5), %s from generate_series(1, %s) n", (by, n))
        made = f"select count(*) from anton.approval where id > {last}"
        wait_for(lambda: number(self.conn, made) == n, 60, "approvals")
        return [(int(id), str(sha)) for id, sha in self.conn.execute(
            "select id, args_sha256 from anton.approval where id > %s order by id", (last,)).fetchall()]

    def state(self) -> Any:
        """All that a GET must leave as it is."""
        return self.conn.execute(
            "select (select jsonb_agg(to_jsonb(a) order by id) from anton.approval a), "
            "(select count(*) from anton.approval_event), (select count(*) from anton.link where used_at is not null), "
            "(select count(*) from anton.session)").fetchone()


def filled(page: str) -> dict[str, str]:
    """The decision's form of a page, as a browser sends it."""
    form = next((one for one in re.findall(r"<form.*?</form>", page, re.S) if "decision" in one), "")
    pairs = (dict(re.findall(r'(\w+)="([^"]*)"', tag)) for tag in re.findall(r"<input[^>]*>", form))
    return {one["name"]: unescape(one.get("value", "")) for one in pairs}


# The bars


async def race(desk: Desk, rounds: int) -> int:
    """Eight channels decide each approval at the same time: four browsers, two links, Slack, and SQL; how many there
    were. Who wins is chance: more are held while all ended alike.
    """
    asked, ends, n = desk.asked(rounds), set[str](), 0
    while n < len(asked) or (len(ends) < 2 and n < rounds + MORE_ROUNDS):
        id, sha = asked[n] if n < len(asked) else desk.asked(1)[0]
        what = ["approve" if (n + k) % 2 else "reject" for k in range(CHANNELS)]
        forms = [await desk.form(f"p{k}", id) for k in range(4)]
        links = [await desk.link(f"p{k}", id) for k in (4, 5)]
        pages = [filled((await desk.http.get(link)).text) for link in links]
        pressed = desk.slack("U6", what[6], id, sha)

        async def by_inbox(k: int, id: int = id, forms: Any = forms, what: Any = what) -> bool:
            answer = await desk.post(f"p{k}", id, {**forms[k], "decision": what[k]})
            return str(answer.headers.get("location", "")).endswith("?done")

        async def by_link(k: int, links: Any = links, pages: Any = pages, what: Any = what) -> bool:
            answer = await desk.http.post(links[k], data={**pages[k], "decision": what[4 + k]})
            return "Noted" in answer.text

        async def by_slack(pressed: Any = pressed) -> bool:
            return bool((await desk.press(pressed)).json()["text"].endswith("by p6"))

        async def by_sql(id: int = id, sha: str = sha, what: Any = what) -> bool:
            async with desk.db.tx() as conn:
                row = (await desk.db.call(conn, "decide", id, "p7", what[7], "psql", sha))[0]
            return bool(row["won"])

        won = await asyncio.gather(*map(by_inbox, range(4)), *map(by_link, range(2)), by_slack(), by_sql())
        ended = desk.conn.execute("select person, kind from anton.approval_event where approval_id = %s and kind in "
                                  "('approved', 'rejected')", (id,)).fetchall()
        told = [f"p{k}" for k in range(CHANNELS) if won[k]]
        if len(ended) != 1 or told != [ended[0][0]]:
            desk.note("races without exactly one winner")
        ends |= {kind for _, kind in ended}
        n += 1
    return n


async def scan(desk: Desk, times: int) -> None:
    """A scanner of links opens all that a mail, a chat or a browser shows, as often as it likes."""
    (id, _), = desk.asked(1)
    places = [await desk.link("p0", id), await desk.link("p0"), f"{desk.url}/inbox/{id}", f"{desk.url}/inbox/slack",
              f"{desk.url}/inbox/{id}?decision=approve", f"{desk.url}/inbox/{id}/again", f"{desk.url}/inbox/out"]
    before = desk.state()
    for n in range(times):
        place = places[n % len(places)]
        headers = {"cookie": desk.sessions["p0"]} if n % 2 else {}
        await (desk.http.head if n % 5 == 4 else desk.http.get)(place, headers=headers)
    if desk.state() != before:
        desk.note("scans that changed something")


async def wrong_ways(desk: Desk, times: int) -> int:
    """Each way that must be refused; how many were tried."""
    ways: list[Callable[[int, str], Awaitable[object]]] = []

    async def replayed_link(id: int, sha: str) -> None:
        other, _ = desk.asked(1)[0]
        link = await desk.link("p1", other)
        form = {**filled((await desk.http.get(link)).text), "decision": "reject"}
        await desk.http.post(link, data=form)
        before = desk.state()
        for again in (form, {**form, "decision": "approve"}):
            await desk.http.post(link, data=again)
        desk.note("replayed links", desk.state() != before)

    async def expired_link(id: int, sha: str) -> None:
        link = await desk.link("p1", id)
        desk.conn.execute("update anton.link set expires_at = now() - interval '1 s' where token_sha256 = %s",
                          (people.digest(link.rpartition("/")[2]),))
        await desk.http.post(link, data={"decision": "approve", "sha256": sha})

    async def edited_payload(id: int, sha: str) -> None:
        form = {**(await desk.form("p1", id)), "decision": "approve"}
        await desk.post("p1", id, {**form, "sha256": hashlib.sha256(b"other").hexdigest()})
        await desk.press(desk.slack("U6", "approve", id, "0" * 64))
        try:                                                           # what may not be edited
            async with desk.db.tx() as conn:
                await desk.db.call(conn, "decide", id, "p1", "approve", "psql", sha, {"order": -1, "amount": 5})
            desk.note("edits of what may not be edited")
        except AntonError:
            pass

    async def other_person(id: int, sha: str) -> None:
        form = {**filled((await desk.get("p1", f"/inbox/{id}")).text), "decision": "approve"}
        await desk.post("eve", id, form)                               # with another's token
        own = re.search(r'name="csrf" value="(\w+)"', (await desk.get("eve", "/inbox")).text)
        await desk.post("eve", id, {**form, "csrf": own[1] if own else ""})
        await desk.press(desk.slack("U9", "approve", id, sha))
        try:
            await desk.link("eve", id)
            desk.note("links for who may not decide")
        except AntonError:
            pass

    async def cross_site(id: int, sha: str) -> None:
        form = {**(await desk.form("p1", id)), "decision": "approve"}
        await desk.post("p1", id, {**form, "csrf": ""})
        await desk.post("p1", id, form, origin="https://evil.example")
        await desk.post("p1", id, form, **{"sec-fetch-site": "cross-site"})
        await desk.http.post(f"{desk.url}/inbox/{id}", data=form)      # with no session

    async def forged_slack(id: int, sha: str) -> None:
        await desk.press(desk.slack("U6", "approve", id, sha, secret="another"))
        await desk.press(desk.slack("U6", "approve", id, sha, ago=600))
        body, headers = desk.slack("U6", "open", id, sha)
        await desk.press((body.replace(b"anton_open", b"anton_approve"), headers))

    async def replayed_slack(id: int, sha: str) -> None:
        request = desk.slack("U6", "open", id, sha)
        answers = [(await desk.press(request)).status_code for _ in range(2)]
        desk.note("replayed requests of Slack", answers != [200, 409])

    async def used_session(id: int, sha: str) -> None:
        await desk.sign_in("p1")
        form = {**(await desk.form("p1", id)), "decision": "approve"}
        cookie = desk.sessions["p1"]
        await desk.http.post(f"{desk.url}/inbox/out", data=form, headers={"cookie": cookie})
        await desk.post("p1", id, form)
        await desk.sign_in("p1")

    ways += [replayed_link, expired_link, edited_payload, other_person, cross_site, forged_slack, replayed_slack,
             used_session]
    for way in ways:
        for id, sha in desk.asked(times):
            await way(id, sha)
            state, = desk.conn.execute("select state from anton.approval where id = %s", (id,)).fetchone() or ("gone",)
            desk.note(way.__name__.replace("_", " "), state != "pending")
    for id, sha in desk.asked(times, by="p0"):                         # nobody approves their own
        await desk.post("p0", id, {**(await desk.form("p1", id)), "decision": "approve", "sha256": sha})
        own = re.search(r'name="csrf" value="(\w+)"', (await desk.get("p0", "/inbox")).text)
        answer = await desk.post("p0", id, {"csrf": own[1] if own else "", "decision": "approve", "sha256": sha})
        state, = desk.conn.execute("select state from anton.approval where id = %s", (id,)).fetchone() or ("gone",)
        desk.note("self approvals", state != "pending" or answer.status_code != 422)
    return (len(ways) + 1) * times


@bench(at_most("approval_wrong", 0, "wrong"))
def approval(run: Run) -> Rows:
    """200 races of eight channels, 1,000 GETs of scanners, nine wrong ways 20 times each, against `anton serve`."""
    rounds, scans = run.size(ROUNDS, QUICK_ROUNDS), run.size(SCANS, QUICK_SCANS)
    tries = run.size(TRIES, QUICK_TRIES)
    with run.server.database("approval") as url, connect(url) as conn, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.py").write_text(_APP)
        (folder / "autonomous.json").write_text('{"name": "desk"}')
        subprocess.run([*ANTON, "--database", url, "migrate"], cwd=folder, env=environment(), check=True,
                       capture_output=True)
        for n in range(CHANNELS):
            conn.execute("select anton.put_person(%s, null, %s, '{desk}')", (f"p{n}", f"U{n}"))
        conn.execute("select anton.put_person('eve', null, 'U9', '{sales}')")
        with working(folder, url, conn), serving(folder, url) as address:
            desk, races, tried = asyncio.run(_all(address, url, conn, rounds, scans, tries))
            left = "select count(*) from anton.action where state in ('new', 'ready', 'sending')"
            wait_for(lambda: number(conn, left) == 0, 60, "the calls")
        effects = conn.execute(
            "select (select count(*) from anton.approval where state = 'approved'), "
            "(select count(*) from anton.action c where state = 'sent' and not exists (select from anton.approval a "
            "where a.id = c.approval_id and a.state = 'approved')), (select count(*) from refunds)").fetchone()
        assert effects is not None
        desk.note("effects without an approval", int(effects[1]))
        desk.note("approvals without their one effect", abs(int(effects[0]) - int(effects[2])))
        if not 0 < int(effects[0]) < races:
            raise WrongResult(f"{effects[0]} of {races} races were approved: the channels do not compete")
    return {"approval_wrong": Row(sum(desk.wrong.values()), detail={
        "races": races, "channels": CHANNELS, "gets": scans, "wrong_ways_tried": tried, "approved": int(effects[0]),
        "wrong": desk.wrong})}


async def _all(address: str, url: str, conn: Conn, rounds: int, scans: int, tries: int) -> tuple[Desk, int, int]:
    db = Database(url, source="the bench")
    async with httpx.AsyncClient(timeout=60) as http:
        desk = Desk(address, conn, db, http)
        for person in ("p0", "p1", "p2", "p3", "eve"):
            await desk.sign_in(person)
        races = await race(desk, rounds)
        await scan(desk, scans)
        tried = await wrong_ways(desk, tries)
    await db.close()
    return desk, races, tried


@contextmanager
def serving(folder: Path, url: str) -> Iterator[str]:
    """A running `anton serve` of the app's folder; its address."""
    process = subprocess.Popen([*ANTON, "--database", url, "serve", "--port", "0"], cwd=folder, text=True,
                               env={**environment(), "SLACK_SIGNING_SECRET": SECRET}, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

