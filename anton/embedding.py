"""Embedding: the base of components that turn a text of each record into numbers that are near for what means the same.

    class MyEmbedding(Embedding):
        service, variable = "Mine", "MY_API_KEY"
        async def embed(self, model: str, texts: Sequence[str], dimensions: int | None) -> Embedded: …

Each text is a question of its own: memo, ledger, limits and budgets are those of completions. What is to be sent at
the same moment goes in one request.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import re
from array import array
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any, ClassVar
from urllib.parse import urlsplit

from anton.action import effects
from anton.app import current_app
from anton.ask import About, Asker, Question, Reply, SendError, database
from anton.completion import Asking, note, patient
from anton.component import Component, names_of
from anton.ctx import Ctx
from anton.duration import duration
from anton.errors import BadOption, Discard, WorldError
from anton.handler import HandlerSpec
from anton.ledger import Place, agree, budgets_of
from anton.limit import Limit, limits_of
from anton.price import Price, Prices
from anton.secret import Env
from anton.table import Table
from anton.vector import MOST, vector_of

CONCURRENCY = 200
TEXTS, BYTES = 256, 300_000  # of one request; a token is a byte at least, and OpenAI takes 300,000 of them
GATHER = 0.005  # seconds that a request waits for others to go with it


class EmbeddingOptions(Asking, total=False):
    """What every embedding takes, too."""

    dimensions: int | None


@dataclass(frozen=True)
class Embedded:
    """What came back for several texts: a vector each, in their order. tokens: of all; None when it is not said."""

    vectors: Sequence[Sequence[float]]
    model: str
    tokens: int | None = None
    limits: Sequence[Limit] = ()


class Embedding(Component):
    """Embeds the `text` of each record; `into` gets {"text", "embedding", "model", "usage", "cost"}.

    into: where the vectors go; the first argument. model: the name of one; what two of them make is not to be compared.
    Of a table with a model its fields, and those of the record that have the same names; its `embedding` is
    Annotated[list[float], Vector(n)], or list[float]. dimensions: how many numbers, default the model's. memo: how long
    equal texts are embedded once, or False. budget, limit, price ({"input": …}), base_url, timeout, allow_pii: as
    Completion has them. map: {"text": "body", "embedding": "meaning"} when fields have other names. Raises BadOption.
    """

    carries = True
    prices: ClassVar[Prices] = Prices()
    home: ClassVar[str] = ""                                           # the service's own address
    sizes: ClassVar[Mapping[str, int]] = {}                            # dimensions of its models

    def __init__(self, into: Table[Any], *, model: str, secret: Env | str | None = None, dimensions: int | None = None,
                 memo: str | float | timedelta | bool = "30d", budget: str | Sequence[str] | None = None,
                 limit: str | None = None, price: Mapping[str, Any] | None = None, base_url: str | None = None,
                 timeout: float = 60.0, map: Mapping[str, str] | None = None, allow_pii: bool = False,
                 connection: str | None = None) -> None:
        super().__init__(secret=secret, map=map, allow_pii=allow_pii, connection=connection)
        of = self.name
        if not model:
            raise BadOption("model", model, of, "the name of a model")
        if dimensions is not None and not 1 <= dimensions <= MOST:
            raise BadOption("dimensions", dimensions, of, f"a whole number from 1 to {MOST:,}")
        self.into = into
        self.model = model
        self.dimensions = dimensions
        self.base_url = self.address(base_url)
        self.timeout = timeout
        self._app = current_app()
        self._field = self.map.pop("embedding", "embedding")
        self._shared = memo is not False
        self._price = None if price is None else Price.of({"output": 0, **price}, owner=of)
        self._size = self._check_table(of)
        ttl = duration("30d" if isinstance(memo, bool) else memo, "memo", of)
        self._asker = Asker(self, budgets=budgets_of(budget, of), limits=limits_of(limit, of), ttl=ttl.total_seconds(),
                            together=(TEXTS, BYTES))
        agree(self._asker.budgets, self._app.budgets, "app", self._app.name, of, self.place)
        if any(one.unit == "usd" for one in self._asker.budgets) and self._price_now() is None:
            raise BadOption("budget", budget, of, f'dollars only for a model whose price is known. That of "{model}" '
                            'is not: price={"input": …} in dollars for a million tokens, or a budget in tokens')
        self._waiting: dict[Any, list[tuple[Question, asyncio.Future[Reply]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def _check_table(self, of: str) -> int | None:
        """How many numbers the table takes; None: any."""
        shape = self.into.shape
        if shape is None:
            return None
        field = shape.model.model_fields.get(self._field)
        if field is None:
            raise BadOption("into", self.into.name, of, f'a Table whose model has the field "{self._field}": '
                            f'Annotated[list[float], Vector(1536)]. It has: {", ".join(shape.model.model_fields)}. '
                            'map={"embedding": …} names another')
        vector = vector_of(field.annotation, field.metadata)
        size = None if vector is None else vector.dimensions
        made = self.dimensions or (None if self.base_url else self.sizes.get(self.model))
        if size is not None and made is not None and size != made:
            raise BadOption("dimensions", self.dimensions, of, f'{size}: "{self._field}" of "{self.into.name}" is '
                            f"Vector({size}), and {self.model} makes {made} numbers")
        return size

    async def prepare(self) -> None:
        """What takes time before the first request, such as an import: none of them is late for it."""

    async def embed(self, model: str, texts: Sequence[str], dimensions: int | None) -> Embedded:
        """One request for several texts. Raises SendError."""
        raise NotImplementedError

    @property
    def host(self) -> str:
        """Where texts go."""
        return urlsplit(self.base_url or self.home).netloc.rpartition("@")[2]

    def stands_in(self) -> bool:
        """Whether an echo embeds: nothing may leave, or there is no key."""
        return effects() == "offline" or self.credential() is None

    def inputs(self) -> Mapping[str, Any]:
        """The text."""
        return {"text": str}

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets; the vector's size is checked when it is declared."""
        return {"text": str, self._field: Any, "model": str, "usage": dict | None,
                "cost": float | None}

    def told(self) -> set[str]:
        """The text."""
        return {"text"}

    def bind(self, table: Table[Any]) -> HandlerSpec:
        """What handles the records of `table`."""
        agree(self._asker.budgets, self._app.budgets, "table", table.name, self.name, self.place)
        return HandlerSpec(fn=self.complete, name=self.name, each=True, into=self.into,
                           options={"concurrency": CONCURRENCY})

    async def complete(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The output row for one record."""
        text = str(self.read(record, "text"))
        if self.stands_in():
            size = self.dimensions or self._size or self.sizes.get(self.model) or 256
            return self._row(record, text, words_vector(text, size), "echo", {"input": 0}, 0.0)
        if not text.strip():
            raise Discard(f'{self.name}: "{self.map.get("text", "text")}" is empty')
        await self.prepare()
        change = ctx.change
        key = list(change.key) if isinstance(change.key, tuple) else [change.key]
        handler = self._app.handlers.get(ctx.handler)
        about = About(self._app.name, ctx.handler, handler.table.name if handler else "", key, change.id, change.trace,
                      change.tenant, None, None if self._shared else change.idempotency_key)
        params = {} if self.dimensions is None else {"dimensions": self.dimensions}
        question = Question(self.model, ({"role": "input", "content": text},), params, 0, timeout=self.timeout)
        async with patient(self._app, ctx, self.service):
            answer = await self._asker.ask(database(), question, about, self._price_now())
        vector = unpacked(answer.reply.text)
        if self._size not in (None, len(vector)):
            raise WorldError(f'{answer.reply.model} makes {len(vector)} numbers, and "{self._field}" of '
                             f'"{self.into.name}" is Vector({self._size}): set dimensions={self._size}, or change it')
        await note([answer], about, {})
        tokens = answer.reply.tokens_in
        return self._row(record, text, vector, answer.reply.model, None if tokens is None else {"input": tokens},
                         None if answer.cost is None else float(answer.cost))

    async def send(self, question: Question) -> Reply:
        """Goes with what others of its place, or of this loop, send now. Raises SendError."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(question.place or loop, [])
        future: asyncio.Future[Reply] = loop.create_future()
        waiting.append((question, future))
        if len(waiting) == 1:
            task = asyncio.create_task(self._gather(question.place or loop), context=contextvars.Context())
            self._tasks.add(task)                                      # a loop keeps no task alive by itself
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _gather(self, place: Any) -> None:
        """place: one that was let through, or the loop."""
        await asyncio.sleep(GATHER)
        if isinstance(place, Place):
            place.gone = True
        waiting = [one for one in self._waiting.pop(place) if not one[1].done()]
        groups: list[list[Any]] = []
        size = 0
        for one in waiting:
            length = len(_text(one[0]).encode())
            if not groups or len(groups[-1]) >= TEXTS or size + length > BYTES:
                groups.append([])
                size = 0
            groups[-1].append(one)
            size += length
        await asyncio.gather(*map(self._request, groups))

    async def _request(self, group: Sequence[tuple[Question, asyncio.Future[Reply]]]) -> None:
        """One request. One that is refused is halved until a text is alone with the blame."""
        first, texts = group[0][0], [_text(question) for question, _ in group]
        try:
            done = await self.embed(first.model, texts, first.params.get("dimensions"))
            if len(done.vectors) != len(texts):
                raise SendError("down", f"answered {len(done.vectors)} vectors to {len(texts)} texts", paid=True)
            replies = _replies(done, texts)
        except SendError as error:
            if error.kind == "refused" and len(group) > 1:
                half = len(group) // 2
                await self._request(group[:half])
                await self._request(group[half:])
                return
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
        except BaseException as error:
            for _, future in group:
                if not future.done():
                    future.set_exception(SendError("down", f"{type(error).__name__}: {error}", paid=True))
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), reply in zip(group, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    def _price_now(self) -> Price | None:
        known = None if self.base_url else self.prices.models.get(self.model)
        return self._price or (Price.of({"output": 0, **known}, self.prices.version) if known else None)

    def _row(self, record: Any, text: str, vector: Sequence[float], model: str, usage: Any,
             cost: float | None) -> dict[str, Any]:
        """What goes into the table: of one with a model its fields, of another all there is."""
        row = {"text": text, self._field: list(vector), "model": model, "usage": usage, "cost": cost}
        shape = self.into.shape
        if shape is None:
            return row
        fields = shape.model.model_fields
        values = {name: record[name] if isinstance(record, Mapping) else getattr(record, name)
                  for name in names_of(record)}
        values |= {field: values[name] for field, name in self.map.items() if name in values}
        carried = {name: values[name] for name in values.keys() & fields.keys() - set(shape.key)}
        return {name: value for name, value in (row | carried | {self._field: row[self._field]}).items()
                if name in fields}


def _text(question: Question) -> str:
    return question.messages[0]["content"]


def _replies(done: Embedded, texts: Sequence[str]) -> list[Reply]:
    """Of each text. A service counts the tokens of a request: each text has its share by length, and none is lost."""
    sizes = [len(text.encode()) for text in texts]
    total, replies, before, passed = sum(sizes) or 1, [], 0, 0
    for vector, size in zip(done.vectors, sizes, strict=True):
        passed += size
        until = None if done.tokens is None else done.tokens * passed // total
        tokens = None if until is None else until - before
        before = until or 0
        replies.append(Reply(packed(vector), done.model, tokens, 0, limits=done.limits))
    return replies


def packed(vector: Sequence[float]) -> str:
    """As a memo keeps it: 32 bit floats, as services and pgvector have them."""
    return b64encode(array("f", vector).tobytes()).decode()


def unpacked(text: str) -> list[float]:
    """The numbers of packed()."""
    return array("f", b64decode(text)).tolist()


def words_vector(text: str, size: int) -> list[float]:
    """What an echo makes: of length 1, the nearer the more words two texts share. The same everywhere."""
    made = [0.0] * size
    for word in re.findall(r"\w+", text.lower()) or [""]:
        at = int.from_bytes(blake2b(word.encode(), digest_size=8).digest())
        made[at % size] += 1.0 if at >> 63 else -1.0
    length = math.sqrt(sum(x * x for x in made)) or 1.0
    return [x / length for x in made]
