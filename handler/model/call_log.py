"""What the model computed in a call of the user's handler, kept until the worker asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from early_exit.handler.exits.switch import Position
from early_exit.handler.inference.forward import Answers, Live


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
    switch: Position
    """What the operator's switch was set to when the call began."""


class CallLog(threading.local):
    """The calls of the model since a call of the handler began, for each thread that calls the model."""

    def __init__(self) -> None:
        self._anytime: Sequence[bool] = ()
        self._rows_per_request: int | None = None
        self._watcher: Callable[[Live], object] | None = None
        self.is_computing = False
        """Whether a batch that the model accepted is being computed, or has failed since it was accepted."""
        self._batches: list[ServedBatch] = []

    def begin(self, anytime: Sequence[bool] = (), rows_per_request: int | None = 1) -> None:
        """Forget what this thread computed before: a call of the handler begins.

        Args:
            anytime: for each request of the call, whether it asks for the scores of every exit.
            rows_per_request: how many rows of the model's input each of several requests becomes, in their order; None
                where that is not known.
        """
        self.take()
        self.is_computing = False
        self._anytime, self._rows_per_request = anytime, rows_per_request

    def anytime_rows(self, n_rows: int) -> list[bool]:
        """Return for each of the next rows of the model's input whether its request asks for the scores of every exit.

        Where it is not known whose a row is, it does not ask.
        """
        if len(self._anytime) == 1:
            return [*self._anytime] * n_rows
        asks = [asks for asks in self._anytime for _ in range(self._rows_per_request or 0)]
        first = sum(len(batch.answers.outputs) for batch in self._batches)
        return (asks[first:first + n_rows] + [False] * n_rows)[:n_rows]

    @contextmanager
    def watched(self, watcher: Callable[[Live], object]) -> Iterator[None]:
        """Show the (B, ...) inputs of each call of the model in this thread to a function, before they are computed.

        What the function raises, the call of the model raises.
        """
        self._watcher = watcher
        try:
            yield
        finally:
            self._watcher = None

    def show(self, inputs: Live) -> None:
        """Let who watches this thread see what the model is called with."""
        if self._watcher is not None:
            self._watcher(inputs)

    def add(self, batch: ServedBatch) -> None:
        """Keep what a call of the model computed."""
        self._batches.append(batch)
        self.is_computing = False

    def take(self) -> list[ServedBatch]:
        """Return this thread's calls since the last time, oldest first."""
        batches, self._batches = self._batches, []
        return batches
