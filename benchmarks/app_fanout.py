"""One subscriber of one table, ten of another."""

from typing import Any

from anton import Records, Table

one_in, one_out = Table("one_in"), Table("one_out")
ten_in, ten_out = Table("ten_in"), Table("ten_out")


@one_in.on_new_records
def only(records: Records[Any]) -> None:
    one_out.extend({"n": record["n"], "s": record["s"]} for record in records)


def copy(records: Records[Any]) -> None:
    ten_out.extend({"n": record["n"], "s": record["s"]} for record in records)


for _number in range(10):
    ten_in.on_new_records(name=f"copy_{_number}")(copy)
