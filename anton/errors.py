"""Errors: every exception that Anton raises on purpose.

    AntonError
      DeclarationError      what the code says cannot be: found when it is declared, or by migrate
        UnknownOption BadOption DuplicateName BadSignature NearName SqlRefused
      ConfigError           autonomous.json, a flag or an environment variable
      DatabaseError
        DatabaseUnreachable DatabaseTooOld MissingPrivilege NotMigrated EmbeddedError
      MigrationError
        MigrationFailed FrozenChanged Destructive ModelMismatch KeyNeeded LockNotGained
      GateFailed            a test that gates a dbt model
      UnknownTable UnknownHandler UnknownNode
      WriteError            a write that was not, or could not be, made
        InvalidRecord WriteRefused RowChanged NoScope ScopeClosed ValueWithoutInto
      QueryError SyncInLoop LeaseLost HandlerTimeout WorldError PollFailed DbtFailed BudgetReached ModelRefused
      CapReached CallRefused DecisionRefused
    Outcome                 what a handler raises to settle its record; not errors
      Retry Discard

Every message names the thing, the value, what is allowed and what to do; the same facts are
attributes. SQL functions raise SQLSTATEs of class NT (free for us: classes I-Z are not the
standard's), which `from_sqlstate` turns into the class that carries that `sqlstate`.
"""

from __future__ import annotations

import copyreg
import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar


def near(name: str, known: Iterable[str], letters: int | None = None) -> str | None:
    """The known name most like `name`, or None.

    letters: at most so many letters may differ (inserted, dropped, changed or two neighbours swapped);
    None: what difflib finds similar.
    """
    known = [other for other in known if other != name]
    if letters is None:
        found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        return found[0] if found else None
    close = [(distance(name, other), other) for other in known if abs(len(other) - len(name)) <= letters]
    return min((pair for pair in close if pair[0] <= letters), default=(0, None))[1]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' when a known name is like `name`, else ''."""
    found = near(name, known)
    return f' Did you mean "{found}"?' if found else ""


