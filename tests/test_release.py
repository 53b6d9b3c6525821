"""Releases: after `anton migrate` the workers of the release before go on, until they are replaced.

Released workers call the runtime's functions, so each of them keeps the arguments it had, in their order and with
their names, and what it returns. It may get more arguments, when these have defaults. tests/data/released_functions.txt
holds what the last release called; a release writes it anew: ANTON_RELEASE=1 .venv/bin/python -m pytest
tests/test_release.py. Until there was a first release, whoever changes a signature does so, too.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from anton.db import Database

REPO = Path(__file__).resolve().parent.parent
RELEASED = REPO / "tests" / "data" / "released_functions.txt"
ANTON = [sys.executable, "-c", "import sys; from anton.cli import main; sys.exit(main())"]
PATIENCE = 60.0

FUNCTIONS = """
select p.proname::text as name, pg_get_function_result(p.oid) as result,
       array(select concat_ws(' ', p.proargnames[n], format_type(type, null),
                              case when n > p.pronargs - p.pronargdefaults then '= default' end)
               from unnest(p.proargtypes) with ordinality u (type, n) order by n) as arguments
  from pg_proc p where p.pronamespace = 'anton'::regnamespace and p.prokind = 'f' order by 1, 3"""


def called() -> set[str]:
    """The functions that anton/ calls, and those that docs/schema.md tells people to."""
    names = set(re.findall(r"\banton\.([a-z_]+)\(", (REPO / "docs" / "schema.md").read_text()))
    for file in (REPO / "anton").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                names |= {part.value for argument in node.args for part in ast.walk(argument)
                          if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return names


def line(row: Any) -> str:
    return f"{row['name']}({', '.join(row['arguments'])}) -> {row['result']}"


def fits(now: Any, released: str) -> bool:
    """Whether a call of the released function is a call of this one, and gets the same back."""
    name, arguments, result = re.fullmatch(r"(\w+)\((.*?)\) -> (.*)", released).groups()  # type: ignore[union-attr]
    had = arguments.split(", ") if arguments else []
    kept, added = now["arguments"][:len(had)], now["arguments"][len(had):]
    same = all(old in (new, new.removesuffix(" = default")) for old, new in zip(had, kept, strict=False))
    return (now["name"] == name and now["result"] == result and len(kept) == len(had) and same
            and all(one.endswith(" = default") for one in added))


async def test_functions_that_a_released_worker_calls_keep_their_signatures(db: Database) -> None:
    async with db.conn() as conn:
        rows = await conn.fetch(FUNCTIONS)
    if os.environ.get("ANTON_RELEASE"):
        names = called()
        RELEASED.write_text("".join(f"{line(row)}\n" for row in rows if row["name"] in names))
    released = RELEASED.read_text().splitlines()
    assert len(released) > 60
    broken = [text for text in released if not any(fits(row, text) for row in rows)]
    assert not broken, f"released workers call these, and they are gone or changed (see this file): {broken}"


@pytest.mark.parametrize(("arguments", "result", "fit"), [
    (["p_a integer"], "bigint", True),
    (["p_a integer", "p_b text = default"], "bigint", True),
    (["p_a integer = default"], "bigint", True),
    (["p_a integer", "p_b text"], "bigint", False),
    (["p_b integer"], "bigint", False),
    (["p_a bigint"], "bigint", False),
    ([], "bigint", False),
    (["p_a integer"], "integer", False),
])
def test_an_argument_may_only_be_added_with_a_default(arguments: list[str], result: str, fit: bool) -> None:
    now = {"name": "f", "arguments": arguments, "result": result}
    assert fits(now, "f(p_a integer) -> bigint") == fit


# A migrate under a worker of the release before

MAIN = """
import os
from anton import Records, Table

a, b = Table("a"), Table("b")

@a.on_new_records
def copy(records: Records) -> None:
    for record in records:
        b.append({"n": record["n"], "of": os.getppid()})
