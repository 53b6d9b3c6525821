"""Ask: one question to a model, paid once and within what was agreed.

    memo -> limit -> budget -> ledger (one statement) -> send -> settled

A provider only sends: it knows nothing of the rest. No transaction is open while a model is asked.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

from anton import write
from anton.db import Database, current_database
from anton.errors import AntonError, BudgetReached, Discard, ModelRefused, WorldError
from anton.ledger import Begun, Budget, Ledger, Place, ledger_of, storable
from anton.limit import Limit, learnt, retry_after
from anton.memo import asking, hash_of, wait_for_other
from anton.price import Price
from anton.secret import hide

TRIES = 3  # of one model, when it is busy or down
SHORT = 30.0  # seconds of a Retry-After that a call waits itself; longer ones the handler waits
PATIENCE = 60.0  # seconds that a record waits for others, a limit or money that is on hold
MARGIN = 15.0  # seconds of a call's lease beyond its timeout, to be settled in
LONGEST = timedelta(minutes=30)  # that a handler waits before it looks whether a budget was raised
AHEAD = 30.0  # seconds that a request is let through before its time, for others to join it
SOON = 0.1  # seconds before its time that none joins a request any more: it would come too late
_BETWEEN = (408, 502, 504, 520, 524)  # of a gateway: the service behind it may have answered, and charge for it
_OVERHEAD = 100  # tokens that a service adds to a question at most,
_OF_TOOLS = 600  # and to one that is answered by calling a tool

Mode = Literal["schema", "tool", "prompt"]


@dataclass(frozen=True)
class Question:
    """What is sent. messages: {"role": "system" | "user" | "assistant", "content"}. params: as the service names them.

    schema: of a structured answer, with its name; mode: how it is asked for. place: questions of the same one are one
    request.
    """

    model: str
    messages: tuple[Mapping[str, str], ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    schema: Mapping[str, Any] | None = None
    schema_name: str = "answer"
    mode: Mode = "schema"
    timeout: float = 60.0
    place: Place | None = None


@dataclass(frozen=True)
class Reply:
    """What came back. model: its full name. cached, written: parts of tokens_in. limits: as its headers say.

    finish: "stop", "length" (cut off at max_tokens), "refused", or "empty": there is no answer in what came, which is
    the text. tokens_in, tokens_out: None when it does not say.
    """

    text: str
    model: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    cached: int = 0
    written: int = 0
    finish: str = "stop"
    limits: Sequence[Limit] = ()


class SendError(AntonError):
    """What a provider raises when it has no answer.

    kind: "busy" (try again, after so many seconds), "down", "refused" (this question), "wrong" (the key, the model:
    whatever is asked), "mode" (this mode is not known there), "malformed" (it answered, and not as it should: asked
    again, it would be paid again). paid: nobody knows whether it is charged for.
    """

    kind: Literal["busy", "down", "refused", "wrong", "mode", "malformed"]
    after: float | None
    paid: bool
    limits: Sequence[Limit]

    def __init__(self, kind: str, reason: str, *, after: float | None = None, paid: bool = False,
                 limits: Sequence[Limit] = ()) -> None:
        super().__init__(hide(reason), kind=kind, after=after, paid=paid, limits=limits)


def status_error(status: int, said: str, headers: Mapping[str, str]) -> SendError:
    """What an HTTP status other than 2xx means, the same for all services."""
    said = f"answered {status}: {said}"
    if status in (401, 402, 403, 404):                                 # the key, account or model: no record's fault
        return SendError("wrong", said)
    if status == 429:
        return SendError("busy", said, after=retry_after(headers), limits=learnt(headers))
    if status in (408, 409) or status >= 500:
        return SendError("down", said, after=retry_after(headers), paid=status in _BETWEEN)
    return SendError("refused", said)


class Provider(Protocol):
    """Sends questions to one service. service: its name for people. host: where it is, for limits."""

    @property
    def service(self) -> str: ...
    @property
    def host(self) -> str: ...

    async def send(self, question: Question) -> Reply:
        """One request, not repeated. Raises SendError."""


@dataclass(frozen=True)
class About:
    """For whom a question is asked."""

    app: str
    handler: str
    table: str
    key: Any = None
    change_id: int | None = None
    trace: int | None = None
    tenant: str | None = None
    prompt_version: str | None = None
    only: str | None = None                                            # its memo serves no other: the idempotency key


@dataclass(frozen=True)
class Answer:
    """A reply with what it cost. cost: US dollars; None: not known; 0 from memo. hash: what forget() takes."""

    reply: Reply
    call_id: int
    cost: Decimal | None
    memo: bool
    hash: str


class _Turn:
    """Of one loop: one at a time asks for a request of its own, and those after it may join that."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.place: Place | None = None


