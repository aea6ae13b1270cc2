"""Activations of many records in one file per layer, mapped and not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Activations:
    """The (N, ...) float16 activations of one layer; indexing reads the asked rows only."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        # Copy-on-write where nothing is written: torch wants memory that it could write to.
        self._rows = np.load(path, mmap_mode="r+" if writable else "c")

    @classmethod
    def create(cls, path: Path, n_rows: int, shape: Sequence[int],
               dtype: type[np.generic] = np.float16) -> Activations:
        """Make a file of zeros for N rows of a shape."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n_rows, *shape)).flush()
        return cls(path, writable=True)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self._rows[rows.numpy()])

    def write(self, start: int, values: Tensor) -> None:
        """Store (M, ...) values as the rows from `start` on."""
        self._rows[start:start + len(values)] = values.numpy()

    def flush(self) -> None:
        self._rows.flush()


class Selected:
    """Some rows of activations or of a tensor, as if they were all there are."""

    def __init__(self, rows: Activations | Tensor, selected: Tensor) -> None:
        self._rows, self._selected = rows, selected

    def __len__(self) -> int:
        return len(self._selected)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._rows[self._selected[rows]]
