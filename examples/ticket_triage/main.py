"""Support tickets come in by webhook, and a model says which team each belongs to, how urgent it is, and why.

    POST /tickets --> tickets --> a model, and what the database knows of the customer --> triaged --> urgent: a message

What the model gets besides the ticket is SQL: the customer's plan, and how their earlier tickets were solved. It costs
at most 5 dollars a day; then tickets wait.

Try it: anton dev (an echo answers, nothing leaves). For real: set OPENAI_API_KEY, SLACK_TOKEN and TICKETS_SECRET, then
anton serve and anton work. Any other server of OpenAI's protocol: OPENAI_BASE_URL=http://localhost:8080/v1.
"""

import os
from typing import Literal

from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.slack.action import SlackPostMessage
from pydantic import BaseModel

from anton import Table, Webhook, env, sql


class Customer(BaseModel):
    id: str
    plan: Literal["free", "team", "enterprise"]
    product: str


class Ticket(BaseModel):
    id: int
    customer: str
    text: str


class Solved(BaseModel):
    id: int
    customer: str
    text: str
    team: str


class Triage(BaseModel):
    """What the model is asked for."""

    team: Literal["billing", "network", "storage", "login", "mobile"]
    urgent: bool
    why: str


class Triaged(Triage):
    id: int | None = None
    ticket: int
    customer: str
    text: str


customers = Table("customers", Customer)
tickets = Table("tickets", Ticket)
solved = Table("solved", Solved, index=["customer"])
triaged = Table("triaged", Triaged)

Webhook("/tickets", tickets, verify="standard_webhooks", secret=env("TICKETS_SECRET"))

tickets.on_new_records(OpenAiCompletion(
    triaged, model="gpt-5.4-mini", base_url=os.environ.get("OPENAI_BASE_URL"), prompt="triage.md", output=Triage,
    max_tokens=300, budget="5 USD/day", price={"input": "0.75", "output": "4.5"}, map={"ticket": "id"},
    context={"customer_facts": sql("select plan, product from customers where id = {customer}"),
             "earlier": sql("select text, team from solved where customer = {customer} order by id desc limit 5")}))

triaged.on_new_records(SlackPostMessage(oauth_token=env("SLACK_TOKEN"), channel="#support",
                                        message_template="Urgent, for {team}: {text} ({why})"), where="urgent")
