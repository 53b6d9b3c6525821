"""Storage: where files are, opened by the name it has in autonomous.json. obstore is used here and nowhere else.

    s3 = open_storage(app, "s3-fs")                  s3://bucket/path, file:///absolute, file://in/the/app's/folder
    async for found in s3.list("incoming/"): …       lists of Found
    await s3.read(path, 0, 1000, etag)               bytes of one version; FileChanged when it is another by now

Paths are relative to the storage's URL, with "/". Errors: StorageError (the handler waits), FileGone, FileChanged,
BadOption for a path that leaves the storage.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import LocalStore, S3Store

from anton import config
from anton.action import effects
from anton.app import App
from anton.errors import BadOption, ConfigError, FileChanged, FileGone, StorageError

log = logging.getLogger("anton.storage")

PAGE = 1000  # files of a list
_RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
_ODD = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_CLIENT: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a list. path: from the storage's root. etag: changes with its content; "" where there is none."""

    path: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True)
class Storage:
    """An open storage. root: its folder on this machine, None for S3. local: nothing leaves this machine."""

    name: str
    url: str
    store: S3Store | LocalStore = field(repr=False)
    root: Path | None
    local: bool
    _left_out: set[str] = field(default_factory=set, repr=False)       # that were told of

    async def list(self, prefix: str) -> AsyncIterator[Sequence[Found]]:
        """The files whose path begins with prefix, up to 1,000 at a time, in no order.

        Left out: of a folder links that lead out of it or round in it, and what vanishes meanwhile; names that cannot
        be asked for, which are logged once.
        """
        with self._errors("list", prefix):
            async for some in self._folder(prefix) if self.root is not None else self._bucket(prefix):
                yield some

    async def _bucket(self, prefix: str) -> AsyncIterator[Sequence[Found]]:
        async for some in self.store.list(prefix.rpartition("/")[0] or None, chunk_size=PAGE):
            found = [_found(one["path"], one) for one in some
                     if one["path"].startswith(prefix) and self._askable(one["path"])]
            few, empty = asyncio.Semaphore(16), [one.path for one in found if not one.size]

            async def there(path: str, few: asyncio.Semaphore = few) -> bool:
                async with few:
                    try:
                        await obstore.head_async(self.store, path)
                    except FileNotFoundError:
                        return False
                    return True

            # The mark of a folder, "a/b/" without content, is listed as if it were a file "a/b".
            real = dict(zip(empty, await asyncio.gather(*map(there, empty)), strict=True))
            yield [one for one in found if real.get(one.path, True)]

    async def _folder(self, prefix: str) -> AsyncIterator[Sequence[Found]]:
        """obstore's own way through a folder ends at the first odd name, and at a link that leads round."""
        assert self.root is not None
        if not self.root.is_dir():
            raise StorageError(self.name, self.url, "list", prefix, "there is no such folder")
        paths = _walk(self.root, prefix)

        def page() -> Sequence[str]:
            return [*itertools.islice(paths, PAGE)]

        while some := await asyncio.to_thread(page):
            yield await asyncio.to_thread(self._looked_at, some)

    def _looked_at(self, paths: Sequence[str]) -> Sequence[Found]:
        found = []
        for path in filter(self._askable, paths):
            with suppress(FileNotFoundError):                          # it has vanished
                found.append(_found(path, obstore.head(self.store, path)))
        return found

    def _askable(self, path: str) -> bool:
        """Whether read() and the like take this path."""
        if _takes(path):
            return True
        if path not in self._left_out:
            self._left_out.add(path)
            log.warning('storage "%s": the file %s is left out: its name is not UTF-8, or has a control character or a '
                        "backslash", self.name, ascii(path))
        return False

    async def read(self, path: str, start: int, length: int, etag: str = "") -> bytes:
        """Bytes of the file from start on, fewer at its end. etag: of the version that is meant; "": any."""
        with self._errors("read", self.checked(path)):
            got = await obstore.get_async(self.store, path, options=_options(start, length, etag))
            return bytes(await got.bytes_async())

    def read_now(self, path: str, start: int, length: int, etag: str = "") -> bytes:
        """As read(), for threads."""
        with self._errors("read", self.checked(path)):
            got = obstore.get(self.store, path, options=_options(start, length, etag))
            return bytes(got.bytes())

    async def find(self, path: str) -> Found:
        """The file as it is now."""
        with self._errors("read", self.checked(path)):
            one = await obstore.head_async(self.store, path)
        return _found(path, one)

    async def write(self, path: str, data: Any) -> None:
        """Puts the file there as a whole, instead of one that is there. data: bytes, a Path, or an open binary file."""
        with self._errors("write", self.checked(path)):
            await obstore.put_async(self.store, path, data)

    async def delete(self, path: str) -> None:
        """Deletes the file. One that is not there is no error."""
        with self._errors("delete", self.checked(path)):
            try:
                await obstore.delete_async(self.store, path)
            except FileNotFoundError:
                return

    def open(self, path: str, size: int, etag: str = "") -> io.BufferedReader:
        """The file as an open binary file, read in requests of 1 MB as far as it is asked for."""
        return io.BufferedReader(_Reader(self, path, size, etag), 1 << 20)

    def checked(self, path: str) -> str:
        """The path, when it stays inside. Raises BadOption for "..", an absolute path, a link out of it."""
        if not isinstance(path, str) or not _takes(path) or not self._inside(path):
            raise BadOption("path", path, f'storage "{self.name}"', 'a path inside of it, such as "incoming/a.csv"')
        return path

    def _inside(self, path: str) -> bool:
        return self.root is None or (self.root / path).resolve().is_relative_to(self.root)

    @contextmanager
    def _errors(self, verb: Literal["list", "read", "write", "delete"], path: str) -> Iterator[None]:
        if effects() == "offline" and not self.local:
            raise StorageError(self.name, self.url, verb, path, "this process stays on this machine, as tests do")
        try:
            yield
        except FileNotFoundError as error:
            raise FileGone(self.name, path) from error
        except PreconditionError as error:
            raise FileChanged(self.name, path) from error
        except (BaseError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]                     # after it comes Rust's own
            raise StorageError(self.name, self.url, verb, path, reason) from error


