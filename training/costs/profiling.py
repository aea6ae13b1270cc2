"""Measures what the stages of a backbone and the exits between them cost on this machine."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.cuda.executor import plain_executor
from early_exit.handler.cuda.stages import capture_stages, graphed
from early_exit.handler.engines.registry import DEFAULT_ENGINE, engine_of
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.inference_head import InferenceHead
from early_exit.handler.exits.policy import policy_class
from early_exit.handler.inference.forward import Exit, Live, Stage, take_rows
from early_exit.training.costs.cost import Costs

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_ROUNDS = 15
_LEAST_ROUNDS = 3
_SECONDS_PER_SIZE = 4.0
_OTHERS = 2**22
"""The number of float32 values, 16 MB, that are written before an exit is timed. In service, the stages before the exit
write about as many, which displace the weights of the exit head from the caches."""

T = TypeVar("T")
Loop = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Profile:
    """Median seconds of steps on the engine that serves, by batch size."""

    engine: str
    device: str
    layers: tuple[str, ...]
    """The paths of the L layers between which the stages lie."""
    sizes: tuple[int, ...]
    stages: tuple[tuple[float, ...], ...]
    """The seconds of each of the L + 1 stages, for each size."""
    shrinks: tuple[tuple[float, ...], ...]
    """The seconds that it takes to copy half of the rows at each of the L layers, for each size."""

    @classmethod
    def load(cls, path: Path) -> Profile:
        data = json.loads(path.read_text())
        return cls(data["engine"], data["device"], tuple(data["layers"]), tuple(data["sizes"]),
                   tuple(map(tuple, data["stages"])), tuple(map(tuple, data["shrinks"])))

    def seconds(self, size: int) -> float:
        """Return the time of the whole backbone for a batch of any size."""
        return float(sum(for_counts(self.sizes, stage, size)[size] for stage in self.stages))

    def shrink_from(self, layers: Sequence[str], batch_size: int) -> tuple[int, ...]:
        """Return for each exit the number of answered rows of a full batch from which copying the other rows pays.

        The copy must pay before the next exit, which is another chance to copy. If all rows of a batch are answered,
        the batch just ends.

        Args:
            layers: paths of the exits of a plan, in order.
            batch_size: the size of full batches.
        """
        positions = [self.layers.index(path) for path in layers]
        least = []
        for here, following in pairwise([*positions, len(self.layers)]):
            rest = np.sum([for_counts(self.sizes, stage, batch_size)
                           for stage in self.stages[here + 1:following + 1]], axis=0)
            copied = for_counts(self.sizes, self.shrinks[here], 2 * batch_size)[::2]  # of 2k rows, k are copied
            pays = (rest[-1] - rest > copied)[::-1]  # [n] when n were answered
            least.append(next((n for n in range(1, batch_size) if pays[n:batch_size].all()), batch_size))
        return tuple(least)

    def costs(self, layers: Sequence[str], exits: Sequence[Sequence[float]], batch_size: int) -> Costs:
        """Return the costs for batches of one size.

        Args:
            layers: paths of the candidates that have an exit, in order.
            exits: for each of them, the seconds of the exit for each size.
            batch_size: the size of full batches.
        """
        whole = self.seconds(batch_size)
        steps = np.stack([for_counts(self.sizes, stage, batch_size) for stage in self.stages]) / whole
        ends = [0, *(self.layers.index(path) + 1 for path in layers), len(steps)]
        stages = np.stack([steps[start:end].sum(axis=0) for start, end in pairwise(ends)])
        heads = np.stack([for_counts(self.sizes, seconds, batch_size) for seconds in exits]) / whole
        return Costs("seconds", batch_size, stages, heads)


def profile_backbone(backbone: Backbone, layers: Sequence[CandidateLayer], *, engine: str = DEFAULT_ENGINE,
                     device: str = "cpu", sizes: Sequence[int] = BATCH_SIZES) -> Profile:
    """Time every stage between the layers on one thread; each round times all stages for all sizes.

    The times of the sizes are compared with each other, so a busy moment of the machine must affect all sizes alike. On
    a GPU, stages and copies are launched one by one here, which takes longer than the single launch that is used in
    service.

    Args:
        backbone: the backbone, on the device.
        layers: the layers at which it is cut.
        engine: the engine that executes it.
        device: a torch device.
        sizes: batch sizes, ascending.
    """
    items = [item.to(device) for item in backbone.probe]
    with torch.no_grad(), one_thread():
        compiled = engine_of(engine).compile(backbone, [layer.node for layer in layers])
        stages = graphed([Stage(stage.module.forward) for stage in compiled], torch.device(device))
        batches = [tuple(item.expand(size, *item.shape[1:]).contiguous() for item in items) for size in sizes]

        def one_round(live: Live) -> list[float]:
            taken: list[float] = []
            half = torch.arange(0, len(live[0]), 2, device=device)
            for stage in stages:
                seconds, live = timed(stage.forward, live, device)
                taken += seconds, timed(lambda *kept: [take_rows(x, half) for x in kept], live, device)[0]
            return taken[:-1]

        steps = list(zip(*_medians([partial(one_round, batch) for batch in batches], desc="profile")))
    return Profile(engine, device, tuple(layer.path for layer in layers), tuple(sizes), tuple(steps[::2]),
                   tuple(steps[1::2]))


def profile_exit(head: Head, layer: CandidateLayer, policy: str, *, engine: str = DEFAULT_ENGINE,
                 device: str = "cpu", sizes: Sequence[int] = BATCH_SIZES) -> tuple[float, ...]:
    """Return the seconds of an exit for each batch size: the head, the decision, and half of the batch leaving.

    The loop that is used in service is timed with the exit and without it; the result is the difference.

    Args:
        head: an exit head, trained or not.
        layer: the layer that the exit follows.
        policy: the kind of the exit's policy; the time of a policy does not depend on its parameters.
        engine: the engine that executes the backbone.
        device: a torch device.
        sizes: batch sizes, ascending.
    """
    def half(logits: Tensor) -> Tensor:
        return decide(logits) & (torch.arange(len(logits), device=logits.device) % 2 == 0)

    def loop(end: Exit | None) -> Loop:
        # The scores at the end are cheap: the stages after the exit are timed elsewhere.
        stages = [Stage(lambda x: (x,), end), Stage(lambda x: (x.flatten(1)[:, :2],))]
        levels, first = [graphed(stages, torch.device(device))], (arranged[0][0][:1],)
        executor = plain_executor(levels)
        capture_stages(levels[0], first, max(sizes))
        executor.prepare(first, max(sizes))
        return lambda x: executor.run((x,), 0, torch.zeros(len(x), dtype=torch.bool)).answers.stages

    with torch.no_grad(), one_thread():
        arranged = [engine_of(engine).arrange(torch.rand(size, *layer.shape, device=device)) for size in sizes]
        served = InferenceHead(head, 1.0, arranged[0][1]).to(device)
        logits = served(arranged[-1][0])
        decide = replace(policy_class(policy).fitted(1.0, logits, logits.argmax(dim=1)), threshold=0.0)
        with_exit, without = loop(Exit(served.forward, half, lambda logits: logits[:, :2])), loop(None)
        others = torch.zeros(_OTHERS, device=device)

        def after_others(run: Loop, x: Tensor) -> float:
            others.add_(1)
            return timed(run, (x,), device)[0]

        def one_round(x: Tensor) -> list[float]:
            return [after_others(with_exit, x) - after_others(without, x)]

        return tuple(max(1e-6, seconds) for [seconds] in _medians([partial(one_round, x) for x, _ in arranged]))


@dataclass(frozen=True)
class TimeCost:
    """The cost of a head as a fraction of the measured time of the backbone, for one batch size."""

    profile: Profile
    batch_size: int
    policy: str
    """The kind of policy that the exits will have."""

    def __call__(self, head: Head, layer: CandidateLayer) -> float:
        [seconds] = profile_exit(head, layer, self.policy, engine=self.profile.engine, device=self.profile.device,
                                 sizes=(self.batch_size,))
        return seconds / self.profile.seconds(self.batch_size)


def for_counts(sizes: Sequence[int], seconds: Sequence[float], batch_size: int) -> np.ndarray:
    """Return the (batch_size + 1,) seconds for 0 to batch_size rows, linear between the sizes that were measured.

    >>> for_counts((1, 2, 4), (3.0, 4.0, 8.0), 5).tolist()
    [0.0, 3.0, 4.0, 6.0, 8.0, 10.0]
    """
    measured = np.array((0, *sizes)), np.array((0.0, *seconds))
    rows = np.arange(batch_size + 1)
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    counted: np.ndarray = np.interp(rows, *measured) + slope * np.maximum(0, rows - sizes[-1])
    return counted


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, because the CPU time of a request is measured, whatever else the machine is doing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _medians(measures: Sequence[Callable[[], list[float]]], desc: str | None = None) -> list[list[float]]:
    """Return the medians of the values that each measure returns in several rounds; slow measures get fewer rounds.

    Args:
        measures: functions that take measurements.
        desc: the name of a progress bar; by default there is none.
    """
    for measure in measures:
        measure()  # warms up
    started = time.perf_counter()
    rounds: list[list[list[float]]] = []
    for _ in tqdm(range(_ROUNDS), desc=desc, unit="round", disable=None if desc else True):
        rounds.append([measure() for measure in measures])
        if len(rounds) >= _LEAST_ROUNDS and time.perf_counter() - started > _SECONDS_PER_SIZE * len(measures):
            break
    return [[statistics.median(times) for times in zip(*results)] for results in zip(*rounds)]


def timed(step: Callable[..., T], live: Live, device: str) -> tuple[float, T]:
    # On a CPU, only the CPU time of this process is measured, however busy the machine is.
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    started = clock()
    result = step(*live)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - started, result
