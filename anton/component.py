"""Component: a configured piece that handles a Table's records, such as OpenAiCompletion or SlackPostMessage.

    prompts.on_new_records(OpenAiCompletion(completions, api_key=env("OPENAI_API_KEY")))

A component is plain configuration until it is bound. It gives `bind(table)`, which returns what the decorator
would have been given: a function and its options. Third parties write theirs the same way.

Its options are those of its __init__, checked by their types when it is made (option.py).

Credentials, the same for all: connection="name" of autonomous.json > what was given (a value or env(…)) > the service's
usual variable > outside of live processes a stand-in that sends nothing. "xxxx" is not set. A live process refuses to
start without them. A connection whose variable is not set is not set: no other key goes to its address.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

from anton.action import effects
from anton.app import App, current_app, place_of_caller
from anton.config import FILE, Connection, resolve
from anton.errors import BadOption, ConfigError, Discard, did_you_mean
from anton.option import check
from anton.secret import Env, env, mask, reveal

CALLS = 16  # of one client at a time: its pool looks at all its connections for each
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_PASSWORD = re.compile(r"//[^/@'\"]*@")
_ADDRESSED = re.compile(r"^\s*(?:<@\w+>|@\w+)[\s,:]*")

StandIn = Callable[["Component", str], Any]


class Component:
    """Base of components.

    service: who it talks to. variable: the environment variable that usually holds its key; issued: where people get
    one, for errors and its page. acts: it has effects out there, which are captured unless the process is live; others
    only ask. carries: what it makes has further fields of the record, by name. example: of ours, the folder of
    examples/ where it runs. place: "main.py:31".

    map: names of the record's fields, where they are not those that it reads: {"text": "body"}. allow_pii: it may give
    PII to a model. connection: an entry of autonomous.json's connections; its credential and address. Raises BadOption,
    UnknownOption.
    """

    place: str

    service: ClassVar[str] = ""
    variable: ClassVar[str] = ""
    issued: ClassVar[str] = ""
    acts: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    example: ClassVar[str] = ""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        place = place_of_caller()
        check(cls, args, options, place)
        made = super().__new__(cls)
        made.place = place
        return made

    def __init__(self, *, secret: Env | str | None = None, map: Mapping[str, str] | None = None,
                 allow_pii: bool = False, connection: str | None = None) -> None:
        self.connection = connection
        self._connection = None if connection is None else self._connect(connection)
        self._secret = secret if self._connection is None else Env(self._connection.variable)
        self.allow_pii = allow_pii
        self.map = dict(map or {})

    @property
    def name(self) -> str:
        """What its handlers and effects are called."""
        return type(self).__name__

    def _connect(self, name: str) -> Connection:
        settings, of = current_app().settings, f"{type(self).__name__} ({self.place})"
        known = {one.name: one for one in settings.connections} if settings is not None else {}
        found = known.get(name)
        if found is None:
            raise BadOption("connection", name, of, f"a connection of {FILE}.{did_you_mean(name, known)} It has: "
                            f'{", ".join(known) or "none"}. To add one: {{"name": "{name}", "service": '
                            f'"{self.service.lower()}", "api_key": "env:{self.variable or "NAME"}"}}')
        if found.service.lower() != self.service.lower():
            fit = [one.name for one in known.values() if one.service.lower() == self.service.lower()]
            raise BadOption("connection", name, of, f'a connection of the service "{self.service.lower()}": '
                            f'{", ".join(fit) or "there is none"}. "{name}" is of "{found.service}"')
        return found

    def address(self, given: str | None) -> str | None:
        """What was given, else the connection's base_url; None: the service's own address. Raises ConfigError."""
        url = None if given or self._connection is None else self._connection.base_url
        return given if url is None else resolve(url, where=f'"base_url" of connection "{self.connection}"')

    def credential(self) -> str | None:
        """Its key or token, read now; None when neither what was given nor the usual variable is set."""
        usual = None if self._connection is not None else env(self.variable)
        return reveal(self._secret) or reveal(usual)

    def unset(self) -> str | None:
        """What to set, when there is no credential."""
        if self.credential() is not None:
            return None
        return self._secret.name if isinstance(self._secret, Env) else self.variable

    def inputs(self) -> Mapping[str, Any]:
        """The fields that it reads and their types, such as {"text": str}, before map=. migrate compares them."""
        return {}

    def outputs(self) -> Mapping[str, Any]:
        """The fields of the rows that it makes, and their types."""
        return {}

    def told(self) -> set[str]:
        """The fields that it gives to a model."""
        return set()

    def queries(self) -> Mapping[str, str]:
        """The SQL whose rows it gives to a model, by name."""
        return {}

    def read(self, record: Mapping[str, Any], field: str) -> Any:
        """The value of an input field, under the name that map= gives it. Raises Discard naming what there is."""
        name = self.map.get(field, field)
        value = record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)
        if value is None:
            names = names_of(record)
            raise Discard(f'{self.name} reads "{name}", which this record has not.{did_you_mean(name, names)} '
                          f'It has: {", ".join(names)}. map={{"{field}": …}} names another field')
        return value

    def __repr__(self) -> str:
        shown = [f"{name}={_PASSWORD.sub('//…@', repr(value))}" for name, value in vars(self).items()
                 if not name.startswith("_") and name not in ("place", "arguments") and value not in (None, {})]
        if self._secret is not None:
            shown.append(f"secret={mask(self._secret)}")
        return f"{self.name}({', '.join(shown)})"


class Clients:
    """Clients of a service for each event loop, made anew when the credential changed, closed when their loop ends.

    make: takes the credential and returns a client, which has `aclose` or an async `close`.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make
        self._known: dict[asyncio.AbstractEventLoop, tuple[str, list[_Lent]]] = {}

    async def get(self, credential: str) -> Any:
        """The first client of the running loop, for a call now and then."""
        return (await self._all(credential))[0].client

    @asynccontextmanager
    async def lend(self, credential: str) -> AsyncGenerator[Any]:
        """A client of the running loop that has less than CALLS calls, for many calls at a time."""
        known = await self._all(credential)
        lent = next((one for one in known if one.calls < CALLS), None)
        if lent is None:
            lent = await _Lent.of(self._make(credential))
            known.append(lent)
        lent.calls += 1
        try:
            yield lent.client
        finally:
            lent.calls -= 1

    async def _all(self, credential: str) -> list[_Lent]:
        loop = asyncio.get_running_loop()
        known = self._known.get(loop)
        if known is None or known[0] != credential:
            for ended in [other for other in self._known if other.is_closed()]:
                del self._known[ended]
            before, known = known, (credential, [await _Lent.of(self._make(credential))])
            self._known[loop] = known
            for lent in before[1] if before is not None else ():
                await lent.guard.aclose()
        return known[1]


