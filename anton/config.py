"""Config: autonomous.json, and which database an app uses.

    --database  >  DATABASE_URL  >  PG*  >  the first database storage of autonomous.json  >  embedded

    {"name": "slack-ai-bot", "app": "main",
     "storages": [{"name": "local-pg", "type": "database", "url": "embedded"},
                  {"name": "s3-fs", "type": "files", "url": "s3://bucket/path"}],
     "connections": [{"name": "openai", "service": "openai", "api_key": "env:OPENAI_API_KEY"}]}

Any text value may be "env:NAME", read from the environment when it is used and never shown.
An unknown key is an error. anton/autonomous.schema.json tells editors the same.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from anton import embedded
from anton.errors import ConfigError, did_you_mean

FILE = "autonomous.json"
_NAME = r"^[a-z][a-z0-9_-]{0,62}$"
_SCHEMA = r"^[a-z_][a-z0-9_]{0,62}$"
S3_OPTIONS = ("region", "endpoint", "access_key_id", "secret_access_key", "session_token")
_SECRET = ("secret_access_key", "session_token")
CREDENTIALS = ("api_key", "oauth_token", "secret")
_REFERENCE = r"^env:[A-Za-z_][A-Za-z0-9_]*$"
_HIDDEN = (*_SECRET, *CREDENTIALS)
Name = Annotated[str, Field(pattern=_NAME, description="lower-case letters, digits, - and _; at most 63")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Storage(_Section):
    """A database."""

    name: Name
    type: Literal["database"]
    url: str = Field(default="embedded", description='"embedded", postgresql://user@host:5432/name, or "env:NAME"')
    pooled: bool = Field(default=False, description="true: the URL is a pooler in transaction mode (PgBouncer)")
    schema_: str = Field(default="anton", alias="schema", pattern=_SCHEMA, description="the runtime's")


class FileStorage(_Section):
    """Where files are, for Files("s3-fs", "incoming/*.csv")."""

    name: Name
    type: Literal["files"]
    url: str = Field(description="s3://bucket/path, file:///absolute, file://in/the/app's/folder, or \"env:NAME\"")
    options: dict[str, str] = Field(default={}, description="of S3: region, endpoint, access_key_id, "
                                    'secret_access_key, session_token; what is secret only as "env:NAME". Default: '
                                    "the usual AWS_ variables")

    @field_validator("options")
    @classmethod
    def _known(cls, options: dict[str, str]) -> dict[str, str]:
        for name, value in options.items():
            if name not in S3_OPTIONS:
                hint = did_you_mean(name, S3_OPTIONS)
                raise ValueError(f'no option "{name}".{hint} Allowed: {", ".join(S3_OPTIONS)}')
            if name in _SECRET and not value.startswith("env:"):
                raise ValueError(f'"{name}" is secret: write "env:NAME", and the value into that variable')
        return options


class Connection(_Section):
    """An account at a service, for connection="openai" of components. One of api_key, oauth_token, secret is set."""

    name: Name
    service: str = Field(min_length=1, description='as components show it, in any case: "openai", "slack"')
    api_key: str | None = Field(default=None, pattern=_REFERENCE, description='"env:NAME"; never the key itself')
    oauth_token: str | None = Field(default=None, pattern=_REFERENCE, description='"env:NAME"; never the token itself')
    secret: str | None = Field(default=None, pattern=_REFERENCE, description='"env:NAME"; never the secret itself')
    base_url: str | None = Field(default=None, pattern=r"^(https?://|env:[A-Za-z_])",
                                 description='another server than the service\'s own; or "env:NAME"')

    @model_validator(mode="after")
    def _one(self) -> Connection:
        given = [name for name in CREDENTIALS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(CREDENTIALS)} is to be given, and there "
                             f"{'is none' if not given else 'are ' + ' and '.join(given)}")
        return self

    @property
    def variable(self) -> str:
        """The environment variable that holds its credential."""
        return (self.api_key or self.oauth_token or self.secret or "")[len("env:"):]


class Runtime(_Section):
    """What runs handlers: `anton work` takes these where no flag says otherwise."""

    name: Name
    type: Literal["python"] = "python"
    processes: int = Field(default=1, ge=1, le=256, description="worker processes")
    slots: int | None = Field(default=None, ge=1, description="batches in flight in each process")


class Deployment(_Section):
    """Where `anton serve` listens."""

    host: str = Field(default="127.0.0.1", description="address; a public one makes verify= obligatory on webhooks")
    port: int = Field(default=3000, ge=0, le=65535, description="0: any free one")
    workers: int = Field(default=1, ge=1, le=256, description="processes that serve")
    url: str = Field(default="", pattern=r"^(https?://[^/?#\s]+(/[^?#\s]*)?)?$",
                     description="the app's public address, such as https://hooks.example.com; some webhooks sign it")


class Settings(_Section):
    """autonomous.json."""

    schema_url: str | None = Field(default=None, alias="$schema")
    name: Name = Field(description="the app's name; scopes everything it registers. Default: the folder's")
    app: str = Field(default="main", description="the module that declares the app")
    storages: tuple[Annotated[Storage | FileStorage, Field(discriminator="type")], ...] = ()
    runtimes: tuple[Runtime, ...] = ()
    connections: tuple[Connection, ...] = ()
    deployment: Deployment = Deployment()

    @field_validator("connections")
    @classmethod
    def _each_once(cls, connections: tuple[Connection, ...]) -> tuple[Connection, ...]:
        names = [one.name for one in connections]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'"{twice}" is there twice: rename one of them')
        return connections


@dataclass(frozen=True)
class Config:
    """An app's folder and its settings. Made by load()."""

    folder: Path
    settings: Settings

    @property
    def name(self) -> str:
        """The app's name."""
        return self.settings.name

    @property
    def storage(self) -> Storage:
        """The first database storage; an embedded one named "local-pg" where none is configured."""
        first = next((s for s in self.settings.storages if isinstance(s, Storage)), None)
        return first or Storage(name="local-pg", type="database")

    def files(self, name: str) -> FileStorage:
        """The storage of files with this name. Raises ConfigError naming those there are."""
        known = {s.name: s for s in self.settings.storages if isinstance(s, FileStorage)}
        if name not in known:
            raise ConfigError(
                f'no storage "{name}" of type "files" in {FILE}.{did_you_mean(name, known)} '
                f"It has: {', '.join(known) or 'none'}. Add to its storages: "
                f'{{"name": "{name}", "type": "files", "url": "file://data"}}', name=name)
        return known[name]


