"""The shadow rows that records and monitor use: those of a random sample of the requests, with hashes of contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
_Row = tuple[int, int]
"""The number of a call of the model, and the position of a row among the shadow rows of that call."""


@dataclass
class ShadowItems:
    """The selected shadow rows of one call of the model."""

    batch: ServedBatch
    places: list[int]
    """The positions of the selected rows among the shadow rows."""
    items: list[_Item] | None
    """The item that each selected row belongs to; None if that is not known."""
    sampling_rate: list[float]
    """For each selected row, the probability with which its request was drawn."""

    def at(self, x: Tensor) -> Tensor:
        """Return the selected ones of (S, ...) shadow rows, without a copy if all are selected."""
        return x if self.places == [*range(len(x))] else x[torch.tensor(self.places, dtype=torch.int64)]


class ShadowSample:
    """The shadow sample of one call of the user's handler. Records and monitor use the same sample of requests."""

    recorded: list[ShadowItems]
    """One shadow row of each item of the drawn requests; all shadow rows if their owners are not known."""
    watched: list[ShadowItems]
    """One shadow row of each drawn request, because its instances may be alike: each is no evidence of its own. If the
    owners of rows are not known, one row stands for all requests, because all rows may belong to one of them."""

    def __init__(self, served: Served, random: Random) -> None:
        """Draw the sample of a call."""
        self.served = served
        items = _items_of(served)
        if items is None:
            drawn = _one_of_all(served, random)
            self.recorded = _selected(served, ((row, None) for row in _shadow_rows(served)))
            self.watched = _selected(served, () if drawn is None else [(drawn, None)], len(served.calls))
        else:
            of_item, watched = _of_requests(served, items, random)
            self.recorded = _selected(served, ((row, item) for item, row in of_item.items()))
            self.watched = _selected(served, watched)
        self._contents: dict[_Item, int] = {}

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
        return [UNKNOWN_CONTENT] * len(part.places) if part.items is None else [
            self._content(item, key) for item in part.items]

    def _content(self, item: _Item, key: ContentKey) -> int:
        position, number = item
        call = self.served.calls[position]
        of_all = call.instances is not None and not self.served.rows_per_item
        known = (position, -1) if of_all else item
        if known not in self._contents:
            self._contents[known] = key.hash([*call.items] if of_all else call.items[number])
        return self._contents[known]


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


def _of_requests(served: Served, items: Sequence[Sequence[_Item]],
                 random: Random) -> tuple[dict[_Item, _Row], list[tuple[_Row, _Item]]]:
    """Draw requests at the sampling rate. Return a random shadow row of each of their items, and one of each request.

    A random row and not the first one, because a row stands for its item or request: each must be equally probable.
    """
    rows: dict[int, dict[_Item, list[_Row]]] = {}
    for number, (batch, of_batch) in enumerate(zip(served.batches, items)):
        for place, row in enumerate(batch.answers.shadow.tolist()):
            item = of_batch[row]
            rows.setdefault(item[0], {}).setdefault(item, []).append((number, place))
    n_rows = Counter(position for of_batch in items for position, _ in of_batch)
    recorded: dict[_Item, _Row] = {}
    watched: list[tuple[_Row, _Item]] = []
    for position, of_item in rows.items():
        drawn, item = random.choice([(row, item) for item, of_one in of_item.items() for row in of_one])
        if _is_drawn(n_rows[position], served.batches[drawn[0]].sampling_rate, random):
            recorded |= {one: random.choice(of_one) for one, of_one in of_item.items()}
            watched.append((drawn, item))
    return recorded, watched


def _one_of_all(served: Served, random: Random) -> _Row | None:
    """Return a random shadow row of all of a call, or None; the call is drawn at the sampling rate."""
    rows = [*_shadow_rows(served)]
    if not rows:
        return None
    drawn = random.choice(rows)
    n_rows = sum(len(batch.answers.outputs) for batch in served.batches)
    return drawn if _is_drawn(n_rows, served.batches[drawn[0]].sampling_rate, random) else None


def _is_drawn(n_rows: int, rate: float, random: Random) -> bool:
    """Draw from the requests with a shadow row, so that each request is drawn at the sampling rate.

    One of a request's n rows is a shadow row with the probability 1 - (1 - rate)^n. Requests with many rows would be
    recorded more often than others, and the certificate would be about them instead of about all requests.
    """
    return random.random() * (1 - (1 - rate) ** n_rows) < rate


def _shadow_rows(served: Served) -> Iterator[_Row]:
    for number, batch in enumerate(served.batches):
        for place in range(len(batch.answers.shadow)):
            yield number, place


def _selected(served: Served, rows: Iterable[tuple[_Row, _Item | None]], n_requests: int = 1) -> list[ShadowItems]:
    """Return the given rows by the calls of the model that they belong to; each stands for a number of requests."""
    parts: dict[int, ShadowItems] = {}
    for (number, place), item in rows:
        part = parts.setdefault(number, ShadowItems(served.batches[number], [], None, []))
        part.places.append(place)
        part.items = part.items if item is None else [*(part.items or ()), item]
        part.sampling_rate.append(part.batch.sampling_rate / n_requests)
    return [part for _, part in sorted(parts.items())]


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
