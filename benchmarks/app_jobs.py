"""One record a job, one call a job; and a second handler to be paused."""

from typing import Any

from anton import Table

source, target = Table("bench_in"), Table("bench_out")
held_in = Table("held_in")


@source.on_new_records(each=True, batch=1, into=target)
def work(record: Any) -> dict[str, Any]:
    return {"n": record["n"], "s": record["s"]}


@held_in.on_new_records(each=True, batch=1)
def held(record: Any) -> None:
    pass
