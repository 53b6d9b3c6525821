"""Bugs: twelve that the harness has to catch, each a change of a few lines to the SQL or the worker as shipped.

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

    sign: what the verdict has to say, as a pattern: a bug that is caught for another reason is not caught.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    fault: str
    n: int
    sign: str


JOB, RUN = "sql/20_job.sql", "anton/settle.py"

BUGS = (
    Bug(
        "ack without token",
        (
            (
                JOB,
                "delete from lease where token = p_token and id = any (p_ids) returning *\n  ), ranked",
                "delete from lease where id = any (p_ids) returning *\n  ), ranked",
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
                "anton/web.py",
                "        await _commit(_status(result, values, status))\n",
                "        with contextlib.suppress(Exception):\n            await _commit(_status(result, values, status))\n",
            ),
            ("anton/web.py", "import inspect\n", "import contextlib\nimport inspect\n"),
        ),
        "H1",
        60,
        r"lost \d.*acknowledged src",
    ),
    Bug(
        "lease on the worker's clock",
        (
            (
                "anton/queue.py",
                '    mine = mine or token()\n    return _jobs(mine, await db.call(conn, "claim"',
                '    import time\n    at = await conn.fetchval("select extract(epoch from clock_timestamp())::float8")\n'
                "    lease += timedelta(seconds=time.time() - at)\n"
                '    mine = mine or token()\n    return _jobs(mine, await db.call(conn, "claim"',
            ),
        ),
        "T1a",
        2,
        "a lease of",
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
                "  update worker set seen_at = v_now where id = p_worker;\n",
                "  update worker set seen_at = v_now where id = p_worker;\n"
                "  update lease set token = p_tokens[1], worker_id = p_worker where alone and worker_id <> p_worker\n"
                "     and p_tokens[1] is not null;\n",
            ),
        ),
        "P3b",
        2,
        "leases were taken from the harness",
    ),
    Bug(
        "split that drops the odd record",
        ((JOB, "from generate_series(v.lo, v.hi, v_size) s) p", "from generate_series(v.lo, v.hi - 1, v_size) s) p"),),
        "R1",
        12,
        r"lost \d",
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
        "was not picked up",
    ),
    Bug(
        "cancel that brings a done job back",
        (
            (
                "sql/22_steer.sql",
                "into v;\n  end if;\n  if v.id is null then\n    return false;",
                "into v;\n  end if;\n  if v.id is null then\n"
                "    insert into job (handler_id, change_id, at, lo, hi, op, ids) select r.handler_id, r.change_ids[1], r.at, r.los[1], r.his[1], 'n', r.ids\n"
                "      from receipt r where r.change_ids[1] = p_job and r.ids is not null;\n"
                "    return false;",
            ),
        ),
        "C1",
        10,
        r"doubled \d",
    ),
    Bug(
        "attempt not counted on a crash",
        (("sql/21_suspect.sql", "crashes = crashes + case when alone then 1 else 0 end", "crashes = crashes"),),
        "P5",
        8,
        "deaths for",
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
