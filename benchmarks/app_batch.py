"""A Python batch handler that copies rows."""

from typing import Any

from anton import Records, Table

source = Table("bench_in")
target = Table("bench_out")


@source.on_new_records
def copy(records: Records[Any]) -> None:
    target.extend({"n": record["n"], "s": record["s"]} for record in records)
