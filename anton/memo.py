"""Memo: equal questions are asked once. The hash says what equal is; one process asks, all others get its answer.

Within a process who asks the same waits here; across processes in Postgres: begin_calls() in sql/80_call.sql.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import orjson

from anton.db import to_json
from anton.errors import WorldError


def hash_of(*parts: Any) -> str:
    """What is asked, as 64 characters. The order of keys in dicts counts for nothing."""
    plain = orjson.loads(to_json(list(parts)))
    return sha256(orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)).hexdigest()


_Ended = tuple[WorldError, bool] | None
_asking: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Future[_Ended]] = {}  # empty while nothing is asked


async def wait_for_other(hash: str, seconds: float, last: bool = True) -> bool:
    """Waits while this process asks the same, at most so long. Whether it did.

    last: as of asking(). Raises the WorldError that the other one ended with: one outage is waited for once, not by
    each who asks. One that had another model to go to gave up early, and speaks for its like alone.
    """
    other = _asking.get((asyncio.get_running_loop(), hash))
    if other is None:
        return False
    await asyncio.wait({other}, timeout=seconds)
    ended = other.result() if other.done() else None
    if ended is not None and (ended[1] or not last):
        world = WorldError(ended[0].message)
        world.after = ended[0].after
        raise world from ended[0]
    return True


@contextmanager
def asking(hash: str, last: bool = True) -> Iterator[None]:
    """While it is asked: others of this process wait. One at a time; see wait_for_other."""
    loop = asyncio.get_running_loop()
    if (loop, hash) in _asking:                                        # the same was begun anew, after its lease
        yield
        return
    done = _asking[loop, hash] = loop.create_future()
    ended: _Ended = None
    try:
        yield
    except WorldError as error:
        if type(error) is WorldError:                                  # a budget is one's own
            ended = error, last
        raise
    finally:
        del _asking[loop, hash]
        done.set_result(ended)
