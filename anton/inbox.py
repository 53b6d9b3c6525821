"""Inbox: the pages of `anton serve` where people decide. They work on a phone, by keyboard, and without JavaScript.

    /inbox                   what waits for you          /inbox/in/TOKEN     a link signs in, once
    /inbox/7                 one approval; POST decides  /inbox/link/TOKEN   a link shows one and decides it, once
    /inbox/history           what was decided            /inbox/flow         what is going on: flowpage.py

People see what they may decide and what they asked for; who is in all groups sees everything.
A GET changes nothing, so that no scanner of links decides or uses one up. A POST of a session needs its CSRF token and
comes from our own page; one by link has the link's token. decide() in the database decides, whatever comes.
The pages of links tell nobody their address, as it has the token in it (Referrer-Policy: no-referrer).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anton import flowpage, form, people
from anton.app import App
from anton.db import Database, current_database
from anton.errors import DecisionRefused, InvalidRecord
from anton.outbox import decide, edited
from anton.pages import KINDS, asset, page, redirect
from anton.slackdoor import SlackDoor
from anton.status import ask

COOKIE = "anton_session"
LINK_COOKIE = "anton_link"
SILENT = {"Referrer-Policy": "no-referrer"}
MAX_FORM = 1_000_000                                                   # bytes
KEPT = 50                                                              # of what was decided, the newest
Handle = Callable[[Request, "Visit"], Coroutine[Any, Any, Response]]


class Visit:
    """Who asks, and of which app. person: None where nobody is signed in. csrf: what their forms must bring."""

    def __init__(self, app: App, db: Database, person: str | None, session: str) -> None:
        self.app, self.db, self.person, self.session = app, db, person, session

    @property
    def csrf(self) -> str:
        """Made from the session, so that nobody else knows it."""
        return hashlib.sha256(f"csrf {self.session}".encode()).hexdigest()

    def shows(self, **values: Any) -> dict[str, Any]:
        """What every page needs."""
        return {"app": self.app.name, "person": self.person, "csrf": self.csrf, **values}


def routes(app: App, base: str) -> list[Route]:
    """The inbox of an app. base: the public address of the app, "" when it is not known."""
    inbox = Inbox(app, base)
    return [
        Route("/inbox", inbox.reading(inbox.waiting), name="inbox"),
        Route("/inbox/history", inbox.reading(inbox.history), name="inbox history"),
        Route("/inbox/flow", inbox.reading(inbox.flow), name="inbox flow"),
        Route("/inbox/in/{token}", inbox.show_sign_in, name="inbox sign in"),
        Route("/inbox/in/{token}", inbox.sign_in, methods=["POST"], name="inbox signed in"),
        Route("/inbox/out", inbox.deciding(inbox.sign_out), methods=["POST"], name="inbox sign out"),
        Route("/inbox/link/{token}", inbox.show_link, name="inbox link"),
        Route("/inbox/link/{token}", inbox.decide_link, methods=["POST"], name="inbox link decides"),
        Route("/inbox/slack", SlackDoor(app).__call__, methods=["POST"], name="inbox slack"),
        *(Route(f"/inbox/{name}", _asset(name), name=f"inbox {name}") for name in KINDS),
        Route("/inbox/{id:int}", inbox.reading(inbox.approval), name="inbox approval"),
        Route("/inbox/{id:int}", inbox.deciding(inbox.decide), methods=["POST"], name="inbox decides"),
        Route("/inbox/{id:int}/again", inbox.deciding(inbox.again), methods=["POST"], name="inbox asks again"),
    ]


class Inbox:
    """The pages of one app."""

    def __init__(self, app: App, base: str) -> None:
        self.app, self.base = app, base

    # Who asks

    def reading(self, handle: Handle) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """A page for who is signed in; others are told how to."""
        async def answer(request: Request) -> Response:
            visit = await self._visit(request)
            if visit.person is None:
                return page("message.html", 401, **visit.shows(
                    title="Sign in", text="This is for people who decide. Ask for a link that signs you in:",
                    command="anton people link NAME"))
            return await handle(request, visit)

        return answer

    def deciding(self, handle: Handle) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What only a form of our own page may ask for."""
        async def answer(request: Request) -> Response:
            visit = await self._visit(request)
            posted = await _form(request)
            if visit.person is None or not _own(request, self.base) \
                    or not hmac.compare_digest(posted.get("csrf", ""), visit.csrf):
                return page("message.html", 403, **visit.shows(
                    title="Nothing was changed", command="",
                    text="This did not come from a page of yours that is still open. Open the inbox again."))
            request.state.posted = posted
            return await handle(request, visit)

        return answer

    async def _visit(self, request: Request) -> Visit:
        session, db = request.cookies.get(COOKIE, ""), current_database()
        return Visit(self.app, db, await people.signed_in(db, session), session)

    # Signing in

    async def show_sign_in(self, request: Request) -> Response:
        """A GET shows a button, and uses nothing up."""
        db, token = current_database(), request.path_params["token"]
        found = await _value(db, "read_link", people.digest(token))
        if found is None or found["why"] or found["approval"]:
            return self._no_link(found)
        return _opened(request, page("sign_in.html", headers=SILENT, app=self.app.name, person=None, csrf="",
                                     name=found["person"]))

    async def sign_in(self, request: Request) -> Response:
        """Uses the link and opens a session."""
        db, token = current_database(), request.path_params["token"]
        entered = await people.sign_in(db, token) if _of_link(request, self.base) else None
        if entered is None:
            return self._no_link(await _value(db, "read_link", people.digest(token)))
        answer = redirect("/inbox")
        answer.headers.update(SILENT)
        answer.set_cookie(COOKIE, entered[1], max_age=int(people.SESSION_FOR.total_seconds()), path="/inbox",
                          secure=request.url.scheme == "https" or self.base.startswith("https:"), httponly=True,
                          samesite="lax")
        return answer

    async def sign_out(self, request: Request, visit: Visit) -> Response:
        """Ends the session."""
        await people.sign_out(visit.db, visit.session)
        answer = redirect("/inbox")
        answer.delete_cookie(COOKIE, path="/inbox")
        return answer

    def _no_link(self, found: Mapping[str, Any] | None) -> Response:
        why = (found or {}).get("why") or "there is none like this"
        return page("message.html", 404 if found is None else 410, SILENT, app=self.app.name, person=None, csrf="",
                    title="This link is of no use", text=f"{why[0].upper()}{why[1:]}. Ask for another.", command="")

    # What waits, and what was decided

    async def waiting(self, request: Request, visit: Visit) -> Response:
        """All that waits for the person."""
        async with visit.db.conn() as conn:
            rows = await ask(visit.db, conn, "inbox", self.app.name, visit.person)
            now = await visit.db.call_value(conn, "now")
        return page("inbox.html", **visit.shows(rows=rows, now=now))

    async def history(self, request: Request, visit: Visit) -> Response:
        """What was decided."""
        async with visit.db.conn() as conn:
            rows = await ask(visit.db, conn, "decided", self.app.name, KEPT, visit.person)
        return page("history.html", **visit.shows(rows=rows))

    async def flow(self, request: Request, visit: Visit) -> Response:
        """What is going on."""
        return page("flow.html", **visit.shows(**await flowpage.shown(self.app, visit.db, visit.person)))

    async def approval(self, request: Request, visit: Visit) -> Response:
        """One approval."""
        return await self._show(visit, request.path_params["id"], said=_SAID.get(request.url.query, ""))

    async def decide(self, request: Request, visit: Visit) -> Response:
        """The decision of the person."""
        id, posted = request.path_params["id"], request.state.posted
        found = await _value(visit.db, "open_approval", id, visit.person)
        if found is None or found["app"] != self.app.name:
            return self._missing(visit)
        what, why = _decision(posted)
        try:
            edit = self._edit(found, posted) if what == "approve" else {}
            row = await decide(visit.db, self.app, id, str(visit.person), what, "inbox", edit=edit, why=why,
                               sha256=posted.get("sha256", ""))
        except (InvalidRecord, ValueError, DecisionRefused) as error:
            return await self._show(visit, id, posted=posted, error=error)
        if row["next"]:
            return redirect(f"/inbox/{row['next']}?changed")
        return redirect(f"/inbox/{id}?{'done' if row['won'] else 'late'}")

    async def again(self, request: Request, visit: Visit) -> Response:
        """Asks anew with the records as they are now."""
        async with visit.db.tx() as conn:
            found = await visit.db.call_value(conn, "open_approval", request.path_params["id"], visit.person)
            if found is None or found["app"] != self.app.name or not found["may"]:
                return self._missing(visit)
            next = await visit.db.call_value(conn, "refresh_approval", found["id"])
        return redirect(f"/inbox/{next}" + ("?changed" if next != found["id"] else ""))

    # By link

    async def show_link(self, request: Request) -> Response:
        """The approval of a link, and a form that decides it."""
        return _opened(request, await self._by_link(request.path_params["token"]))

    async def decide_link(self, request: Request) -> Response:
        """The decision of a link's person: its token says who, and for which arguments."""
        token, posted = request.path_params["token"], await _form(request)
        db = current_database()
        found = await _value(db, "read_link", people.digest(token))
        if found is None or not found["approval"] or not _of_link(request, self.base):
            return self._no_link(found)
        asked = await _value(db, "open_approval", found["approval"], found["person"])
        if asked is None or asked["app"] != self.app.name:
            return self._no_link(None)
        what, why = _decision(posted)
        try:
            edit = self._edit(asked, posted) if what == "approve" else {}
            args = edited(self.app, asked, edit) if edit else None
            async with db.tx() as conn:
                row = (await db.call(conn, "decide_by_link", people.digest(token), what, "email", args, why))[0]
        except (InvalidRecord, ValueError, DecisionRefused) as error:
            return await self._by_link(token, posted=posted, error=error)
        visit = Visit(self.app, db, found["person"], "")
        said = "changed_link" if row["next"] else "done" if row["won"] else "late"
        return await self._show(visit, found["approval"], said=_SAID[said], link="", status=200)

    async def _by_link(self, token: str, **shown: Any) -> Response:
        db = current_database()
        found = await _value(db, "read_link", people.digest(token))
        if found is None or not found["approval"] or found["why"]:
            return self._no_link(found)
        return await self._show(Visit(self.app, db, found["person"], ""), found["approval"], link=token,
                                sha256=found["args_sha256"], **shown)

    # Showing one

    async def _show(self, visit: Visit, id: int, *, posted: Mapping[str, str] | None = None,
                    error: Exception | None = None, said: str = "", link: str | None = None, sha256: str | None = None,
                    status: int | None = None) -> Response:
        """link: its token, where the page is a link's; "" when it was used."""
        async with visit.db.conn() as conn:
            found = await visit.db.call_value(conn, "open_approval", id, visit.person)
            now = await visit.db.call_value(conn, "now")
        if found is None or found["app"] != self.app.name:
            return self._missing(visit)
        if sha256 is not None and found["state"] == "pending" and sha256 != found["args_sha256"]:
            found |= {"may": False, "why_not": "its arguments are not those that this link was made for"}
        reasons = list(error.reasons) if isinstance(error, InvalidRecord) else [str(error)] if error else []
        asked = form.fields(self._model(found), found["args"], found["editable"], posted, reasons)
        loose = [] if any(field.error for field in asked) else reasons
        action = f"/inbox/{id}" if link is None else f"/inbox/link/{link}"
        return page("approval.html", status or (422 if error else 200), None if link is None else SILENT, **visit.shows(
            one=found, fields=asked, errors=loose, said=said, now=now, action=action, by_link=link is not None,
            why=(posted or {}).get("why", "")))

    def _model(self, found: Mapping[str, Any]) -> Any:
        declared = self.app.actions.get(found["name"])
        return declared.model if declared is not None else None

    def _edit(self, found: Mapping[str, Any], posted: Mapping[str, str]) -> dict[str, Any]:
        return form.read(form.fields(self._model(found), found["args"], found["editable"]), posted)

    def _missing(self, visit: Visit) -> Response:
        return page("message.html", 404, **visit.shows(title="There is no such approval", text="", command=""))


