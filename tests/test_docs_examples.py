"""Every Python and SQL example of the README and docs/ is run here, on a real database, in the order of its page.

A comment before or after a fenced block says what the reader need not see:

    <!-- new -->                      a fresh database and app
    <!-- given: shop -->              the same, with the declarations of GIVEN["shop"]
    <!-- file: sql/flag_big.sql -->   the block is this file of the app
    <!-- before: SQL -->              run first; after: SQL, last
    <!-- then: EXPRESSION -->         holds when everything was worked
    <!-- raises: InvalidRecord -->    the block raises this

After each block what it declared is migrated and what it wrote is worked. `app` is the fixture of anton.testing.
Commands in sh blocks must parse. tests/test_docs.py sees to names, verbs and links.
"""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from servers import Server

from anton import cli, component, config, relation
from anton.action import effects, set_effects
from anton.app import app as declared
from anton.db import Database, Portal, set_database
from anton.migrate import migrate
from anton.query import sql
from anton.table import Table
from anton.testing import TestApp, set_secrets

pytestmark = pytest.mark.once("what the docs show: the server is asked for the same")

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

COMMON = """
from datetime import datetime
from decimal import Decimal
from typing import Literal
from pydantic import BaseModel
from anton import Ctx, Discard, Records, Request, Retry, Table, Webhook, cron, env, post, sql
"""
GIVEN = {
    "shop": COMMON + """
class Order(BaseModel):
    id: int
    customer: str
    total: Decimal
    status: Literal["new", "paid"] = "new"

class Invoice(BaseModel):
    order_id: int
    at: datetime

class BigOrder(BaseModel):
    id: int

class Payments:
    sent = []

    async def post(self, path, **request):
        self.sent.append(request["headers"]["Idempotency-Key"])

class Printer:
    ready = True

orders = Table("orders", Order)
invoices = Table("invoices", Invoice, key="order_id")
big_orders = Table("big_orders", BigOrder)
letters, sums, events = Table("letters"), Table("sums"), Table("events")
payments, printer = Payments(), Printer()
""",
    "sqlshop": COMMON + """
class Order(BaseModel):
    customer: str
    total: Decimal

orders, letters = Table("orders", Order), Table("letters")
""",
    "files": COMMON + """
from anton.app import app as declared_on

(declared_on.folder / "autonomous.json").write_text(
    '{"name": "docs", "storages": [{"name": "s3-fs", "type": "files", "url": "file://data"}]}')
orders, letters = Table("orders"), Table("letters")
""",
    "bot": COMMON + """
prompts, completions, letters = Table("prompts"), Table("completions"), Table("letters")

@post("/mentions")
def mention(request: Request) -> int:
    letters.append({"text": "You said: " + request.json()["text"]})
    return 200

@cron.daily
def clear():
    letters.select().delete()
""",
}


