"""Form: what a page asks for to edit an action's arguments, made from their Pydantic model.

    fields(refund.model, {"amount": "5", "urgent": False}, editable=["amount"])
    read(fields, {"arg.amount": "3"})  ->  {"amount": "3"}, what was changed
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

LONG = 60                                                              # characters that are given a box of lines

_NUMBERS = {"integer": "numeric", "number": "decimal"}


@dataclass(frozen=True)
class Field:
    """One argument. kind: "text", "lines", "choice", "flag" or "json"; "" for one that is only shown.

    text: its value as it stands in the page. choices: their texts. mode: which keyboard a phone shows.
    """

    name: str
    kind: str
    text: str
    value: Any
    choices: tuple[str, ...] = ()
    mode: str = ""
    error: str = ""

    @property
    def label(self) -> str:
        """ "order_id" as people read it."""
        return self.name.replace("_", " ")


def fields(model: type[BaseModel] | None, args: Mapping[str, Any], editable: Sequence[str] | None,
           posted: Mapping[str, str] | None = None, errors: Sequence[str] = ()) -> list[Field]:
    """The arguments of a call in their order. editable: those that may be changed; None: all.

    model: None where the action is not declared here: nothing can be changed then. posted: what was sent before, with
    the errors it was refused for ("amount: Input should be …").
    """
    found = []
    declared = [name for name in (model.model_fields if model else {}) if name in args]
    order = (*declared, *(name for name in args if name not in declared))
    names = order if model and model.model_config.get("extra") == "allow" else declared    # such as a component's
    for name in order:
        may = name in names and (editable is None or name in editable)
        field = _field(model, name, args[name]) if may and model else Field(name, "", shown(args[name]), args[name])
        text = (posted or {}).get(f"arg.{name}", field.text)
        wrong = "; ".join(error.partition(": ")[2] for error in errors if error.partition(":")[0].split(".")[0] == name)
        found.append(Field(name, field.kind, text, field.value, field.choices, field.mode, wrong))
    return found


def read(asked: Sequence[Field], posted: Mapping[str, str]) -> dict[str, Any]:
    """The arguments whose texts a form changes, as the model takes them. Raises ValueError for bad JSON."""
    changed: dict[str, Any] = {}
    for field in asked:
        text = posted.get(f"arg.{field.name}")
        if not field.kind or text is None:
            continue
        text = text.replace("\r\n", "\n")
        if text == field.text.replace("\r\n", "\n"):
            continue
        changed[field.name] = _value(field, text)
    return changed


def shown(value: Any) -> str:
    """A JSON value as people read it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _value(field: Field, text: str) -> Any:
    if field.kind == "flag":
        return {"": None, "yes": True, "no": False}.get(text, text)
    if field.kind == "choice":
        return text or None
    if field.kind == "json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{field.name}: {error}") from None
    return None if text == "" and field.value is None else text


def _field(model: type[BaseModel], name: str, value: Any) -> Field:
    kinds = _schemas(model, name)
    types = {kind.get("type") for kind in kinds}
    optional = ("",) if "null" in types or value is None else ()
    values = [one for kind in kinds for one in (kind.get("enum") or ([kind["const"]] if "const" in kind else []))]
    if values and all(isinstance(one, str) for one in values):
        return Field(name, "choice", shown(value), value, (*optional, *values))
    if types - {"null"} == {"boolean"}:
        return Field(name, "flag", shown(value), value, (*optional, "yes", "no"))
    untyped = types <= {None} and not isinstance(value, str)
    if untyped or isinstance(value, (dict, list)) or types & {"object", "array"}:
        return Field(name, "json", json.dumps(value, ensure_ascii=False, indent=2), value)
    text = shown(value)
    mode = next((_NUMBERS[kind["type"]] for kind in kinds if kind.get("type") in _NUMBERS), "")
    lines = ("string" in types or types <= {None}) and not mode and (len(text) > LONG or "\n" in text)
    return Field(name, "lines" if lines else "text", text, value, mode=mode)


def _schemas(model: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """The JSON Schemas that an argument may be of; [] for what has none."""
    info = model.model_fields.get(name)
    if info is None:
        return []
    try:
        schema = TypeAdapter(info.annotation or Any).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return []
    found, waiting = [], [schema]
    while waiting:
        one = waiting.pop(0)
        if "$ref" in one:
            one = schema.get("$defs", {}).get(one["$ref"].rpartition("/")[2], {})
        waiting += one.get("anyOf", [])
        found.append(one)
    return found
