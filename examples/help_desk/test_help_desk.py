"""The app against services on this machine: embeddings count words, and the model repeats the first article."""

import base64
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anton.action import set_effects

WORDS = ("parcel", "late", "password", "reset", "invoice", "refund")


class Services(BaseHTTPRequestHandler):
    """POST /v1/embeddings of OpenAI and /v1/messages of Anthropic; what has no key is refused."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        if self.path == "/v1/embeddings" and self.headers["Authorization"] == "Bearer sk-openai":
            self.answer(200, self.embeddings(body))
        elif self.path == "/v1/messages" and "sk-anthropic" in (self.headers["X-Api-Key"] or "",
                                                                (self.headers["Authorization"] or "")[len("Bearer "):]):
            first = next(line[2:] for line in body["messages"][-1]["content"].splitlines() if line.startswith("- "))
            self.answer(200, {"id": "m1", "type": "message", "role": "assistant", "model": body["model"],
                              "content": [{"type": "text", "text": f"As we say: {first}"}], "stop_reason": "end_turn",
                              "stop_sequence": None, "usage": {"input_tokens": 20, "output_tokens": 5}})
        else:
            self.answer(401, {"error": {"message": "no key"}})

    def embeddings(self, body):
        data = []
        for at, text in enumerate(body["input"]):
            packed = struct.pack(f"<{len(WORDS)}f", *(float(word in text.lower()) for word in WORDS))
            data.append({"object": "embedding", "index": at, "embedding": base64.b64encode(packed).decode()})
        return {"object": "list", "data": data, "model": body["model"],
                "usage": {"prompt_tokens": 5, "total_tokens": 5}}

    def answer(self, status, reply):
        raw = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def services(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Services)
    server.daemon_threads = False
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-anthropic")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def write(app):
    app.tables["articles"].extend([
        {"id": 1, "text": "A late parcel is refunded after ten days."},
        {"id": 2, "text": "To reset a password, follow the link in the mail."},
        {"id": 3, "text": "An invoice is sent each month."}])
    app.run()
    app.tables["questions"].append({"id": 1, "text": "How do I reset my password?"})
    app.run()


def test_a_question_is_answered_from_the_article_that_is_most_like_it(services, app):
    set_effects("capture")
    write(app)
    (answer,) = app.records("answers")
    assert answer.completion == "As we say: To reset a password, follow the link in the mail." and not app.dead
    assert answer.text == "How do I reset my password?"
    assert {path for path, _ in services.asked} == {"/v1/embeddings", "/v1/messages"}


def test_without_keys_an_echo_answers_and_nothing_leaves(app, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    write(app)
    assert len(app.records("passages")) == 3 and len(app.records("answers")) == 1 and not app.dead
