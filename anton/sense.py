"""Sense: what comes in over http. Declarations only; web.py serves them.

    @post("/orders")                              a route: FastAPI parameters and responses
    Webhook("/github", events, verify="github")   each request a record

Light on purpose: a worker loads main.py too and never needs FastAPI.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from anton.app import current_app, place_of_caller
from anton.errors import BadOption, BadSignature, UnknownOption
from anton.scheme import Scheme
from anton.secret import Many, One, several
from anton.sent import MAX_FIELDS
from anton.table import Table

F = TypeVar("F", bound=Callable[..., Any])
Verify = str | Scheme | Callable[[bytes, Mapping[str, str]], bool] | bool | None
Secret = Many | Mapping[str, Many] | None

ROUTE_OPTIONS = ("status_code", "response_model", "response_class", "responses", "response_description", "tags",
                 "summary", "description", "deprecated", "include_in_schema", "name", "operation_id", "dependencies",
                 "response_model_include", "response_model_exclude", "response_model_exclude_none",
                 "response_model_exclude_unset", "response_model_exclude_defaults", "response_model_by_alias",
                 "openapi_extra", "callbacks", "max_body_size", "form_limits")


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose body has arrived: everything here is a plain call, also in async code.

    headers: by lower-case name. query, path_params: as text. client: the peer's address.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    path_params: Mapping[str, Any] = field(default_factory=dict)
    client: str = ""

    def json(self) -> Any:
        """The body as JSON. Raises ValueError when it is none; the caller gets 400."""
        return json.loads(self.body)

    def text(self) -> str:
        """The body as UTF-8 text."""
        return self.body.decode()

    def form(self) -> dict[str, str]:
        """The fields of a form (application/x-www-form-urlencoded); the last of equal names counts.

        Raises ValueError when it is none (the caller gets 400) and beyond 1,000 fields (413).
        """
        return dict(parse_qsl(self.body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS))


@dataclass(frozen=True)
class Route:
    """A function that answers a path. verify, secret: see verify.py. options: FastAPI's, as given."""

    method: str
    path: str
    fn: Callable[..., Any]
    verify: Verify
    secrets: tuple[One, ...] = field(repr=False)
    options: Mapping[str, Any]
    place: str


class Webhook:
    """Webhook("/github", events, verify="github", secret=env("X")): each POST becomes a record of the table.

    The record is {"timestamp", "payload", "headers"}, or the payload itself where the table has a model.
    The sender gets 2xx after the commit. verify, secret: as on routes. invalid: the status for what does not fit the
    model or the table, and is kept in anton.quarantine; default 422.
    """

    def __init__(self, path: str, table: Table[Any], *, verify: Verify = None, secret: Secret = None,
                 invalid: int = 422) -> None:
        self.path, self.table, self.verify, self.secrets = _path(path, "Webhook"), table, verify, several(secret)
        self.invalid = invalid
        if not isinstance(table, Table):
            raise BadOption("table", table, f'Webhook("{path}")', "a Table, which takes the requests as records")
        if type(invalid) is not int or not 200 <= invalid <= 599:
            raise BadOption("invalid", invalid, f'Webhook("{path}")', "a status to answer, such as 422 or 200")
        self.place = place_of_caller()
        current_app().claim_name("route", f"POST {path}", self.place)
        current_app().webhooks.append(self)

    def __repr__(self) -> str:
        return f'Webhook("{self.path}", {self.table.name})'


def _path(path: str, of: str) -> str:
    if not isinstance(path, str) or not path.startswith("/"):
        raise BadOption("path", path, of, 'a text that begins with "/", such as "/orders/{id}"')
    return path


def _method(method: str) -> Callable[..., Callable[[F], F]]:
    def route(path: str, *, verify: Verify = None, secret: Secret = None, **options: Any) -> Callable[[F], F]:
        of = f'@{method.lower()}("{path}")'
        if callable(path):
            raise BadSignature(getattr(path, "__name__", "?"), f"no path: @{method.lower()}",
                               f'@{method.lower()}("/orders")', place_of_caller())
        _path(path, of)
        for option in options:
            if option not in ROUTE_OPTIONS:
                raise UnknownOption(option, of, ("verify", "secret", *ROUTE_OPTIONS))

        def declare(fn: F) -> F:
            place = place_of_caller()
            current_app().claim_name("route", f"{method} {path}", place)
            current_app().routes.append(Route(method, path, fn, verify, several(secret), options, place))
            return fn

        return declare

    route.__name__ = route.__qualname__ = method.lower()
    route.__doc__ = f"""@{method.lower()}(path): the function answers {method}; its writes commit before the reply.

    verify: a scheme's name, Hmac(…), callable(body, headers) -> bool, or False. secret: env(…), one or several.
    The rest is FastAPI's: status_code, response_model, tags, summary, …
    """
    return route


get, post, put, patch, delete = (_method(method) for method in ("GET", "POST", "PUT", "PATCH", "DELETE"))
