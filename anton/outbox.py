"""Outbox: actions. What may leave the building is declared once; a call of it is a row that commits with its cause.

    @action(effect="unsafe", probe=find_refund, approve=finance, into=refunds)
    async def refund(order_id: int, amount: Decimal, *, key: str) -> Refund: …

    refund.send(order_id=7, amount=5)           records a call; nothing is awaited
    complaints.on_new_records(refund)           one call for each record
    refund.calls                                a Table: what became of them

The body runs in the sender (sender.py), never in the handler that called.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, ClassVar, Literal, cast, overload

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from anton.app import current_app, place_of_caller
from anton.approval import Approval
from anton.calls import Call, Calls, outbox_name, subject_of
from anton.component import Component, names_of
from anton.ctx import Ctx
from anton.db import Conn, Database
from anton.errors import (
    BadOption,
    BadSignature,
    DecisionRefused,
    Discard,
    InvalidRecord,
    UnknownOption,
    did_you_mean,
    one_of,
)
from anton.event import Event
from anton.handler import HandlerSpec
from anton.later import due_of
from anton.notices import mail_by_default
from anton.record import Appended
from anton.relation import described
from anton.sender import Sender
from anton.sink import Columns, reasons
from anton.table import Table
from anton.threads import in_thread
from anton.write import Rows, find_scope, transaction

Effect = Literal["unsafe", "idempotent"]
Policy = Callable[[Any], Any] | str
PERIODS = ("minute", "hour", "day", "week", "month", "total")
_OPTIONS = ("name", "effect", "probe", "approve", "policy", "into", "allow", "cap", "rate", "map", "concurrency",
            "timeout", "attempts", "backoff")


class Action:
    """An action and its options. It is a component: orders.on_new_records(refund) makes one call for each record.

    model: its arguments, as a Pydantic model. calls: a Table of its calls. component: the built-in one it is of.
    """

    component: ActionComponent | None = None

    def __init__(self, fn: Callable[..., Any], *, name: str | None = None, effect: Effect = "unsafe",
                 probe: Callable[[Any], Any] | None = None, approve: Approval | None = None,
                 policy: Policy | None = None, into: Table[Any] | Sequence[Table[Any]] | None = None,
                 allow: Mapping[str, Sequence[str]] | None = None, cap: str | Sequence[str] = (),
                 map: Mapping[str, str] | None = None, rows: Callable[[Any, Any, bool], Any] | None = None,
                 model: type[BaseModel] | None = None, **options: Any) -> None:
        self.name: str = name or str(getattr(fn, "__name__", ""))
        of = f'action "{self.name}"'
        for option in options:
            if option not in _OPTIONS:
                raise UnknownOption(option, of, _OPTIONS)
        if not callable(fn) or not self.name or self.name == "<lambda>":
            raise BadOption("action", fn, "@action", 'a function; a lambda needs a name: name="refund"')
        if effect not in ("unsafe", "idempotent"):
            raise BadOption("effect", effect, of, one_of(("unsafe", "idempotent")) + ". What only reads is no action")
        if approve is not None and not isinstance(approve, Approval):
            raise BadOption("approve", approve, of, 'an Approval: approve=Approval("@finance")')
        app = self.app = current_app()
        self.fn, self.effect, self.probe, self.approve, self.policy = fn, effect, probe, approve, policy
        self.map = dict(map or {})
        self.place = place_of_caller()
        self.model, self.takes_key = (model, True) if model else _arguments(self.name, fn, self.place)
        self.allow = {argument: [*patterns] for argument, patterns in (allow or {}).items()}
        self.caps = [_cap(text, of, self.model) for text in ([cap] if isinstance(cap, str) else cap)]
        for option, names in (("allow", self.allow), ("editable", (approve.editable if approve else None) or ())):
            for argument in names:
                if argument not in self.model.model_fields and self.model.model_config.get("extra") != "allow":
                    raise UnknownOption(argument, f"{option}= of {of}", tuple(self.model.model_fields))
        app.claim_name("action", self.name, self.place)
        app.actions[self.name] = self
        if mail_by_default not in app.endings:
            app.endings.append(mail_by_default)
        self.calls = Calls(app, self.name, self.place)
        self._rows = rows
        ready = f"{self.calls.condition} and state in ('new', 'ready') and old.state is distinct from new.state"
        self.sender = Event(self.calls, "changes", ("new", "updated"))._declare(
            Sender(self), f"send_{self.name}",
            {**options, "each": True, "read": "now", "where": ready, "into": into})
        self.sender.place = self.place

    @property
    def into(self) -> tuple[Table[Any], ...]:
        """Where what it returns goes."""
        return self.sender.into

    @property
    def attempts(self) -> int:
        """How often a call that did not happen is tried."""
        return self.sender.attempts

    def definition(self) -> dict[str, Any]:
        """What put_action() takes."""
        gate = "open" if self.approve is None else "when" if self.approve.when is not None else "always"
        if self.policy is not None and gate != "always":
            gate = "when" if self.approve is not None else "open"
        return {"app": self.app.name, "name": self.name, "effect": self.effect, "gate": gate,
                "policy": self.policy is not None,
                "policy_sql": self.policy if isinstance(self.policy, str) else None, "probe": self.probe is not None,
                "allow": self.allow,
                "approval": self.approve.definition() if self.approve else {}, "caps": self.caps,
                "handler": self.sender.name}

    def send(self, *args: Any, approve: Approval | None = None, key: str | None = None, by: str | None = None,
             **named: Any) -> Any:
        """Records one call, to commit with what surrounds it; returns its record, as append() does; with key= it has no
        id yet, as there may be such a call already: select(idempotency_key=…).

        args, named: its arguments, checked at once. approve: whom to ask about this call; it adds to what is declared,
        never takes away. key: an idempotency key of your own: a second call with the same is none. by: the person who
        asks for it, who may not approve it. Among named, delay= or at=: it is sent so much later, "1h", or at that
        time, an aware datetime, and people are asked meanwhile; where the action has such an argument, it is that.
        Raises InvalidRecord, BadOption, NoScope.
        """
        delay, at = (None if name in self.model.model_fields else named.pop(name, None) for name in ("delay", "at"))
        return self._record(self.checked(*args, **named), approve, key, by, subject_of(), delay, at)

    def checked(self, *args: Any, **named: Any) -> dict[str, Any]:
        """Its arguments as JSON. Raises InvalidRecord with every reason."""
        fields = list(self.model.model_fields)
        if len(args) > len(fields):
            raise InvalidRecord(f"action {self.name}", args, [f"it takes {len(fields)} arguments: {', '.join(fields)}"])
        given = {**dict(zip(fields, args, strict=False)), **named}
        try:
            return self.model.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            raise InvalidRecord(f"action {self.name}", given, reasons(error)) from None

    def _record(self, args: dict[str, Any], approve: Approval | None, key: str | None, by: str | None,
                about: list[Any] | None, delay: Any = None, at: datetime | None = None) -> Any:
        found = find_scope()
        if found is None:
            with transaction():
                return self._record(args, approve, key, by, about, delay, at)
        current, who = found
        row: dict[str, Any] = {"app": self.app.name, "name": self.name, "args": args,
                               "idempotency_key": key or str(uuid.uuid4())}
        if approve is not None and (approve.when is None or approve.when(self.model.model_validate(args))):
            row |= {"gate": "always", "approve": approve.definition()}
        due = due_of(current.db, delay, at, f'the call of action "{self.name}"')
        if due is not None:
            row["delay" if due.at is None else "due_at"] = due.at or due.delay
        row |= {"requested_by": by} if by else {}
        row |= {"subject": about} if about else {}
        row |= {"taint": ["http"]} if current.kind == "route" else {}
        if key is not None:                                            # there may be one already
            relation = described(current.db, outbox_name(self.app))
            current.add(Rows("insert", relation, tuple(row), [who, tuple(row.values())],
                             ("app", "name", "idempotency_key")))
            return Appended(tuple(row), tuple(row.values()))
        sink = current.sinks.get(self.calls)
        if sink is None:
            current.check()
            sink = current.sinks[self.calls] = Columns(current, described(current.db, outbox_name(self.app)))
        return sink.append(row)

    async def run(self, args: Mapping[str, Any], key: str) -> Any:
        """Runs its body: the sender does."""
        values = dict(self.model.model_validate(args))
        if self.takes_key:
            values["key"] = key
        if inspect.iscoroutinefunction(self.fn):
            return await self.fn(**values)
        return await in_thread(partial(self.fn, **values))

    def again(self, error: Exception, attempt: int) -> Exception:
        """What an error of its body means for the next attempt: itself, or a Retry or Discard instead."""
        return error if self.component is None else self.component.again(error, attempt)

    def rows(self, call: Any, returned: Any, captured: bool) -> Any:
        """What goes into into=."""
        if self._rows is not None:
            return self._rows(call, returned, captured)
        return None if captured else returned

    def emit(self, rows: Any) -> None:
        """Records rows for into=."""
        self.sender.emit(rows)

    def bind(self, table: Table[Any]) -> HandlerSpec:
        """One call for each record of a table, its fields as arguments."""
        async def call(record: Any, ctx: Ctx) -> None:
            names = names_of(record)
            given: dict[str, Any] = {}
            for argument, info in self.model.model_fields.items():
                name = self.map.get(argument, argument)
                if name in names:
                    given[argument] = record[name] if isinstance(record, Mapping) else getattr(record, name)
                elif info.is_required():
                    raise Discard(f'{self.name} takes "{argument}", and this record has no "{name}".'
                                  f"{did_you_mean(name, names)} map={{\"{argument}\": …}} names another field")
            try:
                args = self.checked(**given)
            except InvalidRecord as error:
                raise Discard(str(error)) from error
            self._record(args, None, None, None, subject_of())

        return HandlerSpec(fn=call, name=f"call_{self.name}", each=True, options={})

    def __call__(self, *args: Any, **named: Any) -> Any:
        raise BadSignature(self.name, "a direct call", f"{self.name}.send(…), which records one; its body runs in the "
                           "sender", self.place)

    def __repr__(self) -> str:
        return f"Action({self.name!r}, {self.effect}, {self.place})"


@overload
def action(fn: Callable[..., Any], /) -> Action: ...
@overload
def action(*, name: str | None = None, effect: Effect = "unsafe", probe: Callable[[Any], Any] | None = None,
           approve: Approval | None = None, policy: Policy | None = None,
           into: Table[Any] | Sequence[Table[Any]] | None = None, allow: Mapping[str, Sequence[str]] | None = None,
           cap: str | Sequence[str] = (), rate: str | None = None, map: Mapping[str, str] | None = None,
           **options: Any) -> Callable[[Callable[..., Any]], Action]: ...
def action(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Declares what may leave the building.

    effect: "unsafe" (never sent twice: what nobody can tell is unknown) or "idempotent" (sent again with the same
    key). probe: (call) -> what came back, False: it did not happen, None: cannot tell. approve: whom to ask before.
    policy: (call) -> "send", "ask" or "refuse", or an SQL expression that says so, over the columns of the call. into:
    where what it returns goes. allow: {argument: [values, or hosts of URLs]}. cap: "100/day", "500 amount/day". rate:
    "100/m": so many sendings begin in any window, over all processes. map: {argument: field}. name, concurrency,
    timeout, attempts, backoff.
    """
    if fn is not None:
        return Action(fn)
    return lambda given: Action(given, **options)