class Asker:
    """Asks a provider. ttl: seconds that an answer is kept.

    together: how many questions go in one request at most, and how many bytes; None: each is one.
    """

    def __init__(self, provider: Provider, *, budgets: Sequence[Budget] = (), limits: Sequence[Limit] = (),
                 ttl: float = 0.0, together: tuple[int, int] | None = None) -> None:
        self.provider = provider
        self.budgets = budgets
        self.limits = limits
        self.ttl = ttl
        self.together = together
        self._paced = bool(limits)                                     # without a limit nobody waits for a request
        self._turns: WeakKeyDictionary[Ledger, _Turn] = WeakKeyDictionary()

    async def ask(self, db: Database, question: Question, about: About, price: Price | None, *,
                  last: bool = True) -> Answer:
        """The answer to a question. last: there is no other model to ask instead, so that waiting is worth it.

        Raises WorldError, BudgetReached, ModelRefused; SendError of kind "mode" or "malformed"; Discard when it can
        cost more than all of a budget.
        """
        ledger = ledger_of(db)
        facts = await self._facts(ledger, question, about, price)
        begun = await self._begin(ledger, facts, last)
        tries = 0
        with asking(facts["hash"], last):
            while True:
                if begun.verdict == "answer":
                    return Answer(Reply(**begun.answer), begun.call_id or 0, Decimal(0), True, facts["hash"])
                try:
                    answer = await self._send(ledger, question, begun, facts, price)
                    if answer is not None:
                        return answer
                except SendError as error:
                    if error.kind in ("mode", "malformed"):
                        raise
                    if error.kind == "refused":
                        raise ModelRefused(self.provider.service, question.model, error.message) from error
                    tries += 1
                    wait = error.after if error.after is not None else 0.25 * 2 ** tries * random.uniform(0.75, 1.25)
                    if error.kind == "wrong" or tries >= TRIES or wait > (SHORT if last else 1.0):
                        world = WorldError(f"{self.provider.service} ({question.model}): {error.message}")
                        world.after = None if error.after is None else timedelta(seconds=error.after)
                        raise world from error
                    await asyncio.sleep(wait)
                begun = await self._begin(ledger, facts, last, first=False)

    async def forget(self, db: Database, answers: Sequence[Answer]) -> None:
        """These answers are of no use: the same question is asked again."""
        await ledger_of(db).forget([answer.hash for answer in answers])

    async def _facts(self, ledger: Ledger, question: Question, about: About, price: Price | None) -> dict[str, Any]:
        """What begin_calls() wants to know."""
        asked = [self.provider.service, self.provider.host, question.model, question.messages, question.params,
                 question.max_tokens, question.schema, about.tenant, about.only]
        most_in = most_tokens(question)
        out = question.max_tokens
        ids = await ledger.put_budgets(self.budgets, about.app, about.handler, about.table)
        quota = f"{self.provider.service} {self.provider.host} {question.model}"
        for limit in self.limits:
            await ledger.put("put_quota", quota, limit.unit, Decimal(limit.amount), limit.seconds)
        return {
            "hash": hash_of(*asked), "ttl": self.ttl, "quota": quota,
            "tokens": most_in // 3 + (500 if out is None else out), "size": most_in, "lease": question.timeout + MARGIN,
            "app": about.app, "handler": about.handler,
            "key": about.key, "change_id": about.change_id, "trace": about.trace, "tenant": about.tenant,
            "provider": self.provider.service, "model": question.model, "prompt_version": about.prompt_version,
            "params": {**question.params, **({} if out is None else {"max_tokens": out})}, "budgets": ids,
            "reserved": None if price is None or out is None else str(price.most(most_in, out)),
            "reserved_tokens": None if out is None else most_in + out,
            "price_version": None if price is None else price.version,
        }

    async def _begin(self, ledger: Ledger, facts: Mapping[str, Any], last: bool, *, first: bool = True) -> Begun:
        """Until it is answered, or may be sent. first: this process may be asking the same."""
        ends = time.monotonic() + (PATIENCE if last else 1.0)
        while True:
            if first and await wait_for_other(facts["hash"], PATIENCE, last):
                ends = max(ends, time.monotonic() + 1)
            begun = await self._let_through(ledger, facts)
            if begun.verdict in ("answer", "send"):
                return begun
            wait = begun.wait
            if begun.verdict == "never":
                raise Discard(f"{facts['provider']} ({facts['model']}): {begun.reason}. It is not asked. Raise budget= "
                              "or ask for less, then: anton dead replay")
            if begun.verdict == "refused":
                await ledger.lapse()
                after = LONGEST if wait is None else min(timedelta(seconds=wait), LONGEST)
                raise BudgetReached(begun.reason or "", after)
            wait = wait or 0.25
            if time.monotonic() + wait > ends:
                waits = WorldError(f"{facts['provider']} ({facts['model']}): waited {PATIENCE:.0f} s for "
                                   f"{begun.reason or 'the same question, which another process asks'}")
                waits.after = timedelta(seconds=wait)
                raise waits
            await asyncio.sleep(wait)

    async def _let_through(self, ledger: Ledger, facts: Mapping[str, Any]) -> Begun:
        """Asks the ledger. Where requests are limited, as many questions as may go with each."""
        if self.together is None or not self._paced:
            begun = await ledger.begin(facts)
            self._paced = self._paced or begun.late < math.inf
            return begun
        turn = self._turns.setdefault(ledger, _Turn())
        most, bytes = self.together
        async with turn.lock:
            place, now = turn.place, time.monotonic()
            if place is None or place.due < now + SOON or place.calls >= most or place.size + facts["size"] > bytes:
                begun = await ledger.begin({**facts, "ahead": AHEAD, "lease": facts["lease"] + AHEAD})
                if begun.verdict == "send":
                    turn.place = Place(begun.due, begun.late, 1, facts["size"])
                    begun = begun._replace(place=turn.place)
                return begun
            place.calls += 1
            place.size += facts["size"]
        begun = await ledger.begin({**facts, "ahead": place.due - now, "joins": True, "lease": facts["lease"] + AHEAD})
        if begun.verdict == "send":
            return begun._replace(due=place.due, late=place.late, place=place)
        place.calls -= 1
        place.size -= facts["size"]
        if begun.verdict == "later" and turn.place is place:           # its tokens are used up: the next needs another
            turn.place = None
        return begun

    async def _send(self, ledger: Ledger, question: Question, begun: Begun, facts: Mapping[str, Any],
                    price: Price | None) -> Answer | None:
        """Sends what may be sent, and settles it; None when it was too late for that. Raises SendError."""
        ended: dict[str, Any] = {"id": begun.call_id, "quota": facts["quota"], "ttl": self.ttl, "limits": [], "over": 0}
        sent = False
        started = time.perf_counter()
        try:
            await asyncio.sleep(begun.due - time.monotonic())
            if time.monotonic() > begun.late or (begun.place is not None and begun.place.gone):  # the loop was busy
                await ledger.end(ended | {"state": "unsent"})
                return None
            sent, started = True, time.perf_counter()
            async with asyncio.timeout(question.timeout):
                reply = await self.provider.send(replace(question, place=begun.place))
            reply = replace(reply, text=storable(reply.text), **_counted(reply))
        except TimeoutError:
            error = SendError("down", f"no answer in {question.timeout:g} s", paid=True)
            await ledger.end(ended | _failed(error, started))
            raise error from None
        except SendError as error:
            await ledger.end(ended | _failed(error, started))
            raise
        except BaseException as error:                                 # cancelled, or a mistake of the provider
            state = "unknown" if sent else "unsent"
            ledger.end_later(ended | {"state": state, "error": hide(f"{type(error).__name__}: {error}")})
            raise
        cost = None
        used = None
        if reply.tokens_in is not None and reply.tokens_out is not None:
            used = reply.tokens_in + reply.tokens_out
            cost = None if price is None else price.cost(reply.tokens_in, reply.tokens_out, reply.cached, reply.written)
        await ledger.end(ended | {
            "state": "done", "tokens_in": reply.tokens_in, "tokens_cached": reply.cached,
            "tokens_out": reply.tokens_out, "cost": None if cost is None else str(cost),
            "answered_by": reply.model,
            "answer": {"text": reply.text, "model": reply.model, "tokens_in": reply.tokens_in,
                       "tokens_out": reply.tokens_out, "cached": reply.cached, "finish": reply.finish},
            "limits": [limit.facts() for limit in reply.limits], "over": facts["tokens"] - used if used else 0,
            "ms": (time.perf_counter() - started) * 1000})
        return Answer(reply, begun.call_id or 0, cost, False, facts["hash"])


