"""A real server of the protocol: llama.cpp's, by its package llama-cpp-python, with a tiny random model.

Building it takes minutes, so it is asked for: `make llama`, then it runs with the others.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.openai.embedding import OpenAiEmbedding
from pydantic import BaseModel

from anton import Table
from anton.app import declaring

REPO = Path(__file__).parent.parent
PYTHON = REPO / ".llama" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="llama.cpp's server is not built: make llama (minutes)")


class Triage(BaseModel):
    kind: Literal["bug", "question"]
    urgent: bool


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base_url of the server."""
    folder = tmp_path_factory.mktemp("llama")
    subprocess.run([PYTHON, REPO / "tests" / "tiny_gguf.py", folder / "tiny.gguf"], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [PYTHON, "-m", "llama_cpp.server", "--model", "tiny.gguf", "--model_alias", "tiny", "--host", "127.0.0.1",
             "--port", str(port), "--api_key", "sk-good", "--n_ctx", "1024", "--chat_format", "chatml",
             "--embedding", "true"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": "Bearer sk-good"})
                break
            except httpx.TransportError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def ask(app: Any, llama: str, **options: Any) -> list[Any]:
    with declaring(app.app):
        asked = Table("asked")
        asked.on_new_records(OpenAiCompletion(
            Table("answers"), api_key="sk-good", base_url=llama, model="tiny", max_tokens=100, temperature=0.0,
            price={"input": "1000", "output": "1000"}, budget="10 USD/day", **options))
    app.migrate()
    asked.extend({"prompt": prompt} for prompt in ("one", "two", "one"))
    app.run()
    for _ in range(6):
        app.advance("1h")
    found: list[Any] = app.records("answers")
    return found


def test_completions_of_it_are_asked_once_and_in_the_ledger(live, llama):
    answers = ask(live, llama)
    assert len(answers) == 3 and all(answer["model"] == "tiny" for answer in answers) and not live.dead
    calls = live._fetch("select cost, tokens_in + tokens_out as tokens, state from {schema}.call")
    assert len(calls) == 2 and all(call["state"] == "done" for call in calls)
    assert all(call["tokens"] > 0 and call["cost"] == call["tokens"] * Decimal("0.001") for call in calls)


def test_it_takes_no_schema_and_the_output_is_typed_all_the_same(live, llama):
    answers = ask(live, llama, output=Triage)
    assert len(answers) == 3 and not live.dead
    assert all(answer["kind"] in ("bug", "question") and answer["urgent"] in (True, False) for answer in answers)


def test_it_embeds(live, llama):
    with declaring(live.app):
        notes = Table("notes")
        notes.on_new_records(OpenAiEmbedding(Table("passages"), api_key="sk-good", base_url=llama, model="tiny"))
    live.migrate()
    notes.extend({"text": text} for text in ("one", "two", "three"))
    live.run()
    made = live.records("passages")
    assert len(made) == 3 and not live.dead and len({tuple(one["embedding"]) for one in made}) == 3
