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
    "enqueue_per_s": ("enqueued/s in bulk", "{:,.0f}", False),
    "single_per_s": ("enqueued/s one by one", "{:,.0f}", False),
    "drain_per_s": ("drained/s", "{:,.0f}", False),
    "end_to_end_per_s": ("bulk and drained/s", "{:,.0f}", False),
    "pickup_p50_ms": ("pick-up p50 ms", "{:.1f}", True),
    "pickup_p99_ms": ("p99 ms", "{:.1f}", True),
}
KILL = {
    "recovery_s": ("recovered s", "{:.1f}", True),
    "lost": ("missing", "{:,}", True),
    "doubled": ("doubled", "{:,}", True),
}
WRITES = {  # the key in recovery: what is killed, and how a job writes
    "own": ("", "its own connection"),
    "commit": ("", "commits with the job: {commits}"),
    "child": (", its worker process only", "its own connection"),
}
SETTINGS = {"default": "as it comes", "tuned": "tuned"}


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown, the best of each column in bold, and what each peer was set to.

    Rows that only have rates are of another kind of work, and take no bold from those of one record a job; nor do
    rows of kills of only a part of a worker.
    """
    peers, wait = found["peers"], found["run"]["wait_s"]
    best = _best(COLUMNS, [peer for peer in peers if not peer.get("rates_only")])
    lines = [f"| | {' | '.join(title for title, _, _ in COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for peer in peers:
        cells = [_cell(COLUMNS, peer, key, {} if peer.get("rates_only") else best, wait) for key in COLUMNS]
        lines.append(f"| {peer['name']} {peer['version']} | {' | '.join(cells)} |")
    lines += ["", *_kills(peers, wait)]
    titles = ("", "jobs: bulk, one by one (processes)", "settings for speed", "enqueued in bulk by", "one by one by")
    lines += ["", *_head(titles)]
    for peer in peers:
        size = f"{peer['jobs']:,}, {peer['singles']:,} ({peer['processes']})" if "singles" in peer else ""
        words = (peer["name"], size, peer["settings"], peer.get("bulk", ""), peer.get("single", ""))
        lines.append(f"| {' | '.join(words)} |")
    titles = ("", "takes back the work of a dead worker, as it comes", "tuned")
    lines += ["", *_head(titles)]
    for peer in peers:
        if not peer.get("rates_only"):
            lines.append(f"| {peer['name']} | {peer.get('default', '')} | {peer.get('tuned') or '–'} |")
    lines += ["", _where(found["run"])]
    return "\n".join(lines) + "\n"


def _where(run: dict[str, Any]) -> str:
    """When, on what and with which versions this was measured."""
    pinned = f"; the versions were the newest on {run['pinned']}" if "pinned" in run else ""
    return f"Measured {run['at'][:10]} on Postgres {run['postgres']} with {run['cores']} cores{pinned}."


def _kills(peers: list[dict[str, Any]], wait: int) -> list[str]:
    """The table of kills: a row for each peer and way to write, the figures of each setting beside each other."""
    whole = [each for peer in peers for kind, each in peer.get("recovery", {}).items() if kind != "child"]
    best = {setting: _best(KILL, [each[setting] for each in whole if setting in each]) for setting in SETTINGS}
    groups = [f"{word}: {title}" for word in SETTINGS.values() for title, _, _ in KILL.values()]
    lines = _head(("kill -9 of", "a job's write", *groups))
    for peer in peers:
        if peer.get("rates_only"):
            continue
        for kind, (part, how) in WRITES.items():
            if each := peer.get("recovery", {}).get(kind):
                cells = [
                    _cell(KILL, each[setting], key, {} if kind == "child" else best[setting], wait)
                    if setting in each else "–"
                    for setting in SETTINGS for key in KILL
                ]  # fmt: skip
                lines.append(f"| {peer['name']}{part} | {how.format(**peer)} | {' | '.join(cells)} |")
        if "recovery" not in peer:
            lines.append(f"| {peer['name']} | {' | '.join(['failed' if 'error' in peer else '–'] * 7)} |")
    return lines


def _head(titles: tuple[str, ...]) -> list[str]:
    return [f"|{'|'.join(f' {title} ' for title in titles)}|", "|---" * len(titles) + "|"]


def _best(columns: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        key: (min if least else max)(known)
        for key, (_, _, least) in columns.items()
        if (known := [row[key] for row in rows if row.get(key) is not None])
    }


def _cell(columns: dict[str, Any], row: dict[str, Any], key: str, best: dict[str, float], wait: int) -> str:
    if key not in row:
        return "failed" if "error" in row else "–"
    if row[key] is None:
        return f"not in {wait}"
    text = str(columns[key][1]).format(row[key])
    if key in ("lost", "doubled"):
        text += f" of {row['jobs']:,}"
    return f"**{text}**" if row[key] == best.get(key) else text


def line(found: dict[str, Any]) -> str:
    """The result in words: Anton's one-record jobs against the best of the others."""
    anton, others = found["peers"][0], found["peers"][2:]

    def against(key: str, best: Callable[..., Any], text: str) -> str:
        other = best((peer for peer in others if peer.get(key) is not None), key=lambda peer: peer[key])
        return f"{text.format(anton[key])} ({other['name']}, the best of the others: {text.format(other[key])})"

    names = ", ".join(f"{peer['name']} {peer['version']}" for peer in others)
    rates = [f"drained {against('drain_per_s', max, '{:,}/s')}"]
    if "single_per_s" in anton:
        rates.append(f"enqueued one by one {against('single_per_s', max, '{:,}/s')}")
    rates.append(f"pick-up p99 {against('pickup_p99_ms', min, '{:.1f} ms')}")
    return (
        f"Side by side with {names}, jobs of one record each: {', '.join(rates)}. "
        f"{_killed(anton, others, found['run'])}Measured {found['run']['at'][:10]}. "
        f"[All figures and settings](docs/benchmarks.md#side-by-side); `make bench-peers`.\n"
    )


def _killed(anton: dict[str, Any], others: list[dict[str, Any]], run: dict[str, Any]) -> str:
    """What `kill -9` did, each peer with its tuned setting where it has one."""

    def of(peer: dict[str, Any], writes: str) -> str:
        each = peer["recovery"][writes]
        seen = each.get("tuned") or each["default"]
        within = f"not in {run['wait_s']}" if seen["recovery_s"] is None else f"{seen['recovery_s']:g}"
        return f"{peer['name']} {within} s, {seen['lost']:,} and {seen['doubled']:,} of {seen['jobs']:,}"

    if "recovery" not in anton:
        return ""
    own, commit = (
        "; ".join(of(peer, writes) for peer in [anton, *others] if writes in peer.get("recovery", {}))
        for writes in ("own", "commit")
    )
    return (
        f"`kill -9` of the worker, leases tuned to {anton['recovery']['own']['tuned']['lease_s']:g} s where that can "
        f"be: recovered in, jobs missing and doubled: {own}. Where the job's write commits with the job: {commit}. "
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
