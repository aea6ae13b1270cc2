"""True classes that the user has for some of the requests."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import request_hash


def load_labels(path: Path, request: Tensor, n_classes: int) -> Tensor:
    """Return the (N,) int64 class of each record, -1 where the file has none.

    Args:
        path: CSV lines 'request id,class index'; the id is what TorchServe returned as x-request-id.
        request: (N,) hashes of the records' request ids.
        n_classes: K.

    Raises:
        RecordError: the file cannot be read, a line is wrong, or no line belongs to a record.
    """
    labels: dict[int, int] = {}
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if not row or (number == 1 and row[-1].strip().lower() in ("label", "class")):
                    continue
                if len(row) != 2 or not row[1].strip().isdigit() or not int(row[1]) < n_classes:
                    raise RecordError(f"{path}, line {number}: expected 'request id,class' with a class below "
                                      f"{n_classes}, found {','.join(row)!r}")
                labels[request_hash(row[0].strip())] = int(row[1])
    except OSError as error:
        raise RecordError(f"cannot read the labels {path}: {error}") from error
    classes = torch.tensor([labels.get(hashed, -1) for hashed in request.tolist()])
    if not bool((classes >= 0).any()):
        raise RecordError(f"{path} has {len(labels)} labels, but none belongs to a record: the ids must be those that "
                          "TorchServe returned in the header x-request-id")
    return classes
