"""Rows of 1 MB, of which the handler keeps the length."""

from typing import Any

from anton import Records, Table

wide, sizes = Table("wide"), Table("sizes")


@wide.on_new_records
def measure(records: Records[Any]) -> None:
    for record in records:
        sizes.append({"n": record["n"], "size": len(record["body"])})
