"""Files: a Table of the files in a storage. New and changed ones fire its events, as rows of any Table do.

    incoming = Files("s3-fs", "incoming/*.csv")      path size etag modified; scanned every 30 s
    incoming.load(into=orders)                       each new or changed file becomes records

    @incoming.on_new_records(each=True)
    def seen(file: File) -> None:
        text = file.read().decode()
        incoming.write("done/" + file.name, text)

Reading and writing files is part of no transaction: a handler that runs again writes the same file again.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel

from anton.action import effects
from anton.app import App, current_app
from anton.db import Database, current_database, quote
from anton.duration import duration
from anton.errors import BadOption, ConfigError, LeaseLost, NoScope, WriteError
from anton.event import Event
from anton.layout import REJECTS, How
from anton.load import Loaded, load
from anton.query import wait
from anton.relation import describe, described
from anton.schedule import cron
from anton.table import Table
from anton.write import Rows, find_scope, scope

if TYPE_CHECKING:
    from anton.storage import Storage

T = TypeVar("T")
Format = Literal["csv", "tsv", "jsonl", "parquet"]

MERGE = 5000  # files of one transaction
SETTLE = "2s"  # on disks, where others may see a file that is being written


class File(BaseModel):
    """A file as the last scan saw it. path: from the storage's root. size: bytes. etag: changes with its content."""

    _files: ClassVar[Files]

    path: str
    size: int
    etag: str = ""
    modified: AwareDatetime

    @property
    def name(self) -> str:
        """The path's last part."""
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        """Its content, all of it. Raises FileChanged when it is another version by now, FileGone, StorageError."""
        return self._files._now(self.aread, "file.read()", "await file.aread()")

    async def aread(self) -> bytes:
        """Its content, all of it. Raises FileChanged when it is another version by now, FileGone, StorageError."""
        return await self._files.storage().read(self.path, 0, self.size, self.etag) if self.size else b""

    def open(self) -> BinaryIO:
        """It as an open binary file, for what reads bit by bit: with file.open() as f: pandas.read_csv(f)."""
        return self._files.storage().open(self.path, self.size, self.etag)

    def load(self, into: Table[Any], *, format: Format | None = None, upsert: bool = False,
             map: Mapping[str, str] | None = None, skip: Sequence[str] = (), columns: Sequence[str] | None = None,
             delimiter: str | None = None, encoding: str = "utf-8", rejects: int = REJECTS) -> Loaded:
        """Makes its rows records of a Table, once for each version of the file. See Files.load."""
        how = How(format, upsert, map or {}, skip, columns, delimiter, encoding, rejects).checked("file.load")
        db = _loading()
        return self._files._now(lambda: self._load(db, into, how), "file.load()", "await file.aload()")

    async def aload(self, into: Table[Any], *, format: Format | None = None, upsert: bool = False,
                    map: Mapping[str, str] | None = None, skip: Sequence[str] = (),
                    columns: Sequence[str] | None = None, delimiter: str | None = None, encoding: str = "utf-8",
                    rejects: int = REJECTS) -> Loaded:
        """Makes its rows records of a Table, once for each version of the file. See Files.load."""
        how = How(format, upsert, map or {}, skip, columns, delimiter, encoding, rejects).checked("file.aload")
        return await self._load(_loading(), into, how)

    async def _load(self, db: Database, into: Table[Any], how: How) -> Loaded:
        found = storage_module().Found(self.path, self.size, self.etag, self.modified)
        return await load(db, self._files.app.name, self._files.storage(), found, into, how)


