"""Completion: the base of components that ask a model with each record.

    class MyCompletion(Completion):
        service, variable = "Mine", "MY_API_KEY"
        async def send(self, question: Question) -> Reply: …

What is the same for all services is here: prompts, context, structured answers, memo, limits, budgets, fallback.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Any, ClassVar, TypedDict
from urllib.parse import urlsplit

from pydantic import BaseModel

from anton import write
from anton.action import effects
from anton.app import App, current_app
from anton.ask import About, Answer, Asker, Mode, Question, Reply, SendError, database
from anton.component import Component, names_of, stand_in
from anton.context import Context, prompt_of
from anton.ctx import Ctx
from anton.duration import duration
from anton.errors import BadOption, Discard, WorldError, did_you_mean
from anton.handler import HandlerSpec
from anton.ledger import agree, budgets_of
from anton.limit import limits_of
from anton.price import Price, Prices
from anton.relation import describe
from anton.secret import Env
from anton.structured import Unfit, asked_for, example, parse, repair, schema_of
from anton.table import Table
from anton.tuning import meant, names_meant

CONCURRENCY = 50
MARGIN = 30.0  # seconds before the end of the handler's time that tries end; of a short one, half of it
MODES: tuple[Mode, ...] = ("schema", "tool", "prompt")


class Asking(TypedDict, total=False):
    """What every component takes that asks a model, besides its table, its key and its model."""

    memo: str | float | timedelta | bool
    budget: str | Sequence[str] | None
    limit: str | None
    price: Mapping[str, Any] | None
    base_url: str | None
    timeout: float
    map: Mapping[str, str] | None
    allow_pii: bool
    connection: str | None


class CompletionOptions(Asking, total=False):
    """What every completion takes, too."""

    prompt: str | None
    system: str | None
    context: Mapping[str, Any] | None
    output: type[BaseModel] | None
    mode: Mode | None
    max_tokens: int | None
    temperature: float | None


class Completion(Component):
    """Asks a model with each record; `into` gets {"prompt", "completion", "model", "usage", "cost"}.

    into: where the answers go; the first argument.
    model: a name, or several: the next is asked when one is busy or down; "alias:NAME" is what a FineTune made.
    prompt: a text with {fields}, or a file of it; default the record's `prompt`. system: what the model is told
    before. context: {name: sql("…")}, rows for {name} in the prompt. output: a Pydantic model; its fields go into
    the row. mode: how it is asked for, "schema", "tool" or "prompt"; default the first that the server knows.
    max_tokens: of an answer. temperature: None, its own. memo: how long an answer serves equal questions, or False:
    each record is asked for itself. budget: such as "5 USD/day". limit: such as "600 requests/min"; default what
    the service says. price: US dollars for a million tokens where the table has none, {"input": …, "output": …}.
    base_url: another server. timeout: seconds for one answer. map: {"prompt": "question"} when a field has another
    name. allow_pii: the model may see fields that are PII. Where `into` has a model, its further fields are carried
    over. usage: tokens {"input", "output"}, None where the service does not say. cost: US dollars; 0 from memo or an
    echo, None where the usage or the price is not known. Raises BadOption.
    """

    carries = True
    prices: ClassVar[Prices] = Prices()
    home: ClassVar[str] = ""                                           # the service's own address

    def __init__(self, into: Table[Any], *, model: str | Sequence[str], secret: Env | str | None = None,
                 prompt: str | None = None, system: str | None = None, context: Mapping[str, Any] | None = None,
                 output: type[BaseModel] | None = None, mode: Mode | None = None, max_tokens: int | None = None,
                 temperature: float | None = None, memo: str | float | timedelta | bool = "30d",
                 budget: str | Sequence[str] | None = None, limit: str | None = None,
                 price: Mapping[str, Any] | None = None, base_url: str | None = None, timeout: float = 60.0,
                 map: Mapping[str, str] | None = None, allow_pii: bool = False,
                 connection: str | None = None) -> None:
        super().__init__(secret=secret, map=map, allow_pii=allow_pii, connection=connection)
        of = self.name
        self.into = into
        self.models = (model,) if isinstance(model, str) else tuple(model)
        if not self.models or not all(self.models):
            raise BadOption("model", model, of, "a name, or several: the next is asked when one is busy or down")
        if max_tokens is not None and max_tokens < 1:
            raise BadOption("max_tokens", max_tokens, of, "a whole number from 1")
        self.output = output
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.base_url = self.address(base_url)
        self.timeout = timeout
        self._app = current_app()
        folder = self._app.folder
        self.system = None if system is None else prompt_of(system, folder, of)
        self.prompt = None if prompt is None else prompt_of(prompt, folder, of)
        self.context = Context(context, of)
        if context and self.prompt is None:
            raise BadOption("context", sorted(context), of, "context= with a prompt= that has its names in braces")
        for one in self.models:
            names_meant(self._app, one)
        self._shared = memo is not False
        ttl = duration("30d" if isinstance(memo, bool) else memo, "memo", of)
        self._price = None if price is None else Price.of(price, owner=of)
        self._schema = None if output is None else schema_of(output)
        self._mode = mode
        self._modes: dict[str, Mode] = {}
        self._asker = Asker(self, budgets=budgets_of(budget, of), limits=limits_of(limit, of),
                            ttl=ttl.total_seconds())
        agree(self._asker.budgets, self._app.budgets, "app", self._app.name, of, self.place)
        self._check_budget(budget)

    def _check_budget(self, budget: Any) -> None:
        for one in self._asker.budgets:
            if self.max_tokens is None:
                raise BadOption("budget", budget, self.name, "a budget with max_tokens=, so that what a call can cost "
                                "at most is known before it is made")
            names = [name for model in self.models for name in names_meant(self._app, model)]
            unknown = next((name for name in names if self.price_of(name) is None), None)
            if one.unit == "usd" and unknown is not None:
                raise BadOption("budget", budget, self.name, f'dollars only for a model whose price is known. That of '
                                f'"{unknown}"{f" at {self.host}" if self.base_url else ""} is not: give it, price='
                                '{"input": …, "output": …} in dollars for a million tokens, or a budget in tokens')

    async def prepare(self) -> None:
        """What takes time before the first request, such as an import: none of them is late for it."""

    async def send(self, question: Question) -> Reply:
        """One request. Raises SendError."""
        raise NotImplementedError

    @property
    def host(self) -> str:
        """Where questions go."""
        return urlsplit(self.base_url or self.home).netloc.rpartition("@")[2]

    def price_of(self, model: str) -> Price | None:
        """A model's price; None when it is not known, as at another server than the service's own."""
        return self._price or (None if self.base_url else self.prices.find(model))

    def inputs(self) -> Mapping[str, Any]:
        """The prompt, where the record holds it."""
        return {"prompt": str} if self.prompt is None else {}

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets: the fields of output=, and what there is without."""
        made: dict[str, Any] = {"prompt": str, "completion": str, "model": str, "usage": dict | None,
                                "cost": float | None}
        fields = self.output.model_fields if self.output is not None else {}
        return made | {name: Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
                       for name, info in fields.items()}

    def told(self) -> set[str]:
        """What is in braces; without a prompt=, the record's own."""
        names = {"prompt"} if self.prompt is None else self.prompt.names - self.context.queries.keys()
        return names | (set() if self.system is None else self.system.names)

    def queries(self) -> Mapping[str, str]:
        """Those of context=."""
        return {name: query.text for name, query in self.context.queries.items()}

    def bind(self, table: Table[Any]) -> HandlerSpec:
        """What handles the records of `table`. Raises BadOption for a name in braces that its model has not."""
        if table.shape is not None:
            names = {*table.shape.model.model_fields, *self.map}
            wanted = set() if self.prompt is None else self.prompt.names - self.context.queries.keys()
            wanted |= self.context.names | (set() if self.system is None else self.system.names)
            for name in sorted(wanted - names):
                raise BadOption("prompt", f"{{{name}}}", self.name, f'fields of "{table.name}" and names of context=.'
                                f"{did_you_mean(name, names)} They are: "
                                f"{', '.join(sorted({*names, *self.context.queries}))}")
        agree(self._asker.budgets, self._app.budgets, "table", table.name, self.name, self.place)
        return HandlerSpec(fn=self.complete, name=self.name, each=True, into=self.into,
                           options={"concurrency": CONCURRENCY})

    async def complete(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The output row for one record."""
        messages, origins = await self._messages(record)
        prompt = messages[-1]["content"]
        if self.stands_in():
            return self._row(record, prompt, *self._stand_in(prompt), "echo", {"input": 0, "output": 0}, 0.0)
        change = ctx.change
        key = list(change.key) if isinstance(change.key, tuple) else [change.key]
        versions = [one.version for one in (self.system, self.prompt) if one is not None]
        handler = self._app.handlers.get(ctx.handler)
        about = About(self._app.name, ctx.handler, handler.table.name if handler else "", key, change.id, change.trace,
                      change.tenant, "+".join(versions) or None, None if self._shared else change.idempotency_key)
        async with patient(self._app, ctx, self.service):
            await self.prepare()
            answers, parsed = await self._ask(messages, about)
        last = answers[-1]
        await note(answers, about, origins)
        reply = last.reply
        usage = None
        if reply.tokens_in is not None and reply.tokens_out is not None:
            usage = {"input": reply.tokens_in, "output": reply.tokens_out}
        if usage is not None and reply.cached:
            usage["cached"] = reply.cached
        costs = [answer.cost for answer in answers]
        cost = None if None in costs else float(sum(one for one in costs if one is not None))
        return self._row(record, prompt, reply.text, parsed, reply.model, usage, cost)

    def stands_in(self) -> bool:
        """Whether an echo answers: nothing may leave, or there is no key."""
        return effects() == "offline" or self.credential() is None

    async def _messages(self, record: Any) -> tuple[tuple[Mapping[str, str], ...], dict[str, Any]]:
        """What is asked, and where its context came from."""
        origins: dict[str, Any] = {}
        if self.prompt is None:
            text = str(self.read(record, "prompt"))
        values = self._values(record)
        if self.prompt is not None:
            texts, origins = await self.context.fetch(database(), values)
            text = self.prompt.fill({**values, **texts})
        told = () if self.system is None else ({"role": "system", "content": self.system.fill(values)},)
        return (*told, {"role": "user", "content": text}), origins

    def _values(self, record: Any) -> dict[str, Any]:
        """The record's values by name, and by the names that map= gives them."""
        values = {name: record[name] if isinstance(record, Mapping) else getattr(record, name)
                  for name in names_of(record)}
        return values | {field: values[name] for field, name in self.map.items() if name in values}

    def _stand_in(self, prompt: str) -> tuple[str, BaseModel | None]:
        answer = stand_in(self, prompt)
        if isinstance(answer, BaseModel):
            return answer.model_dump_json(), answer if self.output is not None else None
        text = str(answer)
        if self.output is None:
            return text, None
        try:
            return text, parse(self.output, text)
        except Unfit:                                                  # an echo
            made = example(self.output, text)
            return made.model_dump_json(), made

    async def _ask(self, messages: tuple[Mapping[str, str], ...], about: About) -> tuple[list[Answer], Any]:
        """The answers (a second one, when the first had to be mended), and the output."""
        for number, model in enumerate(self.models, 1):
            try:
                return await self._ask_model(model, messages, about, number == len(self.models))
            except WorldError as error:
                if number == len(self.models) or type(error) is not WorldError:
                    raise
        raise AssertionError("no model")

    async def _ask_model(self, model: str, messages: tuple[Mapping[str, str], ...], about: About,
                         last: bool) -> tuple[list[Answer], Any]:
        params = {} if self.temperature is None else {"temperature": self.temperature}
        model = await meant(self._app, model)
        question = Question(model, messages, params, self.max_tokens, self._schema,
                            self.output.__name__ if self.output else "answer", timeout=self.timeout)
        answers = [await self._answer(question, about, last)]
        try:
            try:
                return answers, self._parse(answers[0])
            except Unfit as error:
                mended = replace(question, messages=(
                    *messages, {"role": "assistant", "content": answers[0].reply.text},
                    {"role": "user", "content": repair(error)}))
            answers.append(await self._answer(mended, about, last))
            try:
                return answers, self._parse(answers[1])
            except Unfit as error:
                raise Discard(f"{self.name}, {model}: {error.message}") from error
        except Discard:                                                # replayed, it is asked again
            await self._asker.forget(database(), answers)
            raise

    def _parse(self, answer: Answer) -> BaseModel | None:
        if self.output is None:
            self._check_whole(answer)
            return None
        if answer.reply.finish in ("refused", "empty"):
            self._check_whole(answer)
        try:
            return parse(self.output, answer.reply.text)
        except Unfit:
            self._check_whole(answer)                                  # asked again, it would be as long
            raise

    def _check_whole(self, answer: Answer) -> None:
        """Raises Discard for an answer that is none, or only the beginning of one."""
        reply = answer.reply
        if reply.finish == "refused":
            raise Discard(f"{self.name}: {reply.model} refused to answer: {reply.text}")
        if reply.finish == "empty":
            raise Discard(f"{self.name}: {reply.model} answered what is no answer: {reply.text}")
        if reply.finish == "length":
            raise Discard(f"{self.name}: the answer of {reply.model} was cut off at max_tokens={self.max_tokens}. "
                          f"It was: {reply.text}")

    async def _answer(self, question: Question, about: About, last: bool) -> Answer:
        """Asks in the mode that the server is known to take, and finds it out."""
        model, price = question.model, self.price_of(question.model)
        while True:
            mode = self._mode or self._modes.get(model, "schema")
            asked = replace(question, mode=mode)
            if mode == "prompt" and question.schema is not None:
                asked = replace(asked, messages=_told(question.messages, asked_for(question.schema)))
            try:
                return await self._asker.ask(database(), asked, about, price, last=last)
            except SendError as error:
                if error.kind == "malformed" or self._mode is not None or mode == "prompt":
                    raise Discard(f"{self.name}, {model}: {error.message}") from error
                self._modes[model] = MODES[MODES.index(mode) + 1]

    def _row(self, record: Any, prompt: str, text: str, parsed: BaseModel | None, model: str,
             usage: dict[str, int] | None, cost: float | None) -> dict[str, Any]:
        """What goes into the table: of one with a model its fields, of another all there is."""
        row: dict[str, Any] = {"prompt": prompt, "completion": text, "model": model, "usage": usage, "cost": cost}
        if parsed is not None:
            row |= {name: getattr(parsed, name) for name in type(parsed).model_fields}
        shape = self.into.shape
        if shape is None:
            return row
        fields = shape.model.model_fields
        values = self._values(record)
        carried = {name: values[name] for name in values.keys() & fields.keys() - set(shape.key)}
        return {name: value for name, value in (carried | row).items() if name in fields}


def _told(messages: Sequence[Mapping[str, str]], more: str) -> tuple[Mapping[str, str], ...]:
    """The messages, the first user's with a sentence more."""
    at = next(at for at, message in enumerate(messages) if message["role"] == "user")
    first = {**messages[at], "content": f"{messages[at]['content']}\n\n{more}"}
    return (*messages[:at], first, *messages[at + 1:])


@asynccontextmanager
async def patient(app: App, ctx: Ctx, service: str) -> AsyncIterator[None]:
    """Ends tries before the handler's time is up: that the world does not answer is no record's fault."""
    handler = app.handlers.get(ctx.handler)
    whole = handler.timeout.total_seconds() if handler else None
    seconds = None if whole is None else max(whole / 2, whole - MARGIN)
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if limit.expired():
            raise WorldError(f"{service}: no answer in {seconds:g} s of tries") from error
        raise


async def note(answers: Sequence[Answer], about: About, origins: Mapping[str, Any]) -> None:
    """Which calls answered the record; commits with what its handler writes."""
    found = write.find_scope()
    assert found is not None
    scope, owner = found
    relation = await describe(scope.db, f"{scope.db.schema}.answer")
    rows: list[Any] = []
    for answer in answers:
        rows += [owner, (answer.call_id, about.key, answer.memo, about.prompt_version, dict(origins) or None)]
    scope.add(write.Rows("insert", relation, ("call_id", "key", "memo", "prompt_version", "context"), rows))
