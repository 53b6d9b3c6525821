"""The plainest Python handler, to see how many records a second this machine does. `make demo` feeds it."""

from anton import Records, Table

readings = Table("readings")
alerts = Table("alerts")


@readings.on_new_records
def check(records: Records) -> None:
    for record in records:
        alerts.append({"reading": record.id, "high": record["n"] % 100 > 90})
