"""Webhook: your own webhooks, to addresses that your customers give.

    events.on_new_records(SendWebhook("{url}", secret=env("WEBHOOK_SECRET"), json={"type": "{type}", "data": "{data}"}))
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from anton_components.vendor.http.action import HttpRequest

from anton import Approval, Ctx, Discard, Retry, Table
from anton.kit import BadOption, Env, WorldError, fill, placeholders, say, status_of

# Standard Webhooks' example of a schedule, after each attempt.
WAITS = tuple(timedelta(seconds=one) for one in (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400))


class SendWebhook(HttpRequest):
    """A signed webhook for each record, to an address of the record, tried for three days.

    url: "{url}", or any address with {name} in it. json: what is sent, in any shape; None: the record. secret: a value
    or env(…), "whsec_…"; it signs as Standard Webhooks says, and webhook-id stays the same over all attempts. headers:
    sent along, texts or env(…). Any answer but 2xx, and none, is tried again: after 5 s, 5 min, 30 min, 2 h, 5 h, 10 h,
    14 h, 20 h and 24 h, each with 10 % of jitter; then, and at once for 410 Gone, it is a dead letter. allow: hosts,
    "*.example.com"; private: whether it may lead into private networks; timeout: seconds for one attempt. into: gets
    {"status", "body", "url", "record_id"}. approve, cap, rate: as of actions. map: the record's names for those in
    braces. Raises BadOption.
    """

    example = "order_desk"

    def __init__(self, url: str = "{url}", *, secret: Env | str, json: Any = None,
                 headers: Mapping[str, Env | str] | None = None, allow: Sequence[str] | None = None,
                 private: bool = False, timeout: float = 20.0, into: Table[Any] | None = None,
                 approve: Approval | None = None, cap: str | Sequence[str] = (), rate: str | None = None,
                 map: Mapping[str, str] | None = None, connection: str | None = None) -> None:
        if not re.match(r"https?://|\{", url):
            raise BadOption("url", url, "SendWebhook", 'a URL, or "{url}" for that of the record')
        super().__init__("https://of.the.record", json=json, headers=headers, secret=secret, sign="standard_webhooks",
                         effect="idempotent", allow=allow, private=private, timeout=timeout, into=into,
                         approve=approve, cap=cap, rate=rate, map=map, connection=connection)
        self._url = url

    def options(self) -> dict[str, Any]:
        """Options of its Action."""
        return {**super().options(), "attempts": len(WAITS) + 1}

    def inputs(self) -> Mapping[str, Any]:
        """What url and json name; of any type."""
        assert isinstance(self._url, str)
        return dict.fromkeys(placeholders(self._url) | placeholders(str(self.json or "")), Any)

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The webhook for one record."""
        made = await super().args(record, ctx)
        if re.fullmatch(r"\{\w+\}", str(self._url)):
            made["url"] = fill(str(self._url), record, self.map)
        if not re.match(r"https?://[^/?#]", made["url"]):
            raise Discard(f"url={made['url']!r} is no address of a webhook")
        return made

    def again(self, error: Exception, attempt: int) -> Exception:
        """One receiver that is away holds up no other: a Retry for this call alone."""
        if isinstance(error, Discard) or status_of(error) == 410:
            return error
        wait = WAITS[min(attempt, len(WAITS)) - 1] * random.uniform(1, 1.1)
        return Retry(error.args[0] if isinstance(error, WorldError) else say(error), after=wait)
