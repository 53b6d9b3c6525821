"""LLM server: POST /v1/chat/completions as OpenAI has it, in a process of its own, which counts what it answers.

    python -m benchmarks.llmserver '{"delay": 1.0, "faults": 0.05}'       prints its port

delay: seconds for an answer. faults: the share of requests that get 429, and that get 500; a tenth of it hangs.
GET /counts: {"answered": {prompt: times}, "at": [when each came, monotonic], "tokens_in", "tokens_out", "most" at once,
"hung": {prompt: times}, "inflight": [prompts], "recent": [prompts answered in the last second]}.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
import time
from collections import Counter
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

HANG = 30.0  # seconds; longer than any client waits


class Service:
    """What it was asked, and what it answered."""

    def __init__(self, delay: float = 0.0, faults: float = 0.0) -> None:
        self.delay = delay
        self.faults = faults
        self.answered: Counter[str] = Counter()
        self.at: list[float] = []
        self.ended: list[tuple[float, str]] = []
        self.inflight: Counter[str] = Counter()
        self.hung: Counter[str] = Counter()
        self.most = self.tokens_in = self.tokens_out = 0
        self._dice = random.Random(7)

    async def complete(self, request: Request) -> Response:
        body = json.loads(await request.body())
        prompt = body["messages"][-1]["content"]
        fate = self._dice.random()
        if fate < self.faults:
            return JSONResponse({"error": {"message": "slow down"}}, 429, headers={"retry-after-ms": "100"})
        if fate < 2 * self.faults:
            return JSONResponse({"error": {"message": "no luck"}}, 500)
        if fate < 2.1 * self.faults:
            self.hung[prompt] += 1
            await asyncio.sleep(HANG)
            return JSONResponse({"error": {"message": "too late"}}, 503)
        self.at.append(time.monotonic())
        self.inflight[prompt] += 1
        self.most = max(self.most, self.inflight.total())
        await asyncio.sleep(self.delay)
        self.inflight -= Counter([prompt])
        self.answered[prompt] += 1
        self.ended.append((time.monotonic(), prompt))
        tokens = len(prompt.split())
        self.tokens_in += tokens
        self.tokens_out += 2
        return JSONResponse({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "it is"}}],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 2, "total_tokens": tokens + 2}})

    async def counts(self, request: Request) -> Response:
        now = time.monotonic()
        return JSONResponse({
            "answered": self.answered, "at": self.at, "tokens_in": self.tokens_in, "tokens_out": self.tokens_out,
            "most": self.most, "hung": self.hung, "inflight": list(self.inflight),
            "recent": [prompt for at, prompt in self.ended if at > now - 1.0]})


def main(options: dict[str, Any]) -> None:
    service = Service(**options)
    app = Starlette(routes=[Route("/v1/chat/completions", service.complete, methods=["POST"]),
                            Route("/counts", service.counts)])
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        print(listening.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off")).run([listening])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
