"""Each: runs handlers of single records, and settles what is finished while the rest runs.

    lane.items --taken one by one by pullers (coroutines, or threads)--> chunks --flush--> settled in parts

A puller takes the next record as soon as it is done with one, across batches. Coroutines: up to `concurrency`. Threads:
one, and more only while records are slow. Finished records are settled within a second, or by 100.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

from anton.db import Database
from anton.errors import HandlerTimeout, Outcome
from anton.fate import Fate, failed, fate_of, is_world
from anton.gate import NOTHING, Gate
from anton.lane import Lane
from anton.order import OutOfOrder
from anton.read import Inputs
from anton.threads import Threads
from anton.turns import Turns
from anton.write import WHOLE, Op, Scope, owner, pick

FLUSH = 100  # finished records
GATHER = 0.1  # seconds that fewer wait for more
AT_LATEST = 1.0  # seconds
SLOW = 0.01  # seconds in one record after which more threads help
QUICK = 0.01  # seconds that few wait where others wait for them to be settled
STUBBORN = 5.0  # seconds that a cancelled coroutine may take to end
SLICE = 0.002  # seconds after which a coroutine that never waits lets others run


class Chunk:
    """Records that one puller worked in turn, and what they wrote. taken: how many of them are flushed already."""

    __slots__ = ("done", "fates", "since", "scope", "taken")

    def __init__(self, scope: Scope, now: float) -> None:
        self.scope = scope
        self.done: list[int] = []
        self.fates: dict[int, Fate] = {}
        self.since = now
        self.taken = 0

    def cut(self) -> tuple[list[int], list[Op], dict[int, Fate]]:
        """What is finished and was not taken yet: items, their writes, their fates. A thread may be adding more."""
        end = len(self.done)
        items = self.done[self.taken:end]
        fates = {item: self.fates[item] for item in items if item in self.fates}
        good = {item for item in items if item not in fates}
        ended = self.scope.closed
        ops = self.scope.take() if ended else list(self.scope.ops)
        if self.taken or fates or not ended:
            ops = pick(ops, good)
        self.taken = end
        return items, ops, fates


class Each:
    """One batch of a lane with each=True on its way.

    changed: set when there is something to take. finished, ops, fates: taken and not settled yet. over: all is settled
    or skipped. world: what the world raised; then what was not started is skipped. ended: its run has left.
    """

    def __init__(self, db: Database, lane: Lane, inputs: Inputs, ctx: Any) -> None:
        self.db = db
        self.lane = lane
        self.inputs = inputs
        self.ctx = ctx
        self.count = len(inputs.items)
        self.tenant = inputs.batch.parts[0][0].tenant
        self.chunks: deque[Chunk] = deque()
        self.skipped: deque[int] = deque()
        self.world: BaseException | None = None
        self.ended = False
        self.changed = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.finished: list[int] = []
        self.ops: list[Op] = []
        self.fates: dict[int, Fate] = {}
        self.later: dict[int, Fate] = {}                               # with a rate for each key: they go back
        self.settled = 0
        self._flushed_at = time.monotonic()
        self._find: dict[int, int] | None = None
        self.order = inputs.order or [None] * self.count               # a lane may get an order meanwhile
        self.awaited = False
        self.ran: set[int] = set()
        self.off: dict[Hashable, list[int]] = {}

    def send(self) -> None:
        """Puts the items where pullers find them: those of tenants in turn, but for an order, which is one for all."""
        if self.lane.order is not None:
            self.lane.order.send(self)
            return
        items, entries = self.lane.items, [(self, item) for item in range(self.count)]
        if items and items[-1][0].tenant != self.tenant:
            turns = Turns[str | None, Any]()
            turns.weights = self.lane.waiting.weights
            for entry in [*_drain(items), *entries]:
                turns.add(entry[0].tenant, entry)
            entries = list(turns.all())
        items.extend(entries)

    def job(self, item: int) -> int:
        """The id of an item's job."""
        job, _ = self.inputs.batch.at(item if self.inputs.first is None else self.inputs.first[item])
        return job.id

    def tell(self) -> None:
        """There is something to take. From any thread."""
        self.loop.call_soon_threadsafe(self.changed.set)

    def position(self, of: object) -> int | None:
        """For of=: which item this is."""
        if self._find is None:
            self._find = {id(item): at for at, item in enumerate(self.inputs.items)}
        return self._find.get(id(of))

    def chunk(self, now: float) -> Chunk:
        """A new chunk with a scope of its own."""
        code = self.lane.handler
        scope = Scope("handler", self, self.db, code.on_conflict)
        scope.table = self.lane.table
        if self.inputs.rows and code.relation is not None:
            scope.saw(code.relation, self.inputs.rows)
        return Chunk(scope, now)

    def hand_over(self, chunk: Chunk) -> None:
        """Takes a chunk that ended, from any thread."""
        chunk.scope.close()
        self.chunks.append(chunk)
        self.tell()

    def stop(self, error: BaseException | None) -> None:
        """The world fails: this handler starts nothing more. From any thread, also when nobody waits any more."""
        self.world = error
        if self.lane.order is not None and not self.ended:
            self.lane.order.stopped = True                             # at once: before lane.down, which the loop sets
        self.loop.call_soon_threadsafe(self._stopped)

    def _stopped(self) -> None:
        if not self.ended:                                             # else nothing would take the lane up again
            self.lane.down = self.world
        self.changed.set()

    def drop(self) -> None:
        """Skips what was not started."""
        lane, mine = self.lane, list[int]()
        for _ in range(len(lane.items)):
            try:
                each, item = lane.items.popleft()
            except IndexError:
                break
            if each is self:
                mine.append(item)
            else:
                lane.items.append((each, item))
        self.skipped.extend(mine)
        if lane.gate is not None:
            self.skipped.extend(lane.gate.drop(self))
        if lane.order is not None:
            self.skipped.extend(lane.order.drop(self))
            for item in mine:                                          # last: the next of its key may come for it
                lane.order.skip(self, item)

    async def wait(self, seconds: float) -> None:
        """Until something changed, at most so long."""
        if self.finished:
            gather = QUICK if self.awaited else GATHER
            seconds = min(seconds, max(0.0, self._flushed_at + gather - time.monotonic()))
        if not self.changed.is_set():
            timer = self.loop.call_later(seconds, self.changed.set)
            await self.changed.wait()
            timer.cancel()
        self.changed.clear()

    def gather(self, open_chunks: Callable[[Each], list[Chunk]]) -> bool:
        """Takes what is finished. Whether it is time to settle it."""
        off = [] if self.lane.order is None else self.lane.order.put_off(self)
        hurry, self.awaited = self.awaited, False                      # what ends from here on may be for the next time
        chunks = [self.chunks.popleft() for _ in range(len(self.chunks))]
        waited = time.monotonic() - self._flushed_at
        if waited > AT_LATEST or hurry:
            chunks += open_chunks(self)
        for chunk in chunks:
            done, ops, fates = chunk.cut()
            self.finished += done
            self.ops += ops
            self.fates |= fates
        self.finished += off
        self.fates |= dict.fromkeys(off, LATER)
        if self.later:
            self.finished += self.later
            self.fates |= self.later
            self.later = {}
        enough = len(self.finished) >= FLUSH or waited >= (QUICK if hurry else GATHER) or self._all()
        if hurry and not enough:
            self.awaited = True
        return bool(self.finished) and enough

    def flushed(self) -> None:
        """What was taken is settled."""
        self.settled += len(self.finished)
        self.finished, self.ops, self.fates = [], [], {}
        self._flushed_at = time.monotonic()

    @property
    def left(self) -> int:
        """Items that are neither settled nor skipped."""
        return self.count - self.settled - len(self.skipped)

    @property
    def over(self) -> bool:
        """Nothing is to come."""
        return not self.finished and self._all()

    def _all(self) -> bool:
        return self.settled + len(self.finished) + len(self.skipped) >= self.count


