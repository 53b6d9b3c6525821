"""Structured: a model's answer as an instance of a Pydantic model.

    schema_of(Triage)              the strict JSON Schema that services take: every field required, nothing besides
    parse(Triage, text)            an instance, or Unfit with what is wrong and the raw text
    asked_for(Triage)              for services without schemas: the sentence that goes into the prompt
    example(Triage, "hi")          an instance made up without a model, the same each time
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from anton.errors import AntonError
from anton.sink import reasons

M = TypeVar("M", bound=BaseModel)
_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
# What strict mode knows nothing of, and refuses.
_DROPPED = {"default", "title", "examples", "discriminator", "readOnly", "writeOnly", "deprecated"}


class Unfit(AntonError):
    """An answer that is not what was asked for. text: as it came; reasons."""

    text: str
    reasons: tuple[str, ...]

    def __init__(self, model: type[BaseModel], text: str, why: list[str]) -> None:
        super().__init__(f"the answer is no {model.__name__}: {'; '.join(why)}. It was: {text}", text=text,
                         reasons=tuple(why))


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema, strict."""
    strict: dict[str, Any] = _strict(model.model_json_schema())
    return strict


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:                                                 # nothing may stand beside a reference
        return {"$ref": node["$ref"]}
    made: dict[str, Any] = {}
    for name, value in node.items():
        if name in ("properties", "$defs"):                            # names of their own
            made[name] = {key: _strict(one) for key, one in value.items()}
        elif name == "oneOf":
            made["anyOf"] = _strict(value)
        elif name in ("enum", "const"):
            made[name] = value
        elif name not in _DROPPED:
            made[name] = _strict(value)
    if made.get("type") == "object" and "properties" in made:
        made["required"] = list(made["properties"])
        made["additionalProperties"] = False
    return made


def parse(model: type[M], text: str) -> M:
    """An instance from an answer's text: JSON, alone or inside a fence or a sentence. Raises Unfit."""
    first: ValidationError | None = None
    for part in _parts(text):
        try:
            return model.model_validate_json(part)
        except ValidationError as error:
            first = first or error
    raise Unfit(model, text, reasons(first) if first is not None else ["it is empty"])


def _parts(text: str) -> list[str]:
    whole, fenced = text.strip(), _FENCED.search(text)
    start, end = whole.find("{"), whole.rfind("}")
    found = [fenced[1].strip()] if fenced else []
    found += [whole[start:end + 1]] if 0 <= start < end else []
    return [part for part in dict.fromkeys([whole, *found]) if part][::1 if whole[:1] in "{[" else -1]


def asked_for(schema: Mapping[str, Any]) -> str:
    """What a service without schemas is told."""
    return ("Answer with one JSON object and nothing else. It must be valid by this JSON Schema:\n"
            + orjson.dumps(schema).decode())


def repair(error: Unfit) -> str:
    """What a model is told whose answer did not fit."""
    return ("That answer does not fit: " + "; ".join(error.reasons)
            + ". Answer again, with the whole JSON object and nothing else.")


def example(model: type[M], text: str) -> M:
    """An instance made up from the model alone: first choices, smallest numbers, `text` where text is wanted."""
    schema = model.model_json_schema()
    return model.model_validate(_example(schema, schema.get("$defs", {}), text))


def _example(node: Mapping[str, Any], defs: Mapping[str, Any], text: str) -> Any:
    if "$ref" in node:
        return _example(defs[node["$ref"].rpartition("/")[2]], defs, text)
    for name in ("default", "const"):
        if name in node:
            return node[name]
    if "enum" in node:
        return node["enum"][0]
    for name in ("anyOf", "oneOf", "allOf"):
        if name in node:
            return _example(node[name][0], defs, text)
    kind = node.get("type")
    if kind == "object":
        wanted = node.get("required", [])
        return {name: _example(one, defs, text) for name, one in node.get("properties", {}).items() if name in wanted}
    if kind == "array":
        return [_example(node.get("items", {}), defs, text) for _ in range(node.get("minItems", 0))]
    if kind in ("integer", "number"):
        least = node.get("minimum", node.get("exclusiveMinimum", -1) + 1)
        return min(least, node["maximum"]) if "maximum" in node else least
    if kind == "boolean":
        return False
    if kind == "null":
        return None
    made = {"date": "2000-01-01", "date-time": "2000-01-01T00:00:00Z", "uuid": "0" * 32, "email": "echo@example.com",
            "uri": "https://example.com/", "time": "00:00:00", "duration": "PT0S"}
    return made.get(node.get("format", "")) or text.ljust(node.get("minLength", 0), ".")[:node.get("maxLength")]