def distance(a: str, b: str) -> int:
    """How many letters to insert, drop, change or swap with their neighbour, to turn a into b."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, last[j - 2] + 1)
            row.append(best)
    return row[-1]


def one_of(values: Collection[str]) -> str:
    """'"a", "b" or "c"'."""
    quoted = [f'"{value}"' for value in values]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}" if quoted else "nothing"


class AntonError(Exception):
    """Base of everything that Anton raises on purpose. message: one or more plain sentences; fields: the same facts."""

    sqlstate: ClassVar[str | None] = None

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        for name, value in fields.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class DeclarationError(AntonError):
    """What the code declares cannot be. Raised at declaration, or by migrate."""


_ELSEWHERE = {"approve": " A person is asked before something leaves: say approve= of the @action, of one .send(), "
                         "or of the component that acts on what this makes, such as SlackPostMessage."}


class UnknownOption(DeclarationError):
    """A keyword that does not exist. option, of, allowed."""

    def __init__(self, option: str, of: str, allowed: Collection[str]) -> None:
        hint = _ELSEWHERE.get(option) or did_you_mean(option, allowed)
        super().__init__(f'unknown option "{option}" of {of}.{hint} It takes: {", ".join(sorted(allowed))}.',
                         option=option, of=of, allowed=tuple(allowed))


class BadOption(DeclarationError):
    """An option with a value it cannot have. option, value, of, allowed (a sentence)."""

    sqlstate = "NT004"
    option: str
    value: Any

    def __init__(self, option: str, value: Any = None, of: str = "", allowed: str = "") -> None:
        where = f" of {of}" if of else ""
        super().__init__(f"{option}={value!r}{where} is not possible. Allowed: {allowed}.",
                         option=option, value=value, of=of, allowed=allowed)


class DuplicateName(DeclarationError):
    """One name declared twice. kind, name, first, second (places as file:line)."""

    def __init__(self, kind: str, name: str, first: str, second: str) -> None:
        super().__init__(f'{kind} "{name}" is declared twice: {first} and {second}. Rename one of them.',
                         kind=kind, name=name, first=first, second=second)


class BadSignature(DeclarationError):
    """A function that cannot be called as it is declared. name, found, allowed, place."""

    def __init__(self, name: str, found: str, allowed: str, place: str = "") -> None:
        at = f" ({place})" if place else ""
        super().__init__(f'"{name}"{at} takes {found}. Allowed: {allowed}.',
                         name=name, found=found, allowed=allowed, place=place)


class NearName(DeclarationError):
    """A new Table without a model that is almost one that exists: most likely a slip. table, near, place."""

    def __init__(self, table: str, near: str, place: str = "") -> None:
        at = f" ({place})" if place else ""
        super().__init__(f'table "{table}"{at} does not exist, and "{near}" does. Did you mean "{near}"? '
                         "If it is to be another table, give it a model, or create it in a migration.",
                         table=table, near=near, place=place)


class SqlRefused(DeclarationError):
    """SQL of a handler, schedule or model that Postgres would refuse. file, line, column, token, near, reason.

    line and column count from 1; None when Postgres does not say. file: "sql/flag_big.sql", or
    "main.py:12" of SQL in Python, whose lines count from the SQL's first.
    """

    line: int | None
    column: int | None
    near: str | None

    def __init__(self, file: str, name: str, token: str, reason: str, text: str = "", start: int | None = None,
                 known: Sequence[str] = (), hint: str = "") -> None:
        line = text.count("\n", 0, start) + 1 if start is not None else None
        column = start - (text.rfind("\n", 0, start) + 1) + 1 if start is not None else None
        at = f", line {line}, column {column}" if line else ""
        of = f' (handler "{name}")' if name and not file.endswith(f"{name}.sql") else ""
        help = did_you_mean(token, known) or (f" {hint.rstrip('.')}." if hint else "")
        if not help and 0 < len(known) <= 20:
            help = f" There: {', '.join(known)}."
        shown = f"\n  {text.splitlines()[line - 1]}\n  {' ' * ((column or 1) - 1)}^" if line else ""
        super().__init__(f"{file}{at}{of}: {reason}.{help}{shown}\nMend it and run again: anton migrate", file=file,
                         line=line, column=column, token=token, near=near(token, known), reason=reason)


class ConfigError(AntonError):
    """A setting that is wrong. Say which, its value, where it came from, what is allowed."""


class DatabaseError(AntonError):
    """The database cannot be used as it is."""

    sqlstate = "NT000"                                                 # raised in SQL without a class of its own


class WorldError(AntonError):
    """Something outside is down. The handler waits and resumes; no record is blamed. Raise it for your own services.

    after: how long it waits at least, a timedelta; None: as long as it sees fit.
    """

    after: timedelta | None = None


class BudgetReached(WorldError):
    """What was agreed is spent: the handler waits for the next period, or a larger budget. reason."""

    def __init__(self, reason: str, after: timedelta | None = None) -> None:
        super().__init__(f"{reason}. It waits; raise budget= to go on now, then: anton handlers resume NAME. What was "
                         "paid: anton costs list", reason=reason, after=after)


class CapReached(WorldError):
    """An action's cap is used up: its calls wait for the next period, or a larger cap=. reason."""

    def __init__(self, reason: str, after: timedelta | None = None) -> None:
        super().__init__(f"{reason}. Its calls wait; raise cap= to go on now", reason=reason, after=after)


class CallRefused(AntonError):
    """What may not become of a call of an action, whoever asks."""

    sqlstate = "NT008"


class DecisionRefused(AntonError):
    """Who may not decide an approval, or not so."""

    sqlstate = "NT009"


class ModelRefused(AntonError):
    """A service of models refuses a question. service, model, reason."""

    def __init__(self, service: str, model: str, reason: str) -> None:
        super().__init__(f"{service} refuses what {model} was asked: {reason}", service=service, model=model,
                         reason=reason)


class StorageError(WorldError):
    """A storage cannot be reached, or refuses. storage, url, verb, path, reason."""

    def __init__(self, storage: str, url: str, verb: str, path: str, reason: str) -> None:
        at = f' "{path}"' if path else ""
        super().__init__(f'storage "{storage}" ({url}): cannot {verb}{at}: {reason}. See to its url and options in '
                         "autonomous.json, and its rights.", storage=storage, url=url, verb=verb, path=path,
                         reason=reason)


