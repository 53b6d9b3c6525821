"""Sensing: kills of what comes in by the clock and from files. Polls are S1, in direct.py."""

from __future__ import annotations

import time

from chaos.cell import Cell
from chaos.direct import SOON, _finish, _stopped
from chaos.faults import PATIENCE, Result, fault

TICK = ("mid_tick", "after_claim", "mid_firing", "before_ack", "before_commit", "commit_sent_no_reply", "after_commit")
LOAD = ("mid_piece", "after_piece", "commit_sent_no_reply", "before_ack", "before_commit")  # the last two: all is in
LINES = 4000  # of a file: some 80 pieces, see chaos/app/main.py
FAR = 6  # pieces at most that a load gets on between two kills


@fault("S2", "SIGKILL of a worker with a schedule due each second, at seven named points in turn")
def killed_firings(cell: Cell, n: int) -> Result:
    """n kills; after each seven one worker that lives. Each second from the first to the last has fired, once."""
    result = Result()
    cell.one("update anton.schedule set cron = '@every 1', paused = false where name = 'strike'")
    cell.one("select anton.plan_anew(id) from anton.schedule where name = 'strike'")
    for at in range(1, n + 1):
        point = TICK[at % len(TICK)]
        cell.start(point=point)
        cell.kill(_stopped(cell, point)["pid"], point, both=True)
        result.n += 1
        if at % len(TICK) == 0:                                        # killed over and over it would be a dead letter
            cell.start()
            cell.drain(PATIENCE)
            cell.end()
    cell.start()
    time.sleep(2)                                                      # some more times come
    cell.one("update anton.schedule set paused = true where name = 'strike'")
    _finish(cell, result)
    cell.one("select anton.tick()")                                    # closes what was settled last
    times, missed, rows, different, phantom, states = cell.one(
        "with t as (select extract(epoch from planned_at)::bigint as at, state from anton.tick t "
        "join anton.schedule s on s.id = t.schedule_id where s.name = 'strike') "
        "select (select max(at) - min(at) + 1 from t), "
        "(select count(*) from generate_series((select min(at) from t), (select max(at) from t)) at "
        "where at not in (select src from out_strike)), "
        "(select count(*) from out_strike), (select count(distinct src) from out_strike), "
        "(select count(*) from out_strike where src not in (select at from t)), "
        "array(select distinct state from t order by 1)"
    )
    result.verdict.lost += missed
    result.verdict.doubled += rows - different
    result.verdict.phantom += phantom
    result.verdict.require(rows == times and not missed,
                           f"{times} times, {missed} missed, {rows} firings of {different}")
    result.verdict.require(states == ["done"], f"firings are {', '.join(states)}")
    result.more |= {"times": times, "firings": rows}
    return result


@fault("S3", "SIGKILL of a worker that loads a file, at five named points in turn")
def killed_loads(cell: Cell, n: int) -> Result:
    """n kills, five for each file. Each line of a file is a row once."""
    result, total = Result(), 0
    for at in range(1, n + 1):
        if at % len(LOAD) == 1:
            lines = "\n".join(f"{id},{'x' * 60}" for id in range(total + 1, total + LINES + 1))
            (cell.files / f"{at}.csv").write_text(f"src,v\n{lines}\n")
            total += LINES
            cell.one("select anton.fire(id, anton.now(), 'parallel') from anton.schedule where name = 'scan_lots'")
        point = LOAD[(at - 1) % len(LOAD)]
        cell.start(point=point, hits=1 if point in LOAD[3:] else cell.random.randint(1, FAR))
        cell.kill(_stopped(cell, point)["pid"], point, both=True)
        result.n += 1
        if at % len(LOAD) == 0 or at == n:                             # killed over and over it would be a dead letter
            cell.start()
            _loaded(cell, total)
            cell.drain(PATIENCE)
            cell.end()
    cell.start()
    _finish(cell, result)
    rows, different, states = cell.one(
        "select (select count(*) from out_lots), "
        "(select count(distinct src) from out_lots where src between 1 and %s), "
        "array(select distinct state from anton.load order by 1)",
        total,
    )
    result.verdict.lost += total - different
    result.verdict.doubled += rows - different
    result.verdict.require(total == rows == different, f"the files have {total} lines, out_lots {rows}, of {different}")
    result.verdict.require(states == ["done"], f"loads are {', '.join(states)}")
    (files,) = cell.one("select count(*) from anton.load")
    result.more |= {"rows": rows, "files": files}
    return result


def _loaded(cell: Cell, total: int) -> None:
    """Waits until so many rows are in, or the loads stand still."""
    end, before = time.monotonic() + SOON, 0
    while (rows := cell.one("select count(*) from out_lots")[0]) < total and time.monotonic() < end:
        if rows != before:
            end, before = time.monotonic() + SOON, rows
        time.sleep(0.05)
