"""The interface of the ways to run a batch: what each takes, what each gives, and what each must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from early_exit.handler.inference.forward import Answers, Live

Record = Callable[[int, Tensor], Tensor]
"""Takes the number of a stage and the (S, ...) activations of the shadow rows after it; returns the (S, ...) tensor
that is recorded of them."""


@dataclass(frozen=True)
class Execution:
    """What the run of one batch gave."""

    answers: Answers
    activations: Mapping[int, Tensor]
    """By number of the stage: what was recorded of the S shadow rows after it, (S, ...)."""
    level: int
    """The fallback level that answered the batch."""


class Executor(Protocol):
    """A way to run batches through the stages of a version at one of its fallback levels.

    Every executor keeps what `run_with_exits` keeps, whatever else it does with the rows:

    1. A row is answered by the first exit of the level that lets it leave, otherwise by the whole backbone.
    2. The answer of a row does not depend on the other rows of its batch, nor on whether it is a shadow row.
    3. Shadow rows and rows that ask for every exit run to the end: the former have the backbone's scores as their
       reference, the latter the scores of every exit.
    4. Rows, and everything that is told of them, are in the order of the batch.
    """

    def prepare(self, inputs: Live, batch_size: int) -> None:
        """Make ready for batches of up to that many rows, where there is something to make ready.

        Args:
            inputs: like those to come, with one row.
            batch_size: largest number of rows to come.
        """

    def run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        """Run a batch.

        Args:
            inputs: the backbone's (B, ...) inputs; B may be 0.
            level: the fallback level that answers.
            shadow: (B,) bool mask of the shadow rows, on the CPU.
            anytime: (B,) bool mask of the rows that ask for every exit, on the CPU; None where no row does.
        """
