"""A call per job that does nothing, one record a job: what graphile-worker's own benchmark runs."""

from typing import Any

from anton import Table

source = Table("bench_in")


@source.on_new_records(each=True, batch=1)
def trivial(record: Any) -> None:
    pass
