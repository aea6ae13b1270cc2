"""The time of batches without and with exits, on the devices of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from early_exit.training.costs.profiling import one_thread, timed
from early_exit.training.report.scripted_model import ScriptedModel

REPEATS = 100
"""The number of repeats of each measurement, as in section 4.4 of the paper."""
_LEAST_REPEATS = 3


@dataclass(frozen=True)
class Latency:
    """The mean time of a batch on a device; on a CPU, with one thread."""

    device: str
    batch_size: int
    repeats: int
    plain_ms: float
    exits_ms: float

    @property
    def ratio(self) -> float:
        return self.exits_ms / self.plain_ms


def devices() -> list[str]:
    """Return the torch devices of this machine."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def latencies(backbone: nn.Module, with_exits: ScriptedModel, exit_taken: Tensor, sizes: Sequence[int], device: str, *,
              max_seconds: float = 60.0) -> Iterator[Latency]:
    """Yield the latency for each batch size; the plain backbone and the one with exits take turns.

    Args:
        backbone: the plain backbone, on the device.
        with_exits: the same backbone with exits.
        exit_taken: (N,) position of the exit that each record takes, or -1; batches are drawn from them.
        sizes: batch sizes.
        device: a torch device.
        max_seconds: the time for all sizes together; large models are repeated less often, but at least three times.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), one_thread():
        for size in sizes:
            plain: list[float] = []
            exits: list[float] = []
            started, number = time.perf_counter(), -1  # the first round warms up
            while number < REPEATS:
                if number >= _LEAST_REPEATS and time.perf_counter() - started > max_seconds / len(sizes):
                    break
                batch = with_exits.script(exit_taken[torch.randint(len(exit_taken), (size,), generator=generator)])
                # The order alternates, because the second one finds warm caches.
                for turn in ((plain, exits), (exits, plain))[number % 2]:
                    run = backbone if turn is plain else with_exits
                    turn.append(timed(run, batch, device)[0])
                number += 1
            count = len(plain) - 1
            yield Latency(device, size, count, 1e3 * sum(plain[1:]) / count, 1e3 * sum(exits[1:]) / count)
