"""Anthropic: completions.

    prompts.on_new_records(AnthropicCompletion(completions, api_key=env("ANTHROPIC_API_KEY")))

The package `anthropic` is imported when the first request is made, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from anton import Table
from anton.kit import (
    Clients,
    Completion,
    CompletionOptions,
    ConfigError,
    Env,
    Prices,
    Question,
    Reply,
    SendError,
    learnt,
    status_error,
    tls,
    to_json,
)

MODEL = "claude-haiku-4-5"
HOME = "https://api.anthropic.com"
MOST = 4000  # characters that are kept of what is no answer
MAX_TOKENS = 4096  # the service wants to be told
_MODES = ("output_config", "output_format", "schema", "tool_choice", "tools")


class AnthropicCompletion(Completion):
    """Asks a model of Anthropic with each record.

    api_key: a value or env(…); default ANTHROPIC_API_KEY. model: default claude-haiku-4-5. max_tokens: default 4096.
    All else as Completion has it: prompt, system, context, output, mode, temperature, memo, budget, limit, price,
    base_url, timeout, map. Without a key, and where nothing may leave, an echo answers instead; a live process refuses
    to start without one.
    """

    service = "Anthropic"
    variable = "ANTHROPIC_API_KEY"
    issued = "https://console.anthropic.com/settings/keys"
    example = "help_desk"
    home = HOME
    prices = Prices.load(Path(__file__).with_name("prices.json"))

    def __init__(self, into: Table[Any], *, api_key: Env | str | None = None, model: str | Sequence[str] = MODEL,
                 **options: Unpack[CompletionOptions]) -> None:
        if options.get("max_tokens") is None:
            options["max_tokens"] = MAX_TOKENS
        super().__init__(into, model=model, secret=api_key, **options)
        self._clients = Clients(lambda key: _package().AsyncAnthropic(
            api_key=key, base_url=self.base_url or HOME, timeout=self.timeout, max_retries=0,
            http_client=_package().DefaultAsyncHttpxClient(verify=tls())))

    async def prepare(self) -> None:
        """The package, and a client."""
        await self._clients.get(self.credential() or "")

    async def send(self, question: Question) -> Reply:
        """One POST /v1/messages."""
        anthropic = _package()
        try:
            async with self._clients.lend(self.credential() or "") as client:
                raw = await client.messages.with_raw_response.create(**_body(question))
            return _reply(raw.headers, _read(raw.http_response), question)
        except anthropic.APITimeoutError as error:
            raise SendError("down", f"no answer in {question.timeout:g} s", paid=not _never_arrived(error)) from error
        except anthropic.APIConnectionError as error:
            raise SendError("down", f"cannot be reached: {error.__cause__ or error}", paid=not _never_arrived(error)
                            ) from error
        except anthropic.APIStatusError as error:
            raise _status_error(error, question) from error
        except anthropic.APIResponseValidationError as error:
            raise SendError("down", f"answered what is no answer: {error.message}", paid=True) from error


def _body(question: Question) -> dict[str, Any]:
    system = "\n\n".join(one["content"] for one in question.messages if one["role"] == "system")
    body: dict[str, Any] = {
        "model": question.model, "max_tokens": question.max_tokens or MAX_TOKENS, **question.params,
        "messages": [dict(one) for one in question.messages if one["role"] != "system"]}
    if system:
        body["system"] = system
    if question.schema is not None and question.mode == "schema":
        body["output_config"] = {"format": {"type": "json_schema", "schema": question.schema}}
    elif question.schema is not None and question.mode == "tool":
        body["tools"] = [{"name": question.schema_name, "description": "The answer.", "input_schema": question.schema}]
        body["tool_choice"] = {"type": "tool", "name": question.schema_name}
    return body


def _read(raw: Any) -> dict[str, Any]:
    try:
        reply = raw.json()
    except ValueError:
        kind = "down" if "html" in raw.headers.get("content-type", "") else "malformed"   # a page is of a gateway
        raise SendError(kind, f"answered what is no JSON: {raw.text[:MOST]}", paid=True) from None
    if not isinstance(reply, dict) or reply.get("type") == "error":
        kind = "down" if isinstance(reply, dict) else "malformed"
        raise SendError(kind, f"answered what is no message: {raw.text[:MOST]}", paid=True)
    return reply


def _reply(headers: Mapping[str, str], reply: dict[str, Any], question: Question) -> Reply:
    content, usage = reply.get("content"), reply.get("usage")          # other servers say less, or nothing
    blocks = [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
    usage = usage if isinstance(usage, dict) else {}
    text = "".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")
    tool = next((block.get("input") for block in blocks if block.get("type") == "tool_use"), None)
    if tool is not None:
        text = to_json(tool).decode()
    ends = {"max_tokens": "length", "model_context_window_exceeded": "length", "refusal": "refused"}
    finish = ends.get(str(reply.get("stop_reason")), "stop")
    if not isinstance(content, list) or len(blocks) < len(content):
        if not usage:
            raise SendError("malformed", f"answered what is no message: {to_json(reply).decode()[:MOST]}",
                            paid=True)
        text, finish = to_json(reply).decode(), "empty"                # no answer, and paid all the same
    cached: Any = usage.get("cache_read_input_tokens") or 0
    written: Any = usage.get("cache_creation_input_tokens") or 0
    model, told = reply.get("model"), usage.get("input_tokens")
    into: Any = told + cached + written if all(isinstance(one, int) for one in (told, cached, written)) else None
    return Reply(text, model if model and isinstance(model, str) else question.model,
                 into, usage.get("output_tokens"), cached, written, finish,
                 learnt(headers))


def _status_error(error: Any, question: Question) -> SendError:
    if error.status_code == 400 and question.schema is not None and question.mode != "prompt" and any(
            word in error.message.lower() for word in _MODES):
        return SendError("mode", error.message)
    if error.status_code == 400 and "credit balance" in error.message.lower():
        return SendError("wrong", f"answered 400: {error.message}")    # the account's fault, not this question's
    return status_error(error.status_code, error.message, error.response.headers)


def _never_arrived(error: BaseException) -> bool:
    """Whether the request was not sent: nobody charges for it."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")


def _package() -> Any:
    try:
        return importlib.import_module("anthropic")
    except ImportError as error:
        raise ConfigError("AnthropicCompletion needs the package anthropic: pip install 'anton-framework[llm]'"
                          ) from error
