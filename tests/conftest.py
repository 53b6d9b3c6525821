"""Fixtures of the whole suite. ANTON_TEST_SERVER=embedded (default) | system picks the server; make test runs both.
--asks-server: only tests that may differ from one server to the other. --beside-system: without what it runs then.

    server     the running server of this session
    template   the name of a database with Anton's runtime in it, migrated once a session
    database   the URL of a database of the test's own, cloned from the template
    bare       the URL of an empty one
    live       the fixture `app` as a live process, whose effects go out; llm: a service of models, see tests/llm.py
    desk       the same with refunds that people approve, see tests/desk.py
    shop       an app in a folder of its own on `database`, see tests/shop.py; fresh: the same on `bare`
    db         anton.db.Database on `database`, also the process's current one; ANTON_TEST_POOLED=1: behind a pooler
    t          tables to be written to, see tests/written.py
    pg         a psycopg session, see tests/pg.py, on a database that is swept clean before each test
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import desk as desks
import pytest
from llm import Llm, serving
from pg import Pg
from servers import NoServer, Server, migrate, running
from shop import Shop
from working import pooled
from written import T

from anton import write
from anton.action import set_effects
from anton.db import Database, set_database
from anton.testing import TestApp
from chaos.dbts import Child

KIND = os.environ.get("ANTON_TEST_SERVER", "embedded")

MAY_BE_SKIPPED = re.compile(  # where CI is set; what else is skipped there is a failure
    "on the system's server only: |this server has (no )?pgvector|this server has max_prepared_transactions > 0|"
    "llama.cpp's server is not built|only root has to run Postgres as somebody else"
)

for _name in [name for name in os.environ if name.startswith("PG") or name == "DATABASE_URL"]:
    del os.environ[_name]  # a developer's own database is no test's business


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--asks-server", action="store_true", help="only tests that ask for the fixture `server`")
    parser.addoption("--beside-system", action="store_true", help="without what is marked once(why, \"system\")")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "system(why): runs with the system's server only")
    config.addinivalue_line("markers", "once(why): no other on another server: --asks-server leaves it out; "
                                       "once(why, 'system'): --beside-system does")


R = TypeVar("R", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _loud((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _loud((yield))


def _loud(report: R) -> R:
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not MAY_BE_SKIPPED.search(why):
            report.outcome, report.longrepr = "failed", f"{report.nodeid} was left out in CI: {why}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    system = {item: mark.args[0] for item in items if (mark := item.get_closest_marker("system"))}
    if KIND != "system":
        for item, why in system.items():
            item.add_marker(pytest.mark.skip(reason=f"on the system's server only: {why}"))
    once = {item: mark.args[1:] for item in items if (mark := item.get_closest_marker("once"))}
    kept = items
    if config.getoption("--asks-server"):
        kept = [item for item in items if item in system or (
            once[item] == ("system",) if item in once else "server" in getattr(item, "fixturenames", ()))]
    elif config.getoption("--beside-system"):
        kept = [item for item in items if once.get(item) != ("system",)]
    left = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = kept


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def nothing_is_left_over() -> Iterator[None]:
    """A test that leaves a worker or a handler's scope behind fails itself, not the tests after it."""
    yield
    left = (write._worker, [scope.kind for scope in write._live])
    write._worker = 0
    write._live.clear()
    assert left == (0, []), "workers and handlers' scopes that the test left open"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    try:
        with running(KIND) as server:
            yield server
    except NoServer as reason:
        pytest.exit(f"no {KIND} server for the tests: {reason}", returncode=3)


@pytest.fixture(scope="session")
def template(server: Server) -> str:
    server.sql("create database anton_template")
    migrate(server.url("anton_template"))
    return "anton_template"


@pytest.fixture
def database(server: Server, template: str) -> Iterator[str]:
    name = server.clone(template)
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def bare(server: Server) -> Iterator[str]:
    name = server.clone("template1")
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def shop(database: str, tmp_path: Path) -> Shop:
    return Shop(database, tmp_path)


@pytest.fixture
def fresh(bare: str, tmp_path: Path) -> Shop:
    return Shop(bare, tmp_path)


@pytest.fixture
def live(app: TestApp, monkeypatch: pytest.MonkeyPatch) -> TestApp:
    """The fixture app as a live process."""
    monkeypatch.delenv("ANTON_EFFECTS", raising=False)
    set_effects("live")
    return app


@pytest.fixture
def desk(live: TestApp) -> TestApp:
    """The app of tests/desk.py."""
    desks.declare(live)
    return live


@pytest.fixture
def llm() -> Iterator[Llm]:
    with serving(Llm()) as llm:
        yield llm


@pytest.fixture(scope="session")
def bouncer(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a pgbouncer in transaction mode before all databases, without the name of one."""
    with pooled(server, "*", tmp_path_factory.mktemp("bouncer"), size=20) as url:
        yield url.removesuffix("*")


@pytest.fixture
def db(database: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    through = bool(os.environ.get("ANTON_TEST_POOLED"))
    url = request.getfixturevalue("bouncer") + Database(database).name if through else database
    db = Database(url, source="the test", pooled=through)
    set_database(db)
    yield db
    set_database(None)
    db.run(db.close())  # the background loop's pool; a test's own loop closes its own


@pytest.fixture(scope="session")
def dbt_child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A process that runs dbt."""
    child = Child(tmp_path_factory.mktemp("dbt") / "log")
    yield child
    child.close()


@pytest.fixture
def t(db: Database) -> T:
    return T(db)


@pytest.fixture(scope="session")
def anton_server(server: Server) -> str:
    """Where anton.testing makes the databases of its fixture `app`."""
    return server.url()


@pytest.fixture(scope="session")
def _shared(server: Server, template: str) -> str:
    return server.url(server.clone(template))


@pytest.fixture
def pg(_shared: str) -> Iterator[Pg]:
    pg = Pg(_shared)
    pg.reset()
    yield pg
    pg.conn.close()
