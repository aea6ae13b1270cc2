"""The forward pass with early exits: decide for each item, answer the hits, shrink the batch, continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.handler.exits.policy import ExitPolicy
from early_exit.handler.protocol import FULL

Live = tuple[Tensor, ...]
"""The (B, ...) tensors that pass from one stage to the next: first the activation that a head reads, then the others
that the rest of the backbone needs, such as a mask. After the last stage they are the scores, and the values beside
them if the backbone returns any."""

Observer = Callable[[int, Tensor], None]
"""Called after each stage but the last, if there are shadow rows, with the stage's number and their activations."""


@dataclass(frozen=True)
class Exit:
    """The exit at the end of a stage."""

    head: Callable[[Tensor], Tensor]
    """(B, ...) activation -> (B, K) logits."""
    policy: ExitPolicy
    answer: Callable[[Tensor], Tensor]
    """(B, K) logits -> (B, K) scores of the kind that the backbone returns."""
    shrink_from: int = 1
    """The smallest number of answered rows at which copying the other rows saves time. If fewer rows are answered, the
    answered rows stay in the batch and are ignored from then on."""

    def decide(self, x: Tensor) -> tuple[Tensor, list[bool]]:
        """Return the (B, K) logits of (B, ...) activations, and for each row whether it may leave."""
        logits = self.head(x)
        return logits, self.policy(logits).tolist()

    def shrinks(self, n_rows: int, n_staying: int) -> bool:
        """Tell whether copying the rows that stay saves time."""
        return n_rows - n_staying >= self.shrink_from


@dataclass(frozen=True)
class Stage:
    """A part of the backbone and, if rows may leave after it, the exit there."""

    forward: Callable[..., Live]
    """Takes the tensors that enter the stage as arguments, and returns those that leave it."""
    exit: Exit | None = None

    def take(self, live: Live, places: list[int]) -> Live:
        """Return the rows in some places, ascending, of the tensors that enter this stage."""
        index = numbers_on(live[0].device, places)
        return tuple(take_rows(x, index) for x in live)


@dataclass(frozen=True)
class Answers:
    """The answers of one batch, in request order."""

    outputs: Tensor
    """(B, K) scores."""
    stages: Tensor
    """(B,) int64 on the CPU: the stage after which each row was answered, or `FULL`."""
    shadow: Tensor
    """(S,) int64 on the CPU: numbers of the shadow rows, which ran to the end whatever the exits decided."""
    reference: Tensor
    """(S, K) scores of the whole backbone for the shadow rows."""
    stage_seconds: tuple[float, ...]
    """Wall time in seconds of each stage that ran, including its head and the copy of rows that stay. Empty for a batch
    that a GPU ran in a single launch."""
    anytime: Tensor
    """(A,) int64 on the CPU: numbers of the rows that asked for every exit's scores, so they ran to the end."""
    exit_scores: Mapping[int, Tensor]
    """For each stage with an exit, and for `FULL`, the whole backbone: the (A, K) scores of the anytime rows there."""
    beside: Live = ()
    """The (W, ...) values that the backbone returned beside the scores, for the rows that did not leave early, in
    order. Empty if all rows left early."""


def run_with_exits(
    inputs: Live, stages: Sequence[Stage], *, shadow: Tensor | None = None, anytime: Tensor | None = None,
    observe: Observer | None = None
) -> Answers:
    """Run the backbone and let confident rows leave early (Algorithm 1 of the paper).

    An item's answer does not depend on the other items of its batch. Shadow rows are answered at their exit like any
    other row, but run to the end, so that the backbone's scores for them are known.

    Args:
        inputs: the backbone's (B, ...) inputs; B may be 0.
        stages: the backbone in order; the last stage returns the scores.
        shadow: (B,) bool mask of shadow rows; by default there are none.
        anytime: (B,) bool mask of rows that ask for every exit's scores, so they run to the end; by default none do.
        observe: is called with the shadow rows' activations.
    """
    batch = _Batch(len(inputs[0]), _numbers(shadow), _numbers(anytime))
    seconds: list[float] = []
    live = list(inputs)
    del inputs
    for number, (stage, following) in enumerate(zip(stages, (*stages[1:], None))):
        started = time.perf_counter()
        # The input is popped, so that only the stage holds it and can free it as soon as it has read it.
        live = list(stage.forward(live.pop()) if len(live) == 1 else stage.forward(*live))
        if observe is not None and batch.shadow and following is not None:
            observe(number, batch.take(live[0], batch.shadow))
        if stage.exit is not None and batch.rows:
            live = batch.leave(number, stage.exit, live, following)
        seconds.append(time.perf_counter() - started)
        if batch.n_rows and not batch.rows:
            break
    return batch.answers(live, seconds)


