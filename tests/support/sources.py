"""Pictures that requests are made of: dealt out first, and varied then.

Variants of one picture are nearly the same request. So a picture that heads learn from is in no part of the records
that chooses or certifies, and none that is recorded is measured with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TypeVar

import torch

from early_exit.handler.recording.format import COLUMNS, request_hash
from early_exit.training.data.dataset import Part, RecordedTraffic

Source = TypeVar("Source")
_TRAIN, _TUNE, _CERTIFY, _MEASURE = *Part, None
_DEAL = (_TRAIN, _MEASURE, _CERTIFY, _TRAIN, _TUNE, _MEASURE, _TRAIN, _CERTIFY, _MEASURE, _TRAIN,
         _TUNE, _MEASURE, _TRAIN, _CERTIFY, _MEASURE, _TRAIN, _TUNE, _CERTIFY, _MEASURE, _TRAIN)
"""Who gets each of twenty pictures, in turn, as neighbours may be alike: records 14 of them, as their parts' shares."""


def deal(sources: Sequence[Source]) -> dict[Part | None, list[Source]]:
    """Return the pictures that each part of the records shows, and under None those that are measured with.

    >>> deal(range(20))[None]
    [1, 5, 8, 11, 14, 18]
    """
    return {part: [source for number, source in enumerate(sources) if _DEAL[number % len(_DEAL)] is part]
            for part in (*Part, None)}


def recorded_parts(n_requests: int) -> list[Part]:
    """Return the part of the records that each of some requests shall be in: the first train, the last certify.

    Time tells the parts apart as well as the ids do.

    >>> [part.name for part in recorded_parts(10)].count("TUNE")
    2
    """
    ends = [round(n_requests * (part.value + part.share)) for part in Part]
    return [next(part for part, end in zip(Part, ends) if number < end) for number in range(n_requests)]


def ids_in(parts: Sequence[Part]) -> list[str]:
    """Return an id for each request, by whose hash it falls into a part of the records."""
    found: dict[Part, list[str]] = {part: [] for part in Part}
    for start in count(0, 1000):
        if all(len(found[part]) >= parts.count(part) for part in Part):
            break
        names = [f"request-{number}" for number in range(start, start + 1000)]
        for name, part in zip(names, parts_of(names)):
            found[part].append(name)
    names_in: dict[Part, Iterator[str]] = {part: iter(names) for part, names in found.items()}
    return [next(names_in[part]) for part in parts]


def parts_of(ids: Sequence[str]) -> list[Part]:
    """Return the parts of the records that requests of these ids fall into."""
    hashes = torch.tensor([request_hash(name) for name in ids])
    of_ids = RecordedTraffic(shards=(), sizes=(), rows=torch.arange(len(ids)), **dict.fromkeys(COLUMNS, hashes))
    return [list(Part)[number] for number in of_ids.part.tolist()]
