"""Every event of GitHub as a record, a board of open issues, and how many stars each repository has.

    GitHub --> events --> issues: opened, edited, closed, reopened, deleted
                      --> stars: of each repository

Try it: anton dev. For real: set GITHUB_WEBHOOK_SECRET, add https://your.host/github as a webhook of a repository, with
the same secret and content type application/json; then anton serve and anton work.
"""

from pydantic import BaseModel

from anton import Records, Table, Webhook, env


class Issue(BaseModel):
    id: int
    repository: str
    number: int
    title: str
    author: str
    open: bool


class Stars(BaseModel):
    repository: str
    stars: int


events = Table("events")
issues = Table("issues", Issue)
stars = Table("stars", Stars, key="repository")

Webhook("/github", events, verify="github", secret=env("GITHUB_WEBHOOK_SECRET"))


@events.on_new_records(where="data->'headers'->>'x-github-event' = 'issues'")
def keep_issues(records: Records):
    for record in records:
        issue = record["payload"]["issue"]
        if record["payload"]["action"] in ("deleted", "transferred"):
            issues.select(id=issue["id"]).delete()
        else:
            issues.upsert({"id": issue["id"], "repository": record["payload"]["repository"]["full_name"],
                           "number": issue["number"], "title": issue["title"], "author": issue["user"]["login"],
                           "open": issue["state"] == "open"})


@events.on_new_records(where="data->'payload'->'repository' ? 'stargazers_count'")
def count_stars(records: Records):
    for record in records:
        repository = record["payload"]["repository"]
        stars.upsert({"repository": repository["full_name"], "stars": repository["stargazers_count"]})
