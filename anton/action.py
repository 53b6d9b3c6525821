"""Action: what an app does outside its database.

    live       effects are sent                                   anton work, anton serve, anton dev --live
    capture    a call of an action is noted as captured           anton dev
    offline    capture, and what only asks stays here too         tests, make demo

How calls are made and sent: outbox.py, sender.py. ANTON_EFFECTS=capture or offline holds a process back that would be
live; it can never let one loose.
"""

from __future__ import annotations

import os
from typing import Literal

from anton.errors import ConfigError, one_of

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
