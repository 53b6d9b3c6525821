"""OpenAI: models tuned from what an app has seen.

    replies = OpenAiFineTune("replies", examples=sql("select prompt, completion from good_replies"))
    replies.run()

The package `openai` is imported when the first run is made, never before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anton_components.vendor.openai.cognition import HOME, answering, client

from anton.kit import Clients, Env, FineTune, Job, Refused, SendError, Sql, WorldError

MODEL = "gpt-4.1-mini-2025-04-14"
_KEY = "anton"  # of a job's metadata: which run it is of


class OpenAiFineTune(FineTune):
    """Tunes a model of OpenAI, or of another server with its files and fine_tuning/jobs (base_url=).

    api_key: a value or env(…); default OPENAI_API_KEY. model: default gpt-4.1-mini-2025-04-14. examples:
    sql("select prompt, completion from … where …"). All else as FineTune has it: system, least, look, epochs, budget,
    price, timeout, allow_pii, connection. A job is found by its run's key before another is made, so that a worker
    that dies pays for none twice.
    """

    service = "OpenAI"
    variable = "OPENAI_API_KEY"
    issued = "https://platform.openai.com/api-keys"
    example = "tuned_replies"
    home = HOME

    def __init__(self, alias: str, *, examples: Sql, api_key: Env | str | None = None, model: str = MODEL,
                 **options: Any) -> None:
        super().__init__(alias, model=model, examples=examples, secret=api_key, **options)
        self._clients = Clients(lambda key: client(self.name, key, self.base_url, self.timeout))

    async def upload(self, lines: bytes) -> str:
        """One POST /files, purpose fine-tune."""
        client = await self._client()
        with _refusing(self.name, self.timeout):
            file = await client.files.create(file=(f"{self.alias}.jsonl", lines), purpose="fine-tune")
        return str(file.id)

    async def start(self, file: str, key: str) -> Job:
        """One POST /fine_tuning/jobs, if none has the key."""
        client = await self._client()
        settings = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": self.epochs}}}}
        with _refusing(self.name, self.timeout):
            made = await client.fine_tuning.jobs.list(metadata={_KEY: key}, limit=100)
            known = next((job for job in made.data if (job.metadata or {}).get(_KEY) == key), None)
            return _job(known or await client.fine_tuning.jobs.create(
                training_file=file, model=self.model, suffix=self.alias[:18], metadata={_KEY: key},
                **(settings if self.epochs is not None else {}),
                extra_headers={"Idempotency-Key": key}))

    async def job(self, id: str) -> Job:
        """One GET /fine_tuning/jobs/ID."""
        client = await self._client()
        with _refusing(self.name, self.timeout):
            return _job(await client.fine_tuning.jobs.retrieve(id))

    async def _client(self) -> Any:
        return await self._clients.get(self.credential() or "")


def _job(job: Any) -> Job:
    state: Any = job.status if job.status in ("succeeded", "failed", "cancelled") else "running"
    error = getattr(job.error, "message", None) if job.error else None
    return Job(job.id, state, job.fine_tuned_model, job.trained_tokens, error or None)


@contextmanager
def _refusing(of: str, timeout: float) -> Iterator[None]:
    try:
        with answering(of, timeout):
            yield
    except SendError as error:
        raise (Refused if error.kind == "refused" else WorldError)(f"OpenAI: {error.message}") from error
