"""An incident is told to a bot in Slack; the bot says how bad it is, keeps its message up to date, and the status page.

    mention --> 👀                          incidents (new, or ended) --> a signed webhook of ours to the status page
    mention --> incidents --> a rule, in the place of a model --> graded --> a message
                incidents (ended) --> corrections --> the message says so

The model is a function here, with all that comes with a model: its calls are in the ledger and answers are kept. Put
OpenAiCompletion in its place when words are not enough. Try it: anton dev. For real: set SLACK_SIGNING_SECRET,
SLACK_TOKEN, STATUS_PAGE_URL and STATUS_PAGE_SECRET, then anton serve and anton work.
"""

import os
from typing import Literal

from anton_components.vendor.fake.cognition import FakeModel
from anton_components.vendor.http.action import HttpRequest
from anton_components.vendor.slack.action import SlackPostMessage, SlackReact, SlackUpdateMessage
from pydantic import BaseModel

from anton import Records, Table, Webhook, env

BAD = ("down", "lost", "leak", "cannot", "nobody")


class Incident(BaseModel):
    id: int | None = None
    title: str
    state: Literal["open", "ended"] = "open"


class Grade(BaseModel):
    severity: Literal["high", "low"]


class Graded(Grade):
    id: int | None = None
    incident: int
    title: str


class Correction(BaseModel):
    id: int | None = None
    channel: str
    ts: str
    text: str


mentions = Table("mentions")
incidents = Table("incidents", Incident)
graded = Table("graded", Graded, index=["incident"])
posts = Table("posts")
corrections = Table("corrections", Correction)

SLACK = {"oauth_token": env("SLACK_TOKEN"), "api": os.environ.get("SLACK_API", "https://slack.com/api")}

Webhook("/slack", mentions, verify="slack", secret=env("SLACK_SIGNING_SECRET"))

mentions.on_new_records(SlackReact("eyes", **SLACK))


@mentions.on_new_records
def open_incidents(mentioned: Records):
    for mention in mentioned:
        incidents.append(Incident(title=mention["payload"]["event"]["text"].partition("> ")[2]))


def grade(prompt: str) -> Grade:
    """What a model would be asked for."""
    return Grade(severity="high" if any(word in prompt.lower() for word in BAD) else "low")


incidents.on_new_records(FakeModel(graded, answer=grade, output=Grade, prompt="How bad is this? {title}",
                                   map={"incident": "id"}))

graded.on_new_records(SlackPostMessage(message_template="{severity}: {title}", into=posts, **SLACK))

incidents.on_changes(HttpRequest(
    env("STATUS_PAGE_URL"), sign="standard_webhooks", secret=env("STATUS_PAGE_SECRET"), effect="idempotent",
    private=bool(os.environ.get("STATUS_PAGE_PRIVATE")),
    json={"incident": "{id}", "title": "{title}", "state": "{state}"}))


@incidents.on_updated_records(columns=["state"])
def say_that_it_ended(ended: Records[Incident]):
    for incident in ended:
        for message in graded.select(incident=incident.id):
            for post in posts.select(record_id=message.id):
                corrections.append(Correction(channel=post["channel"], ts=post["ts"], text=f"ended: {incident.title}"))


corrections.on_new_records(SlackUpdateMessage(**SLACK))
