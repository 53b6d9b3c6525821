"""Price: what a call of a model costs, from a table kept as data. A price that is not known is None, never 0.

    prices = Prices.load(Path("prices.json"))
    price = prices.find("gpt-5.4-mini-2026-03-17")     # of gpt-5.4-mini
    price.cost(1200, 300, cached=1000)                 # Decimal, US dollars
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import orjson

from anton.errors import BadOption

_DATED = re.compile(r"(?:[-@]\d{4}-?\d{2}-?\d{2}(?:-v\d+)?|-latest)$")
_MILLION = Decimal(1_000_000)
_KINDS = ("input", "cached", "cache_write", "output")

Tiers = tuple[tuple[int, Decimal], ...]  # (from so many input tokens, price of a million), rising


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens of each kind; cached and cache_write as input where the service has none."""

    input: Tiers
    output: Tiers
    cached: Tiers
    cache_write: Tiers
    version: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any], version: str = "given", owner: str = "price=") -> Price:
        """From {"input": 0.75, "output": "4.5", "cached": …}. Raises BadOption."""
        if not {"input", "output"} <= set(given) or set(given) - set(_KINDS):
            raise BadOption("price", given, owner, 'US dollars for a million tokens: {"input": "0.75", '
                            '"output": "4.5"}, and "cached", "cache_write" where they differ')
        try:
            tiers = {kind: _tiers(value) for kind, value in given.items()}
        except (InvalidOperation, TypeError, ValueError):
            tiers = {"": ((0, Decimal(-1)),)}
        if any(not (value.is_finite() and value >= 0) for steps in tiers.values() for _, value in steps):
            raise BadOption("price", given, owner, "numbers from 0: US dollars for a million tokens")
        return cls(tiers["input"], tiers["output"], tiers.get("cached", tiers["input"]),
                   tiers.get("cache_write", tiers["input"]), version)

    def cost(self, tokens_in: int, tokens_out: int, cached: int = 0, written: int = 0) -> Decimal:
        """US dollars. tokens_in includes cached and written ones."""
        paid = {"input": tokens_in - cached - written, "cached": cached, "cache_write": written, "output": tokens_out}
        return sum((_at(getattr(self, kind), tokens_in) * n for kind, n in paid.items()), Decimal(0)) / _MILLION

    def most(self, tokens_in: int, tokens_out: int) -> Decimal:
        """What so many tokens cost at most, whatever part of them is cached."""
        dearest = max(value for tiers in (self.input, self.cache_write, self.cached) for _, value in tiers)
        return (dearest * tokens_in + max(value for _, value in self.output) * tokens_out) / _MILLION


@dataclass(frozen=True)
class Prices:
    """Prices by the name of the model. version: of the table, kept with each call."""

    version: str = ""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Prices:
        """A table: {"version": "2026-11-25", "models": {"name": {"input": "0.75", "output": "4.5"}}}."""
        data = orjson.loads(file.read_bytes())
        return cls(data["version"], data["models"])

    def find(self, model: str) -> Price | None:
        """The price of a model, also under a dated name of it, or one tuned from it; None when it is not known."""
        given = self.models.get(model) or self.models.get(_DATED.sub("", model))
        if given is None and model.startswith("ft:"):
            base = max((name for name in self.models if name.startswith("ft:") and model.startswith(name)),
                       key=len, default="")
            given = self.models.get(base)
        if given is None or "output" not in given:
            return None
        return Price.of(given, self.version)


def _tiers(value: Any) -> Tiers:
    if isinstance(value, (list, tuple)):
        return tuple((int(start), Decimal(str(price))) for start, price in value)
    return ((0, Decimal(str(value))),)


def _at(tiers: Tiers, tokens_in: int) -> Decimal:
    return max((step for step in tiers if step[0] <= tokens_in), default=tiers[0])[1]