class FileGone(AntonError):
    """A file that is not there. storage, path."""

    def __init__(self, storage: str, path: str) -> None:
        super().__init__(f'no file "{path}" in storage "{storage}": it is gone, or never was.',
                         storage=storage, path=path)


class FileChanged(AntonError):
    """A file is not the version that was meant any more. storage, path."""

    def __init__(self, storage: str, path: str) -> None:
        super().__init__(f'file "{path}" in storage "{storage}" was replaced meanwhile; the next scan sees the new '
                         "one.", storage=storage, path=path)


class LoadFailed(AntonError):
    """A file that does not load into a Table. What is in stays, and is not loaded again. path, table, reason."""

    reason: str

    def __init__(self, path: str, table: str, reason: str) -> None:
        super().__init__(f'"{path}" cannot be loaded into table "{table}": {reason}', path=path, table=table,
                         reason=reason)


class DbtFailed(AntonError):
    """dbt cannot read a project, or cannot be run. What a single model fails of is its on_failed. project."""


class DatabaseUnreachable(DatabaseError, WorldError):
    """No connection. host, port, database, source (where the URL came from), reason."""

    def __init__(self, host: str, port: int | str, database: str, source: str, reason: object) -> None:
        super().__init__(f'cannot reach database "{database}" on {host}:{port} (from {source}): {reason}. '
                         "Start it, or name another with --database.",
                         host=host, port=port, database=database, source=source, reason=str(reason))


class DatabaseTooOld(DatabaseError):
    """Postgres before 15. found: its version as text."""

    def __init__(self, found: str, needed: str = "15") -> None:
        super().__init__(f"Postgres {found} is too old. Anton needs Postgres {needed} or newer. Upgrade it, "
                         "or name another database with --database.", found=found, needed=needed)


class MissingPrivilege(DatabaseError):
    """A right the role does not have. sql: what someone who has it must run."""

    sql: tuple[str, ...]

    def __init__(self, what: str, role: str, sql: Sequence[str]) -> None:
        super().__init__(f'role "{role}" may not {what}. Let someone who may run:\n' + "\n".join(sql),
                         what=what, role=role, sql=tuple(sql))


class NotMigrated(DatabaseError):
    """The runtime's schema is not there, or of another release. schema, database."""

    def __init__(self, schema: str, database: str) -> None:
        super().__init__(f'database "{database}" has no runtime in schema "{schema}". Run: anton migrate',
                         schema=schema, database=database)


class EmbeddedError(DatabaseError):
    """The Postgres that comes with Anton is not installed or does not start."""


class MigrationError(AntonError):
    """Migrate stopped. What it did before is done; run it again after the fix."""


class MigrationFailed(MigrationError):
    """A statement of a file failed. file, line, sql, reason."""

    file: str
    line: int

    def __init__(self, file: str, line: int, sql: str, reason: object) -> None:
        super().__init__(f"{file}, line {line}: {reason}\n  {sql}\nNothing of this file was kept. "
                         "Mend it and run again: anton migrate", file=file, line=line, sql=sql, reason=str(reason))


class FrozenChanged(MigrationError):
    """A migration that was run is not what it was. file."""

    file: str

    def __init__(self, file: str) -> None:
        super().__init__(f"{file} was changed after it had been run. Put it back as it was, and write the change as "
                         "a new migration: anton makemigration NAME", file=file)


class Destructive(MigrationError):
    """A declared difference would lose data. table, differences, sql: the statements it would take."""

    differences: tuple[str, ...]
    sql: tuple[str, ...]

    def __init__(self, table: str, differences: Sequence[str], sql: Sequence[str]) -> None:
        super().__init__(f'table "{table}" differs from its model in a way that may lose data: '
                         f"{'; '.join(differences)}. It would take:\n" + "\n".join(sql) +
                         "\nWrite that down, look at it, and migrate: anton makemigration NAME",
                         table=table, differences=tuple(differences), sql=tuple(sql))


class ModelMismatch(MigrationError):
    """An adopted table does not fit the model given with it. table, differences (each names both sides)."""

    def __init__(self, table: str, differences: Sequence[str], place: str = "") -> None:
        at = f" ({place})" if place else ""
        super().__init__(f'table "{table}" existed before Anton and does not fit its model{at}:\n  ' +
                         "\n  ".join(differences) + "\nAnton alters only tables it made: change the model, or the "
                         "table in a migration.", table=table, differences=tuple(differences), place=place)


