"""A Slack bot that answers when it is mentioned, and learns from the reactions to its replies.

    mention --> prompt --> completion --> reply where the mention came from        reactions --> training file, daily
                                          (a reply that speaks of money waits for a person of @team: /inbox)

Try it: anton dev. For real: set SLACK_SIGNING_SECRET, SLACK_TOKEN and OPENAI_API_KEY, then anton serve and anton work.
"""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.slack.action import SlackPostMessage

from anton import Approval, Records, Request, Table, Webhook, cron, env, post

SIGNING_SECRET = env("SLACK_SIGNING_SECRET")
TRAINING_FILE = Path(__file__).with_name("training.jsonl")
MONEY = ("refund", "discount", "free of charge", "$", "€")
VOTES = {"+1": 1, "thumbsup": 1, "heart": 1, "-1": -1, "thumbsdown": -1}

slack_mentions = Table("slack_mentions")
prompts = Table("prompts")
completions = Table("completions")
slack_responses = Table("slack_responses")
slack_reactions = Table("slack_reactions")


@post("/slack-mentions", verify="slack", secret=SIGNING_SECRET)
def handle_slack_mentions(request: Request) -> int:
    payload = request.json()
    slack_mentions.append({"timestamp": datetime.now(UTC), "payload": payload})
    return 200


@slack_mentions.on_new_records
def handle_new_slack_mentions(new_records: Records):
    for record in new_records:
        slack_text = record["payload"]["event"]["text"]
        prompts.append({"prompt": f"Respond to the following message with a friendly reply: {slack_text}"})


prompts.on_new_records(OpenAiCompletion(completions, api_key="xxxx", temperature=0.8))

team = Approval("@team", when=lambda reply: any(word in reply.text.lower() for word in MONEY), editable=["text"],
                preview="Reply in {channel}: {text}")

completions.on_new_records(SlackPostMessage(oauth_token="xxxx", message_template="{completion}", channel="#general",
                                            into=slack_responses, approve=team))

reactions_webhook = Webhook("/slack-reactions", slack_reactions, verify="slack", secret=SIGNING_SECRET)


@cron.daily
def rebuild_model():
    build_response_model(completions, slack_reactions)


def build_response_model(completions: Table, slack_reactions: Table) -> None:
    """Writes the replies that people voted on as JSON lines: the prompt, the reply, and the sum of its votes."""
    votes: Counter[tuple[str, str]] = Counter()
    for reaction in slack_reactions.select():
        event = reaction["payload"]["event"]
        sign = {"reaction_added": 1, "reaction_removed": -1}.get(event["type"], 0)
        votes[event["item"]["channel"], event["item"]["ts"]] += sign * VOTES.get(event["reaction"], 0)
    lines = []
    for response in slack_responses.select():
        rating = votes[response["channel"], response["ts"]]
        completion = completions.get(response["record_id"]) if rating else None
        if completion:
            lines.append(json.dumps({"messages": [{"role": "user", "content": completion["prompt"]},
                                                  {"role": "assistant", "content": completion["completion"]}],
                                     "rating": rating}))
    TRAINING_FILE.write_text("".join(f"{line}\n" for line in lines))
