"""Flow: what limits over all processes let through, counted by the receiver of the calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import proc
from benchmarks.harness import MissingPeer, Row, Rows, Run, WrongResult, at_least, at_most, bench, percentile
from benchmarks.pickup import probe, since
from benchmarks.server import Conn, connect
from benchmarks.subject import (
    check,
    migrate,
    number,
    plain_table,
    source_table,
    wait_for,
    wait_idle,
    worker,
    workers,
)

RATE = 1000  # of app_rate: starts in a second
RATED, EACH = 50, 20  # of app_rate_key: customers, and starts of each in a second
LIMIT, SERVED = 10, 0.1  # of app_limit; seconds that the receiver takes for a call
PROCESSES = "8"
KEYS = 10_000  # of the records of app_per
_WORKED = ("select coalesce(sum(r.n), 0) from anton.receipt r join anton.handler h on h.id = r.handler_id "
           "where h.name like '{}'")


class Receiver:
    """Answers each connection after SERVED seconds. most: that were open at a time; a killed caller's is closed.

    seconds: that all were open, together.
    """

    def __init__(self) -> None:
        self.now = self.most = self.over = self.served = 0
        self.seconds = 0.0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.now += 1
        began = time.perf_counter()
        try:
            if self.now > LIMIT:                                       # unless one's end only waits to be read
                await asyncio.sleep(SERVED / 4)
                self.over += self.now > LIMIT
            self.most = max(self.most, self.now)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), SERVED)
                return
            self.served += 1
        finally:
            self.now -= 1
            self.seconds += time.perf_counter() - began
            with contextlib.suppress(OSError):
                writer.write(b"1")
                writer.close()

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """Its port."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), loop).result(5)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5)


def _kill(conn: Conn) -> None:
    row = conn.execute("select pid from anton.worker where stopped_at is null order by random() limit 1").fetchone()
    if row is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(str(row[0])), signal.SIGKILL)


@bench(at_least("limit_used", 0.9), at_most("limit_violations", 0, "records"))
def limit(run: Run) -> Rows:
    """concurrency=10 over 8 processes: records that call the receiver, half of them in peace, half while workers are
    killed; then a million that each take one of ten locks, while workers are killed."""
    records, kills, storm = run.size(6_000, 400), run.size(20, 4), run.size(1_000_000, 2_000)
    receiver = Receiver()
    with (receiver.listening() as port, tempfile.TemporaryDirectory() as locks, run.server.database("limit") as url,
          connect(url) as conn):
        os.environ |= {"BENCH_RECEIVER": str(port), "BENCH_LOCKS": locks}
        for table in ("limited", "locked"):
            conn.execute(f"create table {table} (id bigint generated always as identity primary key, n bigint)")
        migrate(url, "app_limit")
        add = f"insert into limited (n) select g from generate_series(1, {records // 2}) g"
        with worker(conn, url, "app_limit", "--processes", PROCESSES):
            wait_for(lambda: workers(conn) >= int(PROCESSES), 60, "all processes to register")
            time.sleep(1)                                              # their starts are not measured
            began = time.perf_counter()
            conn.execute(add)
            took = wait_idle(conn) - began
            used, full = records // 2 * SERVED / LIMIT / took, receiver.seconds / LIMIT / took
            conn.execute(add)
            for _ in range(kills):
                time.sleep(0.4)
                _kill(conn)
            wait_idle(conn)
            conn.execute(f"insert into locked (n) select g from generate_series(1, {storm}) g")
            end = time.monotonic() + 900
            while number(conn, "select count(*) from (select from anton.job limit 1) j"):
                if time.monotonic() > end:
                    raise WrongResult(f"{number(conn, 'select count(*) from anton.job')} jobs were left after 900 s")
                time.sleep(2)
                _kill(conn)
                kills += 1
            wait_idle(conn)
        check(conn, "select 1 where false", "select 1 where false")
        over = receiver.over + sum(file.stat().st_size for file in Path(locks).glob("over"))
    detail: dict[str, object] = {"records": records, "storm": storm, "processes": int(PROCESSES), "kills": kills,
                                "most_at_a_time": receiver.most, "served": receiver.served, "open": full}
    return {"limit_used": Row(used, detail=detail), "limit_violations": Row(over, detail=detail)}