def _drain(items: deque[Any]) -> Iterator[Any]:
    """Takes them all, beside pullers that do."""
    with suppress(IndexError):
        while True:
            yield items.popleft()


class Puller:
    """Works items of one lane in turn. started: when the current one was begun, 0 between. expired: it is cancelled
    for taking longer than the timeout; given_up: it did not end even then.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.each: Each | None = None
        self.chunk: Chunk | None = None
        self.item = WHOLE
        self.started = 0.0
        self.expired = False
        self.given_up = False
        self.gate: Gate | None = None
        self.key: Any = NOTHING
        self.task: asyncio.Future[Any] | None = None

    def next(self) -> bool:
        """Goes to the next item; False when there is none or no permit. Hands a full or old chunk over."""
        chunk, now = self.chunk, time.perf_counter()
        lane = self.lane
        if lane.permits is not None and lane.running + lane.again > lane.room:  # this one's is lost, or wanted
            self.release()
            return False
        while True:
            try:
                each, item = entry = lane.items.popleft()
            except IndexError:
                self.release()
                return False
            if each.world is None and lane.down is None and (lane.order is None or lane.order.may(each)):
                if lane.tap is not None and not lane.tap.take():
                    lane.items.appendleft(entry)
                    self.release()
                    return False
                if lane.gate is None or self._enter(lane.gate, each, item):
                    break
                continue
            each.skipped.append(item)
            if lane.order is None:
                each.stop(each.world or lane.down)
                continue
            lane.order.skip(each, item)
            if not each.ended:
                each.stop(each.world or lane.down or OutOfOrder())
        self.item = item
        if chunk is not None and (each is not self.each or len(chunk.done) >= FLUSH or now - chunk.since > SLOW):
            self.release()
            chunk = None
        if chunk is None:
            self.each = each
            self.chunk = each.chunk(now)
            self.chunk.scope.__enter__()
        self.started = now
        return True

    def _enter(self, gate: Gate, each: Each, item: int) -> bool:
        """Whether its key lets it run now."""
        key = gate.key(each.inputs.items[item])
        if not gate.enter(key, (each, item)):
            return False
        self.gate, self.key = gate, key
        return True

    def leave(self) -> None:
        """The next one of this key may run. Does nothing the second time."""
        key, self.key = self.key, NOTHING
        if key is not NOTHING and self.gate is not None:
            entry = self.gate.leave(key)
            if entry is not None:
                self.lane.items.appendleft(entry)

    def release(self) -> None:
        """Hands over what is done."""
        self.started = 0.0
        if self.chunk is not None and self.each is not None and not self.given_up:
            self.each.hand_over(self.chunk)
        self.chunk = None

    def end(self, error: BaseException | None) -> None:
        """The item is finished, well or not."""
        chunk, each = self.chunk, self.each
        assert chunk is not None and each is not None
        if error is None and each.ctx is not None:
            error = each.ctx.outcomes.pop(self.item, None)
        if error is not None:
            if isinstance(error, Outcome):
                chunk.fates[self.item] = fate_of(error)
            elif is_world(error):
                chunk.fates[self.item] = AGAIN
                each.stop(error)
            else:
                chunk.fates[self.item] = failed(error)
        chunk.done.append(self.item)
        if self.key is not NOTHING:
            self.leave()
        if self.lane.order is not None and self.lane.order.ended(each, self.item):
            each.tell()


AGAIN = Fate("retry", "the world fails")
LATER = Fate("later", "an earlier record of its key waits")


def put_off(entry: tuple[Each, int], after: timedelta) -> None:
    """An item that has not begun waits in the queue, for its key's rate. Called in the event loop."""
    each, item = entry
    each.later[item] = Fate("later", "", after, rated=True)
    each.changed.set()


