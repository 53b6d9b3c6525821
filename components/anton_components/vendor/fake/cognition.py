"""Fake: a model that is a function, for tests and for trying an app without keys. Nothing leaves.

    prompts.on_new_records(FakeModel(completions, answer=lambda prompt: prompt.upper()))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Unpack

from pydantic import BaseModel

from anton import Table
from anton.kit import Completion, CompletionOptions, Price, Question, Reply, echo, to_json

FREE = Price.of({"input": 0, "output": 0}, "free")


class FakeModel(Completion):
    """Answers with `answer(prompt)`; default an echo. All else is as with a real model: ledger, memo, budget, limit.

    answer: takes all that the model is told as one text; returns a text, a model or a dict; may be async, and may raise
    SendError. Tokens are words. price: default nothing. All else as Completion has it.
    """

    service = "Fake"
    example = "incident_room"

    def __init__(self, into: Table[Any], *, answer: Callable[[str], Any] | None = None, model: str = "fake",
                 **options: Unpack[CompletionOptions]) -> None:
        super().__init__(into, model=model, **options)
        self._answer_of = answer

    @property
    def host(self) -> str:
        """Here."""
        return "here"

    def stands_in(self) -> bool:
        """Never: it leaves nothing out."""
        return False

    def price_of(self, model: str) -> Price | None:
        """What was said; else it is free."""
        return self._price or FREE

    async def send(self, question: Question) -> Reply:
        """Calls the function."""
        prompt = "\n\n".join(message["content"] for message in question.messages)
        answer = echo(self, prompt) if self._answer_of is None else self._answer_of(prompt)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, BaseModel):
            answer = answer.model_dump_json()
        text = answer if isinstance(answer, str) else to_json(answer).decode()
        return Reply(text, question.model, len(prompt.split()), len(text.split()))
