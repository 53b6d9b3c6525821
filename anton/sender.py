"""Sender: carries calls out. The engine's queue brings it each call that may be sent; its body runs nowhere else.

    begin_action   the intent, committed              the database says: send, ask, stopped, capped, over, uncertain
    the body     with no transaction open
    end_action     what came of it, committed at once; what goes into= is written with the ack

A sender that finds a call begun by another one which did not come back does not send it again, unless the action is
"idempotent": it asks probe=, and what nobody can tell is unknown.
"""

from __future__ import annotations

import inspect
import logging
import random
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import orjson
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from anton.action import effects
from anton.calls import Call
from anton.ctx import Ctx
from anton.db import Database
from anton.errors import CapReached, DecisionRefused, Discard, Later, Retry, WorldError
from anton.fate import is_world, say, status_of
from anton.op import Call as Step
from anton.secret import has_secret
from anton.sink import reasons
from anton.threads import in_thread
from anton.write import owner, scope

if TYPE_CHECKING:
    from anton.outbox import Action

log = logging.getLogger("anton.worker")

_NEVER_LEFT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "InvalidURL",
               "LocalProtocolError", "ClientConnectorError", "SMTPConnectError", "SMTPAuthenticationError"}


class Sender:
    """The handler of one action's calls."""

    def __init__(self, action: Action) -> None:
        self.action = action

    async def __call__(self, call: Call, ctx: Ctx) -> None:
        """Sends one call, or sees to it that it is asked for, held back, or known to be over."""
        current = scope.get()
        assert current is not None
        db = current.db
        if call.state in ("sent", "captured"):
            self._into(db, call, call.result)                          # its sender ended between end_action and the ack
            return
        if call.state == "sending" and (call.error is not None or effects() != "live"):
            await self._look(db, call)                                 # it has no next attempt, or none from here
            return
        begun = ("new", "ready", "retrying", "failed", "sending")
        verdict = await self._judge(db, call) if call.state in begun else None
        if effects() != "live":
            await self._capture(db, call, verdict)
            return
        again, token = None, random.getrandbits(63)
        while True:
            row = (await _call(db, "begin_action", call.id, token, verdict, again, self.action.definition()))[0]
            if row["verdict"] == "over":
                if row["state"] in ("sent", "captured"):
                    self._into(db, call, row["result"])
                return
            if row["verdict"] == "ask":
                await self._ask(db, call, row["reason"])
                return
            if row["verdict"] == "stopped":
                raise WorldError("actions are stopped; to let them go on: anton actions start")
            if row["state"] == "due":
                await self._later(db, call)
            if row["verdict"] == "capped":
                raise CapReached(f"{self.action.name}: {row['reason']}", row["after"])
            if row["args"] != call.args:                               # edited, and approved so, since it was read
                call.args = row["args"]
                verdict = await self._judge(db, call)
            if row["verdict"] == "send":
                break
            if again is not None:                                      # it did not happen, and may not any more
                await self._end(db, call, again, "failed", None, row["reason"], False)
                return
            happened = await self._probe(db, call, row["held"], row["reason"])
            if happened is not False:
                return
            again = row["held"]
        if verdict is not None and verdict["verdict"] == "refuse":     # what it is now; the rest begin_action() refuses
            await self._end(db, call, token, "failed", None, verdict["why"] or "a policy refuses it", False)
            return
        await self._send(db, call, ctx, token)

    async def _send(self, db: Database, call: Call, ctx: Ctx, token: int) -> None:
        action = self.action
        last = ctx.attempt >= action.attempts
        try:
            returned = await action.run(call.args, call.idempotency_key)
        except Exception as raised:
            error = action.again(raised, ctx.attempt)
            if not did_not_happen(error) and action.effect == "unsafe":
                log.warning("worker: %s: call %s may have happened or not: %s", action.name, call.id, say(error))
                if action.probe is None:
                    await self._end(db, call, token, "unknown", None, say(error))
                    return
                if await self._probe(db, call, token) is not False:
                    return
                error = Retry(f"it did not happen: {say(error)}")
            refused = isinstance(error, Discard) or 400 <= status_of(error) < 500 and status_of(error) not in (408, 429)
            over = refused or (last and (isinstance(error, Retry) or not is_world(error)))
            # an unsafe one is here when it did not happen, or when probe= said so
            doubt = False if action.effect == "unsafe" else None if did_not_happen(error) else True
            before = call.in_doubt or call.state == "sending"
            if over and action.probe is not None and (doubt or doubt is None and before):
                if await self._probe(db, call, token, say(error)) is not False:
                    return
                doubt = False
            await self._end(db, call, token, "failed" if over else "retrying", None, say(error), doubt)
            if refused and not isinstance(error, Discard):
                raise Discard(say(error)) from error
            raise error from (None if error is raised else raised)
        result = to_jsonable_python(returned)
        if await self._end(db, call, token, "sent", result, None):
            self._into(db, call, returned)

    async def _end(self, db: Database, call: Call, token: int, state: str, result: Any, error: str | None,
                   doubt: bool | None = None) -> bool:
        async with db.tx() as conn:
            return bool(await db.call_value(conn, "end_action", call.id, token, state, result, error, doubt))

    async def _probe(self, db: Database, call: Call, token: int, held_back: str | None = None) -> bool | None:
        """Asks whether it happened. True: it did, and is settled; False: it did not; None: nobody can tell.

        held_back: why it may not be sent again.
        """
        probe = self.action.probe
        answer: Any = None
        why = "its sender did not come back, and whether it happened is not known"
        why += f"; it is not sent again: {held_back}" if held_back else ""
        if probe is not None:
            try:
                answer = await _run(probe, call)
            except Exception as error:
                if isinstance(error, WorldError) or did_not_happen(error):
                    raise
                why = f"probe: {say(error)}"
        if answer is None:
            await self._end(db, call, token, "unknown", None, why)
            return None
        if answer is False:
            return False
        if await self._end(db, call, token, "sent", to_jsonable_python(answer), None):
            self._into(db, call, answer)
        return True

    async def _look(self, db: Database, call: Call) -> None:
        """Ends a call that is not begun any more, and may have happened: as probe= says, else as unknown."""
        token, live = cast(int, call.token), effects() == "live"
        try:
            happened = await self._probe(db, call, token, call.error) if live else None
        except Exception as error:                                     # by the attempts, that there is an end to it
            raise Retry(f"probe: {say(error)}") from error
        if not live:
            await self._end(db, call, token, "unknown", None, "its sender did not come back, and nothing leaves here")
        elif happened is False:
            await self._end(db, call, token, "failed", None, f"it did not happen: {call.error}", False)

    async def _judge(self, db: Database, call: Call) -> dict[str, Any] | None:
        """What policy= and when= say of a call, as begin_action() takes it."""
        action = self.action
        try:
            args = action.model.model_validate(call.args)
        except ValidationError as error:                               # written by psql, or by a release before
            return {"verdict": "refuse", "by": "arguments", "why": "; ".join(reasons(error))}
        if has_secret(orjson.dumps([call.args, call.idempotency_key]).decode()):
            return {"verdict": "refuse", "by": "secret", "why": "a secret of this app is among its arguments"}
        if action.policy is not None and not isinstance(action.policy, str):
            if call.cause is not None and not call.taint and not call.taint_known:
                call.taint = await _value(db, "taint_of", call.cause)
            answer = await _run(action.policy, call)
            said, why = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
            word = {True: "pass", "send": "pass", "pass": "pass", "ask": "ask", False: "refuse",
                    "refuse": "refuse"}.get(said)
            if word is None:
                word, why = "refuse", f'the policy answered {said!r}. Allowed: "send", "ask" or "refuse"'
            if word == "ask" and action.approve is None and call.approve is None:
                word, why = "refuse", "the policy asks a person, and no approve= says whom"
            if word != "pass" or action.approve is None or action.approve.when is None:
                return {"verdict": word, "by": "policy", "why": why}
        if action.approve is not None and action.approve.when is not None:
            needed = await _run(action.approve.when, args)
            return {"verdict": "ask" if needed else "pass", "by": "when", "why": None}
        if action.approve is not None and action.policy is None:       # whatever somebody made of its action_rule
            return {"verdict": "ask", "by": "approve", "why": None}
        return None

    async def _ask(self, db: Database, call: Call, reason: str | None) -> None:
        asked = self.action.approve
        definition = {**(asked.definition() if asked else call.approve or {}), "reason": reason}
        try:
            async with db.tx() as conn:
                await db.call_value(conn, "ask_approval", call.id, definition)
        except DecisionRefused as error:
            if call.gate is not None and not (call.approve or {}).get("approvers"):
                raise                                                  # it asks nobody, whatever its action declares
            raise WorldError(f"{self.action.name}: the code of this process asks other people than what was migrated: "
                             f"{error}. Its calls wait for a process of that release, or for: anton migrate") from error

    async def _capture(self, db: Database, call: Call, verdict: dict[str, Any] | None) -> None:
        """Nothing leaves: what would be sent is captured, what has to be approved is asked for."""
        if call.state not in ("new", "ready", "retrying", "failed"):
            return
        what = await _value(db, "note_verdict", call.id, verdict)
        if what == "ask":
            await self._ask(db, call, (verdict or {}).get("why"))
        elif what == "due":
            await self._later(db, call)
        elif what == "capture" and await _value(db, "capture_action", call.id):
            self._into(db, call, None, captured=True)

    async def _later(self, db: Database, call: Call) -> None:
        """Raises Later until its time has come."""
        raise Later(await _value(db, "due_in", call.id) or timedelta(0))

    def _into(self, db: Database, call: Call, returned: Any, captured: bool = False) -> None:
        """Writes what a call gave, once, with the ack."""
        if not self.action.into or call.settled_at is not None:
            return
        rows = self.action.rows(call, returned, captured or call.state == "captured")
        current = scope.get()
        assert current is not None

        async def settle(conn: Any) -> bool:
            return bool(await db.call_value(conn, "settle_action", call.id))

        current.add(Step(f"call {call.id}", settle, owner.get()))
        self.action.emit(rows)


def did_not_happen(error: BaseException) -> bool:
    """True when an error says that nothing reached the other side, or that it refused: a call may be made again.

    Retry, Discard and WorldError, which the body raises; no connection to be had; an answer of 4xx.
    """
    if isinstance(error, (Retry, Discard, WorldError, ConnectionRefusedError, socket.gaierror)):
        return True
    if any(cls.__name__ in _NEVER_LEFT for cls in type(error).__mro__):
        return True
    if 400 <= status_of(error) < 500:
        return True
    cause = error.__cause__
    return cause is not None and cause is not error and isinstance(error, OSError) and did_not_happen(cause)


async def _run(fn: Callable[..., Any], *args: Any) -> Any:
    """The answer of a def, from a thread, or of an async def."""
    if inspect.iscoroutinefunction(fn):
        return await fn(*args)
    answer = await in_thread(fn, *args)
    return await answer if inspect.isawaitable(answer) else answer


async def _call(db: Database, function: str, *args: Any) -> list[Any]:
    async with db.tx() as conn:
        return list(await db.call(conn, function, *args))


async def _value(db: Database, function: str, *args: Any) -> Any:
    async with db.tx() as conn:
        return await db.call_value(conn, function, *args)


