"""Approval: whom to ask before a call is sent, and until when.

    finance = Approval("@finance", timeout="24h", editable=["amount"], when=lambda call: call.amount > 50)
    @action(approve=finance)

The question is a row of anton.approval; decide() in the database answers it, whichever channel the voice came by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from anton.app import current_app, place_of_caller
from anton.duration import duration
from anton.errors import BadOption, UnknownOption, did_you_mean, one_of

Length = str | float | timedelta
ON_TIMEOUT = ("reject", "approve")
CHANNELS = ("inbox", "email")
DAY = "24h"


class Approval:
    """Who is asked before a call is sent.

    who: "ann", "@finance", or several. via: the channels, "inbox", "slack:#finance", "email". timeout: how long they
    have; on_timeout: "reject" or, for what does no harm, "approve". editable: arguments that may be changed; None:
    all of them. quorum: how many different people have to approve. escalate: {"1h": "@cfo"}: who may decide it, too,
    after so long. remind: ["4h"]: when those who are told by e-mail or Slack are told again. when: is asked with the
    arguments; False: nobody need be asked. preview: what people read, with a {name} for each argument. Nobody approves
    what they asked for. Raises BadOption, UnknownOption.
    """

    def __init__(self, *who: str, via: Sequence[str] = ("inbox",), timeout: Length = DAY, on_timeout: str = "reject",
                 editable: Sequence[str] | None = None, quorum: int = 1, escalate: Mapping[str, str] | None = None,
                 remind: Sequence[str] = (), when: Callable[[Any], bool] | None = None, preview: str | None = None,
                 **unknown: Any) -> None:
        of = f"Approval({', '.join(map(repr, who))})"
        for option in unknown:
            raise UnknownOption(option, of, ("via", "timeout", "on_timeout", "editable", "quorum", "escalate", "remind",
                                             "when", "preview"))
        if not who or not all(isinstance(one, str) and one.strip("@") for one in who):
            raise BadOption("who", who, "Approval", 'people or groups: Approval("ann", "@finance")')
        if on_timeout not in ON_TIMEOUT:
            raise BadOption("on_timeout", on_timeout, of, one_of(ON_TIMEOUT))
        if type(quorum) is not int or quorum < 1:
            raise BadOption("quorum", quorum, of, "how many people, 1 or more")
        for option, names in (("via", via), ("editable", editable or ()), ("remind", remind)):
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise BadOption(option, names, of, f'a list of texts, such as {option}=["…"]')
        for channel in via:
            if channel not in CHANNELS and not re.fullmatch(r"slack:\S+", channel):
                raise BadOption("via", channel, of, f'{one_of(CHANNELS)}, or a channel of Slack: "slack:#finance"'
                                f"{did_you_mean(channel, CHANNELS)}")
        self.who = who
        self.via = tuple(via)
        self.timeout = duration(timeout, "timeout", of)
        self.on_timeout = on_timeout
        self.editable = None if editable is None else tuple(editable)
        self.quorum = quorum
        self.escalate = {duration(after, "escalate", of): to for after, to in (escalate or {}).items()}
        self.remind = [duration(after, "remind", of) for after in remind]
        self.when = when
        self.preview = preview
        self.place = place_of_caller()
        current_app().channels.update(self.via)

    def definition(self) -> dict[str, Any]:
        """What ask_approval() takes."""
        return {"approvers": list(self.who), "via": list(self.via), "timeout": _text(self.timeout),
                "on_timeout": self.on_timeout, "quorum": self.quorum, "preview": self.preview,
                "editable": None if self.editable is None else list(self.editable),
                "escalate": {_text(after): to for after, to in self.escalate.items()},
                "remind": [_text(after) for after in self.remind]}

    def __repr__(self) -> str:
        return f"Approval({', '.join(map(repr, self.who))})"


def _text(length: timedelta) -> str:
    return f"{length.total_seconds():f}".rstrip("0").rstrip(".") + " seconds"  # Postgres reads no exponent
