"""Report: bars, the 95 % bound beside each zero, the table, and chaos.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.faults import FAULTS, Result

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


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
    Bar("xmin_claim_p99_ratio", "ratio", 2),
    Bar("planted_caught", "bugs", 12, most=False),
)


def values(results: dict[str, Result]) -> dict[str, float | None]:
    """What the bars compare, of the faults that were done."""
    found: dict[str, float | None] = {}

    def take(fault: str, **names: Any) -> None:
        if fault in results:
            found.update({name: get(results[fault]) for name, get in names.items()})

    take(
        "P1",
        kills=lambda r: r.n,
        kill_lost=lambda r: r.verdict.lost,
        kill_doubled=lambda r: r.verdict.doubled,
        redo_p99_over_lease_s=lambda r: r.more["redo_p99_s"] and r.more["redo_p99_s"] - 1.0,
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
    take("OUT", outage_dead=lambda r: r.more["dead"], outage_drain_vs_ideal=lambda r: r.more["ratio"])
    take(
        "L1", overload_goodput=lambda r: r.more["goodput"], overload_neighbour_ratio=lambda r: r.more["neighbour_ratio"]
    )
    take("D12", xmin_claim_p99_ratio=lambda r: r.more["ratio"])
    take("bugs", planted_caught=lambda r: r.n)
    return found


def rows(results: dict[str, Result]) -> list[dict[str, Any]]:
    """The rows of chaos.json."""
    found = values(results)
    out = []
    for bar in BARS:
        if bar.name in found:
            value = found[bar.name]
            ok = value is not None and (value <= bar.limit if bar.most else value >= bar.limit)
            out.append(
                {
                    "name": bar.name,
                    "value": None if value is None else float(f"{value:.4g}"),
                    "unit": bar.unit,
                    "bar": bar.limit,
                    "ok": ok,
                }
            )
    return out


def bound(n: int) -> str:
    """With no failure in n trials the chance of one is below this, at 95 %."""
    return f"< {300 / n:.2g} %" if n else "-"


def line(name: str, result: Result) -> str:
    """One fault, for people."""
    wrong = f"  WRONG: {result.verdict.text}" if result.verdict.text else ""
    more = ", ".join(
        f"{key} {_short(value)}" for key, value in result.more.items() if key not in ("operations", "points", "cut")
    )
    return (
        f"{name:<5}{result.n:>6}{result.verdict.acked:>9}{result.verdict.unknown:>9}{result.verdict.lost:>6}"
        f"{result.verdict.doubled:>9}  {bound(result.n):<9}{more}{wrong}"
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


def save(results: dict[str, Result], seed: int, folder: Path = RESULTS) -> None:
    """Writes chaos.json; rows measured earlier stay until they are measured again. chaos-detail.json has the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "chaos.json"
    kept = {row["name"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    kept |= {row["name"]: row for row in rows(results)}
    order = [bar.name for bar in BARS]
    file.write_text(json.dumps(sorted(kept.values(), key=lambda row: order.index(row["name"])), indent=1) + "\n")
    detail = folder / "chaos-detail.json"
    older = json.loads(detail.read_text()) if detail.exists() else {}
    older |= {
        name: {
            "what": FAULTS[name][0] if name in FAULTS else "",
            "n": result.n,
            "seed": seed,
            "acked": result.verdict.acked,
            "unknown": result.verdict.unknown,
            "lost": result.verdict.lost,
            "doubled": result.verdict.doubled,
            "wrong": result.verdict.wrong,
            "bound_95": bound(result.n),
            **result.more,
        }
        for name, result in results.items()
    }
    detail.write_text(json.dumps(older, indent=1, default=str) + "\n")
