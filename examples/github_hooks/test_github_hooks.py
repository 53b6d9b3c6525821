"""The app, fed with what GitHub really sent: payloads.json.gz has one recorded delivery of each event, from the npm
package @octokit/webhooks-examples 7.6.1 (MIT licence).
"""

import gzip
import json
from pathlib import Path

import pytest

from anton import env
from anton.secret import reveal
from anton.verify import SCHEMES

EVENTS = json.loads(gzip.decompress(Path(__file__).with_name("payloads.json.gz").read_bytes()))


def deliver(app, event, payload, id, secret=None):
    body = json.dumps(payload).encode()
    signed = SCHEMES["github"].sign(body, secret or reveal(env("GITHUB_WEBHOOK_SECRET")), id=id)
    return app.post("/github", content=body, headers=signed | {"X-GitHub-Event": event}).status_code


def test_every_event_is_a_record_as_it_was_sent(app):
    for name, payload in EVENTS.items():
        assert deliver(app, name, payload, name) == 200
    kept = {record["headers"]["x-github-event"]: record["payload"] for record in app.records("events")}
    assert kept == {name: payload for name, payload in EVENTS.items() if name != "ping"}  # that asks if we are there
    assert len(kept) > 50


def test_what_is_sent_twice_is_kept_once_and_what_is_forged_never(app):
    for _ in range(2):
        assert deliver(app, "issues", EVENTS["issues"], "72d3162e") == 200
    assert deliver(app, "issues", EVENTS["issues"], "72d3162f", "another secret") == 401
    app.run()
    assert (len(app.records("events")), len(app.records("issues"))) == (1, 1)


@pytest.mark.parametrize(("action", "left"), [("closed", [False]), ("reopened", [True]), ("deleted", [])])
def test_the_board_follows_the_issues(app, action, left):
    payload = EVENTS["issues"]
    deliver(app, "issues", payload | {"action": "opened"}, "1")
    app.run()
    state = "closed" if action == "closed" else "open"
    deliver(app, "issues", payload | {"action": action, "issue": payload["issue"] | {"state": state}}, "2")
    app.run()
    assert [issue.open for issue in app.records("issues")] == left and not app.dead


def test_stars_are_counted_for_each_repository(app):
    for name, payload in EVENTS.items():
        deliver(app, name, payload, name)
    app.run()
    counted = {row.repository: row.stars for row in app.records("stars")}
    repository = EVENTS["star"]["repository"]
    assert repository["full_name"] in counted and all(stars >= 0 for stars in counted.values()) and not app.dead