"""


def next_release(folder: Path) -> Path:
    """A copy of Anton in which the queue's tables have another column and a function of the worker another argument."""
    for name in ("anton", "sql", "migrations"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", folder)
    number = 1 + max(int(path.name[:4]) for path in (folder / "migrations").glob("[0-9]*.sql"))
    (folder / "migrations" / f"{number:04}_add_region.sql").write_text(
        "".join(f"alter table {table} add column region text not null default 'here';\n"
                for table in ("job", "lease", "delayed", "change")))
    file = folder / "sql" / "20_job.sql"
    text, n = re.subn(r"(create or replace function ack\(p_token bigint, [^)]*)\)",
                      r"drop function if exists ack(bigint, bigint[], int, real, int);\n"
                      r"\1, p_region text default 'here')",
                      file.read_text())
    assert n == 1
    file.write_text(text)
    return folder


class Folder:
    """An app in a folder, its database, and `anton` of a release on it."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        path.mkdir()
        (path / "main.py").write_text(MAIN)
        (path / "autonomous.json").write_text('{"name": "t"}')

    def anton(self, home: Path, *words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "DATABASE_URL": self.url, "PYTHONPATH": f"{home}:{REPO / 'components'}"}
        with (self.path / "log").open("ab") as log:
            return subprocess.Popen([*ANTON, *words], cwd=self.path, env=environment, start_new_session=True,
                                    stdout=log, stderr=subprocess.STDOUT)

    def run(self, home: Path, *words: str) -> None:
        assert self.anton(home, *words).wait(PATIENCE) == 0, self.log()

    @contextmanager
    def working(self, home: Path) -> Iterator[subprocess.Popen[bytes]]:
        process = self.anton(home, "work")
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(PATIENCE)

    def value(self, sql: str, *args: Any) -> Any:
        with psycopg.connect(self.url, autocommit=True) as conn:
            return conn.execute(sql, args).fetchone()[0]               # type: ignore[index]

    def until(self, sql: str, *args: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not self.value(sql, *args):
            assert time.monotonic() < end, f"still not: {sql}\n{self.log()}"
            time.sleep(0.02)

    def log(self) -> str:
        return (self.path / "log").read_text()


@contextmanager
def writing(url: str) -> Iterator[list[Exception]]:
    """Somebody inserts all the time; what went wrong."""
    wrong: list[Exception] = []
    enough = threading.Event()

    def write() -> None:
        try:
            with psycopg.connect(url, autocommit=True) as conn:
                while not enough.wait(0.005):
                    conn.execute("insert into a (data) select jsonb_build_object('n', n) from generate_series(1, 20) n")
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield wrong
    finally:
        enough.set()
        thread.join()


def test_a_worker_of_the_release_before_goes_on_through_a_migrate_until_it_is_replaced(database: str,
                                                                                       tmp_path: Path) -> None:
    """The database is migrated by this release, then, under its worker and a writer, by the next one: each record is
    handled once, no write fails, and the same worker process goes on with the functions and tables of the next.
    """
    folder, later = Folder(tmp_path / "app", database), next_release(tmp_path / "next")
    by = "select count(*) from b where (data ->> 'of')::int = %s"
    done = by.replace("count(*)", "count(*) > %s")
    folder.run(REPO, "migrate")
    with ExitStack() as stack:
        old = stack.enter_context(folder.working(REPO))
        with writing(database) as wrong:
            folder.until(done, 100, old.pid)
            folder.run(later, "migrate")
            assert folder.value("select pronargs from pg_proc where oid = 'anton.ack'::regproc") == 6
            folder.until(done, folder.value(by, old.pid) + 100, old.pid)
            new = stack.enter_context(folder.working(later))
            folder.until(done, 100, new.pid)
            old.terminate()
            assert old.wait(PATIENCE) == 0, folder.log()
            folder.until(done, folder.value(by, new.pid) + 100, new.pid)
        folder.until("select not exists (select from anton.job) and not exists (select from anton.lease) "
                     "and not exists (select from anton.delayed)")
    assert not wrong
    assert folder.value("select (select count(*) from a) = (select count(*) from b)"), folder.log()
