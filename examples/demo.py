"""make demo: the quick start on real input, from a signed request to a captured reply, on a Postgres that came along.

    python -m examples.demo [--mentions 500] [--records 200000]

Starts the embedded Postgres, migrates, and runs web and worker as users would, as processes of their own. All that is
printed is read back from the database: edit examples/slack_ai_bot and run it again, and the output follows. Nothing
ever leaves this machine, whatever keys the shell holds.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from anton import config, flow, people
from anton.app import App, load_app
from anton.component import Component, components_of
from anton.db import Database, identifier, literal
from anton.errors import AntonError
from anton.migrate import migrate
from anton.secret import Env
from anton.verify import SCHEMES

BOT = Path(__file__).with_name("slack_ai_bot")
SPEED = Path(__file__).with_name("throughput")

MENTION = "what's for lunch?"
CHANNEL = "#lunch"
ABOUT_MONEY = "may I have a refund?"                                   # the bot lets a person see such replies
FROM_SQL = "hello from SQL"
LEASE = "1 s"
AT_ONCE = 16                                                           # requests under way, when there are many
ACTED = "from {anton}.action where id > $1 and state in ('captured', 'sent')"
PATIENCE = 45.0                                                        # seconds for anything to happen
LIVE = "select count(*) from {anton}.workers() where state = 'live' and app = $1 and started_at > $2"


class Failed(Exception):
    """The demo did not go as it should; the text says what happened."""


class Processes:
    """The processes of the demo. Their databases and keys come from here, never from the shell."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        self.environment = clean | keys | {"DATABASE_URL": url, "ANTON_EFFECTS": "offline", "PYTHONUNBUFFERED": "1"}
        self._running: list[subprocess.Popen[str]] = []

    def anton(self, folder: Path, *words: str) -> str:
        """Runs a command to its end and returns what it printed."""
        done = subprocess.run(self._words(words), cwd=folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"$ anton {shlex.join(words)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, folder: Path, *words: str) -> subprocess.Popen[str]:
        """Starts one that runs on, in a process group of its own."""
        process = subprocess.Popen(
            self._words(words), cwd=folder, env=self.environment, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._running.append(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9, with all that it started."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._running.remove(process)

    def stop(self) -> None:
        """Ends all of them, as a service manager would."""
        for process in self._running:
            process.send_signal(signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._running.clear()

    def ended(self) -> str | None:
        """What a process said that ended by itself."""
        for process in self._running:
            if process.poll() is not None:
                assert process.stdout is not None
                return f"$ {shlex.join(process.args[2:])}\n{process.stdout.read()}"  # type: ignore[index]
        return None

    def _words(self, words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-c", "from anton.cli import main; raise SystemExit(main())", *words]


@dataclass
class Hop:
    """One line of what came of a record. ms: since the line before."""

    part: str
    record: str
    what: str
    ms: float
    more: str = ""

    def __str__(self) -> str:
        return f"   {self.part:<6} {self.record:<20} {self.what:<46} {self.ms:+8.1f} ms   {self.more}".rstrip()

    def asked(self) -> str:
        """The same of something that waits."""
        return f"   {self.part:<6} {self.record:<20} {self.what}   waits, and holds no worker"


class Demo:
    """The acts of the demo, in turn."""

    def __init__(self, mentions: int, records: int) -> None:
        self.mentions = mentions
        self.records = records
        self.began = time.perf_counter()
        self.settings = config.load(BOT)
        self.bot = _snapshot(load_app(None, BOT))
        self.keys = {secret.name: secrets.token_hex(16) for declared in (*self.bot.routes, *self.bot.webhooks)
                     for secret in declared.secrets if isinstance(secret, Env)}
        os.environ.update(self.keys)
        self.target = config.find_target(self.settings, "embedded")
        self.db = Database(self.target.url, self.target.schema, source="make demo")
        self.processes = Processes(self.target.url, self.keys)
        self.port = _free_port(self.settings.settings.deployment.port)
        self.entry = next(route for route in (*self.bot.routes, *self.bot.webhooks) if route.verify == "slack")

    async def run(self) -> None:
        """All acts. Raises Failed."""
        self.conn = await self.db.connect()
        try:
            await self.start()
            try:
                await self.one_mention()
                await self.plain_sql()
                await self.pulled_plug()
                await self.throughput()
                await self.person_decides()
                self.farewell()
            finally:
                await self.sql("update {anton}.setting set value = $1 where name = 'lease'", self.lease)
                self.processes.stop()
        finally:
            await self.conn.close()
            await self.db.close()

    async def sql(self, query: str, *args: Any) -> list[Any]:
        """Rows of a query; {anton} is the runtime's schema."""
        return await self.conn.fetch(query.replace("{anton}", identifier(self.db.schema)), *args)

    async def one(self, query: str, *args: Any) -> Any:
        """The first value of the first row, None without one."""
        rows = await self.sql(query, *args)
        return rows[0][0] if rows else None

    async def until(self, query: str, *args: Any, what: str) -> Any:
        """Asks again and again until the first value is true; returns it."""
        deadline = time.perf_counter() + PATIENCE
        while not (found := await self.one(query, *args)):
            dead = await self.sql("select * from {anton}.list_dead(null, 3) where id > $1", self.mark)
            if dead:
                raise Failed("\n".join(f"   dead   {d['record']}  {d['handler']}: {d['error']}   fix, then: "
                                       f"anton dead replay {d['handler']}" for d in dead))
            if ended := self.processes.ended():
                raise Failed(f"a process ended:\n{ended}")
            if time.perf_counter() > deadline:
                raise Failed(f"no {what} within {PATIENCE:.0f} s. anton status says:\n"
                             f"{self.processes.anton(BOT, 'status')}")
            await asyncio.sleep(0.003)
        return found

    # The acts

    async def start(self) -> None:
        """Everything online, and the header that says so."""
        version = importlib.metadata.version("anton-framework").removesuffix(".0")
        server = (await self.one("show server_version")).split()[0].split(".")[0]
        print(f"Anton {version} · {self.bot.name} · Postgres {server} (embedded, .anton/postgres) · capturing: nothing "
              "leaves this machine", flush=True)
        await migrate(self.db, self.bot)
        self.mark: int = await self.one("select nextval('{anton}.change_seq')")
        before = await self.one("select value from {anton}.setting where name = 'lease'")
        self.lease = "30 s" if before == LEASE else before             # a demo that was killed left ours
        await self.sql("update {anton}.setting set value = $1 where name = 'lease'", LEASE)
        self.processes.start(BOT, "serve", "--port", str(self.port))
        self.worker = self.processes.start(BOT, "work")
        await self.until(LIVE, self.bot.name, await self.begun(), what="worker")
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)
        await self.web_is_up()
        await self.until("select bool_and(next_at is not null) from {anton}.schedule where enabled", what="plan")
        schedules = [dict(row) for row in await self.sql("select * from {anton}.list_schedules()")]
        print(flow.banner(self.bot, schedules, self.settings.storage.name, f"http://localhost:{self.port}",
                          time.perf_counter() - self.began), end="\n\n", flush=True)

    async def one_mention(self) -> None:
        """A signed mention over http, followed hop by hop."""
        print(f"1. Someone mentions the bot{'':<35}POST {self.entry.path}  \"@anton {MENTION}\"", flush=True)
        sent = time.time()
        took = await self.mention(MENTION, "1515449522.000016")
        trace = await self.until(f"select trace {ACTED}", self.actions, what="reply")
        self.first = await self.follow(trace, sent, took)
        sent = time.time()
        await self.mention(MENTION, "1515449523.000016")
        await self.until(f"select count(*) = 2 {ACTED}", self.actions, what="second reply")
        again: datetime = await self.one("select max(changed_at) from {anton}.action")
        all_ms = (again.timestamp() - sent) * 1000
        print(f"   {'':<6} {'and once more, now that all is warm':<67} {all_ms:8.1f} ms in all", flush=True)

    async def plain_sql(self) -> None:
        """The same from a plain insert, by psql."""
        print("2. Any writer is an event. This is plain psql:")
        table, field = self.thinking()
        if self.bot.tables[table].model is None:
            insert = f"insert into {identifier(table)} (data) values ({literal(json.dumps({field: FROM_SQL}))})"
        else:
            insert = f"insert into {identifier(table)} ({identifier(field)}) values ({literal(FROM_SQL)})"
        print(f"   $ anton psql -c {json.dumps(insert)}", flush=True)
        last = await self.one("select max(id) from {anton}.action")
        self.processes.anton(BOT, "psql", "-c", insert)
        trace = await self.until(f"select trace {ACTED}", last, what="reply")
        hops = await self.hops(trace, None)
        reply = next(hop for hop in hops if hop.part == "act")
        reply.ms = sum(hop.ms for hop in hops)
        print(reply, flush=True)

    async def pulled_plug(self) -> None:
        """Many mentions, and a kill -9 halfway."""
        print(f"3. Now we pull the plug: {self.mentions} more mentions, worker killed (kill -9) halfway", flush=True)
        start = await self.one("select max(id) from {anton}.action")
        stamps = [f"{1600000000 + n}.{self.mark % 1_000_000:06}" for n in range(self.mentions)]
        before, unplugged = self.mentions * 3 // 4, asyncio.Event()    # the last quarter comes after the kill
        posting = asyncio.create_task(self.post_all(stamps, before, unplugged))
        try:
            half = ("select count(*) >= $3 or count(*) >= $2 and exists (select from {anton}.lease) "
                    "from {anton}.action where id > $1 and state in ('captured', 'sent')")
            await self.until(half, start, self.mentions // 2, before, what="half of the replies")
            self.processes.kill(self.worker)
            unplugged.set()
            killed: datetime = await self.one("select {anton}.now()")
            held = await self.one("select coalesce(sum(hi - lo + 1), 0) from {anton}.lease")
            known = await self.one("select max(id) from {anton}.worker")
            self.worker = self.processes.start(BOT, "work")
            await posting
        finally:
            posting.cancel()
        answered = ("select count(distinct args ->> 'thread_ts') = $2 from {anton}.action where id > $1 "
                    "and args ->> 'thread_ts' = any ($3) and state in ('captured', 'sent')")
        await self.until(answered, start, self.mentions, stamps, what="the rest of the replies")
        await self.until("select not exists (select from {anton}.job union all select from {anton}.lease)", what="end")
        rows = await self.sql("select s, count(a.id) as n from unnest($2::text[]) s left join {anton}.action a "
                              "on a.args ->> 'thread_ts' = s and a.id > $1 group by s", start, stamps)
        back = await self.one("select min(at) from {anton}.receipt where worker_id > $1", known)
        replies, lost = sum(row["n"] for row in rows), sum(row["n"] == 0 for row in rows)
        doubled = sum(row["n"] > 1 for row in rows)
        print(f"   {len(rows)} in, {replies} replies. Lost {lost}, doubled {doubled}. {held} were in its hands. Work "
              f"resumed {(back - killed).total_seconds():.1f} s after the kill (lease set to {LEASE} here)", flush=True)
        if lost or doubled:
            raise Failed("records were lost or doubled")

    async def throughput(self) -> None:
        """Many records through one Python handler, by SQL."""
        speed = _snapshot(load_app(None, SPEED))
        await migrate(self.db, speed)
        handler = next(iter(speed.handlers.values()))
        source = handler.table.name
        goals = [name for name in speed.tables if name != source]
        await self.sql(f"truncate {', '.join(map(identifier, speed.tables))}")
        self.processes.start(SPEED, "work")
        await self.until(LIVE, speed.name, await self.begun(), what="worker")
        start = await self.one("select {anton}.now()")
        await self.sql(f"insert into {identifier(source)} (data) select jsonb_build_object('n', n) "
                       "from generate_series(1, $1::int) n", self.records)
        settled = ("select coalesce(sum(n), 0) from {anton}.receipt r join {anton}.handler h on h.id = r.handler_id "
                   "where h.app = $1 and r.at > $2")
        await self.until(f"select ({settled}) >= $3", speed.name, start, self.records, what="end")
        end = await self.one("select max(r.at) from {anton}.receipt r join {anton}.handler h on h.id = r.handler_id "
                             "where h.app = $1", speed.name)
        done = await self.one(settled, speed.name, start)
        out = [await self.one(f"select count(*) from {identifier(name)}") for name in goals]
        seconds = (end - start).total_seconds()
        rate = done / seconds
        once = "exactly once" if {done, *out} == {self.records} else f"NOT exactly once: {done} handled, {out} written"
        print(f"4. And it is quick: {self.records:,} records through a Python handler, {once}: {seconds:.1f} s = "
              f"{rate:,.0f}/s on this machine\n   A billion a second needs about {1e9 / rate:,.0f} such machines. "
              "We print that because you were going to ask.", flush=True)
        if once != "exactly once":
            raise Failed("records were lost or doubled")

    async def person_decides(self) -> None:
        """A reply that waits for a person, who signs in and approves it over http."""
        if not any(action.approve for action in self.bot.actions.values()):
            return
        print(f"5. What matters waits for a person{'':<28}POST {self.entry.path}  \"@anton {ABOUT_MONEY}\"",
              flush=True)
        await self.sql("select {anton}.put_person('you', null, null, '{*}')")
        last = await self.one("select coalesce(max(id), 0) from {anton}.approval")
        await self.mention(ABOUT_MONEY, f"{1700000000 + last}.{self.mark % 1_000_000:06}")
        id = await self.until("select id from {anton}.approval where id > $1 and state = 'pending'", last,
                              what="question")
        base = str(self.http.base_url).rstrip("/")
        await self.http.post(await people.link(self.db, "you", base))  # signs in: the client keeps the cookie
        page = (await self.http.get(f"/inbox/{id}")).text
        form = {name: re.search(rf'name="{name}" value="(\w+)"', page) for name in ("csrf", "sha256")}
        filled = {name: found[1] for name, found in form.items() if found}
        answer = await self.http.post(f"/inbox/{id}", data={**filled, "decision": "approve"})
        if not str(answer.headers.get("location", "")).endswith("?done"):
            raise Failed(f"POST /inbox/{id}: {answer.status_code} {answer.text[:500]}")
        await self.until("select state in ('captured', 'sent') from {anton}.action where approval_id = $1", id,
                         what="reply")
        row, = await self.sql("select p.preview, p.decided_by, p.decided_via, c.state, "
                              "extract(epoch from c.changed_at - p.decided_at) * 1000 as ms from {anton}.approval p "
                              "join {anton}.action c on c.approval_id = p.id where p.id = $1", id)
        print(Hop("ask", f"approval/{id}", f'"{row["preview"]}"', 0.0).asked())
        print(Hop("act", f"POST /inbox/{id}", f"approved by {row['decided_by']}, via {row['decided_via']}",
                  float(row["ms"]), row["state"]), flush=True)

    def farewell(self) -> None:
        """Where to go from here."""
        where = os.path.relpath(BOT)
        print(f"The inbox, while anton dev runs there: http://localhost:{self.port}/inbox      "
              "It prints a link that signs you in")
        print(f"Why did it say that?   (cd {where} && anton why {self.first})      "
              "Make it yours: anton new mybot && cd mybot && anton dev")
        activate = Path(sys.executable).with_name("activate")
        if shutil.which("anton") is None and activate.exists():
            print(f"(anton is not on your PATH yet: source {os.path.relpath(activate)})")

    # Its parts

    async def begun(self) -> datetime:
        """The database's time when this run's processes were started, at the latest."""
        ago = time.perf_counter() - self.began
        at: datetime = await self.one("select {anton}.now() - make_interval(secs => $1)", ago)
        return at

    async def web_is_up(self) -> None:
        """Waits for /ready."""
        self.actions: int = await self.one("select coalesce(max(id), 0) from {anton}.action")
        deadline = time.perf_counter() + PATIENCE
        while True:
            try:
                if (await self.http.get("/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if (ended := self.processes.ended()) or time.perf_counter() > deadline:
                raise Failed(f"the web process is not there:\n{ended or 'no answer'}")
            await asyncio.sleep(0.01)

    async def mention(self, text: str, stamp: str) -> float:
        """Posts one signed app_mention; returns the milliseconds until the 200."""
        body = json.dumps({
            "team_id": "T061EG9RZ", "api_app_id": "A0FFV41KK", "type": "event_callback",
            "event_id": f"Ev{stamp}", "event_time": int(float(stamp)), "authorizations": [{"user_id": "U0LAN0Z89"}],
            "event": {"type": "app_mention", "user": "U061F7AUR", "text": f"<@U0LAN0Z89> {text}", "ts": stamp,
                      "channel": CHANNEL, "event_ts": stamp}}).encode()
        secret = self.keys[self.entry.secrets[0].name]
        headers = SCHEMES["slack"].sign(body, secret, str(int(time.time()))) | {"Content-Type": "application/json"}
        began = time.perf_counter()
        response = await self.http.post(self.entry.path, content=body, headers=headers)
        took = (time.perf_counter() - began) * 1000
        if response.status_code // 100 != 2:
            raise Failed(f"POST {self.entry.path}: {response.status_code} {response.text}")
        return took

    async def post_all(self, stamps: list[str], first: int, rest: asyncio.Event) -> None:
        """Posts many, some at a time; what comes after the `first` waits for `rest`."""
        waiting = iter(list(enumerate(stamps, 1)))

        async def post() -> None:
            for n, stamp in waiting:
                if n > first:
                    await rest.wait()
                await self.mention(f"{MENTION} #{n}", stamp)

        await asyncio.gather(*(post() for _ in range(AT_ONCE)))

    async def follow(self, trace: int, sent: float, took: float) -> str:
        """Prints the hops of a mention; returns the record it began as."""
        hops = await self.hops(trace, None)
        root = await self.root(trace)
        print(f"   {'sense':<6} {root:<20} {'committed, then 200':<46} {took:8.1f} ms")
        last: datetime = await self.one("select max(changed_at) from {anton}.action where trace = $1", trace)
        hops[-1].more += f"   {(last.timestamp() - sent) * 1000:.1f} ms in all"
        for hop in hops:
            print(hop, flush=True)
        return root

    async def root(self, trace: int) -> str:
        """The record that a trace began with, as table/key."""
        name: str = await self.one(
            "select {anton}.record_name(h.table_id, i.key) from {anton}.receipt r "
            "join {anton}.handler h on h.id = r.handler_id, lateral {anton}.inputs(r.id) i "
            "where i.change_id = $1 order by r.id limit 1", trace)
        return name

    async def hops(self, trace: int, since: datetime | None) -> list[Hop]:
        """What came of a record, handler by handler, with the time each took to commit."""
        table, _, key = (await self.root(trace)).rpartition("/")
        before: datetime | None = await self._created(f"{table}/{key}")
        hops, seen = [], set()
        senders = {action.sender.name for action in self.bot.actions.values()}
        for line in await self.sql("select * from {anton}.why($1, $2) where level > 0 and at is not null", table, key):
            if line["receipt_id"] in seen:
                continue
            ms = (line["at"] - before).total_seconds() * 1000 if before else 0.0
            acted = "select * from {anton}.action where cause = $1 and trace = $2"
            acts = await self.sql(acted, line["receipt_id"], trace)
            seen.add(line["receipt_id"])
            if line["handler"] in senders:                             # what it did is told where it was asked for
                continue
            before = line["at"]
            component = components_of(self.bot).get(line["handler"])
            if acts:
                before = acts[-1]["changed_at"]
                ms += (before - line["at"]).total_seconds() * 1000
                service = component.service.lower() if component else acts[0]["name"]
                args, state = acts[0]["args"], acts[0]["state"]
                said = f'"{args.get("text", "")}"'
                hops.append(Hop("act", f"{service} → {args.get('channel', '')}", said, ms, state))
            elif line["record"]:
                what, more = await self._thought(line["record"], line["handler"], component)
                hops.append(Hop("think", line["record"], what, ms, more))
        return hops

    async def _thought(self, record: str, handler: str, component: Component | None) -> tuple[str, str]:
        if component is None:
            return handler, ""
        row = await self._row(record)
        echo = f" (echo: set {component.variable})" if row.get("model") == "echo" else ""
        cost = row.get("cost")
        return handler + echo, "" if cost is None else f"${cost:.4f}"

    async def _row(self, record: str) -> dict[str, Any]:
        table, _, key = record.rpartition("/")
        row = await self.sql(f"select to_jsonb(t) as row from {identifier(table)} t where id::text = $1", key)
        found: dict[str, Any] = row[0]["row"] if row else {}
        data = found.get("data")
        return {**found, **data} if isinstance(data, dict) else found

    async def _created(self, record: str) -> datetime | None:
        row = await self._row(record)
        return datetime.fromisoformat(row["created_at"]) if "created_at" in row else None

    def thinking(self) -> tuple[str, str]:
        """The table that the app's model reads, and the field it reads there."""
        name, component = next((name, c) for name, c in components_of(self.bot).items() if not c.acts)
        return self.bot.handlers[name].table.name, component.map.get("prompt", "prompt")


def _snapshot(loaded: App) -> App:
    """A copy of what was declared; loading another app clears the original."""
    copy = App(loaded.name, loaded.folder)
    vars(copy).update(vars(loaded))
    return copy


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            free: int = probe.getsockname()[1]
            return free
    raise Failed("no free port")


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mentions", type=int, default=500, help="how many while the worker is killed")
    parser.add_argument("--records", type=int, default=200_000, help="how many through the Python handler")
    chosen = parser.parse_args()
    try:
        asyncio.run(Demo(chosen.mentions, chosen.records).run())
    except (Failed, AntonError) as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
