"""Check: what the history says against what the database holds, once everything is drained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psycopg

from chaos.history import Operation

OF_SRC = {"out_batch": "batch", "out_each": "each", "out_sql": "copy", "out_chain": "chain"}
OUTPUTS = {  # table -> (its source, the handler)
    "out_risky": ("risky", "risk"),
    "out_shaky": ("shaky", "shake"),
    "out_outside": ("outside", "call"),
    "out_load": ("load", "work"),
    "out_near": ("near", "pick_up"),
    "out_odd": ("odd", "bear"),
    "out_slow": ("slow", "block"),
    "out_drift": ("drift", "follow"),
    "out_drift_sql": ("drift", "follow_sql"),
    "out_kept": ("drift", "keep"),
    "out_clash": ("clash", "up"),
    "out_hold": ("gated", "hold"),
    "out_alone": ("gated", "alone"),
    "out_inorder": ("gated", "inorder"),
    "out_paced": ("paced", "pace"),
}


@dataclass
class Verdict:
    """What was wrong. lost, doubled, phantom: outputs, by table. text: all of it, "" when nothing was."""

    acked: int = 0
    unknown: int = 0
    lost: int = 0
    doubled: int = 0
    phantom: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """One line."""
        counted = [f"{name} {n}" for name in ("lost", "doubled", "phantom") if (n := getattr(self, name))]
        return ", ".join([*counted, *self.wrong])

    def compare(self, what: str, expected: Counter[Any], found: Counter[Any], maybe: set[Any] | None = None) -> None:
        """Counts what is missing, and what is there too often; `maybe` may be there once or not at all."""
        for key, n in (expected - found).items():
            if maybe is None or key not in maybe:
                self.lost += n
                self.wrong.append(f"{what}: {key} is missing")
        for key, n in (found - expected).items():
            if key in expected:
                self.doubled += n
            else:
                self.phantom += n
            self.wrong.append(f"{what}: {key} is there {found[key]} times")
        del self.wrong[12:]

    def require(self, holds: bool, text: str) -> None:
        """Notes what does not hold."""
        if not holds:
            self.wrong.append(text)


def check(
    conn: psycopg.Connection[Any], history: list[Operation], dead: dict[str, Counter[Any]] | None = None
) -> Verdict:
    """Compares all of it. dead: the dead letters that have to be there, by handler: keys that have no output."""
    verdict = Verdict()
    dead = dead or {}

    def column(query: str) -> Counter[Any]:
        rows = conn.execute(query).fetchall()
        return Counter(row[0] if len(row) == 1 else tuple(row) for row in rows)

    for operation in history:
        n = len(operation.rows)
        verdict.acked += n if operation.state == "ok" else 0
        verdict.unknown += n if operation.state in ("unknown", "begun") else 0
    present = {
        table: _present(verdict, table, history, column)
        for table in dict.fromkeys(("src", *(source for source, _ in OUTPUTS.values())))
    }
    for table in OF_SRC:
        verdict.compare(table, present["src"], column(f"select src from {table}"))
    for table, (source, handler) in OUTPUTS.items():
        verdict.compare(
            table, present[source] - dead.get(handler, Counter()), column(f"select src from {table}")
        )
    _upserts(verdict, history, column)
    counted = {int(id): int(n) for id, n in conn.execute("select id, n from counter").fetchall()}
    if counted[0] != (n := present["src"].total()):
        verdict.lost += max(0, n - counted[0])
        verdict.doubled += max(0, counted[0] - n)
        verdict.wrong.append(f"the counter is {counted[0]}, not {n}")
    inserted = conn.execute("select count(*), (select sum(n) from tally) from ups").fetchone()
    assert inserted is not None
    verdict.require(inserted[0] == inserted[1], f"tally is {inserted[1]}, not {inserted[0]}")
    _nothing_left(verdict, conn, dead)
    _receipts(verdict, conn, present)
    return verdict


def _present(verdict: Verdict, table: str, history: list[Operation], column: Any) -> Counter[Any]:
    """The keys that are in a table, after it was compared with what its producers were told."""
    found: Counter[Any] = column(f"select id from {table}")
    told = Counter[Any]()
    open_ = set[Any]()
    for operation in history:
        if operation.table != table:
            continue
        if operation.state != "fail":
            told.update(operation.rows)
        if operation.state in ("unknown", "begun"):
            open_.update(operation.rows)
            some = sum(key in found for key in operation.rows)
            verdict.require(some in (0, len(operation.rows)), f"{table}: half of operation {operation.number} is there")
    verdict.compare(f"acknowledged {table}", told, found, open_)
    return found


def _upserts(verdict: Verdict, history: list[Operation], column: Any) -> None:
    told = Counter[Any]()
    open_ = set[Any]()
    for operation in history:
        if operation.table == "ups" and operation.state != "fail":
            rows = [tuple(row) for row in operation.rows]
            told.update(rows)
            if operation.state != "ok":
                open_.update(rows)
    verdict.compare("out_ups", told, column("select src, v from out_ups"), open_)


def _nothing_left(verdict: Verdict, conn: psycopg.Connection[Any], dead: dict[str, Counter[Any]]) -> None:
    for table in ("job", "lease", "delayed"):
        n = conn.execute(f"select count(*) from anton.{table}").fetchone()
        verdict.require(n == (0,), f"{n and n[0]} rows are left in {table}")
    letters = Counter(
        (row[0], row[1][0])
        for row in conn.execute(
            "select h.name, d.key from anton.dead d join anton.handler h on h.id = d.handler_id"
        ).fetchall()
    )
    wanted = Counter({(handler, key): n for handler, keys in dead.items() for key, n in keys.items()})
    for (handler, key), n in ((letters - wanted) + (wanted - letters)).items():
        verdict.require(False, f"dead letters of {handler}: {key}, {n} more or fewer than there should be")


def _receipts(verdict: Verdict, conn: psycopg.Connection[Any], present: dict[str, Counter[Any]]) -> None:
    """Each handler's receipts name as many records as it was given, and as many outputs as there are."""
    rows = conn.execute(
        "select h.name, sum(r.n)::bigint from anton.receipt r join anton.handler h on h.id = r.handler_id group by 1"
    ).fetchall()
    settled = {str(name): int(n) for name, n in rows}
    for handler in OF_SRC.values():
        n = len(present["src"])
        verdict.require(settled.get(handler, 0) == n, f"receipts of {handler} say {settled.get(handler, 0)}, not {n}")
    for table in ("out_batch", "out_each", "out_ups"):
        row = conn.execute(
            f"select (select count(*) from {table}), (select coalesce(sum(cardinality(o.ids)), 0) from "
            "anton.output o join anton.watched w on w.id = o.table_id where w.table_name = %s)",
            (table,),
        ).fetchone()
        assert row is not None
        verdict.require(row[0] == row[1], f"{row[1]} outputs are noted for the {row[0]} rows of {table}")
