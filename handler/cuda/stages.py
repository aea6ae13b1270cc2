"""Stages and exits on a GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.handler.cuda.graphs import Graphed, padded, sizes_up_to
from early_exit.handler.inference.forward import Exit, Live, Stage, numbers_on, run_with_exits


def graphed(stages: Sequence[Stage], device: torch.device) -> tuple[Stage, ...]:
    """Return stages that run as CUDA graphs on torch's current GPU. If the device is not a GPU, return `stages`.

    When the stages run again, they overwrite the tensors that pass between them, but not logits and scores.
    """
    if device.type != "cuda":
        return tuple(stages)
    pool = torch.cuda.graph_pool_handle()
    graphs: list[Graphed] = []
    for stage in stages:
        graphs.append(Graphed(_dense(stage.forward), pool, graphs[-1] if graphs else None))
    *others, last = zip(stages, graphs)
    return (*(GraphedStage(graph, stage.exit and _graphed_exit(stage.exit, graph), graph=graph)
              for stage, graph in others),
            GraphedStage(lambda *live: tuple(x.clone() for x in last[1](*live)), graph=last[1]))


def _dense(forward: Callable[..., Live]) -> Callable[..., Live]:
    """Wrap the function of a stage so that its results can be copied row by row, 16 bytes at a time."""
    return lambda *live: tuple(x if _has_dense_rows(x) and x.data_ptr() % 16 == 0 else
                               x.clone(memory_format=torch.contiguous_format) for x in forward(*live))


def _has_dense_rows(x: Tensor) -> bool:
    """Tell whether rows follow each other in memory without gaps, whatever the order of the numbers within a row."""
    n_numbers = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:]) if size > 1):
        if stride != n_numbers:
            return False
        n_numbers *= size
    return len(x) <= 1 or x.stride(0) == n_numbers


def _graphed_exit(exit_: Exit, here: Graphed) -> Exit:
    head = exit_.head
    return GraphedExit(head, exit_.policy, exit_.answer, exit_.shrink_from,
                       graph=Graphed(lambda x: (head(x),), here.pool, here))


def capture_stages(stages: Sequence[Stage], inputs: Live, batch_size: int) -> None:
    """Capture the graphs of stages for batches of up to `batch_size` rows; do nothing if the stages are not graphs.

    Args:
        stages: the output of `graphed`.
        inputs: inputs like those to come, with one row.
        batch_size: the largest number of rows to come.
    """
    if not isinstance(stages[0], GraphedStage):
        return
    for size in reversed(sizes_up_to(batch_size)):  # the largest first, so that smaller ones can reuse its memory
        batch = tuple(x.expand(size, *x.shape[1:]) for x in inputs)
        run_with_exits(batch, stages, shadow=torch.ones(size, dtype=torch.bool))


@dataclass(frozen=True, kw_only=True)
class GraphedStage(Stage):
    """A stage that runs as CUDA graphs."""

    graph: Graphed
    """The graphs that `forward` runs."""

    def take(self, live: Live, places: list[int]) -> Live:
        captured = self.graph.captured(len(places), live)
        if captured is None:
            return super().take(live, places)
        index, targets = numbers_on(live[0].device, places), tuple(x[:len(places)] for x in captured.inputs)
        for x, target in zip(live, targets):
            _take_rows(x, index, target)
        return targets


@dataclass(frozen=True, kw_only=True)
class GraphedExit(Exit):
    """An exit whose head runs as CUDA graphs."""

    graph: Graphed

    def decide(self, x: Tensor) -> tuple[Tensor, list[bool]]:
        logits = self.graph(x)[0].clone()
        return logits, self.policy(logits).tolist()

    def shrinks(self, n_rows: int, n_staying: int) -> bool:
        # A batch takes as long as the smallest graph that holds it, so only a smaller graph saves time.
        return super().shrinks(n_rows, n_staying) and padded(n_staying) < padded(n_rows)


def _take_rows(x: Tensor, index: Tensor, target: Tensor) -> None:
    """Copy some rows of x to a target."""
    if x.dim() == 4 and x.stride(1) == 1:
        x, target = x.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1)
    if x.is_contiguous() and target.is_contiguous():
        torch.index_select(x.view(len(x), -1), 0, index, out=target.view(len(target), -1))
    else:
        target.copy_(x.index_select(0, index))
