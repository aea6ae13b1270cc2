"""The forward pass with early exits: decide per item, answer the hits, shrink the batch, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
"""Called after each stage but the last with its number and what a head would read of the shadow rows, if any."""


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
    anytime: Tensor
    """(A,) int64: rows that asked for every exit's opinion, so they ran to the end too."""
    opinions: Mapping[int, Tensor]
    """By stage, and by `FULL` for the whole backbone, the (A, K) scores that they would have got there."""
    beside: Live = ()
    """What the backbone returned beside the scores: (W, ...) for the rows that left nowhere, in order; none where all
    left."""


def run_with_exits(
    inputs: Live, stages: Sequence[Stage], *, shadow: Tensor | None = None, anytime: Tensor | None = None,
    observe: Observer | None = None
) -> Answers:
    """Run the backbone and let confident rows leave early (Algorithm 1 of the paper).

    An item's answer does not depend on the batch it travelled in. Shadow rows are answered at their exit
    like any other but keep travelling, so that what they would have got from the backbone is known.

    Args:
        inputs: the backbone's (B, ...) inputs; B may be 0.
        stages: the backbone in order; the last stage returns the scores.
        shadow: (B,) bool mask of shadow rows; none by default.
        anytime: (B,) bool mask of rows that ask for every exit's opinion, so they run to the end too; none by default.
        observe: sees the shadow rows' activations.
    """
    n_rows, device = len(inputs[0]), inputs[0].device
    shadow_rows, anytime_rows = _numbers(shadow), _numbers(anytime)
    through = {*shadow_rows, *anytime_rows}
    # Lists of numbers: on so few rows each operation on tensors would cost more than all of this.
    rows, left_after, waits = list(range(n_rows)), [FULL] * n_rows, [True] * n_rows
    pieces: list[Tensor] = []
    answered: list[int] = []  # the rows of the pieces, one after the other
    opinions: dict[int, Tensor] = {}
    seconds: list[float] = []
    beside: Live = ()
    live = list(inputs)
    del inputs
    for number, stage in enumerate(stages):
        started = time.perf_counter()
        # Popped, so that the stage alone holds its input and frees it as soon as it has read it.
        live = list(stage.forward(live.pop()) if len(live) == 1 else stage.forward(*live))
        if observe is not None and shadow_rows and number < len(stages) - 1:
            observe(number, _take(live[0], rows, shadow_rows))
        if stage.exit is not None:
            logits, hit = decide(stage.exit, live[0], [waits[row] for row in rows])
            if anytime_rows:
                opinions[number] = stage.exit.answer(_take(logits, rows, anytime_rows))
            if hit:
                pieces.append(stage.exit.answer(take_rows(logits, torch.tensor(hit, device=device))))
                for row in [rows[position] for position in hit]:
                    answered.append(row)
                    left_after[row], waits[row] = number, False
                stay = [position for position, row in enumerate(rows) if waits[row] or row in through]
                if not stay or len(rows) - len(stay) >= stage.exit.shrink_from:
                    index = torch.tensor(stay, dtype=torch.int64, device=device)
                    live, rows = [take_rows(x, index) for x in live], [rows[position] for position in stay]
        seconds.append(time.perf_counter() - started)
        if n_rows and not rows:
            break
    else:
        wait = [row for row in rows if waits[row]]
        pieces.append(_take(live[0], rows, wait))
        beside = tuple(_take(x, rows, wait) for x in live[1:])
        answered += wait
    outputs = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if answered != sorted(answered):
        outputs = outputs[torch.tensor(sorted(range(n_rows), key=answered.__getitem__), device=device)]
    reference = _take(live[0], rows, shadow_rows) if shadow_rows else outputs[:0]
    if anytime_rows:
        opinions[FULL] = _take(live[0], rows, anytime_rows)
    stages_taken, shadows, anytimes = (torch.tensor(numbers, dtype=torch.int64, device=device)
                                       for numbers in (left_after, shadow_rows, anytime_rows))
    return Answers(outputs, stages_taken, shadows, reference, tuple(seconds), anytimes, opinions, beside)


def decide(exit_: Exit, x: Tensor, waiting: Sequence[bool]) -> tuple[Tensor, list[int]]:
    """Return what a head says of rows, and which of them it answers.

    Args:
        exit_: where the rows are.
        x: (B, ...) what its head reads.
        waiting: for each of the B rows whether it wants an answer.

    Returns:
        (B, K) logits and the ascending positions of the rows that are answered.
    """
    logits = exit_.head(x)
    sure: list[bool] = exit_.policy(logits).tolist()
    return logits, [position for position, (is_sure, waits) in enumerate(zip(sure, waiting)) if is_sure and waits]


def _numbers(mask: Tensor | None) -> list[int]:
    found: list[int] = [] if mask is None else mask.nonzero().flatten().tolist()
    return found


def _take(x: Tensor, rows: list[int], wanted: list[int]) -> Tensor:
    """Return some of the rows of x, whose numbers in the batch are given."""
    if len(wanted) == len(rows):
        return x
    place = {row: position for position, row in enumerate(rows)}
    return take_rows(x, torch.tensor([place[row] for row in wanted], dtype=torch.int64, device=x.device))


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
