"""Harness: the registry of benches, how one is run, and how its rows are reported.

    @bench(at_least("python_batch_vs_floor", 0.40))
    def python_batch(run: Run) -> Rows: ...

A bench returns one Row per bar it declared. One that raises yields rows of value None and ok False:
a wrong output, a job left over, a peer that is not installed are results, not gaps.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.server import Server

RESULTS = Path(__file__).parent / "results"


class WrongResult(Exception):
    """The run ended, but not with what it had to produce."""


class MissingPeer(Exception):
    """Another program that a bench compares with is not here."""


@dataclass(frozen=True)
class Bar:
    """One row of the report: its name, unit, limit, and on which side of the limit is good."""

    name: str
    limit: float
    unit: str
    most: bool

    def met(self, value: float | None) -> bool:
        return value is not None and (value <= self.limit if self.most else value >= self.limit)

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.limit:g}"


def at_least(name: str, limit: float, unit: str = "ratio") -> Bar:
    return Bar(name, limit, unit, most=False)


def at_most(name: str, limit: float, unit: str = "ratio") -> Bar:
    return Bar(name, limit, unit, most=True)


@dataclass
class Row:
    """What a bench measured for one bar. cpu_s_per_1m: CPU seconds of Anton and Postgres for 1M records."""

    value: float | None
    cpu_s_per_1m: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)


Rows = dict[str, Row]


@dataclass
class Run:
    """What a bench is given. quick: small and once, to see that it works; its figures mean little."""

    server: Server
    quick: bool = False
    repeats: int = 5

    @property
    def times(self) -> int:
        return 1 if self.quick else self.repeats

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


Function = Callable[[Run], Rows]


@dataclass(frozen=True)
class Bench:
    name: str
    bars: tuple[Bar, ...]
    function: Function

    def answers(self, name: str) -> bool:
        return name == self.name or any(name == bar.name for bar in self.bars)


benches: list[Bench] = []


def bench(*bars: Bar) -> Callable[[Function], Function]:
    """Registers a bench under its function's name and the names of its bars, in the order of the report."""

    def register(function: Function) -> Function:
        benches.append(Bench(function.__name__, bars, function))
        return function

    return register


def choose(names: Sequence[str]) -> list[Bench]:
    """The benches that answer to these names; all when none are given. An unknown name raises SystemExit."""
    for name in names:
        if not any(one.answers(name) for one in benches):
            known = ", ".join(bar.name for one in benches for bar in one.bars)
            raise SystemExit(f"no bench {name!r}; there are: {known}")
    return [one for one in benches if not names or any(one.answers(name) for name in names)]


def measure(one: Bench, run: Run) -> list[dict[str, Any]]:
    """Runs one bench; returns its rows as they go into the report, `detail` included."""
    began = time.perf_counter()
    try:
        rows = one.function(run)
        error = None
    except Exception as problem:  # the report names it; other benches go on
        rows, error = {}, problem
        if not isinstance(problem, WrongResult | MissingPeer):
            traceback.print_exc()
    report = []
    for bar in one.bars:
        row = rows.get(bar.name, Row(None))
        line: dict[str, Any] = {
            "name": bar.name,
            "value": None if row.value is None else float(f"{row.value:.4g}"),
            "unit": bar.unit,
            "bar": bar.limit,
            "ok": bar.met(row.value),
        }
        if row.cpu_s_per_1m is not None:
            line["cpu_s_per_1m"] = round(row.cpu_s_per_1m, 2)
        detail = {"bar": str(bar), "seconds": round(time.perf_counter() - began, 1), **row.detail}
        if error is not None:
            detail["error"] = f"{type(error).__name__}: {error}"[:500]
        report.append({**line, "detail": detail})
    return report


def table(report: Iterable[dict[str, Any]]) -> str:
    """The report as text."""
    lines = [f"{'name':<28}{'value':>10} {'unit':<6}{'bar':>8}  {'ok':<4}{'cpu s/1M':>9}{'records/s/core':>16}"]
    for row in report:
        cpu = row.get("cpu_s_per_1m")
        value = "-" if row["value"] is None else f"{row['value']:g}"
        cost = f"{cpu:>9.2f}{1e6 / cpu:>16,.0f}" if cpu else ""
        ok = "yes" if row["ok"] else "NO"
        line = f"{row['name']:<28}{value:>10} {row['unit']:<6}{row['detail']['bar']:>8}  {ok:<4}{cost}"
        lines.append(
            line.rstrip() + (f"  {row['detail']['error'].splitlines()[0]}" if "error" in row["detail"] else "")
        )
    return "\n".join(lines)


def save(report: list[dict[str, Any]], folder: Path = RESULTS) -> None:
    """Writes latest.json and detail.json; rows measured earlier stay until they are measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    order = [bar.name for one in benches for bar in one.bars]
    kept = _load(folder / "latest.json"), _load(folder / "detail.json")
    latest = {row["name"]: row for row in kept[0]} | {
        row["name"]: {key: value for key, value in row.items() if key != "detail"} for row in report
    }
    detail = {row["name"]: row for row in kept[1]} | {
        row["name"]: {"name": row["name"], "at": at, **row["detail"]} for row in report
    }
    for name, rows in (("latest.json", latest), ("detail.json", detail)):
        known = sorted(rows.values(), key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
        (folder / name).write_text(json.dumps(known, indent=1) + "\n")


def _load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the known values, None when none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least q of 100 values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -(-len(ordered) * int(q * 100) // 10000) - 1))]
