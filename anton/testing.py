"""Testing: the pytest fixture `app`. Real Postgres, no network, plain calls, also inside async tests.

    def test_the_bot_answers(app):
        app.post("/slack-mentions", json=MENTION, sign="slack")
        app.run()                                      # everything that is due, until nothing is
        assert [call.text for call in app.outbox] == ["Friendly echo: hi"] and not app.dead

Each test gets a database of its own, cloned from one that was migrated once, with main.py of the test's folder (or
the nearest one above it) loaded afresh. Time is the database's and moves with app.advance(). Effects are captured,
models are stood in for, and connections to anywhere but this machine and the database are refused.

The server is the app's embedded one; ANTON_TEST_DATABASE=postgresql://… names another, whose role may create databases.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import pytest

from anton import component, embedded, schedule
from anton.action import effects, set_effects
from anton.app import App, load_app
from anton.config import is_loopback
from anton.db import Database, Portal, quote, set_database
from anton.duration import duration
from anton.errors import AntonError, BadOption
from anton.migrate import migrate
from anton.outbox import decide
from anton.relation import describe
from anton.secret import Env, VerifyToken
from anton.verify import SCHEMES, Verifier
from anton.worker import Worker

if TYPE_CHECKING:
    import httpx

    from anton.sense import Route, Webhook
    from anton.table import Table

STEPS = 100                                                            # due times that advance() stops at


class NoNetwork(AntonError):
    """A test tried to reach something that is not on this machine. host."""


@dataclass(frozen=True)
class Call:
    """An effect. Its arguments are attributes: call.text.

    name: of the action. key: its idempotency key. state: "captured", or "sent" with the result that came back.
    """

    name: str
    args: Mapping[str, Any]
    key: str
    state: str
    result: Any
    at: datetime
    error: str | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.args[name]
        except KeyError:
            raise AttributeError(f"{self.name} was called without {name}; with: {', '.join(self.args)}") from None


@dataclass(frozen=True)
class Asked:
    """An approval. Its arguments are attributes: approval.amount. preview: what people read."""

    id: int
    name: str
    state: str
    preview: str
    args: Mapping[str, Any]
    approvers: tuple[str, ...]
    decided_by: str | None
    difference: Any
    _test: TestApp = field(repr=False)

    def approve(self, by: str = "you", edit: Mapping[str, Any] | None = None, via: str = "test") -> Any:
        """This person approves it; one that is not known yet is made, in the groups that are asked."""
        return self._decide(by, "approve", edit, None, via)

    def reject(self, by: str = "you", why: str | None = None, via: str = "test") -> Any:
        """This person rejects it."""
        return self._decide(by, "reject", None, why, via)

    def _decide(self, by: str, what: Literal["approve", "reject"], edit: Any, why: str | None, via: str) -> Any:
        test = self._test

        async def work() -> Any:
            async with test.db.tx() as conn:
                if await test.db.call_value(conn, "person_of", by) is None:
                    groups = [one[1:] for one in self.approvers if one.startswith("@")]
                    await test.db.call_value(conn, "put_person", by, None, None, groups)
            return await decide(test.db, test.app, self.id, by, what, via, edit=edit, why=why)

        return test._loop.run(work())

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["args"][name]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('name')} is called without {name}") from None


@dataclass(frozen=True)
class Dead:
    """A dead letter."""

    handler: str
    table: str
    key: Any
    reason: str
    error: str
    traceback: str | None = field(repr=False)


class Model:
    """The model that stands in for every other. asked: the prompts it got, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._replies: deque[Any] = deque()

    def reply(self, *answers: Any) -> None:
        """What it answers next, one for each prompt; after that, and without, it echoes."""
        self._replies.extend(answers)

    def answer(self, asking: component.Component, prompt: str) -> Any:
        """The next answer."""
        self.asked.append(prompt)
        return self._replies.popleft() if self._replies else component.echo(asking, prompt)


