"""A CUDA graph that consists of other graphs; the GPU itself decides whether some of them run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.cuda.kernels import checked, function


class Program:
    """Graphs that run one after the other, in a single launch.

    This needs CUDA 12.8 or later.
    """

    _graph: Any = None
    _executable: Any = None

    def __init__(self) -> None:
        """Begin with no graphs.

        Raises:
            RuntimeError: CUDA refuses a call. All other methods may raise this, too.
        """
        from cuda.bindings import driver

        self._driver, self._choose = driver, function("choose")
        self._graph = checked(driver.cuGraphCreate(0))
        self._last: list[Any] = []
        self._parts: list[torch.cuda.CUDAGraph] = []  # kept, because the program uses their memory

    def add(self, part: torch.cuda.CUDAGraph) -> None:
        """Append a graph that was captured with `keep_graph`."""
        self._last = self._chained(self._graph, self._last, [part])

    def switch(self, number: Tensor, cases: Sequence[Sequence[torch.cuda.CUDAGraph]]) -> None:
        """Append a choice between sequences of graphs. The sequence with the given number runs; if the number is out of
        range, none runs.

        Args:
            number: () int32 on the GPU, which is read when the program reaches the choice.
            cases: sequences of graphs that were captured with `keep_graph`.
        """
        driver = self._driver
        context = checked(driver.cuCtxGetCurrent())
        handle = checked(driver.cuGraphConditionalHandleCreate(self._graph, context, 0, 0))
        kernel = driver.CUDA_KERNEL_NODE_PARAMS()
        kernel.func = self._choose
        kernel.gridDimX = kernel.gridDimY = kernel.gridDimZ = 1
        kernel.blockDimX = kernel.blockDimY = kernel.blockDimZ = 1
        kernel.kernelParams = (int(handle), number.data_ptr()), (ctypes.c_ulonglong, ctypes.c_void_p)
        chosen = checked(driver.cuGraphAddKernelNode(self._graph, self._last, len(self._last), kernel))
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle = handle
        node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
        node.conditional.size = len(cases)
        node.conditional.ctx = context
        add_node = getattr(driver, "cuGraphAddNode_v2", driver.cuGraphAddNode)  # bindings of CUDA 12 use _v2
        self._last = [checked(add_node(self._graph, [chosen], None, 1, node))]
        for body, parts in zip(node.conditional.phGraph_out, cases):
            self._chained(body, [], parts)

    def instantiate(self) -> None:
        """Prepare for launches, after everything has been appended."""
        self._executable = checked(self._driver.cuGraphInstantiate(self._graph, 0))

    def launch(self) -> None:
        """Run on the current stream."""
        checked(self._driver.cuGraphLaunch(self._executable, torch.cuda.current_stream().cuda_stream))

    def __del__(self) -> None:
        if self._executable is not None:
            self._driver.cuGraphExecDestroy(self._executable)
        if self._graph is not None:
            self._driver.cuGraphDestroy(self._graph)

    def _chained(self, graph: Any, last: list[Any], parts: Sequence[torch.cuda.CUDAGraph]) -> list[Any]:
        for part in parts:
            last = [checked(self._driver.cuGraphAddChildGraphNode(graph, last, len(last),
                                                                 self._driver.CUgraph(part.raw_cuda_graph())))]
        self._parts += parts
        return last
