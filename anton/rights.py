"""Rights: which GRANT would allow what Postgres has just denied, for `anton status` to show."""

from __future__ import annotations

import re

import asyncpg

from anton.db import Database
from anton.errors import MissingPrivilege
from anton.fate import no_fit

_NEEDS = {"insert": r"(?:insert\s+into|copy)\s+", "update": r"update\s+", "delete": r"delete\s+from\s+",
          "select": r"(?<!delete )(?:from|join|using)\s+", "truncate": r"truncate\s+(?:table\s+)?"}
_DENIED = re.compile(r"permission denied for (\w[\w ]*?) (\S+)$")


async def explain(db: Database, error: BaseException) -> BaseException:
    """MissingPrivilege with the GRANTs that would allow it, where a right was missing; any other error as it came."""
    denied = no_fit(error)
    found = _DENIED.search(str(denied.args[0])) if isinstance(denied, asyncpg.InsufficientPrivilegeError) else None
    if found is None:
        return error
    kind, name = found[1], found[2]
    text = f"{getattr(denied, 'query', None) or ''}\n{getattr(denied, 'context', None) or ''}"
    try:
        async with db.conn() as conn:
            rows = await db.call(conn, "missing_rights", kind, name, rights_of(text, name), text)
            role = await conn.fetchval("select current_user")
    except Exception:                                                  # the database is away: the reason as it was
        return error
    if not rows:
        return error
    return MissingPrivilege(", ".join(row["may_not"] for row in rows), role, [row["allow"] for row in rows])


def rights_of(text: str, table: str) -> list[str]:
    """What a statement needs on a table, as far as its text shows it: ["insert", "select"]."""
    name = rf'(?:only\s+)?(?:[\w$]+\.|"[^"]+"\.)?"?{re.escape(table)}"?(?![\w$])'

    def has(pattern: str) -> bool:
        return re.search(rf"\b{pattern}", text, re.IGNORECASE) is not None

    rights = {right for right, pattern in _NEEDS.items() if has(pattern + name)}
    if "insert" in rights and has(r"on\s+conflict\b"):
        rights |= {"select", "update"} if has(r"do\s+update\b") else {"select"}
    if rights & {"update", "delete"} or ("insert" in rights and has(r"returning\b")):
        rights.add("select")
    return sorted(rights)
