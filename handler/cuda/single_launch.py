"""All stages and exits of a batch as one CUDA graph, in which the GPU itself decides which rows leave.

The CPU launches this graph once, and reads at the end after which stage each row left. After each exit, a kernel counts
the rows that stay. The graph continues with the next stage in the smallest size that holds these rows, or ends if no
row stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from early_exit.handler.cuda import kernels
from early_exit.handler.cuda.graphs import Captured, capture, sizes_up_to
from early_exit.handler.cuda.program import Program
from early_exit.handler.cuda.stages import GraphedStage
from early_exit.handler.inference.forward import Answers, Exit, Live
from early_exit.handler.protocol import FULL


class SingleLaunch:
    """Returns the answers of `run_with_exits`, but without observers, without the scores of every exit, and without
    values that a backbone returns beside its scores.

    All calls must come from one stream.
    """

    # The captured memory outlives the call, which may be in torch's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, stages: Sequence[GraphedStage], batch_size: int) -> None:
        """Capture the exits and combine them with the graphs of the stages.

        Args:
            stages: stages that are captured for all sizes up to the largest batch; the last one returns the scores
                alone. Policies must depend on the logits only, because their captured computation is replayed.
            batch_size: the largest number of rows of a batch.

        Raises:
            RuntimeError: CUDA refuses a call, or the memory layout of the tensors between stages is not suitable.
        """
        if batch_size > kernels.MAX_ROWS:
            raise RuntimeError(f"a batch in one CUDA graph has at most {kernels.MAX_ROWS} rows, found {batch_size}")
        self._sizes, self._pool = sizes_up_to(batch_size), stages[0].graph.pool
        by_stage = _by_stage(stages, self._sizes)
        self._first, [scores] = by_stage[0], by_stage[-1][-1].outputs
        device = scores.device
        self._asked = torch.zeros(kernels.LEFT, dtype=torch.int32, pin_memory=True)
        self._left_after = torch.zeros(kernels.MAX_ROWS, dtype=torch.int32, pin_memory=True)
        self._state = torch.zeros(kernels.LENGTH, dtype=torch.int32, device=device)
        size_of = [len(self._sizes), *(bisect_left(self._sizes, n) for n in range(1, self._sizes[-1] + 1))]
        self._size_of = torch.tensor(size_of, dtype=torch.int32, device=device)
        self._answers, self._full = (torch.zeros_like(scores, memory_format=torch.contiguous_format) for _ in range(2))
        self._answers_at, self._full_at = (_addresses([scores]) for scores in (self._answers, self._full))
        self._places = [_places(following) for following in by_stage[1:]]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._program = Program()
        self._program.add(capture(self._begin, self._pool)[0])
        cases: list[list[torch.cuda.CUDAGraph]] = [[] for _ in self._sizes]
        for number, (stage, here) in enumerate(zip(stages, by_stage)):
            is_last = stage is stages[-1]
            for case, captured in zip(cases, here):
                case.append(captured.graph)
                if is_last:
                    case.append(self._end(captured))
                elif stage.exit is not None:
                    case.append(self._exit(stage.exit, number, captured))
            if is_last or stage.exit is not None:
                self._program.switch(self._at(kernels.NEXT), cases)
                cases = [[] for _ in self._sizes]
        self._program.add(capture(self._tell, self._pool)[0])
        self._program.instantiate()

    def __call__(self, inputs: Live, shadow: Tensor) -> Answers:
        """Return the answers of a batch.

        Args:
            inputs: the backbone's (B, ...) inputs, with 0 < B <= `batch_size`.
            shadow: (B,) bool mask of the shadow rows, on the CPU.
        """
        n_rows = len(shadow)
        self._asked[kernels.N] = n_rows
        self._asked[kernels.THROUGH:][:n_rows] = shadow
        for x, place in zip(inputs, self._first[bisect_left(self._sizes, n_rows)].inputs):
            place[:n_rows].copy_(x)
        self._program.launch()
        self._done.record()
        outputs, rows = self._answers[:n_rows].clone(), shadow.nonzero().flatten()
        reference = self._full[rows] if len(rows) else outputs[:0]
        self._done.synchronize()
        return Answers(outputs, self._left_after[:n_rows].long(), rows, reference, (), rows[:0], {})

    def _begin(self) -> Live:
        self._state[:len(self._asked)].copy_(self._asked, non_blocking=True)
        kernels.launch("begin", (1, 1), self._n_threads, self._state, self._size_of)
        return ()

    def _tell(self) -> Live:
        self._left_after.copy_(self._state[kernels.LEFT:][:kernels.MAX_ROWS], non_blocking=True)
        return ()

    def _exit(self, exit_: Exit, number: int, here: Captured) -> torch.cuda.CUDAGraph:
        def decide() -> tuple[Tensor, Tensor]:
            logits = exit_.head(here.outputs[0])
            sure, answers = exit_.policy(logits), exit_.answer(logits)
            return sure.to(logits.device, torch.bool).contiguous(), answers.to(self._answers.dtype).contiguous()

        def leave() -> Live:
            self._answer(*decide(), number, exit_.shrink_from)
            for x, places in zip(here.outputs, self._places[number]):
                kernels.move(x, self._at(kernels.MOVED), places, self._at(kernels.NEXT), None,
                             self._at(kernels.N_MOVED))
            return ()

        return capture(leave, self._pool, decide)[0]

    def _end(self, here: Captured) -> torch.cuda.CUDAGraph:
        def leave() -> Live:
            scores = here.outputs[0].contiguous()
            kernels.move(scores, None, self._full_at, None, self._at(kernels.ROWS), self._at(kernels.N))
            self._answer(None, scores, FULL, 1)
            return ()

        return capture(leave, self._pool)[0]

    def _answer(self, sure: Tensor | None, answers: Tensor, stage: int, shrink_from: int) -> None:
        """Answer the rows that leave, and find the rows that stay."""
        kernels.launch("decide", (1, 1), self._n_threads, self._state, sure, stage, shrink_from, self._size_of)
        kernels.move(answers, self._at(kernels.HITS), self._answers_at, None, self._at(kernels.HIT_ROWS),
                     self._at(kernels.N_HITS))

    def _at(self, field: int) -> Tensor:
        """Return the state from the offset of a field on."""
        return self._state[field:]

    @property
    def _n_threads(self) -> int:
        return -(-self._sizes[-1] // 32) * 32


def _by_stage(stages: Sequence[GraphedStage], sizes: Sequence[int]) -> list[list[Captured]]:
    """Return for each stage its graphs, in the order of ascending sizes."""
    by_stage = [[captured for size in sizes if (captured := stage.graph.captured(size, ()))] for stage in stages]
    if any(len(made) < len(sizes) for made in by_stage):
        raise RuntimeError("a stage cannot be captured")
    for before, here in pairwise(by_stage):
        reads = [(x, place) for last, next_ in zip(before, here) for x, place in zip(last.outputs, next_.inputs)]
        if any(x is not place for x, place in reads):
            raise RuntimeError("a stage was captured before the one that it follows, so it does not read the memory "
                               "that this one writes")
    return by_stage


def _places(stage: Sequence[Captured]) -> list[Tensor]:
    """Return for each input of a stage the addresses from which its graphs read it, in the order of ascending sizes."""
    places = []
    for inputs in zip(*(captured.inputs for captured in stage)):
        layouts = {tuple(stride for stride, size in zip(x.stride()[1:], x.shape[1:]) if size > 1) for x in inputs}
        if len(layouts) > 1:
            raise RuntimeError(f"the memory layout of a row depends on the size of the batch: strides {layouts}")
        places.append(_addresses(inputs))
    return places


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64, device=tensors[0].device)
