"""LLM: completions of a local server that counts: what is lost, paid twice, over a limit or a budget."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Rows, Run, WrongResult, at_least, at_most, bench
from benchmarks.proc import peak_rss
from benchmarks.server import Conn, connect
from benchmarks.subject import ANTON, environment, migrate, number, wait_for, wait_idle

APP = "app_llm"
_ASK = """insert into bench_in (data)
select jsonb_build_object('prompt', %s::text || n) from generate_series(1, %s::int) n"""


@contextmanager
def _service(**options: float) -> Iterator[str]:
    """A server with these options; yields its address."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.llmserver", json.dumps(options)], env=environment(),
                               stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


def _counts(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/counts") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@contextmanager
def _asking(run: Run, name: str, url: str, component: Mapping[str, Any] | None = None, **handler: Any) -> Iterator[
        tuple[Conn, str]]:
    """A migrated database of the app; this process's environment names the server meanwhile."""
    os.environ["BENCH_LLM"] = json.dumps({"base_url": f"{url}/v1", "component": component or {}, "handler": handler})
    try:
        with run.server.database(name) as database, connect(database) as conn:
            migrate(database, APP)
            yield conn, database
    finally:
        del os.environ["BENCH_LLM"]


@contextmanager
def _worker(database: str) -> Iterator[subprocess.Popen[bytes]]:
    """`anton work` in a process group of its own, which is ended whole."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*ANTON, "--database", database, "--app", f"benchmarks.{APP}", "work"],
                                   env=environment(), stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _names(pids: list[int]) -> list[str]:
    """Processes as calls name them."""
    return [f"{socket.gethostname()}:{pid}" for pid in pids]


def _busiest(conn: Conn, workers: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes] | None:
    """The worker with most calls in flight; None when none has any. Who has no permit of the limit has none."""
    calls = [(_asked(conn, "state = 'asking' and worker = any (%s)", _names(_children(one))).total(), n)
             for n, one in enumerate(workers)]
    most, n = max(calls)
    return workers[n] if most else None


def _kill(process: subprocess.Popen[bytes]) -> list[str]:
    """kill -9 of it and its children, which are in groups of their own. Returns who they were, as calls name them."""
    pids = _children(process)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in pids:
        with suppress(ProcessLookupError):                             # it saw that its parent is gone
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return _names(pids)


@bench(at_most("llm_lost", 0, "records"), at_most("llm_doubled", 0, "records"),
       at_most("llm_repaid_over_inflight", 0, "calls"), at_most("llm_ledger_gap", 0, "calls"))
def llm_faults(run: Run) -> Rows:
    """10,000 records, two processes of which the busier is killed, twice; 429s, 500s and hangs. Paid again may only be
    calls of the killed that were in flight, or answered in the second before. The ledger is compared record by record.
    """
    size = run.size(10_000, 500)
    with (_service(delay=0.2, faults=0.05) as url,
          _asking(run, "llm_faults", url, {"timeout": 5}, concurrency=100) as (conn, database), ExitStack() as stack):
        workers = [stack.enter_context(_worker(database)) for _ in range(2)]
        wait_for(lambda: number(conn, "select count(*) from anton.worker") >= 2, 30, "two workers")
        conn.execute(_ASK, ("what is ", size))
        excused: Counter[str] = Counter()                              # once a kill
        killed: list[str] = []
        before: Counter[str] = Counter()                               # what the killed had given up themselves
        for share in (0.2, 0.5):
            enough = f"select greatest(0, count(*) - {int(share * size)}) from bench_out"
            wait_for(partial(number, conn, enough), 300, "answers")
            wait_for(lambda: _busiest(conn, workers), 60, "a call in flight")
            workers.append(stack.enter_context(_worker(database)))
            theirs = _kill(victim := _busiest(conn, workers) or workers[0])
            workers.remove(victim)
            counts = _counts(url)
            asking = _asked(conn, "state = 'asking' and worker = any (%s)", theirs)
            if not asking:
                raise WrongResult(f"{theirs} were killed and had no call in flight")
            killed += theirs
            before += _asked(conn, "state = 'unknown' and worker = any (%s)", theirs)
            excused.update(excused_by(asking, counts))
        end = time.monotonic() + 600
        while number(conn, "select count(*) from anton.dead") + number(conn, "select count(*) from bench_out") < size:
            if time.monotonic() > end:
                raise WrongResult(f"{number(conn, 'select count(*) from bench_out')} of {size} were answered")
            time.sleep(0.1)
        wait_idle(conn, every=0.1)
        asking = "select anton.lapse_calls() + (select count(*) from anton.call where state = 'asking')"
        wait_for(lambda: not number(conn, asking), 120, "calls of the dead to lapse")
        counts = _counts(url)
        answered = sum(counts["answered"].values())
        kept = _asked(conn, "state in ('done', 'unknown')")
        left = _asked(conn, "state = 'unknown' and worker = any (%s)", killed) - before
        done = number(conn, "select count(*) from anton.call where state = 'done'")
        unknown = number(conn, "select count(*) from anton.call where state = 'unknown'")
        lost = size - number(conn, "select count(distinct data ->> 'prompt') from bench_out")
        doubled = number(conn, "select count(*) - count(distinct data ->> 'prompt') from bench_out")
    again = {prompt: times - 1 for prompt, times in counts["answered"].items() if times > 1}
    repaid = sum(max(0, times - excused[prompt]) for prompt, times in again.items())
    differ, unsent = ledger_gap(kept, Counter(counts["answered"]) + Counter(counts["hung"]), left)
    gap = sum(differ.values())
    detail = {"records": size, "answered": answered, "hung": sum(counts["hung"].values()), "done": done,
              "unknown": unknown, "paid_again": sum(again.values()), "left": left.total(), "unsent": unsent,
              "differ": differ}
    return {"llm_lost": Row(lost, None, detail), "llm_doubled": Row(doubled), "llm_repaid_over_inflight": Row(repaid),
            "llm_ledger_gap": Row(gap, None, detail)}


def excused_by(asking: Mapping[str, int], counts: Mapping[str, Any]) -> set[str]:
    """Which of the calls that a killed process left may be paid again: all but those that were answered more than a
    second before. counts: the server's, at the kill."""
    late = {*counts["answered"]} - {*counts["recent"], *counts["inflight"]}
    return {*asking} - late


def ledger_gap(kept: Mapping[str, int], arrived: Mapping[str, int], left: Mapping[str, int]) -> tuple[
        dict[str, int], int]:
    """By how many calls the ledger (done and unknown) and the server differ, more and fewer alike, by record.

    And how many a killed process had begun and the server had not taken: nobody can know that, and they are unknown
    rightly.
    """
    differ: dict[str, int] = {}
    unsent = 0
    for prompt in {*kept, *arrived}:
        more = kept.get(prompt, 0) - arrived.get(prompt, 0)
        here = max(0, min(more, left.get(prompt, 0)))
        unsent += here
        if more != here:
            differ[prompt] = abs(more - here)
    return differ, unsent


def _asked(conn: Conn, where: str, *values: Any) -> Counter[str]:
    """Calls by the prompt of their record."""
    return Counter(dict(conn.execute(
        "select i.data ->> 'prompt', count(*) from anton.call c join bench_in i on i.id = (c.key ->> 0)::bigint "
        f"where {where} group by 1", values).fetchall()))


@bench(at_most("llm_limit_violations", 0, "windows"), at_least("llm_limit_used", 0.9))
def llm_limit(run: Run) -> Rows:
    """A stated limit of 50 requests a second, two processes: seconds that held more, by the server's own clock."""
    size, limit = run.size(1_500, 300), 50
    with (_service() as url, _asking(run, "llm_limit", url, {"limit": f"{limit} requests/s"}, concurrency=100) as (
            conn, database), _worker(database), _worker(database)):
        wait_for(lambda: number(conn, "select count(*) from anton.worker") >= 2, 30, "two workers")
        conn.execute(_ASK, ("what is ", size))
        wait_idle(conn, every=0.1)
        at = sorted(_counts(url)["at"])
    over = sum(1 for n in range(limit, len(at)) if at[n] - at[n - limit] < 1.0)
    used = (len(at) - 1) / (at[-1] - at[0]) / limit
    return {"llm_limit_violations": Row(over, None, {"requests": len(at)}), "llm_limit_used": Row(used)}


@bench(at_most("budget_spent_usd", 1.0, "USD"))
def llm_budget(run: Run) -> Rows:
    """A budget of one dollar, eight processes: what the server would bill. Less than 0.90 is wrong, too."""
    processes = run.size(8, 2)
    with (_service(delay=0.02) as url, _asking(run, "llm_budget", url, {"budget": "1 USD"}, concurrency=20) as (
            conn, database)):
        with ExitStack() as stack:
            for _ in range(processes):
                stack.enter_context(_worker(database))
            wait_for(lambda: number(conn, "select count(*) from anton.worker") >= processes, 60, "the workers")
            conn.execute(_ASK, ("what is ", 3_000))
            wait_for(lambda: number(conn, "select count(*) from anton.handler where failing_since is not null"), 120,
                     "the budget to be reached")
            wait_for(lambda: not number(conn, "select count(*) from anton.call where state = 'asking'"), 60, "calls")
        counts = _counts(url)                                          # when all have ended
    spent = (counts["tokens_in"] * 100 + counts["tokens_out"] * 200) / 1_000_000
    if spent < 0.9:
        raise WrongResult(f"only {spent:.4f} USD were spent of 1.00")
    return {"budget_spent_usd": Row(spent, None, {"calls": sum(counts["answered"].values())})}


@bench(at_least("llm_inflight_vs_ideal", 0.85), at_most("llm_rss_mb", 200, "MB"))
def llm_inflight(run: Run) -> Rows:
    """300 calls of one second in flight in one process, from the first to the last answer, against no overhead."""
    rounds, width = run.size(20, 3), 300
    with (_service(delay=1.0) as url, _asking(run, "llm_inflight", url, concurrency=width) as (conn, database),
          _worker(database) as process):
        wait_for(lambda: number(conn, "select count(*) from anton.worker"), 30, "the worker")
        with peak_rss(process.pid) as peak:
            conn.execute(_ASK, ("what is ", rounds * width))
            wait_idle(conn, every=0.05)
        counts = _counts(url)
    took = max(counts["at"]) + 1.0 - min(counts["at"])
    return {"llm_inflight_vs_ideal": Row(rounds / took, None, {"most": counts["most"]}),
            "llm_rss_mb": Row(peak[0] if peak else None)}


@bench(at_most("memo_calls", 1, "calls"))
def llm_memo(run: Run) -> Rows:
    """1,000 equal rows, two processes: calls."""
    with (_service(delay=0.5) as url, _asking(run, "llm_memo", url) as (conn, database), _worker(database),
          _worker(database)):
        conn.execute(_ASK.replace(" || n", ""), ("what is it", 1_000))
        wait_for(lambda: number(conn, "select count(*) from bench_out") == 1000, 120, "answers")
        wait_idle(conn)
        answered = sum(_counts(url)["answered"].values())
    return {"memo_calls": Row(answered)}
