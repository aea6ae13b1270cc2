"""Which shadow rows stand for what was asked: one of each item, whose content is known by its hash."""

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
"""Position of a request in its batch, and which of its instances is meant; 0 unless it has several."""


@dataclass
class ShadowItems:
    """The shadow rows of one call of the model that stand for items."""

    batch: ServedBatch
    places: list[int]
    """Which of the shadow rows they are."""
    items: list[_Item] | None
    """The request that each of them belongs to, and which of its instances; None where that is not known."""
    sampling_rate: list[float]
    """The probability with which the request of each was drawn."""

    def at(self, x: Tensor) -> Tensor:
        """Return these of (S, ...) shadow rows, without a copy where these are all."""
        return x if self.places == [*range(len(x))] else x[torch.tensor(self.places, dtype=torch.int64)]


class ShadowSample:
    """What was sampled of one call of the user's handler, for all who look at it: records and monitor see the same."""

    def __init__(self, served: Served, random: Random) -> None:
        """Draw one shadow row of each item; where it is not known whose rows are, all of them stand for one."""
        self.served = served
        items = _items_of(served)
        drawn = _all_of(served) if items is None else _one_of_each(served, items, random)
        self.parts = [part for part in drawn if part.places]
        self._contents: dict[int, list[int]] = {}

    def calls(self, part: ShadowItems) -> list[tuple[Call, int]]:
        """Return the request of each item, and which of its instances; nothing where that is not known."""
        return [] if part.items is None else [(self.served.calls[position], number) for position, number in part.items]

    def contents(self, part: ShadowItems, key: ContentKey) -> list[int]:
        """Return the hash of what each item held, computed once.

        Where it is not known which of the instances of the one request that was served a row is of, it is the hash of
        all of them.

        Raises:
            RecordError, OSError: the key cannot be read or made.
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
    """Gives the sample of what was served to all who ask for it, and draws it once."""

    def __init__(self, key: ContentKey) -> None:
        """Take the key that contents are hashed with."""
        self.key = key
        self._random = Random()
        self._last: ShadowSample | None = None

    def of(self, served: Served) -> ShadowSample:
        """Return the sample of what one call of the handler served."""
        if self._last is None or self._last.served is not served:
            self._last = ShadowSample(served, self._random)
        return self._last


def _one_of_each(served: Served, items: Sequence[Sequence[_Item]], random: Random) -> list[ShadowItems]:
    # Not the first: training takes a record for an item, and each of its rows must be as likely to be the one.
    shadow: dict[_Item, list[tuple[int, int]]] = {}
    for number, (batch, of_batch) in enumerate(zip(served.batches, items)):
        for place, row in enumerate(batch.answers.shadow.tolist()):
            shadow.setdefault(of_batch[row], []).append((number, place))
    n_rows = Counter(item for of_batch in items for item in of_batch)
    drawn = [ShadowItems(batch, [], [], []) for batch in served.batches]
    for item, rows in shadow.items():
        number, place = random.choice(rows)
        part = drawn[number]
        part.places.append(place)
        part.items = [*(part.items or ()), item]
        part.sampling_rate.append(1 - (1 - part.batch.sampling_rate) ** n_rows[item])
    return drawn


def _items_of(served: Served) -> Sequence[Sequence[_Item]] | None:
    """Return whose each row of each call of the model is; None where that is not known."""
    if served.owners is None:
        return None
    if all(call.instances is None for call in served.calls):
        return [[(owner, 0) for owner in of_batch] for of_batch in served.owners]
    # All are of one request: of several with instances the owners are not known.
    n_rows = [len(of_batch) for of_batch in served.owners]
    per_item = served.rows_per_item or 1
    return [[(0, row // per_item) for row in range(end - n, end)] for n, end in zip(n_rows, accumulate(n_rows))]


def _all_of(served: Served) -> list[ShadowItems]:
    sizes = [len(batch.answers.shadow) for batch in served.batches]
    return [ShadowItems(batch, [*range(n)], None, [batch.sampling_rate] * n) for batch, n in zip(served.batches, sizes)]
