"""Model: the queue as it should be, in plain Python; the oracle of tests/test_state_machine.py.

    Queue      where each record of each change is: in a job, under a lease, waiting, dead, done or cancelled
    explore()  every state that two workers and two changes can reach with an expiry, a crash and a lost reply

A part is (change, lo, hi), and names a job wherever it is: each record is in one part, and each part in one place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

Part = tuple[int, int, int]
LEASE = 30.0


class Refused(Exception):
    """The fence: not all of it is held under this token. Nothing has changed."""


@dataclass
class Job:
    """A part where it is. until: of a lease, (time, how many-th); seq: place in the queue."""

    place: str = "job"
    settled: frozenset[int] = frozenset()
    attempt: int = 0
    crashes: int = 0
    token: int | None = None
    until: tuple[float, int] = (0.0, 0)
    run_at: float = 0.0
    alone: bool = False
    together: int = 0  # runs with other suspects that died; 2: it is a part of one, or to run alone
    tenant: str | None = None
    locked: bool = False  # by a transaction that is still open


@dataclass
class Queue:
    """All of it. now: moved by the tests."""

    jobs: dict[Part, Job] = field(default_factory=dict)
    done: set[tuple[int, int]] = field(default_factory=set)
    dead: dict[tuple[int, int], int] = field(default_factory=dict)
    cancelled: set[Part] = field(default_factory=set)
    now: float = 0.0
    paused: bool = False
    _count: int = 0

    def _next(self) -> int:
        self._count += 1
        return self._count

    def left(self, part: Part) -> list[int]:
        """Ordinals that are not settled."""
        return [o for o in range(part[1], part[2] + 1) if o not in self.jobs[part].settled]

    def add(self, change: int, n: int, tenant: str | None) -> None:
        """A committed change."""
        self.jobs[change, 1, n] = Job(tenant=tenant)

    def claim(self, token: int, order: list[Part], jobs: int, records: int) -> list[Part]:
        """order: the waiting parts by their numbers. Jobs until so many records are there."""
        taken: list[Part] = []
        size = 0
        for part in [] if self.paused else order[:jobs]:
            if size >= records:
                break
            size += part[2] - part[1] + 1
            taken.append(part)
        for part in taken:
            job = self.jobs[part]
            job.place, job.token, job.until = "lease", token, (self.now + LEASE, self._next())
            job.alone, job.together = False, 0
        return taken

    def expired(self) -> list[Part]:
        """Leases that ran out and may be taken."""
        return [
            part
            for part, job in self.jobs.items()
            if job.place == "lease" and job.until[0] <= self.now and not job.locked and not self.paused
        ]

    def reclaim(self, token: int, part: Part) -> None:
        """A suspect: it runs alone, and if it did already its crash is counted."""
        job = self.jobs[part]
        job.crashes += job.alone
        job.alone, job.token, job.until = True, token, (self.now + LEASE, self._next())

    def reclaim_together(self, token: int, parts: list[Part]) -> None:
        """Suspects for the first time or the second: no crash is counted for what they do together."""
        for job in (self.jobs[part] for part in parts):
            assert not (job.alone or job.together > 1 or job.crashes)
            job.together, job.token, job.until = job.together + 1, token, (self.now + LEASE, self._next())

    def heartbeat(self, token: int) -> bool:
        """Whether the token holds anything."""
        held = [job for job in self.jobs.values() if job.token == token]
        for job in held:
            if not job.locked:
                job.until = (self.now + LEASE, self._next())
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

    def retry(self, token: int, part: Part, ordinals: list[int], after: float, burn: bool) -> None:
        """Each waits by itself."""
        job = self.settle(token, part, ordinals)
        for o in ordinals:
            self.jobs[part[0], o, o] = Job(
                "delayed", attempt=job.attempt + burn, crashes=job.crashes, run_at=self.now + after, tenant=job.tenant
            )

    def bury(self, token: int, part: Part, ordinal: int) -> None:
        """A dead letter."""
        job = self.settle(token, part, [ordinal])
        self.dead[part[0], ordinal] = job.attempt + 1

    def give_back(self, token: int, parts: list[Part]) -> None:
        """Ready again, nothing counted."""
        for job in self.fence(token, parts):
            job.place, job.token, job.alone = "job", None, False

    def died(self, tokens: set[int]) -> None:
        """Its parent saw the worker die that holds these: its leases have ended, but for those that it is settling."""
        for job in self.jobs.values():
            if job.token is not None and job.token in tokens and not job.locked:
                job.until = (float("-inf"), self._next())

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
                until = (float("-inf"), self._next()) if ended else job.until
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
        self.cancelled.add(part)
        return True


# All states of a small one. A worker is what it holds: None, or (token, jobs, whether its reply was lost).

State = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, tuple[int, ...]] | None, ...], int, int, int, int]


@dataclass(frozen=True)
class Rules:
    """Bugs of the protocol that the model must not survive either."""

    ack_needs_token: bool = True
    output_with_ack: bool = True
    ack_counts: bool = True


def explore(rules: Rules = Rules()) -> tuple[int, list[str]]:
    """How many states there are, and what is wrong in any of them.

    leases: 0 ready, -1 done, else the token. outputs: how often each was written. The rest: what may still happen.
    """
    start: State = ((0, 0), (0, 0), (None, None), 1, 2, 1, 1)
    seen, todo, wrong = {start}, deque([start]), list[str]()
    ends = dict[State, list[State]]()
    while todo:
        state = todo.popleft()
        leases, outputs = state[0], state[1]
        for n in range(2):
            if outputs[n] > 1 or (leases[n] == -1) != (outputs[n] == 1):
                wrong.append(f"{leases[n]} with {outputs[n]} outputs")
        if wrong:
            return len(seen), wrong
        after = list(_moves(state, rules))
        ends[state] = after
        if not after and any(lease != -1 for lease in leases):
            return len(seen), ["stuck"]
        for other in after:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return len(seen), wrong


def _moves(state: State, rules: Rules) -> Iterator[State]:
    leases, outputs, workers, token, expiries, crashes, replies = state

    def put(values: tuple[int, ...], at: Iterable[int], value: int) -> tuple[int, ...]:
        return tuple(value if n in set(at) else old for n, old in enumerate(values))

    for w, held in enumerate(workers):

        def holding(
            what: tuple[int, tuple[int, ...]] | None, w: int = w
        ) -> tuple[tuple[int, tuple[int, ...]] | None, ...]:
            return tuple(what if n == w else old for n, old in enumerate(workers))

        if held is None:
            ready = [n for n, lease in enumerate(leases) if lease == 0]
            for some in [ready[:1], ready] if len(ready) > 1 else [ready] if ready else []:
                yield (
                    put(leases, some, token),
                    outputs,
                    holding((token, tuple(some))),
                    token + 1,
                    expiries,
                    crashes,
                    replies,
                )
            for n, lease in enumerate(leases):  # a lease that ran out, or whose worker is gone
                alive = any(other is not None and other[0] == lease for other in workers)
                if lease > 0 and (expiries or not alive):
                    yield (
                        put(leases, [n], token),
                        outputs,
                        holding((token, (n,))),
                        token + 1,
                        expiries - alive,
                        crashes,
                        replies,
                    )
            continue
        mine, jobs = held
        if rules.ack_needs_token:
            found = [n for n in jobs if leases[n] == mine]
        else:
            found = [n for n in jobs if leases[n] > 0]
        good = len(found) == len(jobs) or not rules.ack_counts
        write = jobs if good or not rules.output_with_ack else ()
        written = tuple(count + (n in write) for n, count in enumerate(outputs))
        acked = put(leases, found, -1) if good else leases
        yield acked, written, holding(None), token, expiries, crashes, replies
        if replies:  # it is tried again, and the fence tells
            yield acked, written, workers, token, expiries, crashes, replies - 1
        if crashes:
            yield leases, outputs, holding(None), token, expiries, crashes - 1, replies
