"""Orders come in by a webhook. Who has to know is told: the customer, the books, the warehouse, the partner, the team.

    order --> a receipt by e-mail, an invoice in S3, a row in the warehouse's Postgres, a signed webhook to the partner
    order --> a message in Slack;  its complaint --> a reply in that message's thread
    complaint --> an issue on GitHub, its label, and a comment; but for what a stranger wrote a person is asked

All of these are actions: calls are rows that commit with their cause, and each is sent once, or known to be in doubt.
Try it: anton dev. For real: set the variables below, then anton serve and anton work.
"""

import os

from anton_components.vendor.github.action import GitHubComment, GitHubIssue, GitHubLabel
from anton_components.vendor.http.webhook import SendWebhook
from anton_components.vendor.postgres.action import PostgresWrite
from anton_components.vendor.s3.action import S3Put
from anton_components.vendor.slack.action import SlackPostMessage, SlackReply
from anton_components.vendor.smtp.action import SendEmail
from pydantic import BaseModel

from anton import Approval, Records, Table, Webhook, env
from anton.meaning import EmailAddress, Money, Url


class Order(BaseModel):
    id: int | None = None
    email: EmailAddress
    total: Money
    partner_url: Url


class Complaint(BaseModel):
    id: int | None = None
    order: int
    text: str


class Reply(BaseModel):
    id: int | None = None
    channel: str
    ts: str
    text: str


incoming, complained = Table("incoming"), Table("complained")
orders, complaints = Table("orders", Order), Table("complaints", Complaint)
posts, replies, issues = Table("posts"), Table("replies", Reply), Table("issues")

SLACK = {"oauth_token": env("SLACK_TOKEN"), "api": os.environ.get("SLACK_API", "https://slack.com/api")}
GITHUB = {"token": env("GITHUB_TOKEN"), "api": os.environ.get("GITHUB_API", "https://api.github.com")}
REPO = "acme/shop"

Webhook("/orders", incoming, verify="standard_webhooks", secret=env("SHOP_SECRET"))
Webhook("/complaints", complained, verify="standard_webhooks", secret=env("SHOP_SECRET"))


@incoming.on_new_records
def take_orders(received: Records):
    for one in received:
        orders.append(Order(**one["payload"]))


@complained.on_new_records
def take_complaints(received: Records):
    for one in received:
        complaints.append(Complaint(**one["payload"]))


orders.on_new_records(SendEmail(
    os.environ.get("SMTP_HOST", "smtp.example.com"), username="shop", password=env("SMTP_PASSWORD"),
    sender="The shop <shop@example.com>", subject="Your order {id}", text="Thank you. You owe us {total}."))

orders.on_new_records(S3Put("invoices", key="orders/{id}.txt", body="Order {id}: {total}", region="eu-central-1",
                            access_key=env("AWS_ACCESS_KEY_ID"), secret_key=env("AWS_SECRET_ACCESS_KEY"),
                            endpoint=os.environ.get("S3_ENDPOINT")))

orders.on_new_records(PostgresWrite(env("WAREHOUSE_URL"), "sales.orders", {"id": "{id}", "total": "{total}"},
                                    unique=["id"]))

orders.on_new_records(SendWebhook("{partner_url}", secret=env("PARTNER_SECRET"),
                                  json={"type": "order.created", "id": "{id}", "total": "{total}"}))

orders.on_new_records(SlackPostMessage(channel="#orders", message_template="Order {id}: {total}", into=posts, **SLACK))

complaints.on_new_records(GitHubIssue(REPO, title="Complaint about order {order}", into=issues, **GITHUB,
                                      approve=Approval("@support", editable=["body"])))
issues.on_new_records(GitHubLabel(REPO, ["complaint"], **GITHUB))
issues.on_new_records(GitHubComment(REPO, body="The order desk looks at it.", **GITHUB))


@complaints.on_new_records
def tell_the_team(received: Records[Complaint]):
    for complaint in received:
        for post in posts.select(record_id=complaint.order):
            replies.append(Reply(channel=post["channel"], ts=post["ts"], text=f"complaint: {complaint.text}"))


replies.on_new_records(SlackReply(**SLACK))