@bench(at_least("per_key_vs_none", 0.5))
def per_key(run: Run) -> Rows:
    """concurrency=10 for each of 10,000 keys against no limit: records that do nothing, two processes."""
    records, rates = run.size(400_000, 20_000), dict[str, list[float]]()
    for _ in range(run.times):
        for table in ("unlimited", "keyed"):
            with run.server.database("per_key") as url, connect(url) as conn:
                for name in ("unlimited", "keyed"):
                    conn.execute(f"create table {name} (id bigint generated always as identity primary key, "
                                 "customer int)")
                migrate(url, "app_per")
                with worker(conn, url, "app_per", "--processes", "2"):
                    wait_for(lambda: workers(conn) >= 2, 60, "all processes to register")
                    began = time.perf_counter()
                    conn.execute(f"insert into {table} (customer) "
                                 f"select g::bigint * 7919 % {KEYS} from generate_series(1, {records}) g")
                    rates.setdefault(table, []).append(records / (wait_idle(conn) - began))
                check(conn, "select 1 where false", "select 1 where false")
    best = {table: statistics.median(found) for table, found in rates.items()}
    detail: dict[str, object] = {"records_per_s": best, "records": records}
    return {"per_key_vs_none": Row(best["keyed"] / best["unlimited"], detail=detail)}


@bench(at_most("priority_p99_ms", 250, "ms"), at_least("priority_low_share", 0.002))
def priority(run: Run) -> Rows:
    """Calls of 20 ms in 8 slots: pick-up of a handler of priority 9 beside 20 of priority 0 with a backlog; then what
    share these get while another of priority 9 could fill all slots."""
    seconds, count = run.size(30, 10), run.size(200, 40)
    with run.server.database("priority") as url, connect(url) as conn:
        for table in ("lows", "highs", "probes"):
            conn.execute(f"create table {table} (id bigint generated always as identity primary key, n bigint)")
        conn.execute("create table starts (id bigint generated always as identity primary key, n bigint, at bigint)")
        migrate(url, "app_priority")
        for table, n in (("lows", 2_000), ("highs", 400 * seconds)):
            conn.execute(f"insert into {table} (n) select g from generate_series(1, {n}) g")
        conn.execute("select anton.pause('high')")
        committed = {}
        with worker(conn, url, "app_priority", "--slots", "8"):
            for n in range(count):
                time.sleep(0.02)
                committed[n] = probe(conn, "probes", n)
            wait_for(lambda: number(conn, "select count(*) from starts") >= count, 60, "all probes to start")
            conn.execute("select anton.resume('high')")
            before = number(conn, _WORKED.format("high")), number(conn, _WORKED.format("low_%"))
            time.sleep(seconds)
            high, low = (number(conn, _WORKED.format(name)) - was
                         for name, was in zip(("high", "low_%"), before, strict=True))
        times = since(conn, committed)
        if not number(conn, "select count(*) from anton.job j join anton.handler h on h.id = j.handler_id "
                            "where h.name = 'high'"):
            raise WrongResult("the backlog of priority 9 was done too soon")
    return {"priority_p99_ms": Row(percentile(times, 99), detail={"p50_ms": percentile(times, 50)}),
            "priority_low_share": Row(low / (low + high), detail={"low": low, "high": high, "seconds": seconds})}


