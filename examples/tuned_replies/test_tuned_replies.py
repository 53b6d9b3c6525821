"""The app against a service on this machine that takes files, tunes at once, and says which model answers."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anton.action import set_effects


class Service(BaseHTTPRequestHandler):
    """Files, tuning jobs and completions of OpenAI's protocol; what has no key is refused."""

    def do_GET(self):
        if self.path.startswith("/v1/fine_tuning/jobs?"):
            self.answer(200, {"object": "list", "data": self.server.jobs, "has_more": False})
        else:
            self.answer(200, {**self.server.jobs[-1], "status": "succeeded", "fine_tuned_model": "ft:replies"})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer sk-here":
            self.answer(401, {"error": {"message": "no key"}})
        elif self.path == "/v1/files":
            self.server.lines += re.findall(rb'\{"messages".*\}', raw)
            self.answer(200, {"id": "file-1", "object": "file", "bytes": len(raw), "created_at": 1,
                              "filename": "replies.jsonl", "purpose": "fine-tune", "status": "processed"})
        elif self.path == "/v1/fine_tuning/jobs":
            job = {"id": "ftjob-1", "object": "fine_tuning.job", "created_at": 1, "status": "running",
                   "hyperparameters": {}, "organization_id": "o", "result_files": [], "seed": 1, **json.loads(raw)}
            self.server.jobs.append(job)
            self.answer(200, job)
        else:
            model = json.loads(raw)["model"]
            self.answer(200, {"id": "c1", "object": "chat.completion", "created": 1, "model": model, "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"{model} says hi"}}],
                "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}})

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
def service(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads = False
    server.jobs, server.lines = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-here")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_was_rated_well_is_learnt_and_then_answers(service, app, monkeypatch):
    monkeypatch.delenv("ANTON_EFFECTS", raising=False)
    set_effects("live")
    app.tables["rated"].extend([{"prompt": "hi", "reply": "hello!", "rating": 1},
                                {"prompt": "lunch?", "reply": "soup", "rating": 2},
                                {"prompt": "no", "reply": "bad", "rating": -1}])
    app.advance(f"{7 - app.now.isoweekday() % 7}d1h")  # past the next Sunday's midnight, and no other
    assert len(service.jobs) == 1 and len(service.lines) == 2 and b"bad" not in b"".join(service.lines)
    assert [(run.state, run.model) for run in app.records("tunings")][:1] == [("succeeded", "ft:replies")]
    app.tables["prompts"].append({"prompt": "hi"})
    app.run()
    assert app.records("completions")[0]["completion"] == "ft:replies says hi" and not app.dead


def test_without_a_key_an_echo_answers_and_nothing_is_tuned(app, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    app.tables["prompts"].append({"prompt": "hi"})
    app.advance("8d")
    assert app.records("completions")[0]["model"] == "echo" and not app.dead
    assert all(run.state in ("captured", "failed") for run in app.records("tunings"))
