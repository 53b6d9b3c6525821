"""Support tickets come in by webhook, and a model says which team each belongs to, how urgent it is, and why.

    POST /tickets --> tickets --> a model, and what the database knows of the customer --> triaged --> urgent: a message
                                                     billing, for who pays: a refund, if a person says so, and how much

What the model gets besides the ticket is SQL: the customer's plan, and how their earlier tickets were solved. It costs
at most 5 dollars a day; then tickets wait.

Try it: anton dev (an echo answers, nothing leaves). For real: set OPENAI_API_KEY, SLACK_TOKEN and TICKETS_SECRET, then
anton serve and anton work. Any other server of OpenAI's protocol: OPENAI_BASE_URL=http://localhost:8080/v1.
"""

import os
from decimal import Decimal
from typing import Literal

from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.slack.action import SlackPostMessage
from anton_components.vendor.slack.approval import SlackAskApproval
from pydantic import BaseModel

from anton import Approval, Records, Table, Webhook, action, env, sql
from anton.notices import Notices

PRICES = {"team": Decimal(20), "enterprise": Decimal(200)}


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


class Refund(BaseModel):
    """What was given back."""

    id: int | None = None
    ticket: int
    customer: str
    amount: Decimal


customers = Table("customers", Customer)
tickets = Table("tickets", Ticket)
solved = Table("solved", Solved, index=["customer"])
triaged = Table("triaged", Triaged)
refunds = Table("refunds", Refund)

Webhook("/tickets", tickets, verify="standard_webhooks", secret=env("TICKETS_SECRET"))

tickets.on_new_records(OpenAiCompletion(
    triaged, model="gpt-5.4-mini", base_url=os.environ.get("OPENAI_BASE_URL"), prompt="triage.md", output=Triage,
    max_tokens=300, budget="5 USD/day", price={"input": "0.75", "output": "4.5"}, map={"ticket": "id"},
    context={"customer_facts": sql("select plan, product from customers where id = {customer}"),
             "earlier": sql("select text, team from solved where customer = {customer} order by id desc limit 5")}))

triaged.on_new_records(SlackPostMessage(oauth_token=env("SLACK_TOKEN"), channel="#support",
                                        message_template="Urgent, for {team}: {text} ({why})"), where="urgent")

billing = Approval("@billing", via=["inbox", "slack:#billing"], editable=["amount"], timeout="48h", remind=["24h"],
                   preview="Refund {amount} EUR to {customer} for ticket {ticket}")


@action(approve=billing, into=refunds, cap="1000 amount/day")
async def refund(ticket: int, customer: str, amount: Decimal, why: str) -> Refund:
    return Refund(ticket=ticket, customer=customer, amount=amount)     # the call of your payment service goes here


Notices().on_new_records(SlackAskApproval(oauth_token=env("SLACK_TOKEN")), where="via = 'slack'")


@triaged.on_new_records(where="team = 'billing'")
def offer_a_month(records: Records[Triaged]):
    for one in records:
        customer = customers.get(one.customer)
        if customer and customer.plan != "free":
            refund.send(ticket=one.ticket, customer=customer.id, amount=PRICES[customer.plan], why=one.why)
