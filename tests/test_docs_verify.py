"""docs/verify.md says what verify.json holds. Run as a program this writes its table anew, as `make schema` does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from anton.scheme import Basic, Jwt, Scheme, Token
from anton.signed import Hmac, PublicKey, Signed
from anton.verify import DATA, SCHEMES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "verify.md"
BETWEEN = re.compile(r"(<!-- services:.*?-->\n).*?(<!-- /services -->)", re.S)


def how(scheme: Scheme) -> str:
    """How a service proves itself, in a few words."""
    if isinstance(scheme, Basic):
        return "user and password"
    if isinstance(scheme, Token):
        return f"token in {place(scheme.place)}"
    if isinstance(scheme, Jwt):
        covers = "with the hash of the body" if scheme.body_claim else "for our URL"
        return f"JWT {covers} in `{scheme.header}`"
    if not isinstance(scheme, Signed):
        return "HMAC-SHA256 of eight fields, in each notification"
    kind = f"HMAC-{scheme.algo.upper()}" if isinstance(scheme, Hmac) else scheme.algo
    signed = re.sub(r"\{body:([^}]+)\}", r"{\1}", scheme.signed)
    return f"{kind} of `{signed}` in {place(scheme.headers[0])}"


def place(text: str) -> str:
    where, _, name = text.partition(":")
    if not name:
        return f"`{text}`"
    if len(name) > 40:
        name = f"…{name.rpartition('.')[2]}"
    return f"`{name}`" + {"body": " of the body", "query": " of the URL"}.get(where, "")


def ids(scheme: Scheme) -> str:
    said = {"body": "hash of the body", "signed": "hash of what is signed"}
    shown = []
    for one in scheme.ids:
        parts = [said.get(part) or place(part) for part in one.split(" + ")]
        shown.append(" and ".join(parts))
    return ", else ".join(shown) or "–"


def asks(scheme: Scheme) -> str:
    return ", ".join(dict.fromkeys(
        shake.method + (", signed" if shake.signed else ", token" if shake.wants_token else "")
        for shake in scheme.handshakes)) or "–"


def time(scheme: Scheme) -> str:
    if isinstance(scheme, Jwt):
        return "its own"
    return f"{scheme.tolerance:g}" if isinstance(scheme, Signed) and scheme.timed else "–"


def table() -> str:
    entries: dict[str, dict[str, Any]] = json.loads(DATA.read_text())
    rows = ["| `verify=` | service | how | secret | time | id | handshake | sure |", "|" + "---|" * 8]
    for name, entry in entries.items():
        scheme = SCHEMES[name]
        notes = f"; {entry['notes']}" if "notes" in entry else ""
        rows.append(f"| `{name}` | {entry['name']} | {how(scheme)}{notes} | {entry['secret']} | {time(scheme)} "
                    f"| {ids(scheme)} | {asks(scheme)} | {entry['sure']} |")
    return "\n".join(rows) + "\n"


def test_the_table_is_that_of_the_data() -> None:
    assert BETWEEN.sub(lambda found: found[1] + table() + found[2], PAGE.read_text()) == PAGE.read_text(), "make schema"


def test_services_stand_in_order_and_each_says_what_people_need() -> None:
    entries: dict[str, dict[str, Any]] = json.loads(DATA.read_text())
    assert list(entries) == sorted(entries)
    for name, entry in entries.items():
        assert {"name", "sure", "secret", "scheme"} <= set(entry) and entry["sure"] in ("high", "medium", "low"), name
        assert re.fullmatch(r"[a-z0-9_]+", name)


def test_every_option_of_hmac_is_on_the_page() -> None:
    said = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text().split("## Hmac")[1].split("## Services")[0], flags=re.M))
    internal = {"handshakes", "accepted", "ports"}
    assert said == set(Hmac.__dataclass_fields__) - internal
    assert set(PublicKey.__dataclass_fields__) == set(Hmac.__dataclass_fields__)


if __name__ == "__main__":
    PAGE.write_text(BETWEEN.sub(lambda found: found[1] + table() + found[2], PAGE.read_text()))
