"""Stages and exits on a GPU: CUDA graphs, and decisions that are made beside the backbone.

A GPU that waits until the CPU has read a decision and launched what follows stands idle for about as long as a small
stage takes. So heads run on a stream of their own, and the next stage begins without waiting for the verdict, unless
more would be lost by running that stage for rows that leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from early_exit.handler.cuda_graphs import Graphed, Pool, padded, sizes_up_to
from early_exit.handler.policy import ConfidencePolicy
from early_exit.handler.stages import Exit, Live, Stage, Verdict, numbers_on, run_with_exits

_IDLE_S = 200e-6
"""For how long a GPU stands idle after a head, until the CPU has read the verdict, copied the rows that stay and
launched the next stage; measured on an H100."""
_LATEST = 0.1
"""Weight of the latest batch in the share of rows that leave."""


def graphed(stages: Sequence[Stage], device: torch.device) -> tuple[Stage, ...]:
    """Return stages that do the same in CUDA graphs on a GPU, torch's current one; elsewhere, the stages themselves.

    What travels between these stages and what heads say is overwritten when they run again; scores are not.
    """
    if device.type != "cuda":
        return tuple(stages)
    pool, lane = torch.cuda.graph_pool_handle(), _Lane()
    graphs: list[Graphed] = []
    for stage in stages:
        graphs.append(Graphed(stage.forward, pool, graphs[-1] if graphs else None))
    exits = [stage.exit and GraphedExit(
        stage.exit.head, stage.exit.policy, _copied(stage.exit.answer), stage.exit.shrink_from, here=here,
        following=following, lane=lane) for stage, (here, following) in zip(stages, pairwise(graphs))]
    return (*(GraphedStage(forward, exit_, graph=forward) for forward, exit_ in zip(graphs, exits)),
            GraphedStage(lambda *live: tuple(x.clone() for x in graphs[-1](*live)), graph=graphs[-1]))


def capture(stages: Sequence[Stage], inputs: Live, batch_size: int) -> None:
    """Let batches of up to that many rows find their graphs, if the stages have any.

    Args:
        stages: from `graphed`.
        inputs: like those to come, with one row.
        batch_size: the largest to come.
    """
    for size in sizes_up_to(batch_size) if isinstance(stages[0], GraphedStage) else ():
        batch = tuple(one.expand(size, *one.shape[1:]) for one in inputs)
        run_with_exits(batch, stages, shadow=torch.ones(size, dtype=torch.bool))


@dataclass(frozen=True, kw_only=True)
class GraphedStage(Stage):
    """A stage of graphs."""

    graph: Graphed
    """What `forward` runs."""

    def take(self, live: Live, places: list[int]) -> Live:
        targets = self.graph.places(len(places), live)
        if targets is None:
            return super().take(live, places)
        index = numbers_on(live[0].device, places)
        for x, target in zip(live, targets):
            _take_rows(x, index, target)
        return targets


@dataclass(frozen=True)
class _Lane:
    """Where heads run, one after the other."""

    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    pool: Pool = field(default_factory=torch.cuda.graph_pool_handle)


@dataclass
class _Recent:
    """What share of the rows were sure lately."""

    n: int = 0
    share: float = 1.0

    def add(self, sure: Sequence[bool]) -> None:
        self.n += 1
        self.share += max(_LATEST, 1 / self.n) * (sum(sure) / len(sure) - self.share)


@dataclass(frozen=True, kw_only=True)
class GraphedExit(Exit):
    """An exit whose head runs beside the next stage."""

    here: Graphed
    """The stage that hands on what the head reads."""
    following: Graphed
    lane: _Lane
    recent: _Recent = field(default_factory=_Recent, init=False)

    def ask(self, x: Tensor) -> Verdict:
        self._reached.record()
        self.lane.stream.wait_event(self._reached)
        with torch.cuda.stream(self.lane.stream):
            logits, *told = self._graph(x)
            sure = told[0] if told else self.policy(logits).to("cpu", non_blocking=True)
            self._said.record()
        return _Pending(logits, sure, self._said, self.recent)

    def goes_on(self, n_rows: int) -> bool:
        waits, lost = self._graph.seconds(n_rows) + _IDLE_S, self.recent.share * self.following.seconds(n_rows)
        return lost < waits and not self.following.writes_to_inputs

    def shrinks(self, n_rows: int, n_staying: int) -> bool:
        # A batch takes as long as the graph that it fits in.
        return super().shrinks(n_rows, n_staying) and padded(n_staying) < padded(n_rows)

    @cached_property
    def _graph(self) -> Graphed:
        # With the policy, if it always says the same of the same logits.
        is_pure = isinstance(self.policy, ConfidencePolicy)
        told: dict[int, Tensor] = {}

        def decide(x: Tensor) -> Live:
            logits = self.head(x)
            if not is_pure:
                return (logits,)
            if len(x) not in told:
                told[len(x)] = torch.empty(len(x), dtype=torch.bool, pin_memory=True)
            return logits, told[len(x)].copy_(self.policy(logits), non_blocking=True)

        return Graphed(decide, self.lane.pool, self.here)

    @cached_property
    def _reached(self) -> torch.cuda.Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    @cached_property
    def _said(self) -> torch.cuda.Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Pending(Verdict):
    """A verdict that may still be on its way from the GPU; its logits are there once it was heard."""

    def __init__(self, logits: Tensor, sure: Tensor, said: torch.cuda.Event, recent: _Recent) -> None:
        super().__init__(logits, sure)
        self._said, self._recent = said, recent

    def sure(self) -> list[bool]:
        self._said.synchronize()
        found = super().sure()
        self._recent.add(found)
        return found


def _copied(answer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda logits: answer(logits).clone()


def _take_rows(x: Tensor, index: Tensor, target: Tensor) -> None:
    """Copy rows of x to their place."""
    if x.dim() == 4 and x.stride(1) == 1:
        x, target = x.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1)
    if x.is_contiguous() and target.is_contiguous():
        torch.index_select(x.view(len(x), -1), 0, index, out=target.view(len(target), -1))
    else:
        target.copy_(x.index_select(0, index))
