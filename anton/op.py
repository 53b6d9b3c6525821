"""Op: one recorded write, or a run of them, as apply.py makes it.

    Rows   inserts or upserts into one table
    Step   an update or a delete
    Call   a function of the runtime that belongs to the same transaction

Each belongs to an owner: the position of the input record that caused it, or WHOLE.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from anton.later import Due
from anton.relation import Relation

WHOLE = -1  # owner of what belongs to the batch as a whole


class Rows:
    """Rows to insert or upsert. flat: owner, row, owner, row, … (one list, so that threads may add to it).

    unless: columns with a unique index; a row whose values of them are there already is left out of an insert.
    due: when their events are due; None: at once.
    """

    __slots__ = ("columns", "due", "flat", "kind", "relation", "unless")

    def __init__(self, kind: Literal["insert", "upsert"], relation: Relation, columns: tuple[str, ...],
                 flat: list[Any] | None = None, unless: tuple[str, ...] = (), due: Due | None = None) -> None:
        self.kind = kind
        self.relation = relation
        self.columns = columns
        self.flat: list[Any] = [] if flat is None else flat
        self.unless = unless
        self.due = due

    @property
    def owners(self) -> list[int]:
        """One for each row."""
        return self.flat[0::2]

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """Values in the order of columns."""
        return self.flat[1::2]

    def __repr__(self) -> str:
        return f"Rows({self.kind} {len(self.flat) // 2} into {self.relation.name})"


@dataclass(frozen=True, slots=True)
class Form:
    """What steps on one row by its key have in common, so that many are made by one statement.

    sets: assignments with {} for each value; none: delete. types: of the values, then of the key columns.
    """

    sets: tuple[str, ...]
    types: tuple[str, ...]
    columns: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Step:
    """A recorded update or delete. args bind $1… of head and where.

    head: "update orders set …" or "delete from orders". where: a condition.
    key: of the one row it means, else None. version: the xmin that row had when it was read, None to write regardless.
    versions: of rows of this table read before, where the condition may mean several. form: when it can be made
    together with others; args are then the values and the key.
    """

    kind: Literal["update", "delete"]
    relation: Relation
    head: str
    where: str
    args: tuple[Any, ...]
    owner: int
    key: Any = None
    version: int | None = None
    versions: Mapping[Any, int] | None = None
    form: Form | None = None


@dataclass(slots=True, eq=False)
class Call:
    """What the runtime itself notes along with an owner's writes.

    work: makes it, on the transaction's connection; False when what the owner went by has changed, then it runs again.
    """

    name: str
    work: Callable[[Any], Awaitable[bool]]
    owner: int
    relation: None = None
    form: None = None


Op = Rows | Step | Call


@dataclass(slots=True, eq=False)
class Output:
    """What was written to one table: keys (ids, or lists of key columns), and the owner of each."""

    relation: Relation
    keys: list[Any] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


def pick(ops: Iterable[Op], owners: Collection[int], keep: bool = True) -> list[Op]:
    """The writes of these owners; with keep=False those of all others."""
    picked: list[Op] = []
    for op in ops:
        if not isinstance(op, Rows):
            if (op.owner in owners) == keep:
                picked.append(op)
            continue
        all_of_it = op.flat[:]                                         # a thread may be adding to it
        flat = [part for who, row in zip(all_of_it[0::2], all_of_it[1::2], strict=True) if (who in owners) == keep
                for part in (who, row)]
        if flat:
            picked.append(Rows(op.kind, op.relation, op.columns, flat, op.unless, op.due))
    return picked


def merge(parts: Iterable[tuple[int, Iterable[Op]]]) -> list[Op]:
    """Writes of several scopes as one list, each part under an owner of its own: (owner, scope.ops), …"""
    merged: list[Op] = []
    for who, ops in parts:
        for op in ops:
            if isinstance(op, Rows):
                flat = op.flat[:]
                flat[0::2] = [who] * (len(flat) // 2)
                merged.append(Rows(op.kind, op.relation, op.columns, flat, op.unless, op.due))
            else:
                merged.append(replace(op, owner=who))
    return merged
