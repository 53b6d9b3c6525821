"""Within: what meaning types say of values inside arrays and jsonb: list[EmailAddress], dict[str, Url], nested models.

    condition("contacts", list[Contact], kind, "anton")     anton.within("contacts", '{"each": …}'::jsonb)

within() is in sql/02_within.sql, where the form of its rules is said. Only what holds for each value that Pydantic lets
through becomes a rule: none for what is serialized in a way of its own, a union with a member that has none, and what
is below a type inside itself.
"""

from __future__ import annotations

import json
import types
import typing
from collections import abc
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Union, get_args

import pydantic

from anton.columns import ARRAYS, Kind, bare, is_alias, kind_of, plain_pattern
from anton.db import literal, quote
from anton.meaning import Meaning, fields_of

Rule = dict[str, Any]
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_OWN = (pydantic.PlainSerializer, pydantic.WrapSerializer, pydantic.PlainValidator)
_KEPT = (typing.Required, typing.NotRequired)                          # of a TypedDict


def condition(name: str, annotation: Any, kind: Kind, schema: str) -> str | None:
    """The SQL condition for a column of this kind; None when there is nothing to say. schema: the runtime's, quoted."""
    if kind.element is None and kind.type != "jsonb":
        return None
    rule = rule_of(annotation, kind.metadata)
    if rule is None:
        return None
    value = quote(name) if kind.element is None else f"to_jsonb({quote(name)})"
    return f"{schema}.within({value}, {literal(json.dumps(rule))}::jsonb)"


def rule_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> Rule | None:
    """What within() takes; None when nothing inside has a meaning that SQL can check."""
    return _rule(annotation, metadata, ())


def _rule(annotation: Any, metadata: tuple[Any, ...], above: tuple[Any, ...]) -> Rule | None:
    if is_alias(annotation):
        return None if annotation in above else _rule(annotation.__value__, metadata, (*above, annotation))
    annotation, origin, metadata = bare(annotation, metadata)
    if any(isinstance(item, _OWN) for item in metadata):
        return None
    if origin in (Union, types.UnionType):
        return _union(annotation, metadata, above)
    if any(isinstance(item, Meaning) for item in metadata) and (leaf := _leaf(kind_of(annotation, metadata))):
        return leaf
    args = get_args(annotation)
    if origin in _KEPT:
        return _rule(args[0], metadata, above)
    if origin in ARRAYS or (origin is tuple and args[1:] == (...,)):
        return _only("each", _rule(args[0], (), above))
    if origin is tuple:
        return _items([_rule(arg, (), above) for arg in args])
    if origin in _MAPPINGS:
        keys, values = _rule(args[0], (), above), _rule(args[1], (), above)
        return {"keys": keys or {}, "values": values or {"null": True}} if keys or values else None
    plain = origin or annotation                                       # a dataclass may be generic
    if plain in above or not isinstance(plain, type) or _serialized(plain):
        return None
    fields = {name: _rule(kind, more, (*above, plain)) for name, (kind, more) in fields_of(annotation).items()}
    if issubclass(plain, pydantic.RootModel):
        return fields["root"]
    if issubclass(plain, tuple):
        return _items(list(fields.values()))
    return _only("fields", {name: rule for name, rule in fields.items() if rule is not None} or None)


def _only(name: str, rule: Any) -> Rule | None:
    return None if rule is None else {name: rule}


def _items(rules: list[Rule | None]) -> Rule | None:
    return {"items": [rule or {"null": True} for rule in rules]} if any(rules) else None


def _union(annotation: Any, metadata: tuple[Any, ...], above: tuple[Any, ...]) -> Rule | None:
    members = [member for member in get_args(annotation) if member is not type(None)]
    rules = [_rule(member, metadata, above) for member in members]
    if None in rules or not rules:
        return None
    rule: Rule = typing.cast(Rule, rules[0]) if len(rules) == 1 else {"any": rules}
    return {**rule, "null": True} if len(members) < len(get_args(annotation)) else rule


def _leaf(kind: Kind) -> Rule | None:
    text, number = kind.length == "char_length", kind.type == "bigint" or kind.type.startswith("numeric")
    said = dict(_said(kind)) if text or (number and kind.number) else {}
    return {"text" if text else "number": said} if said else None


def _said(kind: Kind) -> Iterator[tuple[str, Any]]:
    text = kind.length is not None
    names = {"min_length": "min", "max_length": "max"} if text else {
        "ge": "ge", "gt": "gt", "le": "le", "lt": "lt", "multiple_of": "step", "decimal_places": "places"}
    for item in kind.metadata:
        for attribute, name in names.items():
            value = getattr(item, attribute, None)
            if isinstance(value, (int, Decimal)):
                yield name, f"{value:f}" if isinstance(value, Decimal) else value
        pattern = getattr(item, "pattern", None)
        if text and isinstance(pattern, str) and plain_pattern(pattern):
            yield "pattern", pattern


def _serialized(of: type) -> bool:
    """Whether it says itself how it is written as JSON."""
    decorated = getattr(of, "__pydantic_decorators__", None)
    return decorated is not None and bool(decorated.field_serializers or decorated.model_serializers
                                          or getattr(of, "model_config", {}).get("json_encoders"))