class KeyNeeded(MigrationError):
    """updated/deleted need a key the table does not have. table, handler, sql: the ALTER that would allow them."""

    sqlstate = "NT005"

    def __init__(self, table: str, handler: str = "", sql: str = "") -> None:
        super().__init__(f'table "{table}" has no primary key and no unique index over NOT NULL columns, so '
                         f'"{handler}" cannot know which record was updated or deleted. Give it one:\n{sql}',
                         table=table, handler=handler, sql=sql)


class Miswired(MigrationError):
    """A component and a table that do not fit: a field, its type, what it means. handler, component, place, why."""

    def __init__(self, handler: str, component: str, place: str, why: str) -> None:
        super().__init__(f'handler "{handler}" ({component}, {place}): {why}',
                         handler=handler, component=component, place=place, why=why)


class GateFailed(AntonError):
    """A test that gates a dbt model failed on what was built: nothing was published, the table is as it was."""

    sqlstate = "NT006"


class NoVectors(MigrationError):
    """A column of pgvector's on a server that does not have it. table, place, column."""

    def __init__(self, table: str, place: str, column: str) -> None:
        super().__init__(f'table "{table}" ({place}): "{column}" is a Vector, and this server has no pgvector. Install '
                         "it there (Debian: postgresql-NN-pgvector), or leave Vector out: list[float] is an array, "
                         "which <=> does not know", table=table, place=place, column=column)


class LockNotGained(MigrationError):
    """Others held the table all the time. sql, seconds."""

    def __init__(self, sql: str, seconds: float, holders: str = "") -> None:
        by = f" (held by {holders})" if holders else ""
        super().__init__(f"no lock in {seconds:.0f} s{by} for: {sql}\nNobody was kept waiting for more than 200 ms. "
                         "End the long transaction, or run again later: anton migrate",
                         sql=sql, seconds=seconds, holders=holders)


class UnknownTable(AntonError):
    """A table that is not there. table, near."""

    sqlstate = "NT002"

    def __init__(self, table: str, known: Iterable[str] = (), database: str = "") -> None:
        inside = f' in database "{database}"' if database else ""
        known = tuple(known)
        super().__init__(f'no table "{table}"{inside}.{did_you_mean(table, known)} Declare it: Table("{table}"), '
                         "or create it in a migration; then run: anton migrate", table=table, near=near(table, known))


class UnknownHandler(AntonError):
    """A handler that is not there. handler, near."""

    sqlstate = "NT003"

    def __init__(self, handler: str, known: Iterable[str] = ()) -> None:
        known = tuple(known)
        super().__init__(f'no handler "{handler}".{did_you_mean(handler, known)} '
                         "anton handlers list shows all of them.", handler=handler, near=near(handler, known))


class UnknownNode(AntonError):
    """A name that is not in the graph. name, near."""

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        known = tuple(dict.fromkeys(known))
        super().__init__(f'nothing is called "{name}" in the graph.{did_you_mean(name, known)} anton graph shows all '
                         "there is.", name=name, near=near(name, known))


class WriteError(AntonError):
    """A write that was not, or could not be, made."""


class InvalidRecord(WriteError):
    """A record that does not fit its Table; raised at append, nothing else is lost. table, value, reasons."""

    reasons: tuple[str, ...]

    def __init__(self, table: str, value: Any, reasons: Sequence[str]) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        super().__init__(f'invalid record for table "{table}": {"; ".join(reasons)}. It was: {shown}',
                         table=table, value=value, reasons=tuple(reasons))


class WriteRefused(WriteError):
    """The database refused recorded writes (constraint, type). owners: their input records, 0-based; None: unknown."""

    owners: set[int] | None
    error: BaseException

    def __init__(self, owners: set[int] | None, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}", owners=owners, error=error)


class RowChanged(WriteError):
    """A row read by the handler changed before its update or delete. owners: their input records, 0-based."""

    owners: set[int]

    def __init__(self, owners: set[int], table: str = "") -> None:
        super().__init__(f'a row of "{table}" changed after it was read; its record runs again. '
                         'on_conflict="overwrite" writes regardless.', owners=owners, table=table)


