"""Option: what a component is configured with: its names, types, defaults and words, as its __init__ has them.

    options(OpenAiCompletion)["timeout"]       Option("timeout", float, "float", 60.0, "seconds for one answer.")
    check(OpenAiCompletion, args, options, "main.py:31")

A Pydantic model is derived from the signature once for each class. It looks at what is given and changes nothing.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from anton.errors import BadOption, UnknownOption, did_you_mean
from anton.secret import Env

NONE = inspect.Parameter.empty
_PASSED_ON = ("secret",)  # what a subclass gives to its base by itself
_SHOULD_BE = "Input should be "


@dataclass(frozen=True)
class Option:
    """One option. type: its annotation, text: as it is written. default: NONE where it must be given. about: words."""

    name: str
    type: Any
    text: str
    default: Any = NONE
    about: str = ""

    @property
    def secret(self) -> bool:
        """Whether its value is never shown."""
        return self.name == "headers" or Env in (self.type, *typing.get_args(self.type))


def options(cls: type) -> dict[str, Option]:
    """The options of a class by name. **keywords are those of its base."""
    return _options(cls)


@cache
def _options(cls: type) -> dict[str, Option]:
    words = _words(cls)
    return {name: Option(name, one.type, one.text, one.default, words.get(name, "")) for name, one in _own(cls).items()}


def check(cls: type, args: Sequence[Any], given: Mapping[str, Any], place: str) -> None:
    """Looks at what a class is called with. Raises UnknownOption, BadOption; what is missing Python itself says."""
    known, of = options(cls), f"{cls.__name__} ({place})"
    signature = inspect.signature(_owner(cls).__init__)                # type: ignore[misc]
    keywords = [one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD]
    for name in given:
        if name not in known:
            raise UnknownOption(name, of, tuple(known))
    try:
        bound = dict(signature.bind_partial(None, *args, **given).arguments)
    except TypeError:                                                  # too many: Python says so
        return
    for one in keywords:
        bound |= bound.pop(one.name, {})
    values = {name: value for name, value in bound.items() if name in known}
    try:
        _model(cls).model_validate(values, strict=True)
    except ValidationError as error:
        wrong = [one for one in error.errors() if one["type"] != "missing"]
        if wrong:
            name = str(wrong[0]["loc"][0])
            said = [one for one in wrong if one["loc"][0] == name]
            value = "***" if known[name].secret else values[name]
            raise BadOption(name, value, of, _allowed(known[name], said)) from None


def _allowed(option: Option, errors: Sequence[Any]) -> str:
    """ "a valid number (seconds for one answer)": as Pydantic says it, and as the documentation does."""
    said = list(dict.fromkeys(one["msg"].removeprefix(_SHOULD_BE) for one in errors
                              if one["msg"].startswith(_SHOULD_BE))) or [errors[0]["msg"]]
    if type(None) in typing.get_args(option.type):
        said.append("None")
    choices = re.findall(r"'([^']*)'", " ".join(one["msg"] for one in errors if one["type"] == "literal_error"))
    value = errors[0]["input"]
    hint = did_you_mean(value, choices) if isinstance(value, str) and not option.secret else ""
    about = f" ({option.about.rstrip('.')})" if option.about else ""
    return " or ".join(said) + (f".{hint}" if hint else "") + about


@cache
def _model(cls: type) -> type[BaseModel]:
    """What is given, as a Pydantic model; every field may be missing. Of a type that Pydantic does not know, any."""
    fields: dict[str, Any] = {}
    for number, option in enumerate(options(cls).values()):            # an option may have a name that a model has
        field: Any = {f"o{number}": (option.type, Field(None, alias=option.name))}
        try:
            create_model(cls.__name__, __config__=_CONFIG, **field)
        except PydanticUserError:
            field = {f"o{number}": (Any, Field(None, alias=option.name))}
        fields |= field
    return create_model(cls.__name__, __config__=_CONFIG, **fields)


_CONFIG = ConfigDict(arbitrary_types_allowed=True)


def _owner(cls: type) -> type:
    """The class whose __init__ it is."""
    return next(base for base in cls.__mro__ if "__init__" in vars(base))


def _own(cls: type) -> dict[str, Option]:
    owner = _owner(cls)
    init = owner.__init__                                              # type: ignore[misc]
    try:
        hints = typing.get_type_hints(init, include_extras=True)
    except NameError:                                                  # of names that are there for types alone
        hints = {}
    made: dict[str, Option] = {}
    for name, one in list(inspect.signature(init).parameters.items())[1:]:
        if one.kind is one.VAR_POSITIONAL:
            continue
        if one.kind is not one.VAR_KEYWORD:
            text = one.annotation if isinstance(one.annotation, str) else inspect.formatannotation(one.annotation)
            made[name] = Option(name, hints.get(name, Any), text if one.annotation is not NONE else "Any", one.default)
            continue
        base = next((base for base in owner.__mro__[1:] if "__init__" in vars(base)), object)
        if base is not object:
            made |= {key: value for key, value in _own(base).items() if key not in made and key not in _PASSED_ON}
    return made


def _words(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each option: "timeout: seconds for one answer."

    Several may share their words: "approve, cap: as of actions."
    """
    names = "|".join(map(re.escape, sorted(_own(cls), key=len, reverse=True)))
    head = re.compile(rf"(?:^|(?<=[.)] )|(?<=\n))((?:{names})(?:, (?:{names}))*)(?: \([^)]*\))?: ")
    found: dict[str, str] = {}
    for base in cls.__mro__[:-1] if names else ():
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(vars(base).get("__doc__") or ""))
        heads = list(head.finditer(text))
        ends = [one.start() for one in heads[1:]] + [len(text)]
        for one, end in zip(heads, ends, strict=False):
            said = text[one.end():end].partition("\n\n")[0]
            said = re.split(r"(?<=\.) +(?=[A-Z])", said.strip())[0]    # a sentence of its own is of all of it
            for name in one[1].split(", "):
                found.setdefault(name, said)
    return found
