"""Flow: the lines that `anton dev` and `anton serve` print: what is there, and what happens as it happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from anton.app import App
from anton.db import Database
from anton.status import Row, ask, show

EVERY = 0.2  # seconds between looks


def endpoints(app: App) -> str:
    """ "/orders POST · /github POST": what answers, in the order of declaration."""
    there = [f"{route.path} {route.method}" for route in app.routes] + [f"{hook.path} POST" for hook in app.webhooks]
    there += [f"{path or '/'} mounted" for path, _, _ in app.mounts]
    return " · ".join(there) or "no endpoints"


def banner(app: App, rows: list[Row], storage: str, url: str | None, seconds: float) -> str:
    """What is live: endpoints, schedules (rows of list_schedules), the database and how long it took to be ready."""
    live = [f"{row['name']}  {row['title']}, next {show(row['next_at'])[:16]} UTC" for row in rows
            if row["state"] == "live" and row["app"] in (app.name, "sql") and row["next_at"]]
    lines = [f"  Live endpoints   {url or ''}  {endpoints(app)}"]
    lines += [f"  {'Live schedules' if n == 0 else '':15}  {text}" for n, text in enumerate(live)]
    lines += [f"  Storages online  {storage}   ready in {seconds:.1f} s"]
    return "\n".join(lines)


async def started(server: Any, serving: asyncio.Task[Any]) -> bool:
    """Waits until a uvicorn server listens; False when it ended instead."""
    while not server.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event to wait for)
        await asyncio.sleep(0.01)
    return bool(server.started)


async def follow(db: Database, say: Callable[[str], Any] = print) -> None:
    """Says what happens from now on, a line each, until it is cancelled. Meant for one database's development."""
    async with db.conn() as conn:
        start = (await ask(db, conn, "flow_from"))[0]
    said = {"act": Seen(start["after_action"]), "rest": Seen(start["after"])}
    while True:
        async with db.conn() as conn:
            rows = await ask(db, conn, "flow", said["rest"].after, said["act"].after)
        for row in sorted(rows, key=lambda row: row["at"]):
            if said["act" if row["kind"] == "act" else "rest"].new(row["id"]):
                say(line(row))
        await asyncio.sleep(EVERY)


class Seen:
    """Numbers that were met. They become visible in the order of commits, so the last few are asked for again."""

    BACK = 100

    def __init__(self, start: int) -> None:
        self._start = start
        self._met: set[int] = set()

    @property
    def after(self) -> int:
        """Ask for what is greater than this."""
        return max(self._start, max(self._met, default=0) - self.BACK)

    def new(self, number: int) -> bool:
        """True the first time."""
        if number in self._met:
            return False
        self._met.add(number)
        if len(self._met) > 4 * self.BACK:
            self._met = set(sorted(self._met)[-2 * self.BACK:])
        return True


def line(row: Row) -> str:
    """One row of flow() for people."""
    at = row["at"].strftime("%H:%M:%S")
    if row["kind"] == "act":
        return f"{at}  act    {row['name']}  {row['outputs'][0]}  {row['detail']}"
    what = row["input"] or row["name"]
    if row["n"] > 1:
        what += f" and {row['n'] - 1:,} more"
    if row["kind"] == "dead":
        return f"{at}  dead   {what}  {row['name']}: {row['detail']}   fix, then: anton dead replay {row['id']}"
    made = ", ".join(row["outputs"])
    if row["written"] and row["written"] > len(row["outputs"]):
        made += f" … {row['written']:,} in all"
    gone = f"  ({row['detail']})" if row["detail"] else ""
    return f"{at}  think  {what}  {row['name']}{' -> ' + made if made else ''}  {row['ms'] or 0:.1f} ms{gone}"
