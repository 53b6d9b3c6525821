"""The room, captured; and against services on this machine that refuse what is not right."""

import base64
import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anton.action import set_effects

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
MENTION = {"type": "event_callback", "event": {"type": "app_mention", "user": "U1", "channel": "C9", "ts": "1515.16",
                                               "text": "<@U0> the shop is down"}}


class Services(BaseHTTPRequestHandler):
    """Slack's three methods at /api, and a status page at /hook that checks who signed."""

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        method = self.path.rpartition("/")[2]
        if self.path == "/hook":
            signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + raw
            key = base64.b64decode(SECRET.removeprefix("whsec_"))
            wanted = "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
            status, reply = (200, {}) if self.headers["webhook-signature"] == wanted else (401, {})
        elif self.headers["Authorization"] != "Bearer xoxb-room":
            status, reply = 200, {"ok": False, "error": "invalid_auth"}
        else:
            status, reply = 200, {"ok": True, "ts": "77.1", "channel": "C9"}
        if status == 200 and reply.get("ok", True):
            self.server.told.append((method, json.loads(raw)))
        answer = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def services(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Services)
    server.daemon_threads = False
    server.told = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {"SLACK_API": f"{address}/api", "SLACK_TOKEN": "xoxb-room", "STATUS_PAGE_URL": f"{address}/hook",
                        "STATUS_PAGE_SECRET": SECRET, "STATUS_PAGE_PRIVATE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def mention(app):
    assert app.post("/slack", json=MENTION, sign="slack").status_code == 200
    app.run()


def test_a_mention_is_seen_graded_and_told(app):
    mention(app)
    assert [(one.title, one.severity) for one in app.records("graded")] == [("the shop is down", "high")]
    assert [call.text for call in app.outbox if "text" in call.args] == ["high: the shop is down"]
    assert [call.args["name"] for call in app.outbox if "name" in call.args] == ["eyes"]
    assert not app.dead


def test_services_are_told_each_thing_once_and_the_message_is_changed_at_the_end(services, app, monkeypatch):
    monkeypatch.delenv("ANTON_EFFECTS", raising=False)
    set_effects("live")
    mention(app)
    (incident,) = app.records("incidents")
    app.tables["incidents"].select(id=incident.id).update(state="ended")
    app.run()
    assert not app.dead and {call.state for call in app.calls} == {"sent"}
    told = {name: [body for method, body in services.told if method == name] for name, _ in services.told}
    assert told["reactions.add"] == [{"channel": "C9", "timestamp": "1515.16", "name": "eyes"}]
    assert [body["text"] for body in told["chat.postMessage"]] == ["high: the shop is down"]
    assert told["chat.update"] == [{"channel": "C9", "ts": "77.1", "text": "ended: the shop is down"}]
    assert [(body["incident"], body["state"]) for body in told["hook"]] == [
        (incident.id, "open"), (incident.id, "ended")]
