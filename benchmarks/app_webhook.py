"""The app of the webhook benches: signed deliveries into a table that a handler listens to."""

from __future__ import annotations

from typing import Any

from anton import Records, Table, Webhook

SECRET = "It's a Secret to Everybody"

events = Table("bench_events")
Webhook("/hook", events, verify="github", secret=SECRET)


@events.on_new_records
def look(records: Records[Any]) -> None:
    """No worker runs: the cost of capturing is in the figure, that of working is not."""
