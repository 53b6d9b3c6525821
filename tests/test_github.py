"""GitHub's actions on the wire, beside the requests that PyGithub makes for the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from anton_components.vendor.github.action import GitHubComment, GitHubIssue, GitHubLabel
from kept import everything
from peers import served
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anton import Table
from anton.app import declaring

pytestmark = pytest.mark.once("wires of components: the server is asked for the same")

TOKEN = "ghp_never-to-be-seen-1f"
# What PyGithub sends (method, path, body) for repo.get_issue(7).create_comment("hi"), repo.create_issue("t", "hi",
# labels=["bug"]) and repo.get_issue(7).add_to_labels("bug", "help wanted").
PYGITHUB = {
    "comment": ("POST", "/repos/acme/shop/issues/7/comments", {"body": "hi"}),
    "issue": ("POST", "/repos/acme/shop/issues", {"title": "t", "body": "hi", "labels": ["bug"]}),
    "label": ("POST", "/repos/acme/shop/issues/7/labels", ["bug", "help wanted"]),
}


class Peer:
    """GitHub: refuses who has no token, what is of another type, and repositories that it has not."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, Any]] = []
        self.answers: list[Response] = []
        self.after = False
        self.made: list[dict[str, Any]] = []
        self.url = ""

    async def take(self, request: Request) -> Response:
        path, raw = request.url.path, await request.body()
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"message": "Bad credentials"}, 401)
        if request.headers.get("accept") != "application/vnd.github+json" or not request.headers.get("user-agent"):
            return JSONResponse({"message": "wrong headers"}, 415)
        if not path.startswith("/repos/acme/shop/issues"):
            return JSONResponse({"message": "Not Found"}, 404)
        if request.method == "GET":
            page, size = int(request.query_params["page"]), int(request.query_params["per_page"])
            assert request.query_params["since"].count(":") >= 2
            return JSONResponse(self.made[(page - 1) * size:page * size])
        body = json.loads(raw)
        self.got.append((request.method, path, body))
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None and not self.after:
            return answer
        fields = {"comments": {"body"}, "labels": {"labels"}}.get(path.rpartition("/")[2], {"title", "body", "labels"})
        if not isinstance(body, dict) or set(body) != fields:
            return JSONResponse({"message": "Invalid request"}, 422)
        number = len(self.made) + 1
        self.made.append({"id": 1000 + number, "number": number, "html_url": f"https://github.com/acme/shop/{number}",
                          **body})
        return answer or JSONResponse(self.made[-1] if fields != {"labels"} else [], 201)


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    with served(Route("/{path:path}", made.take, methods=["GET", "POST"])) as made.url:
        yield made


MAKE = {
    "comment": lambda **given: GitHubComment("acme/shop", **given),
    "issue": lambda **given: GitHubIssue("acme/shop", labels=["bug"], **given),
    "label": lambda **given: GitHubLabel("acme/shop", ["bug", "{more}"], **given),
}
RECORD = {"number": 7, "text": "hi", "title": "t", "more": "help wanted"}


def act(live: Any, peer: Peer, what: str, record: dict[str, Any] = RECORD, **options: Any) -> None:
    with declaring(live.app):
        answers, made = Table("answers"), Table("made")
        answers.on_new_records(MAKE[what](api=peer.url, token=TOKEN, into=made, **options))
    live.migrate()
    answers.append(record)
    live.run()


def states(live: Any) -> list[str]:
    return [call.state for call in live.calls]


@pytest.mark.parametrize("what", MAKE)
def test_it_asks_for_what_pygithub_asks_for(what, live, peer):
    act(live, peer, what)
    ((method, path, body),) = peer.got
    if "body" in body:
        body["body"] = body["body"].partition("\n\n<!-- anton ")[0]
    theirs = PYGITHUB[what][2]
    assert (method, path) == PYGITHUB[what][:2]
    assert body == ({"labels": theirs} if isinstance(theirs, list) else theirs)   # an object with labels is the same
    assert states(live) == ["sent"]
    (row,) = live.records("made")
    assert row["number"] == {"comment": 1001, "issue": 1, "label": 7}[what] and row["repo"] == "acme/shop"
    assert not [where for where, rows in everything(live) if TOKEN in rows]


@pytest.mark.parametrize("what", ["comment", "issue"])
def test_one_whose_answer_is_lost_is_found_by_its_mark_and_not_made_again(what, live, peer):
    peer.made = [{"id": n, "number": n, "html_url": "", "body": None} for n in range(250)]    # on the third page
    peer.answers, peer.after = [JSONResponse({"message": "bad gateway"}, 502)], True
    act(live, peer, what)
    live.advance("1h")
    assert (states(live), len(peer.got)) == (["sent"], 1)
    assert live.records("made")[0]["url"] == "https://github.com/acme/shop/251"


def test_one_that_is_not_found_is_unknown_and_not_made_again(live, peer):
    peer.answers = [JSONResponse({"message": "bad gateway"}, 502)]
    act(live, peer, "comment")
    live.advance("1h")
    assert (states(live), len(peer.got)) == (["unknown"], 1)


def test_labels_are_added_again(live, peer):
    peer.answers = [JSONResponse({"message": "bad gateway"}, 502)]
    act(live, peer, "label")
    live.advance("1h")
    assert (states(live), len(peer.got)) == (["sent"], 2)


@pytest.mark.parametrize("status, headers, state, dead", [
    (403, {"x-ratelimit-remaining": "0"}, "retrying", 0), (429, {}, "retrying", 0), (401, {}, "retrying", 0),
    (403, {}, "failed", 1), (404, {}, "failed", 1), (422, {}, "failed", 1), (410, {}, "failed", 1)])
def test_an_answer_says_what_became_of_the_call(status, headers, state, dead, live, peer):
    peer.answers = [JSONResponse({"message": "no, as it is"}, status, headers=headers)]
    act(live, peer, "comment")
    assert (states(live), len(live.dead)) == ([state], dead)
    assert not dead or "no, as it is" in live.dead[0].error


@pytest.mark.parametrize("record", [{"number": "7/../8"}, {"number": "0"}, {"number": "x"}, {"repo": "acme/../evil"},
                                    {"repo": "acme/.."}, {"repo": "evil/shop/issues/1?"}, {"repo": "evil"}])
def test_no_value_leads_to_another_path(record, live, peer):
    with declaring(live.app):
        answers = Table("answers")
        answers.on_new_records(GitHubComment("{repo}", api=peer.url, token=TOKEN))
    live.migrate()
    answers.append({**RECORD, "repo": "acme/shop", **record})
    live.run()
    assert peer.got == [] and len(live.dead) == 1


def test_only_repositories_that_are_allowed_are_written_to(live, peer):
    with declaring(live.app):
        answers = Table("answers")
        answers.on_new_records(GitHubComment("{repo}", api=peer.url, token=TOKEN, allow=["acme/*"]))
    live.migrate()
    answers.extend([{**RECORD, "repo": "evil/shop"}, {**RECORD, "repo": "acme/shop"}])
    live.run()
    assert states(live) == ["refused", "sent"] and len(peer.got) == 1
