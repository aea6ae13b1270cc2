"""True classes that the user has for some of the requests."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.errors import ConfigError, RecordError, TooFewRecordsError
from early_exit.handler.recording.format import request_hash
from early_exit.training.text_files import read_text


def load_labels(path: Path, request: Tensor, row: Tensor, n_classes: int,
                log: Callable[[str], None] = lambda line: None) -> Tensor:
    """Return the (N,) int64 class of each record, -1 where the file has none.

    Args:
        path: CSV lines 'request id,class index' in UTF-8; the id is the one that TorchServe returned as x-request-id.
            For a request with several instances, lines 'request id,instance,class index'; the first instance is 0.
        request: (N,) hashes of the records' request ids.
        row: (N,) which instance of its request each record is.
        n_classes: K.
        log: receives a line if most ids belong to no record.

    Raises:
        RecordError: the file cannot be read, a line is wrong or contradicts another, or it does not say which instance
            of its request it labels.
        TooFewRecordsError: no line belongs to a record.
    """
    labels: dict[tuple[int, int], int] = {}
    line_of: dict[tuple[int, int], int] = {}
    without_instance: dict[tuple[int, int], tuple[int, str]] = {}
    for number, fields in _rows(path):
        name, instance, label = _parsed(fields)
        if not (label.isdecimal() and instance.isdecimal() and int(label) < n_classes):
            raise RecordError(f"{path}, line {number}: expected 'request id,class', or 'request id,instance,class', "
                              f"with a class below {n_classes}, found {','.join(fields)!r}")
        labelled = request_hash(name), int(instance)
        if labels.setdefault(labelled, int(label)) != int(label):
            raise RecordError(f"{path}, line {number}: the request {name!r} has the class {label}, but "
                              f"{labels[labelled]} in line {line_of[labelled]}: delete the wrong line")
        line_of.setdefault(labelled, number)
        if len(fields) == 2:
            without_instance.setdefault(labelled, (number, name))
    recorded = list(zip(request.tolist(), row.tolist()))
    several = {one for one, instance in recorded if instance}
    for (one, _), (number, name) in without_instance.items():
        if one in several:
            raise RecordError(f"{path}, line {number}: the request {name!r} has several instances, and the line does "
                              "not say which of them has this class: write 'request id,instance,class', where the "
                              "first instance is 0")
    classes = torch.tensor([labels.get(record, -1) for record in recorded])
    n_known = len(labels.keys() & set(recorded))
    if not n_known:
        raise TooFewRecordsError(f"{path} has {len(labels)} labels, but none belongs to a record: the ids must be "
                                 "those that TorchServe returned in the header x-request-id")
    if n_known < len(labels) / 2:
        log(f"{n_known} of the {len(labels)} requests in {path} belong to a record; the others were not recorded, or "
            "their ids are not those that TorchServe returned in the header x-request-id")
    return classes


def _parsed(fields: list[str]) -> tuple[str, str, str]:
    """Return the request id, the instance (by default '0') and the class of a line; all are empty if it has neither two
    nor three fields."""
    if len(fields) not in (2, 3):
        return "", "", ""
    name, *instance, label = (field.strip() for field in fields)
    return name, instance[0] if instance else "0", label


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line numbers and fields of a CSV file, except for empty lines and a header."""
    try:
        lines = read_text(path, "the labels").splitlines()
        for number, row in enumerate(csv.reader(lines), start=1):
            if row and not (number == 1 and row[-1].strip().lower() in ("label", "class")):
                yield number, row
    except (ConfigError, csv.Error) as error:
        raise RecordError(str(error) if isinstance(error, ConfigError) else
                          f"cannot read the labels {path}: {error}") from error