class Files(Table[File]):
    """The files of a storage whose path fits a pattern, as a Table.

    storage: its name in autonomous.json. pattern: of paths from the storage's root; "*" and "?" stay within a folder,
    "**" does not. every: how often it is scanned. settle: a file changed less than this ago waits for the next scan;
    default 2 s on disks, none on S3, where a file is there as a whole. name: the table's; default made of both.
    Raises BadOption, DuplicateName.
    """

    def __init__(self, storage: str, pattern: str = "**", *, every: str | float | timedelta = "30s",
                 settle: str | float | timedelta | None = None, name: str | None = None) -> None:
        of = f'Files("{storage}", "{pattern}")'
        if not isinstance(storage, str) or not storage:
            raise BadOption("storage", storage, "Files", "the name of a storage in autonomous.json")
        if not isinstance(pattern, str) or not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
            raise BadOption("pattern", pattern, of, 'a pattern of paths in the storage, such as "incoming/*.csv"')
        self.app: App = current_app()
        self.storage_name, self.pattern = storage, pattern
        self._settle = None if settle is None else duration(settle, "settle", of)
        self._matches = re.compile(_regex(pattern)).fullmatch
        self._storage: Storage | None = None
        model = type("File", (File,), {"_files": self, "__module__": __name__, "__doc__": File.__doc__,
                                       "__annotations__": {"_files": "ClassVar[Files]"}})
        word = re.sub(r"[^a-z0-9]+", "_", f"{storage} {pattern}".lower()).strip("_")
        Table.__init__(self, name or (word if word[:1].isalpha() else f"files_{word}")[:63], model, key="path")

        async def scan() -> None:
            await self.ascan()

        cron.every(every, name=f"scan_{self.name}", overlap="skip")(scan)

    def storage(self) -> Storage:
        """The open storage. Raises ConfigError, StorageError."""
        if self._storage is None:
            self._storage = storage_module().open_storage(self.app, self.storage_name)
        return self._storage

    def load(self, *, into: Table[Any], format: Format | None = None, upsert: bool = False,
             map: Mapping[str, str] | None = None, skip: Sequence[str] = (), columns: Sequence[str] | None = None,
             delimiter: str | None = None, encoding: str = "utf-8", rejects: int = REJECTS, **options: Any) -> None:
        """Makes the rows of each new or changed file records of a Table: a handler named load_TABLE.

        format: "csv", "tsv", "jsonl" or "parquet"; default the name's end, before .gz. upsert: rows whose key exists
        replace it; else they do not fit. map: {"column": "name in the file"}. skip: names in the file to leave out.
        columns: of a CSV without a header. delimiter, encoding: of a CSV. rejects: how many rows that do not fit are
        put into load_reject, before the load fails. options: a handler's. Raises BadOption.
        """
        how = How(format, upsert, map or {}, skip, columns, delimiter, encoding, rejects).checked(f"{self!r}.load")
        if not isinstance(into, Table):
            raise BadOption("into", into, f"{self!r}.load", "a Table, which gets the rows")

        given = {"name": f"load_{into.name}", "timeout": "24h", "concurrency": 2, **options, "each": True, "into": into}
        Event(self, "changes", ("new", "updated"))(_Loader(into, how), **given)

    def scan(self) -> int:
        """Looks at the storage now: notes new, changed and vanished files. How many there are."""
        db = _database()
        return self._now(lambda: self._scan(db), "files.scan()", "await files.ascan()")

    async def ascan(self) -> int:
        """Looks at the storage now, as scan(). 0 while another scan is at work."""
        return await self._scan(_database())

    async def _scan(self, db: Database) -> int:
        relation = await describe(db, self.name)
        return await _Scan(db, self, f"{quote(relation.schema)}.{quote(relation.table)}").run()

    def write(self, path: str, data: bytes | str | Path | BinaryIO) -> None:
        """Puts a file into the storage, instead of one that is there. data: a str as UTF-8; a Path: that file.

        At once, and not undone when a handler fails: it runs again and writes again. In anton dev and in tests what
        would leave this machine is captured as the action files.write.
        """
        content, size = _content(data)
        if not self._captured("write", path, size=size):
            self._now(lambda: self.storage().write(path, content), "files.write()", "await files.awrite()")

    async def awrite(self, path: str, data: bytes | str | Path | BinaryIO) -> None:
        """Puts a file into the storage, as write()."""
        content, size = _content(data)
        if not self._captured("write", path, size=size):
            await self.storage().write(path, content)

    def delete(self, path: str) -> None:
        """Deletes a file from the storage; one that is not there is no error. Captured as write() is."""
        if not self._captured("delete", path):
            self._now(lambda: self.storage().delete(path), "files.delete()", "await files.adelete()")

    async def adelete(self, path: str) -> None:
        """Deletes a file from the storage, as delete()."""
        if not self._captured("delete", path):
            await self.storage().delete(path)

    async def find(self, path: str) -> File:
        """The file with this path as it is now, whether it fits the pattern or was scanned. Raises FileGone."""
        found = await self.storage().find(path)
        made: File = self.model(path=found.path, size=found.size, etag=found.etag, modified=found.modified)  # type: ignore[misc]
        return made

    def _captured(self, verb: str, path: str, **args: Any) -> bool:
        """Whether this stays here as a captured action, as it would leave this machine. Checks the path."""
        storage = self.storage()
        storage.checked(path)
        if storage.local or effects() == "live":
            return False
        found = find_scope()
        if found is None:
            raise NoScope(f'nothing leaves this machine from here: "{path}" would be captured, and no handler or '
                          "transaction is around to keep that")
        current, who = found
        relation = described(current.db, f"{current.db.schema}.action")
        current.add(Rows("insert", relation, ("app", "name", "args", "state"), [who, (
            self.app.name, f"files.{verb}", {"storage": self.storage_name, "path": path, **args}, "captured")]))
        return True

    def _now(self, make: Callable[[], Coroutine[Any, Any, T]], name: str, twin: str) -> T:
        return wait(_database(), make, name, twin)

    def __repr__(self) -> str:
        return f'Files("{self.storage_name}", "{self.pattern}")'


