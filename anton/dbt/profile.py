"""Profile: what dbt needs to reach the database that Anton uses, made from Anton's own URL.

A profiles.yml in a folder that only this user may read; the password goes through the child's environment.
"""

from __future__ import annotations

import getpass
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from anton.errors import ConfigError, did_you_mean

PASSWORD = "ANTON_DBT_PASSWORD"
NAMED = ("host", "port", "user", "password", "dbname")                 # also parts of the URL
KEPT = ("sslmode", "sslcert", "sslkey", "sslrootcert")                 # what dbt-postgres passes on as it is
NUMBERS = ("connect_timeout", "keepalives_idle")                       # seconds
OWN = ("application_name", "fallback_application_name")                # each command's own, by which it is found
LIBPQ = {                                                              # what only libpq's variables can tell it
    name: f"PG{name.upper().replace('_', '')}" for name in (
        "hostaddr", "options", "passfile", "channel_binding", "require_auth", "target_session_attrs", "sslcrl",
        "sslcrldir", "sslsni", "sslcertmode", "sslnegotiation", "sslcompression", "ssl_min_protocol_version",
        "ssl_max_protocol_version", "gssencmode", "gssdelegation", "gsslib", "krbsrvname", "requirepeer",
        "client_encoding", "load_balance_hosts")}


def outputs(dsn: str | None, schema: str, threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    """dbt's output for a URL, PG* variables where it is silent, and what its environment needs: the password, and
    options of the URL that dbt has no word for.

    schema: of the models. The name of dbt's sessions in pg_stat_activity is that of each command: child.py.
    Raises ConfigError for several hosts, and for an option that cannot be handed on.
    """
    parts = urlsplit(dsn or "")
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    env = os.environ
    known = sorted({*NAMED, *KEPT, *NUMBERS, *OWN, *LIBPQ})
    for name in query:
        if name not in known:
            raise ConfigError(f'the URL of the database has the option "{name}", which dbt cannot be given.'
                              f"{did_you_mean(name, known)} Allowed with dbt: {', '.join(known)}", option=name)

    def first(*values: str | None) -> str:
        return next((value for value in values if value), "")

    def number(option: str, *values: str | None) -> int:
        found = first(*values)
        if not found.isdigit():
            raise ConfigError(f'{option} of the database is "{found}"; allowed with dbt: a whole number', option=option)
        return int(found)

    hosts = parts.netloc.rpartition("@")[2]
    for where in (hosts, query.get("host"), query.get("port"), "" if hosts or "host" in query else env.get("PGHOST")):
        if where and "," in where:
            raise ConfigError(f'the database has several hosts, "{where}". dbt connects to one: name the one that may '
                              "be written to, or a name or proxy that leads there", hosts=where)
    alone = re.fullmatch(r"(.*?)(?::(.*))?", hosts.rpartition("]")[2])
    assert alone is not None
    user = first(unquote(parts.username or ""), query.get("user"), env.get("PGUSER"), _me())
    output: dict[str, Any] = {
        "type": "postgres",
        "host": first(query.get("host"), unquote(parts.hostname or ""), env.get("PGHOST"), "localhost"),
        "port": number("port", query.get("port"), alone[2], env.get("PGPORT"), "5432"),
        "user": user,
        "password": "{{ env_var('" + PASSWORD + "', '') }}",
        "dbname": first(unquote(parts.path.lstrip("/")), query.get("dbname"), env.get("PGDATABASE"), user),
        "schema": schema, "threads": threads, "application_name": "",
        "connect_timeout": number("connect_timeout", query.get("connect_timeout"), env.get("PGCONNECT_TIMEOUT"), "10"),
        "keepalives_idle": number("keepalives_idle", query.get("keepalives_idle"), "10"),
    }
    for name in KEPT:
        value = first(query.get(name), env.get(f"PG{name.upper()}"))
        if value:
            output[name] = value
    more = {variable: query[name] for name, variable in LIBPQ.items() if query.get(name)}
    password = first(unquote(parts.password or ""), query.get("password"), env.get("PGPASSWORD"))
    return output, {PASSWORD: password, **more}


def write_profile(folder: Path, target: str, output: dict[str, Any]) -> None:
    """profiles.yml with one profile, anton, readable for this user alone."""
    file = folder / "profiles.yml"
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as to:
        json.dump({"anton": {"target": target, "outputs": {target: output}}}, to)  # JSON is YAML


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):                                        # a container's user without a name
        return "postgres"
