"""Action: what an app does outside its database.

    live       effects are sent                                   anton work, anton serve, anton dev --live
    capture    an effect becomes a row of `action`, nothing more  anton dev
    offline    capture, and what only asks stays here too         tests, make demo

A captured effect is written in the transaction that settles its record, so each is there exactly once; live ones
leave a row with what came back. ANTON_EFFECTS=capture or offline holds a process back that would be live; it can
never let one loose.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from anton import write
from anton.app import current_app
from anton.errors import ConfigError, one_of
from anton.relation import describe

Effects = Literal["live", "capture", "offline"]
_ORDER: tuple[Effects, ...] = ("live", "capture", "offline")

_effects: Effects = "capture"


def set_effects(wanted: Effects) -> Effects:
    """What this process does with effects from now on; ANTON_EFFECTS can hold it back. Returns what it is."""
    global _effects
    limit = os.environ.get("ANTON_EFFECTS", "live")
    if limit not in _ORDER:
        raise ConfigError(f"ANTON_EFFECTS={limit!r} is not possible. Allowed: {one_of(_ORDER)}.", value=limit)
    _effects = _ORDER[max(_ORDER.index(wanted), _ORDER.index(limit))]
    return _effects


def effects() -> Effects:
    """What this process does with effects. Until someone says otherwise they are captured."""
    return _effects


async def perform(name: str, args: Mapping[str, Any], key: str, send: Callable[[], Awaitable[Any]]) -> Any:
    """Carries out one effect of the record at hand: sends it, or captures it; either way a row of `action` says so.

    name: of the action. args: what it is called with, JSON. key: the record's idempotency key. send: does it, and
    returns what came back as JSON; what it raises comes through. Returns that, or None when it was captured.
    """
    result, state = None, "captured"
    if _effects == "live":
        result, state = await send(), "sent"
    found = write.find_scope()
    assert found is not None
    scope, owner = found
    relation = await describe(scope.db, f"{scope.db.schema}.action")
    scope.add(write.Rows("insert", relation, ("app", "name", "args", "state", "result", "idempotency_key"),
                         [owner, (current_app().name, name, dict(args), state, result, key)]))
    return result
