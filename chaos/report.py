"""Report: bars, the 95 % bound beside each zero, the table, and chaos.json.

A bar is met by a run that found nothing wrong: outputs that should not be there, or a queue that did not drain, are in
no bar's figure and miss all bars of their fault.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chaos.cell import LEASE, ROOT
from chaos.check import Verdict
from chaos.faults import FAULTS, Result

RESULTS = ROOT / "benchmarks" / "results"
DETAIL = "chaos-detail.json"
KEPT = ("acked", "unknown", "lost", "doubled", "phantom", "wrong")  # of a verdict

# How often in 60 minutes. The faults of a bar have its N.
FULL = {
    "P1": 1000,
    "P2": 200,
    "P3": 300,
    "P5": 1600,
    "R1": 100,
    "D1": 100,
    "D2": 100,
    "D3": 20,
    "D5": 200,
    "D6": 500,
    "N1": 40,
    "N7": 60,
    "A5": 1000,
    "T1": 40,
    "L3": 20,
    "C1": 200,
    "W1": 3000,
    "H1": 100,
    "H2": 100,
    "OUT": 60,
    "L1": 60,
    "D12": 500_000,
    "D12b": 5,
    "P4": 15,
    "P6": 12,
    "P7": 8,
    "A3": 6,
    "L2": 20_000,
    "F1": 200,
    "D7": 300,
    "D11": 8,
    "D13": 60,
    "A4": 1_000_000,
    "T2": 12,
    "N3": 3,
    "P1a": 60,
    "P3a": 20,
    "P3b": 10,
    "P3c": 20,
    "R2": 20,
    "Q1": 20,
    "T1a": 10,
    "W2": 100,
    "S1": 100,
    "B1": 80,
    "S2": 105,
    "S3": 50,
}


@dataclass(frozen=True)
class Bar:
    """A row of chaos.json. limit: at most, or at least."""

    name: str
    unit: str
    limit: float
    most: bool = True


BARS = (
    Bar("kills", "kills", 1000, most=False),
    Bar("kill_lost", "records", 0),
    Bar("kill_doubled", "records", 0),
    Bar("redo_p99_over_lease_s", "s", 2),
    Bar("restarts", "restarts", 100, most=False),
    Bar("restart_lost", "records", 0),
    Bar("restart_doubled", "records", 0),
    Bar("first_ack_p99_s", "s", 3),
    Bar("reply_lost", "replies", 500, most=False),
    Bar("reply_lost_lost", "records", 0),
    Bar("reply_lost_doubled", "records", 0),
    Bar("zombies", "stale acks", 300, most=False),
    Bar("zombie_refused_ratio", "ratio", 1, most=False),
    Bar("zombie_doubled", "records", 0),
    Bar("oom_kills", "deaths", 200, most=False),
    Bar("oom_innocent_dead", "records", 0),
    Bar("outage_dead", "records", 0),
    Bar("outage_drain_vs_ideal", "ratio", 1.2),
    Bar("overload_goodput", "ratio", 0.9, most=False),
    Bar("overload_neighbour_ratio", "ratio", 2),
    Bar("overload_rss_mb", "MB", 20),
    Bar("xmin_claim_p99_ratio", "ratio", 2),
    Bar("webhook_kills", "kills of each", 100, most=False),
    Bar("webhook_2xx_missing", "deliveries", 0),
    Bar("webhook_doubled", "deliveries", 0),
    Bar("build_kills", "kills", 50, most=False),
    Bar("build_lost", "records", 0),
    Bar("build_phantom", "records", 0),
    Bar("build_orphans", "left behind", 0),
    Bar("planted_caught", "bugs", 12, most=False),
    Bar("outbox_kills", "kills", 1800, most=False),
    Bar("outbox_wrong_effects", "calls", 0),
    Bar("outbox_doubled", "calls", 0),
    Bar("outbox_unlisted", "calls", 0),
)


def values(results: dict[str, Result]) -> dict[str, tuple[float | None, bool]]:
    """What the bars compare, of the faults that were done: None where an exception left nothing measured. And whether
    nothing was wrong."""
    found: dict[str, tuple[float | None, bool]] = {}

    def take(fault: str, **names: Any) -> None:
        if (result := results.get(fault)) is not None:
            clean, raised = not result.verdict.text, bool(not result.n and result.verdict.wrong)
            found.update({name: (None if raised else get(result), clean) for name, get in names.items()})

    take(
        "P1",
        kills=lambda r: r.n,
        kill_lost=lambda r: r.verdict.lost,
        kill_doubled=lambda r: r.verdict.doubled,
        redo_p99_over_lease_s=lambda r: r.more["redo_p99_s"] and r.more["redo_p99_s"] - LEASE,
    )
    take(
        "D1",
        restarts=lambda r: r.n,
        restart_lost=lambda r: r.verdict.lost,
        restart_doubled=lambda r: r.verdict.doubled,
        first_ack_p99_s=lambda r: r.more["first_ack_p99_s"],
    )
    take(
        "D6",
        reply_lost=lambda r: r.n,
        reply_lost_lost=lambda r: r.verdict.lost,
        reply_lost_doubled=lambda r: r.verdict.doubled,
    )
    take(
        "P3",
        zombies=lambda r: r.n,
        zombie_refused_ratio=lambda r: r.more.get("refused", 0) / r.n if r.n else None,
        zombie_doubled=lambda r: r.verdict.doubled,
    )
    take("P5", oom_kills=lambda r: r.n, oom_innocent_dead=lambda r: r.more["innocent_dead"])
    take(
        "H2",
        webhook_kills=lambda r: r.n,
        webhook_2xx_missing=lambda r: r.verdict.lost,
        webhook_doubled=lambda r: r.verdict.doubled,
    )
    take(
        "B1",
        build_kills=lambda r: r.n,
        build_lost=lambda r: r.verdict.lost,
        build_phantom=lambda r: r.verdict.phantom,
        build_orphans=lambda r: r.more.get("orphans"),
    )
    take("OUT", outage_dead=lambda r: r.more["dead"], outage_drain_vs_ideal=lambda r: r.more["ratio"])
    take(
        "L1",
        overload_goodput=lambda r: r.more["goodput"],
        overload_neighbour_ratio=lambda r: r.more["neighbour_ratio"],
        overload_rss_mb=lambda r: max(r.more["rss_mb"]) - r.more["rss_mb"][0],
    )
    take("D12", xmin_claim_p99_ratio=lambda r: r.more["ratio"])
    take("bugs", planted_caught=lambda r: r.n)
    take(
        "outbox",
        outbox_kills=lambda r: r.n,
        outbox_wrong_effects=lambda r: r.more["wrong_effects"],
        outbox_doubled=lambda r: r.verdict.doubled,
        outbox_unlisted=lambda r: r.more["unlisted"],
    )
    return found


def rows(results: dict[str, Result]) -> list[dict[str, Any]]:
    """The rows of chaos.json."""
    found = values(results)
    return [_judged(bar, *found[bar.name]) for bar in BARS if bar.name in found]


def _judged(bar: Bar, value: float | None, clean: bool) -> dict[str, Any]:
    ok = clean and value is not None and (value <= bar.limit if bar.most else value >= bar.limit)
    value = None if value is None else float(f"{value:.4g}")
    return {"name": bar.name, "value": value, "unit": bar.unit, "bar": bar.limit, "ok": ok}


def line(name: str, result: Result) -> str:
    """One fault, for people."""
    wrong = f"  WRONG: {result.verdict.text}" if result.verdict.text else ""
    more = ", ".join(
        f"{key} {_short(value)}" for key, value in result.more.items() if key not in ("operations", "points", "cut")
    )
    return (
        f"{name:<5}{result.n:>6}{result.verdict.acked:>9}{result.verdict.unknown:>9}{result.verdict.lost:>6}"
        f"{result.verdict.doubled:>9}  {result.bound:<9}{more}{wrong}"
    )


def table(results: dict[str, Result], seed: int, settings: str) -> str:
    """All of it."""
    head = f"{'':<5}{'N':>6}{'acked':>9}{'unknown':>9}{'lost':>6}{'doubled':>9}  {'95 %':<9}"
    lines = [
        f"seed {seed}; {settings}",
        head,
        *(line(name, result) for name, result in results.items() if name in FAULTS),
        "",
    ]
    lines += [
        f"{row['name']:<28}{_short(row['value']):>10} {row['unit']:<11}bar {row['bar']:g}  "
        f"{'yes' if row['ok'] else 'NO'}"
        for row in rows(results)
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def longer(name: str, older: dict[str, Any], result: Result) -> bool:
    """What was measured earlier says more than this: it was done oftener than this was to be, and than is needed.

    Not more than a run that found something wrong.
    """
    return name in FULL and not result.verdict.text and result.asked < min(older["asked"], FULL[name])


def save(results: dict[str, Result], seed: int, folder: Path = RESULTS) -> list[str]:
    """Writes chaos-detail.json and, from it, chaos.json. The faults whose longer run of earlier stays are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    detail = folder / DETAIL
    older = json.loads(detail.read_text()) if detail.exists() else {}
    stays = [name for name, result in results.items() if name in older and longer(name, older[name], result)]
    older |= {
        name: {
            "what": FAULTS[name][0] if name in FAULTS else "",
            "n": result.n,
            "asked": result.asked,
            "trials": result.n if result.trials is None else result.trials,
            "seed": seed,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "commit": commit(),
            **{key: getattr(result.verdict, key) for key in KEPT},
            "bound_95": result.bound,
            **result.more,
        }
        for name, result in results.items()
        if name not in stays
    }
    detail.write_text(json.dumps(older, indent=1, default=str) + "\n")
    derive(folder)
    return stays


def commit() -> str:
    """The commit of the sources, with a + when they were changed since; "" where there is no git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("diff", "--name-only", "HEAD", "--", "anton", "sql", "migrations", "components", "chaos")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def derive(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Writes chaos.json from chaos-detail.json."""
    path = folder / "chaos.json"
    detail = json.loads((folder / DETAIL).read_text())
    found = rows(
        {
            name: Result(one["n"], Verdict(**{key: one[key] for key in KEPT}), one, one["asked"], one["trials"])
            for name, one in detail.items()
        }
    )
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found
