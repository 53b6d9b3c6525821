"""Two handlers that do nothing for each record: one with a limit for each customer, one with none."""

from typing import Any

from anton import Table


@Table("unlimited").on_new_records(each=True)
async def unlimited(record: Any) -> None:
    pass


@Table("keyed").on_new_records(each=True, concurrency=10, per="customer")
async def keyed(record: Any) -> None:
    pass