@dataclass(frozen=True)
class Target:
    """The database to use. source: where the URL came from, for messages. repr shows no password."""

    url: str
    source: str
    pooled: bool = False
    schema: str = "anton"
    embedded: bool = False

    @property
    def loopback(self) -> bool:
        """True when the database is on this machine: a unix socket, localhost, 127.0.0.0/8 or ::1."""
        return all(is_loopback(host) for host in _hosts(self.url))

    def __repr__(self) -> str:
        return f"Target({hide_password(self.url)!r}, {self.source!r})"


def load(folder: Path | str = ".") -> Config:
    """Reads autonomous.json of the folder; without one, every value is its default.

    Raises ConfigError naming the file, the key, its value, what is allowed and the likely meaning.
    """
    folder = Path(folder).resolve()
    file = folder / FILE
    if not file.exists():
        return Config(folder, Settings(name=_folder_name(folder)))
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not JSON: {error}", file=str(file)) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must be an object: {{\"name\": \"my-app\", …}}", file=str(file))
    raw.setdefault("name", _folder_name(folder))
    raw = _from_environment(raw)
    try:
        return Config(folder, Settings.model_validate(raw))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{file}:\n  " + "\n  ".join(lines), file=str(file)) from None


def find_target(config: Config, database: str | None = None, environ: Mapping[str, str] | None = None) -> Target:
    """Which database to use. The embedded one is started when it is the answer.

    database: the flag --database; a URL, "embedded" or "env:NAME".
    """
    environ = os.environ if environ is None else environ
    storage = config.storage
    if database:
        url, source = resolve(database, environ, "--database"), "--database"
    elif environ.get("DATABASE_URL"):
        url, source = environ["DATABASE_URL"], "DATABASE_URL"
    elif any(environ.get(name) for name in _PG):
        url, source = _pg_url(environ), ", ".join(name for name in _PG if environ.get(name))
    else:
        named = any(isinstance(one, Storage) for one in config.settings.storages)
        source = f'storage "{storage.name}" of {FILE}' if named else "the default"
        url = resolve(storage.url, environ, source)
    if url == "embedded":
        return Target(embedded.start(config.folder), f"embedded, {source}", schema=storage.schema_, embedded=True)
    if urlsplit(url).scheme not in ("postgresql", "postgres"):
        raise ConfigError(
            f"{hide_password(url)!r} from {source} is not a database URL. "
            'Allowed: "embedded" or postgresql://user:password@host:5432/name',
            source=source,
        )
    return Target(url, source, pooled=storage.pooled, schema=storage.schema_)


def resolve(value: str, environ: Mapping[str, str] | None = None, where: str = FILE) -> str:
    """The value itself, or what the environment holds for "env:NAME". Raises ConfigError when it is not set."""
    if not value.startswith("env:"):
        return value
    environ = os.environ if environ is None else environ
    name = value[4:]
    if not environ.get(name):
        raise ConfigError(f"{where} says {value}, and the environment variable {name} is not set", variable=name)
    return environ[name]


