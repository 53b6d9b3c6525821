"""Tuning: a model that learns from what was approved. Examples, the service's job, and the alias are rows.

    replies = OpenAiFineTune("replies", examples=sql("select prompt, completion from … where rating > 0"))
    prompts.on_new_records(OpenAiCompletion(completions, model="alias:replies"))
    @cron.weekly
    def rebuild_model(): replies.run()

    run() -> new -> examples uploaded, job made -> running -> succeeded: the alias is its model; failed, cancelled

What a job can cost at most is reserved in the ledger before it is made, and settled when it is over.

The rows are the Table "tunings", so that handlers may listen to them: an alias means the model of its newest row in
state succeeded, and the base model until there is one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, ClassVar, Literal

import orjson
from pydantic import BaseModel

from anton.action import effects
from anton.app import App, current_app
from anton.ask import database
from anton.component import Component
from anton.ctx import Ctx
from anton.db import literal
from anton.duration import duration
from anton.errors import AntonError, BadOption, BudgetReached, Retry, WorldError, did_you_mean
from anton.handler import HandlerSpec
from anton.ledger import agree, budgets_of, ledger_of
from anton.memo import hash_of
from anton.price import Price
from anton.query import Sql
from anton.secret import Env
from anton.table import Table

TABLE = "tunings"
FRESH = 5.0  # seconds that a process believes what an alias means
LEAST = 10  # examples; OpenAI's
HELD = 30 * 86400.0  # seconds that money is held for a job; after that it counts as spent until somebody settles it
LOOKS = 1000  # at a job, 60 of them as often as is said, the next 60 half as often, and so on to a tenth

State = Literal["new", "running", "succeeded", "failed", "cancelled", "captured", "retired"]


class Tuning(BaseModel):
    """A row of "tunings": one run. app: whose alias.

    state "captured": nothing was sent; "retired": by hand, so that its model is used no more. examples, hash: of what
    was uploaded. file, job: their ids at the service. model: what came of it. tokens: that were trained. call: its row
    in the ledger (anton costs show).
    """

    id: int | None = None
    app: str
    alias: str
    base: str
    state: State = "new"
    examples: int | None = None
    hash: str | None = None
    file: str | None = None
    job: str | None = None
    model: str | None = None
    tokens: int | None = None
    error: str | None = None
    call: int | None = None


@dataclass(frozen=True)
class Job:
    """What a service says of a job. state: "running" while it is not over. model: once it succeeded.

    tokens: that it charges for, each as often as it was trained; None: it does not say.
    """

    id: str
    state: Literal["running", "succeeded", "failed", "cancelled"]
    model: str | None = None
    tokens: int | None = None
    error: str | None = None


class FineTune(Component):
    """Tunes a model from examples, and gives what comes of it a name for completions: model="alias:NAME".

    alias: the name. model: which is tuned. examples: sql() with prompt and completion, and perhaps system; or messages,
    as the service takes them. system: for all of them. least: with fewer a run fails. look: how often a running job is
    asked for; a tenth as often the longer it runs, for five days at "1m", and after that its look is a dead letter.
    epochs: how often each example is trained; default the service's choice. budget: such as "20 USD/month"; it needs
    epochs=, so that what a job can cost at most is known before. price: US dollars for a million trained tokens,
    {"input": "5"}; without it the cost is unknown, and says so in anton costs.
    base_url: another server. timeout: seconds for one answer. allow_pii: the examples may hold PII. A run sends its
    examples to the service, and costs there. Where effects are captured nothing is sent.
    Raises BadOption.
    """

    acts = True
    home: ClassVar[str] = ""

    def __init__(self, alias: str, *, model: str, examples: Sql, secret: Env | str | None = None,
                 system: str | None = None, least: int = LEAST, look: str | float | timedelta = "1m",
                 epochs: int | None = None, budget: str | Sequence[str] | None = None,
                 price: Mapping[str, Any] | None = None, base_url: str | None = None, timeout: float = 60.0,
                 allow_pii: bool = False, connection: str | None = None) -> None:
        super().__init__(secret=secret, allow_pii=allow_pii, connection=connection)
        if not alias.replace("-", "").replace("_", "").isalnum():
            raise BadOption("alias", alias, self.name, 'letters, digits, - and _, such as "replies"')
        if not model:
            raise BadOption("model", model, self.name, "the name of a model that the service tunes")
        if least < 1:
            raise BadOption("least", least, self.name, "a whole number from 1")
        if epochs is not None and not 1 <= epochs <= 50:
            raise BadOption("epochs", epochs, self.name, "a whole number from 1 to 50")
        self.alias = alias
        self.model = model
        self.examples = examples
        self.system = system
        self.least = least
        self.base_url = self.address(base_url)
        self.timeout = timeout
        self.every = duration(look, "look", self.name)
        self.epochs = epochs
        self._app = app = current_app()
        self._price = None if price is None else Price.of({"output": 0, **price}, owner=self.name)
        self._budgets = budgets_of(budget, self.name)
        if self._budgets and epochs is None:
            raise BadOption("budget", budget, self.name, "a budget with epochs=, so that what a job can cost at most "
                            "is known before it is made")
        if self._price is None and any(one.unit == "usd" for one in self._budgets):
            raise BadOption("budget", budget, self.name, 'dollars only with price={"input": …}, in dollars for a '
                            "million trained tokens, or a budget in tokens")
        agree(self._budgets, app.budgets, "app", app.name, self.name, self.place)
        agree(self._budgets, app.budgets, "table", TABLE, self.name, self.place)
        self._known: tuple[float, str] | None = None
        app.claim_name("alias", alias, self.place)
        app.aliases[alias] = self
        self.tunings: Table[Tuning] = app.tables.get(TABLE) or Table(TABLE, Tuning, index=[("app", "alias", "state")])
        mine = f"app = {literal(app.name)} and alias = {literal(alias)} and state ="
        self.tunings.on_new_records(self, where=f"{mine} 'new'", name=f"tune_{alias}")
        self.tunings.on_updated_records(self.look, each=True, where=f"{mine} 'running'", columns=["job"], read="now",
                                        name=f"look_at_{alias}", attempts=LOOKS)

    async def upload(self, lines: bytes) -> str:
        """Sends examples, a JSON object a line; their id. Raises WorldError, or Refused for what is wrong with them."""
        raise NotImplementedError

    async def start(self, file: str, key: str) -> Job:
        """Makes a job, or finds the one that was made with the same key. Raises WorldError, Refused."""
        raise NotImplementedError

    async def job(self, id: str) -> Job:
        """How a job is. Raises WorldError, Refused."""
        raise NotImplementedError

    def run(self) -> None:
        """Records a run; it is made by a worker, and commits with what surrounds it."""
        self.tunings.append({"app": self._app.name, "alias": self.alias, "base": self.model})

    async def current(self) -> str:
        """The model that the alias means now."""
        if self._known is None or self._known[0] < time.monotonic():
            mine = self.tunings.select(app=self._app.name, alias=self.alias, state="succeeded")
            done = await mine.order_by("-id").limit(1)
            model = done[0].model if done else None
            self._known = time.monotonic() + FRESH, model or self.model
        return self._known[1]

    def queries(self) -> Mapping[str, str]:
        """The examples."""
        return {"examples": self.examples.text}

    def bind(self, table: Table[Any]) -> HandlerSpec:
        """What handles new rows of "tunings"."""
        return HandlerSpec(fn=self.begin, name=self.name, each=True,
                           options={"concurrency": 1, "timeout": "10m"})

    async def begin(self, row: Tuning, ctx: Ctx) -> None:
        """Uploads the examples of a new run, and has the service begin."""
        try:
            lines, hash = await self._lines()
        except Refused as error:
            self._set(row, state="failed", error=error.message)
            return
        found: dict[str, Any] = {"examples": len(lines), "hash": hash}
        if len(lines) < self.least:
            self._set(row, state="failed", error=f"{len(lines)} examples, where at least {self.least} are needed",
                      **found)
        elif effects() != "live" or self.credential() is None:
            self._set(row, state="captured", **found)
        else:
            call: int | None = None
            try:
                call = await self._hold(lines, row, ctx)
                file = await self.upload(b"".join(line + b"\n" for line in lines))
                job = await self.start(file, ctx.key)
            except Refused as error:
                await self._settle(call, "failed", error=error.message)
                self._set(row, state="failed", error=error.message, call=call, **found)
            else:
                self._set(row, state="running", file=file, job=job.id, call=call, **found)  # over or not: look()

    async def look(self, row: Tuning, ctx: Ctx) -> None:
        """Asks for a job that runs, again and again until it is over."""
        if row.state != "running" or row.job is None:                  # changed by hand meanwhile
            return
        if effects() != "live" or self.credential() is None:
            raise Retry("not asked for where nothing may leave", after=self.every)
        try:
            job = await self.job(row.job)
        except Refused as error:
            await self._settle(row.call, "unknown", error=error.message)
            self._set(row, state="failed", error=error.message)
            return
        if job.state == "running":
            raise Retry(f"{job.id} is running", after=self.every * min(10, 1 + ctx.change.attempt // 60))
        known = job.state == "succeeded" or job.tokens is not None     # else nobody knows how much was trained
        await self._settle(row.call, "done" if known else "unknown", job.tokens, job.model, job.error)
        self._set(row, **_said(job))

    async def _hold(self, lines: Sequence[bytes], row: Tuning, ctx: Ctx) -> int:
        """Reserves what the job can cost at most; its call, the same when the run is begun again.

        Raises BudgetReached, WorldError; Refused when it is more than all of a budget.
        """
        ledger, change = ledger_of(database()), ctx.change
        most = None if self.epochs is None else self.epochs * sum(map(len, lines))  # a token is a byte at least
        hash = hash_of("tune", self.service, self.base_url or self.home, ctx.key)
        begun = await ledger.begin({
            "hash": hash, "ttl": 0, "quota": "", "tokens": 0, "lease": HELD, "app": self._app.name,
            "handler": ctx.handler, "key": [row.id], "change_id": change.id, "trace": change.trace,
            "tenant": change.tenant, "provider": self.service, "model": self.model,
            "params": {"examples": len(lines), "epochs": self.epochs},
            "budgets": await ledger.put_budgets(self._budgets, self._app.name, ctx.handler, TABLE),
            "reserved": None if most is None or self._price is None else str(self._price.most(most, 0)),
            "reserved_tokens": most, "price_version": None if self._price is None else self._price.version})
        if begun.verdict == "never":
            raise Refused(f"{begun.reason}: raise budget=, or train fewer examples or epochs")
        if begun.verdict == "refused":
            raise BudgetReached(begun.reason or "", None if begun.wait is None else timedelta(seconds=begun.wait))
        call = await ledger.held(hash) if begun.verdict == "wait" else begun.call_id
        if call is None:
            raise WorldError(f"{self.name}: {begun.reason or 'the ledger has no place for it yet'}")
        return call

    async def _settle(self, call: int | None, state: str, tokens: int | None = None, model: str | None = None,
                      error: str | None = None) -> None:
        if call is None:                                               # begun by a release that kept no ledger of it
            return
        cost = None if tokens is None or self._price is None else str(self._price.cost(tokens, 0))
        await ledger_of(database()).end({
            "id": call, "quota": "", "ttl": 0, "limits": [], "over": 0, "state": state, "tokens_in": tokens,
            "tokens_cached": 0, "tokens_out": None if tokens is None else 0, "cost": cost, "answered_by": model,
            "error": error})

    def _set(self, row: Tuning, **values: Any) -> None:
        self.tunings.select(id=row.id).update(**values)

    async def _lines(self) -> tuple[list[bytes], str]:
        """The examples as the service takes them, and what they are."""
        rows = await self.examples
        lines = [orjson.dumps({"messages": self._messages(row)}) for row in rows]
        return lines, sha256(b"\n".join(lines)).hexdigest()

    def _messages(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        if row.get("messages"):
            given: Sequence[Mapping[str, Any]] = row["messages"]
            return given
        for name in ("prompt", "completion"):
            if row.get(name) is None:
                raise Refused(f"an example without {name}: a row of {', '.join(row)}. Wanted: rows with prompt and "
                              "completion, neither of them null, or with messages")
        system = row.get("system") or self.system
        told = [{"role": "system", "content": str(system)}] if system else []
        return [*told, {"role": "user", "content": str(row["prompt"])},
                {"role": "assistant", "content": str(row["completion"])}]


class Refused(AntonError):
    """The service does not take these examples, or this job: trying again is no use."""


def names_meant(app: App, model: str) -> tuple[str, ...]:
    """What a name may come to mean: itself; an alias: its base, and models tuned from that. Raises BadOption."""
    if not model.startswith("alias:"):
        return (model,)
    tuned = app.aliases.get(model.removeprefix("alias:"))
    if tuned is None:
        raise BadOption("model", model, "a completion", 'the alias of a FineTune that is declared above it.'
                        f"{did_you_mean(model.removeprefix('alias:'), app.aliases)}")
    return (tuned.model, f"ft:{tuned.model}:")


async def meant(app: App, model: str) -> str:
    """The model that a name means now: "alias:replies" is looked up, all others are their own."""
    if not model.startswith("alias:"):
        return model
    found: str = await app.aliases[model.removeprefix("alias:")].current()
    return found


def _said(job: Job) -> dict[str, Any]:
    return {"job": job.id, "state": job.state, "model": job.model, "tokens": job.tokens, "error": job.error}