class TestApp:
    """The app under test. tables, handlers, schedules: as declared. db: its database. model: the stand-in model."""

    __test__ = False                                                   # no test itself, whatever its name

    def __init__(self, app: App, db: Database, loop: Portal) -> None:
        self.app = app
        self.db = db
        self.model = Model()
        self._loop = loop

    @property
    def tables(self) -> dict[str, Table[Any]]:
        """The app's Tables by name."""
        return self.app.tables

    # Http

    def request(self, method: str, path: str, *, sign: str | None = None, **options: Any) -> httpx.Response:
        """Sends a request to the app and returns its response. What a route raises comes through.

        sign: "slack", "github", …: signed as that service does, with the secret that the route declares.
        options: httpx's, such as json=, content=, headers=, params=.
        """
        return self._loop.run(self._request(method, path, sign, options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """POST."""
        return self.request("POST", path, **options)

    def put(self, path: str, **options: Any) -> httpx.Response:
        """PUT."""
        return self.request("PUT", path, **options)

    def patch(self, path: str, **options: Any) -> httpx.Response:
        """PATCH."""
        return self.request("PATCH", path, **options)

    def delete(self, path: str, **options: Any) -> httpx.Response:
        """DELETE."""
        return self.request("DELETE", path, **options)

    async def _request(self, method: str, path: str, sign: str | None, options: dict[str, Any]) -> httpx.Response:
        import httpx
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            request = client.build_request(method, path, **options)
            if sign is not None:
                request.headers.update(await self._signature(sign, method, path, request))
            return await client.send(request)

    async def _signature(self, scheme: str, method: str, path: str, request: httpx.Request) -> dict[str, str]:
        if scheme not in SCHEMES:
            raise BadOption("sign", scheme, f"{method} {path}", ", ".join(SCHEMES))
        signer, declared = SCHEMES[scheme], self._declared(method, path)
        secret = next(iter(Verifier(declared.verify, declared.secrets or None).usable()), None)
        if secret is None:
            raise BadOption("sign", scheme, f"{method} {path}", "a route with a secret= that is set")
        pairs = [signer.pair(_secret_of(one)) for one in declared.secrets if isinstance(one, Env)]
        secret = next((private for private, public in pairs if public == secret), secret)
        stamp = signer.stamp((await self._now()).timestamp())
        return signer.sign(request.content, secret, stamp, url=str(request.url), method=method)

    def _declared(self, method: str, path: str) -> Route | Webhook:
        for route in self.app.routes:
            if (route.method, route.path) == (method, path):
                return route
        for webhook in self.app.webhooks:
            if webhook.path == path:
                return webhook
        known = ", ".join([f"{route.method} {route.path}" for route in self.app.routes]
                          + [f"POST {webhook.path}" for webhook in self.app.webhooks])
        raise BadOption("path", path, f"{method} with sign=", known)

    # Work and time

    def run(self) -> None:
        """Works everything that is ready or due, until there is nothing more, but for what waits for its rate."""
        self._loop.run(self._work())

    def migrate(self) -> None:
        """Brings the database to what was declared since the fixture was made, as in a test that declares Tables."""
        self._loop.run(migrate(self.db, self.app))

    @property
    def now(self) -> datetime:
        """The time of the test's database."""
        return self._loop.run(self._now())

    def advance(self, length: str | float | timedelta) -> None:
        """Works what is due, and moves the clock on: to each due time of a schedule and each retry on the way.

        After 100 of those it goes to the end in one step.
        """
        self._loop.run(self._advance(duration(length, "length", "app.advance")))

    async def _work(self) -> None:
        await Worker(self.db, self.app).run_until_idle()

    async def _now(self) -> datetime:
        async with self.db.conn() as conn:
            now: datetime = await self.db.call_value(conn, "now")
            return now

    async def _advance(self, length: timedelta) -> None:
        await self._work()                                             # first, so that waits begun there end in time
        target = await self._now() + length
        for _ in range(STEPS):
            due = await self._next_due()
            if due is None or due > target:
                break
            await self._set_clock(due)
            await self._work()
        await self._set_clock(target)
        await self._work()

    async def _next_due(self) -> datetime | None:
        """When there is something to do next: a schedule, a retry, a rate, a look whether the world is back."""
        async with self.db.tx() as conn:
            await schedule.fire(self.db, conn)
            schema = quote(self.db.schema)
            due: datetime | None = await conn.fetchval(
                f"select least({schema}.next_tick(), (select min(run_at) from {schema}.delayed), "
                f"(select min(due_at) from {schema}.debounce), "
                f"(select min(probe_at) from {schema}.handler where probe_at > {schema}.now()), "
                f"(select min({schema}.next_rate(r.handler_id)) from {schema}.rates() r "
                f"where exists (select from {schema}.job where handler_id = r.handler_id)))")
            return due

    async def _set_clock(self, at: datetime) -> None:
        async with self.db.conn() as conn:
            await conn.execute(f"update {quote(self.db.schema)}.test_clock set ahead = $1 - clock_timestamp()", at)
        if "anton.web" in sys.modules:
            sys.modules["anton.web"].forget_clocks()

    # What came of it

    @property
    def outbox(self) -> list[Call]:
        """The effects, oldest first: what was captured, or sent."""
        return self._calls("state in ('captured', 'sent')")

    @property
    def approvals(self) -> list[Asked]:
        """The approvals that wait, in the order of their calls."""
        rows = self._fetch("select id, name, state, preview, args, approvers, decided_by, difference "
                           "from {schema}.approval where state = 'pending' order by action_id, id")
        return [Asked(row[0], row[1], row[2], row[3], row[4], tuple(row[5]), row[6], row[7], self) for row in rows]

    @property
    def calls(self) -> list[Call]:
        """All calls of actions, whatever became of them, oldest first."""
        return self._calls("true")

    def _calls(self, where: str) -> list[Call]:
        rows = self._fetch("select name, args, idempotency_key, state, result, at, error from {schema}.action "
                           f"where {where} order by id")
        return [Call(*row) for row in rows]

    @property
    def dead(self) -> list[Dead]:
        """The dead letters, oldest first."""
        rows = self._fetch("select h.name, w.table_name, d.key, d.reason, d.error, d.traceback "
                           "from {schema}.dead d join {schema}.handler h on h.id = d.handler_id "
                           "join {schema}.watched w on w.id = h.table_id order by d.id")
        return [Dead(*row) for row in rows]

    def records(self, table: str) -> list[Any]:
        """All records of a Table by its name, in the order of their keys."""
        return self._loop.run(self._records(self.app.tables[table]))

    async def _records(self, table: Table[Any]) -> list[Any]:
        relation = await describe(self.db, table.name)
        return list(await table.select().order_by(*relation.key))

    def _fetch(self, query: str) -> list[Any]:
        async def fetch() -> list[Any]:
            async with self.db.conn() as conn:
                return await conn.fetch(query.format(schema=quote(self.db.schema)))

        return self._loop.run(fetch())


# Fixtures


@pytest.fixture(scope="session")
def anton_server() -> Iterator[str | None]:
    """The URL of the server that test databases are made on; None: the embedded one of the app's folder."""
    yield os.environ.get("ANTON_TEST_DATABASE")


@pytest.fixture(scope="session")
def anton_templates(anton_server: str | None) -> Iterator[_Templates]:
    """Databases that were migrated once, by the folder of the app."""
    templates = _Templates(anton_server)
    yield templates
    templates.close()


@pytest.fixture
def app(request: pytest.FixtureRequest, anton_templates: _Templates,
        monkeypatch: pytest.MonkeyPatch) -> Iterator[TestApp]:
    """The app under test, see anton.testing."""
    folder = _folder(request.path.parent, request.config.rootpath)
    loaded = load_app(None, folder)
    loop = Portal()
    name = anton_templates.clone(loaded, folder)
    db = Database(anton_templates.url(folder, name), source="the fixture app")
    set_secrets(loaded, monkeypatch.setenv)
    before = effects()
    set_database(db)
    set_effects("offline")
    test = TestApp(loaded, db, loop)
    component.set_stand_in(test.model.answer)
    try:
        with _no_network(urlsplit(db.dsn or "").hostname):
            yield test
    finally:
        component.set_stand_in(None)
        set_effects(before)
        loop.run(db.close())
        db.run(db.close())
        loop.stop()
        set_database(None)
        loaded.clear()
        anton_templates.drop(folder, name)


def set_secrets(app: App, setenv: Callable[[str, str], None]) -> None:
    """Sets every env(…) that a route or Webhook takes as secret= to one that sign= knows."""
    doors: list[Route | Webhook] = [*app.routes, *app.webhooks]
    for declared in doors:
        scheme = Verifier(declared.verify, declared.secrets or None).scheme
        for one in declared.secrets:
            secret = one.value if isinstance(one, VerifyToken) else one
            if isinstance(secret, Env):
                text = _secret_of(secret)
                setenv(secret.name, text if secret is not one or scheme is None else scheme.pair(text)[1])


def _secret_of(secret: Env) -> str:
    """What a secret is made of in tests; long enough for every key."""
    return f"secret-of-{secret.name}".ljust(32, "-")


class _Templates:
    def __init__(self, server: str | None) -> None:
        self._server = server
        self._made: dict[Path, str] = {}
        self._urls: dict[Path, str] = {}
        self._strategy: dict[Path, str] = {}
        self._count = 0

    def url(self, folder: Path, name: str) -> str:
        if folder not in self._urls:
            self._urls[folder] = self._server or embedded.start(folder)
        parts = urlsplit(self._urls[folder])
        return urlunsplit(parts._replace(path=f"/{name}"))

    def clone(self, app: App, folder: Path) -> str:
        if folder not in self._made:
            self._clear_leftovers(folder)
            (synced,), = self._execute(folder, "show fsync")
            self._strategy[folder] = "wal_log" if synced == "on" else "file_copy"  # its checkpoints cost nothing then
            self._made[folder] = self._create(folder)
            db = Database(self.url(folder, self._made[folder]), source="the fixture app")
            db.run(self._migrate(db, app))
        return self._create(folder, self._made[folder])

    def drop(self, folder: Path, name: str) -> None:
        self._execute(folder, f"drop database if exists {quote(name)} with (force)")

    def close(self) -> None:
        for folder, name in self._made.items():
            self.drop(folder, name)

    async def _migrate(self, db: Database, app: App) -> None:
        await migrate(db, app)
        async with db.conn() as conn:
            await conn.execute(
                f"set search_path = {quote(db.schema)}, pg_catalog; "
                "create table test_clock (ahead interval not null); insert into test_clock values ('0'); "
                "grant select on test_clock to public; "
                "create or replace function now() returns timestamptz language sql volatile "
                "set search_path from current as "
                "'select pg_catalog.clock_timestamp() + (select ahead from test_clock)'; reset search_path")
        await db.close()

    def _create(self, folder: Path, template: str = "template1") -> str:
        self._count += 1
        name = f"anton_test_{os.getpid()}_{self._count}"
        self._execute(folder, f"create database {name} template {template} strategy {self._strategy[folder]}")
        return name

    def _clear_leftovers(self, folder: Path) -> None:
        """Databases of test runs that were killed."""
        for (name,) in self._execute(folder, r"select datname from pg_database where datname ~ '^anton_test_\d+_\d+$'"):
            with suppress(PermissionError):
                try:
                    os.kill(int(name.split("_")[2]), 0)
                except ProcessLookupError:
                    self.drop(folder, name)

    def _execute(self, folder: Path, sql: str) -> list[Any]:
        db = Database(self.url(folder, "postgres"), source="the fixture app")

        async def execute() -> list[Any]:
            conn = await db.connect()
            try:
                return list(await conn.fetch(sql))
            finally:
                await conn.close()

        return db.run(execute())


def _folder(start: Path, root: Path) -> Path:
    """The nearest folder with an app, upwards from the test; the test's own when there is none."""
    for folder in (start, *start.parents):
        if (folder / "main.py").is_file() or (folder / "autonomous.json").is_file():
            return folder
        if folder == root:
            break
    return start


_allowed: set[str] | None = None


@contextmanager
def _no_network(database: str | None) -> Iterator[None]:
    """Refuses connections to other machines, but for the database's."""
    global _allowed
    if not _audited:
        sys.addaudithook(_audit)
        _audited.append(True)
    _allowed = {database} if database else set()
    try:
        yield
    finally:
        _allowed = None


_audited: list[bool] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _allowed is None or event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = args[1] if event == "socket.connect" else args
    host = address[0] if isinstance(address, tuple) else ""            # a unix socket's address is a path
    if isinstance(host, str) and not is_loopback(host) and host not in _allowed:
        raise NoNetwork(f'the test tried to reach "{host}". Tests stay on this machine: capture it as an action, '
                        "or stand in for the service with a local server.", host=host)
