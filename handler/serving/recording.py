"""What is recorded of what is served."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from early_exit.handler.call import Call
from early_exit.handler.errors import RecordError
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.format import ANONYMOUS, Records, request_hash
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.sample_request import content_types_in
from early_exit.handler.serving.isolation import Served

logger = logging.getLogger(__name__)

_Item = tuple[int, int]
"""Position of a request in its batch, and which of its instances is meant; 0 unless it has several."""


@dataclass
class _Recorded:
    """The shadow rows of one call of the model that are recorded."""

    batch: ServedBatch
    places: list[int]
    """Which of the shadow rows they are."""
    items: list[_Item] | None
    """The request that each of them belongs to, and which of its instances; None where that is not known."""
    sampling_rate: list[float]
    """The probability with which the request of each was drawn."""


class Recording:
    """Offers the shadow rows that were served to the writer of records."""

    def __init__(self, model: EarlyExitModel, writer: RecordWriter, *, keep_requests: bool) -> None:
        self._model, self._writer, self._keep_requests = model, writer, keep_requests
        self._random = Random()
        self._refused_to_keep = False
        self._n_calls = 0
        """The number of requests that this worker has answered."""

    def note(self, served: Served) -> None:
        """Record one shadow row of each item; where it is not known whose rows are, all of them, without request."""
        items = _items_of(served)
        recorded = _all_of(served) if items is None else self._one_of_each(served, items)
        for part in recorded:
            if part.places:
                try:
                    self._writer.offer(self._records(part, served))
                except (OSError, RecordError) as error:  # the key of the contents can neither be read nor made
                    self._writer.drop(len(part.places), error)
        self._n_calls += len(served.calls)

    def _one_of_each(self, served: Served, items: Sequence[Sequence[_Item]]) -> list[_Recorded]:
        # Not the first: training takes a record for an item, and each of its rows must be as likely to be the one.
        shadow: dict[_Item, list[tuple[int, int]]] = {}
        for number, (batch, of_batch) in enumerate(zip(served.batches, items)):
            for place, row in enumerate(batch.answers.shadow.tolist()):
                shadow.setdefault(of_batch[row], []).append((number, place))
        n_rows = Counter(item for of_batch in items for item in of_batch)
        recorded = [_Recorded(batch, [], [], []) for batch in served.batches]
        for item, rows in shadow.items():
            number, place = self._random.choice(rows)
            part = recorded[number]
            part.places.append(place)
            part.items = [*(part.items or ()), item]
            part.sampling_rate.append(1 - (1 - part.batch.sampling_rate) ** n_rows[item])
        return recorded

    def _records(self, recorded: _Recorded, served: Served) -> Records:
        """Return the records of some rows; all that one call of the handler served have one time."""
        batch, items, places = recorded.batch, recorded.items, recorded.places
        answers, rows = batch.answers, _at(places, batch.answers.shadow)
        scores = self._model.assembly.description.scores
        reference = _at(places, answers.reference).float()
        # NaN wherever a score is not finite: those of a backbone that says so are known by it.
        log_probabilities = torch.add(scores.log_probabilities(reference), reference, alpha=0).cpu()
        known = [] if items is None else [(served.calls[position], number) for position, number in items]
        n_unknown = len(places) - len(known)
        kept = [self._kept(call, number) if served.rows_per_item or call.instances is None else b""
                for call, number in known] if self._keep_requests else []
        return Records(
            activations={path: _at(places, activation) for path, activation in batch.activations.items()},
            log_probabilities=log_probabilities.half(),
            backbone_class=log_probabilities.argmax(dim=1).int(),
            full_class=_at(places, batch.full_class).int().cpu(),
            answered_class=answers.outputs[rows].argmax(dim=1).int().cpu(),
            exit=answers.stages[rows].short().cpu(),
            request=torch.tensor([request_hash(call.id) for call, _ in known] + [ANONYMOUS] * n_unknown),
            row=torch.tensor([number for _, number in known] + [0] * n_unknown, dtype=torch.int32),
            content=torch.tensor(self._contents(known, served) + [UNKNOWN_CONTENT] * n_unknown),
            sequence=self._n_calls + torch.tensor([position for position, _ in items or [(0, 0)] * n_unknown]),
            time=torch.full((len(places),), served.batches[0].time, dtype=torch.float64),
            sampling_rate=torch.tensor(recorded.sampling_rate),
            kept=kept + [b""] * n_unknown if self._keep_requests else None,
        )

    def _contents(self, known: Sequence[tuple[Call, int]], served: Served) -> list[int]:
        """Return the hash of each item of a request; where it is not known which of the instances of the one request
        that was served a row is of, that of all of them."""
        if known and not served.rows_per_item and known[0][0].instances is not None:
            return [self._writer.contents.hash([*known[0][0].items])] * len(known)
        return [self._writer.contents.hash(call.items[number]) for call, number in known]

    def _kept(self, call: Call, number: int) -> bytes:
        """Return an item of a request as shards hold it; nothing where it is no JSON with bytes."""
        try:
            return KeptRequest(call.items[number], content_types_in(call.headers)).to_bytes()
        except (TypeError, ValueError, RecursionError) as error:
            if not self._refused_to_keep:
                logger.warning("%s. Such requests are recorded without what the handler got, so they cannot be run "
                               "again", error)
            self._refused_to_keep = True
            return b""


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


def _all_of(served: Served) -> list[_Recorded]:
    sizes = [len(batch.answers.shadow) for batch in served.batches]
    return [_Recorded(batch, [*range(n)], None, [batch.sampling_rate] * n) for batch, n in zip(served.batches, sizes)]


def _at(places: list[int], x: Tensor) -> Tensor:
    """Return some rows of (S, ...), without a copy where these are all."""
    return x if places == [*range(len(x))] else x[places]
