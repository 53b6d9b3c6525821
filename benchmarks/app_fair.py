"""A handler for each table fair_<i>; fair_0 gets the deep backlog, one record a job."""

import os
import time
from typing import Any

from anton import Records, Table

starts = Table("starts")


def start(records: Records[Any]) -> None:
    at = time.monotonic_ns()
    starts.extend({"n": record["n"], "at": at} for record in records if record["n"] >= 0)


for _number in range(int(os.environ["BENCH_HANDLERS"])):
    Table(f"fair_{_number}").on_new_records(name=f"start_{_number}", batch=1 if _number == 0 else 1000)(start)
