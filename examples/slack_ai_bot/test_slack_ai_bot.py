"""The bot, from a signed request to the captured reply, and back from a reaction to a line of training data."""

import json
import sys

import pytest

MENTION = {"type": "event_callback", "event": {"type": "app_mention", "user": "U061F7AUR", "channel": "C0LUNCH",
                                               "text": "<@U0LAN0Z89> what's for lunch?", "ts": "1515449522.000016"}}


def mention(app):
    assert app.post("/slack-mentions", json=MENTION, sign="slack").status_code == 200
    app.run()


def test_a_mention_is_answered_in_its_channel_and_thread(app):
    mention(app)
    assert [call.args for call in app.outbox] == [
        {"channel": "C0LUNCH", "thread_ts": "1515449522.000016", "text": "Friendly echo: what's for lunch?"}]
    assert not app.dead


def test_the_model_is_asked_what_was_said_and_its_answer_is_posted(app):
    app.model.reply("Soup!")
    mention(app)
    assert app.model.asked == [
        "Respond to the following message with a friendly reply: <@U0LAN0Z89> what's for lunch?"]
    assert [call.text for call in app.outbox] == ["Soup!"]


def test_a_prompt_from_sql_is_answered_in_the_general_channel(app):
    app.tables["prompts"].append({"prompt": "hello"})
    app.run()
    assert [(call.channel, call.text) for call in app.outbox] == [("#general", "Friendly echo: hello")]


def test_a_reply_that_speaks_of_money_waits_for_a_person_who_may_change_it(app):
    app.model.reply("Sure, here is a refund of 500.")
    mention(app)
    assert app.outbox == [] and app.approvals[0].preview == "Reply in C0LUNCH: Sure, here is a refund of 500."
    app.approvals[0].approve(by="ann", edit={"text": "I have asked Ann."})
    app.run()
    assert [call.text for call in app.outbox] == ["I have asked Ann."]


@pytest.mark.parametrize("headers", [{}, {"X-Slack-Signature": "v0=00", "X-Slack-Request-Timestamp": "1"}])
def test_a_forged_request_gets_401_and_leaves_no_row(app, headers):
    for path in ("/slack-mentions", "/slack-reactions"):
        assert app.post(path, json=MENTION, headers=headers).status_code == 401
    assert app.records("slack_mentions") == app.records("slack_reactions") == []


def test_slack_may_ask_whether_the_address_is_ours(app):
    asked = {"type": "url_verification", "challenge": "3eZbrw1aB"}
    assert app.post("/slack-mentions", json=asked, sign="slack").text == "3eZbrw1aB"
    assert app.records("slack_mentions") == []


def test_reactions_make_a_training_file_every_day(app, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["main"], "TRAINING_FILE", tmp_path / "training.jsonl")
    mention(app)
    reply = app.records("slack_responses")[0]
    for reaction in ("+1", "heart", "eyes", "-1"):
        item = {"type": "message", "channel": reply["channel"], "ts": reply["ts"]}
        event = {"type": "reaction_added", "reaction": reaction, "item": item}
        assert app.post("/slack-reactions", json={"event": event}, sign="slack").status_code == 200
    app.advance("24h")
    (line,) = (tmp_path / "training.jsonl").read_text().splitlines()
    assert json.loads(line)["rating"] == 1
    assert json.loads(line)["messages"][1] == {"role": "assistant", "content": "Friendly echo: what's for lunch?"}
    assert not app.dead