@dataclass
class Block:
    """A fenced block and the comments around it. line: of its first line of code."""

    language: str
    code: str
    line: int
    file: str = ""
    before: str = ""
    raises: str = ""
    fresh: str | None = None
    then: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks in order. A comment belongs to the next, but `then` and `after` to the one before."""
    found: list[Block] = []
    waiting: dict[str, str] = {}
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        comment = re.fullmatch(r"\s*<!-- (new|given|file|before|after|then|raises)(?:: (.*))? -->", line)
        if comment and comment[1] in ("then", "after"):
            getattr(found[-1], comment[1]).append(comment[2])
        elif comment:
            waiting[comment[1]] = comment[2] or ""
        elif line.startswith("```"):
            code = []
            for _, inner in lines:
                if inner.startswith("```"):
                    break
                code.append(inner)
            fresh = waiting.pop("new", waiting.pop("given", None))
            found.append(Block(line.strip("` "), "\n".join(code) + "\n", number + 1, fresh=fresh, **waiting))
            waiting = {}
    assert not waiting, f"{page.name}: {waiting} belongs to no block"
    return found


class Session:
    """One database and what a reader of the page has declared so far."""

    def __init__(self, page: Path, folder: Path, server: Server, url: str, name: str,
                 setenv: Callable[[str, str], None]) -> None:
        self.setenv = setenv
        self.page, self.folder, self.server, self.url = page, folder, server, url
        self.names: dict[str, Any] = {"__name__": "main"}
        self.db = Database(url, source="the docs")
        set_database(self.db)
        declared.clear()
        declared.name, declared.folder = name, folder
        self.loop = Portal()
        self.app = TestApp(declared, self.db, self.loop)
        component.set_stand_in(self.app.model.answer)
        self.dead = 0

    def python(self, block: Block, place: str) -> None:
        """Runs the code as a module would, with top-level await; calls the tests it defines."""
        source = "\n" * (block.line - 1) + block.code
        code = compile(source, place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        known = set(self.names)
        self.names.setdefault("app", self.app)
        result = eval(code, self.names)
        if result is not None:
            asyncio.run(result)
        for name in set(self.names) - known:
            if name.startswith("test_"):
                self.migrate()
                self.names[name](self.app)

    def psql(self, text: str) -> None:
        words = [self.server.bin / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", self.url]
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        relation.forget(self.db)

    def migrate(self) -> None:
        self.loop.run(migrate(self.db, declared))

    def settle(self, block: Block) -> None:
        """Migrates, works, and sees that nothing failed that should not."""
        self.migrate()
        set_secrets(declared, self.setenv)
        self.app.run()
        dead = self.app.dead
        assert len(dead) == self.dead or any("app.dead" in then for then in block.then), dead
        self.dead = len(dead)
        late = self.app._fetch("select error from {schema}.delayed where error is not null union all "
                               "select failing_error from {schema}.handler where failing_since is not null")
        assert not late, late

    def close(self) -> None:
        component.set_stand_in(None)
        self.loop.run(self.db.close())
        self.db.run(self.db.close())
        self.loop.stop()
        set_database(None)
        declared.clear()


@pytest.fixture
def open_session(server: Server, template: str, tmp_path: Path,
                 monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Session]]:
    """Makes sessions; each ends when the next is made."""
    current: list[tuple[Session, str]] = []

    def end() -> None:
        for session, name in current:
            session.close()
            server.drop(name)
        current.clear()

    def start(page: Path) -> Session:
        end()
        name = server.clone(template)
        with_clock(server, name)
        folder = tmp_path / name
        folder.mkdir()
        session = Session(page, folder, server, server.url(name), page.stem.lower(), monkeypatch.setenv)
        current.append((session, name))
        return current[0][0]

    before = effects()
    set_effects("offline")
    yield start
    end()
    set_effects(before)


def with_clock(server: Server, name: str) -> None:
    """Lets app.advance() move the time of this database, as the fixture `app` does, from one in the morning on."""
    server.sql("create table anton.test_clock (ahead interval not null)", "insert into anton.test_clock "
               "select date_trunc('day', clock_timestamp(), 'UTC') + interval '25 hours' - clock_timestamp()",
               "grant select on anton.test_clock to public",
               "create or replace function anton.now() returns timestamptz language sql volatile as "
               "'select pg_catalog.clock_timestamp() + (select ahead from anton.test_clock)'", database=name)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Names the example that failed."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the example at {place}")
        raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_and_do_what_it_says(page: Path, open_session: Callable[[Path], Session]) -> None:
    session = None
    for block in blocks(page):
        if block.language not in ("python", "sql") and not (block.language == "yaml" and block.file):
            continue
        place = f"{page.relative_to(ROOT)}:{block.line}"
        with at(place):
            if session is None or block.fresh is not None:
                session = open_session(page)
                if block.fresh:
                    eval(compile(GIVEN[block.fresh], "GIVEN", "exec", dont_inherit=True), session.names)
                    session.migrate()
            run(session, block, str(page))


def run(session: Session, block: Block, place: str) -> None:
    if block.before:
        session.psql(block.before)
    if block.file and block.language in ("sql", "yaml"):
        path = session.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code)
    elif block.language == "sql":
        session.psql(block.code)
    elif block.raises:
        with pytest.raises(Exception) as raised:
            session.python(block, place)
        assert raised.type.__name__ == block.raises
    else:
        session.python(block, place)
    session.settle(block)
    for expression in block.then:
        assert eval(expression, session.names, {"app": session.app, "sql": sql}), expression
    for text in block.after:
        session.psql(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_commands(page: Path) -> None:
    for block in blocks(page):
        for line in block.code.splitlines() if block.language == "sh" else ():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for command in split_commands(words):
                if command[:1] == ["anton"]:
                    cli.parse(command[1:])
                elif command[:1] == ["make"]:
                    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


def split_commands(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", "|", ";"):
            yield command
            command = []
        else:
            command.append(word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_settings_of_a_page_are_settings(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            (tmp_path / (block.file or config.FILE)).write_text(block.code)
            config.load(tmp_path)


def test_every_page_is_linked_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in PAGES[1:] if f"({page.name})" not in index and page.name != "index.md"] == []


# --- the table of docs/what-a-handler-sees.md

INSERT, SET_20 = "insert into orders values (1, 10, 'a')", "update orders set total = 20 where id = 1"
SET_30, DELETE = "update orders set total = 30 where id = 1", "delete from orders where id = 1"
AGAIN = "insert into orders values (1, 40, 'b')"
NEW, UPDATED, DELETED = "new", "updated", "deleted"
Seen = list[tuple[str, int | None, int | None]]                        # event, old total, new total

# (event, what happened since): what was there before, the statements, what read="now" and read="change" get.
# "now" gives the row of now as the new one, except of deleted records.
SEEN: dict[tuple[str, str], tuple[list[str], list[str], Seen, Seen]] = {
    ("new", "nothing"): ([], [INSERT], [(NEW, None, 10)], [(NEW, None, 10)]),
    ("new", "it was updated"): ([], [INSERT, SET_20], [(NEW, None, 20)], [(NEW, None, 10)]),
    ("new", "it was deleted"): ([], [INSERT, DELETE], [], [(NEW, None, 10)]),
    ("new", "it was deleted, and inserted again with the same key"):
        ([], [INSERT, DELETE, AGAIN], [(NEW, None, 40)], [(NEW, None, 10), (NEW, None, 40)]),
    ("updated", "nothing"): ([INSERT], [SET_20], [(UPDATED, None, 20)], [(UPDATED, 10, 20)]),
    ("updated", "it was updated again"):
        ([INSERT], [SET_20, SET_30], [(UPDATED, None, 30)], [(UPDATED, 10, 20), (UPDATED, 20, 30)]),
    ("updated", "it was deleted"): ([INSERT], [SET_20, DELETE], [], [(UPDATED, 10, 20)]),
    ("updated, no watched column changed", ""): ([INSERT], ["update orders set note = 'c'"], [], []),
    ("updated, `where` does not hold for the new row", ""): ([INSERT], ["update orders set total = -1"], [], []),
    ("key changed", ""): ([INSERT], ["update orders set id = 2"], [(DELETED, 10, None), (NEW, None, 10)],
                          [(DELETED, 10, None), (NEW, None, 10)]),
    ("deleted", "nothing"): ([INSERT], [DELETE], [(DELETED, 10, None)], [(DELETED, 10, None)]),
    ("deleted", "it was inserted again"): ([INSERT], [DELETE, AGAIN], [(DELETED, 10, None)], [(DELETED, 10, None)]),
    ("truncated", ""): ([INSERT], ["truncate orders"], [("truncate", None, None)], [("truncate", None, None)]),
    ("any of these, rolled back", ""): ([], ["begin; " + INSERT + "; rollback"], [], []),
}


def sees_rows() -> list[tuple[str, str]]:
    lines = (ROOT / "docs" / "what-a-handler-sees.md").read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("| event | what happened"))
    rows = []
    for line in lines[first + 2:]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("|").split("|"))[:2])
    return rows


def test_every_row_of_the_table_is_tried() -> None:
    assert sees_rows() == list(SEEN)


@pytest.mark.parametrize("row", SEEN, ids=" ".join)
def test_a_handler_sees_what_the_table_says(row: tuple[str, str], open_session: Callable[[Path], Session]) -> None:
    before, statements, now, image = SEEN[row]
    session = open_session(ROOT / "docs" / "what-a-handler-sees.md")
    table = "create table orders (id bigint primary key, total int not null, note text)"
    session.psql(";\n".join([table, "create table by_sql (total int)", *before]))
    orders = Table("orders")
    seen: dict[str, Seen] = {"now": [], "change": []}
    event = row[0].partition(",")[0].split()[0]
    kind = {"new": orders.on_new_records, "updated": orders.on_updated_records, "deleted": orders.on_deleted_records,
            "truncated": orders.on_truncate}.get(event, orders.on_changes)

    def listen(read: Any) -> None:
        options = {} if event == "truncated" else {"where": "total > 0", "columns": ["id", "total"]}

        def handler(records: Any) -> None:
            for change in records.changes:
                seen[read].append((change.op, change.old and change.old["total"], change.new and change.new["total"]))

        kind(name=f"read_{read}", read=read, **options)(handler)

    listen("now")
    listen("change")
    if event == "new":
        orders.on_new_records.sql("insert into by_sql select total from new_records", name="read_sql")
    session.migrate()
    for statement in statements:
        session.psql(statement)
    session.app.run()
    assert seen == {"now": now, "change": image}
    assert not session.app.dead
    if event == "new":
        assert sorted(total for total, in session.app._fetch("table by_sql")) == [total for _, _, total in image]
    receipts = session.app._fetch("select sum(r.n - r.gone) from {schema}.receipt r join {schema}.handler h "
                                  "on h.id = r.handler_id where h.name = 'read_change'")
    assert (receipts[0][0] or 0) == len(image)


# --- the tables and functions of docs/schema.md


def test_the_tables_of_the_schema_are_those_of_its_page(server: Server, template: str) -> None:
    page = (ROOT / "docs" / "schema.md").read_text()
    part = page[page.index("## The tables"):page.index("## Looking")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    there = server.sql("select c.relname from pg_class c where c.relnamespace = 'anton'::regnamespace and c.relkind in "
                       "('r', 'p') and not c.relispartition", database=template)
    assert named == {name for name, in there}


def test_the_functions_of_the_schema_page_exist(server: Server, template: str) -> None:
    page = (ROOT / "docs" / "schema.md").read_text()
    named = [(name, len([arg for arg in args.split(",") if arg.strip()]))
             for row in re.findall(r"^\| (`\w+\(.*?) \|", page, re.MULTILINE)
             for name, args in re.findall(r"`(\w+)\(([^)]*)\)`", row)]
    assert len(named) > 25
    for name, count in named:
        found = server.sql(f"select 1 from pg_proc where pronamespace = 'anton'::regnamespace and proname = '{name}' "
                           f"and {count} between pronargs - pronargdefaults and pronargs", database=template)
        assert found, f"docs/schema.md says {name}() with {count} arguments"
