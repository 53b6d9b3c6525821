"""A copying batch handler that one record breaks; it becomes a dead letter at once."""

from typing import Any

from anton import Records, Table

source, target = Table("bench_in"), Table("bench_out")


@source.on_new_records(attempts=1)
def copy(records: Records[Any]) -> None:
    for record in records:
        if record["s"] == "poison":
            raise ValueError("poison")
        target.append({"n": record["n"], "s": record["s"]})
