"""Vector: a column of pgvector's, for what an embedding makes.

    class Passage(BaseModel):
        id: int
        text: str
        embedding: Annotated[list[float], Vector(1536)]                # vector(1536)

    Table("passages", Passage, index=["embedding"])                    # HNSW, by cosine
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import orjson
from pydantic_core import core_schema

from anton.errors import BadOption

MOST = 16_000  # pgvector's


@dataclass(frozen=True)
class Vector:
    """Beside list[float] in Annotated: so many finite numbers. Needs the extension vector (pgvector)."""

    dimensions: int

    def __post_init__(self) -> None:
        if type(self.dimensions) is not int or not 1 <= self.dimensions <= MOST:
            raise BadOption("dimensions", self.dimensions, "Vector", f"a whole number from 1 to {MOST:,}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        checked = core_schema.no_info_after_validator_function(self._check, handler(source))
        return core_schema.no_info_before_validator_function(_read, checked)

    def _check(self, value: Sequence[float]) -> Sequence[float]:
        if len(value) != self.dimensions:
            raise ValueError(f"{len(value)} numbers, where {self.dimensions} belong")
        if not all(map(math.isfinite, value)):
            raise ValueError("a number that is not finite")
        return value


def vector_of(annotation: Any, metadata: Sequence[Any] = ()) -> Vector | None:
    """The Vector that a field's type says, also behind | None; None when it is none."""
    found = next((one for one in metadata if isinstance(one, Vector)), None)
    if found is None and get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return vector_of(inner, more)
    return found or next(filter(None, (vector_of(one) for one in get_args(annotation))), None)


def vector_text(value: Sequence[float] | str) -> str:
    """As pgvector reads it: [1,2,3]."""
    return value if isinstance(value, str) else f"[{','.join(map(repr, map(float, value)))}]"


def _read(value: Any) -> Any:
    """What Postgres shows of a column, as a list."""
    return orjson.loads(value) if isinstance(value, str) and value[:1] == "[" else value
