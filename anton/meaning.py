"""Meaning: types that say what a text or a number is, and not only how it is kept.

    class Customer(BaseModel):
        id: int
        email: PII[EmailAddress]
        phone: PhoneNumber | None = None

What is written to such a column is checked at append, and by the column's CHECK whoever writes. A component that needs
one meaning is not wired to a field of another, and a PII field reaches no model: `anton migrate` refuses both.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from decimal import Decimal
from typing import Annotated, Any, ForwardRef, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field
from pydantic.types import StringConstraints

T = TypeVar("T")

_MOST = Decimal("999999999999999.9999")


@dataclass(frozen=True)
class Meaning:
    """What a value is. Made of your own: Annotated[str, StringConstraints(pattern=…), Meaning("Iban")].

    name: as the type is called. personal: it is about a person, and must not reach a model.
    """

    name: str
    personal: bool = False


EmailAddress = Annotated[str, StringConstraints(
    max_length=254, pattern=r"^[A-Za-z0-9.!#$%&'*+/=?{|}~_-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,63}$"),
    Meaning("EmailAddress")]
"""ann@example.com: one address in ASCII, without a name."""
Url = Annotated[str, StringConstraints(
    max_length=2048, pattern=r"^https?://[A-Za-z0-9_.:;,@#%&=!~/'+*?$(){}|-]+$"), Meaning("Url")]
"""http:// or https://, in ASCII as it is sent."""
PhoneNumber = Annotated[str, StringConstraints(pattern=r"^\+[1-9][0-9]{6,14}$"), Meaning("PhoneNumber")]
"""E.164: + and 7 to 15 digits, as +493012345678."""
Money = Annotated[Decimal, Field(ge=-_MOST, le=_MOST, decimal_places=4), Meaning("Money")]
"""An amount in a currency said elsewhere: 15 digits, and 4 after the point."""
Markdown = Annotated[str, Meaning("Markdown")]
"""A text in Markdown."""
PersonName = Annotated[str, StringConstraints(min_length=1, max_length=200), Meaning("PersonName")]
"""What a person is called: 1 to 200 characters."""
SlackChannel = Annotated[str, StringConstraints(
    pattern=r"^(#[a-z0-9_-]{1,80}|[CDGU][A-Z0-9]{2,20})$"), Meaning("SlackChannel")]
"""An id, or #name."""
PII = Annotated[T, Meaning("PII", personal=True)]
"""PII[str], PII[EmailAddress]: about a person; no component gives it to a model unless it says allow_pii=True."""


def fields_of(of: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The fields of a model, dataclass, TypedDict or NamedTuple, each a type and what Field() says; {} of all else.

    Where a name in an annotation cannot be found, its text stands for the type.
    """
    plain = get_origin(of) or of
    if not isinstance(plain, type):
        return {}
    if issubclass(plain, BaseModel):
        return {name: (info.annotation, tuple(info.metadata)) for name, info in plain.model_fields.items()}
    known = getattr(plain, "__pydantic_fields__", None)                # of Pydantic's own dataclasses
    if known is not None:
        return {name: (info.annotation, tuple(info.metadata)) for name, info in known.items()}
    if not (is_dataclass(plain) or hasattr(plain, "__required_keys__") or hasattr(plain, "_fields")):
        return {}
    try:
        hints = get_type_hints(plain, include_extras=True)
    except NameError:                                                  # a type of a function's own
        hints = {name: kind for base in reversed(plain.__mro__) for name, kind in inspect.get_annotations(base).items()}
    return {name: (kind, ()) for name, kind in hints.items()}


def meanings(annotation: Any, metadata: tuple[Any, ...] = ()) -> frozenset[Meaning]:
    """All that an annotation means, that of its parts too: EmailAddress | None, list[PII[str]].

    Of the fields of what is nested (models, dataclasses, TypedDicts, NamedTuples) only what is personal.
    """
    return frozenset(_meanings(annotation, metadata, set()))


def _meanings(annotation: Any, metadata: tuple[Any, ...], seen: set[Any]) -> Iterator[Meaning]:
    for item in metadata:
        if isinstance(item, Meaning):
            yield item
    if isinstance(annotation, (str, ForwardRef)) and re.search(r"\bPII\b", str(annotation)):
        yield Meaning("PII", personal=True)                            # its types are not to be had: the safe side
    if hasattr(annotation, "__value__") and not isinstance(annotation, type) and annotation not in seen:  # type X = …
        yield from _meanings(annotation.__value__, (), {*seen, annotation})
    if hasattr(annotation, "__supertype__"):
        yield from _meanings(annotation.__supertype__, (), seen)
    for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        if isinstance(part, Meaning):
            yield part
        elif part is not annotation:
            yield from _meanings(part, (), seen)
    fields = fields_of(annotation)
    if fields and annotation not in seen:
        seen.add(annotation)
        for kind, more in fields.values():
            yield from (one for one in _meanings(kind, more, seen) if one.personal)


def of_model(model: type[BaseModel]) -> dict[str, frozenset[Meaning]]:
    """What each field of a model means."""
    return {name: meanings(info.annotation, tuple(info.metadata)) for name, info in model.model_fields.items()}