_SAID = {"done": "Noted. Thank you.", "late": "It was decided before you: see below. Nothing was changed.",
         "changed": "What it rests on has changed, so it is asked again. Look once more.",
         "changed_link": "What it rests on has changed, so it is asked again, by another link. Nothing was sent."}


def _decision(posted: Mapping[str, str]) -> tuple[Literal["approve", "reject"], str | None]:
    what: Any = posted.get("decision")                                 # decide() refuses what is neither
    return what, posted.get("why", "").strip() or None


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form; {} for what is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/x-www-form-urlencoded":
        return {}
    body = await request.body()
    try:
        return dict(parse_qsl(body[:MAX_FORM].decode(), keep_blank_values=True, max_num_fields=1000))
    except ValueError:
        return {}


def _own(request: Request, base: str) -> bool:
    """Whether a POST comes from a page of ours, as far as the browser says where from."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None and site not in ("same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc in (request.headers.get("host"), urlsplit(base).netloc or None)


def _opened(request: Request, answer: Response) -> Response:
    """The page of a link, noted in the browser that opened it: no other site's form brings this cookie."""
    answer.set_cookie(LINK_COOKIE, "opened", path=request.url.path, secure=request.url.scheme == "https", httponly=True,
                      samesite="strict")
    return answer


def _of_link(request: Request, base: str) -> bool:
    """Whether a POST comes from a link's page, whose origin browsers call "null", as it has to tell no address."""
    if request.headers.get("origin") != "null":
        return _own(request, base)
    return request.headers.get("sec-fetch-site") in (None, "same-origin") and LINK_COOKIE in request.cookies


def _asset(name: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def answer(request: Request) -> Response:
        return asset(name)

    return answer


async def _value(db: Database, function: str, *args: Any) -> Any:
    async with db.conn() as conn:
        return await db.call_value(conn, function, *args)
