"""Bugs: twelve that the harness has to catch, and six more, each a change of a few lines to the SQL or the worker as shipped.

They are put into a database and a worker's process that the harness made, and are nowhere else. A bug whose text is no
longer found in the sources fails here, not silently.
"""

# ruff: noqa: E501  (text as it is in the sources)

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chaos.cell import ROOT


@dataclass(frozen=True)
class Bug:
    """edits: (file, as shipped, with the bug). fault, n: what catches it, and how much of it in one trial.

    sign: what the verdict has to say, as a pattern: a bug that is caught for another reason is not caught. It names a
    finding; that the harness waited in vain is none, and what is missing is not lost as long as not all is drained.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    fault: str
    n: int
    sign: str


JOB, SUSPECT, RUN, PERMIT = "sql/20_job.sql", "sql/21_suspect.sql", "anton/settle.py", "sql/23_permit.sql"
RATE = "sql/24_rate.sql"

BUGS = (
    Bug(
        "ack without token",
        (
            (
                JOB,
                "delete from lease where token = p_token and id = any (p_ids) returning id, handler_id",
                "delete from lease where id = any (p_ids) returning id, handler_id",
            ),
        ),
        "P3a",
        2,
        r"\d stale acks were accepted",
    ),
    Bug(
        "outputs committed before the ack",
        (
            (
                RUN,
                "        if not await self._settled(batch, doing, work):\n            self._wrote({",
                "        if doing.ops:\n            async with self.db.tx() as first:\n                await apply(first, doing.ops)\n"
                "            doing.ops = []\n"
                "        if not await self._settled(batch, doing, work):\n            self._wrote({",
            ),
        ),
        "P1a",
        2,
        r"doubled \d",
    ),
    Bug(
        "2xx before COMMIT",
        (
            (
                "anton/webhook.py",
                "        self._bytes += len(delivery.body)\n",
                "        self._bytes += len(delivery.body)\n        _tell(delivery, 200)\n",
            ),
        ),
        "H2",
        4,
        r"lost \d.*delivery: \S+ is missing",
    ),
    Bug(
        "lease on the worker's clock",
        (
            (
                "anton/queue.py",
                '    name = "claim" if known is None else "claim_ordered"\n',
                '    import time\n    at = await conn.fetchval("select extract(epoch from clock_timestamp())::float8")\n'
                "    lease += timedelta(seconds=time.time() - at)\n"
                '    name = "claim" if known is None else "claim_ordered"\n',
            ),
        ),
        "T1a",
        2,
        r"a lease of (-35|36)\d\d",
    ),
    Bug(
        "claim without the row lock",
        (
            (JOB, " order by job.id limit w.jobs for update skip locked) j", " order by job.id limit w.jobs) j"),
            (
                JOB,
                "      delete from job using many(v_rows) r (row) where job.ctid = r.row returning job.*\n    ), held",
                "      select * from job where ctid = any (v_rows)\n    ), cut as (delete from job where ctid = any (v_rows)\n    ), held",
            ),
        ),
        "Q1",
        3,
        r"doubled \d",
    ),
    Bug(
        "heartbeat that revives a lost lease",
        (
            (
                JOB,
                "  update lease set lease_until = v_until where ctid = any (v_rows);\n",
                "  update lease set lease_until = v_until where ctid = any (v_rows);\n"
                "  update lease set token = was, worker_id = p_worker, lease_until = v_until where was = any (p_tokens);\n",
            ),
            (
                JOB,
                "\n-- fence(token, held, wanted): raises",
                "\nalter table lease add was bigint;\n-- fence(token, held, wanted): raises",
            ),
            (
                SUSPECT,
                "update lease set token = p_token, lease_until = v_until, worker_id = p_worker, alone",
                "update lease set was = token, token = p_token, lease_until = v_until, worker_id = p_worker, alone",
            ),
            (
                SUSPECT,
                "update lease set token = p_token, lease_until = v_until, worker_id = p_worker, together",
                "update lease set was = token, token = p_token, lease_until = v_until, worker_id = p_worker, together",
            ),
        ),
        "P3b",
        2,
        r"[1-9]\d* of \d+ leases were taken from the harness",
    ),
    Bug(
        "split that drops the odd record",
        ((JOB, "from generate_series(v.lo, v.hi, v_size) s) p", "from generate_series(v.lo, v.hi - 1, v_size) s) p"),),
        "R1",
        12,
        r"^(?!.*not drained)lost \d",
    ),
    Bug(
        "retry that keeps the record's output",
        (
            ("anton/each.py", "good = {item for item in items if item not in fates}", "good = set(items)"),
            (
                RUN,
                "owners = [0 if who == WHOLE else places[who if first is None else first[who]] for who in output.owners]",
                "owners = [0 if who == WHOLE else places.get(who if first is None else first[who], 0) for who in output.owners]",
            ),
            (
                RUN,
                "where[who if first is None else first[who]]) == n",
                "where.get(who if first is None else first[who], 0)) == n",
            ),
        ),
        "R2",
        2,
        r"doubled \d.*out_each",
    ),
    Bug(
        "ack that does not check its row count",
        (
            (
                JOB,
                "  perform fence(p_token, v_held, cardinality(p_ids));\n  if v_mixed then",
                "  if v_held = 0 then return v_receipt; end if;\n  if v_mixed then",
            ),
        ),
        "P3a",
        2,
        r"\d stale acks were accepted",
    ),
    Bug(
        "doorbell without the second look",
        (
            ("anton/worker.py", "        if answer is Answer.BELL:\n            look = await self._look()\n", ""),
            (
                "anton/worker.py",
                "        if look.wake_at is not None:\n            longest = min",
                "        if False:\n            longest = min",
            ),
        ),
        "W2",
        3,
        "lies in the queue, and its worker sleeps",
    ),
    Bug(
        "cancel that brings a done job back",
        (
            (
                "sql/22_steer.sql",
                "into v;\n  end if;\n  if v.id is null then\n    return cancel_turn(p_job);",
                "into v;\n  end if;\n  if v.id is null then\n"
                "    insert into job (handler_id, change_id, at, lo, hi, op, ids) select r.handler_id, r.change_ids[1], r.at, r.los[1], r.his[1], 'n', r.ids[1:1]\n"
                "      from receipt r where r.change_ids[1] = p_job and r.ids is not null;\n"
                "    return cancel_turn(p_job);",
            ),
        ),
        "C1",
        10,
        r"doubled \d",
    ),
    Bug(
        "attempt not counted on a crash",
        ((SUSPECT, "crashes = crashes + case when alone then 1 else 0 end", "crashes = crashes"),),
        "P5",
        8,
        r"\d+ deaths for \d+ records",
    ),
)


MORE = (  # not of the twelve
    Bug(
        "permits counted, then claimed",
        (
            (
                PERMIT,
                "    v_rows := array(select ctid from permit where handler_id = p_handler and lease_until <= v_now\n"
                "                     order by n limit least(v_free, p_wanted - v_held) for update skip locked);\n"
                "    update permit set worker_id = p_worker, lease_until = v_now + p_lease where ctid = any (v_rows);",
                "    update permit set worker_id = p_worker, lease_until = v_now + p_lease\n"
                "     where handler_id = p_handler and n = any (array(select q.n from permit q, pg_sleep(0.2)\n"
                "       where q.handler_id = p_handler and q.lease_until <= v_now\n"
                "       order by q.n limit least(v_free, p_wanted - v_held)));",
            ),
        ),
        "F1",
        6,
        r"(hold|alone) ran \d+ times at once",
    ),
    Bug(
        "permits of the dead that are not freed",
        (
            (
                PERMIT,
                "    update permit set worker_id = p_worker, lease_until = v_now + p_lease where ctid = any (v_rows);",
                "    update permit set worker_id = p_worker, lease_until = v_now + 5 * p_lease where ctid = any (v_rows);",
            ),
            (
                "sql/35_worker.sql",
                "  update permit set worker_id = null, lease_until = '-infinity' where worker_id = p_worker;\n",
                "",
            ),
            (
                PERMIT,
                "  update permit set lease_until = v_now + p_lease           -- all that it holds last as long\n",
                "  update permit set lease_until = v_now + 5 * p_lease\n",
            ),
        ),
        "F1",
        6,
        r"[1-9]\d* permits are held by the dead",
    ),
    Bug(
        "a key that is free before its record is done",
        (
            (
                "anton/each.py",
                "        self.gate, self.key = gate, key\n        return True",
                "        self.gate, self.key = gate, key\n        self.leave()\n        return True",
            ),
        ),
        "F1",
        6,
        r"alone ran \d+ times at once",
    ),
    Bug(
        "order key released before the ack",
        (
            (
                "anton/order.py",
                "        if each.ended:\n            self._free(each, (item,))\n            return False\n        if each.order",
                "        self._free(each, (item,))\n        if each.order",
            ),
        ),
        "F1",
        30,
        r"inorder ran [1-9]\d* records after a later one of their key",
    ),
    Bug(
        "starts counted, then given",
        (
            (
                RATE,
                "select * into r from rate where handler_id = p_handler for update;",
                "select * into r from rate where handler_id = p_handler;",
            ),
            (
                RATE,
                "  if v_changed then\n    update rate",
                "  if v_changed then\n    perform pg_sleep(0.05);\n    update rate",
            ),
        ),
        "F1",
        6,
        r"pace began \d+ records in",
    ),
    Bug(
        "2xx of a route before COMMIT",
        (
            (
                "anton/web.py",
                "        await _commit(_status(result, values, status))\n",
                "        asyncio.ensure_future(_commit(_status(result, values, status)))\n",
            ),
            ("anton/web.py", "import inspect\n", "import asyncio\nimport inspect\n"),
        ),
        "H1",
        60,
        r"lost \d.*acknowledged src: \d+ is missing",
    ),
)


@contextmanager
def planted(bug: Bug) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The worker's modules by name as files with the bug, and the SQL statements that put it into a database."""
    texts: dict[str, str] = {}
    for path, shipped, wrong in bug.edits:
        text = texts.get(path) or (ROOT / path).read_text()
        if text.count(shipped) != 1:
            raise LookupError(f'bug "{bug.name}": {path} has {text.count(shipped)} times, not once: {shipped!r}')
        texts[path] = text.replace(shipped, wrong)
    with tempfile.TemporaryDirectory(prefix="anton-chaos-bug-") as folder:
        files, statements = {}, []
        for path, text in texts.items():
            if path.endswith(".sql"):
                statements += [
                    "set search_path = anton, pg_catalog, pg_temp",
                    *_changed(path, text),
                    "reset search_path",
                ]
            else:
                file = Path(folder) / Path(path).name
                file.write_text(text)
                files[path.removesuffix(".py").replace("/", ".")] = str(file)
        yield files, statements


def _changed(path: str, text: str) -> list[str]:
    """The functions that are not as shipped."""
    cut = re.compile(r"(?=^create or replace )", re.MULTILINE)
    return [new for old, new in zip(cut.split((ROOT / path).read_text()), cut.split(text), strict=True) if old != new]