class ActionComponent(Component):
    """Base of built-in actions: a component whose calls leave through the outbox.

    arguments: the model of what it is called with; None: anything. effect, approve, cap, rate: as of actions.

    A subclass says args(record, ctx) -> what it is called with, send(args, key) -> what came back as JSON, and, for
    into=, row(call, result) -> its row; result is None where it was captured.
    """

    acts = True
    outside: ClassVar[bool] = False  # into= gets what somebody else wrote
    effect: Effect = "unsafe"
    approve: Approval | None = None
    cap: str | Sequence[str] = ()
    rate: str | None = None
    arguments: type[BaseModel] | None = None

    def options(self) -> dict[str, Any]:
        """Options of its Action: these four, and in a subclass allow, probe, timeout, …"""
        return {"effect": self.effect, "approve": self.approve, "cap": self.cap, "rate": self.rate}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """What it is called with for a record. Raises Discard for a record that it cannot be called for."""
        raise NotImplementedError

    async def send(self, args: Any, key: str) -> Any:
        """Does it. args: a dict. Raises WorldError before it left, Discard for a refusal."""
        raise NotImplementedError

    def again(self, error: Exception, attempt: int) -> Exception:
        """What an error of send() means for the next attempt: itself, or a Retry or Discard instead."""
        return error

    def row(self, call: Call, result: Any) -> Any:
        """What into= gets."""
        return result

    def bind(self, table: Table[Any]) -> HandlerSpec:
        """What handles the records of `table`."""
        made = self.made()

        async def call(record: Any, ctx: Ctx) -> None:
            args = await self.args(record, ctx)
            try:
                args = args if self.arguments is None else made.checked(**args)
            except InvalidRecord as error:
                raise Discard(str(error)) from error
            made._record(args, None, ctx.key, None, subject_of())

        return HandlerSpec(fn=call, name=self.name, each=True, options={"concurrency": 20})

    def made(self) -> Action:
        """Its Action in the current app, declared once."""
        app = current_app()
        name, n = self.name, 1
        while name in app.actions and app.actions[name].component is not self:
            n += 1
            name = f"{self.name}_{n}"
        if name in app.actions:
            return cast(Action, app.actions[name])
        return _Built(self, name)


