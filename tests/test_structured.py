"""Structured: schemas that strict services take, answers that are read from what models write."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal
from uuid import UUID

import pytest
from llm import _lax
from pydantic import BaseModel, Field

from anton.structured import Unfit, asked_for, example, parse, repair, schema_of


class Kind(StrEnum):
    bug = "bug"
    question = "question"


class Line(BaseModel):
    name: str = Field(min_length=3)
    price: Decimal
    at: datetime | None = None


class Triage(BaseModel):
    """What a ticket is about."""

    kind: Kind
    urgent: bool = False
    score: int = Field(default=3, ge=1, le=5)
    lines: list[Line] = []
    title: Literal["a", "b"] = "b"
    by: UUID | None = None


def test_the_schema_is_strict_all_the_way_down():
    schema = schema_of(Triage)
    assert _lax(schema) is None and schema["required"] == list(Triage.model_fields)
    assert schema["properties"]["title"]["enum"] == ["a", "b"]         # a field called as a keyword stays
    assert schema["$defs"]["Line"]["required"] == ["name", "price", "at"]


@pytest.mark.parametrize("text", [
    '{"kind": "bug", "score": 4}', '```json\n{"kind": "bug", "score": 4}\n```', 'Sure! Here it is:\n{"kind": "bug", '
    '"score": 4}\nAnything else?', '  {"kind": "bug", "score": 4}  '])
def test_an_answer_is_read_alone_in_a_fence_or_in_a_sentence(text):
    assert parse(Triage, text) == Triage(kind=Kind.bug, score=4)


@pytest.mark.parametrize("text, why", [
    ('{"kind": "rant"}', "kind: Input should be 'bug' or 'question'"), ("no", "Invalid JSON"), ("", "it is empty"),
    ('{"kind": "bug", "score": 9}', "score")])
def test_what_does_not_fit_says_why_and_keeps_the_text(text, why):
    with pytest.raises(Unfit, match="no Triage") as caught:
        parse(Triage, text)
    assert why in caught.value.message and caught.value.text == text and why in repair(caught.value)


def test_a_service_without_schemas_is_told_the_schema():
    assert '"kind"' in asked_for(schema_of(Triage)) and "one JSON object" in asked_for(schema_of(Triage))


def test_an_example_is_made_without_a_model_and_is_valid():
    made = example(Triage, "hello")
    assert made == example(Triage, "hello") and made.kind is Kind.bug and made.score == 3

    class All(BaseModel):
        text: str
        n: int = Field(gt=2)
        x: float
        ok: bool
        at: datetime
        id: UUID
        one: Line
        two: list[Line] = Field(min_length=2)
        any: dict[str, Any]
        maybe: int | None

    made_all = example(All, "hello")
    assert (made_all.text, made_all.n, made_all.one.name, len(made_all.two)) == ("hello", 3, "hello", 2)
