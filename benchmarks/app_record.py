"""One trivial Python call per record."""

from typing import Any

from anton import Table

source = Table("bench_in")
target = Table("bench_out")


@source.on_new_records(each=True, into=target)
def copy(record: Any) -> dict[str, Any]:
    return {"n": record["n"], "s": record["s"]}
