"""An executor, around any other, that runs calls without exits if exits do not save time."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from early_exit.handler.inference.bypass import AdaptiveBypass
from early_exit.handler.inference.executor import Execution, Executor
from early_exit.handler.inference.forward import Live

_EPOCH = 32
"""The number of answers after which it is decided again whether new requests take the exits."""


class Bypass(Protocol):
    """Decides for each call whether it takes the exits."""

    def takes_exits(self, n_rows: int) -> bool:
        """Tell whether a call with this number of rows takes the exits."""

    def bypassed(self) -> dict[int, bool]:
        """Return whether exits are bypassed, by the largest of the batch sizes that are judged together."""


class EpochBypass:
    """A `Bypass` for calls that share stages, in which the cost of a single call is unknown.

    All requests of an epoch take the same way, and the cost of the epoch is measured as a whole. At its start, some
    requests of the epoch before have not been answered yet. They make the measured difference between the two ways
    smaller, but they do not reverse it.
    """

    def __init__(self, bypass: AdaptiveBypass) -> None:
        self._bypass = bypass
        self._begin()

    def takes_exits(self, n_rows: int) -> bool:
        """Tell whether requests that join now take the exits."""
        return self._takes_exits

    def bypassed(self) -> dict[int, bool]:
        """Return whether the exits are bypassed, by batch size; the only batch size is 1."""
        return self._bypass.bypassed()

    def ran(self, n_answered: int, seconds: float) -> None:
        """Note the time of a stage, with everything done around it, and the number of requests that it answered."""
        self._n += n_answered
        self._seconds += seconds
        if self._n >= _EPOCH:
            self._bypass.measured(1, self._seconds / self._n, with_exits=self._takes_exits)
            self._begin()

    def _begin(self) -> None:
        self._takes_exits = self._bypass.takes_exits(1)
        self._n, self._seconds = 0, 0.0


class BypassingExecutor:
    """Runs calls without exits if a `Bypass` says so; an `Executor` around another one."""

    def __init__(self, executor: Executor, bypass: Bypass, last_level: int) -> None:
        """Wrap an executor.

        Args:
            executor: runs the calls.
            bypass: decides for each call whether it takes the exits.
            last_level: the fallback level without exits.
        """
        self._executor, self._bypass, self._last_level = executor, bypass, last_level
        # A handler may call the model in several threads. Calls that share stages wait for each other anyway.
        self._one_at_a_time: AbstractContextManager[object] = (
            threading.Lock() if isinstance(bypass, AdaptiveBypass) else nullcontext())

    def prepare(self, inputs: Live, batch_size: int) -> None:
        self._executor.prepare(inputs, batch_size)

    def run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        with self._one_at_a_time:
            return self._run(inputs, level, shadow, anytime)

    def _run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None) -> Execution:
        # A batch in which a row asks for every exit needs the exits. It runs to the end, so it is not measured.
        if anytime is not None or level == self._last_level:
            return self._executor.run(inputs, level, shadow, anytime)
        with_exits, started = self._bypass.takes_exits(len(shadow)), time.perf_counter()
        execution = self._executor.run(inputs, level if with_exits else self._last_level, shadow)
        if isinstance(self._bypass, AdaptiveBypass):  # if calls share stages, the time of one call has no meaning
            if execution.answers.outputs.is_cuda:
                torch.cuda.synchronize(execution.answers.outputs.device)
            self._bypass.measured(len(shadow), time.perf_counter() - started, with_exits=with_exits)
        return execution
