"""Pages: how what the inbox shows becomes HTML: small templates in inbox_files/, each value escaped.

No page asks anything of another server, none runs a script of its own, and none is kept by a browser or a proxy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

FILES = Path(__file__).with_name("inbox_files")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src "
                               "'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store", "Referrer-Policy": "same-origin", "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "X-Robots-Tag": "noindex"}
KINDS = {"style.css": "text/css", "live.js": "text/javascript", "icon.svg": "image/svg+xml"}


def page(template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> Response:
    """A page of a template's."""
    text = _templates.get_template(template).render(**values)
    return HTMLResponse(text, status, {**HEADERS, **(headers or {})})


def redirect(to: str) -> Response:
    """On to another page of ours, which is asked for by GET."""
    return RedirectResponse(to, 303, HEADERS)


def asset(name: str) -> Response:
    """A file that pages need: a key of KINDS."""
    return FileResponse(FILES / name, media_type=KINDS[name],
                        headers={**HEADERS, "Cache-Control": "no-cache"})


def when(at: datetime | str | None) -> str:
    """ "2026-11-26 14:05 UTC". """
    if at is None:
        return ""
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def until(at: datetime | str | None, now: datetime) -> str:
    """ "3 h", "12 min", "2 days" from now; "" for never."""
    if at is None:
        return ""
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    minutes = abs((moment - now).total_seconds()) / 60
    if minutes < 1:
        return "a moment"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days"


def text(value: Any) -> str:
    """A JSON value on a line."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def parts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The fields of a record; those of what is nested by themselves: {"data": {"total": 5}} has a total."""
    found: list[tuple[str, Any]] = []
    for name, value in record.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        found += [(key if name == "data" else f"{name}.{key}", one) for key, one in inner] or [(name, value)]
    return found


def pairs(changed: Mapping[str, Sequence[Any]]) -> list[tuple[str, tuple[Any, Any]]]:
    """Fields that differ, with both values; of what is nested those inside of it."""
    found: list[tuple[str, tuple[Any, Any]]] = []
    for name, (old, new) in changed.items():
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            was, is_now = dict(parts({name: old})), dict(parts({name: new}))
            found += [(key, (was.get(key), is_now.get(key))) for key in {**was, **is_now}
                      if was.get(key) != is_now.get(key)]
        else:
            found.append((name, (old, new)))
    return found


_templates = Environment(loader=FileSystemLoader(FILES), autoescape=True, undefined=StrictUndefined,
                         trim_blocks=True, lstrip_blocks=True)
_templates.filters |= {"when": when, "until": until, "text": text, "parts": parts, "pairs": pairs,
                       "table": lambda name: name.removeprefix("public.")}
