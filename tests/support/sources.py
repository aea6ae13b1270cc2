"""Pictures from which requests are made. They are first dealt out to the parts of the records, and then varied.

Variants of one picture are nearly the same request. So a picture that heads learn from is in no part of the records
that chooses or certifies, and no recorded picture is measured with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TypeVar

import torch

from early_exit.handler.recording.format import request_hash
from early_exit.training.data.split import Part, split_at_random

Source = TypeVar("Source")
_TRAIN, _TUNE, _CERTIFY, _MEASURE = *Part, None
_DEAL = (_TRAIN, _MEASURE, _CERTIFY, _TRAIN, _TUNE, _MEASURE, _TRAIN, _CERTIFY, _MEASURE, _TRAIN,
         _TUNE, _MEASURE, _TRAIN, _CERTIFY, _MEASURE, _TRAIN, _TUNE, _CERTIFY, _MEASURE, _TRAIN)
"""The part that gets each of twenty pictures. Parts take turns, as neighbours may be alike. The records get 14 pictures
in proportion to the shares of their parts."""


def deal(sources: Sequence[Source]) -> dict[Part | None, list[Source]]:
    """Return the pictures that each part of the records shows and, under None, those to measure with.

    >>> deal(range(20))[None]
    [1, 5, 8, 11, 14, 18]
    """
    return {part: [source for number, source in enumerate(sources) if _DEAL[number % len(_DEAL)] is part]
            for part in (*Part, None)}


def recorded_parts(n_requests: int) -> list[Part]:
    """Return, for each request, the part of the records that it belongs to: the first train, and the last certify.

    So the parts can be told apart by time as well as by ID.

    >>> [part.name for part in recorded_parts(10)].count("TUNE")
    2
    """
    ends = [round(n_requests * (part.value + part.share)) for part in Part]
    return [next(part for part, end in zip(Part, ends) if number < end) for number in range(n_requests)]


def ids_in(parts: Sequence[Part]) -> list[str]:
    """Return an ID for each request, whose hash puts the request into its part of the records."""
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
    """Return the parts of the records into which requests with these IDs fall."""
    hashes = torch.tensor([request_hash(name) for name in ids])
    split = split_at_random(hashes, torch.zeros(len(ids), dtype=torch.bool))
    return [list(Part)[number] for number in split.part.tolist()]
