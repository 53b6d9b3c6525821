"""Profile: what dbt needs to reach the database that Anton uses, made from Anton's own URL.

A profiles.yml in a folder that only this user may read; the password goes through the child's environment.
"""

from __future__ import annotations

import getpass
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PASSWORD = "ANTON_DBT_PASSWORD"
KEPT = ("sslmode", "sslcert", "sslkey", "sslrootcert")  # what dbt-postgres passes on as it is


def outputs(dsn: str | None, schema: str, threads: int) -> tuple[dict[str, Any], str]:
    """dbt's output for a URL, PG* variables where it is silent, and the password.

    schema: of the models. The name of dbt's sessions in pg_stat_activity is that of each command: child.py.
    """
    parts = urlsplit(dsn or "")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    env = os.environ

    def first(*values: str | None) -> str:
        return next((value for value in values if value), "")

    user = first(unquote(parts.username or ""), query.get("user"), env.get("PGUSER"), _me())
    output: dict[str, Any] = {
        "type": "postgres",
        "host": first(query.get("host"), unquote(parts.hostname or ""), env.get("PGHOST"), "localhost"),
        "port": int(first(query.get("port"), str(parts.port or ""), env.get("PGPORT"), "5432")),
        "user": user,
        "password": "{{ env_var('" + PASSWORD + "', '') }}",
        "dbname": first(unquote(parts.path.lstrip("/")), query.get("dbname"), env.get("PGDATABASE"), user),
        "schema": schema, "threads": threads, "application_name": "", "connect_timeout": 10,
        "keepalives_idle": 10,
    }
    for name in KEPT:
        value = first(query.get(name), env.get(f"PG{name.upper()}"))
        if value:
            output[name] = value
    return output, first(unquote(parts.password or ""), query.get("password"), env.get("PGPASSWORD"))


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
