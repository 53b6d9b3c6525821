"""Verbs of actions and approvals: what left, what waits, and what people decide."""

from __future__ import annotations

import argparse
from typing import Literal

from anton.app import load_app
from anton.db import Conn, Database
from anton.errors import ConfigError
from anton.outbox import decide
from anton.verbs import FOUND, OK, emit, list_rows, query, show_row

Args = argparse.Namespace

_ACTIONS = ("id", "name", "app", "state", "args", "at", "due_at")
_APPROVALS = ("id", "name", "state", "preview", "approvers", "decided_by", "via", "at", "expires_at")


def actions_list(args: Args) -> int:
    """List calls of actions, the newest first."""
    return list_rows(args, "list_actions", (args.name, args.limit, args.state), _ACTIONS)


def actions_show(args: Args) -> int:
    """Show a call, what came back, and who approved it."""
    return show_row(args, "show_action", args.id, f"no action {args.id}; anton actions list")


def actions_retry(args: Args) -> int:
    """Send calls again that failed, were refused, or are unknown and did not happen. What guards calls guards these."""
    return _change_actions(args, "retry_action", args.by)


def actions_resolve(args: Args) -> int:
    """Say what became of calls that are unknown: --sent, they happened; --failed, they did not and need not."""
    return _change_actions(args, "resolve_action", "sent" if args.sent else "failed", args.by)


def _change_actions(args: Args, function: str, *words: str | None) -> int:
    async def change(db: Database, conn: Conn) -> dict[str, str]:
        async with conn.transaction():
            return {str(id): await db.call_value(conn, function, id, *words) for id in args.ids}

    states = query(args, change)
    emit(args, states, "\n".join(f"{id}: {state}" for id, state in states.items()))
    return OK


def actions_stop(args: Args) -> int:
    """Stop all actions of this database: calls wait, nothing more leaves. What is on its way ends."""
    query(args, lambda db, conn: db.call(conn, "stop_actions"))
    emit(args, {"actions": "stopped"}, "actions are stopped; to let them go on: anton actions start")
    return OK


def actions_start(args: Args) -> int:
    """Let actions go on."""
    query(args, lambda db, conn: db.call(conn, "start_actions"))
    emit(args, {"actions": "started"}, "actions go on")
    return OK


# --- approvals


def approvals_list(args: Args) -> int:
    """List approvals that wait, or those of --state, the newest first."""
    return list_rows(args, "list_approvals", (None if args.state == "all" else args.state, args.limit), _APPROVALS)


def approvals_show(args: Args) -> int:
    """Show an approval: the arguments, the records it rests on, its history, and who may decide it."""
    return show_row(args, "show_approval", args.id, f"no approval {args.id}; anton approvals list --state all")


def approvals_approve(args: Args) -> int:
    """Approve as a person, with --set NAME=VALUE for arguments that are to change."""
    edit = {}
    for text in args.set or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text} is not possible. Write NAME=VALUE, such as --set amount=3", value=text)
        edit[name] = value
    return _decide(args, "approve", edit, None)


def approvals_reject(args: Args) -> int:
    """Reject as a person."""
    return _decide(args, "reject", {}, args.why)


def _decide(args: Args, what: Literal["approve", "reject"], edit: dict[str, str], why: str | None) -> int:
    app = load_app(args.app)
    row = query(args, lambda db, _: decide(db, app, args.id, args.by, what, "cli", edit=edit, why=why))
    told = f"{args.id}: {row['state']}"
    if not row["won"]:
        told += f", by {row['decided_by'] or row['decided_via']}" if row["decided_at"] and row["decided_via"] else ""
        told += f"; what it rests on has changed: see {row['next']}" if row["next"] else ""
    emit(args, dict(row), told)
    return OK if row["won"] else FOUND
