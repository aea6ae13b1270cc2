"""The shadow rows that records and monitor use: one row of each item, with a hash of the item's content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from early_exit.handler.call import Call
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.recording.content import UNKNOWN_CONTENT, ContentKey
from early_exit.handler.serving.isolation import Served

_Item = tuple[int, int]
"""The position of a request in its batch, and the number of an instance in the request. The number is 0 unless the
request has several instances."""


@dataclass
class ShadowItems:
    """The selected shadow rows of one call of the model."""

    batch: ServedBatch
    places: list[int]
    """The positions of the selected rows among the shadow rows."""
    items: list[_Item] | None
    """The item that each selected row belongs to; None if that is not known."""
    sampling_rate: list[float]
    """For each selected row, the probability with which its item was drawn."""

    def at(self, x: Tensor) -> Tensor:
        """Return the selected ones of (S, ...) shadow rows, without a copy if all are selected."""
        return x if self.places == [*range(len(x))] else x[torch.tensor(self.places, dtype=torch.int64)]


class ShadowSample:
    """The shadow sample of one call of the user's handler. Records and monitor use the same sample."""

    def __init__(self, served: Served, random: Random) -> None:
        """Draw one shadow row of each item, or select all shadow rows if their owners are not known."""
        self.served = served
        items = _items_of(served)
        drawn = _all_of(served) if items is None else _one_of_each(served, items, random)
        self.parts = [part for part in drawn if part.places]
        self._contents: dict[int, list[int]] = {}

    def calls(self, part: ShadowItems) -> list[tuple[Call, int]]:
        """Return the request of each item, and the number of the instance in it; empty if that is not known."""
        return [] if part.items is None else [(self.served.calls[position], number) for position, number in part.items]

    def contents(self, part: ShadowItems, key: ContentKey) -> list[int]:
        """Return the hash of each item's content, which is computed once.

        If a single request with several instances was served, and it is not known to which instance a row belongs, the
        hash is that of all its instances.

        Raises:
            RecordError, OSError: the key cannot be read or created.
        """
        if id(part) not in self._contents:
            known = self.calls(part)
            if known and not self.served.rows_per_item and known[0][0].instances is not None:
                found = [key.hash([*known[0][0].items])] * len(known)
            else:
                found = [key.hash(call.items[number]) for call, number in known]
            self._contents[id(part)] = found + [UNKNOWN_CONTENT] * (len(part.places) - len(known))
        return self._contents[id(part)]


class Sampling:
    """Draws the shadow sample of each call of the handler once, for all users of the sample."""

    def __init__(self, key: ContentKey) -> None:
        """Take the key with which contents are hashed."""
        self.key = key
        self._random = Random()
        self._last: ShadowSample | None = None

    def of(self, served: Served) -> ShadowSample:
        """Return the shadow sample of one call of the handler."""
        if self._last is None or self._last.served is not served:
            self._last = ShadowSample(served, self._random)
        return self._last


def _one_of_each(served: Served, items: Sequence[Sequence[_Item]], random: Random) -> list[ShadowItems]:
    # A random row and not the first one, because a record stands for its item: each row must be equally probable.
    shadow: dict[_Item, list[tuple[int, int]]] = {}
    for number, (batch, of_batch) in enumerate(zip(served.batches, items)):
        for place, row in enumerate(batch.answers.shadow.tolist()):
            shadow.setdefault(of_batch[row], []).append((number, place))
    n_rows = Counter(item for of_batch in items for item in of_batch)
    drawn = [ShadowItems(batch, [], [], []) for batch in served.batches]
    for item, rows in shadow.items():
        number, place = random.choice(rows)
        part = drawn[number]
        rate = part.batch.sampling_rate
        # One of an item's n rows is drawn with the probability 1 - (1 - rate)^n. Items with many rows would be recorded
        # more often than others, and the certificate would be about them instead of about all items.
        if random.random() * (1 - (1 - rate) ** n_rows[item]) < rate:
            part.places.append(place)
            part.items = [*(part.items or ()), item]
            part.sampling_rate.append(rate)
    return drawn


def _items_of(served: Served) -> Sequence[Sequence[_Item]] | None:
    """Return the item of each row of each call of the model, or None if that is not known."""
    if served.owners is None:
        return None
    if all(call.instances is None for call in served.calls):
        return [[(owner, 0) for owner in of_batch] for of_batch in served.owners]
    # All rows belong to one request. If there were instances of several requests, the owners would not be known.
    n_rows = [len(of_batch) for of_batch in served.owners]
    per_item = served.rows_per_item or 1
    return [[(0, row // per_item) for row in range(end - n, end)] for n, end in zip(n_rows, accumulate(n_rows))]


def _all_of(served: Served) -> list[ShadowItems]:
    sizes = [len(batch.answers.shadow) for batch in served.batches]
    return [ShadowItems(batch, [*range(n)], None, [batch.sampling_rate] * n) for batch, n in zip(served.batches, sizes)]
