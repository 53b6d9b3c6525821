"""Anton's side of the comparison: one record a job, a call for each, by PEER_KIND; or, as "batch", a call for many."""

import asyncio
import os
import time
from typing import Any

from anton import Records, Table

jobs = Table("jobs")
KIND = os.environ.get("PEER_KIND", "noop")

if KIND == "start":

    @jobs.on_new_records(each=True, batch=1, into=Table("starts"))
    def work(record: Any) -> dict[str, int]:
        return {"job": record["job"], "at": time.monotonic_ns()}

elif KIND == "insert":

    @jobs.on_new_records(each=True, batch=1, into=Table("effects"))
    async def work(record: Any) -> dict[str, int]:
        await asyncio.sleep(0.005)
        return {"job": record["job"]}

elif KIND == "batch":

    @jobs.on_new_records
    def work(records: Records[Any]) -> None:
        pass

else:

    @jobs.on_new_records(each=True, batch=1)
    def work(record: Any) -> None:
        pass
