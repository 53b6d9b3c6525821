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
    following = await watch(db)
    while True:
        for text in await following.look():
            say(text)
        await asyncio.sleep(EVERY)


async def watch(db: Database) -> Watch:
    """What looks for all that happens from now on."""
    async with db.conn() as conn:
        start = (await ask(db, conn, "flow_from"))[0]
    return Watch(db, Seen(start["after"]), Seen(start["after_action"]))


class Watch:
    """What was said so far: of calls, and of the rest."""

    def __init__(self, db: Database, rest: Seen, acts: Seen) -> None:
        self._db, self._rest, self._acts = db, rest, acts

    async def look(self) -> list[str]:
        """A line for each that is new, or has become something else."""
        async with self._db.conn() as conn:
            rows = await ask(self._db, conn, "flow", self._rest.after, self._acts.after, 2 * Seen.BACK)
        return [line(row) for row in sorted(rows, key=lambda row: row["at"]) if self._new(row)]

    def _new(self, row: Row) -> bool:
        return self._acts.new(row["id"], row["outputs"][0]) if row["kind"] == "act" else self._rest.new(row["id"])


class Seen:
    """Numbers that were met, and their states. They become visible in the order of commits, so the last few are asked
    for again.
    """

    BACK = 100

    def __init__(self, start: int) -> None:
        self._start = start
        self._met: dict[int, str] = {}

    @property
    def after(self) -> int:
        """Ask for what is greater than this."""
        return max(self._start, max(self._met, default=0) - self.BACK)

    def new(self, number: int, state: str = "") -> bool:
        """True the first time, and when its state is another one."""
        if self._met.get(number) == state:
            return False
        self._met[number] = state
        if len(self._met) > 4 * self.BACK:
            self._met = dict(sorted(self._met.items())[-2 * self.BACK:])
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