class NoScope(WriteError):
    """A write with nothing around it that could commit it."""


class ScopeClosed(WriteError):
    """A write after the handler, route or transaction around it had ended."""


class ValueWithoutInto(WriteError):
    """A handler returned a value and has no into=. handler, value."""

    def __init__(self, handler: str, value: Any) -> None:
        super().__init__(f'handler "{handler}" returned {type(value).__name__} and has no into=. '
                         "Say into=TABLE where the handler is declared, or return nothing.",
                         handler=handler, value=value)


class ModelFailed(WorldError):
    """A model's SELECT gives what its table cannot hold: a key that is null or comes twice. The old rows stay."""

    sqlstate = "NT007"


class ReadOnly(WriteError):
    """A write to a Table that something else keeps. table, keeper: "the model sql/daily.sql"."""

    def __init__(self, table: str, keeper: str) -> None:
        super().__init__(f'table "{table}" is kept by {keeper}, which would undo this write. '
                         "Write to the tables it reads.", table=table, keeper=keeper)


class PollFailed(WorldError):
    """A poll's function raised, or returned what is no rows. It waits and goes on from the same cursor. poll, after."""

    def __init__(self, poll: str, reason: str, after: timedelta | None = None) -> None:
        super().__init__(reason, poll=poll, after=after)


class QueryError(AntonError):
    """A read that cannot be: a name or a value that does not fit, or SQL that Postgres refuses. sql: the text.

    told: what whoever sent the value may be told of it; "" where it is the code's doing.
    """

    told: str = ""


class SyncInLoop(AntonError):
    """A sync read inside a running event loop. name, twin."""

    def __init__(self, name: str, twin: str) -> None:
        super().__init__(f"{name} would block the running event loop. Write: {twin}", name=name, twin=twin)


class LeaseLost(AntonError):
    """The lease ended and another worker has the jobs, or they were cancelled. Nothing of this run is kept."""

    sqlstate = "NT001"

    def __init__(self, message: str = "the lease was lost; nothing of this run was kept", **fields: Any) -> None:
        super().__init__(message, **fields)


class HandlerTimeout(AntonError):
    """A handler ran longer than its timeout=. handler, seconds."""

    def __init__(self, handler: str, seconds: float) -> None:
        super().__init__(f'handler "{handler}" ran longer than its timeout of {seconds:g} s. '
                         "Raise timeout=, lower batch=, or make it faster.", handler=handler, seconds=seconds)


class Outcome(Exception):
    """What a handler raises to settle the record at hand. Not an error. item: its position in the batch; -1: none."""

    at: ClassVar[Callable[[], int]] = staticmethod(lambda: -1)  # which record is at hand: write.py knows

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.item = Outcome.at()


class Retry(Outcome):
    """Run this record again later: raise Retry(after="5m"). after: "5m", seconds or timedelta; None: the backoff."""

    def __init__(self, why: str = "", *, after: str | float | timedelta | None = None) -> None:
        super().__init__(why or "retry")
        self.why = why
        self.after = after


class Discard(Outcome):
    """Give this record up: raise Discard("already billed"). It becomes a dead letter that can be replayed."""

    def __init__(self, why: str = "") -> None:
        super().__init__(why or "discarded")
        self.why = why


class Later(Outcome):
    """Not now, but after a while; nothing counts against the record. Of the runtime's own handlers."""

    def __init__(self, after: timedelta) -> None:
        super().__init__("later")
        self.after = after


def _classes(base: type[AntonError]) -> Iterable[type[AntonError]]:
    yield base
    for sub in base.__subclasses__():
        yield from _classes(sub)


SQLSTATES: dict[str, type[AntonError]] = {
    cls.sqlstate: cls for cls in _classes(AntonError) if "sqlstate" in cls.__dict__ and cls.sqlstate}


def from_sqlstate(code: str | None, message: str) -> AntonError | None:
    """The error of an SQLSTATE of class NT, with the text the SQL function gave; None for all others."""
    if not code or not code.startswith("NT"):
        return None
    cls = SQLSTATES.get(code, DatabaseError)
    error = cls.__new__(cls)
    AntonError.__init__(error, message, code=code)
    return error
