"""Later: when the events of a write are due, where they are not due at once.

    orders.append(row, delay="1h")             the row is there now, and handled in an hour
    orders.append(row, at=datetime(…, tzinfo=UTC))
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from anton.db import Conn, Database
from anton.duration import duration
from anton.errors import BadOption


@dataclass(frozen=True)
class Due:
    """A length of time from when it is written, or a time. What has passed is due at once."""

    db: Database
    delay: timedelta | None
    at: datetime | None

    async def begin(self, conn: Conn) -> None:
        """What this transaction writes from now on is due then."""
        await self.db.call(conn, "put_due", self.delay, self.at)

    async def end(self, conn: Conn) -> None:
        """And from now on at once again."""
        await self.db.call(conn, "put_due", None, None)


def due_of(db: Database, delay: str | float | timedelta | None, at: datetime | None, of: str) -> Due | None:
    """What delay= and at= of a write to a table mean; None: at once. Raises BadOption."""
    if delay is None and at is None:
        return None
    if delay is not None and at is not None:
        raise BadOption("at", at, of, "delay= or at=, not both")
    if delay is not None:
        return Due(db, duration(delay, "delay", of), None)
    if not isinstance(at, datetime) or at.utcoffset() is None:
        raise BadOption("at", at, of, "an aware datetime, such as datetime.now(timezone.utc) + timedelta(hours=1)")
    return Due(db, None, at)
