"""Makes records of the shadow rows that are served."""

from __future__ import annotations

import logging
import math

import torch

from early_exit.handler.backbone.scores import predicted_class, predicts
from early_exit.handler.call import Call
from early_exit.handler.errors import RecordError
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.recording.format import ANONYMOUS, Records, request_hash
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.sample_request import content_types_in
from early_exit.handler.serving.isolation import Served
from early_exit.handler.serving.shadow_items import Sampling, ShadowItems, ShadowSample

logger = logging.getLogger(__name__)


class Recording:
    """Makes records of served shadow rows and offers them to the writer."""

    def __init__(self, model: EarlyExitModel, writer: RecordWriter, sampling: Sampling, *, keep_requests: bool) -> None:
        self._model, self._writer, self._sampling, self._keep_requests = model, writer, sampling, keep_requests
        self._refused_to_keep = False
        self._n_calls = 0
        """The number of requests that this worker has answered."""

    def note(self, served: Served) -> None:
        """Record one shadow row of each item of the drawn requests. If the owners of rows are not known, record all
        shadow rows without a request."""
        unexpected: Exception | None = None
        try:
            try:
                sample = self._sampling.of(served)
            except Exception as error:  # which requests would have been drawn is not known, so all count
                self._writer.drop(len(served.calls), error)
                raise
            for part in sample.recorded:
                try:
                    self._writer.offer(self._records(part, sample))
                except Exception as error:  # shards must tell of records that they lack, whatever the reason
                    self._writer.drop(len(part.places), error)
                    # The key for contents can be neither read nor created, or else it is a defect, or memory is short.
                    unexpected = unexpected if isinstance(error, (OSError, RecordError)) else error
        finally:
            self._n_calls += len(served.calls)
        if unexpected is not None:
            raise unexpected

    def _records(self, part: ShadowItems, sample: ShadowSample) -> Records:
        """Return the records of some items; all items of one call of the handler have the same time."""
        batch, served = part.batch, sample.served
        answers, rows = batch.answers, part.at(batch.answers.shadow)
        scores = self._model.assembly.description.scores
        reference = part.at(answers.reference).float()
        # All NaN if the backbone predicts no class, so that the writer recognizes such a record.
        log_probabilities = scores.log_probabilities(reference).masked_fill(
            ~predicts(reference)[:, None], math.nan).cpu()
        known = sample.calls(part)
        n_unknown = len(part.places) - len(known)
        kept = [self._kept(call, number) if served.rows_per_item or call.instances is None else b""
                for call, number in known] if self._keep_requests else []
        return Records(
            activations={path: part.at(activation) for path, activation in batch.activations.items()},
            log_probabilities=log_probabilities.half(),
            backbone_class=log_probabilities.argmax(dim=1).int(),
            full_class=part.at(batch.full_class).int().cpu(),
            answered_class=predicted_class(answers.outputs[rows]).int().cpu(),
            exit=answers.stages[rows].short().cpu(),
            request=torch.tensor([request_hash(call.id) for call, _ in known] + [ANONYMOUS] * n_unknown),
            row=torch.tensor([number for _, number in known] + [0] * n_unknown, dtype=torch.int32),
            content=torch.tensor(sample.contents(part, self._sampling.key)),
            sequence=self._n_calls + torch.tensor([position for position, _ in part.items or [(0, 0)] * n_unknown]),
            time=torch.full((len(part.places),), served.batches[0].time, dtype=torch.float64),
            sampling_rate=torch.tensor(part.sampling_rate),
            kept=kept + [b""] * n_unknown if self._keep_requests else None,
        )

    def _kept(self, call: Call, number: int) -> bytes:
        """Return an item of a request in the form of shards; empty if the item is not JSON with bytes."""
        try:
            return KeptRequest(call.items[number], content_types_in(call.headers)).to_bytes()
        except (TypeError, ValueError, RecursionError) as error:
            if not self._refused_to_keep:
                logger.warning("%s. Such requests are recorded without the handler's input, so they cannot be run "
                               "again", error)
            self._refused_to_keep = True
            return b""
