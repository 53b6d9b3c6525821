"""A handler with a rate for each customer: each start is noted, with the machine's clock."""

import os
import struct
import time
from typing import Any

from anton import Table

STARTS = os.open(os.environ["BENCH_STARTS"], os.O_WRONLY | os.O_APPEND)


@Table("rated").on_new_records(each=True, rate="20/s", per="customer")
async def start(record: Any) -> None:
    os.write(STARTS, struct.pack("dqq", time.monotonic(), os.getpid(), record["customer"]))
