"""Activations of many records, in one file per layer. Only the rows in use are in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from early_exit.handler.errors import RecordError
from early_exit.handler.files.private import open_private, private_folder

_ROWS_AT_ONCE = 4096
"""The number of rows that `finite_rows` has in memory."""


class Activations:
    """The (N, ...) activations of one layer, in a .npy file; indexing reads only the rows asked for.

    Rows are read, not mapped: mapped pages would count as memory of the process for as long as it runs.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Open a file.

        Raises:
            RecordError: the file is not a .npy file, or is truncated.
        """
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")  # reads nothing but the header
        except ValueError as error:
            raise RecordError(f"cannot read the activations {path}: {error}. Delete the run's folder and train "
                              "again") from error
        self._n_rows, self._row_shape, self._dtype = len(mapped), mapped.shape[1:], mapped.dtype
        self._offset, self._row_bytes = mapped.offset, prod(self._row_shape) * self._dtype.itemsize
        self._file = path.open("r+b" if writable else "rb")

    @classmethod
    def create(cls, path: Path, n_rows: int, shape: Sequence[int],
               dtype: type[np.generic] = np.float16) -> Activations:
        """Create a file of zeros for `n_rows` rows of a shape."""
        private_folder(path.parent)
        open_private(path, "w").close()  # NumPy would make it readable for others
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n_rows, *shape)).flush()
        return cls(path, writable=True)

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the (M, ...) rows with the (M,) indices.

        Raises:
            RecordError: the file is truncated.
        """
        wanted = rows.numpy()
        values = np.empty((len(wanted), *self._row_shape), self._dtype)
        target = values.data.cast("B") if values.size else memoryview(b"")
        starts = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
        for start, end in pairwise(starts):  # consecutive rows are read in one call
            if end > start:
                place = slice(start * self._row_bytes, end * self._row_bytes)
                at = self._offset + int(wanted[start]) * self._row_bytes
                if os.preadv(self._file.fileno(), [target[place]], at) < place.stop - place.start:
                    raise RecordError(f"{self._file.name} ends before row {int(wanted[end - 1])}: delete the run's "
                                      "folder and train again")
        return torch.from_numpy(values)

    def write(self, start: int, values: Tensor) -> None:
        """Store (M, ...) values as the rows from `start` on."""
        self._file.seek(self._offset + start * self._row_bytes)
        self._file.write(values.contiguous().numpy().astype(self._dtype, copy=False).tobytes())

    def finite_rows(self) -> Tensor:
        """Return a (N,) bool mask of the rows that are finite; values too large for float16 were stored as infinity."""
        starts = range(0, len(self), _ROWS_AT_ONCE)
        pieces = [self[torch.arange(start, min(start + _ROWS_AT_ONCE, len(self)))].flatten(1).isfinite().all(dim=1)
                  for start in starts]
        return torch.cat(pieces) if pieces else torch.ones(0, dtype=torch.bool)

    def flush(self) -> None:
        """Make sure that everything written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


class Selected:
    """A view of some rows of activations or of a tensor."""

    def __init__(self, rows: Activations | Tensor, selected: Tensor) -> None:
        self._rows, self._selected = rows, selected

    def __len__(self) -> int:
        return len(self._selected)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._rows[self._selected[rows]]
