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


class CallLog:
    """The calls of the model since a call of the handler began, for each thread in which a handler is called.

    A handler may call the model in threads of its own. Which call of the handler these belong to is not known, but that
    it is one of those that are going on.
    """

    def __init__(self) -> None:
        self._own = _Thread()
        self._lock = threading.Lock()
        self._open: set[int] = set()
        """The threads in which a call of the handler is going on."""
        self._elsewhere: list[ServedBatch] = []
        """What threads of the handler's computed meanwhile."""
        self._computing: set[int] = set()
        """The threads of the handler's that compute, or have failed since they began to."""
        self._n_begun = 0
        self._watcher: Callable[[Live], object] | None = None

    def begin(self, anytime: Sequence[bool] = (), rows_per_request: int | None = 1, *, alone: bool = True) -> None:
        """Forget what this thread computed before: a call of the handler begins.

        Args:
            anytime: for each request of the call, whether it asks for the scores of every exit.
            rows_per_request: how many rows of the model's input each of several requests becomes, in their order; None
                where that is not known.
            alone: whether no other call of the handler is going on. What threads of the handler's have begun before,
                and not ended, is forgotten then too.
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

        Where it is not known whose a row is, it does not ask.
        """
        own = self._own
        if len(own.anytime) == 1:
            return [*own.anytime] * n_rows
        asks = [asks for asks in own.anytime for _ in range(own.rows_per_request or 0)]
        first = sum(len(batch.answers.outputs) for batch in own.batches)
        return (asks[first:first + n_rows] + [False] * n_rows)[:n_rows]

    @contextmanager
    def watched(self, watcher: Callable[[Live], object]) -> Iterator[None]:
        """Show the (B, ...) inputs of each call of the model to a function, before they are computed: of calls in this
        thread, and in threads of the handler's while it is called here and nowhere else.

        What the function raises, the call of the model raises.
        """
        self._own.watcher = self._watcher = watcher
        try:
            yield
        finally:
            self._own.watcher = self._watcher = None

    def show(self, inputs: Live) -> None:
        """Let who watches see what the model is called with."""
        watcher = self._watcher if self._is_the_handlers() else self._own.watcher
        if watcher is not None:
            watcher(inputs)

    @property
    def is_computing(self) -> bool:
        """Whether a batch that the model accepted is being computed, or has failed since it was accepted: by a call
        of the model in this thread, or in one of the handler's own."""
        return self._own.is_computing or bool(self._computing)

    def computes(self) -> None:
        """Note that the model has accepted a batch."""
        self._own.is_computing, self._own.began = True, self._n_begun
        if self._is_the_handlers():
            with self._lock:
                self._computing.add(threading.get_ident())

    def ends(self) -> None:
        """Note that the model computes nothing in this thread."""
        self._own.is_computing = False
        with self._lock:
            self._computing.discard(threading.get_ident())

    def add(self, batch: ServedBatch) -> None:
        """Keep what a call of the model computed."""
        self.ends()
        here = threading.get_ident()
        if self._is_the_handlers():
            with self._lock:
                if self._own.began == self._n_begun:
                    self._elsewhere.append(batch)
        elif here in self._open or threading.current_thread() is threading.main_thread():
            self._own.batches.append(batch)

    def take(self) -> list[ServedBatch]:
        """Return this thread's calls since the last time, oldest first; the call of the handler has ended."""
        with self._lock:
            self._open.discard(threading.get_ident())
        batches, self._own.batches = self._own.batches, []
        return batches

    def take_elsewhere(self) -> list[ServedBatch]:
        """Return what threads of the handler's computed since the last time, in the order in which it ended."""
        with self._lock:
            taken, self._elsewhere = self._elsewhere, []
        return taken

    def _is_the_handlers(self) -> bool:
        """Tell whether this thread is one of the handler's own: another one is calling the handler."""
        return bool(self._open) and threading.get_ident() not in self._open


class _Thread(threading.local):
    """What is known of one thread that calls the model."""

    def __init__(self) -> None:
        self.anytime: Sequence[bool] = ()
        self.rows_per_request: int | None = None
        self.watcher: Callable[[Live], object] | None = None
        self.is_computing = False
        self.began = 0
        """How many calls of the handler had begun when this thread's last call of the model did."""
        self.batches: list[ServedBatch] = []
