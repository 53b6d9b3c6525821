"""Anthropic: completions.

    prompts.on_new_records(AnthropicCompletion(completions, api_key=env("ANTHROPIC_API_KEY")))

The package `anthropic` is imported when the first request is made, never before.
"""

from __future__ import annotations

import importlib
import inspect
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
            parsed = raw.parse()                                       # awaited since 2.0
            return _reply(raw.headers, await parsed if inspect.isawaitable(parsed) else parsed, question)
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


def _reply(headers: Mapping[str, str], reply: Any, question: Question) -> Reply:
    if getattr(reply, "content", None) is None:
        raise SendError("down", f"answered what is no message: {reply!r}"[:500], paid=True)
    text = "".join(block.text for block in reply.content if block.type == "text")
    tool = next((block.input for block in reply.content if block.type == "tool_use"), None)
    if tool is not None:
        text = to_json(tool).decode()
    usage = getattr(reply, "usage", None)                              # other servers say less, or nothing
    cached = getattr(usage, "cache_read_input_tokens", None) or 0
    written = getattr(usage, "cache_creation_input_tokens", None) or 0
    told = getattr(usage, "input_tokens", None)
    finish = {"max_tokens": "length", "model_context_window_exceeded": "length", "refusal": "refused"}
    return Reply(text, reply.model or question.model, None if told is None else told + cached + written,
                 getattr(usage, "output_tokens", None), cached, written,
                 finish.get(reply.stop_reason or "", "stop"), learnt(headers))


def _status_error(error: Any, question: Question) -> SendError:
    if error.status_code == 400 and question.schema is not None and question.mode != "prompt" and any(
            word in error.message.lower() for word in _MODES):
        return SendError("mode", error.message)
    if error.status_code == 400 and "credit balance" in error.message.lower():
        return SendError("wrong", f"answered 400: {error.message}")    # the account's fault, not this question's
    return status_error(error.status_code, error.message, error.response.headers)


def _never_arrived(error: BaseException) -> bool:
    """Whether the request was not sent: nobody charges for it."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")


def _package() -> Any:
    try:
        return importlib.import_module("anthropic")
    except ImportError as error:
        raise ConfigError("AnthropicCompletion needs the package anthropic: pip install 'anton-framework[llm]'"
                          ) from error
