"""A SQL handler that copies rows."""

from anton import Table

source = Table("bench_in")
target = Table("bench_out")

source.on_new_records.sql("insert into bench_out (n, s) select n, s from new_records", name="copy", into=target)
