"""Sqlfile: the .sql files of migrations/ and sql/, with what their headers say.

    -- anton: no-transaction         one statement that cannot run in a transaction and may be run again

    -- anton: handler                a file of an app's sql/ that is a handler; its name is the file's
    -- on: orders new
    -- where: total > 100
    insert into big_orders (id) select id from new_records

    -- anton: model                  one that is a Table, kept by a SELECT
    -- refresh: orders, @hourly
    -- key: day
    select created_at::date as day, sum(total) as total from orders group by 1

A header is the comment lines a file begins with; their keys are the options of docs/handlers.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anton import due
from anton.duration import duration
from anton.errors import BadOption, DeclarationError, UnknownOption, one_of
from anton.rank import HIGHEST
from anton.rate import normal

OPS = ("new", "updated", "deleted", "truncate", "rebuilt", "failed")
_HANDLER = ("on", "where", "columns", "read", "since", "batch", "max_wait", "timeout", "attempts", "backoff", "max_lag",
            "into", "was", "concurrency", "priority", "debounce", "per", "rate")
_SCHEDULE = ("cron", "tz", "title", "misfire", "overlap", "jitter", "start", "end", "timeout", "attempts", "backoff")
_MODEL = ("refresh", "key", "incremental", "timeout", "max_wait", "tz", "was")
_NUMBERS = ("batch", "attempts", "concurrency")
_DURATIONS = ("max_wait", "timeout", "backoff", "max_lag", "debounce")


@dataclass(frozen=True)
class SqlFile:
    """A file. name: its path inside the app or Anton, "sql/flag_big.sql". kind: what "-- anton:" says, or ""."""

    name: str
    text: str
    kind: str
    header: dict[str, str]

    @property
    def stem(self) -> str:
        """The file's name without folder and ending."""
        return Path(self.name).stem

    @property
    def sha256(self) -> str:
        """Of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def transaction(self) -> bool:
        """False when it must run outside one."""
        return self.kind != "no-transaction"


def read(folder: Path) -> list[SqlFile]:
    """The .sql files of a folder in the order of their names; none when there is no such folder."""
    return [_file(path, f"{folder.name}/{path.name}") for path in sorted(folder.glob("*.sql"))]


def _file(path: Path, name: str) -> SqlFile:
    text = path.read_text(encoding="utf-8")
    header = dict(_header(text))
    kind = header.pop("anton", "")
    known = ("", "no-transaction", "handler", "model", "schedule")
    if kind not in known:
        raise DeclarationError(f'{name}: "-- anton: {kind}" means nothing. Allowed: {one_of(known[1:])}.')
    return SqlFile(name, text, kind, header if kind in ("handler", "model", "schedule") else {})


def _header(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if line.strip() and not line.startswith("--"):
            return
        found = re.fullmatch(r"--\s*([a-z_]+)\s*:\s*(.*?)\s*", line)
        if found:
            yield found[1], found[2]


_PIECE = re.compile(r"""
    --[^\n]* | /\*.*?\*/ | '(?:[^']|'')*' | "(?:[^"]|"")*" | (\$\w*\$).*?\1 | ; | .""", re.VERBOSE | re.DOTALL)


def statements(text: str) -> Iterator[tuple[int, str]]:
    """(line from 0, statement), for messages: BEGIN ATOMIC bodies are cut too early."""
    start = end = 0
    for piece in _PIECE.finditer(text):
        comment = piece[0].startswith(("--", "/*"))
        if start == end and (comment or piece[0].isspace()):
            start = end = piece.end()
        elif piece[0] == ";":
            yield text.count("\n", 0, start), text[start:piece.start()]
            start = end = piece.end()
        else:
            end = piece.end()
    if end > start:
        yield text.count("\n", 0, start), text[start:end]


