"""Plan: the steps between a database and what is declared, as migrate runs them and `--plan` prints them."""

from __future__ import annotations

from dataclasses import dataclass, field

from anton.errors import AntonError

LOCK_TIMEOUT = "200ms"                                                 # no waiter behind us waits longer


@dataclass(frozen=True)
class Step:
    """What is run at once.

    settings: SET LOCALs before the body. transaction: False for CREATE INDEX CONCURRENTLY and the like.
    """

    title: str
    body: str
    settings: tuple[str, ...] = ()
    transaction: bool = True

    @property
    def sql(self) -> str:
        """The step as it is sent, and as psql can run it."""
        lines = [f"set {'local ' if self.transaction else ''}{setting};" for setting in self.settings]
        body = self.body.rstrip().removesuffix(";") + ";"
        if self.transaction:
            return "\n".join((f"-- {self.title}", "begin;", *lines, body, "commit;"))
        return "\n".join((f"-- {self.title}", *lines, body, *(f"reset {s.partition(' ')[0]};" for s in self.settings)))


@dataclass
class Plan:
    """What migrate did, or would do.

    steps: in order. refused: differences it will not make, and declarations that cannot be. dba: SQL for a role
    that may run it. notes: what else one should know.
    """

    database: str
    steps: list[Step] = field(default_factory=list)
    refused: list[AntonError] = field(default_factory=list)
    dba: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def drift(self) -> bool:
        """True when the database is not what is declared: `migrate --check` exits 1."""
        return bool(self.steps or self.refused)

    @property
    def sql(self) -> str:
        """All steps as a script."""
        return "\n\n".join(step.sql for step in self.steps)
