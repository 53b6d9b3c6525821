"""The README's table of what the engine survives, from benchmarks/results/chaos.json.

    python -m chaos.page        # writes that from chaos-detail.json, and the table between the marks in README.md
"""

from __future__ import annotations

import re
from typing import Any

from chaos.cell import ROOT
from chaos.report import bound, derive

MARKS = re.compile(r"(<!-- chaos: [^>]* -->\n).*?(<!-- /chaos -->)", re.DOTALL)
LINES = (  # (what is done, how often, lost, doubled, what else was measured)
    ("SIGKILL of a worker with jobs in flight", "kills", "kill_lost", "kill_doubled",
     "redone {redo_p99_over_lease_s:.1f} s after the lease, p99"),
    ("Postgres stopped with `-m immediate`", "restarts", "restart_lost", "restart_doubled",
     "first ack {first_ack_p99_s:.1f} s after it is up, p99"),
    ("COMMIT carried out, its reply lost", "reply_lost", "reply_lost_lost", "reply_lost_doubled", ""),
    ("web process and Postgres killed in turn, webhooks coming in", "webhook_kills", "webhook_2xx_missing",
     "webhook_doubled", "of those told 2xx"),
    ("a zombie's ack after its lease went to another", "zombies", "", "zombie_doubled",
     "{zombie_refused_ratio:.0%} of them refused"),
    ("a record that kills its process, beside innocent ones", "oom_kills", "", "",
     "{oom_innocent_dead:.0f} innocent dead letters"),
    ("the world away for 60 s", "", "", "",
     "{outage_dead:.0f} dead letters; drained in {outage_drain_vs_ideal:.2f} × the ideal"),
    ("10,000 records/s offered to a handler that does 1,000, for 60 s", "", "", "",
     "goodput {overload_goodput:.2f}; another handler's pick-up p99 {overload_neighbour_ratio:.1f} × idle; "
     "memory grew by {overload_rss_mb:.1f} MB"),
    ("500,000 jobs under one held snapshot", "", "", "",
     "claim p99 of the last tenth {xmin_claim_p99_ratio:.2f} × that of the first"),
    ("twelve bugs planted in the engine, one at a time", "", "", "", "{planted_caught:.0f} of 12 caught"),
)


def table(report: list[dict[str, Any]]) -> str:
    """The figures in Markdown. The chance of a single failure stands beside each count without one, at 95 %."""
    values = {row["name"]: row["value"] for row in report}
    missed = {row["name"] for row in report if not row["ok"]}
    zero = {row["name"] for row in report if row["bar"] == 0}
    lines = ["| done to it | times | lost | doubled | chance of one, 95 % | measured |", "|---|---|---|---|---|---|"]
    for what, n, lost, doubled, more in LINES:
        times = int(values[n]) if n else 0
        cells = [f"{values[name]:,.0f}" if name else "" for name in (n, lost, doubled)]
        late = [name for name in missed if f"{{{name}" in more or name in (n, lost, doubled)]
        said = more.format_map(values) + "".join(f" **{name} missed**" for name in sorted(late))
        chance = bound(times, len(zero.intersection(late))) if times else ""
        lines.append(f"| {what} | {' | '.join(cells)} | {chance} | {said} |")
    return "\n".join(lines) + "\n"


def filled(readme: str, report: list[dict[str, Any]]) -> str:
    """The README with these figures in it."""
    return MARKS.sub(lambda found: found[1] + table(report) + found[2], readme)


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text(), derive()))
