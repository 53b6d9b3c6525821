"""The tables of what the engine survives: the README's, of the bars; in docs/reliability.md one line for each fault.

    python -m chaos.page        # from chaos-detail.json: chaos.json, and the tables between the marks in both pages
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from chaos import every  # noqa: F401  (faults register themselves)
from chaos.cell import ROOT
from chaos.faults import FAULTS
from chaos.report import DETAIL, KEPT, RESULTS, derive

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
    ("SIGKILL of a sender of actions, at six points, with keys, with `probe=`, with neither", "outbox_kills", "",
     "outbox_doubled", "{outbox_wrong_effects:.0f} effects wrong; {outbox_unlisted:.0f} in doubt and not listed"),
    ("twelve bugs planted in the engine, one at a time", "", "", "", "{planted_caught:.0f} of 12 caught"),
)


def table(report: list[dict[str, Any]], detail: Mapping[str, Any]) -> str:
    """The figures in Markdown. The chance of a single failure stands beside each count without one, at 95 %; it counts
    independent trials, as the detail has them.
    """
    values = {row["name"]: math.nan if row["value"] is None else row["value"] for row in report}
    missed = {row["name"] for row in report if not row["ok"]}
    zero = {row["name"] for row in report if row["bar"] == 0}
    lines = ["| done to it | times | lost | doubled | chance of one, 95 % | measured |", "|---|---|---|---|---|---|"]
    for what, n, lost, doubled, more in LINES:
        if n and n not in values:                                      # not done yet
            continue
        cells = [f"{values[name]:,.0f}" if name else "" for name in (n, lost, doubled)]
        late = [name for name in missed if f"{{{name}" in more or name in (n, lost, doubled)]
        said = more.format_map(values) + "".join(f" **{name} missed**" for name in sorted(late))
        chance = "" if not n else "-" if zero.intersection(late) else detail[TIMES[n]]["bound_95"]
        lines.append(f"| {what} | {' | '.join(cells)} | {chance} | {said} |")
    return "\n".join(lines) + "\n"


TIMES = {  # how often, of which fault
    "kills": "P1", "restarts": "D1", "reply_lost": "D6", "webhook_kills": "H2", "zombies": "P3", "oom_kills": "P5",
    "outbox_kills": "outbox",
}
COUNTS = ("n", "trials", "acked", "unknown", "lost", "doubled")
MADE = ("date", "commit", "seed")
NOT_FIGURES = {*COUNTS, *MADE, *KEPT, "what", "asked", "bound_95", "points", "operations", "drain_s"}


def faults(detail: dict[str, Any]) -> str:
    """Each fault that was done, in Markdown: how often, when, what was lost, and what else was measured."""
    lines = ["| | N | independent | acknowledged | unknown | lost | doubled | chance of one, 95 % | measured | made |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for name, (what, _) in sorted(FAULTS.items()):
        if name in detail:
            one = detail[name]
            more = ", ".join(f"{key} {_figure(value)}" for key, value in one.items() if key not in NOT_FIGURES)
            wrong = "".join(f" **{text}**" for text in one["wrong"])
            counts = " | ".join(f"{one[key]:,}" for key in COUNTS)
            made = ", ".join(filter(None, (one["date"], one["commit"], f"seed {one['seed']}")))
            lines.append(f"| {name} {what} | {counts} | {one['bound_95']} | {more}{wrong} | {made} |")
    missing = sorted(FAULTS.keys() - detail.keys())
    return "\n".join(lines) + "\n" + (f"\nNot in here: {', '.join(missing)}.\n" if missing else "")


def _figure(value: Any) -> str:
    match value:
        case float():
            return f"{value:.3g}"
        case dict():
            return "(" + ", ".join(f"{key} {_figure(one)}" for key, one in value.items()) + ")"
        case list():
            return ", ".join(map(_figure, value))
    return str(value)


def filled(page: str, text: str) -> str:
    """A page with this between its marks."""
    return MARKS.sub(lambda found: found[1] + text + found[2], page)


if __name__ == "__main__":
    bars, detail = derive(), json.loads((RESULTS / DETAIL).read_text())
    tables = {"README.md": table(bars, detail), "docs/reliability.md": faults(detail)}
    for name, text in tables.items():
        page = ROOT / name
        page.write_text(filled(page.read_text(), text))
