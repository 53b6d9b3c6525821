"""DBOS: a queue of durable workflows, polled every 10 ms; many enqueued in one transaction.

Without its paid Conductor, a process takes back at its start what the process of the same executor id held.
"""

import asyncio
import os
import sys

import sqlalchemy
from common import Handler, command
from dbos import DBOS, DBOSClient
from psycopg_pool import ConnectionPool

URL = sqlalchemy.URL.create(
    "postgresql+psycopg",
    username=os.environ.get("PGUSER"),
    password=os.environ.get("PGPASSWORD"),
    database=os.environ["PGDATABASE"],
    query={"host": os.environ["PGHOST"], **({"port": os.environ["PGPORT"]} if "PGPORT" in os.environ else {})},
).render_as_string(hide_password=False)
QUEUE = "trivial"
handlers: list[Handler] = []


@DBOS.workflow(name="trivial")
async def trivial(job: int) -> None:
    await handlers[0](job)


def launch() -> None:
    DBOS(
        config={
            "name": "peers",
            "system_database_url": URL,
            "executor_id": os.environ.get("PEER_EXECUTOR", "local"),
            "application_version": "1",
            "log_level": "CRITICAL",
        }
    )
    DBOS.launch()
    DBOS.register_queue(QUEUE, polling_interval_sec=0.01)


async def main() -> None:
    options = {"workflow_name": "trivial", "queue_name": QUEUE, "app_version": "1", "application_name": "peers"}
    clients: list[DBOSClient] = []

    def client() -> DBOSClient:
        if not clients:
            clients.append(DBOSClient(system_database_url=URL))
        return clients[0]

    def all_of(count: int) -> None:
        with sqlalchemy.create_engine(URL).begin() as conn:
            for job in range(count):
                client().enqueue_in_transaction(conn, options, job)

    async def work(handler: Handler) -> None:
        handlers.append(handler)
        await asyncio.to_thread(launch)

    # Workflows run in an event loop of DBOS' own: a pool of threads serves any.
    pool = ConnectionPool(min_size=5, max_size=10, kwargs={"autocommit": True}, open=sys.argv[1] == "work")

    def write(job: int) -> None:
        with pool.connection() as conn:
            conn.execute("insert into effects (job) values (%s)", (job,))

    await command(
        sys.argv[1:],
        install=lambda: asyncio.to_thread(launch),
        bulk=lambda count: asyncio.to_thread(all_of, count),
        one=lambda job: client().enqueue_async(options, job),
        work=work,
        insert=lambda job: asyncio.to_thread(write, job),
    )
    os._exit(0)


asyncio.run(main())
