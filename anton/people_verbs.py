"""The verbs of `anton people`: who decides."""

from __future__ import annotations

import argparse
from typing import Any

from anton import config, people
from anton.db import Database
from anton.verbs import FOUND, OK, emit, list_rows, query

Args = argparse.Namespace

_PEOPLE = ("name", "groups", "email", "slack_id", "at")


def people_add(args: Args) -> int:
    """Add a person who may decide, or change what is known of one. --group, repeated, says all of their groups."""
    query(args, lambda db, _: people.put(db, args.name, args.email, args.slack, args.group))
    emit(args, {"person": args.name}, f"{args.name} is known; to sign them in: anton people link {args.name}")
    return OK


def people_list(args: Args) -> int:
    """List people and their groups."""
    return list_rows(args, "list_people", (), _PEOPLE)


def people_remove(args: Args) -> int:
    """Remove a person: they decide nothing any more and are signed out. What they decided stays."""
    async def remove(db: Database, conn: Any) -> bool:
        async with conn.transaction():
            return bool(await db.call_value(conn, "drop_person", args.name))

    known = query(args, remove)
    emit(args, {"person": args.name, "removed": known},
         f"{args.name} is removed" if known else f"nobody is called {args.name}; anton people list")
    return OK if known else FOUND


def people_link(args: Args) -> int:
    """Print a link that signs a person in to the inbox, once, within 15 minutes."""
    settings = config.load().settings.deployment
    base = args.url or settings.url or f"http://localhost:{settings.port}"
    url = query(args, lambda db, _: people.link(db, args.name, base))
    emit(args, {"person": args.name, "url": url}, url)
    return OK
