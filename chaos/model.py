"""Model: the queue as it should be, in plain Python; the oracle of tests/test_state_machine.py.

    Queue      where each record of each change is: in a job, under a lease, waiting, dead, done or cancelled
    Permits    of a handler with a limit: who holds them, and until when
    Rest       keys of a handler that debounces: which have changed, and when each is due
    Lines      records of a handler with an order, by key: which may run
    Starts     of a rate: how many there were in any window

A part is (change, lo, hi), and names a job wherever it is: each record is in one part, and each part in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

Part = tuple[int, int, int]
LEASE = 3600.0  # so long that no machine is too slow for it


class Refused(Exception):
    """The fence: not all of it is held under this token. Nothing has changed."""


@dataclass
class Job:
    """A part where it is. until: the end of a lease."""

    place: str = "job"
    settled: frozenset[int] = frozenset()
    attempt: int = 0
    crashes: int = 0
    token: int | None = None
    until: float = 0.0
    run_at: float = 0.0
    alone: bool = False
    together: int = 0  # runs with other suspects that died; 2: it is a part of one, or to run alone
    tenant: str | None = None
    origin: str | None = None  # of what was replayed: its idempotency key
    locked: bool = False  # by a transaction that is still open


@dataclass
class Queue:
    """All of it. now: moved by the tests. probe_at: its handler fails, and one job may be tried then.

    tenants: whose each change was when it was written. dead: attempts and origin.
    """

    jobs: dict[Part, Job] = field(default_factory=dict)
    tenants: dict[int, str | None] = field(default_factory=dict)
    done: set[tuple[int, int]] = field(default_factory=set)
    dead: dict[tuple[int, int], tuple[int, str | None]] = field(default_factory=dict)
    now: float = 0.0
    paused: bool = False
    probe_at: float | None = None

    def left(self, part: Part) -> list[int]:
        """Ordinals that are not settled."""
        return [o for o in range(part[1], part[2] + 1) if o not in self.jobs[part].settled]

    def add(self, change: int, n: int, tenant: str | None, origin: str | None = None, due: float | None = None) -> None:
        """A committed change. due: it is handled then."""
        place = "job" if due is None else "delayed"
        self.tenants[change] = tenant
        self.jobs[change, 1, n] = Job(place, tenant=tenant, origin=origin, run_at=due or 0.0)

    def open(self) -> bool:
        """Whether a claim may get anything."""
        return not self.paused and (self.probe_at is None or self.probe_at <= self.now)

    def choose(self, order: list[Part], jobs: int, records: int,
               turn: str | None = None) -> tuple[list[Part], list[Part]]:
        """What a claim takes, and what it locks. order: the parts that it may lock by their numbers.

        Jobs until so many records are there; where one that waits has a tenant, a share from each tenant, beginning
        with the one behind `turn`.
        """
        names = {self.tenants[part[0]] or "" for part, job in self.jobs.items() if job.place == "job"}
        if not self.open():
            return [], []
        if self.probe_at is not None or names <= {""}:
            locked = order[: jobs if self.probe_at is None else min(jobs, 1)]
            return _until(locked, records), locked
        queues = {name: [part for part in order if (self.tenants[part[0]] or "") == name]
                  for name in sorted(names, key=lambda name: (turn is not None and name <= turn, name))}
        taken: list[Part] = []
        locked = []
        while jobs > 0 and records > 0 and queues:
            most_jobs, most_records = -(-jobs // len(queues)), -(-records // len(queues))
            for name, queue in list(queues.items()):
                if jobs <= 0 or records <= 0:
                    break
                some = queue[: min(jobs, most_jobs)]
                found = _until(some, most_records)
                locked += some
                taken += found
                if len(found) == len(some) < min(jobs, most_jobs):
                    del queues[name]
                del queue[: len(found)]
                jobs -= len(found)
                records -= sum(hi - lo + 1 for _, lo, hi in found)
        return sorted(taken, key=order.index), locked

    def take(self, token: int, parts: list[Part], at: float) -> None:
        """The claim of that time is committed."""
        for part in parts:
            job = self.jobs[part]
            job.place, job.token, job.until = "lease", token, at + LEASE
            job.alone, job.together = False, 0
        if parts and self.probe_at is not None:
            self.probe_at = at + LEASE

    def expired(self) -> list[Part]:
        """Leases that ran out and may be taken."""
        return [
            part
            for part, job in self.jobs.items()
            if job.place == "lease" and job.until <= self.now and not job.locked and not self.paused
        ]

    def reclaim(self, token: int, part: Part, at: float) -> None:
        """A suspect, taken at that time: it runs alone, and if it did already its crash is counted."""
        job = self.jobs[part]
        job.crashes += job.alone
        job.alone, job.token, job.until = True, token, at + LEASE

    def reclaim_together(self, token: int, parts: list[Part]) -> None:
        """Suspects for the first time or the second: no crash is counted for what they do together."""
        for job in (self.jobs[part] for part in parts):
            assert not (job.alone or job.together > 1 or job.crashes)
            job.together, job.token, job.until = job.together + 1, token, self.now + LEASE

    def heartbeat(self, token: int) -> bool:
        """Whether the token holds anything."""
        held = [job for job in self.jobs.values() if job.token == token]
        for job in held:
            if not job.locked:
                job.until = self.now + LEASE
        return bool(held)

    def fence(self, token: int, parts: Iterable[Part]) -> list[Job]:
        """The jobs, when all of them are held under the token."""
        parts = list(parts)
        found = [self.jobs.get(part) for part in parts]
        if not parts or any(job is None or job.token != token for job in found):
            raise Refused
        return [job for job in found if job is not None]

    def ack(self, token: int, parts: list[Part]) -> None:
        """Whole jobs are done."""
        self.fence(token, parts)
        for part in parts:
            self.done |= {(part[0], o) for o in self.left(part)}
            del self.jobs[part]
        self.probe_at = None

    def settle(self, token: int, part: Part, ordinals: list[int]) -> Job:
        """Some records of a job; it is gone with the last of them. Returns it as it was."""
        (job,) = self.fence(token, [part])
        before = replace(job)
        job.settled |= set(ordinals)
        if not self.left(part):
            del self.jobs[part]
        return before

    def ack_part(self, token: int, part: Part, ordinals: list[int]) -> None:
        """They are done."""
        self.settle(token, part, ordinals)
        self.done |= {(part[0], o) for o in ordinals}
        self.probe_at = None

    def retry(self, token: int, part: Part, ordinals: list[int], after: float, burn: bool) -> None:
        """Each waits by itself."""
        job = self.settle(token, part, ordinals)
        for o in ordinals:
            self.jobs[part[0], o, o] = Job(
                "delayed",
                attempt=job.attempt + burn,
                crashes=job.crashes,
                run_at=self.now + after,
                tenant=job.tenant,
                origin=job.origin,
            )

    def bury(self, token: int, part: Part, ordinal: int) -> None:
        """A dead letter."""
        job = self.settle(token, part, [ordinal])
        self.dead[part[0], ordinal] = job.attempt + 1, job.origin

    def give_back(self, token: int, parts: list[Part]) -> None:
        """Ready again, nothing counted."""
        for job in self.fence(token, parts):
            job.place, job.token, job.alone = "job", None, False

    def world_failed(self, token: int, parts: list[Part], after: float) -> None:
        """Ready again, and their handler waits."""
        self.give_back(token, parts)
        self.probe_at = self.now + after

    def steer(self, paused: bool) -> None:
        """Pause or resume. Who waits for the world tries at once."""
        if not paused and self.probe_at is not None:
            self.probe_at = self.now
        self.paused = paused

    def died(self, tokens: set[int]) -> None:
        """Its parent saw the worker die that holds these: its leases have ended, but for those that it is settling."""
        for job in self.jobs.values():
            if job.token is not None and job.token in tokens and not job.locked:
                job.until = float("-inf")

    def split(self, token: int, part: Part, ways: int, ended: bool = False) -> None:
        """Into leases of at least one record that is left each; ended: which have run out."""
        (job,) = self.fence(token, [part])
        change, lo, hi = part
        step = -(-(hi - lo + 1) // ways)
        del self.jobs[part]
        for start in range(lo, hi + 1, step):
            end = min(start + step - 1, hi)
            settled = frozenset(o for o in job.settled if start <= o <= end)
            if len(settled) < end - start + 1:
                until = float("-inf") if ended else job.until
                self.jobs[change, start, end] = replace(
                    job, settled=settled, crashes=0, alone=False, together=2, until=until
                )

    def promote(self) -> None:
        """What is due is ready."""
        for job in self.jobs.values():
            if job.place == "delayed" and job.run_at <= self.now:
                job.place = "job"

    def cancel(self, part: Part) -> bool:
        """Only what waits."""
        job = self.jobs.get(part)
        if job is None or job.place == "lease":
            return False
        del self.jobs[part]
        return True


@dataclass
class Permits:
    """Those of a handler: who holds each, and until when. most: how many there are."""

    most: int
    held: dict[int, tuple[int, float]] = field(default_factory=dict)

    def valid(self, now: float) -> dict[int, int]:
        """Who holds which."""
        return {n: worker for n, (worker, until) in sorted(self.held.items()) if until > now}

    def asked(self, worker: int, wanted: int, now: float, lease: float, spare: bool,
              locked: Iterable[int] = ()) -> dict[int, tuple[int, float] | None]:
        """What changes when a worker asks for so many: what it takes and keeps, None for what it gives back.

        spare: one is left to the jobs of the dead. locked: what another takes at this moment.
        """
        valid = self.valid(now)
        mine = [n for n, holder in valid.items() if holder == worker]
        free = [n for n in range(1, self.most + 1) if n not in valid]
        most = min(len(free) - (spare and bool(free)), max(0, wanted - len(mine)))
        new, back = [n for n in free if n not in locked][:most], mine[wanted:]
        return {**dict.fromkeys(mine[:wanted] + new, (worker, now + lease)), **dict.fromkeys(back)}

    def change(self, changes: dict[int, tuple[int, float] | None]) -> None:
        """They are committed."""
        for n, holder in changes.items():
            self.held.pop(n, None)
            if holder is not None:
                self.held[n] = holder

    def keep(self, worker: int, now: float, lease: float) -> int:
        """What a worker holds lasts longer; what ran out is not revived. How many these are."""
        mine = [n for n, holder in self.valid(now).items() if holder == worker]
        self.held |= dict.fromkeys(mine, (worker, now + lease))
        return len(mine)

    def died(self, worker: int) -> None:
        """What it held is free."""
        self.held = {n: holder for n, holder in self.held.items() if holder[0] != worker}


@dataclass
class Rest:
    """Keys that have changed, and when; each is due once, when it has come to rest or has waited for too long."""

    debounce: float
    max_wait: float
    changed: dict[int, list[float]] = field(default_factory=dict)

    def change(self, key: int, at: float) -> None:
        """Committed; it was written at that time."""
        self.changed.setdefault(key, []).append(at)

    def due(self, now: float) -> list[int]:
        """The keys that have a job from now on, and wait no more."""
        found = [key for key, times in self.changed.items()
                 if min(max(times) + self.debounce, min(times) + self.max_wait) <= now]
        for key in found:
            del self.changed[key]
        return sorted(found)


Record = tuple[int, int]  # a change, and which of its records


@dataclass
class Lines:
    """The records of each key that are not settled, in the order of their commits. block: a dead one stops its key.

    until: when the first of a key is tried again; for ever: it is dead. dead: letters, of which key and record.
    """

    block: bool = False
    lines: dict[int, list[Record]] = field(default_factory=dict)
    keys: dict[Record, int] = field(default_factory=dict)
    until: dict[int, float] = field(default_factory=dict)
    dead: dict[Record, int] = field(default_factory=dict)

    def add(self, key: int, record: Record) -> None:
        """Committed: behind all there are."""
        self.keys[record] = key
        self.lines.setdefault(key, []).append(record)

    def left(self) -> list[Record]:
        """All that are not settled."""
        return [record for line in self.lines.values() for record in line]

    def may(self, record: Record, now: float) -> bool:
        """Whether it is the first of its key, and waits for nothing."""
        key = self.keys[record]
        return self.lines[key][:1] == [record] and self.until.get(key, now) <= now

    def over(self, record: Record) -> None:
        """Done, or cancelled."""
        key = self.keys[record]
        if self.lines[key][0] == record:
            self.until.pop(key, None)
        self.lines[key].remove(record)

    def retry(self, record: Record, at: float) -> None:
        """It is tried again then."""
        self.until[self.keys[record]] = at

    def bury(self, record: Record) -> None:
        """A dead letter."""
        key = self.dead[record] = self.keys[record]
        if self.block:
            self.until[key] = float("inf")
        else:
            self.over(record)

    def replay(self, record: Record, again: Record) -> None:
        """The dead letter is a record again, at its place where its key waits for it, else behind all there are."""
        key = self.dead.pop(record)
        if record not in self.lines[key]:
            self.add(key, again)
            return
        self.keys[again] = key
        self.lines[key][0] = again
        del self.until[key]

    def drop(self, record: Record) -> None:
        """The dead letter is taken away."""
        if record in self.lines[self.dead.pop(record)]:
            self.over(record)


@dataclass
class Starts:
    """What began, by the number of its slot: at most `most` in any window, wherever in its slot each was."""

    most: int
    window_us: int
    slot_us: int
    began: list[int] = field(default_factory=list)

    def hold(self) -> bool:
        """Whether any window could hold more."""
        began = sorted(self.began)
        pairs = zip(began, began[self.most :], strict=False)
        return all((late - early - 1) * self.slot_us >= self.window_us for early, late in pairs)


def _until(parts: list[Part], records: int) -> list[Part]:
    """Those from the first on until so many records are there."""
    found: list[Part] = []
    size = 0
    for part in parts:
        if size >= records:
            break
        size += part[2] - part[1] + 1
        found.append(part)
    return found
