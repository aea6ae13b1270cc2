"""The interface of executors, which run batches: arguments, results, and the rules that every executor must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from early_exit.handler.inference.forward import Answers, Live

Record = Callable[[int, Tensor], Tensor]
"""Takes the number of a stage and the (S, ...) activations of the shadow rows after it, and returns the (S, ...) tensor
to record."""


@dataclass(frozen=True)
class Execution:
    """The results of running one batch."""

    answers: Answers
    activations: Mapping[int, Tensor]
    """For each number of a stage, the (S, ...) tensor that was recorded of the S shadow rows after it."""
    level: int
    """The fallback level that answered the batch."""


class Executor(Protocol):
    """A way to run batches through the stages of a version at one of its fallback levels.

    An executor may run the rows in any way, but it keeps the rules of `run_with_exits`:

    1. A row is answered by the first exit of the level that lets it leave. If no exit lets it leave, the whole backbone
       answers it.
    2. The answer of a row does not depend on the other rows of its batch, nor on whether it is a shadow row.
    3. Shadow rows and rows that ask for every exit run to the end. A shadow row gets the backbone's scores as its
       reference, and a row that asks for every exit gets the scores of every exit.
    4. Rows, and all results about them, are in the order of the batch.
    """

    def prepare(self, inputs: Live, batch_size: int) -> None:
        """Prepare for batches of up to `batch_size` rows, if the executor needs that.

        Args:
            inputs: inputs like those to come, with one row.
            batch_size: the largest number of rows to come.
        """

    def run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        """Run a batch.

        Args:
            inputs: the backbone's (B, ...) inputs; B may be 0.
            level: the fallback level that answers.
            shadow: (B,) bool mask of the shadow rows, on the CPU.
            anytime: (B,) bool mask of the rows that ask for every exit, on the CPU; None if no row does.
        """