class _Built(Action):
    """The Action of a component."""

    def __init__(self, component: ActionComponent, name: str) -> None:
        self.component = component

        async def body(**values: Any) -> Any:
            key = values.pop("key")
            return await component.send(values, key)

        super().__init__(body, name=name, into=getattr(component, "into", None), model=component.arguments,
                         rows=lambda call, result, captured: component.row(call, result),
                         **{"concurrency": 20, **component.options()})
        self.place = component.place


def _arguments(name: str, fn: Callable[..., Any], place: str) -> tuple[type[BaseModel], bool]:
    """The model of a function's arguments, and whether it takes the idempotency key."""
    fields: dict[str, Any] = {}
    takes_key = False
    try:
        hints = inspect.get_annotations(fn, eval_str=True)
    except Exception:                                                  # names that are not there at run time
        hints = {}
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and len(parameters) == 1:
        return create_model(name, __config__=ConfigDict(extra="allow")), True
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise BadSignature(name, str(parameter), "arguments with names, so that a call is a row", place)
        if parameter.name == "key" and parameter.kind is parameter.KEYWORD_ONLY:
            takes_key = True
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields), takes_key


def _cap(text: str, of: str, model: type[BaseModel]) -> dict[str, Any]:
    """ "100/day" or "500 amount/day" as put_action() takes it."""
    amount, _, rest = str(text).partition("/")
    number, _, argument = amount.strip().partition(" ")
    period = rest.strip()
    try:
        limit = Decimal(number)
    except InvalidOperation:
        limit = Decimal("nan")
    if not limit.is_finite() or limit < 0 or period not in PERIODS or (argument and argument not in model.model_fields):
        raise BadOption("cap", text, of, f'"100/day" or "500 amount/day"; a period: {", ".join(PERIODS)}')
    return {"amount": str(limit), "of": argument or None, "period": period}


