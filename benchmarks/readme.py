"""The README's table of figures, from benchmarks/results/latest.json.

    python -m benchmarks.readme        # writes it between the marks in README.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
MARKS = re.compile(r"(<!-- bench: [^>]* -->\n).*?(<!-- /bench -->)", re.DOTALL)
LINES = {
    "1M records → Python batch handler → table, exactly once": ["python_batch_vs_floor"],
    "the same, Pydantic models in and out": ["python_typed_vs_floor"],
    "the same, one Python call per record": ["python_record_vs_floor"],
    "the same, SQL handler": ["sql_handler_vs_floor"],
    "against graphile-worker 0.17: batches; one-record jobs": ["python_batch_vs_graphile", "small_jobs_vs_graphile"],
    "single-row inserts with a subscriber, against bare; while it is drained": [
        "single_insert_vs_bare", "single_row_sustained"],
    "ten subscribers against one": ["fanout_10"],
    "UPDATE of 1M rows with images, time against bare": ["update_images_vs_bare"],
    "commit → handler starts: p50, p99": ["pickup_p50_ms", "pickup_p99_ms"],
    "p99 at half load; beside a long writer; polling": [
        "pickup_loaded_p99_ms", "pickup_long_writer_p99_ms", "pickup_polling_p99_ms"],
    "speed with 1M jobs queued; 500k blocked jobs ahead; a held snapshot": [
        "backlog_1m_jobs_ratio", "blocked_ahead_ratio", "old_xmin_ratio"],
    "1,000 handlers, one 1M deep: p99 of the others": ["fair_pickup_p99_ms"],
    "one poison record in 100k: time against clean": ["poison_ratio"],
    "idle worker: CPU; queries; memory": ["idle_cpu_percent", "idle_queries_per_s", "idle_rss_mb"],
    "memory: 1M records; 2,000 rows of 1 MB": ["peak_rss_mb", "wide_rows_rss_mb"],
    "a 5M-row CSV into a Table, against psql's \\copy; memory": ["csv_vs_copy", "csv_rss_mb"],
    "500,000 rows through Python, CSV and Parquet, against that; memory": [
        "csv_python_vs_copy", "parquet_vs_copy", "parquet_rss_mb"],
    "8 processes, a storm of kill -9, a limit of 10 at a time: records beyond it; used": [
        "limit_violations", "limit_used"],
    "a rate of 1,000/s over 4 processes: starts beyond it; used": ["rate_violations", "rate_used"],
    "a rate for each of 50 customers, its process killed twice: starts beyond it": ["rate_key_violations"],
    "200,000 records in order for each key, kills and retries: out of order": ["order_violations"],
    "in order, and a limit for each key, 10,000 keys, against neither": ["ordered_vs_unordered", "per_key_vs_none"],
    "a tenant with 1M records: p99 of the pick-up of another's": ["fair_tenant_p99_ms"],
    "without any of these, against the engine before them": ["flow_free_cost"],
    "10,000 hostile requests: failures": ["hostile_failures"],
    "200 approvals, 8 channels at once, and wrong ways: not exactly one decision": ["approval_wrong"],
    "a person approves → the call is sent: p99": ["approve_to_sent_p99_ms"],
    "injected instructions, a model that obeys: calls out of policy; its secret out": [
        "injection_out_of_policy", "injection_canary_out"],
    "10,000 completions, two processes, one killed twice: lost; doubled; paid again; the ledger's gap": [
        "llm_lost", "llm_doubled", "llm_repaid_over_inflight", "llm_ledger_gap"],
    "a limit of 50 requests/s: violations; used": ["llm_limit_violations", "llm_limit_used"],
    "a budget of 1 USD, eight processes; 1,000 equal questions": ["budget_spent_usd", "memo_calls"],
    "300 calls of 1 s in flight, against ideal; memory": ["llm_inflight_vs_ideal", "llm_rss_mb"],
    "400 days of schedules in 20 time zones: times missed; doubled": ["cron_missed", "cron_doubled"],
    "`import anton`; `anton dev` from cold to the first event": ["import_ms", "dev_cold_s"],
}


def table(report: list[dict[str, Any]]) -> str:
    """The figures in Markdown: what, as measured, bar, records/s and core where CPU time was counted."""
    rows = {row["name"]: row for row in report}
    lines = ["| what | measured | bar | records/s per core |", "|---|---|---|---|"]
    for what, names in LINES.items():
        if not all(name in rows for name in names):                    # not measured in full yet
            continue
        found = [rows[name] for name in names]
        cpu = [f"{1e6 / row['cpu_s_per_1m']:,.0f}" for row in found if row.get("cpu_s_per_1m")]
        lines.append(f"| {what} | {'; '.join(map(_value, found))} | {'; '.join(map(_bar, found))} | {'; '.join(cpu)} |")
    return "\n".join(lines) + "\n"


def _value(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    unit = {"ratio": "×"}.get(row["unit"], row["unit"])
    text = f"{row['value']:.3g} {unit}".replace(" ×", "×").replace(" %", "%").replace(" /s", "/s")
    return text if row["ok"] else f"**{text}, missed**"


def _bar(row: dict[str, Any]) -> str:
    return f"{'≥' if row['unit'] == 'ratio' and row['name'] not in _AT_MOST else '≤'} {row['bar']:g}"


_AT_MOST = ("update_images_vs_bare", "poison_ratio")


def filled(readme: str, report: list[dict[str, Any]]) -> str:
    """The README with these figures in it."""
    return MARKS.sub(lambda found: found[1] + table(report) + found[2], readme)


if __name__ == "__main__":
    page = REPO / "README.md"
    figures = json.loads((REPO / "benchmarks/results/latest.json").read_text())
    page.write_text(filled(page.read_text(), figures))