@dataclass
class _Lent:
    """A client and how many calls it has."""

    client: Any
    guard: AsyncGenerator[None]
    calls: int = 0

    @classmethod
    async def of(cls, client: Any) -> _Lent:
        guard = _close_with_loop(client)
        await anext(guard)
        return cls(client, guard)


@cache
def tls() -> ssl.SSLContext:
    """What clients of httpx2 know of certificates; made once, for it takes 30 ms."""
    made: ssl.SSLContext = importlib.import_module("httpx2").create_ssl_context()
    return made


async def _close_with_loop(client: Any) -> AsyncGenerator[None]:
    """Closes the client when it is closed itself, which an ending loop does (shutdown_asyncgens)."""
    try:
        yield
    finally:
        await (client.aclose if hasattr(client, "aclose") else client.close)()


def names_of(record: Any) -> list[str]:
    """The names of a record's values."""
    return list(record) if isinstance(record, Mapping) else list(type(record).model_fields)


def placeholders(template: str) -> set[str]:
    """The names in braces."""
    return set(_PLACEHOLDER.findall(template))


def fill(template: str, record: Any, map: Mapping[str, str] | None = None) -> str:
    """The template with every {name} replaced by the record's value. Raises Discard for a name it has not.

    map: the record's names for those of the template.
    """
    def value(found: re.Match[str]) -> str:
        name = (map or {}).get(found[1], found[1])
        names = names_of(record)
        if name not in names:
            raise Discard(f'{{{name}}} in "{template}" is no value of this record.{did_you_mean(name, names)} '
                          f'It has: {", ".join(names)}')
        return str(record[name] if isinstance(record, Mapping) else getattr(record, name))

    return _PLACEHOLDER.sub(value, template)


def echo(component: Component, prompt: str) -> str:
    """What stands in for a model without a key: repeats the last part of the prompt, the same each time."""
    line = prompt.strip().rpartition("\n")[2]
    said = line.partition(": ")[2] or line
    return f"Friendly echo: {_ADDRESSED.sub('', said)}"


_stand_in: StandIn = echo


def stand_in(component: Component, prompt: str) -> Any:
    """The answer of the model that stands in where no key is set, or nothing may leave."""
    return _stand_in(component, prompt)


def set_stand_in(answer: StandIn | None) -> None:
    """Another model to stand in, as tests do; None: echo."""
    global _stand_in
    _stand_in = answer or echo


def components_of(app: App) -> dict[str, Component]:
    """The app's components by the names of their handlers and polls."""
    declared = (*app.handlers.values(), *app.schedules.values())
    return {one.name: one.component for one in declared if isinstance(one.component, Component)}


def check_credentials(app: App) -> None:
    """Raises ConfigError when this process is live and a component has no credential."""
    if effects() != "live":
        return
    missing = [f"{name} ({component.place}) needs {component.unset()}"
               + (f", from {component.issued}" if component.issued else "")
               for name, component in components_of(app).items() if component.unset()]
    if missing:
        raise ConfigError(f"not set: {'; '.join(missing)}. Set it, or try the app with: anton dev", missing=missing)
