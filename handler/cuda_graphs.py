"""A function on a GPU as CUDA graphs: launched at once instead of kernel by kernel.

A graph has fixed shapes and reads and writes fixed memory. So there is one for each of a few sizes of batch, and a
batch of another size takes the next larger: its last rows are whatever lies there, and nobody reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.stages import Live

_LOG = logging.getLogger(__name__)
Pool = Any
"""Names the memory that graphs share for what they forget when they end; only for graphs that never run together."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Live
    outputs: Live
    seconds: float
    """What it takes on an idle GPU."""


class Graphed:
    """Maps tensors with a row per item to a tuple of such tensors, in memory that the next call overwrites."""

    def __init__(self, function: Callable[..., Live], pool: Pool, before: Graphed | None = None) -> None:
        """Prepare; a graph is captured when a batch of its size comes first.

        Args:
            function: does the same, kernel by kernel.
            pool: of memory.
            before: whose outputs, or the first of them, are this one's inputs; they are read where they lie.
        """
        self.writes_to_inputs = False
        """Whether the function was seen to do so; known once a graph is there."""
        self._function, self._pool, self._before = function, pool, before
        self._by_size: dict[int, _Captured] = {}
        self._refused = False

    def __call__(self, *live: Tensor) -> Live:
        n_rows = len(live[0])
        captured = self._at(n_rows, live)
        if captured is None:
            return self._function(*live)
        for x, place in zip(live, captured.inputs):
            if x.data_ptr() != place.data_ptr():
                place[:n_rows].copy_(x)
        captured.graph.replay()
        return tuple(x[:n_rows] for x in captured.outputs)

    def places(self, n_rows: int, live: Live) -> Live | None:
        """Return the memory where a batch of n_rows is read, or None where there is no graph.

        Args:
            n_rows: of the batch.
            live: tensors like those to come, with any number of rows.
        """
        captured = self._at(n_rows, live)
        return None if captured is None else tuple(place[:n_rows] for place in captured.inputs)

    def seconds(self, n_rows: int) -> float:
        """Return what a batch takes, as far as is known; without a graph, forever."""
        captured = self._by_size.get(padded(n_rows))
        return captured.seconds if captured else float("inf")

    def _at(self, n_rows: int, live: Live) -> _Captured | None:
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
    def _capture(self, size: int, live: Live) -> _Captured:
        before = self._before._by_size.get(size) if self._before else None
        inputs = before.outputs[:len(live)] if before else tuple(x.new_zeros((size, *x.shape[1:])) for x in live)
        copies = tuple(x.clone() for x in inputs)
        versions = [x._version for x in copies]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._function(*copies)  # libraries set themselves up, which a capture does not allow
        torch.cuda.current_stream().wait_stream(side)
        self.writes_to_inputs = [x._version for x in copies] != versions
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._function(*inputs)
        # Run again what writes to its inputs, and they would no longer be what is to come.
        return _Captured(graph, inputs, outputs, float("inf") if self.writes_to_inputs else _seconds(graph))


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    started.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return 1e-3 * float(started.elapsed_time(ended))


def sizes_up_to(batch_size: int) -> list[int]:
    """Return the sizes of the graphs that batches of up to so many rows take, the largest first.

    >>> sizes_up_to(13)
    [16, 12, 8, 6, 4, 3, 2, 1]
    """
    return sorted({padded(n) for n in range(1, batch_size + 1)}, reverse=True)


def padded(n_rows: int) -> int:
    """Return the size of the graph that a batch of n_rows > 0 takes: a power of two, or three quarters of one.

    >>> [padded(n) for n in (1, 2, 3, 4, 5, 6, 7, 12, 13, 17, 100)]
    [1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 128]
    """
    power = 1 << (n_rows - 1).bit_length()
    smaller = power * 3 // 4
    return smaller if n_rows <= smaller else power
