"""Read: from leased jobs to the records that a handler gets.

    read = "now"      the row as it is at the fetch; gone since: settled, counted
    read = "change"   the image as it was committed; where there is none (a degraded change), the row of now

One key twice in a batch arrives once, and both changes settle with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any, cast

import asyncpg

from anton import queue
from anton.db import Conn, Database
from anton.lane import Batch, Lane
from anton.queue import Job, array
from anton.rebuilt import EVENTS as BUILDS
from anton.rebuilt import event_of
from anton.record import Change, ChangeOp, Document, LostColumn, Record, Row, Short

OPS: dict[str, ChangeOp] = {"n": "new", "u": "updated", "d": "deleted", "t": "truncate", "r": "rebuilt", "f": "failed"}
_ANY = " = any ((select $1::bigint[])::bigint[])"
BY_KEY = " = any ((select $1::text)::bigint[])"                        # a plan for any number of keys: by index
BY_RANGE = " between $1::bigint and $2::bigint"
EVENTS = frozenset("trf")  # of a table, not of a record


@dataclass(slots=True)
class Inputs:
    """What a call is made with. items: the records; rows: as they came, for the versions of later updates.

    first: position in the batch of each item, None: its own number. gone: positions of vanished records. twins:
    further positions of an item whose key comes more than once. broken: rows that do not fit the table's model. events:
    there are events of the table among them, whose item is None. width: bytes of the widest rows, about. order: with
    ordered=, the key of each item.
    """

    batch: Batch
    items: Sequence[Any]
    rows: Sequence[Any] = ()
    first: list[int] | None = None
    gone: list[int] = field(default_factory=list)
    twins: dict[int, list[int]] = field(default_factory=dict)
    broken: dict[int, Exception] = field(default_factory=dict)
    images: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    events: bool = False
    width: float = 1.0
    order: list[Hashable] = field(default_factory=list)

    def positions(self, items: Iterable[int]) -> list[int]:
        """Where these items and their twins are in the batch, rising."""
        if self.first is None:
            return sorted(items)
        return sorted(chain.from_iterable((self.first[item], *self.twins.get(item, ())) for item in items))

    def changes(self) -> list[Change[Any]]:
        """A Change for each item."""
        return [self.change(item) for item in range(len(self.items))]

    def change(self, item: int) -> Change[Any]:
        """The Change of one item."""
        job, ordinal = self.batch.at(item if self.first is None else self.first[item])
        record = self.items[item]
        old, new = self.images.get(item) or ((record, None) if job.op == "d" else (None, record))
        key = None if job.op in BUILDS else job.key(ordinal)
        if isinstance(key, list):
            key = tuple(key) if len(key) > 1 else key[0]
        return Change(OPS[job.op], key, old, new, job.attempt + 1,
                      job.origin or f"{job.handler_id}:{job.change_id}:{ordinal}", job.trace, job.at, job.tenant,
                      job.change_id, ordinal)


class Reader:
    """Reads for one worker; keeps the SQL of images it was given."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._images: dict[tuple[int, tuple[str, ...]], str] = {}

    def forget(self) -> None:
        """Tables may have changed."""
        self._images.clear()

    async def read(self, conn: Conn, lane: Lane, batch: Batch) -> Inputs:
        """The records of a batch."""
        if (
            lane.read == "now"
            and lane.key_kind == "id"
            and all(job.ids is not None and job.op != "d" for job, _ in batch.parts)
        ):
            return _made(lane, await self._by_id(conn, lane, batch))
        if all(job.op in BUILDS for job, _ in batch.parts):            # a handler of these listens to nothing else
            return Inputs(batch, [event_of(job.op, job.key(ordinal)) for job, ordinal in batch], events=True)
        items: list[Any] = [None] * batch.size
        images: dict[int, tuple[Any, Any]] = {}
        now: list[int] = []
        imaged: list[int] = []
        for position, (job, ordinal) in enumerate(batch):
            if job.op in EVENTS:
                continue
            if job.op == "d" and job.cols is None:                     # its image is missing: the key is what is left
                key = job.key(ordinal)
                items[position] = Record(
                    dict(zip(lane.key_columns, key if isinstance(key, list) else [key], strict=False))
                )
            elif job.cols is None or (lane.read == "now" and lane.key_kind != "none" and job.op != "d"):
                now.append(position)
            else:
                imaged.append(position)
        for position, (old, new) in (await self._by_image(conn, lane, batch, imaged)).items():
            items[position] = old if new is None else new
            images[position] = old, new
        found, twins = await self._by_key(conn, lane, batch, now)
        for position, row in found.items():
            items[position] = row
        dropped = {twin for twins_ in twins.values() for twin in twins_}
        live = [
            n for n, (job, _) in enumerate(batch) if n not in dropped and (items[n] is not None or job.op in EVENTS)
        ]
        number = {position: item for item, position in enumerate(live)}
        lost = [n for n in range(batch.size) if n not in dropped and n not in number]
        inputs = Inputs(batch, [items[n] for n in live], list(found.values()), live, lost,
                        {number[position]: more for position, more in twins.items() if position in number}, {},
                        {number[position]: image for position, image in images.items()},
                        any(job.op in EVENTS for job, _ in batch.parts))
        inputs.gone += [twin for position, more in twins.items() if position not in number for twin in more]
        return _made(lane, inputs)

    async def _by_id(self, conn: Conn, lane: Lane, batch: Batch) -> Inputs:
        """The common case: rows of now by an integer key."""
        ids: list[int] = []
        for job, ordinals in batch.parts:
            mine = job.ids or []
            ids += mine if len(ordinals) == job.size else [mine[ordinal - job.lo] for ordinal in ordinals]
        rows = await _rows(conn, lane, ids)
        column = itemgetter(lane.key_columns[0]) if not lane.document else _id_of
        if len(rows) == len(ids) and list(map(column, rows)) == ids:
            return Inputs(batch, rows, rows)
        by_id = {column(row): row for row in rows}
        items: list[Any] = []
        first: list[int] = []
        gone: list[int] = []
        seen: dict[int, int] = {}
        twins: dict[int, list[int]] = {}
        for position, id in enumerate(ids):
            if id in seen:
                twins.setdefault(seen[id], []).append(position)
            elif id in by_id:
                seen[id] = len(items)
                items.append(by_id[id])
                first.append(position)
            else:
                gone.append(position)
        return Inputs(batch, items, rows, None if len(first) == batch.size else first, gone, twins)

    async def _by_key(
        self, conn: Conn, lane: Lane, batch: Batch, positions: list[int]
    ) -> tuple[dict[int, Any], dict[int, list[int]]]:
        """Rows of now by position, and the further positions of keys that come more than once."""
        keys: dict[Any, int] = {}
        twins: dict[int, list[int]] = {}
        for position in positions:
            job, ordinal = batch.at(position)
            key = job.key(ordinal)
            one = keys.setdefault(tuple(map(str, key)) if isinstance(key, list) else key, position)
            if one != position:
                twins.setdefault(one, []).append(position)
        if not keys or lane.fetch_sql is None:
            return {}, {}
        asked = list(keys.values())
        kind = Document if lane.document else Row
        if lane.key_kind == "id":
            ids = [job.key(ordinal) for job, ordinal in map(batch.at, asked)]
            rows = await _rows(conn, lane, ids)
            column = _id_of if lane.document else itemgetter(lane.key_columns[0])
            found = {keys[column(row)]: row for row in rows}
        else:
            values = [job.key(ordinal) for job, ordinal in map(batch.at, asked)]
            rows = await conn.fetch(lane.fetch_sql, values, record_class=kind)
            found = {asked[asyncpg.Record.__getitem__(row, "_ord") - 1]: row for row in rows}
        return found, twins

    async def _by_image(self, conn: Conn, lane: Lane, batch: Batch, positions: list[int]) -> dict[int, tuple[Any, Any]]:
        """Old and new images by position."""
        wanted: dict[tuple[str, ...], list[Job]] = {}
        for job in {id(job): job for job, _ in map(batch.at, positions)}.values():
            wanted.setdefault(tuple(job.cols or ()), []).append(job)
        rows: dict[tuple[int, int], Any] = {}
        for cols, jobs in wanted.items():
            sql = self._images.get((lane.table_id, cols))
            if sql is None:
                sql = self._images[lane.table_id, cols] = await queue.images_sql(
                    self._db, conn, lane.table_id, list(cols)
                )
            for row in await conn.fetch(
                sql, [job.change_id for job in jobs], [job.lo for job in jobs], [job.hi for job in jobs]
            ):
                rows[row["change_id"], row["ord"]] = row
        out: dict[int, tuple[Any, Any]] = {}
        for position in positions:
            job, ordinal = batch.at(position)
            image = rows.get((job.change_id, ordinal))
            if image is None:
                continue
            names = job.cols or []
            values = list(image.values())[2:]                          # new and old of each column in turn
            new = Record(dict(zip(names, values[0::2], strict=True)), lane.document) if job.op != "d" else None
            old = Record(dict(zip(names, values[1::2], strict=True)), lane.document) if job.op != "n" else None
            out[position] = old, new
        return out


