"""The same with a Pydantic model of four fields in and out."""

from datetime import datetime

from pydantic import BaseModel

from anton import Records, Table


class Line(BaseModel):
    id: int | None = None
    created_at: datetime
    n: int
    s: str


source = Table("bench_in", Line)
target = Table("bench_out", Line)


@source.on_new_records
def copy(records: Records[Line]) -> None:
    for record in records:
        target.append(Line(created_at=record.created_at, n=record.n, s=record.s))
