"""DBOS: a queue of durable workflows, polled every 10 ms; many enqueued in one transaction.

Without its paid Conductor, a process takes back at its start what the process of the same executor id held. Where a
job's write is to be done once, it is a step in a transaction of DBOS' data source.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy
from common import CALLERS, KIND, Handler, command
from dbos import DBOS, AsyncSQLAlchemyDatasource, DBOSClient
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
sources: list[AsyncSQLAlchemyDatasource] = []


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


async def row(job: int) -> None:
    await sources[0].sql_session().execute(sqlalchemy.text("insert into effects (job) values (:job)"), {"job": job})


async def main() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))  # enqueue_async runs in its threads
    options = {"workflow_name": "trivial", "queue_name": QUEUE, "app_version": "1", "application_name": "peers"}
    clients: list[DBOSClient] = []
    if sys.argv[1] in ("enqueue", "single", "drip"):
        clients.append(DBOSClient(system_database_url=URL, system_database_pool_size=CALLERS))
    if KIND == "commit" and sys.argv[1] in ("install", "work"):
        engine = {"pool_size": 10, "max_overflow": 0}
        sources.append(await AsyncSQLAlchemyDatasource.create(URL, engine_kwargs=engine))

    def all_of(jobs: Sequence[int]) -> None:
        with sqlalchemy.create_engine(URL).begin() as conn:
            for job in jobs:
                clients[0].enqueue_in_transaction(conn, options, job)

    async def work(handler: Handler) -> None:
        handlers.append(handler)
        await asyncio.to_thread(launch)

    # Workflows run in an event loop of DBOS' own: a pool of threads serves any.
    pool = ConnectionPool(min_size=5, max_size=10, kwargs={"autocommit": True}, open=sys.argv[1] == "work")

    def insert(job: int) -> None:
        with pool.connection() as conn:
            conn.execute("insert into effects (job) values (%s)", (job,))

    async def write(job: int) -> None:
        if sources:
            await sources[0].run_tx_step_async({"name": "row"}, row, job)
        else:
            await asyncio.to_thread(insert, job)

    await command(
        sys.argv[1:],
        install=lambda: asyncio.to_thread(launch),
        bulk=lambda jobs: asyncio.to_thread(all_of, jobs),
        one=lambda job: clients[0].enqueue_async(options, job),
        work=work,
        write=write,
    )
    os._exit(0)


asyncio.run(main())
