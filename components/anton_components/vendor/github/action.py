"""Github: comments, issues and labels.

    answers.on_new_records(GitHubComment("acme/shop", issue="{number}", body="{answer}", token=env("GITHUB_TOKEN")))
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, StringConstraints

from anton import Approval, Ctx, Discard, Table
from anton.kit import ActionComponent, Call, Clients, Env, WorldError, fill, placeholders

API = "https://api.github.com"
PAGES = 30  # of 100, that are looked through for what may have been made
Repo = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,39}/\.?[A-Za-z0-9_-][A-Za-z0-9._-]{0,98}$")]


class Comment(BaseModel):
    """What is sent."""

    model_config = ConfigDict(extra="forbid")

    repo: Repo
    issue: int
    body: str


class Issue(BaseModel):
    """What is sent."""

    model_config = ConfigDict(extra="forbid")

    repo: Repo
    title: str
    body: str = ""
    labels: list[str] = []


class Labels(BaseModel):
    """What is sent."""

    model_config = ConfigDict(extra="forbid")

    repo: Repo
    issue: int
    labels: list[str]


class _GitHub(ActionComponent):
    """What all calls of GitHub have in common.

    repo: "owner/name". token: a value or env(…); default GITHUB_TOKEN. api: where GitHub is. timeout: seconds for one
    answer. allow: repositories, "acme/*". approve, cap, rate: as of actions. map: the record's names for those in
    braces.
    """

    service = "GitHub"
    example = "order_desk"
    variable = "GITHUB_TOKEN"
    issued = "https://github.com/settings/tokens"

    def __init__(self, repo: str, *, token: Env | str | None = None, api: str = API, timeout: float = 30.0,
                 allow: Sequence[str] | None = None, into: Table[Any] | None = None, approve: Approval | None = None,
                 cap: str | Sequence[str] = (), rate: str | None = None, map: Mapping[str, str] | None = None,
                 connection: str | None = None) -> None:
        super().__init__(secret=token, map=map, connection=connection)
        self.repo, self.timeout, self.into, self.approve = repo, timeout, into, approve
        self.allow, self.cap, self.rate = list(allow or ()), cap, rate
        self.api = (self.address(None if api == API else api) or API).rstrip("/")
        self._clients = Clients(lambda token: importlib.import_module("httpx").AsyncClient(timeout=timeout, headers={
            "Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json", "User-Agent": "Anton",
            "X-GitHub-Api-Version": "2022-11-28"}))

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        allow = self.allow or ([] if placeholders(self.repo) else [self.repo])
        return {**super().options(), "timeout": self.timeout * 2 + 5, "allow": {"repo": allow} if allow else None}

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request. Raises WorldError and Discard when it was refused, HTTPStatusError for 5xx."""
        client = await self._clients.get(self.credential() or "")
        response = await client.request(method, f"{self.api}{path}", **({} if body is None else {"json": body}))
        status, headers = response.status_code, response.headers
        if status in (401, 429) or (status == 403 and (
                headers.get("x-ratelimit-remaining") == "0" or "retry-after" in headers)):
            raise WorldError(f"GitHub answered {status} to {method} {path}")
        if 300 <= status < 500:
            raise Discard(f"GitHub refused {method} {path}: {status} {_said(response)}")
        response.raise_for_status()
        return response.json()

    def row(self, call: Call, result: Any) -> Any:
        """What `into` gets."""
        key = call.subject[1] if call.subject else [None]
        return {"number": None, "url": None, **(result or {}), "repo": call.args["repo"],
                "record_id": key[0] if len(key) == 1 else None}

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets."""
        return {"repo": str, "number": int | None, "url": str | None, "record_id": Any}

    async def find(self, path: str, key: str) -> Any:
        """What was made with this key, as GitHub lists it; None when it is not to be seen, which proves nothing."""
        for page in range(1, PAGES + 1):
            some = await self.ask("GET", f"{path}&per_page=100&page={page}")
            found = next((one for one in some if marked("", key) in (one.get("body") or "")), None)
            if found is not None or len(some) < 100:
                return found
        return None


class GitHubComment(_GitHub):
    """A comment on an issue or pull request for each record; {name} in repo, issue and body is the record's value.

    repo: "owner/name". issue: its number. token: a value or env(…); default GITHUB_TOKEN. body: Markdown. A comment of
    HTML that nobody sees is added: by it a comment is found when nobody knows whether it was made; one that is not
    found is unknown. into: gets {"repo", "number", "url", "record_id"}; number is the comment's id. allow:
    repositories, "acme/*". approve, cap, rate: as of actions. map: the record's names for those in braces. api: where
    GitHub is. timeout: seconds for one answer.
    """

    arguments = Comment

    def __init__(self, repo: str, *, issue: str = "{number}", body: str = "{text}", **options: Any) -> None:
        super().__init__(repo, **options)
        self.issue, self.body = issue, body

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        return {**super().options(), "probe": self.probe}

    def inputs(self) -> Mapping[str, Any]:
        """What the templates name."""
        return dict.fromkeys(placeholders(self.repo) | placeholders(self.issue) | placeholders(self.body), Any)

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The comment for one record."""
        return {"repo": fill(self.repo, record, self.map), "issue": _number(fill(self.issue, record, self.map)),
                "body": fill(self.body, record, self.map)}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One comment."""
        return _made(await self.ask("POST", f"/repos/{args['repo']}/issues/{args['issue']}/comments",
                                    {"body": marked(args["body"], key)}), "id")

    async def probe(self, call: Call) -> Any:
        """The comment, when it is there."""
        since = quote(call.at.isoformat())
        found = await self.find(f"/repos/{call.args['repo']}/issues/{call.args['issue']}/comments?since={since}",
                                call.idempotency_key)
        return found and _made(found, "id")


class GitHubIssue(_GitHub):
    """An issue for each record; {name} in repo, title, body and labels is the record's value.

    repo: "owner/name". token: a value or env(…); default GITHUB_TOKEN. title, body: of the issue; Markdown. labels:
    those it gets. A comment of HTML that nobody sees is added to the body: by it the issue is found when nobody knows
    whether it was made; one that is not found is unknown. into: gets {"repo", "number", "url", "record_id"}. allow:
    repositories, "acme/*". approve, cap, rate: as of actions. map: the record's names for those in braces. api: where
    GitHub is. timeout: seconds for one answer.
    """

    arguments = Issue

    def __init__(self, repo: str, *, title: str = "{title}", body: str = "{text}", labels: Sequence[str] = (),
                 **options: Any) -> None:
        super().__init__(repo, **options)
        self.title, self.body, self.labels = title, body, tuple(labels)

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        return {**super().options(), "probe": self.probe}

    def inputs(self) -> Mapping[str, Any]:
        """What the templates name."""
        return dict.fromkeys(set().union(*map(placeholders, (self.repo, self.title, self.body, *self.labels))), Any)

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The issue for one record."""
        repo, title, body = (fill(one, record, self.map) for one in (self.repo, self.title, self.body))
        return {"repo": repo, "title": title, "body": body,
                "labels": [fill(one, record, self.map) for one in self.labels]}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One issue."""
        return _made(await self.ask("POST", f"/repos/{args['repo']}/issues", {
            "title": args["title"], "body": marked(args["body"], key), "labels": args["labels"]}), "number")

    async def probe(self, call: Call) -> Any:
        """The issue, when it is there."""
        found = await self.find(f"/repos/{call.args['repo']}/issues?state=all&since={quote(call.at.isoformat())}",
                                call.idempotency_key)
        return found and _made(found, "number")


class GitHubLabel(_GitHub):
    """Adds labels to an issue or pull request for each record; those that it has already stay.

    repo: "owner/name". issue: its number. labels: those to be added; {name} in all three is the record's value. token:
    a value or env(…); default GITHUB_TOKEN. into: gets {"repo", "number", "url", "record_id"}. allow: repositories,
    "acme/*". approve, cap, rate: as of actions. map: the record's names for those in braces. api: where GitHub is.
    timeout: seconds for one answer.
    """

    effect = "idempotent"
    arguments = Labels

    def __init__(self, repo: str, labels: Sequence[str], *, issue: str = "{number}", **options: Any) -> None:
        super().__init__(repo, **options)
        self.issue, self.labels = issue, tuple(labels)

    def inputs(self) -> Mapping[str, Any]:
        """What the templates name."""
        return dict.fromkeys(set().union(*map(placeholders, (self.repo, self.issue, *self.labels))), Any)

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The labels for one record."""
        return {"repo": fill(self.repo, record, self.map), "issue": _number(fill(self.issue, record, self.map)),
                "labels": [fill(one, record, self.map) for one in self.labels]}

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One request; labels that are there already change nothing."""
        await self.ask("POST", f"/repos/{args['repo']}/issues/{args['issue']}/labels", {"labels": args["labels"]})
        return {"number": args["issue"]}


def marked(body: str, key: str) -> str:
    """A body with a mark of the call that nobody sees."""
    return f"{body}\n\n<!-- anton {hashlib.sha256(key.encode()).hexdigest()[:32]} -->".lstrip("\n")


def _made(answer: Mapping[str, Any], number: str) -> dict[str, Any]:
    return {"number": answer[number], "url": answer["html_url"]}


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,14}", text):
        raise Discard(f"issue={text!r} is no number of an issue")
    return int(text)


def _said(response: Any) -> str:
    try:
        return str(response.json()["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return ""
