"""Orders in by webhook, a message out when a model's record says so, by the real dbt."""

import json


def order(app, id, email, total, country="DE"):
    body = {"id": id, "email": email, "total_price": str(total), "shipping_address": {"country_code": country}}
    answer = app.post("/shopify", content=json.dumps(body).encode(), sign="shopify")
    assert answer.status_code == 200, answer.text


def test_who_becomes_a_big_spender_is_thanked_once(app):
    order(app, 1, "ann@x.com", 900)
    order(app, 2, "bob@x.com", 5000, "FR")            # was a big spender from the first
    app.advance("3s")                                  # nothing changed for two seconds: dbt builds
    assert not app.outbox and not app.dead
    order(app, 3, "ann@x.com", 200)
    order(app, 4, "bob@x.com", 1, "FR")
    app.advance("3s")
    assert [call.text for call in app.outbox] == ["ann@x.com has spent 1100 in 2 orders"]
    assert {row.customer: row.revenue for row in app.records("customers")} == {"ann@x.com": 1100, "bob@x.com": 5001}
    assert not app.dead and not app.records("alarms")
