"""The forward pass with early exits: decide per item, answer the hits, shrink the batch, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.handler.policy import ExitPolicy

FULL = -1
"""Exit number of a row that the whole backbone answered."""

Live = tuple[Tensor, ...]
"""The (B, ...) tensors that travel from a stage to the next: first what a head reads, then whatever else the rest of
the backbone needs, such as a mask. After the last stage: the scores alone."""

Observer = Callable[[int, Tensor], None]
"""Called after each stage with its number and what a head would read of the shadow rows, where there are any."""


@dataclass(frozen=True)
class Exit:
    """What stands at the end of a stage that may answer."""

    head: Callable[[Tensor], Tensor]
    """(B, ...) activation -> (B, K) logits."""
    policy: ExitPolicy
    answer: Callable[[Tensor], Tensor]
    """(B, K) logits -> (B, K) scores of the kind that the backbone returns."""
    shrink_from: int = 1
    """Fewest answered rows that are worth a copy of the others; fewer travel on, and are ignored from there on."""


@dataclass(frozen=True)
class Stage:
    """A part of the backbone and, unless nobody may leave there, the exit after it."""

    forward: Callable[..., Live]
    """Takes the tensors that travel to it as arguments."""
    exit: Exit | None = None


@dataclass(frozen=True)
class Answers:
    """The answers of one batch, in request order."""

    outputs: Tensor
    """(B, K) scores."""
    stages: Tensor
    """(B,) int64: the stage after which each row was answered, or `FULL`."""
    shadow: Tensor
    """(S,) int64: rows that ran to the end whatever the exits said."""
    reference: Tensor
    """(S, K) scores of the whole backbone for the shadow rows."""
    stage_seconds: tuple[float, ...]
    """Wall time of each stage that ran, with its head and shrink."""


def run_with_exits(
    inputs: Live, stages: Sequence[Stage], *, shadow: Tensor | None = None, observe: Observer | None = None
) -> Answers:
    """Run the backbone and let confident rows leave early (Algorithm 1 of the paper).

    An item's answer does not depend on the batch it travelled in. Shadow rows are answered at their exit
    like any other but keep travelling, so that what they would have got from the backbone is known.

    Args:
        inputs: the backbone's (B, ...) inputs; B may be 0.
        stages: the backbone in order; the last stage returns the scores.
        shadow: (B,) bool mask of shadow rows; none by default.
        observe: sees the shadow rows' activations.
    """
    n_rows, device = len(inputs[0]), inputs[0].device
    is_shadow = torch.zeros(n_rows, dtype=torch.bool, device=device) if shadow is None else shadow
    n_shadows = int(is_shadow.sum())
    left_after = torch.full((n_rows,), FULL, dtype=torch.int64, device=device)
    # Of the rows that still travel: their number in the batch, whether they want an answer, whether they are shadows.
    rows, waiting, shadows = torch.arange(n_rows, device=device), torch.ones_like(is_shadow), is_shadow
    pieces: list[tuple[Tensor, Tensor]] = []  # (rows, their answers)
    seconds: list[float] = []
    live = list(inputs)
    del inputs
    for number, stage in enumerate(stages):
        started = time.perf_counter()
        # Popped, so that the stage alone holds its input and frees it as soon as it has read it.
        live = list(stage.forward(live.pop()) if len(live) == 1 else stage.forward(*live))
        if observe is not None and n_shadows:
            observe(number, take_rows(live[0], shadows.nonzero().flatten()))
        if stage.exit is not None:
            logits = stage.exit.head(live[0])  # (rows, K)
            hits = stage.exit.policy(logits) & waiting
            hit = hits.nonzero().flatten()
            if len(hit):
                answered = rows.index_select(0, hit)
                pieces.append((answered, stage.exit.answer(logits.index_select(0, hit))))
                left_after.index_fill_(0, answered, number)
                waiting = waiting & ~hits
                stay = (waiting | shadows).nonzero().flatten()
                if not len(stay) or len(rows) - len(stay) >= stage.exit.shrink_from:
                    live = [take_rows(x, stay) for x in live]
                    rows, waiting, shadows = (of.index_select(0, stay) for of in (rows, waiting, shadows))
        seconds.append(time.perf_counter() - started)
        if n_rows and not len(rows):
            break
    else:
        wait = waiting.nonzero().flatten()
        pieces.append((rows.index_select(0, wait), take_rows(live[0], wait)))
    outputs = torch.cat([answers for _, answers in pieces])[torch.cat([row for row, _ in pieces]).argsort()]
    reference = take_rows(live[0], shadows.nonzero().flatten()) if n_shadows else outputs[:0]
    return Answers(outputs, left_after, is_shadow.nonzero().flatten(), reference, tuple(seconds))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return some rows of x, in x's memory format: x itself when they are all.

    Args:
        x: (B, ...).
        index: ascending, each row once.
    """
    if len(index) == len(x):
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        # index_select on channels_last returns a slow NCHW copy; on the permuted view it copies whole rows.
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)
