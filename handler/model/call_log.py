"""A log of the calls of the model during a call of the user's handler. The log is kept until the worker takes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from early_exit.handler.backbone.scores import predicted_class
from early_exit.handler.exits.switch import Position
from early_exit.handler.inference.forward import Answers, Live


@dataclass(frozen=True)
class ServedBatch:
    """One call of the model: its answers, and the data for records."""

    answers: Answers
    """The answers; the reference of the shadow rows is always that of the backbone in fp32."""
    activations: Mapping[str, Tensor]
    """(S, ...) float16 pooled activations of the S shadow rows by layer path; empty if nothing is recorded."""
    time: float
    """Unix time in seconds."""
    level: int
    """The fallback level that answered."""
    sampling_rate: float
    """The probability with which each shadow row was drawn."""
    full_scores: Tensor
    """(S, K) scores that the serving engine computes for the shadow rows without exits."""
    switch: Position
    """The position of the operator's switch when the call began."""

    @property
    def full_class(self) -> Tensor:
        """(S,) int64: the class that `full_scores` predict for each shadow row, or `NO_CLASS`."""
        return predicted_class(self.full_scores)


class CallLog:
    """The calls of the model since a call of the handler began, for each thread in which a handler is called.

    A handler may also call the model in threads of its own. Such a call of the model belongs to one of the handler
    calls in progress, but it is not known to which of them.
    """

    def __init__(self) -> None:
        self._own = _Thread()
        self._lock = threading.Lock()
        self._open: set[int] = set()
        """The threads in which a call of the handler is in progress."""
        self._elsewhere: list[ServedBatch] = []
        """The calls of the model in the handler's own threads."""
        self._computing: set[int] = set()
        """The handler's own threads in which the model computes, or has failed since it began to compute."""
        self._n_begun = 0
        self._watcher: Callable[[Live], object] | None = None

    def begin(self, anytime: Sequence[bool] = (), rows_per_request: int | None = 1, *, alone: bool = True) -> None:
        """Begin a call of the handler, and forget earlier calls of the model in this thread.

        Args:
            anytime: for each request of the call, whether it asks for the scores of every exit.
            rows_per_request: the number of rows of the model's input that each of several requests becomes, in the
                order of the requests; None if that is not known.
            alone: whether no other call of the handler is in progress. If so, calls of the model that the handler's own
                threads have begun before are forgotten too, even if they have not ended.
        """
        self.take()
        own = self._own
        own.is_computing, own.anytime, own.rows_per_request = False, anytime, rows_per_request
        with self._lock:
            if not self._open:
                self._computing.clear()
            self._open.add(threading.get_ident())
            if alone:
                self._n_begun += 1
                self._elsewhere.clear()

    def anytime_rows(self, n_rows: int) -> list[bool]:
        """Return for each of the next rows of the model's input whether its request asks for the scores of every exit.

        If the request of a row is not known, the result for the row is False.
        """
        own = self._own
        if len(own.anytime) == 1:
            return [*own.anytime] * n_rows
        asks = [asks for asks in own.anytime for _ in range(own.rows_per_request or 0)]
        first = sum(len(batch.answers.outputs) for batch in own.batches)
        return (asks[first:first + n_rows] + [False] * n_rows)[:n_rows]

    @contextmanager
    def watched(self, watcher: Callable[[Live], object]) -> Iterator[None]:
        """Pass the (B, ...) inputs of each call of the model to a function before the model computes.

        This applies to calls in this thread, and to calls in the handler's own threads as long as the handler is called
        in this thread only. If the function raises an exception, the call of the model raises it.
        """
        self._own.watcher = self._watcher = watcher
        try:
            yield
        finally:
            self._own.watcher = self._watcher = None

    def show(self, inputs: Live) -> None:
        """Pass the inputs of a call of the model to the watching function, if there is one."""
        watcher = self._watcher if self._is_the_handlers() else self._own.watcher
        if watcher is not None:
            watcher(inputs)

    @property
    def is_computing(self) -> bool:
        """Whether a batch that the model has accepted is being computed or has failed, in this thread or in one of the
        handler's own threads."""
        return self._own.is_computing or bool(self._computing)

    def computes(self) -> None:
        """Note that the model has accepted a batch."""
        self._own.is_computing, self._own.began = True, self._n_begun
        if self._is_the_handlers():
            with self._lock:
                self._computing.add(threading.get_ident())

    def ends(self) -> None:
        """Note that the model does not compute in this thread any more."""
        self._own.is_computing = False
        with self._lock:
            self._computing.discard(threading.get_ident())

    def add(self, batch: ServedBatch) -> None:
        """Add a call of the model that has ended."""
        self.ends()
        here = threading.get_ident()
        if self._is_the_handlers():
            with self._lock:
                if self._own.began == self._n_begun:
                    self._elsewhere.append(batch)
        elif here in self._open or threading.current_thread() is threading.main_thread():
            self._own.batches.append(batch)

    def take(self) -> list[ServedBatch]:
        """End the call of the handler; return this thread's calls of the model since the last time, oldest first."""
        with self._lock:
            self._open.discard(threading.get_ident())
        batches, self._own.batches = self._own.batches, []
        return batches

    def take_elsewhere(self) -> list[ServedBatch]:
        """Return the calls in the handler's own threads since the last time, in the order in which they ended."""
        with self._lock:
            taken, self._elsewhere = self._elsewhere, []
        return taken

    def _is_the_handlers(self) -> bool:
        """Tell whether this is a thread of the handler itself: the handler is being called, but not in this thread."""
        return bool(self._open) and threading.get_ident() not in self._open


class _Thread(threading.local):
    """The state of one thread that calls the model."""

    def __init__(self) -> None:
        self.anytime: Sequence[bool] = ()
        self.rows_per_request: int | None = None
        self.watcher: Callable[[Live], object] | None = None
        self.is_computing = False
        self.began = 0
        """The number of handler calls that had begun when this thread's last call of the model began."""
        self.batches: list[ServedBatch] = []
