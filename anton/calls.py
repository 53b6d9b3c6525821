"""Calls: the outbox as a Table: what was asked of one action, and what became of it.

    @refund.calls.on_updated_records(where="state = 'unknown'")
    refund.calls.select(state="waiting")
    refund.calls.lessons("edited", "rejected")       examples for a model, of what people made of them

A call: id args state result error idempotency_key taint approval_id at sent_at. Its updates are changes of its state.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel

from anton.app import App
from anton.columns import Shape
from anton.config import Storage
from anton.db import literal, quote
from anton.errors import BadOption, one_of
from anton.event import Event
from anton.query import Query, Sql
from anton.record import ChangeOp
from anton.table import Table, _maker
from anton.write import find_scope

LESSONS = ("approved", "edited", "rejected")
READ_ONLY = "calls are made by .send(), and change by what becomes of them"


class Call(BaseModel):
    """One call of an action. args: JSON. state: new waiting ready sending retrying sent failed unknown captured
    refused rejected expired superseded. result: what came back. error: why it is failed, unknown, refused.
    """

    id: int
    app: str
    name: str
    args: dict[str, Any]
    state: str
    result: Any = None
    error: str | None = None
    idempotency_key: str
    approve: dict[str, Any] | None = None
    gate: str | None = None
    requested_by: str | None = None
    taint: list[str] = []
    taint_known: bool = True
    subject: list[Any] | None = None
    approval_id: int | None = None
    token: int | None = None
    attempt: int = 0
    in_doubt: bool = False
    cause: int | None = None
    trace: int | None = None
    at: datetime
    due_at: datetime | None = None
    sent_at: datetime | None = None
    settled_at: datetime | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["args"][name]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('name', 'call')} was called without {name}") from None


class Calls(Table[Call]):
    """The calls of one action. Read like a Table; nobody writes to it."""

    def __init__(self, app: App, action: str, place: str) -> None:
        name = outbox_name(app)
        self.name = name
        self.model = Call
        self.shape = Shape(Call, None, name)
        self.unique, self.index = (), ()
        self.make = _maker(self.shape)
        self._checks = {}
        self.read_only = READ_ONLY
        self.place = place
        self.app, self.action = app.name, action
        self.condition = f"app = {literal(app.name)} and name = {literal(action)}"
        app.tables.setdefault(name, self)

    @property
    def on_changes(self) -> Event[Call]:
        """Handles new calls, and changes of their state."""
        return self._event("changes", ("new", "updated"))

    def _event(self, verb: str, ops: tuple[ChangeOp, ...]) -> Event[Call]:
        return _CallEvent(self, verb, ops)

    def select(self, where: str | None = None, /, **args: Any) -> Query[Call]:
        """Calls, lazily: select(state="unknown")."""
        condition = self.condition.replace("{", "{{").replace("}", "}}")
        return Query(self, f"{condition} and ({where})" if where else condition, args)

    def lessons(self, *decisions: str) -> Sql:
        """What people decided about these calls, as examples of a FineTune: rows with prompt and completion.

        decisions: "approved", "edited", "rejected"; default all three. The prompt is what was asked for and the record
        it was asked for, the completion what the person made of it, both JSON. The other columns: approval_id at
        decision person before after why record. Raises BadOption.
        """
        for one in decisions:
            if one not in LESSONS:
                raise BadOption("decisions", one, "lessons()", one_of(LESSONS))
        schema, _, _ = self.name.rpartition(".")
        return Sql(f"select * from {quote(schema)}.lessons({{app}}, {{action}}) where decision = any ({{decisions}})",
                   app=self.app, action=self.action, decisions=list(decisions or LESSONS))


class _CallEvent(Event[Call]):
    """An event of one action's calls."""

    def _declare(self, fn: Any, name: str | None, options: dict[str, Any], body: str | None = None,
                 component: object = None) -> Any:
        table = self._table
        assert isinstance(table, Calls)
        parts = [table.condition]
        if self._ops == ("updated",):
            parts.append("old.state is distinct from new.state")
        if options.get("where"):
            parts.append(f"({options['where']})")
        return super()._declare(fn, name, {**options, "where": " and ".join(parts)}, body, component)


def outbox_name(app: App) -> str:
    """The table of calls as users would write it: "anton.action"."""
    storages = app.settings.storages if app.settings is not None else ()
    schema = next((one.schema_ for one in storages if isinstance(one, Storage)), "anton")
    return f"{schema}.action"


def subject_of() -> list[Any] | None:
    """The record at hand, ["shop.orders", [key]], where a handler is around."""
    found = find_scope()
    if found is None or found[1] < 0 or not found[0].table:
        return None
    given: Any = found[0].inputs
    change = given.inputs.change(found[1]) if hasattr(given, "inputs") else given.changes[found[1]]
    if change.key is None:
        return None
    return [found[0].table, list(change.key) if isinstance(change.key, tuple) else [change.key]]