@bench(at_least("flow_free_cost", 0.97))
def flow_free(run: Run) -> Rows:
    """The engine without any option of flow control, before against after: 200,000 records in batches, and 40,000 jobs
    of one record, by turns, neither always first, 40 times. The median of the pairs' ratios: one pair scatters by a
    tenth here and there by a third, so there are many; of the CPU seconds in the detail. BENCH_BEFORE names a checkout
    of the release before."""
    before = os.environ.get("BENCH_BEFORE", "")
    if not before or not Path(before, "benchmarks").is_dir():
        raise MissingPeer("set BENCH_BEFORE to a checkout of what is to be compared with")
    ratios: dict[str, float] = {}
    detail: dict[str, object] = {}
    for app, records in (("app_batch", run.size(200_000, 20_000)), ("app_jobs", run.size(40_000, 4_000))):
        took: dict[str, list[float]] = {"before": [], "after": []}
        used: dict[str, list[float]] = {"before": [], "after": []}
        with (run.server.database("free_before") as old, run.server.database("free_after") as new,
              contextlib.ExitStack() as stack):
            sides = {}
            for side, url, repo in (("before", old, Path(before)), ("after", new, Path(__file__).parent.parent)):
                conn = stack.enter_context(connect(url))
                source_table(conn, records)
                for table in ("bench_in", "bench_out", "held_in"):
                    plain_table(conn, table)
                migrate(url, app, repo)
                sides[side] = conn, stack.enter_context(worker(conn, url, app, repo=repo))
                conn.execute("insert into bench_in (n, s) select n, s from source limit 1000")
                wait_idle(conn)                                        # what a worker does when it begins is over
            for turn in range(8 * run.times):
                for side, (conn, pid) in list(sides.items())[::1 if turn % 2 else -1]:
                    conn.execute("truncate bench_in, bench_out")
                    conn.execute("checkpoint")
                    meter = proc.Meter(run.server.postmaster, pid)
                    began = time.perf_counter()
                    conn.execute("insert into bench_in (n, s) select n, s from source")
                    took[side].append(wait_idle(conn) - began)
                    used[side].append(meter.per_million(records) or 0.0)
                    check(conn, "select n, s from bench_in", "select n, s from bench_out")
        ratios[app] = statistics.median(old / new for old, new in zip(took["before"], took["after"], strict=True))
        detail[app] = {"seconds": took, "cpu_s_per_1m": {side: statistics.median(used[side]) for side in used}}
    return {"flow_free_cost": Row(min(ratios.values()), detail={"ratios": ratios, **detail})}


@bench(at_most("rate_violations", 0, "starts"), at_least("rate_used", 0.95))
def rate(run: Run) -> Rows:
    """rate="1000/s" over 4 processes: each start noted by the machine's clock, all windows of a second looked at."""
    seconds = run.size(30, 6)
    with (tempfile.NamedTemporaryFile() as file, run.server.database("rate") as url, connect(url) as conn):
        os.environ["BENCH_STARTS"] = file.name
        conn.execute("create table rated (id bigint generated always as identity primary key, n bigint)")
        migrate(url, "app_rate")
        with worker(conn, url, "app_rate", "--processes", "4"):
            wait_for(lambda: workers(conn) >= 4, 60, "all processes to register")
            conn.execute(f"insert into rated (n) select g from generate_series(1, {seconds * RATE}) g")
            wait_idle(conn)
        check(conn, "select 1 where false", "select 1 where false")
        starts = sorted((at, pid) for at, pid in struct.iter_unpack("dq", Path(file.name).read_bytes()))
    at = [at for at, _ in starts]
    over = sum(late - early < 1.0 for early, late in zip(at, at[RATE:], strict=False))
    middle = [one for one in at if at[0] + 1 <= one < at[-1] - 1]
    used = (len(middle) - 1) / (middle[-1] - middle[0]) / RATE
    detail: dict[str, object] = {"starts": len(at), "seconds": at[-1] - at[0],
                                 "by_process": sorted(Counter(pid for _, pid in starts).values())}
    return {"rate_violations": Row(over, detail=detail), "rate_used": Row(used, detail=detail)}


