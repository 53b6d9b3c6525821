"""Sent: a request as it was sent, and places in it.

    header:X-Id      one header, any case; one that is sent twice counts as missing
    query:challenge  a parameter of the URL
    body:a.b[].c     a field of the JSON body, or of a form (a name, no dots); [] means each element of a list
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import orjson

RawHeaders = Iterable[tuple[bytes, bytes]]
FORM = "application/x-www-form-urlencoded"
MAX_FIELDS = 1000  # of a form or a URL
_MISSING = object()


class Sent:
    """One request. url: as its sender addressed it. now: the database's time in Unix seconds."""

    def __init__(self, body: bytes, headers: RawHeaders, now: float = 0.0, method: str = "POST", url: str = "") -> None:
        self.body, self.now, self.method, self.url = body, now, method, url
        self.headers = headers if isinstance(headers, list) else list(headers)

    def header(self, name: bytes) -> bytes | None:
        """The header's value. name: in lower case. None: it is missing, or there more than once."""
        found = None
        for key, value in self.headers:
            if key == name or key.lower() == name:
                if found is not None:
                    return None
                found = value
        return found

    @cached_property
    def form(self) -> list[tuple[str, str]] | None:
        """The fields of a form in their order; None when the body is none."""
        if not is_form((self.header(b"content-type") or b"").decode("latin-1")):
            return None
        try:
            return parse_qsl(self.body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError:
            return None

    @cached_property
    def query(self) -> list[tuple[str, str]]:
        """The parameters of the URL."""
        try:
            return parse_qsl(urlsplit(self.url).query, keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError:
            return []

    @cached_property
    def fields(self) -> Any:
        """The body as JSON, or a form's fields as a dict (one sent twice is left out); None when it is neither."""
        if self.form is not None:
            return _once(self.form)
        try:
            return orjson.loads(self.body)
        except ValueError:
            return None

    def all(self, place: str) -> list[str]:
        """The values at a place as text; [] when there is none, or one of them is missing or no plain value."""
        where, _, name = place.partition(":")
        if where == "header":
            value = self.header(name.lower().encode())
            return [] if value is None else [value.decode("latin-1")]
        if where == "query":
            parameter = _once(self.query).get(name)
            return [] if parameter is None else [parameter]
        texts = [_text(value) for value in _walk(self.fields, name.split("."))]
        return [text for text in texts if text is not None] if None not in texts else []

    def one(self, place: str) -> str | None:
        """The only value at a place."""
        found = self.all(place)
        return found[0] if len(found) == 1 else None


def is_form(content_type: str) -> bool:
    """Whether a Content-Type says that the body is a form's fields. What signs and what reads it must agree on that."""
    return content_type.partition(";")[0].strip().lower() == FORM


def readable(headers: RawHeaders, hidden: Container[bytes] = ()) -> dict[str, str]:
    """Headers as text, by name as an ASGI server gives it: in lower case. hidden: names to leave out.

    What is sent more than once is joined by ", ".
    """
    shown = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers if name not in hidden]
    found = dict(shown)
    if len(found) < len(shown):
        found = {}
        for name, text in shown:
            found[name] = f"{found[name]}, {text}" if name in found else text
    return found


def _once(pairs: list[tuple[str, str]]) -> dict[str, str]:
    times = Counter(name for name, _ in pairs)
    return {name: value for name, value in pairs if times[name] == 1}


def _walk(value: Any, path: list[str]) -> list[Any]:
    """What is at the end of the path, once for each list element on its way; a hole in it gives _MISSING."""
    if not path:
        return [value]
    name, rest = path[0], path[1:]
    if each := name.endswith("[]"):
        name = name[:-2]
    if name:
        value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    if not each:
        return _walk(value, rest)
    return [found for item in value for found in _walk(item, rest)] if isinstance(value, list) else [_MISSING]


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) else None              # a float may have lost digits