def hide_password(url: str) -> str:
    """The URL with *** for its password, wherever it stands."""
    parts = urlsplit(url)
    netloc = parts.netloc
    if "@" in netloc and ":" in netloc.rpartition("@")[0]:
        netloc = f"{netloc.partition(':')[0]}:***@{netloc.rpartition('@')[2]}"
    query = "&".join("password=***" if pair.startswith("password=") else pair for pair in parts.query.split("&"))
    return parts._replace(netloc=netloc, query=query).geturl()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of autonomous.json; shipped as anton/autonomous.schema.json."""
    schema = Settings.model_json_schema(by_alias=True)
    del schema["required"]  # the name has a default: the folder's
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_PG = ("PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE")


def _pg_url(environ: Mapping[str, str]) -> str:
    if environ.get("PGSERVICE"):
        return f"postgresql://?service={quote(environ['PGSERVICE'])}"
    user = quote(environ.get("PGUSER", ""), safe="")
    query = "&".join(
        f"{key}={quote(environ[name], safe='/')}"
        for key, name in (("host", "PGHOST"), ("port", "PGPORT"), ("sslmode", "PGSSLMODE"))
        if environ.get(name)
    )
    database = quote(environ.get("PGDATABASE", ""), safe="")
    return f"postgresql://{user}{'@' if user else ''}/{database}?{query}".rstrip("?")


def _hosts(url: str) -> list[str]:
    parts = urlsplit(url)
    named = parse_qs(parts.query)
    if "service" in named:
        return ["a service file's host"]
    hosts = named.get("hostaddr") or named.get("host") or [parts.netloc.rpartition("@")[2]]
    return [_without_port(host) for host in ",".join(hosts).split(",")]


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """True for an address of this machine: a unix socket, localhost, 127.0.0.0/8 or ::1."""
    if host in ("", "localhost") or host.startswith(("/", "%2F", "%2f", "@")):
        return True
    address = _address(host)
    return address is not None and address.is_loopback


@lru_cache(maxsize=64)
def is_public(host: str) -> bool:
    """True for an IP address that is not this machine's own; no name is one."""
    address = _address(host)
    return address is not None and not address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address            # a server on [::] sees ::ffff:127.0.0.1


def _folder_name(folder: Path) -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in folder.name.lower()).strip("-_")
    return (plain if plain[:1].isalpha() else f"app-{plain}".rstrip("-"))[:63]


def _from_environment(value: Any, key: str = "") -> Any:
    """"env:NAME" values replaced; a url, a storage's options and connections are left for who uses them."""
    if isinstance(value, dict):
        return value if key in ("options", "connections") else {
            name: _from_environment(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_from_environment(inner, key) for inner in value]
    return resolve(value, where=f'"{key}" of {FILE}') if isinstance(value, str) and key != "url" else value


_SECTIONS: dict[str, type[BaseModel]] = {"database": Storage, "files": FileStorage, "runtimes": Runtime,
                                         "connections": Connection, "deployment": Deployment}


def _explain(detail: Any) -> str:
    """One line of a pydantic error: the path, the value, what is allowed."""
    path, loc = "", list(detail["loc"])
    kind = loc.pop(2) if loc[0] == "storages" and len(loc) > 2 else loc[0]  # which of the storages' types
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if detail["type"] == "extra_forbidden":
        model = _SECTIONS.get(kind, Settings) if len(loc) > 1 else Settings
        keys = [field.alias or name for name, field in model.model_fields.items()]
        key = str(loc[-1])
        return f'unknown key "{path}".{did_you_mean(key, keys)} Allowed: {", ".join(keys)}'
    if detail["type"] == "missing":
        return f'"{path}" is missing'
    if detail["type"] == "union_tag_not_found":
        return f'"{path}.type" is missing. Allowed: "database", "files"'
    if detail["type"] == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        hint = did_you_mean(tag, ("database", "files"))
        return f'"{path}.type" is {json.dumps(tag)}.{hint} Allowed: "database", "files"'
    shown = json.dumps(_masked(detail["input"], str(loc[-1])), default=str)
    if detail["type"] == "string_pattern_mismatch" and loc[-1] in CREDENTIALS:
        return f'"{path}" is {shown}: it is secret. Allowed: "env:NAME", and the value in that variable'
    return f'"{path}" is {shown}: {detail["msg"][0].lower()}{detail["msg"][1:]}'


def _masked(value: Any, key: str = "") -> Any:
    """What an error may show of a value: no secret, which is what "env:NAME" is there for."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return {name: _masked(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(inner, key) for inner in value]
    return "***" if key in _HIDDEN and value is not None and not re.match(_REFERENCE, str(value)) else value