def _tokens(said: Any) -> int | None:
    """A number of tokens as it can be reckoned with; None for what is none: servers say odd things."""
    return int(said) if isinstance(said, int | float) and 0 <= said < 1e15 and said == int(said) else None


def _counted(reply: Reply) -> dict[str, Any]:
    """Its tokens. What is cached is a part of what went in: where a server says more of it, it counted it apart."""
    cached, written, into = _tokens(reply.cached) or 0, _tokens(reply.written) or 0, _tokens(reply.tokens_in)
    if into is not None and cached + written > into:
        into += cached + written
    return {"tokens_in": into, "tokens_out": _tokens(reply.tokens_out), "cached": cached, "written": written}


def _failed(error: SendError, started: float) -> dict[str, Any]:
    block = (error.after if error.after is not None else 1.0) if error.kind == "busy" else 0
    return {"state": "unknown" if error.paid else "failed", "error": error.message, "block": block,
            "limits": [limit.facts() for limit in error.limits], "ms": (time.perf_counter() - started) * 1000}


def database() -> Database:
    """The scope's, else the process's."""
    current = write.scope.get()
    return current.db if current is not None else current_database()


def most_tokens(question: Question) -> int:
    """How many tokens a question has at most: a token is a byte at least."""
    texts = [text for message in question.messages for text in message.values()]
    size = sum(len(text.encode()) for text in texts) + 16 * len(question.messages) + _OVERHEAD
    if question.schema is None:
        return size
    return size + len(str(question.schema).encode()) + (_OF_TOOLS if question.mode == "tool" else 0)


def with_mode(question: Question, mode: Mode) -> Question:
    """The same question, its answer's shape asked for in another way."""
    return replace(question, mode=mode)