def _made(lane: Lane, inputs: Inputs) -> Inputs:
    """The items as instances of the table's model; rows that do not fit it are set apart. Raises LostColumn."""
    inputs.width = _width(inputs.items)
    make = lane.make
    if make is None:
        inputs.items = _short(lane, inputs)
        return inputs
    try:
        inputs.items = [item if item is None else make(item) for item in inputs.items]
    except Exception:
        items, first, moved = list[Any](), list[int](), dict[int, int]()
        for item, row in enumerate(_short(lane, inputs)):
            position = item if inputs.first is None else inputs.first[item]
            try:
                items.append(row if row is None else make(row))
            except LostColumn:
                raise
            except Exception as error:
                for at in (position, *inputs.twins.pop(item, ())):
                    inputs.broken[at] = error
                continue
            moved[item] = len(first)
            first.append(position)
        inputs.items, inputs.first = items, first
        inputs.twins = {moved[item]: more for item, more in inputs.twins.items()}
        inputs.images = {moved[item]: image for item, image in inputs.images.items() if item in moved}
    for item, (old, new) in inputs.images.items():
        record = inputs.items[item]
        inputs.images[item] = (record, None) if new is None else (old and make(old), record)
    return inputs


def _short(lane: Lane, inputs: Inputs) -> Sequence[Any]:
    """The items; where the table lacks columns that it once had, its rows of now know which.

    A fetch reads t.*, so these rows say what the table has. Images and bare keys say only what was captured.
    """
    if lane.read != "now" or lane.document or not inputs.rows:
        return inputs.items
    lost = lane.had.difference(asyncpg.Record.keys(inputs.rows[0]))
    if not lost:
        return inputs.items
    return [Short(cast("Mapping[str, Any]", item), lost, lane.table, lane.name) if isinstance(item, Row) else item
            for item in inputs.items]


async def _rows(conn: Conn, lane: Lane, ids: list[int]) -> list[Any]:
    """Rows of now by their integer keys, in any order. Keys in a row are asked for as a range: less to do."""
    assert lane.fetch_sql is not None
    kind, base = Document if lane.document else Row, lane.fetch_sql.removesuffix(_ANY)
    if len(ids) > 1 and ids[-1] - ids[0] == len(ids) - 1 and ids == list(range(ids[0], ids[-1] + 1)):
        return await conn.fetch(base + BY_RANGE, ids[0], ids[-1], record_class=kind)
    return await conn.fetch(base + BY_KEY, array(ids), record_class=kind)


def _id_of(row: Any) -> Any:
    return asyncpg.Record.__getitem__(row, "id")


def _width(rows: Sequence[Any]) -> float:
    some = (rows[at] for at in range(0, len(rows), max(1, len(rows) // 8)))
    return max((_bytes(row) for row in some if row is not None), default=1.0)


def _bytes(row: Any) -> float:
    values = asyncpg.Record.values(row) if isinstance(row, asyncpg.Record) else row.values()
    return 1.0 + sum(
        len(value) if isinstance(value, (str, bytes)) else len(repr(value)) if isinstance(value, (dict, list)) else 8
        for value in values
    )
