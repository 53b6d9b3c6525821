"""Flowpage: what the page of the flow shows: the app's graph, and what moves through it just now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anton import flow
from anton.app import App
from anton.chart import HEIGHT, WIDTH, Fact, chart
from anton.db import Database
from anton.graph import Graph
from anton.status import Row, ask, status
from anton.wiring import Wiring, wire
from anton.wiring import ask as told

RECENT = 15                                                            # lines of what happened last
_WAIT = ("waiting", "unknown")                                         # states of calls that somebody has to see to


async def shown(app: App, db: Database, person: str | None) -> dict[str, Any]:
    """What flow.html needs. Reads only. What calls are made with is shown to who sees all."""
    async with db.conn() as conn:
        wired = wire(app, await told(db, conn))
        graph = wired.graph
        tables = {wired.sql_name(node.name): node.id for node in graph.nodes.values() if node.kind in ("table", "view")}
        handlers = [row for row in await status(db, conn) if row["app"] == app.name]
        handled = {row["name"]: row["n"] for row in await ask(db, conn, "flow_handlers", app.name)}
        counts = await ask(db, conn, "flow_tables", list(tables))
        calls = await ask(db, conn, "flow_actions", app.name)
        recent = await ask(db, conn, "flow_recent", RECENT)
        sees_all = await db.call_value(conn, "sees_all", person)
        now = await db.call_value(conn, "now")
        stopped = await db.call_value(conn, "setting", "actions")
    recent = [row if sees_all or row["kind"] != "act" else {**row, "detail": ""} for row in recent]
    senders = {action.sender.name: name for name, action in app.actions.items()}
    facts = {tables[row["name"]]: _of_table(row) for row in counts}
    facts |= _of_handlers(wired, handled, [row for row in handlers if row["handler"] not in senders])
    facts |= _of_actions(graph, calls, {senders[row["handler"]]: row for row in handlers if row["handler"] in senders})
    beyond: dict[str, list[str]] = {}
    for edge in graph.edges.values():
        beyond.setdefault(edge.source, []).append(graph.nodes[edge.target].name)
    return {"wide": chart(graph, facts), "tall": chart(graph, facts, tall=True), "width": WIDTH, "height": HEIGHT,
            "beyond": beyond, "now": now, "stopped": stopped == "stopped", "recent": [flow.line(row) for row in recent],
            "total": _number(sum(handled.values())),
            "waiting": sum(row["ready"] + row["delayed"] for row in handlers),
            "dead": sum(row["dead"] for row in handlers)}


def _of_table(row: Row) -> Fact:
    text = f"{'' if row['exact'] else 'about '}{_number(row['records'])} records"
    return Fact(text + (f", {_number(row['changes'])} a minute" if row["changes"] else ""),
                "busy" if row["changes"] else "")


def _of_handlers(wired: Wiring, handled: Mapping[str, int], rows: list[Row]) -> dict[str, Fact]:
    found = {}
    for row in rows:
        minute, waits = handled.get(row["handler"], 0), row["ready"] + row["in_flight"] + row["delayed"]
        said = [f"{_number(minute)} a minute"] if minute else []
        said += [f"{_number(waits)} wait"] if waits else []
        said += [f"{_number(row['dead'])} dead"] if row["dead"] else []
        said += [row["state"]] if row["state"] not in ("ok", "feeding") else []
        bad = row["dead"] or row["state"] in ("failing", "missing")
        tone = "bad" if bad else "waits" if row["state"] in ("paused", "idle", "behind") else "busy" if minute else ""
        for kind in ("handler", "model", "poll", "schedule"):
            if (id := f"{kind}:{row['handler']}") in wired.graph.nodes:
                found[id] = Fact(", ".join(said) or "at rest", tone)
    return found


def _of_actions(graph: Graph, calls: list[Row], senders: Mapping[str, Row]) -> dict[str, Fact]:
    found = {}
    for node in graph.nodes.values():
        if node.kind != "action":
            continue
        mine = [row for row in calls if row["name"] == node.name]
        states = {row["state"]: row["n"] for row in mine}
        worry = [f"{_number(states[state])} {'wait for a person' if state == 'waiting' else state}"
                 for state in (*_WAIT, "failed") if state in states]
        done = [f"{_number(n)} {state}" for state, n in states.items() if state in ("sent", "captured")]
        busy = any(row["recent"] for row in mine)
        dead = senders.get(node.name, {}).get("dead")
        tone = "bad" if dead or "failed" in states else "waits" if worry else "busy" if busy else ""
        found[node.id] = Fact(", ".join((worry or []) + done[:1 if worry else 2]) or "no calls yet", tone)
    return found


def _number(n: int) -> str:
    return f"{n:,}"
