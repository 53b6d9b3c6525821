"""Handlers of single records: one that does nothing, the same in order of each customer, and one that fails now and
then, and notes in which order it got them."""

import os
import random
from typing import Any

from anton import Table

_notes = os.open(os.environ.get("BENCH_NOTES", os.devnull), os.O_WRONLY | os.O_APPEND)


@Table("unordered").on_new_records(each=True)
async def unordered(record: Any) -> None:
    pass


@Table("inorder").on_new_records(each=True, ordered=True, per="customer")
async def inorder(record: Any) -> None:
    pass


@Table("noted").on_new_records(each=True, ordered=True, per="customer", attempts=1000, backoff="20ms")
async def noted(record: Any) -> None:
    os.write(_notes, b"%d %d\n" % (record["customer"], record["id"]))
    if random.random() < 0.002:
        raise ValueError("now and then")
