"""The app against a model on this machine that knows nothing but its prompt: what the database tells it counts."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anton.action import set_effects

# customer, what they write, the team, whether it is urgent
TICKETS = [
    ("acme", "it is down again, we cannot work", "network", True), ("acme", "same as last week", "network", False),
    ("bolt", "the numbers look wrong to us", "billing", False), ("coil", "it says no", "login", False),
    ("dune", "nothing opens, we cannot work", "storage", True), ("echo", "it crashes on the train", "mobile", False),
    ("flux", "please help, it is slow", "storage", False), ("gala", "he left, what now?", "login", False),
    ("hale", "again!", "network", False), ("iris", "we cannot work with this", "mobile", False)]
EARLIER = {
    "acme": ("the line to Berlin is down", "network"), "bolt": ("wrong numbers on the invoice", "billing"),
    "coil": ("it says no after the password", "login"), "dune": ("no file opens", "storage"),
    "echo": ("it crashes when offline", "mobile"), "flux": ("disk is slow", "storage"),
    "gala": ("she left, close her account", "login"), "hale": ("packets get lost, again", "network"),
    "iris": ("the app shows a white page", "mobile")}
ENTERPRISE = {"acme", "dune"}


def triage(prompt, teams):
    """What the model makes of a prompt: the team of the most similar earlier ticket in it, else the first of all."""
    ticket = re.search(r"Ticket: (.*)", prompt)[1]
    words = set(re.findall(r"\w+", ticket.lower()))
    earlier = [json.loads(line) for line in re.findall(r'^- (\{.*"team":.*\})$', prompt, re.MULTILINE)]
    like = max(earlier, key=lambda one: len(words & set(re.findall(r"\w+", one["text"].lower()))), default=None)
    named = next((team for team in teams if team in words), None)
    team = named or (like["team"] if like else teams[0])
    return {"team": team, "urgent": '"enterprise"' in prompt and "cannot work" in ticket,
            "why": f'as in "{like["text"]}"' if like else "a guess"}


class Service(BaseHTTPRequestHandler):
    """POST /v1/chat/completions of OpenAI's protocol, with strict schemas."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        properties = body["response_format"]["json_schema"]["schema"]["properties"]
        text = json.dumps(triage(body["messages"][-1]["content"], properties["team"]["enum"]))
        reply = json.dumps({
            "id": "c1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 200, "completion_tokens": 20, "total_tokens": 220}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def model(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads = False
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-here")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def asking(model, app):
    """The app, which asks the model and captures all that would leave."""
    set_effects("capture")
    return app


def tell(app):
    """What the database knows of the customers."""
    app.tables["customers"].extend([{"id": name, "plan": "enterprise" if name in ENTERPRISE else "team",
                                     "product": "hosting"} for name in EARLIER])
    app.tables["solved"].extend([{"id": id, "customer": name, "text": text, "team": team}
                                 for id, (name, (text, team)) in enumerate(EARLIER.items(), 1)])


def deliver(app):
    """All tickets come in; how many were sorted right."""
    for id, (customer, text, _, _) in enumerate(TICKETS, 1):
        sent = app.post("/tickets", json={"id": id, "customer": customer, "text": text}, sign="standard_webhooks")
        assert sent.status_code == 200
    app.run()
    made = {row.ticket: (row.team, row.urgent) for row in app.records("triaged")}
    assert not app.dead and len(made) == len(TICKETS)
    return sum(made[id] == (team, urgent) for id, (_, _, team, urgent) in enumerate(TICKETS, 1))


def test_with_what_the_database_knows_the_model_is_right(asking, model):
    tell(asking)
    assert deliver(asking) >= 9
    assert any(call.text.startswith("Urgent, for network: it is down again") for call in asking.outbox)
    posted = [call for call in asking.outbox if call.name == "SlackPostMessage"]
    assert len(posted) == 2 and len(model.asked) == len(TICKETS)


def test_a_refund_waits_for_a_person_who_changes_the_amount(asking):
    tell(asking)
    deliver(asking)
    (asked,) = asking.approvals
    assert asked.preview == "Refund 20 EUR to bolt for ticket 3" and asking.records("refunds") == []
    (message,) = [call for call in asking.outbox if call.name == "SlackAskApproval"]
    assert (message.channel, message.text) == ("#billing", asked.preview)
    asked.approve(by="ann", edit={"amount": "12.50"})
    asking.run()
    (call,) = [call for call in asking.outbox if call.name == "refund"]
    assert (call.ticket, call.amount, call.state) == (3, "12.50", "captured")


def test_without_it_the_same_model_guesses(asking):
    assert deliver(asking) <= 5


def test_each_call_is_in_the_ledger_and_in_the_budget(asking):
    tell(asking)
    deliver(asking)
    ((calls, cost),) = asking._fetch("select count(*), sum(cost) from {schema}.call where state = 'done'")
    ((settled, reserved),) = asking._fetch("select sum(settled), sum(reserved) from {schema}.spent")
    assert (calls, settled, reserved) == (len(TICKETS), cost, 0) and 0 < cost < 5


def test_a_forged_ticket_leaves_no_row(app):
    assert app.post("/tickets", json={"id": 1, "customer": "acme", "text": "hi"}).status_code == 401
    assert app.records("tickets") == []


def test_without_a_key_an_echo_answers_and_nothing_leaves(app):
    app.tables["tickets"].append({"id": 1, "customer": "acme", "text": "hi"})
    app.run()
    assert len(app.records("triaged")) == 1 and not app.dead and len(app.model.asked) == 1
