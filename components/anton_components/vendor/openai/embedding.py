"""OpenAI: embeddings.

    notes.on_new_records(OpenAiEmbedding(passages, api_key=env("OPENAI_API_KEY")))

The package `openai` is imported when the first request is made, never before. base_url= reaches any other server
that speaks the same protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from anton_components.vendor.openai.cognition import HOME, answering, client

from anton import Table
from anton.kit import Clients, Embedded, Embedding, EmbeddingOptions, Env, Prices, SendError, learnt

MODEL = "text-embedding-3-small"


class OpenAiEmbedding(Embedding):
    """Embeds the text of each record by a model of OpenAI, or of another server that speaks its protocol (base_url=).

    api_key: a value or env(…); default OPENAI_API_KEY. model: default text-embedding-3-small; what two of them make
    is not to be compared. All else as Embedding has it: dimensions, memo, budget, limit, price, timeout, map.
    Without a key, and where nothing may leave, an echo embeds instead, by the words of a text; a live process
    refuses to start without one.
    """

    service = "OpenAI"
    variable = "OPENAI_API_KEY"
    issued = "https://platform.openai.com/api-keys"
    example = "help_desk"
    home = HOME
    prices = Prices.load(Path(__file__).with_name("prices.json"))
    sizes = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}

    def __init__(self, into: Table[Any], *, api_key: Env | str | None = None, model: str = MODEL,
                 **options: Unpack[EmbeddingOptions]) -> None:
        super().__init__(into, model=model, secret=api_key, **options)
        self._clients = Clients(lambda key: client(self.name, key, self.base_url, self.timeout))

    async def prepare(self) -> None:
        """The package, and a client."""
        await self._clients.get(self.credential() or "")

    async def embed(self, model: str, texts: Sequence[str], dimensions: int | None) -> Embedded:
        """One POST /embeddings."""
        more = {} if dimensions is None else {"dimensions": dimensions}
        with answering(self.name, self.timeout):
            async with self._clients.lend(self.credential() or "") as lent:
                raw = await lent.embeddings.with_raw_response.create(model=model, input=list(texts), **more)
            reply = raw.parse()
        data = sorted(getattr(reply, "data", None) or (), key=lambda one: one.index)
        if not data:
            raise SendError("down", f"answered without a vector: {reply!r}"[:500], paid=True)
        if any(isinstance(one.embedding[0], list) for one in data):
            raise SendError("wrong", f"{model} answers a vector for each token: it is no model for embeddings")
        tokens = getattr(getattr(reply, "usage", None), "prompt_tokens", None)
        return Embedded([one.embedding for one in data], reply.model or model, tokens, learnt(raw.headers))
