"""OpenAI: completions.

    prompts.on_new_records(OpenAiCompletion(completions, api_key=env("OPENAI_API_KEY"), temperature=0.8))

The package `openai` is imported when the first request is made, never before. base_url= reaches any other server
that speaks the same protocol: vLLM, llama.cpp, Ollama.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

MODEL = "gpt-5.4-mini"
HOME = "https://api.openai.com/v1"
MOST = 4000  # characters that are kept of what is no answer
_MODES = ("response_format", "json_schema", "tool_choice", "tools", "grammar")

log = logging.getLogger("anton.think")


class OpenAiCompletion(Completion):
    """Asks a model of OpenAI, or of another server that speaks its protocol (base_url=), with each record.

    api_key: a value or env(…); default OPENAI_API_KEY. model: default gpt-5.4-mini. All else as Completion has it:
    prompt, system, context, output, mode, max_tokens, temperature, memo, budget, limit, price, timeout, map.
    Without a key, and where nothing may leave, an echo answers instead; a live process refuses to start without one.
    """

    service = "OpenAI"
    variable = "OPENAI_API_KEY"
    issued = "https://platform.openai.com/api-keys"
    example = "ticket_triage"
    home = HOME
    prices = Prices.load(Path(__file__).with_name("prices.json"))

    def __init__(self, into: Table[Any], *, api_key: Env | str | None = None, model: str | Sequence[str] = MODEL,
                 **options: Unpack[CompletionOptions]) -> None:
        super().__init__(into, model=model, secret=api_key, **options)
        self._clients = Clients(lambda key: client(self.name, key, self.base_url, self.timeout))
        self._plain: set[str] = set()                                  # models that know no temperature but their own

    async def prepare(self) -> None:
        """The package, and a client."""
        await self._clients.get(self.credential() or "")

    async def send(self, question: Question) -> Reply:
        """One POST /chat/completions."""
        openai = package(self.name)
        while True:
            body = self._body(question)
            with answering(self.name, question.timeout, question):
                try:
                    async with self._clients.lend(self.credential() or "") as lent:
                        # the package's own call: its .create() spends a fifth of the time on types
                        raw = await lent.post("/chat/completions", cast_to=_httpx().Response, body=body)
                    return _reply(raw.headers, _read(raw), question)
                except openai.BadRequestError as error:
                    if error.param != "temperature" or "temperature" not in body:
                        raise
            if question.model not in self._plain:
                self._plain.add(question.model)
                log.warning("%s: %s takes no temperature but its own: temperature=%s is left out", self.name,
                            question.model, body["temperature"])

    def _params(self, question: Question) -> dict[str, Any]:
        return {name: value for name, value in question.params.items()
                if name != "temperature" or question.model not in self._plain}

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {"model": question.model, "messages": [dict(one) for one in question.messages]}
        body |= self._params(question)
        if question.max_tokens is not None:                            # others know the older name alone
            body["max_tokens" if self.base_url else "max_completion_tokens"] = question.max_tokens
        if question.schema is not None and question.mode == "schema":
            body["response_format"] = {"type": "json_schema", "json_schema": {
                "name": question.schema_name, "schema": question.schema, "strict": True}}
        elif question.schema is not None and question.mode == "tool":
            body["tools"] = [{"type": "function", "function": {
                "name": question.schema_name, "description": "The answer.", "parameters": question.schema,
                "strict": True}}]
            body["tool_choice"] = {"type": "function", "function": {"name": question.schema_name}}
        return body


def _read(raw: Any) -> dict[str, Any]:
    try:
        reply = raw.json()
    except ValueError:
        kind = "down" if "html" in raw.headers.get("content-type", "") else "malformed"   # a page is of a gateway
        raise SendError(kind, f"answered what is no JSON: {raw.text[:MOST]}", paid=True) from None
    if not isinstance(reply, dict) or (reply.get("error") and not reply.get("choices")):
        kind = "down" if isinstance(reply, dict) else "malformed"
        raise SendError(kind, f"answered without a choice: {raw.text[:MOST]}", paid=True)
    return reply


def _reply(headers: Mapping[str, str], reply: dict[str, Any], question: Question) -> Reply:
    choice = _part(reply.get("choices"))
    message, usage = _dict(choice.get("message")), _dict(reply.get("usage"))  # other servers say less, or nothing
    text = _dict(_part(message.get("tool_calls")).get("function")).get("arguments") or message.get("content")
    if isinstance(text, list):                                         # a text in parts
        text = "".join(str(_dict(part).get("text") or "") for part in text)
    if isinstance(text, dict):                                         # arguments that are JSON already
        text = to_json(text).decode()
    finish = {"length": "length", "content_filter": "refused"}.get(
        str(choice.get("finish_reason")), "stop")
    if message.get("refusal"):
        text, finish = str(message["refusal"]), "refused"
    if not isinstance(text, str) and finish == "stop" and not (text is None and "content" in message):
        if not usage:
            raise SendError("malformed", f"answered without a choice: {to_json(reply).decode()[:MOST]}", paid=True)
        text, finish = to_json(reply).decode(), "empty"                # no answer, and paid all the same
    model = reply.get("model")
    return Reply(text if isinstance(text, str) else "", model if model and isinstance(model, str) else question.model,
                 usage.get("prompt_tokens"), usage.get("completion_tokens"),
                 _dict(usage.get("prompt_tokens_details")).get("cached_tokens") or 0, finish=finish,
                 limits=learnt(headers))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _part(value: Any) -> dict[str, Any]:
    """The first of a list, where it is an object."""
    return _dict(value[0]) if isinstance(value, list) and value else {}


def _status_error(error: Any, question: Question | None = None) -> SendError:
    if error.code == "context_length_exceeded":                        # its words name the schema, too
        return SendError("refused", f"answered {error.status_code}: {error.message}")
    if error.status_code in (400, 422, 500) and question is not None:  # 500: llama-cpp-python, of what it does not know
        text = f"{error.param or ''} {error.message}".lower()
        if question.schema is not None and question.mode != "prompt" and any(word in text for word in _MODES):
            return SendError("mode", error.message)
    if error.code == "insufficient_quota":                             # no money there: waiting a second is no use
        return SendError("wrong", f"answered {error.status_code}: {error.message}")
    return status_error(error.status_code, error.message, error.response.headers)


@contextmanager
def answering(of: str, timeout: float, question: Question | None = None) -> Iterator[None]:
    """Raises the package's errors as SendError. timeout: seconds, for its words. question: of a completion."""
    openai = package(of)
    try:
        yield
    except openai.APITimeoutError as error:
        raise SendError("down", f"no answer in {timeout:g} s", paid=not _never_arrived(error)) from error
    except openai.APIConnectionError as error:
        raise SendError("down", f"cannot be reached: {_why(error)}", paid=not _never_arrived(error)) from error
    except openai.APIStatusError as error:
        raise _status_error(error, question) from error
    except openai.APIResponseValidationError as error:
        raise SendError("down", f"answered what is no answer: {error.message}", paid=True) from error


def _never_arrived(error: BaseException) -> bool:
    """Whether the request was not sent: nobody charges for it."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")


def _why(error: BaseException) -> str:
    return str(error.__cause__ or error) or type(error).__name__


def client(of: str, key: str, base_url: str | None, timeout: float) -> Any:
    """A client of the package. key: of the API. timeout: seconds for one answer."""
    openai = package(of)
    return openai.AsyncOpenAI(api_key=key, base_url=base_url or HOME, timeout=timeout, max_retries=0,
                              http_client=openai.DefaultAsyncHttpxClient(verify=tls()))


def _httpx() -> Any:
    return importlib.import_module("httpx2")                           # what the package sends with


def package(of: str) -> Any:
    """The package openai. Raises ConfigError without it."""
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ConfigError(f"{of} needs the package openai: pip install 'anton-framework[llm]'") from error
