"""The forward pass one stage at a time: rows of different calls that wait at the same stage run together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from early_exit.handler.inference.forward import Answers, Live, Stage, answered, numbers_on, take_rows
from early_exit.handler.inference.scheduler import Waiting, next_stage
from early_exit.handler.protocol import FULL

_Row = tuple["InFlightCall", int]
"""A row of a call."""
_Chunk = tuple[Live, list[_Row]]
"""Rows that travel together."""
_Scores = list[tuple[_Row, Tensor]]
"""Rows and their (K,) scores."""


@dataclass(eq=False)
class InFlightCall:
    """A call of the model on its way; `run_with_exits` would return its answers at once."""

    step: int
    """The setting that answers it."""
    shadow: list[bool]
    """For each row whether it runs to the end whatever the exits say,"""
    anytime: list[bool]
    """and whether it does because every exit's opinion is asked for."""
    began: int
    """How many stages had been run before, for whomever."""
    n_travelling: int
    error: Exception | None = None
    """Why the call has failed."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """(K,) scores by row, as far as they are known."""
    left_after: dict[int, int] = field(default_factory=dict)
    beside: dict[int, Live] = field(default_factory=dict)
    """By row that left nowhere."""
    reference: dict[int, Tensor] = field(default_factory=dict)
    pooled: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """By stage and shadow row."""
    opinions: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """(K,) scores by stage and anytime row."""
    seconds: list[float] = field(default_factory=list)

    def answers(self) -> Answers:
        """Return the answers of a call that has ended.

        Raises:
            Exception: what a stage raised.
        """
        if self.error is not None:
            raise self.error
        outputs = torch.stack([self.outputs[row] for row in range(len(self.shadow))])
        shadow, anytime = ([row for row, is_one in enumerate(mask) if is_one] for mask in (self.shadow, self.anytime))
        left_after = [self.left_after[row] for row in range(len(self.shadow))]
        stages, shadow_rows, anytime_rows = (torch.tensor(numbers, dtype=torch.int64)
                                             for numbers in (left_after, shadow, anytime))
        return Answers(
            outputs, stages, shadow_rows,
            torch.stack([self.reference[row] for row in shadow]) if shadow else outputs[:0], tuple(self.seconds),
            anytime_rows, _stacked(self.opinions),
            tuple(torch.stack(rows) for rows in zip(*(self.beside[row] for row in sorted(self.beside)))))

    def activations(self) -> dict[int, Tensor]:
        """Return by stage what was recorded of the (S, ...) shadow rows."""
        return _stacked(self.pooled)

    def travels_on(self, row: int) -> bool:
        """Tell whether a row has something to wait for: its answer, or the end of the backbone."""
        return row not in self.outputs or self.shadow[row] or self.anytime[row]


class ContinuousRun:
    """All calls that are on their way through one model."""

    def __init__(self, steps: Sequence[Sequence[Stage]], pooled: Callable[[int, Tensor], Tensor] | None = None) -> None:
        """Start with nobody on the way.

        Args:
            steps: the backbone in order, in the settings that may answer; they differ in their exits alone.
            pooled: makes of a stage's number and shadow rows' activations what is recorded; none records nothing.
        """
        self._steps, self._pooled = steps, pooled
        self._waiting: list[list[_Chunk]] = [[] for _ in steps[0]]
        self._n_run = 0

    def enter(self, inputs: Live, shadow: Tensor, anytime: Tensor | None = None, step: int = 0) -> InFlightCall:
        """Let a call join with its (B, ...) inputs, B > 0, the (B,) masks of its shadow and anytime rows, and the
        setting that answers it."""
        asked = [False] * len(shadow) if anytime is None else anytime.tolist()
        journey = InFlightCall(step, shadow.tolist(), asked, self._n_run, len(shadow))
        self._waiting[0].append((inputs, [(journey, row) for row in range(len(shadow))]))
        return journey

    def drop(self, journey: InFlightCall) -> None:
        """Forget a call's rows wherever they wait."""
        for chunks in self._waiting:
            chunks[:] = [kept for chunk in chunks if (kept := _select(chunk, lambda one: one is not journey))[1]]

    def run_stage(self) -> list[InFlightCall]:
        """Run one stage for the rows that wait there; return the calls that have ended with it."""
        waiting = [Waiting(stage, sum(len(rows) for _, rows in chunks),
                           max(self._n_run - journey.began for _, rows in chunks for journey, _ in rows))
                   for stage, chunks in enumerate(self._waiting) if chunks]
        if not waiting:
            return []
        stage = next_stage(waiting, len(self._waiting))
        chunks, self._waiting[stage] = self._waiting[stage], []
        self._n_run += 1
        try:
            return self._advance(stage, chunks)
        except Exception:
            # As with a whole batch: one bad row must not fail the others.
            journeys = dict.fromkeys(journey for _, rows in chunks for journey, _ in rows)
            return [ended for journey in journeys for ended in self._advance_alone(stage, chunks, journey)]

    def _advance_alone(self, stage: int, chunks: list[_Chunk], journey: InFlightCall) -> list[InFlightCall]:
        own = [kept for chunk in chunks if (kept := _select(chunk, lambda one: one is journey))[1]]
        try:
            return self._advance(stage, own)
        except Exception as error:
            journey.error = error
            self.drop(journey)
            return [journey]

    def _advance(self, number: int, chunks: list[_Chunk]) -> list[InFlightCall]:
        started = time.perf_counter()
        rows = [row for _, some in chunks for row in some]
        shadows = [position for position, (journey, row) in enumerate(rows) if journey.shadow[row]]
        is_last, pooled = number == len(self._waiting) - 1, None
        with torch.no_grad():
            live = self._steps[0][number].forward(*_together([some for some, _ in chunks]))
            if self._pooled is not None and shadows and not is_last:
                pooled = self._pooled(number, take_rows(live[0], numbers_on(live[0].device, shadows)))
            said = [self._said(step, number, live[0], rows)
                    for step in sorted({journey.step for journey, _ in rows})]
        # Nothing can fail from here on, so a row is never counted twice.
        for answers, opinions in said:
            for (journey, row), scores in answers:
                journey.outputs[row], journey.left_after[row] = scores, number
            for (journey, row), scores in opinions:
                journey.opinions.setdefault(number, {})[row] = scores
        for position, activation in zip(shadows, pooled if pooled is not None else ()):
            journey, row = rows[position]
            journey.pooled.setdefault(number, {})[row] = activation
        stay = [] if is_last else [position for position, (journey, row) in enumerate(rows) if journey.travels_on(row)]
        if is_last:
            for (journey, row), scores, *beside in zip(rows, *live):
                if row not in journey.outputs:
                    journey.outputs[row], journey.left_after[row] = scores, FULL
                    journey.beside[row] = tuple(beside)
                if journey.shadow[row]:
                    journey.reference[row] = scores
                if journey.anytime[row]:
                    journey.opinions.setdefault(FULL, {})[row] = scores
        elif stay:
            index = numbers_on(live[0].device, stay)
            self._waiting[number + 1].append((tuple(_own(take_rows(x, index), x) for x in live),
                                              [rows[one] for one in stay]))
        for position in set(range(len(rows))) - set(stay):
            rows[position][0].n_travelling -= 1
        journeys = dict.fromkeys(journey for journey, _ in rows)
        for journey in journeys:
            journey.seconds.append(time.perf_counter() - started)
        return [journey for journey in journeys if not journey.n_travelling]

    def _said(self, step: int, number: int, x: Tensor, rows: list[_Row]) -> tuple[_Scores, _Scores]:
        """Return the rows of a setting that are answered after a stage, and those that only asked what it says."""
        exit_ = self._steps[step][number].exit
        if exit_ is None:
            return [], []
        waiting = [journey.step == step and row not in journey.outputs for journey, row in rows]
        asking = [position for position, (journey, row) in enumerate(rows) if journey.step == step
                  and journey.anytime[row]]
        logits, sure = exit_.decide(x)

        def scores(positions: list[int]) -> _Scores:
            chosen = logits.index_select(0, numbers_on(x.device, positions))
            return list(zip([rows[position] for position in positions], exit_.answer(chosen)))

        return scores(answered(sure, waiting)), scores(asking)


def _own(taken: Tensor, x: Tensor) -> Tensor:
    """Return rows that may wait: on a GPU the next that pass this stage overwrite what it handed on."""
    return x.clone() if taken is x and x.is_cuda else taken


def _together(parts: Sequence[Live]) -> Live:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(tensors) for tensors in zip(*parts))


def _stacked(by_stage: dict[int, dict[int, Tensor]]) -> dict[int, Tensor]:
    """Return by stage the (R, ...) tensors of some rows, in the order of the rows."""
    return {stage: torch.stack([rows[row] for row in sorted(rows)]) for stage, rows in by_stage.items()}


def _select(chunk: _Chunk, wanted: Callable[[InFlightCall], bool]) -> _Chunk:
    live, rows = chunk
    positions = [position for position, (journey, _) in enumerate(rows) if wanted(journey)]
    index = numbers_on(live[0].device, positions)
    return tuple(take_rows(x, index) for x in live), [rows[position] for position in positions]
