"""The app that is worked under chaos. Outputs have no unique key, so that a second one would be seen."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from typing import Any

from anton import Ctx, Files, Records, Table, Webhook, cron, poll, sql
from anton import load as loads
from anton.errors import WorldError
from anton.sense import Request, post
from chaos import points

src = Table("public.src")
ups = Table("public.ups")
out_batch = Table("public.out_batch")
out_each = Table("public.out_each")
out_chain = Table("public.out_chain")
out_sql = Table("public.out_sql")
out_ups = Table("public.out_ups")
counter = Table("public.counter")
tally = Table("public.tally")
risky = Table("public.risky")
out_risky = Table("public.out_risky")
shaky = Table("public.shaky")
out_shaky = Table("public.out_shaky")
outside = Table("public.outside")
out_outside = Table("public.out_outside")
load = Table("public.load")
out_load = Table("public.out_load")
near = Table("public.near")
out_near = Table("public.out_near")
odd = Table("public.odd")
out_odd = Table("public.out_odd")
slow = Table("public.slow")
out_slow = Table("public.out_slow")
drift = Table("public.drift")
out_drift = Table("public.out_drift")
out_drift_sql = Table("public.out_drift_sql")
out_kept = Table("public.out_kept")
clash = Table("public.clash")
out_clash = Table("public.out_clash")
out_ask = Table("public.out_ask")
out_lots = Table("public.out_lots")
out_strike = Table("public.out_strike")
shared = Table("public.shared")
gated = Table("public.gated")
out_hold = Table("public.out_hold")
out_alone = Table("public.out_alone")
out_inorder = Table("public.out_inorder")
paced = Table("public.paced")
out_paced = Table("public.out_paced")
ping = Table("public.ping")
pong = Table("public.pong")
hooked = Table("hooked")
Webhook("/hook", hooked, verify="github", secret="what the senders of chaos sign with")


@src.on_new_records(batch=50)
def batch(records: Records[Any]) -> None:
    points.reach("mid_handler")
    time.sleep(0.005)
    for record in records:
        out_batch.append({"src": record["id"]})


@src.on_new_records(each=True, concurrency=8, backoff="100ms")
async def each(record: Any, ctx: Any) -> None:
    points.reach("mid_each")
    out_each.append({"src": record["id"]})
    if record["kind"] == "flaky" and ctx.attempt == 1:
        raise RuntimeError("not the first time")


src.on_new_records.sql("insert into public.out_sql (src) select id from new_records", name="copy", into=out_sql)


@src.on_new_records(batch=50)
def count(records: Records[Any]) -> None:
    for first in range(0, len(records), 10):  # each write holds the one row from all others
        counter.select(id=0).update(n=sql("n + {more}", more=min(10, len(records) - first)))


@out_batch.on_new_records
def chain(records: Records[Any]) -> None:
    for record in records:
        out_chain.append({"src": record["src"]})


@ups.on_changes
def changes(records: Records[Any]) -> None:
    for change in records.changes:
        out_ups.append({"src": change.key, "v": change.new["v"]}, of=change.new)


@ups.on_new_records(each=True, concurrency=2, read="change")
def add(record: Any) -> None:
    row = tally.get(record["id"] % 2)
    assert row is not None
    tally.select(id=row["id"]).update(n=row["n"] + 1)


@risky.on_new_records(batch=50)
def risk(records: Records[Any]) -> None:
    for record in records:
        if record["kind"] == "poison":
            points.note("poison")
            os.kill(os.getpid(), signal.SIGKILL)
        out_risky.append({"src": record["id"]})


shaky.on_new_records.sql(
    "insert into public.out_shaky (src) select id / case when kind = 'bad' then 0 else 1 end from new_records",
    name="shake",
    into=out_shaky,
    attempts=2,
    backoff="100ms",
)


@outside.on_new_records(batch=100, concurrency=1)
def call(records: Records[Any]) -> None:
    if points.world_is_down():
        raise WorldError("the world is away")
    time.sleep(len(records) / 1000)
    for record in records:
        out_outside.append({"src": record["id"]})


@load.on_new_records(batch=100, concurrency=1)
def work(records: Records[Any]) -> None:
    time.sleep(len(records) / 1000)
    out_load.extend({"src": record["id"]} for record in records)


@near.on_new_records
def pick_up(records: Records[Any]) -> None:
    at = time.monotonic_ns()
    out_near.extend({"src": record["id"], "at": at} for record in records)


@odd.on_new_records(batch=20, timeout="1s", attempts=2, backoff="100ms")
def bear(records: Records[Any]) -> None:
    for record in records:
        if record["kind"] == "hang":
            time.sleep(20)  # in C: nothing interrupts it
        elif record["kind"] == "spin":
            end = time.monotonic() + 20
            while time.monotonic() < end:
                pass
        elif record["kind"] == "hungry":
            hoard: list[bytearray] = []
            try:
                while len(hoard) < 4096:
                    hoard.append(bytearray(1 << 20))
            finally:
                time.sleep(0.2)  # the others, too, find nothing left meanwhile
        out_odd.append({"src": record["id"]})


@slow.on_new_records(batch=20)
async def block(records: Records[Any]) -> None:
    for record in records:
        if record["kind"] == "block":
            time.sleep(2.5)  # noqa: ASYNC251 - the whole loop
        out_slow.append({"src": record["id"]})


@drift.on_new_records(batch=20)
def follow(records: Records[Any]) -> None:
    for record in records:
        assert record["v"]
        out_drift.append({"src": record["id"]})


drift.on_new_records.sql(
    "insert into public.out_drift_sql (src) select id from new_records where w <> ''",
    name="follow_sql",
    into=out_drift_sql,
)


@drift.on_new_records(batch=20)
def keep(records: Records[Any]) -> None:
    for record in records:
        out_kept.append({"src": record["id"], "v": "kept"})


@clash.on_new_records(batch=5, concurrency=2)
def up(records: Records[Any]) -> None:
    for record in records:
        for id in (1, 2, 3, 4):
            shared.select(id=id).update(n=sql("n + 1"))
        out_clash.append({"src": record["id"]})


@clash.on_new_records(batch=5, concurrency=2)
def down(records: Records[Any]) -> None:
    for _ in records:
        for id in (4, 3, 2, 1):
            shared.select(id=id).update(n=sql("n + 1"))


clash.on_new_records.sql(
    "with slowly as materialized (select count(*) as n from new_records), "
    "a as (update public.shared set n = shared.n + slowly.n from slowly where id = 3 returning 1), "
    "b as (update public.shared set n = shared.n + slowly.n from slowly, a where id = 2) select 1",
    name="across",
    into=shared,
)


@gated.on_new_records(each=True, concurrency=3)
async def hold(record: Any) -> None:
    points.note("in", handler="hold", key=0, id=record["id"])
    await asyncio.sleep(0.03)
    points.note("out", handler="hold", key=0, id=record["id"])
    out_hold.append({"src": record["id"]})


@gated.on_new_records(each=True, concurrency=1, per="kind")
def alone(record: Any) -> None:
    points.note("in", handler="alone", key=record["kind"], id=record["id"])
    time.sleep(0.03)
    points.note("out", handler="alone", key=record["kind"], id=record["id"])
    out_alone.append({"src": record["id"]})


@gated.on_new_records(each=True, ordered=True, per="kind", attempts=1000, backoff="50ms")
async def inorder(record: Any) -> None:
    points.note("in", handler="inorder", key=record["kind"], id=record["id"])
    await asyncio.sleep(0.01)
    points.note("out", handler="inorder", key=record["kind"], id=record["id"])
    if random.random() < 0.05:
        raise ValueError("now and then")
    out_inorder.append({"src": record["id"]})


@paced.on_new_records(each=True, rate="100/5s")
async def pace(record: Any) -> None:
    points.note("start", handler="pace", id=record["id"])
    out_paced.append({"src": record["id"]})


@ping.on_new_records
def to_pong(records: Records[Any]) -> None:
    for record in records:
        pong.append({"hop": record["hop"] + 1})


@pong.on_new_records
def to_ping(records: Records[Any]) -> None:
    for record in records:
        ping.append({"hop": record["hop"] + 1})


@post("/put")
def put(request: Request) -> dict[str, int]:
    id = request.json()["id"]
    src.append({"id": id, "kind": "http"})
    return {"id": id}


@poll(every="1h", into=out_ask)
async def ask(cursor: int | None) -> tuple[list[dict[str, int]], int]:
    """What a service has that numbers its rows: those after the cursor. No key, so that a doubled row would be seen."""
    (row,) = await sql("select n from service")
    points.reach("mid_poll")
    return [{"src": n} for n in range((cursor or 0) + 1, row["n"] + 1)], row["n"]


@cron.every("1h", misfire="all", overlap="parallel")
def strike(ctx: Ctx) -> None:
    points.reach("mid_firing")
    assert ctx.planned_at is not None
    out_strike.append({"src": int(ctx.planned_at.timestamp())})


loads.READ, loads.RAW = 2_000, 4_000  # many pieces, so that there are places to be killed at
Files("disk", "*.csv", every="1h", settle=0, name="lots").load(into=out_lots, backoff="100ms")