def _found(path: str, one: Any) -> Found:
    return Found(path, one["size"], one["e_tag"] or "", one["last_modified"])


def _takes(path: str) -> bool:
    """Whether it is a path that stays inside, in characters that all storages take."""
    return not any(part in ("", ".", "..") or _ODD.search(part) for part in path.split("/"))


def _walk(root: Path, prefix: str) -> Iterator[str]:
    """The paths of the files below a folder that begin with prefix. Links are followed, but neither out nor round.

    Raises OSError for a folder that cannot be read: what is in it would pass for deleted.
    """
    start = prefix.rpartition("/")[0]
    first = (root / start).resolve()
    waiting: list[tuple[str, tuple[Path, ...]]] = []
    if first.is_relative_to(root):
        waiting.append((start + "/" if start else "", (root, first)))
    while waiting:
        folder, above = waiting.pop()                                  # above: where the folders on the way really are
        try:
            entries = os.scandir(root / folder)
        except (FileNotFoundError, NotADirectoryError):                # gone meanwhile, or never there
            continue
        with entries:
            for entry in entries:
                path, here = folder + entry.name, above[-1] / entry.name
                if not path.startswith(prefix):
                    continue
                if entry.is_symlink():
                    try:
                        here = here.resolve()
                    except (OSError, RuntimeError):                    # it leads to itself
                        continue
                    if not here.is_relative_to(root):
                        continue
                if here.is_dir() if entry.is_symlink() else entry.is_dir():
                    if here not in above:
                        waiting.append((path + "/", (*above, here)))
                elif here.is_file() if entry.is_symlink() else entry.is_file():
                    yield path


class _Reader(io.RawIOBase):
    """Reads by ranges, each of the same version."""

    def __init__(self, storage: Storage, path: str, size: int, etag: str) -> None:
        self._storage, self._path, self._size, self._etag, self._at = storage, path, size, etag, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        data = self._storage.read_now(self._path, self._at, length, self._etag)
        buffer[:len(data)] = data
        self._at += len(data)
        return len(data)


def open_storage(app: App, name: str) -> Storage:
    """The storage of this name in the app's autonomous.json. Nothing is connected yet. Raises ConfigError."""
    settings = config.Config(app.folder, app.settings) if app.settings is not None else config.load(app.folder)
    found = settings.files(name)
    where = f'storage "{name}" of {config.FILE}'
    url = config.resolve(found.url, where=where)
    parts = urlsplit(url)
    if parts.scheme == "file":
        root = (app.folder / unquote(parts.netloc + parts.path)).resolve()
        root.mkdir(parents=True, exist_ok=True) if parts.netloc else None  # the app's own folder may be made
        if not root.is_dir():
            raise StorageError(name, url, "open", "", "there is no such folder")
        return Storage(name, url, LocalStore(root), root, True)
    if parts.scheme != "s3" or not parts.netloc:
        raise ConfigError(f'{where} has the url "{url}". Allowed: s3://bucket/path, file:///absolute, '
                          "file://in/the/app's/folder", name=name)
    options = {key: config.resolve(value, where=where) for key, value in found.options.items()}
    endpoint = options.get("endpoint", "")
    client: Any = {**_CLIENT, "allow_http": endpoint.startswith("http://")}
    store = S3Store(parts.netloc, prefix=parts.path.strip("/") or None, config=_s3(options), client_options=client,
                    retry_config=_RETRY)
    return Storage(name, url, store, None, config.is_loopback(urlsplit(endpoint).hostname or "elsewhere"))


def _s3(options: Mapping[str, str]) -> Any:
    known: dict[str, Any] = {"region": "us-east-1"} if "endpoint" in options else {}
    return {**known, **options}


def _options(start: int, length: int, etag: str) -> Any:
    return {"range": (start, start + length), **({"if_match": etag} if etag else {})}
