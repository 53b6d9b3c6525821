"""Form: what a page asks for is made from the action's model, and gives back only what was changed."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, create_model

from anton.form import fields, read


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


class Everything(BaseModel):
    number: int
    amount: Decimal
    how: Literal["card", "voucher"]
    size: Size | None = None
    urgent: bool
    day: date
    note: str
    tags: list[str]
    anything: Any = None
    maybe: str | None = None


ARGS = {"number": 1, "amount": "5", "how": "card", "size": None, "urgent": False, "day": "2026-11-26",
        "note": "a\nb", "tags": ["x"], "anything": 5, "maybe": None}
KINDS = {"number": "text", "amount": "text", "how": "choice", "size": "choice", "urgent": "flag", "day": "text",
         "note": "lines", "tags": "json", "anything": "json", "maybe": "text"}


def posted(**changed: str) -> dict[str, str]:
    form = {f"arg.{field.name}": field.text for field in fields(Everything, ARGS, None)}
    return {**form, **{f"arg.{name}": text for name, text in changed.items()}}


def test_each_argument_has_the_field_of_its_type():
    asked = fields(Everything, ARGS, None)
    assert {field.name: field.kind for field in asked} == KINDS
    assert [field.mode for field in asked[:2]] == ["numeric", "decimal"]
    assert asked[2].choices == ("card", "voucher") and asked[3].choices == ("", "small", "large")


def test_a_form_that_is_sent_as_it_came_changes_nothing():
    assert read(fields(Everything, ARGS, None), posted()) == {}
    assert read(fields(Everything, ARGS, None), posted(note="a\r\nb")) == {}
    assert read(fields(Everything, ARGS, None), {}) == {}


@pytest.mark.parametrize(("name", "text", "value"), [
    ("number", "2", 2), ("amount", "3.50", Decimal("3.50")), ("how", "voucher", "voucher"),
    ("size", "large", Size.LARGE),
    ("urgent", "yes", True), ("day", "2027-01-01", date(2027, 1, 1)), ("note", "c\r\nd", "c\nd"),
    ("tags", '["y", "z"]', ["y", "z"]), ("anything", '{"a": 1}', {"a": 1}), ("maybe", "so", "so")])
def test_what_is_changed_is_what_the_model_takes(name: str, text: str, value: Any):
    changed = read(fields(Everything, ARGS, None), posted(**{name: text}))
    assert list(changed) == [name] and getattr(Everything.model_validate({**ARGS, **changed}), name) == value


def test_only_what_may_be_edited_is_asked_for():
    asked = fields(Everything, ARGS, ["amount"])
    assert [field.name for field in asked if field.kind] == ["amount"]
    assert read(asked, posted(number="9", amount="6")) == {"amount": "6"}
    assert [field.kind for field in fields(None, {"a": 1}, None)] == [""]


def test_the_arguments_of_a_component_may_be_edited_though_no_model_names_them():
    loose = create_model("loose", __config__=ConfigDict(extra="allow"))
    asked = fields(loose, {"text": "hi", "channel": "#c"}, ["text"])
    assert [(field.name, field.kind) for field in asked] == [("text", "text"), ("channel", "")]
    assert read(asked, {"arg.text": "ho"}) == {"text": "ho"}


def test_bad_json_is_said_of_its_argument():
    with pytest.raises(ValueError, match="tags: "):
        read(fields(Everything, ARGS, None), posted(tags="[1"))


def test_errors_stand_at_their_fields_beside_what_was_sent():
    asked = fields(Everything, ARGS, None, posted(amount="much"), ["amount: Input should be a number"])
    (wrong,) = [field for field in asked if field.error]
    assert (wrong.name, wrong.text, wrong.error) == ("amount", "much", "Input should be a number")