async def decide(db: Database, app: Any, approval: int, person: str, decision: Literal["approve", "reject"],
                 via: str, *, edit: Mapping[str, Any] | None = None, why: str | None = None,
                 sha256: str | None = None, conn: Conn | None = None) -> Any:
    """A person's decision, from whichever channel; the row of decide(): won, state, decided_by, decided_via, next.

    edit: the arguments that change, checked by the action's model. sha256: of the arguments they were shown; None:
    those that are there now. conn: a transaction that it is to be part of. Raises InvalidRecord, and DecisionRefused
    for who may not.
    """
    if conn is None:
        async with db.tx() as conn:
            return await decide(db, app, approval, person, decision, via, edit=edit, why=why, sha256=sha256, conn=conn)
    shown = await db.call_value(conn, "show_approval", approval)
    args = edited(app, shown, edit) if edit and shown is not None else None
    digest = sha256 if sha256 is not None or shown is None else shown["args_sha256"]
    return (await db.call(conn, "decide", approval, person, decision, via, digest, args, why))[0]


def edited(app: Any, shown: Mapping[str, Any], edit: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an approval, as show_approval() has it, with what a person changed, checked by the action.

    Raises InvalidRecord, and DecisionRefused where its action is not declared here.
    """
    declared: Action | None = app.actions.get(shown["name"]) if shown["app"] == app.name else None
    if declared is None:
        raise DecisionRefused(f'approval {shown["id"]}: the app {app.name} does not declare the action {shown["name"]} '
                              f"of the app {shown['app']}, so it cannot check what was edited. Nothing was decided. "
                              "Decide it without an edit, or where its app's code is: in its inbox, by anton "
                              "approvals in its folder, or with --app")
    return declared.checked(**{**shown["args"], **edit})