class Pullers:
    """All pullers of one worker, by lane."""

    def __init__(self, threads: Threads, stuck: Callable[[], None]) -> None:
        self._threads = threads
        self._stuck = stuck
        self._of: dict[int, set[Puller]] = {}

    def pull(self, lane: Lane) -> None:
        """Sees to it that what the lane holds is worked."""
        mine = self._of.setdefault(lane.id, set())
        wanted = min(lane.room - lane.again, len(lane.items) + len(mine))
        if lane.tap is not None:
            wanted = min(wanted, len(mine) + lane.tap.free())          # one for each that may begin
        elif not lane.handler.is_async:
            wanted = min(wanted, max(1, len(mine)))
        while len(mine) < wanted:
            self._start(lane, mine)

    def more(self, lane: Lane) -> None:
        """Doubles the threads of a lane whose records are slow; ends what takes longer than its timeout."""
        mine = self._of.get(lane.id, set())
        now, limit = time.perf_counter(), lane.timeout.total_seconds()
        slow = 0
        for puller in list(mine):
            started = puller.started
            if not started:
                continue
            took = now - started
            slow += took > SLOW
            if took > limit + (STUBBORN if lane.handler.is_async else 0):
                self._give_up(puller, mine)
            elif took > limit and not puller.expired and puller.task is not None:
                puller.expired = True
                puller.task.cancel()
        if not lane.handler.is_async and lane.tap is None and slow and lane.items and slow >= len(mine):
            for _ in range(min(len(mine) or 1, lane.room - lane.again - len(mine), len(lane.items))):
                self._start(lane, mine)

    def _start(self, lane: Lane, mine: set[Puller]) -> None:
        puller = Puller(lane)
        if lane.handler.is_async:
            puller.task = asyncio.create_task(_pull_async(puller))
        else:
            context = contextvars.copy_context()
            puller.task = self._threads.submit(lambda: context.run(_pull_sync, puller))
        mine.add(puller)                                               # there may be no thread to be had
        lane.running += 1
        puller.task.add_done_callback(lambda _: self._ended(puller, mine))

    def _ended(self, puller: Puller, mine: set[Puller]) -> None:
        puller.leave()                                                 # it was cancelled
        if puller in mine:
            mine.discard(puller)
            puller.lane.running -= 1
            if puller.lane.items:                                      # put there just as it went home
                self.pull(puller.lane)

    def _give_up(self, puller: Puller, mine: set[Puller]) -> None:
        chunk, each, item = puller.chunk, puller.each, puller.item
        if chunk is None or each is None or not puller.started:
            return
        puller.given_up = True
        mine.discard(puller)
        puller.lane.running -= 1
        puller.leave()
        chunk.scope.close()
        chunk.fates[item] = failed(HandlerTimeout(puller.lane.name, puller.lane.timeout.total_seconds()))
        chunk.done.append(item)
        if puller.lane.order is not None:
            puller.lane.order.ended(each, item)
        each.chunks.append(chunk)
        each.changed.set()
        if not puller.lane.handler.is_async:
            self._stuck()
        if puller.lane.items:
            self._start(puller.lane, mine)

    def close(self, lane: Lane) -> None:
        """Skips what waits for a start: none is to come."""
        for each in {each for each, _ in list(lane.items)}:
            each.drop()
            each.changed.set()

    def open_chunks(self, each: Each) -> list[Chunk]:
        """What pullers are still adding to."""
        return [
            puller.chunk
            for puller in list(self._of.get(each.lane.id, ()))
            if puller.each is each and puller.chunk is not None
        ]


