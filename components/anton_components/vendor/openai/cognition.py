"""OpenAI: completions.

    prompts.on_new_records(OpenAiCompletion(completions, api_key=env("OPENAI_API_KEY"), temperature=0.8))

The package `openai` is imported when the first request is made, never before. base_url= reaches any other server
that speaks the same protocol.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from anton.action import effects
from anton.component import Clients, Component, names_of, stand_in
from anton.errors import ConfigError, WorldError
from anton.handler import HandlerSpec
from anton.secret import Env
from anton.table import Table

MODEL = "gpt-5.4-mini"
_UNWELL = (401, 403, 404)                                              # the key or the model is wrong, not the record


class OpenAiCompletion(Component):
    """Asks a model with each record's `prompt`; `table` gets {"prompt", "completion", "model", "usage", "cost"}.

    api_key: a value or env(…); default OPENAI_API_KEY. model: default gpt-5.4-mini. temperature: None, its own.
    base_url: of another server that speaks the protocol. timeout: seconds for one answer. map: {"prompt": "question"}
    when the text is in another field. Where `table` has a model, its further fields are carried over from the record.
    usage: tokens {"input", "output"}. cost: US dollars; 0 for an echo, None where the price is not known.
    Without a key, and where nothing may leave, an echo answers instead; a live process refuses to start without one.
    """

    service = "OpenAI"
    variable = "OPENAI_API_KEY"

    def __init__(self, table: Table[Any], *, api_key: Env | str | None = None, model: str = MODEL,
                 temperature: float | None = None, base_url: str | None = None, timeout: float = 60.0,
                 map: Mapping[str, str] | None = None) -> None:
        super().__init__(secret=api_key, map=map)
        self.table = table
        self.model = model
        self.temperature = temperature
        self.base_url = base_url
        self.timeout = timeout
        self._clients = Clients(lambda key: _package().AsyncOpenAI(
            api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=1))

    def bind(self, table: Table[Any]) -> HandlerSpec:
        """What handles the records of `table`."""
        return HandlerSpec(fn=self.complete, name=self.name, each=True, into=self.table, options={"concurrency": 50})

    async def complete(self, record: Any) -> dict[str, Any]:
        """The output row for one record."""
        prompt = str(self.read(record, "prompt"))
        if effects() == "offline" or self.credential() is None:
            answer: dict[str, Any] = {"completion": _text(stand_in(self, prompt)), "model": "echo",
                                      "usage": {"input": 0, "output": 0}, "cost": 0.0}
        else:
            answer = await self._ask(prompt)
        return self._carried(record) | {"prompt": prompt} | answer

    def _carried(self, record: Any) -> dict[str, Any]:
        shape = self.table.shape
        if shape is None:
            return {}
        names = set(names_of(record)) & set(shape.model.model_fields) - set(shape.key)
        return {name: record[name] if isinstance(record, Mapping) else getattr(record, name) for name in names}

    async def _ask(self, prompt: str) -> dict[str, Any]:
        openai = _package()
        extra = {} if self.temperature is None else {"temperature": self.temperature}
        client = await self._clients.get(self.credential() or "")
        messages = [{"role": "user", "content": prompt}]
        try:
            try:
                reply = await client.chat.completions.create(model=self.model, messages=messages, **extra)
            except openai.BadRequestError as error:
                if not extra or error.param != "temperature":          # some models know only their own
                    raise
                reply = await client.chat.completions.create(model=self.model, messages=messages)
        except openai.APIConnectionError as error:
            raise WorldError(f"{self.service} cannot be reached: {error}") from error
        except openai.APIStatusError as error:
            if error.status_code in _UNWELL:
                raise WorldError(f"{self.service} answered {error.status_code}: {error.message}") from error
            raise
        usage = reply.usage
        tokens = {"input": usage.prompt_tokens, "output": usage.completion_tokens} if usage else None
        text = reply.choices[0].message.content or ""
        return {"completion": text, "model": reply.model, "usage": tokens, "cost": None}


def _text(answer: Any) -> str:
    return answer.model_dump_json() if isinstance(answer, BaseModel) else str(answer)


def _package() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ConfigError("OpenAiCompletion needs the package openai: pip install 'anton-framework[llm]'") from error
