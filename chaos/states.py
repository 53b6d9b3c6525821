"""States: every one that a small protocol can reach, with what holds in all of them.

Two workers; a change of two records in one job, and one of a single record whose producer has not committed yet. What
may go wrong is counted in May: how often at most; all of it at once would be millions of states, so there are three
WORLDS. Rules are the protocol's, each of which can be switched off; then explore() names the invariant that breaks (the
numbers are those of tests/test_state_machine.py) and the shortest way to it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

FIRST, SECOND = (0, 1), (2,)  # the records of the two changes


@dataclass(frozen=True)
class Rules:
    """What the protocol asks. False: it does not, which is a bug."""

    ack_needs_token: bool = True
    ack_counts: bool = True
    ack_takes_all: bool = True
    ack_writes_outputs: bool = True
    output_waits_for_ack: bool = True
    answer_after_commit: bool = True
    job_with_commit: bool = True
    claim_locks: bool = True
    rescue_looks_again: bool = True
    heartbeat_needs_token: bool = True
    split_keeps_all: bool = True
    retry_drops_output: bool = True
    second_look: bool = True
    cancel_only_waiting: bool = True
    pause_stops_claims: bool = True
    crash_counts: bool = True


class Job(NamedTuple):
    """Records in one place. token: 0 is ready. deaths: what crashes has to be."""

    records: tuple[int, ...]
    token: int = 0
    alone: bool = False
    crashes: int = 0
    deaths: int = 0


class Worker(NamedTuple):
    """phase: awake, announcing, asleep, claiming, reaping, running, or wrote: its outputs, but no ack yet.

    jobs: the records of each job that it chose or holds. token: what it holds them by; reaping: what others did.
    """

    phase: str = "awake"
    token: int = 0
    jobs: tuple[tuple[int, ...], ...] = ()


class May(NamedTuple):
    """What may still happen."""

    expire: int = 0  # a lease of a worker that lives
    crash: int = 0
    lose: int = 0  # the reply to an ack
    retry: int = 0
    split: int = 0
    cancel: int = 0
    pause: int = 0

    def less(self, what: str) -> May:
        """Once less."""
        return self._replace(**{what: getattr(self, what) - 1})


WORLDS = (
    May(expire=2, crash=1, lose=1),
    May(expire=1, retry=1, split=1, cancel=1),
    May(expire=1, lose=1, cancel=1, pause=1),
)


class State(NamedTuple):
    """All of it. fates, outputs, newest by record: how it ended, how many outputs it has, the last token given."""

    queue: tuple[Job, ...]
    fates: tuple[str, ...] = ("", "", "")
    outputs: tuple[int, ...] = (0, 0, 0)
    newest: tuple[int, ...] = (0, 0, 0)
    workers: tuple[Worker, ...] = (Worker(), Worker())
    producer: str = "idle"  # open, committed, gone
    told: bool = False
    paused: bool = False
    may: May = May()


class Move(NamedTuple):
    """A step. fault: nothing may have to wait for it. worker: who takes it, as it was before."""

    name: str
    to: State
    fault: bool = False
    worker: Worker = Worker()


@dataclass(frozen=True)
class Explored:
    """How many states there are; what is wrong in the first bad one, and the moves that lead there."""

    states: int
    wrong: tuple[str, ...] = ()
    path: tuple[str, ...] = ()


def explore(rules: Rules = Rules()) -> Explored:
    """All states of all worlds. Ends at the first in which an invariant does not hold, or that a step breaks."""
    states = 0
    for may in WORLDS:
        found = _explore(rules, may)
        states += found.states
        if found.wrong:
            return found
    return Explored(states)


def _explore(rules: Rules, may: May) -> Explored:
    start = State((Job(FIRST),), may=may)
    came: dict[State, tuple[State, str] | None] = {start: None}
    before = defaultdict[State, list[State]](list)  # by moves that are no faults
    ended, todo = list[State](), deque([start])

    def path(state: State, *last: str) -> tuple[str, ...]:
        names = list(last)
        while (step := came[state]) is not None:
            state = step[0]
            names.insert(0, step[1])
        return tuple(names)

    while todo:
        state = todo.popleft()
        if bad := wrong(state):
            return Explored(len(came), bad, path(state))
        if not state.queue and state.producer in ("committed", "gone"):
            ended.append(state)
        for move in _moves(state, rules):
            if bad := _wrong_move(state, move):
                return Explored(len(came), bad, path(state, move.name))
            after = _canonical(move.to)
            if not move.fault:
                before[after].append(state)
            if after not in came:
                came[after] = state, move.name
                todo.append(after)
    good, todo = set(ended), deque(ended)
    while todo:
        for state in before[todo.popleft()]:
            if state not in good:
                good.add(state)
                todo.append(state)
    stuck = next((state for state in came if state not in good), None)
    if stuck is not None:
        return Explored(len(came), ("I9: from here on not all is ever done",), path(stuck))
    return Explored(len(came))


def wrong(state: State) -> tuple[str, ...]:
    """The invariants that do not hold in a state."""
    found = list[str]()
    exists = state.producer == "committed"
    for record in (*FIRST, *SECOND):
        places = [job for job in state.queue if record in job.records]
        fate, outputs = state.fates[record], state.outputs[record]
        if record in SECOND and not exists:
            if places or fate or outputs:
                found.append("I2: a job without its commit")
        elif len(places) + bool(fate) < 1:
            found.append("I1: a record is nowhere")
        elif len(places) > 1:
            found.append("I1: a record is in two places")
        if fate and places:
            found.append(f"I7: {fate} and in the queue")
        if outputs > (fate == "done"):
            found.append("I5: an output of what is not done" if fate != "done" else "I6: two outputs of one record")
        if outputs < (fate == "done"):
            found.append("I6: done without its output")
    for job in state.queue:
        if job.token and any(state.newest[record] != job.token for record in job.records):
            found.append("I3: a lease under a token that is not the newest")
        if job.crashes != job.deaths:
            found.append("I8: a crash that is not counted")
    if state.told and state.producer == "gone":
        found.append("I14: 2xx, and no record")
    return tuple(dict.fromkeys(found))


def _wrong_move(state: State, move: Move) -> tuple[str, ...]:
    """The invariants that a step breaks."""
    found, worker, after = list[str](), move.worker, move.to
    mine = {record for job in worker.jobs for record in job}
    if move.name in ("claim", "reclaim") and state.paused:
        found.append("I10: claimed while paused")
    if worker.phase in ("running", "wrote"):
        held = all(any(job.records == one and job.token == worker.token for job in state.queue) for one in worker.jobs)
        kept = ("queue", "fates", "outputs")
        if not held and any(getattr(state, name) != getattr(after, name) for name in kept):
            found.append("I4: a stale token changed something")
        done = {record for record in mine if after.fates[record] == "done" != state.fates[record]}
        if move.name == "ack" and done and done != mine:
            found.append("I12: an ack of some of its jobs")
    return tuple(found)


def _canonical(state: State) -> State:
    """The same for all states that differ in the names of tokens, or in which worker is which."""
    live = {job.token for job in state.queue} | {worker.token for worker in state.workers}
    names = {token: n for n, token in enumerate(sorted(live | {0}))}
    return state._replace(
        queue=tuple(sorted(job._replace(token=names[job.token]) for job in state.queue)),
        newest=tuple(names.get(token, -1) for token in state.newest),
        workers=tuple(sorted(worker._replace(token=names[worker.token]) for worker in state.workers)),
    )


def _set(values: tuple[str, ...], records: set[int], value: str) -> tuple[str, ...]:
    return tuple(value if n in records else old for n, old in enumerate(values))


def _add(values: tuple[int, ...], records: set[int]) -> tuple[int, ...]:
    return tuple(old + (n in records) for n, old in enumerate(values))


def _give(state: State, records: set[int], token: int) -> tuple[int, ...]:
    return tuple(token if n in records else old for n, old in enumerate(state.newest))


def _moves(state: State, rules: Rules) -> Iterator[Move]:
    yield from _outside(state, rules)
    for n, worker in enumerate(state.workers):
        others = state.workers[:n] + state.workers[n + 1 :]

        def put(now: Worker, n: int = n, **changed: object) -> State:
            workers = state.workers[:n] + (now,) + state.workers[n + 1 :]
            return state._replace(workers=workers, **changed)  # type: ignore[arg-type]

        match worker.phase:
            case "awake":
                locked = {one for other in others if other.phase == "claiming" for one in other.jobs}
                open_ = not state.paused or not rules.pause_stops_claims
                ready = [
                    job.records
                    for job in state.queue
                    if not job.token and open_ and not (rules.claim_locks and job.records in locked)
                ]
                for some in [ready[:1], ready] if len(ready) > 1 else [ready] if ready else []:
                    yield Move("claim", put(Worker("claiming", 0, tuple(some))))
                for job in state.queue if open_ else ():
                    alive = any(job.token == other.token for other in others if other.phase in ("running", "wrote"))
                    if job.token and (state.may.expire or not alive):
                        may = state.may.less("expire") if alive else state.may
                        yield Move("reclaim", put(Worker("reaping", job.token, (job.records,)), may=may), fault=alive)
                if not ready:
                    yield Move("look", put(Worker("announcing")))
            case "announcing":
                ready = [job.records for job in state.queue if not job.token and not state.paused]
                yield Move("announce", put(Worker("awake" if ready and rules.second_look else "asleep")))
            case "asleep":
                if any(job.token for job in state.queue) and not state.paused:  # wake_at
                    yield Move("wake", put(Worker()))
            case "claiming":
                token = _fresh(state)
                mine = {record for one in worker.jobs for record in one}
                rest = tuple(job for job in state.queue if job.token or job.records not in worker.jobs)
                taken = {job.records: job for job in state.queue if not job.token}
                leases = tuple(taken.get(one, Job(one))._replace(token=token) for one in worker.jobs)
                yield Move(
                    "take",
                    put(
                        Worker("running", token, worker.jobs),
                        queue=rest + leases,
                        newest=_give(state, mine, token),
                    ),
                )
            case "reaping":
                (one,), token = worker.jobs, _fresh(state)
                found = [job for job in state.queue if job.records == one and job.token == worker.token]
                if not found and rules.rescue_looks_again:
                    yield Move("rescue nothing", put(Worker()))
                    continue
                rest = tuple(job for job in state.queue if job not in found)
                old = found[0] if found else Job(one)
                lease = Job(one, token, True, old.crashes + (old.alone and rules.crash_counts), old.deaths + old.alone)
                yield Move(
                    "rescue",
                    put(
                        Worker("running", token, (one,)),
                        queue=(*rest, lease),
                        newest=_give(state, set(one), token),
                    ),
                )
            case _:
                for move in _run(state, rules, worker, put):
                    yield move._replace(worker=worker)


def _fresh(state: State) -> int:
    return 1 + max(*state.newest, *(worker.token for worker in state.workers), *(job.token for job in state.queue), 0)


def _run(state: State, rules: Rules, worker: Worker, put: object) -> Iterator[Move]:
    """What a worker with jobs may do."""
    assert callable(put)
    token, may = worker.token, state.may
    mine = {record for one in worker.jobs for record in one}
    held = [job for job in state.queue if job.records in worker.jobs and job.token == token]
    rest = tuple(job for job in state.queue if job not in held)
    if may.crash:
        yield Move("crash", put(Worker(), may=may.less("crash")), fault=True)
    if not rules.heartbeat_needs_token:
        again = tuple(job._replace(token=token) if job.records in worker.jobs else job for job in state.queue)
        yield Move("beat", put(worker, queue=again))
    if worker.phase == "running" and not rules.output_waits_for_ack:
        yield Move("write", put(worker._replace(phase="wrote"), outputs=_add(state.outputs, mine)))
    else:
        any_ = [job for job in state.queue if job.records in worker.jobs and job.token]
        found = held if rules.ack_needs_token else any_
        after = state
        if len(found) == len(worker.jobs) or not rules.ack_counts:
            found = found if rules.ack_takes_all else found[:1]
            done = {record for job in found for record in job.records}
            writes = worker.phase == "running" and rules.ack_writes_outputs
            outputs = _add(state.outputs, mine) if writes else state.outputs
            queue = tuple(job for job in state.queue if job not in found)
            after = state._replace(queue=queue, fates=_set(state.fates, done, "done"), outputs=outputs)
        changed = {"queue": after.queue, "fates": after.fates, "outputs": after.outputs}
        yield Move("ack", put(Worker(), **changed))
        if may.lose:  # it is tried again, and the fence tells
            yield Move("ack", put(worker, **changed, may=may.less("lose")), fault=True)
    if len(held) < len(worker.jobs):
        return  # refused, all of it
    ready = tuple(job._replace(token=0, alone=False) for job in held)
    yield Move("give back", put(Worker(), queue=rest + ready))
    if len(worker.jobs) > 1 or worker.phase == "wrote":
        return
    (job,) = held
    for record in job.records if may.retry else ():
        good = set(job.records) - {record}
        yield Move(
            "retry",
            put(
                Worker(),
                queue=(*rest, job._replace(records=(record,), token=0, alone=False)),
                fates=_set(state.fates, good, "done"),
                outputs=_add(state.outputs, good if rules.retry_drops_output else set(job.records)),
                may=may.less("retry"),
            ),
        )
    if len(job.records) > 1 and may.split:
        records = job.records if rules.split_keeps_all else job.records[:-1]
        parts = tuple(Job((record,), token) for record in records)
        jobs = tuple(part.records for part in parts)
        yield Move("split", put(worker._replace(jobs=jobs), queue=rest + parts, may=may.less("split")))


def _outside(state: State, rules: Rules) -> Iterator[Move]:
    """What the producer and people do."""
    awake = tuple(Worker() if worker.phase == "asleep" else worker for worker in state.workers)
    if state.producer == "idle":
        queue = state.queue if rules.job_with_commit else (*state.queue, Job(SECOND))
        yield Move("append", state._replace(producer="open", queue=queue))
    if state.producer == "open":
        queue = (*state.queue, Job(SECOND)) if rules.job_with_commit else state.queue
        yield Move("commit", state._replace(producer="committed", queue=queue, workers=awake))
        yield Move("roll back", state._replace(producer="gone"), fault=True)
    if not state.told and state.producer in ("committed", *(() if rules.answer_after_commit else ("open",))):
        yield Move("answer", state._replace(told=True))
    if state.paused:
        yield Move("resume", state._replace(paused=False, workers=awake))
    elif state.may.pause:
        yield Move("pause", state._replace(paused=True, may=state.may.less("pause")), fault=True)
    if state.may.cancel:
        may = state.may.less("cancel")
        locked = {one for worker in state.workers if worker.phase == "claiming" for one in worker.jobs}
        for job in state.queue:
            if not job.token and job.records not in locked:
                rest = tuple(other for other in state.queue if other != job)
                fates = _set(state.fates, set(job.records), "cancelled")
                yield Move("cancel", state._replace(queue=rest, fates=fates, may=may), fault=True)
        for record, fate in enumerate(state.fates):
            if fate == "done" and not rules.cancel_only_waiting:
                yield Move("cancel", state._replace(queue=(*state.queue, Job((record,))), may=may), fault=True)
