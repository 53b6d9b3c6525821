"""A handler for each table fair_<i>; fair_0 gets the deep backlog, one record a job."""

import os
import time
from typing import Any

from anton import Records, Table

starts = Table("starts")


@Table("fair_0").on_new_records(each=True, batch=1)
def deep(record: Any) -> None:
    pass


def start(records: Records[Any]) -> None:
    at = time.monotonic_ns()
    starts.extend({"n": record["n"], "at": at} for record in records)


for _number in range(1, int(os.environ["BENCH_HANDLERS"])):
    Table(f"fair_{_number}").on_new_records(name=f"start_{_number}")(start)
