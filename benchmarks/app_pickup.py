"""A handler that notes when it started, for probes (n >= 0) among other records."""

import time
from typing import Any

from anton import Records, Table

probes = Table("probes")
starts = Table("starts")


@probes.on_new_records
def start(records: Records[Any]) -> None:
    at = time.monotonic_ns()
    starts.extend({"n": record["n"], "at": at} for record in records if record["n"] >= 0)
