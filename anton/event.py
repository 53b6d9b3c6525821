"""Event: orders.on_new_records and its like, which turn a function, SQL or a component into a Handler.

Everything that can be wrong with a declaration is found here, when it is made.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, Unpack, overload
from uuid import UUID

import orjson
from pydantic import BaseModel

from anton.app import current_app, place_of_caller, shown
from anton.ctx import Ctx
from anton.duration import duration
from anton.errors import BadOption, BadSignature, UnknownOption, one_of
from anton.handler import BATCH, CALLS, EACH_BATCH, EACH_CALLS, MOST, OPTIONS, Component, Handler, Options, interval
from anton.query import placeholders
from anton.rank import HIGHEST
from anton.rate import normal
from anton.rebuilt import Failed, Rebuilt
from anton.record import ChangeOp, Record, Records

if TYPE_CHECKING:
    from anton.table import Table

T = TypeVar("T")
R = TypeVar("R")
B = TypeVar("B", bound="Rebuilt | Failed")


class OfBatch(Protocol[T]):
    """Decorates a function of a batch."""

    @overload
    def __call__(self, fn: Callable[[Records[T]], R], /) -> Callable[[Records[T]], R]: ...
    @overload
    def __call__(self, fn: Callable[[Records[T], Ctx], R], /) -> Callable[[Records[T], Ctx], R]: ...


class OfEach(Protocol[T]):
    """Decorates a function of one record."""

    @overload
    def __call__(self, fn: Callable[[T], R], /) -> Callable[[T], R]: ...
    @overload
    def __call__(self, fn: Callable[[T, Ctx], R], /) -> Callable[[T, Ctx], R]: ...


class Event(Generic[T]):
    """orders.on_new_records and its like: takes a function, options, a component, or .sql("…").

    name, was: what it is called, and was. into: where returned values go. where: SQL on the new row; the old one is
    old. columns: only when one of these changed. read: "now" | "change". since: "now" | "beginning". each: one call a
    record. batch, max_wait, concurrency, timeout, attempts, backoff, max_lag, on_conflict, priority, rate: how it is
    run. debounce, per, ordered, on_dead: which records wait for what, see docs/flow.md.
    """

    def __init__(self, table: Table[T], verb: str, ops: tuple[ChangeOp, ...]) -> None:
        self._table = table
        self._verb = verb
        self._ops = ops

    @overload
    def __call__(self, fn: Callable[[Records[T]], R], /, **options: Unpack[Options]) -> Callable[[Records[T]], R]: ...
    @overload
    def __call__(self, fn: Callable[[Records[T], Ctx], R], /,
                 **options: Unpack[Options]) -> Callable[[Records[T], Ctx], R]: ...
    @overload
    def __call__(self, fn: Callable[[T], R], /, *, each: Literal[True],
                 **options: Unpack[Options]) -> Callable[[T], R]: ...
    @overload
    def __call__(self, fn: Callable[[T, Ctx], R], /, *, each: Literal[True],
                 **options: Unpack[Options]) -> Callable[[T, Ctx], R]: ...
    @overload
    def __call__(self, component: Component, /, **options: Unpack[Options]) -> Component: ...
    @overload
    def __call__(self, *, each: Literal[True], **options: Unpack[Options]) -> OfEach[T]: ...
    @overload
    def __call__(self, *, each: Literal[False] = False, **options: Unpack[Options]) -> OfBatch[T]: ...
    def __call__(self, *given: Any, **options: Any) -> Any:
        """Declares the handler, or returns what does."""
        if not given:
            _check_names(options, self._of(options), ())
            return lambda thing: self(thing, **options)
        if len(given) > 1:
            raise BadOption("handler", given, self._of(options), "one function or one component")
        thing = given[0]
        spec = thing.bind(self._table) if isinstance(thing, Component) and not isinstance(thing, type) else None
        if spec is None and (not callable(thing) or isinstance(thing, type)):
            raise BadOption("handler", thing, self._of(options),
                            'a function, a component, or .sql("…")')
        limit = options.get("concurrency")                             # as typed: a component's own is of each process
        if spec is not None:
            options = {**spec.options, "each": spec.each, "into": spec.into, **options}
        handler = self._declare(spec.fn if spec else thing, spec.name if spec else getattr(thing, "__name__", None),
                                options, component=thing if spec else None)
        handler.limit = limit
        return thing

    def sql(self, body: str, /, **options: Any) -> Handler:
        """A handler in SQL: reads new_records and old_records, runs where the data is, commits with its ack.

        Besides options takes a value for each {name} in the SQL or in where=; it is bound, not pasted.
        """
        return self._declare(None, f"{self._table.name}_{self._verb}_sql", options, body=body)

    def __repr__(self) -> str:
        return f"{self._table.name}.on_{self._verb}"

    def _of(self, options: Mapping[str, Any], name: str | None = None) -> str:
        name = options.get("name") or name
        return f'{self!r}, handler "{name}"' if name else repr(self)

    def _declare(self, fn: Callable[..., Any] | None, name: str | None, options: dict[str, Any],
                 body: str | None = None, component: object = None) -> Handler:
        app, place, of = current_app(), place_of_caller(), self._of(options, name)
        if fn is not None and component is None and hasattr(fn, "__code__"):
            place = shown(fn.__code__.co_filename, fn.__code__.co_firstlineno)
        named = placeholders(body or "") | placeholders(options.get("where") or "")
        _check_names(options, of, named)
        params = {key: _param(key, options.pop(key), of) for key in named & options.keys() - set(OPTIONS)}
        name = name if options.get("name") is None else options["name"]
        if not isinstance(name, str) or not name or name == "<lambda>":
            raise BadOption("name", name, repr(self), 'a text; a lambda and the like need one: name="score"')
        read: Literal["now", "change"] = "now" if self._ops == ("new",) and body is None else "change"
        handler = Handler(app.name, name, self._table, self._ops, "sql" if body is not None else "python", fn, place,
                          read=read, body=body, params=params, component=component)
        _fill(handler, options, of)
        if fn is not None:
            _inspect(handler, fn)
        app.claim_name("handler", name, place)
        app.handlers[name] = handler
        return handler


class OfBuild(Protocol[B]):
    """Decorates a function of one build."""

    @overload
    def __call__(self, fn: Callable[[B], R], /) -> Callable[[B], R]: ...
    @overload
    def __call__(self, fn: Callable[[B, Ctx], R], /) -> Callable[[B, Ctx], R]: ...


class BuildEvent(Event[Any], Generic[B]):
    """revenue.on_rebuilt and .on_failed: takes a function of one build, options, or .sql("…").

    One call a build, one after another. Options as of other handlers, but for what is about records: each, where,
    columns, read, since, batch.
    """

    @overload  # type: ignore[override]
    def __call__(self, fn: Callable[[B], R], /, **options: Unpack[Options]) -> Callable[[B], R]: ...
    @overload
    def __call__(self, fn: Callable[[B, Ctx], R], /, **options: Unpack[Options]) -> Callable[[B, Ctx], R]: ...
    @overload
    def __call__(self, **options: Unpack[Options]) -> OfBuild[B]: ...
    def __call__(self, *given: Any, **options: Any) -> Any:
        """Declares the handler, or returns what does."""
        return super().__call__(*given, **options)

    def _declare(self, fn: Callable[..., Any] | None, name: str | None, options: dict[str, Any],
                 body: str | None = None, component: object = None) -> Handler:
        of = self._of(options, name)
        if component is not None:
            raise BadOption("handler", component, of, 'a function or .sql("…"); components take records')
        for option in ("each", "where", "columns", "read", "since", "batch", "per", "debounce", "ordered", "on_dead"):
            if options.get(option) is not None:
                raise BadOption(option, options[option], of, f"no {option}= here: a build has no records")
        return super()._declare(fn, name, options, body, component)


def _check_names(options: Mapping[str, Any], of: str, named: Iterable[str]) -> None:
    for option in options:
        if option not in OPTIONS and option not in named:
            raise UnknownOption(option, of, (*OPTIONS, *named))


def _fill(handler: Handler, options: Mapping[str, Any], of: str) -> None:
    """Checks the options and puts them into the handler."""
    handler.typed = {key: _shown(value) for key, value in options.items() if value is not None}
    build = handler.ops in BUILDS
    handler.each = _choice(options, "each", (False, True), build and handler.kind == "python", of)
    handler.batch = EACH_BATCH if handler.each else BATCH
    handler.concurrency = 1 if build else EACH_CALLS if handler.each else CALLS  # builds are told in order
    handler.read = _choice(options, "read", ("now", "change"), handler.read, of)
    handler.since = _choice(options, "since", ("now", "beginning"), "now", of)
    handler.on_conflict = _choice(options, "on_conflict", ("rerun", "overwrite"), "rerun", of)
    for option, least, most in (("batch", 1, MOST), ("concurrency", 1, 10_000), ("attempts", 1, 1000),
                                ("priority", 0, HIGHEST)):
        value = options.get(option)
        if value is not None:
            if type(value) is not int or not least <= value <= most:
                raise BadOption(option, value, of, f"a whole number from {least} to {most}")
            setattr(handler, option, value)
    handler.limit = options.get("concurrency")
    for option in ("max_wait", "timeout", "backoff", "max_lag", "debounce"):
        if options.get(option) is not None:
            setattr(handler, option, duration(options[option], option, of))
    for option in ("where", "was"):
        value = options.get(option)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise BadOption(option, value, of, "a text that is not empty")
        setattr(handler, option, value)
    handler.columns = _columns(handler, options.get("columns"), of)
    _debounce(handler, options, of)
    handler.ordered = _choice(options, "ordered", (False, True), False, of)
    handler.on_dead = _choice(options, "on_dead", ("skip", "block"), "skip", of)
    _check_order(handler, options, of)
    handler.per = _per(handler, options, of)
    handler.rate = _rate(handler, options.get("rate"), of)
    into = options.get("into")
    handler.into = () if into is None else tuple(into) if isinstance(into, (list, tuple)) else (into,)
    for table in handler.into:
        if not hasattr(type(table), "on_new_records"):                 # Files are Tables, too
            raise BadOption("into", table, of, 'a Table, such as into=invoices with invoices = Table("invoices")')
    if handler.each and handler.ops == ("truncate",):
        raise BadOption("each", True, of, "no each= here: a truncate has no records")
    if handler.since == "beginning" and "new" not in handler.ops:
        raise BadOption("since", "beginning", of, '"now"; rows that exist can only be fed as new records')


def _columns(handler: Handler, value: Any, of: str, option: str = "columns") -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(one, str) for one in value) or not value:
        raise BadOption("columns", value, of, 'names of columns, such as columns=["status"]')
    shape = handler.table.shape
    for one in value:
        if shape is not None and one not in shape.names and one not in shape.key:
            raise UnknownOption(one, f"{option}= of {of}", shape.names)
    return tuple(value)


def _debounce(handler: Handler, options: Mapping[str, Any], of: str) -> None:
    if handler.debounce is None:
        return
    if not handler.debounce:
        raise BadOption("debounce", options["debounce"], of, 'more than 0, such as debounce="2s"')
    if handler.ops not in (("new",), ("updated",)):
        raise BadOption("debounce", options["debounce"], of,
                        "no debounce= here: only new, or updated, records have a latest state")
    if options.get("read") == "change":
        raise BadOption("read", "change", of, '"now" beside debounce=: it gets the latest state')
    if options.get("max_wait") is not None and handler.max_wait < handler.debounce:
        raise BadOption("max_wait", options["max_wait"], of, f"no less than debounce={options['debounce']!r}")
    handler.read = "now"


def _per(handler: Handler, options: Mapping[str, Any], of: str) -> str | None:
    per = options.get("per")
    if per is None:
        return None
    if not isinstance(per, str) or not per:
        raise BadOption("per", per, of, 'the name of a column, such as per="customer"')
    _columns(handler, [per], of, "per")
    if handler.debounce is not None and options.get("concurrency") is None:
        return per
    if not handler.each or handler.kind == "sql" or not set(handler.ops) <= {"new", "updated", "deleted"}:
        raise BadOption("per", per, of, "a function with each=True beside it: only one record has one value")
    if options.get("concurrency") is None and options.get("rate") is None and not handler.ordered:
        raise BadOption("per", per, of, f"concurrency=N beside it: how many records of one {per} may run at a time; "
                        'rate="100/m": how many may begin; or ordered=True: one, in order')
    return per


def _check_order(handler: Handler, options: Mapping[str, Any], of: str) -> None:
    if handler.ordered and (not handler.each or handler.kind == "sql"
                            or not set(handler.ops) <= {"new", "updated", "deleted"}):
        raise BadOption("ordered", True, of, "a function with each=True beside it: a batch holds many keys")
    if handler.ordered and handler.debounce is not None:
        raise BadOption("debounce", options["debounce"], of, "none beside ordered=True, which handles all changes")
    if options.get("on_dead") is not None and not handler.ordered:
        raise BadOption("on_dead", options["on_dead"], of, "ordered=True beside it: else no record waits for another")


def _rate(handler: Handler, value: Any, of: str) -> str | None:
    if value is None:
        return None
    if handler.per is not None and handler.debounce is not None:
        raise BadOption("rate", value, of, f"no rate= beside debounce= with per=, which is what comes to rest, each "
                                           f"{handler.per}; leave one of them out")
    if handler.ordered:
        raise BadOption("rate", value, of, "no rate= beside ordered=True: leave one of them out")
    return normal(value, of)


def _choice(options: Mapping[str, Any], option: str, allowed: tuple[Any, ...], default: Any, of: str) -> Any:
    value = options.get(option)
    if value is None:
        return default
    if value not in allowed:
        raise BadOption(option, value, of, one_of([str(one) for one in allowed]))
    return value


BUILDS: dict[tuple[ChangeOp, ...], type[Rebuilt] | type[Failed]] = {  # what handlers of these ops get, not records
    ("rebuilt",): Rebuilt, ("failed",): Failed}
_WANTED = {False: "(records) or (records, ctx); with each=True (record) or (record, ctx)",
           True: "(record) or (record, ctx)"}


def _inspect(handler: Handler, fn: Callable[..., Any]) -> None:
    """How the function is called, checked against its signature and annotations."""
    inner: Any = fn
    while hasattr(inner, "func"):                                      # functools.partial
        inner = inner.func
    if not inspect.isroutine(inner):
        inner = type(inner).__call__
    handler.is_async = inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)
    handler.yields = inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner)
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):                                    # a builtin does not say
        return
    try:
        hints = typing.get_type_hints(inner)
    except Exception:                                                  # names that are not there at run time
        hints = {}
    build = BUILDS.get(handler.ops)
    wanted = f"({build.__name__.lower()}) or ({build.__name__.lower()}, ctx)" if build else _WANTED[handler.each]
    found = f"({', '.join(str(p) for p in parameters)})"
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) > 2 or any(p.kind is p.KEYWORD_ONLY for p in needed) or not (
            places or any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        raise BadSignature(handler.name, found, wanted, handler.place)
    second = places[1] if len(places) > 1 else None
    handler.wants_ctx = second is not None and (second.default is second.empty or second.name == "ctx"
                                                or hints.get(second.name) is Ctx)
    if places and build is None:
        _check_first(handler, hints.get(places[0].name), found, wanted)
    elif places and hints.get(places[0].name) not in (None, Any, build, object):
        right = f"{build.__name__}: a handler of builds gets no records" if build else wanted
        raise BadSignature(handler.name, found, right, handler.place)
    returned = hints.get("return")
    if not handler.into and (handler.yields or returned not in (None, type(None), Any, typing.NoReturn, object)):
        what = "and yields values" if handler.yields else f"and returns {_name(returned)}"
        raise BadSignature(handler.name, f"{found} {what}", "into=TABLE for what it returns, or -> None", handler.place)


def _check_first(handler: Handler, hint: Any, found: str, wanted: str) -> None:
    """A batch where one record is meant, one record where a batch is, or the model of another table."""
    model = handler.table.model
    whole = hint is Records or typing.get_origin(hint) is Records
    inner = (typing.get_args(hint) or (None,))[0] if whole else hint
    is_record = isinstance(inner, type) and issubclass(inner, (BaseModel, Record))
    if handler.each and whole:
        raise BadSignature(handler.name, f"{found} and each=True", wanted, handler.place)
    if not handler.each and not whole and is_record:
        raise BadSignature(handler.name, f"{found}, one record, without each=True",
                           f"Records[{_name(inner)}], or each=True", handler.place)
    if is_record and not issubclass(model or Record, inner):
        right = f'{_name(model) if model else "Record"}, which is what table "{handler.table.name}" holds'
        raise BadSignature(handler.name, found, right, handler.place)


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _param(name: str, value: Any, of: str) -> tuple[str, str | None]:
    """A value bound into SQL as [type, text]."""
    if value is None:
        return "text", None
    if isinstance(value, bool):
        return "boolean", str(value).lower()
    for cls, sqltype in ((int, "bigint"), (float, "double precision"), (Decimal, "numeric"), (str, "text"),
                         (datetime, "timestamptz"), (date, "date"), (UUID, "uuid")):
        if isinstance(value, cls):
            return sqltype, value.isoformat() if isinstance(value, date) else str(value)
    if isinstance(value, timedelta):
        return "interval", interval(value)
    if isinstance(value, (dict, list)):
        return "jsonb", orjson.dumps(value).decode()
    raise BadOption(name, value, of, "a bool, number, text, date, datetime, timedelta, UUID, dict or list")


def _shown(value: Any) -> Any:
    """An option as JSON."""
    if isinstance(value, (list, tuple)):
        return [_shown(one) for one in value]
    return value if isinstance(value, (str, int, float, bool)) else getattr(value, "name", str(value))
