"""LLM: services of models on a port of this machine, speaking the real wire formats; they refuse wrong requests.

    with serving(Llm()) as llm: …                      llm.url: "http://127.0.0.1:…"
    llm.script(429, 500, "hang", "answer")             what the next requests get; after that each is answered
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peers import served
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class Llm:
    """POST /v1/chat/completions as OpenAI has it, /v1/messages as Anthropic has it.

    asked: the bodies, answered or not. arrived: when those that are answered came, on the monotonic clock, and with how
    many tokens. hung: set when one hangs.
    answer: the text for the last user message. takes: the modes of structured answers it knows. headers: of answers.
    """

    def __init__(self, answer: Callable[[str], str] = lambda prompt: f"re: {prompt}", *, key: str = "sk-good",
                 takes: tuple[str, ...] = ("schema", "tool"), headers: Mapping[str, str] | None = None,
                 delay: float = 0.0) -> None:
        self.answer = answer
        self.key = key
        self.takes = takes
        self.headers = dict(headers or {})
        self.delay = delay
        self.asked: list[dict[str, Any]] = []
        self.arrived: list[tuple[float, int]] = []
        self.billed = 0
        self.usage: dict[str, Any] = {}                                # said instead of what was counted
        self.raw: list[Any] = []                                       # answers as they are: bytes, or what is JSON
        self.silent = False                                            # says nothing of tokens
        self.url = ""
        self.inflight = self.most = 0                                  # of those it answers; at once
        self.hung = threading.Event()
        self.ended = asyncio.Event()
        self._script: deque[Any] = deque()

    def script(self, *steps: Any) -> None:
        """What comes next: "answer", "hang", a status, (status, headers) or (status, headers, words, code)."""
        self._script.extend(steps)

    async def openai(self, request: Request) -> Response:
        body = json.loads(await request.body())
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}, 401)
        wrong = _wrong_openai(body, self.takes)
        if wrong:
            return JSONResponse({"error": {"message": wrong, "param": wrong.split()[0]}}, 400)
        failed = await self._step(body)
        if failed is not None:
            return failed
        text = self.answer(body["messages"][-1]["content"])
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        words = text.split()
        cut = limit is not None and len(words) > limit
        text = " ".join(words[:limit]) if cut else text
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if "tools" in body:
            message = {"role": "assistant", "content": None, "tool_calls": [{
                "id": "call_1", "type": "function",
                "function": {"name": body["tools"][0]["function"]["name"], "arguments": text}}]}
        tokens_in, tokens_out = _count(body["messages"]), len(text.split())
        self.billed += tokens_in + tokens_out
        return self._said({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"] + "-2026-03-17",
            "choices": [{"index": 0, "finish_reason": "length" if cut else "stop", "message": message}],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out,
                      "total_tokens": tokens_in + tokens_out, **self.usage}})

    async def anthropic(self, request: Request) -> Response:
        body = json.loads(await request.body())
        keys = {request.headers.get("x-api-key"), request.headers.get("authorization", "").removeprefix("Bearer ")}
        if self.key not in keys or not request.headers.get("anthropic-version"):
            return JSONResponse({"type": "error", "error": {"type": "authentication_error", "message": "no key"}}, 401)
        wrong = _wrong_anthropic(body, self.takes)
        if wrong:
            return JSONResponse({"type": "error", "error": {"type": "invalid_request_error", "message": wrong}}, 400)
        failed = await self._step(body)
        if failed is not None:
            return failed
        text = self.answer(body["messages"][-1]["content"])
        content: list[Any] = [{"type": "text", "text": text}]
        if "tools" in body:
            content = [{"type": "tool_use", "id": "t1", "name": body["tools"][0]["name"], "input": json.loads(text)}]
        tokens_in = _count(body["messages"]) + len(body.get("system", "").split())
        self.billed += tokens_in + len(text.split())
        return self._said({
            "id": "msg_1", "type": "message", "role": "assistant", "model": body["model"] + "-20260101",
            "content": content, "stop_reason": "tool_use" if "tools" in body else "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": tokens_in, "output_tokens": len(text.split())}})

    async def embeddings(self, request: Request) -> Response:
        """A number for how often each letter comes, as base64 unless floats are asked for; "poison" is refused."""
        body = json.loads(await request.body())
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}, 401)
        texts = body.get("input")
        if set(body) - {"model", "input", "dimensions", "encoding_format"} or not isinstance(texts, list) or not all(
                isinstance(text, str) and text for text in texts) or len(texts) > 2048:
            return JSONResponse({"error": {"message": "input is wrong", "param": "input"}}, 400)
        if any("poison" in text for text in texts):
            return JSONResponse({"error": {"message": "input is too long", "param": "input"}}, 400)
        failed = await self._step({**body, "messages": [{"content": text} for text in texts]})
        if failed is not None:
            return failed
        letters = "abcdefghijklmnopqrstuvwxyz"[:body.get("dimensions", 26)]
        tokens = sum(len(text.split()) for text in texts)
        self.billed += tokens
        data = []
        for at, text in enumerate(texts):
            numbers = [float(text.count(letter)) for letter in letters]
            packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
            data.append({"object": "embedding", "index": at,
                         "embedding": packed if body.get("encoding_format") == "base64" else numbers})
        return self._said({"object": "list", "data": data[::-1], "model": body["model"] + "-v1",
                           "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    def _said(self, reply: dict[str, Any]) -> Response:
        if self.raw:
            raw = self.raw.pop(0)
            return Response(raw if isinstance(raw, bytes) else json.dumps(raw),
                            headers={"content-type": "application/json", **self.headers})
        return JSONResponse({name: value for name, value in reply.items() if name != "usage" or not self.silent},
                            headers=self.headers)

    async def _step(self, body: dict[str, Any]) -> Response | None:
        step = self._script.popleft() if self._script else "answer"
        self.asked.append(body)
        if step == "hang":
            self.hung.set()
            await self.ended.wait()
            return JSONResponse({}, 503)
        if step != "answer":
            status, headers, *words = step if isinstance(step, tuple) else (step, {})
            said, code = [*words, *(f"scripted {status}", None)[len(words):]]
            return JSONResponse({"error": {"message": said, "code": code}}, status, headers=headers)
        self.arrived.append((time.monotonic(), _count(body["messages"])))
        self.inflight += 1
        self.most = max(self.most, self.inflight)
        await asyncio.sleep(self.delay)                                # what a model takes
        self.inflight -= 1
        return None


def _count(messages: list[dict[str, Any]]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def _wrong_openai(body: dict[str, Any], takes: tuple[str, ...]) -> str | None:
    known = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "response_format", "tools",
             "tool_choice"}
    if set(body) - known:
        return f"{sorted(set(body) - known)[0]} is unknown"
    if not isinstance(body.get("model"), str):
        return "model is missing"
    if not body.get("messages") or any(set(one) != {"role", "content"} for one in body["messages"]):
        return "messages are wrong"
    if "response_format" in body:
        given = body["response_format"]
        if "schema" not in takes:
            return "response_format is not supported here"
        if given.get("type") != "json_schema" or given["json_schema"].get("strict") is not True:
            return "response_format is wrong"
        return _lax(given["json_schema"]["schema"])
    if "tools" in body and ("tool" not in takes or body["tool_choice"]["type"] != "function"):
        return "tools are not supported here"
    return None


def _wrong_anthropic(body: dict[str, Any], takes: tuple[str, ...]) -> str | None:
    known = {"model", "messages", "temperature", "max_tokens", "system", "output_config", "tools", "tool_choice"}
    if set(body) - known:
        return f"{sorted(set(body) - known)[0]}: Extra inputs are not permitted"
    if not isinstance(body.get("max_tokens"), int):
        return "max_tokens: Field required"
    if any(one["role"] not in ("user", "assistant") for one in body["messages"]):
        return "messages: unexpected role"
    if "output_config" in body and "schema" not in takes:
        return "output_config: not supported by this model"
    return _lax(body["output_config"]["format"]["schema"]) if "output_config" in body else None


def _lax(schema: Any) -> str | None:
    """What strict mode refuses."""
    if isinstance(schema, list):
        return next(filter(None, map(_lax, schema)), None)
    if not isinstance(schema, dict):
        return None
    if schema.get("type") == "object" and "properties" in schema and (
            schema.get("additionalProperties") is not False or set(schema.get("required", [])) != set(
                schema["properties"])):
        return "response_format: schema must have additionalProperties false and require all properties"
    if "default" in schema and not isinstance(schema["default"], dict):
        return "response_format: default is not permitted"
    return next(filter(None, map(_lax, schema.values())), None)


@contextmanager
def serving(llm: Llm) -> Iterator[Llm]:
    """The service, in a thread of its own."""
    with served(Route("/v1/chat/completions", llm.openai, methods=["POST"]),
                Route("/v1/messages", llm.anthropic, methods=["POST"]),
                Route("/v1/embeddings", llm.embeddings, methods=["POST"]), ending=llm.ended.set) as llm.url:
        yield llm
