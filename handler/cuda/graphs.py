"""A function on a GPU as CUDA graphs, which are launched as a whole instead of kernel by kernel.

A graph has fixed shapes, and reads and writes fixed memory. There is therefore one graph for each of a few batch sizes,
and a batch of another size takes the next larger graph. The last rows then hold arbitrary values, which nothing reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.engines.compiled_stage import without_autocast
from early_exit.handler.inference.forward import Live

_LOG = logging.getLogger(__name__)
Pool = Any
"""Identifies memory that graphs share; no two of these graphs run at the same time. A graph may overwrite the results
of a graph that was captured later, so these results must be read or copied before the earlier graph runs."""


@dataclass(frozen=True)
class Captured:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Live
    outputs: Live


class Graphed:
    """Maps tensors with one row per item to a tuple of such tensors, in memory that the next call overwrites."""

    def __init__(self, function: Callable[..., Live], pool: Pool, before: Graphed | None = None) -> None:
        """Prepare; the graph for a batch size is captured when the first batch of that size comes.

        Args:
            function: the function that is captured.
            pool: the memory that the graphs share.
            before: another `Graphed`. Its first outputs are the inputs of this one, and they are not copied.
        """
        self.function, self.pool = function, pool
        self._before = before
        self._by_size: dict[int, Captured] = {}
        self._refused = False

    def __call__(self, *live: Tensor) -> Live:
        n_rows = len(live[0])
        captured = self.captured(n_rows, live)
        if captured is None:
            return self.function(*live)
        for x, place in zip(live, captured.inputs):
            if x.data_ptr() != place.data_ptr():
                place[:n_rows].copy_(x)
        captured.graph.replay()
        return tuple(x[:n_rows] for x in captured.outputs)

    def captured(self, n_rows: int, live: Live) -> Captured | None:
        """Return the graph for a batch, or None if the batch is empty or the function cannot be captured.

        Args:
            n_rows: the number of rows of the batch.
            live: tensors like those to come, with any number of rows.
        """
        size = padded(n_rows) if n_rows else 0
        if size and size not in self._by_size and not self._refused:
            try:
                self._by_size[size] = self._capture(size, live)
            except RuntimeError as error:
                self._refused = True
                _LOG.warning("a function cannot be captured as a CUDA graph, so its kernels are launched one by one: "
                             "%s", error)
        return self._by_size.get(size)

    # The memory of a graph outlives the call, which may be in torch's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, size: int, live: Live) -> Captured:
        before = self._before._by_size.get(size) if self._before else None
        inputs = before.outputs[:len(live)] if before else tuple(x.new_zeros((size, *x.shape[1:])) for x in live)
        copies = tuple(x.clone() for x in inputs)  # a function may write to its inputs
        # Most sizes are captured before the first request. The others must compute alike, whatever the handler does.
        with without_autocast(inputs[0].device):
            graph, outputs = capture(lambda: self.function(*inputs), self.pool, lambda: self.function(*copies))
        graph.instantiate()
        return Captured(graph, inputs, outputs)


def capture(function: Callable[[], Live], pool: Pool, warm_up: Callable[[], object] = lambda: None
            ) -> tuple[torch.cuda.CUDAGraph, Live]:
    """Capture a function as a graph, and return the graph and the function's results.

    Args:
        function: reads and writes memory at fixed addresses.
        pool: the memory that graphs share.
        warm_up: is called before the capture, so that libraries initialise themselves, which a capture does not allow.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random, stream, side = generator.clone_state(), torch.cuda.current_stream(), _side_stream(generator.device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        warm_up()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # kept, so that it can be a part of another graph
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool):
            results = function()
    except BaseException:
        generator.graphsafe_set_state(random)  # a capture that failed leaves the generator unusable
        raise
    return graph, results


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def sizes_up_to(batch_size: int) -> list[int]:
    """Return the sizes of the graphs for batches of up to `batch_size` rows, ascending.

    >>> sizes_up_to(13)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14]
    """
    return sorted({padded(n) for n in range(1, batch_size + 1)})


def padded(n_rows: int) -> int:
    """Return the size of the graph for a batch of n_rows > 0; there are four sizes from one power of two to the next.

    >>> [padded(n) for n in (1, 2, 3, 4, 5, 8, 9, 12, 13, 17, 100)]
    [1, 2, 3, 4, 5, 8, 10, 12, 14, 20, 112]
    """
    step = 1 << max(0, (n_rows - 1).bit_length() - 3)
    return -(-n_rows // step) * step
