"""A function on a GPU as CUDA graphs: launched at once instead of kernel by kernel.

A graph has fixed shapes and reads and writes fixed memory. So there is one for each of a few sizes of batch, and a
batch of another size takes the next larger: its last rows are whatever lies there, and nobody reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.inference.forward import Live

_LOG = logging.getLogger(__name__)
Pool = Any
"""Names the memory that graphs share, of which no two run at a time. A graph may overwrite what one that was captured
later has returned, so that is read, or copied, before."""


@dataclass(frozen=True)
class Captured:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Live
    outputs: Live


class Graphed:
    """Maps tensors with a row per item to a tuple of such tensors, in memory that the next call overwrites."""

    def __init__(self, function: Callable[..., Live], pool: Pool, before: Graphed | None = None) -> None:
        """Prepare; a graph is captured when a batch of its size comes first.

        Args:
            function: does the same, kernel by kernel.
            pool: of memory.
            before: whose outputs, or the first of them, are this one's inputs; they are read where they lie.
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
        """Return the graph for a batch of n_rows; none if it is empty or there can be no graph.

        Args:
            n_rows: of the batch.
            live: tensors like those to come, with any number of rows.
        """
        size = padded(n_rows) if n_rows else 0
        if size and size not in self._by_size and not self._refused:
            try:
                self._by_size[size] = self._capture(size, live)
            except RuntimeError as error:
                self._refused = True
                _LOG.warning("a function cannot be a CUDA graph and is launched kernel by kernel: %s", error)
        return self._by_size.get(size)

    # The memory of a graph outlives the call, which may be in torch's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, size: int, live: Live) -> Captured:
        before = self._before._by_size.get(size) if self._before else None
        inputs = before.outputs[:len(live)] if before else tuple(x.new_zeros((size, *x.shape[1:])) for x in live)
        copies = tuple(x.clone() for x in inputs)  # a function may write to its inputs
        graph, outputs = capture(lambda: self.function(*inputs), self.pool, lambda: self.function(*copies))
        graph.instantiate()
        return Captured(graph, inputs, outputs)


def capture(function: Callable[[], Live], pool: Pool, warm_up: Callable[[], object] = lambda: None
            ) -> tuple[torch.cuda.CUDAGraph, Live]:
    """Return a function as a graph, and its results.

    Args:
        function: reads and writes memory that stays where it is.
        pool: of memory.
        warm_up: called before, for libraries to set themselves up, which a capture does not allow.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random, stream, side = generator.clone_state(), torch.cuda.current_stream(), _side_stream(generator.device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        warm_up()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # kept, so that it can be a part of another
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool):
            results = function()
    except BaseException:
        generator.graphsafe_set_state(random)  # that of a capture that failed gives no numbers any more
        raise
    return graph, results


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def sizes_up_to(batch_size: int) -> list[int]:
    """Return the sizes of the graphs that batches of up to so many rows take, ascending.

    >>> sizes_up_to(13)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14]
    """
    return sorted({padded(n) for n in range(1, batch_size + 1)})


def padded(n_rows: int) -> int:
    """Return the size of the graph that a batch of n_rows > 0 takes: there are four to each doubling.

    >>> [padded(n) for n in (1, 2, 3, 4, 5, 8, 9, 12, 13, 17, 100)]
    [1, 2, 3, 4, 5, 8, 10, 12, 14, 20, 112]
    """
    step = 1 << max(0, (n_rows - 1).bit_length() - 3)
    return -(-n_rows // step) * step
