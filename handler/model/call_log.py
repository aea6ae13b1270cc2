"""What the model computed in a call of the user's handler, kept until the worker asks for it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from early_exit.handler.inference.forward import Answers


@dataclass(frozen=True)
class ServedBatch:
    """One call of the model: its answers and what is recorded of it."""

    answers: Answers
    """What was answered; the reference of the shadow rows is always that of the backbone in fp32."""
    activations: Mapping[str, Tensor]
    """By layer path: (S, ...) float16 pooled activations of the S shadow rows; empty where nothing is recorded."""
    time: float
    """Unix time in seconds."""
    level: int
    """The fallback level that answered."""
    sampling_rate: float
    """The probability with which each shadow row was drawn."""
    full_class: Tensor
    """(S,) int64: the class that the shadow rows would have on the engine that serves, had they run to the end."""


class CallLog(threading.local):
    """The calls of the model since a call of the handler began, for each thread that calls the model."""

    def __init__(self) -> None:
        self.anytime: Sequence[bool] = ()
        """For each request of the handler's call, whether it asks for the scores of every exit."""
        self.is_computing = False
        """Whether a batch that the model accepted is being computed, or has failed since it was accepted."""
        self._batches: list[ServedBatch] = []

    def begin(self, anytime: Sequence[bool] = ()) -> None:
        """Forget what this thread computed before: a call of the handler begins.

        Args:
            anytime: for each request of the call, whether it asks for the scores of every exit.
        """
        self.take()
        self.is_computing = False
        self.anytime = anytime

    def add(self, batch: ServedBatch) -> None:
        """Keep what a call of the model computed."""
        self._batches.append(batch)
        self.is_computing = False

    def take(self) -> list[ServedBatch]:
        """Return this thread's calls since the last time, oldest first."""
        batches, self._batches = self._batches, []
        return batches
