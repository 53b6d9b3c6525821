"""Parquet: rows of a Parquet file, a few at a time. pyarrow is used here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]


class Parquet:
    """An open Parquet file. names: its columns. Raises ValueError for what is none."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            self._file = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(str(error)) from None
        self.names: list[str] = list(self._file.schema_arrow.names)

    def rows(self, start: int, most: int) -> Iterator[list[dict[str, Any]]]:
        """Its rows from number `start` (from 0) on, in lists of at most `most`."""
        groups: list[int] = []
        skip = start
        for number in range(self._file.num_row_groups):
            n = self._file.metadata.row_group(number).num_rows
            if not groups and skip >= n:
                skip -= n
                continue
            groups.append(number)
        if not groups:
            return
        for batch in self._file.iter_batches(batch_size=most, row_groups=groups):
            if skip < batch.num_rows:
                yield batch.slice(skip).to_pylist()
            skip = max(0, skip - batch.num_rows)
