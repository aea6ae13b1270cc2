"""True classes that the user has for some of the requests."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.errors import ConfigError, RecordError
from early_exit.handler.recording.format import request_hash
from early_exit.training.text_files import read_text


def load_labels(path: Path, request: Tensor, n_classes: int,
                log: Callable[[str], None] = lambda line: None) -> Tensor:
    """Return the (N,) int64 class of each record, -1 where the file has none.

    Args:
        path: CSV lines 'request id,class index' in UTF-8; the id is what TorchServe returned as x-request-id.
        request: (N,) hashes of the records' request ids.
        n_classes: K.
        log: called with a line where most ids belong to no record.

    Raises:
        RecordError: the file cannot be read, a line is wrong or contradicts another, or no line belongs to a record.
    """
    labels: dict[int, int] = {}
    line_of: dict[int, int] = {}
    for number, row in _rows(path):
        label = row[1].strip() if len(row) == 2 else ""
        if not label.isdecimal() or not int(label) < n_classes:
            raise RecordError(f"{path}, line {number}: expected 'request id,class' with a class below "
                              f"{n_classes}, found {','.join(row)!r}")
        hashed = request_hash(row[0].strip())
        if labels.setdefault(hashed, int(label)) != int(label):
            raise RecordError(f"{path}, line {number}: the request {row[0].strip()!r} has the class {label}, but "
                              f"{labels[hashed]} in line {line_of[hashed]}: leave one of them")
        line_of.setdefault(hashed, number)
    classes = torch.tensor([labels.get(hashed, -1) for hashed in request.tolist()])
    n_known = len(labels.keys() & set(request.tolist()))
    if not n_known:
        raise RecordError(f"{path} has {len(labels)} labels, but none belongs to a record: the ids must be those that "
                          "TorchServe returned in the header x-request-id")
    if n_known < len(labels) / 2:
        log(f"{n_known} of the {len(labels)} requests in {path} belong to a record; the others were not recorded, or "
            "their ids are not those that TorchServe returned in the header x-request-id")
    return classes


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines of a CSV file that hold something, but for a header."""
    try:
        lines = read_text(path, "the labels").splitlines()
        for number, row in enumerate(csv.reader(lines), start=1):
            if row and not (number == 1 and row[-1].strip().lower() in ("label", "class")):
                yield number, row
    except (ConfigError, csv.Error) as error:
        raise RecordError(str(error) if isinstance(error, ConfigError) else
                          f"cannot read the labels {path}: {error}") from error