def handler(file: SqlFile, app: str) -> dict[str, Any]:
    """What put_handler() takes, with "since", for a file of kind handler. Raises UnknownOption, BadOption."""
    of = file.name
    for key in ("ordered", "on_dead"):
        if key in file.header:
            raise BadOption(key, file.header[key], of, "a handler of single records beside it: SQL is given batches. "
                            "Write it in Python with each=True")
    _known(file, _HANDLER)
    on = file.header.get("on", "").split()
    if len(on) < 2:
        raise BadOption("on", file.header.get("on", ""), of, 'a table and what happens to it: "orders new updated"')
    table, ops = on[0], on[1:]
    ops = ["new", "updated", "deleted"] if ops == ["changes"] else ops
    if not set(ops) <= set(OPS):
        raise BadOption("on", file.header["on"], of, f'a table and {one_of((*OPS, "changes"))}')
    found: dict[str, Any] = {"app": app, "name": file.stem, "table": table, "kind": "sql", "ops": ops,
                             "body": file.text, "since": file.header.get("since", "now")}
    for key, value in file.header.items():
        if key == "priority":
            if not re.fullmatch("[0-9]", value):
                raise BadOption(key, value, of, f"a whole number from 0 to {HIGHEST}")
            found[key] = int(value)
        elif key in _NUMBERS:
            if not value.isdigit() or not int(value):
                raise BadOption(key, value, of, "a whole number from 1")
            found[key] = int(value)
        elif key in _DURATIONS:
            found[key] = f"{duration(value, key, of).total_seconds()} s"
        elif key == "columns":
            found[key] = re.split(r"[\s,]+", value)
        elif key == "into":
            found["into_tables"] = re.split(r"[\s,]+", value)
        elif key == "where":
            found["where_sql"] = value
        elif key == "rate":
            found[key] = normal(value, of)
        elif key in ("read", "was", "per"):
            found[key] = value
    for key, allowed in (("read", ("now", "change")), ("since", ("now", "beginning"))):
        if found.get(key) not in (None, *allowed):
            raise BadOption(key, found[key], of, one_of(allowed))
    if "per" in found and "debounce" not in found:
        raise BadOption("per", found["per"], of, "debounce: beside it; a limit or a rate for each key is for functions")
    return found | ({"limit": found["concurrency"]} if "concurrency" in found else {})  # it holds over all processes


def schedule(file: SqlFile, app: str) -> dict[str, Any]:
    """What put_schedule() takes, for a file of kind schedule. Raises UnknownOption, BadOption."""
    _known(file, _SCHEDULE)
    if "cron" not in file.header:
        raise BadOption("cron", "", file.name, 'five cron fields, such as "0 3 * * *"')
    cron, tz = file.header["cron"], file.header.get("tz", "UTC")
    due.zone(tz, file.name)
    text = due.normal(cron, file.name)
    return {"app": app, "name": file.stem, "cron": text, "tz": tz, "title": file.header.get("title", cron),
            "kind": "sql", "body": file.text, **due.rules(file.header, text, tz, file.name)}


@dataclass(frozen=True)
class SqlModel:
    """A file of kind model: a Table kept by its SELECT. name: of the model and its table, the file's.

    tables: it is refreshed when these change; crons: and by the clock, in tz; () for none. key: its columns.
    incremental: (table, column) whose values name the groups that a change touches. body: the SELECT, as written;
    line: of the file that it begins at, from 0. timeout, max_wait: as Postgres reads them. was: its name before, or "".
    """

    file: str
    name: str
    body: str
    line: int
    tables: tuple[str, ...]
    crons: tuple[str, ...]
    key: tuple[str, ...]
    incremental: tuple[tuple[str, str], ...]
    timeout: str
    max_wait: str
    tz: str
    was: str = ""


def model(file: SqlFile) -> SqlModel:
    """What a file of kind model says. Raises UnknownOption, BadOption, DeclarationError."""
    of, header = file.name, file.header
    _known(file, _MODEL)
    parts = list(statements(file.text))
    if len(parts) != 1:
        raise DeclarationError(f"{of}: a model is one SELECT, and this holds {len(parts)} statements. "
                               "Put the others into a file of their own.")
    named: list[str] = []
    crons: list[str] = []
    for word in _words(re.split(r",\s+|,$", header.get("refresh", ""))):
        (crons if word.startswith("@") or len(word.split()) == 5 else named).append(word)
    tables = [name for word in named for name in _words(word.split(","))]
    if not tables and not crons:
        raise BadOption("refresh", header.get("refresh", ""), of, 'tables, times or both: "orders, @hourly"')
    key = _words(header.get("key", "").split(","))
    if not key:
        raise BadOption("key", header.get("key", ""), of, 'the columns that tell its rows apart: "day", "shop, day"')
    groups = [tuple(word.rpartition(".")[::2]) for word in _words(header.get("incremental", "").split(","))]
    for table, column in groups:
        if table not in tables:
            raise BadOption("incremental", f"{table}.{column}".lstrip("."), of,
                            f"a column of a table that refresh: names, such as {(tables or ['orders'])[0]}.customer_id")
    due.zone(header.get("tz", "UTC"), of)
    lengths = {name: f"{duration(header.get(name, default), name, of).total_seconds()} s"
               for name, default in (("timeout", "5m"), ("max_wait", 0))}
    return SqlModel(of, file.stem, parts[0][1].strip(), parts[0][0], tuple(tables), tuple(crons), tuple(key),
                    tuple((table, column) for table, column in groups), lengths["timeout"], lengths["max_wait"],
                    header.get("tz", "UTC"), header.get("was", ""))


def _words(parts: Iterable[str]) -> list[str]:
    return [part.strip() for part in parts if part.strip()]


def _known(file: SqlFile, known: tuple[str, ...]) -> None:
    for key in file.header:
        if key not in known:
            raise UnknownOption(key, file.name, known)
