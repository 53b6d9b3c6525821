"""Approve: from a person's decision until the call that waited for it is sent, by a worker that is idle."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench, percentile
from benchmarks.reaction import working
from benchmarks.server import connect
from benchmarks.subject import ANTON, environment, number, wait_for, wait_idle

_APP = """
from anton import Approval, action

@action(approve=Approval("ann"))
async def refund(order: int) -> None: ...
"""


@bench(at_most("approve_to_sent_p99_ms", 200, "ms"))
def approve_to_sent(run: Run) -> Rows:
    """One approval at a time: milliseconds by the database's clock from the decision to the end of the call."""

    with run.server.database("approve") as url, connect(url) as conn, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.py").write_text(_APP)
        (folder / "autonomous.json").write_text('{"name": "desk"}')
        subprocess.run([*ANTON, "--database", url, "migrate"], cwd=folder, env=environment(), check=True,
                       capture_output=True)
        conn.execute("select anton.put_person('ann')")
        calls = run.size(200, 5)
        with working(folder, url, conn):
            conn.execute("insert into anton.action (app, name, args) select 'desk', 'refund', "
                         "jsonb_build_object('order', n) from generate_series(1, %s) n", (calls,))
            wait_for(lambda: number(conn, "select count(*) from anton.approval") == calls, 60, "the approvals")
            for id, in conn.execute("select id from anton.approval order by id").fetchall():
                wait_idle(conn)
                conn.execute("select anton.decide(id, 'ann', 'approve', 'bench', args_sha256) from anton.approval "
                             "where id = %s", (id,))
                wait_for(lambda one=id: number(conn, f"select count(*) from anton.action where approval_id = {one} "
                                               "and state = 'sent'") == 1, 60, "the call")
        taken = [float(ms) for ms, in conn.execute(
            "select extract(epoch from c.sent_at - a.decided_at) * 1000 from anton.action c "
            "join anton.approval a on a.id = c.approval_id").fetchall()]
        if len(taken) != calls or number(conn, "select count(*) from anton.dead"):
            raise WrongResult(f"{len(taken)} of {calls} calls were sent")
    return {"approve_to_sent_p99_ms": Row(percentile(taken, 99), detail={"p50_ms": percentile(taken, 50), "n": calls})}