def _pull_sync(puller: Puller) -> None:
    mark, fn = owner.set, puller.lane.handler.run
    while not puller.given_up and puller.next():
        each, chunk, item = puller.each, puller.chunk, puller.item
        assert each is not None and chunk is not None
        mark(item)
        error: BaseException | None = None
        try:
            fn(each.inputs.items[item], each.ctx)
        except BaseException as raised:
            error = raised
        if puller.given_up:
            return
        puller.end(error)


async def _pull_async(puller: Puller) -> None:
    mark, fn = owner.set, puller.lane.handler.run
    slice_ends = time.perf_counter() + SLICE
    while puller.next():
        each, chunk, item = puller.each, puller.chunk, puller.item
        assert each is not None and chunk is not None
        mark(item)
        error: BaseException | None = None
        try:
            await fn(each.inputs.items[item], each.ctx)
        except asyncio.CancelledError:
            if not puller.expired or puller.given_up:
                raise
            puller.expired = False
            task = asyncio.current_task()
            while task is not None and task.cancelling():
                task.uncancel()
            error = HandlerTimeout(puller.lane.name, puller.lane.timeout.total_seconds())
        except BaseException as raised:
            error = raised
        if puller.given_up:
            return
        puller.end(error)
        if puller.started > slice_ends:
            await asyncio.sleep(0)
            slice_ends = time.perf_counter() + SLICE
