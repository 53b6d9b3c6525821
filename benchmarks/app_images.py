"""A handler of updated records that reads both images."""

from typing import Any

from anton import Records, Table

source = Table("bench_in")
moved = Table("moved")


@source.on_updated_records
def tally(records: Records[Any]) -> None:
    by = sum(change.new["n"] - change.old["n"] for change in records.changes)
    moved.append({"records": len(records), "by": by}, of=records)
