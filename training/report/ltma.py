"""Live tensor memory allocations: the memory allocated for tensors while a model answers (section 4.4 of the paper)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from early_exit.handler.inference.forward import Live
from early_exit.training.report.scripted_model import ScriptedModel


class AllocationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations allocate inside the block, without views and in-place results.

    Workspaces inside an operation are not counted: they are not tensors of the model, and differ between libraries.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(given) for given in tree_leaves((args, kwargs)) if isinstance(given, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _storage(made) not in known:
                known.add(_storage(made))
                self.n_bytes += made.untyped_storage().nbytes()
        return result


def ltma(run: Callable[..., object], inputs: Live) -> int:
    """Return the bytes of all tensors from a batch to its answers: inputs, intermediate results and answers."""
    counter = AllocationCounter()
    with torch.no_grad(), counter:
        run(*inputs)
    return sum(item.nbytes for item in inputs) + counter.n_bytes


def expected_ltma(with_exits: ScriptedModel, exit_taken: Tensor) -> float:
    """Return the mean LTMA of a request that is served alone.

    Args:
        with_exits: the model with exits.
        exit_taken: (N,) position of the exit that each of N records takes, or -1.
    """
    total = 0.0
    for taken, count in Counter(exit_taken.tolist()).items():
        total += count * ltma(with_exits, with_exits.script(torch.tensor([taken])))
    return total / len(exit_taken)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