class _Batch:
    """The rows of a batch that is running: which of them have been answered, and where the others are.

    The numbers are in lists, because for so few rows a single operation on tensors would cost more than all lists.
    """

    def __init__(self, n_rows: int, shadow: list[int], anytime: list[int]) -> None:
        self.n_rows, self.shadow = n_rows, shadow
        self.rows = list(range(n_rows))
        """Numbers of the rows that are still in the batch, by place."""
        self._anytime, self._through = anytime, {*shadow, *anytime}
        self._left_after, self._waits = [FULL] * n_rows, [True] * n_rows
        self._decided: list[tuple[Exit, Tensor]] = []
        """Exits that answered rows, with the logits of all rows that were in the batch."""
        self._n_decided = 0
        """The number of rows of all logits in `_decided` together."""
        self._source = [0] * n_rows
        """For each row that was answered, its place in the concatenation of the logits in `_decided`."""
        self._exit_scores: dict[int, Tensor] = {}

    def leave(self, number: int, exit_: Exit, live: list[Tensor], following: Stage | None) -> list[Tensor]:
        """Let rows leave as an exit decides; return the tensors for the following stage, if there is one."""
        logits, sure = exit_.decide(live[0])
        hit = answered(sure, [self._waits[row] for row in self.rows])
        if self._anytime:
            self._exit_scores[number] = exit_.answer(self.take(logits, self._anytime))
        if not hit:
            return live
        for place in hit:
            row = self.rows[place]
            self._left_after[row], self._waits[row], self._source[row] = number, False, self._n_decided + place
        self._decided.append((exit_, logits))
        self._n_decided += len(self.rows)
        stay = [place for place, row in enumerate(self.rows) if self._waits[row] or row in self._through]
        if not stay or (following is not None and exit_.shrinks(len(self.rows), len(stay))):
            self.rows = [self.rows[place] for place in stay]
            if following is not None and stay:
                return list(following.take(tuple(live), stay))
        return live

    def take(self, x: Tensor, wanted: list[int]) -> Tensor:
        """Return some of the rows that are still in the batch, given by their numbers."""
        place = {row: position for position, row in enumerate(self.rows)}
        return self._at(x, [place[row] for row in wanted])

    def _at(self, x: Tensor, places: list[int]) -> Tensor:
        return x if len(places) == len(self.rows) else take_rows(x, numbers_on(x.device, places))

    def answers(self, live: list[Tensor], seconds: list[float]) -> Answers:
        """Return all answers, given the output of the last stage that ran."""
        outputs, wait = live[0], [place for place, row in enumerate(self.rows) if self._waits[row]]
        beside = tuple(self._at(x, wait) for x in live[1:]) if self.rows else ()
        if self._decided:
            for place in wait:
                self._source[self.rows[place]] = self._n_decided + place
            pieces = [exit_.answer(logits) for exit_, logits in self._decided] + ([live[0]] if wait else [])
            outputs = pieces[0]  # a single piece has all answers
            if len(pieces) > 1:
                outputs = torch.cat(pieces).index_select(0, numbers_on(outputs.device, self._source))
        reference = self.take(live[0], self.shadow) if self.shadow else outputs[:0]
        exit_scores = self._exit_scores | ({FULL: self.take(live[0], self._anytime)} if self._anytime else {})
        stages, shadow, anytime = (torch.tensor(numbers, dtype=torch.int64)
                                   for numbers in (self._left_after, self.shadow, self._anytime))
        return Answers(outputs, stages, shadow, reference, tuple(seconds), anytime, exit_scores, beside)


def answered(sure: Sequence[bool], waiting: Sequence[bool]) -> list[int]:
    """Return the ascending places of the rows that an exit answers.

    Args:
        sure: for each row, whether it may leave.
        waiting: for each row, whether it still waits for an answer.
    """
    return [place for place, (is_sure, waits) in enumerate(zip(sure, waiting)) if is_sure and waits]


def numbers_on(device: torch.device, numbers: list[int]) -> Tensor:
    """Return (N,) int64 numbers on a device; if it is a GPU, the CPU does not wait for it."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _numbers(mask: Tensor | None) -> list[int]:
    numbers: list[int] = [] if mask is None else mask.nonzero().flatten().tolist()
    return numbers


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return some rows of x in x's memory layout, or x itself if all rows are wanted.

    Args:
        x: (B, ...) tensor.
        index: numbers of the rows, ascending and without repetition.
    """
    if len(index) == len(x):
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        # index_select on channels_last returns a slow NCHW copy; on the permuted view it copies whole rows.
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return laid_out_like(x, x.index_select(0, index))


def laid_out_like(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows with the strides of x, because later operations, such as `contiguous`, return a copy or a view
    depending on the strides, and an operation in place may write through a view.

    Args:
        x: (B, ...) tensor. If its rows overlap or do not follow each other in memory, `rows` is returned as it is.
        rows: (N, ...) tensor.
    """
    if rows.stride()[1:] == x.stride()[1:] and rows.is_contiguous() == x.is_contiguous():
        return rows
    inner = [(stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:]) if size > 1]
    extent = 1
    for stride, size in (*sorted(inner), (x.stride(0), 1)):
        if stride < extent:
            return rows
        extent += stride * (size - 1)
    return x.new_empty_strided(rows.shape, x.stride()).copy_(rows)
