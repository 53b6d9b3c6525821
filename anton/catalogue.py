"""Catalogue: the lanes a worker has, from what the database says of its handlers and from the code it has for them.

And the existing rows that are fed to those that are backfilled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from anton import queue
from anton.app import App
from anton.call import code_of
from anton.db import Database, quote
from anton.gate import Gate
from anton.handler import EACH_CALLS
from anton.lane import Lane, lane_of
from anton.order import Order, OutOfOrder
from anton.permits import Permits
from anton.rank import PRIORITY
from anton.rate import Tap
from anton.relation import describe_all
from anton.starts import Starts


async def read_lanes(db: Database, app: App, known: Mapping[int, Lane]) -> dict[int, Lane]:
    """Handlers of this app that the code still has, and SQL handlers made from psql, by id.

    Lanes that are known stay the same objects; one that was dropped stays while it is at work.
    """
    async with db.conn() as conn:
        rows = await db.call(conn, "catalogue", app.name)
        limits = {row[0]: (row[1], row[2]) for row in await db.call(conn, "limits")}
        orders = await queue.orders(db, conn)
        rates = {row[0]: math.ceil(row[2] * 1e6 / row[3]) for row in await db.call(conn, "rates")}
        key_rates = {row[0]: (row[2], row[3]) for row in await db.call(conn, "key_rates")}
        models = {row[0] for row in await db.call(conn, "refreshers")}
        priorities = {row[0]: row[1] for row in await db.call(conn, "priorities")}
        weights = {row[0]: row[1] for row in await db.call(conn, "tenant_weights")}
    makers = {table.name: table.make for table in app.tables.values() if table.make is not None}
    lanes: dict[int, Lane] = {}
    codes = {row["id"]: code_of(app, row["name"]) if row["kind"] == "python" and row["app"] == app.name else None
             for row in rows}
    names = {row["id"]: f"{quote(row['schema_name'])}.{quote(row['table_name'])}" for row in rows if codes[row["id"]]}
    relations = await describe_all(db, set(names.values()))
    for row in rows:
        code = codes[row["id"]]
        if row["kind"] == "python" and code is None:
            continue                                                   # no code for it here: its jobs wait
        lane = lane_of(row, code)
        lane.model = lane.id in models
        lane.priority = priorities.get(lane.id, PRIORITY)
        lane.waiting.weights = weights
        if lane.id in limits:
            most, per = limits[lane.id]
            if lane.id in orders:
                _order(lane, known.get(lane.id), orders[lane.id])
            else:
                _limit(lane, known.get(lane.id), most, per, key_rates.get(lane.id))
        _tap(lane, known.get(lane.id), rates.get(lane.id))
        if code is not None:
            code.relation = relations.get(names[row["id"]])            # None: reading it will say so; it waits
            handler = app.handlers.get(row["name"])
            lane.make = makers.get(handler.table.name) if handler is not None else None
            lane.document = code.relation is not None and code.relation.document and lane.make is None
        old = known.get(lane.id)
        if old is not None:
            _change_order(lane, old)
            gate = old.gate
            old.turn_into(lane)
            if gate is not None and gate is not lane.gate:
                old.items.extendleft(reversed(gate.close()))           # to the new one, or to none
        lanes[lane.id] = old or lane
    for id, lane in known.items():
        if id not in lanes and not lane.idle:                          # dropped while at work: let it finish
            lanes[id] = lane
    return lanes


def _limit(lane: Lane, known: Lane | None, most: int, per: str | None, rate: tuple[int, int] | None) -> None:
    """Gives a lane its permits, or those it has already. With per= one is all: it has the handler, and a gate, where
    each key may have a rate: starts in so many microseconds."""
    if per is None:
        _permits(lane, known, most, 1)
    else:
        lane.concurrency = max(EACH_CALLS, most)
        _permits(lane, known, 1, lane.concurrency)
        gate = known.gate if known is not None else None
        lane.gate = gate if gate is not None and gate.column == per else Gate(per, most)
        lane.gate.most = most
        if rate is not None and lane.gate.starts is None:
            lane.gate.starts = Starts(*rate)
        elif rate is not None and lane.gate.starts is not None:
            with lane.gate.lock:
                lane.gate.starts.set(*rate)
        else:
            lane.gate.starts = None


def _order(lane: Lane, known: Lane | None, per: str | None) -> None:
    """One permit is all: with it come the handler and the order of its records, as many at a time as it says."""
    _permits(lane, known, 1, lane.concurrency)
    old = known.order if known is not None else None
    lane.order = old if old is not None and old.column == per and not old.over else Order(per)


def _change_order(lane: Lane, known: Lane) -> None:
    """Where its order is another one now, or none, what runs goes on, and all else goes back before that counts."""
    old = known.order
    if old is not None and old is not lane.order and known.calls:
        old.leave_to(lane.order)
        lane.order = old
        if known.down is None:
            known.down = OutOfOrder()


def _permits(lane: Lane, known: Lane | None, most: int, each: int) -> None:
    """The same object as ever, which knows what is held. Of fewer than there were none may be left: it asks anew."""
    lane.permits = known.permits if known is not None and known.permits is not None else Permits(most)
    if most < lane.permits.most:
        lane.permits.held = 0
    lane.permits.most, lane.permits.each = most, each


def _tap(lane: Lane, known: Lane | None, a_second: int | None) -> None:
    """Gives a lane with a rate its tap, or the one it has already; what waits at one that is taken out goes back."""
    tap = known.tap if known is not None else None
    if a_second is not None:
        lane.tap = tap or Tap()
        lane.tap.a_second = a_second
    elif tap is not None:
        tap.closed = True


async def feed(db: Database, lanes: Iterable[Lane]) -> int:
    """Feeds existing rows to handlers that are backfilled. How many; more than 0 while more is to be seen."""
    fed = 0
    for lane in list(lanes):
        if lane.feeding and not lane.waiting and not lane.ready:
            async with db.conn() as conn:
                n = await db.call_value(conn, "feed", lane.id)
            lane.feeding = n is not None
            lane.ready = bool(n and n > 0)
            fed += 0 if n is None else max(n, 1)
    return fed
