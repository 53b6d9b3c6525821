"""People: who decides, and how they come in. Rows of anton.person; the database says what each may.

    link(db, "ann", base)                    an address that signs ann in, once, for 15 minutes
    link(db, "ann", base, approval=7)        one that shows approval 7 to her and takes her decision, for that payload

Tokens have 256 bits. The database has their SHA-256 alone: whoever reads it, or a backup, comes in nowhere.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from datetime import timedelta

from anton.db import Database
from anton.errors import BadOption

SIGN_IN_FOR = timedelta(minutes=15)
DECIDE_FOR = timedelta(days=7)                                         # an approval's own timeout may end it sooner
SESSION_FOR = timedelta(hours=12)
_NAME = re.compile(r"[^@\s]\S*")


def digest(token: str) -> str:
    """What the database keeps of a token: its SHA-256, hex."""
    return hashlib.sha256(token.encode()).hexdigest()


async def put(db: Database, name: str, email: str | None = None, slack: str | None = None,
              groups: Sequence[str] | None = None) -> None:
    """Adds a person, or changes what is known of them; None leaves it. groups: all of theirs, with or without @.

    One word means one person: a name, an e-mail address or a Slack id, in any case. Raises BadOption for what cannot
    be, or is another's.
    """
    of = f'the person "{name}"'
    if not _NAME.fullmatch(name):
        raise BadOption("name", name, "a person", "a word that does not begin with @, such as ann")
    if email is not None and not re.fullmatch(r"[^@\s]+@[^@\s]+", email):
        raise BadOption("email", email, of, "an address, such as ann@example.com")
    words = None if groups is None else [group.removeprefix("@") for group in groups]
    for word in words or ():
        if not _NAME.fullmatch(word):
            raise BadOption("group", word, of, "a word, such as finance; * is in all groups")
    async with db.tx() as conn:
        await db.call(conn, "put_person", name, email, slack, words)


async def link(db: Database, person: str, base: str, *, approval: int | None = None,
               lasting: timedelta | None = None) -> str:
    """An address below `base` ("https://shop.example.com") that is good for one person and one use.

    It signs them in, or, with an approval, shows it and takes their decision on the arguments as they are now. Opening
    it uses and decides nothing; a POST from its page does. lasting: default 15 minutes, with an approval 7 days.
    Raises DecisionRefused for who is not known, or may not decide it.
    """
    token = secrets.token_urlsafe(32)
    async with db.tx() as conn:
        await db.call(conn, "make_link", person, digest(token),
                      lasting or (SIGN_IN_FOR if approval is None else DECIDE_FOR), approval)
    return f"{base.rstrip('/')}/inbox/{'in' if approval is None else 'link'}/{token}"


async def sign_in(db: Database, token: str) -> tuple[str, str] | None:
    """Uses a sign-in link: the person, and the token of their session. None where the link is of no use."""
    session = secrets.token_urlsafe(32)
    async with db.tx() as conn:
        person = await db.call_value(conn, "open_session", digest(token), digest(session), SESSION_FOR)
    return None if person is None else (person, session)


async def signed_in(db: Database, session: str | None) -> str | None:
    """Whose session it is."""
    if not session:
        return None
    async with db.conn() as conn:
        person: str | None = await db.call_value(conn, "session_person", digest(session))
        return person


async def sign_out(db: Database, session: str) -> None:
    """Ends a session."""
    async with db.tx() as conn:
        await db.call(conn, "end_session", digest(session))
