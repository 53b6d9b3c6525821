"""Orders come in by webhook, dbt keeps what each customer spent, and who became a big spender is thanked.

    Shopify --> events --> orders --run_when--> dbt: customers, countries (views on top: best_customers)
                                                      |-- a customer's revenue passed 1,000 --> Slack

Try it: anton dev, then post an order to /shopify. For real: set SHOPIFY_SECRET and SLACK_TOKEN, then anton serve and
anton work. The dbt project is an ordinary one: `dbt run` works as well, and what it changes reaches the same handlers.
"""

from decimal import Decimal

from anton_components.vendor.slack.action import SlackPostMessage
from pydantic import BaseModel

from anton import DbtProject, Records, Table, Webhook, env


class Order(BaseModel):
    id: int
    customer: str
    country: str
    total: Decimal


class Customer(BaseModel):
    customer: str
    orders: int
    revenue: Decimal


events = Table("events")
orders = Table("orders", Order)
thanks = Table("thanks")
alarms = Table("alarms")

Webhook("/shopify", events, verify="shopify", secret=env("SHOPIFY_SECRET"))

shop = DbtProject("dbt_project")
customers = shop.model("customers", Customer)
shop.run_when(orders, debounce="2s", max_wait="30s")


@events.on_new_records
def keep(records: Records):
    for event in records:
        order = event["payload"]
        orders.upsert({"id": order["id"], "customer": order["email"], "total": order["total_price"],
                       "country": order["shipping_address"]["country_code"]})


@customers.on_updated_records(where="new.revenue > 1000 and old.revenue <= 1000")
def became_a_big_spender(records: Records[Customer]):
    for customer in records:
        thanks.append({"text": f"{customer.customer} has spent {customer.revenue} in {customer.orders} orders"})


thanks.on_new_records(SlackPostMessage(oauth_token=env("SLACK_TOKEN"), message_template="{text}", channel="#sales"))


@customers.on_failed
def tell_somebody(failed):
    alarms.append({"text": failed.error})
