"""Rebuilt, Failed: what the handlers of a rebuilt table get instead of a record.

    @revenue.on_rebuilt
    def refreshed(rebuilt): ...        # or (rebuilt, ctx); one call a build, in order
    @revenue.on_failed
    def alarm(failed): ...

Both come from the database, where sql/72_dbt.sql writes them with the build itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A committed rebuild of a table.

    new, updated, deleted: records; None where nobody could tell: a view, or a table without a key.
    changed: whether any row differs, or its columns do; None when that is not known either.
    initial: there was nothing before, so no record is called new. full: it was made anew, not added to.
    schema_changed: columns came, went, or changed their type.
    run: dbt's invocation_id, None for what dbt did not build. unique_id: dbt's name of the model.
    materialized: "table", "view", "incremental", … xid: the transaction that committed it.
    """

    new: int | None = None
    updated: int | None = None
    deleted: int | None = None
    initial: bool = False
    full: bool = True
    schema_changed: bool = False
    run: str | None = None
    changed: bool | None = None
    unique_id: str | None = None
    materialized: str | None = None
    xid: int | None = None

    def __bool__(self) -> bool:
        """Whether anything changed, as far as is known."""
        return self.changed is not False


@dataclass(frozen=True, slots=True)
class Failed:
    """A rebuild that failed: the table is as it was. error: what was said; status: "error", "fail", "skipped", ….

    run: dbt's invocation_id. unique_id: dbt's name of the model.
    """

    error: str
    status: str = "error"
    run: str | None = None
    unique_id: str | None = None


EVENTS: dict[str, type[Rebuilt] | type[Failed]] = {"r": Rebuilt, "f": Failed}


def event_of(op: str, what: Mapping[str, Any]) -> Rebuilt | Failed:
    """What a job of op r or f is about, from the JSON it was noted as; unknown names are left out."""
    cls = EVENTS[op]
    values = {name: value for name, value in what.items() if name in cls.__dataclass_fields__}
    if values.get("xid") is not None:
        values["xid"] = int(values["xid"])
    return cls(**values)
