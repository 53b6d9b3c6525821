"""One handler, whose records of n >= 0 are probes of one tenant and the others the backlog of another."""

import time
from typing import Any

from anton import Records, Table

starts = Table("starts")


@Table("shared").on_new_records
def start(records: Records[Any]) -> None:
    at = time.monotonic_ns()
    starts.extend({"n": record["n"], "at": at} for record in records if record["n"] >= 0)
