"""What leaves for an order and for a complaint about it, in Postgres, with nothing sent."""

ORDER = {"email": "bob@x.example", "total": "12.5", "partner_url": "https://partner.example/hook"}


def calls(app, name):
    return [call for call in app.outbox if call.name == name]


def test_who_has_to_know_of_an_order_is_told(app):
    app.post("/orders", json=ORDER, sign="standard_webhooks").raise_for_status()
    app.run()
    assert {call.name for call in app.outbox} == {"SendEmail", "S3Put", "PostgresWrite", "SendWebhook",
                                                  "SlackPostMessage"}
    (mail,), (file,), (row,), (hook,) = (calls(app, name) for name in ("SendEmail", "S3Put", "PostgresWrite",
                                                                       "SendWebhook"))
    assert mail.to == ["bob@x.example"] and "12.5" in mail.text and mail.subject == "Your order 1"
    assert (file.bucket, file.path) == ("invoices", "orders/1.txt")
    assert row.row["id"] == 1 and hook.url == ORDER["partner_url"] and not app.dead


def test_a_complaint_is_replied_to_in_its_thread_and_becomes_an_issue_when_a_person_says_so(app):
    app.post("/orders", json=ORDER, sign="standard_webhooks").raise_for_status()
    app.run()
    app.post("/complaints", json={"order": 1, "text": "Broken!"}, sign="standard_webhooks").raise_for_status()
    app.run()
    (reply,) = calls(app, "SlackReply")
    assert reply.text == "complaint: Broken!" and reply.thread_ts.startswith("captured-")
    assert calls(app, "GitHubIssue") == []
    (asked,) = app.approvals
    asked.approve(by="ann", edit={"body": "It arrived broken."})
    app.run()
    (issue,) = calls(app, "GitHubIssue")
    assert (issue.title, issue.body) == ("Complaint about order 1", "It arrived broken.")