@dataclass(frozen=True)
class _Loader:
    """What Files.load() puts on its events."""

    into: Table[Any]
    how: How

    async def __call__(self, file: File) -> None:
        await file._load(_loading(), self.into, self.how)


class _Scan:
    """One look at a storage. The token fences off a scan that was thought dead."""

    def __init__(self, db: Database, files: Files, table: str) -> None:
        self.db, self.files, self.table = db, files, table
        self.token = 0

    async def run(self) -> int:
        storage = self.files.storage()
        settle = self.files._settle
        if settle is None:
            settle = duration(SETTLE if storage.root is not None else 0)
        token = await self._call("begin_scan", self.table)
        if token is None:
            return 0
        self.token, found, whole = token, 0, False
        seen: set[bytes] = set()
        try:
            prefix = re.split(r"[*?\[]", self.files.pattern, maxsplit=1)[0]
            some: list[Any] = []
            async for listed in storage.list(prefix):
                fitting = [one for one in listed if self.files._matches(one.path)]
                seen.update(_digest(one.path) for one in fitting)
                some += fitting
                if len(some) >= MERGE:
                    await self._merge(some, settle)
                    some = []
                else:
                    await self._alive()
                found += len(fitting)
            await self._merge(some, settle)
            await self._sweep(seen)
            whole = True
            return found
        except LeaseLost:
            return 0                                                   # another scan goes on
        finally:
            await self._call("end_scan", self.table, token, found if whole else None)

    async def _merge(self, some: Sequence[Any], settle: timedelta) -> None:
        await self._call("merge_files", self.table, self.token, [one.path for one in some],
                         [one.size for one in some], [one.etag for one in some],
                         [one.modified.astimezone(UTC) for one in some], settle)

    async def _sweep(self, seen: set[bytes]) -> None:
        """Drops what the table has and the storage has not."""
        after: str | None = None
        while True:
            async with self.db.conn() as conn:
                rows = await self.db.call(conn, "known_files", self.table, after, MERGE)
            known = [row[0] for row in rows]
            gone = [path for path in known if _digest(path) not in seen]
            if gone:
                await self._call("drop_files", self.table, self.token, gone)
            if len(known) < MERGE:
                return
            after = known[-1]

    async def _alive(self) -> None:
        await self._call("keep_scan", self.table, self.token)

    async def _call(self, function: str, *args: Any) -> Any:
        async with self.db.tx() as conn:
            return await self.db.call_value(conn, function, self.files.app.name, *args)


def storage_module() -> Any:
    """anton.storage, which only installs with obstore can load."""
    try:
        return importlib.import_module("anton.storage")
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "anton":
            raise
        raise ConfigError(f"{error.name} is not installed. pip install 'anton-framework[files]'") from error


def _database() -> Database:
    current = scope.get()
    return current.db if current is not None else current_database()


def _loading() -> Database:
    """The database to load into. Raises WriteError inside of what commits as one."""
    current = scope.get()
    if current is not None and current.kind in ("transaction", "route"):
        raise WriteError(f"file.load() commits piece by piece, so it cannot be part of a {current.kind}. Call it in a "
                         "handler, a schedule or a script")
    return _database()


def _content(data: bytes | str | Path | BinaryIO) -> tuple[Any, int | None]:
    """What is written, and how long it is where that is known."""
    if isinstance(data, str):
        data = data.encode()
    return data, len(data) if isinstance(data, bytes) else None


def _digest(path: str) -> bytes:
    """Enough of a path to tell it from others: a million of them fit into 60 MB."""
    return blake2b(path.encode("utf-8", "surrogatepass"), digest_size=10).digest()


def _regex(pattern: str) -> str:
    """A pattern of paths as a regular expression."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