@bench(at_most("rate_key_violations", 0, "starts"))
def rate_key(run: Run) -> Rows:
    """rate="20/s" for each of 50 customers, two processes, the one that has the handler killed twice: all windows."""
    seconds = run.size(20, 4)
    with (tempfile.NamedTemporaryFile() as file, run.server.database("rate_key") as url, connect(url) as conn):
        os.environ["BENCH_STARTS"] = file.name
        conn.execute("create table rated (id bigint generated always as identity primary key, customer bigint)")
        migrate(url, "app_rate_key")

        def starts() -> list[tuple[float, int, int]]:
            return list(struct.iter_unpack("dqq", Path(file.name).read_bytes()))

        with worker(conn, url, "app_rate_key", "--processes", "2"):
            wait_for(lambda: workers(conn) >= 2, 60, "both processes to register")
            conn.execute("insert into rated (customer) select mod(g, %s) from generate_series(1, %s) g",
                         (RATED, seconds * RATED * EACH))
            for kill in (1, 2):
                wait_for(lambda kill=kill: len(starts()) > kill * seconds * RATED * EACH / 3, 120, "starts")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(starts()[-1][1], signal.SIGKILL)
            wait_idle(conn)
        check(conn, "select 1 where false", "select 1 where false")
        found: dict[int, list[float]] = {}
        for at, _, customer in starts():
            found.setdefault(customer, []).append(at)
    over = sum(late - early < 1.0 for at in map(sorted, found.values())
               for early, late in zip(at, at[EACH:], strict=False))
    ends = [at for one in found.values() for at in one]
    return {"rate_key_violations": Row(over, detail={"starts": len(ends), "customers": len(found),
                                                     "seconds": max(ends) - min(ends)})}


@bench(at_most("rate_keys_growth", 1.5))
def rate_keys(run: Run) -> Rows:
    """rate= beside per= with 100,000 live keys: CPU for a record of the last tenth of them over that of the first."""
    detail: dict[str, object] = {}
    ratios = list[float]()
    for processes in (1, 2):
        with run.server.database("rate_keys") as url, connect(url) as conn:
            for table in ("met", "hot"):
                conn.execute(f"create table {table} (id bigint generated always as identity primary key, k bigint)")
            migrate(url, "app_rate_keys")
            with worker(conn, url, "app_rate_keys", "--processes", str(processes)) as pid:
                wait_for(lambda: workers(conn) >= processes, 60, "all processes to register")  # noqa: B023
                tenths, detail[f"processes_{processes}"] = _live_keys(run, conn, pid)
        ratios.append(tenths[-1] / tenths[0])
    return {"rate_keys_growth": Row(max(ratios), detail=detail)}


def _live_keys(run: Run, conn: Conn, pid: int) -> tuple[list[float], dict[str, object]]:
    """CPU, or time where that is not known, for a record of each tenth of the keys; what else was seen."""
    keys, hot = run.size(100_000, 2_000), run.size(1_000, 50)
    cpu, cpus = proc.Meter(run.server.postmaster, pid), list[float]()

    def took(table: str, first: int, n: int, times: int = 1) -> float:
        used, began = cpu.seconds(), time.perf_counter()
        conn.execute(f"insert into {table} (k) select k from generate_series(1, {times}), "
                     f"generate_series({first}, {first + n - 1}) k")
        passed, after = wait_idle(conn, 1200) - began, cpu.seconds()
        cpus.append(1000 * (passed if used is None or after is None else after - used) / n / times)
        return 1000 * passed / n / times

    def asked(query: str) -> float:
        began = time.perf_counter()
        conn.execute(query)
        return 1000 * (time.perf_counter() - began)

    took("met", 1, keys // 50)                                         # warm
    memory = [proc.rss_mb(pid)]
    tenths = [took("met", keys + n * keys // 10, keys // 10) for n in range(10)]
    memory.append(proc.rss_mb(pid))
    found: dict[str, object] = {"tenths_ms": tenths, "again_ms": took("met", keys, keys),
                                "hot_ms": took("met", keys, hot, 20), "cpu_ms": cpus,
                                "live": number(conn, "select count(*) from anton.rate_key where until > anton.now()")}
    for what in ("table", "indexes"):
        found[f"{what}_mb"] = number(conn, f"select pg_{what}_size('anton.rate_key')") / 1e6
    for query in ("anton.forget_starts(anton.now())", "anton.promote()", "anton.show_handler('meet')"):
        asked(f"select {query}")
        found[query] = asked(f"select {query}")                        # planned by now
    found["anton.status"] = asked("select * from anton.status")
    found["waiting_ms"] = took("hot", 1, hot, run.size(50, 5))         # a line of 50 for each key, at its rate
    memory.append(proc.rss_mb(pid))
    return cpus[1:11], found | {"rss_mb": memory}
