"""The peers' tables in docs/benchmarks.md and their line in the README, from benchmarks/results/peers.json.

    python -m benchmarks.peers.report        # writes both between their marks
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent.parent
PATH = REPO / "benchmarks" / "results" / "peers.json"
MARKS = re.compile(r"(<!-- peers: [^>]* -->\n).*?(<!-- /peers -->)", re.DOTALL)
COLUMNS = {  # key: (title, how it is written, True where the least is best)
    "enqueue_per_s": ("enqueued/s", "{:,.0f}", False),
    "drain_per_s": ("drained/s", "{:,.0f}", False),
    "end_to_end_per_s": ("both/s", "{:,.0f}", False),
    "pickup_p50_ms": ("pick-up p50 ms", "{:.1f}", True),
    "pickup_p99_ms": ("p99 ms", "{:.1f}", True),
    "recovery_s": ("kill -9: recovered s", "{:.1f}", True),
    "lost": ("lost", "{:,}", True),
    "doubled": ("doubled", "{:,}", True),
}


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown, the best of each column in bold, and what each peer was set to.

    Rows that only have rates are of another kind of work, and take no bold from those of one record a job.
    """
    peers = found["peers"]
    best = {
        key: (min if least else max)(known)
        for key, (_, _, least) in COLUMNS.items()
        if (known := [peer[key] for peer in peers if peer.get(key) is not None and not peer.get("rates_only")])
    }
    lines = [f"| | {' | '.join(title for title, _, _ in COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for peer in peers:
        cells = [_cell(peer, key, best, found["run"]["wait_s"]) for key in COLUMNS]
        lines.append(f"| {peer['name']} {peer['version']} | {' | '.join(cells)} |")
    titles = ("", "jobs (processes)", "settings for speed", "what takes back the work of a dead worker")
    lines += ["", f"|{'|'.join(f' {title} ' for title in titles)}|", "|---|---|---|---|"]
    for peer in peers:
        size = f"{peer['jobs']:,} ({peer['processes']})" if "jobs" in peer else ""
        lines.append(f"| {peer['name']} | {size} | {peer['settings']} | {peer['recovers']} |")
    return "\n".join(lines) + "\n"


def _cell(peer: dict[str, Any], key: str, best: dict[str, float], wait: int) -> str:
    if key not in peer:
        return "failed" if "error" in peer else "–"
    if peer[key] is None:
        return f"not in {wait}"
    text = COLUMNS[key][1].format(peer[key])
    return f"**{text}**" if peer[key] == best.get(key) and not peer.get("rates_only") else text


def line(found: dict[str, Any]) -> str:
    """The result in words: Anton's one-record jobs against the best of the others."""
    anton, others = found["peers"][0], found["peers"][2:]

    def against(key: str, best: Callable[..., Any], text: str) -> str:
        other = best((peer for peer in others if peer.get(key) is not None), key=lambda peer: peer[key])
        return f"{text.format(anton[key])} ({other['name']}, the best of the others: {text.format(other[key])})"

    back = ", ".join(
        f"{peer['name']} in {peer['recovery_s']:g} s" for peer in others if peer.get("recovery_s") is not None
    )
    lost = ", ".join(f"{peer['name']} {peer['lost']:,}" for peer in others if peer.get("lost"))
    twice = ", ".join(f"{peer['name']} {peer['doubled']:,}" for peer in others if peer.get("doubled"))
    names = ", ".join(f"{peer['name']} {peer['version']}" for peer in others)
    within = f"more than {found['run']['wait_s']}" if anton["recovery_s"] is None else f"{anton['recovery_s']:g}"
    return (
        f"Side by side with {names}, jobs of one record each: drained "
        f"{against('drain_per_s', max, '{:,}/s')}, pick-up p99 {against('pickup_p99_ms', min, '{:.1f} ms')}. "
        f"After three `kill -9` of the worker Anton had done all within {within} s, "
        f"{anton['lost']} lost and {anton['doubled']} doubled; "
        f"of the others within {found['run']['wait_s']} s {back or 'none'}; "
        f"lost: {lost or 'none'}; doubled: {twice or 'none'}. Measured {found['run']['at'][:10]}. "
        f"[All figures and settings](docs/benchmarks.md#side-by-side); `make bench-peers`.\n"
    )


def filled(page: str, text: str) -> str:
    """The page with this text between its marks."""
    return MARKS.sub(lambda match: match[1] + text + match[2], page)


def write() -> None:
    found = json.loads(PATH.read_text())
    for name, text in (("docs/benchmarks.md", table(found)), ("README.md", line(found))):
        page = REPO / name
        page.write_text(filled(page.read_text(), text))


if __name__ == "__main__":
    write()
