"""The forward pass one stage at a time: rows of different calls that wait at the same stage run together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from early_exit.handler.inference.executor import Record
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
    """A call of the model that has not ended; `run_with_exits` would return its answers at once."""

    level: int
    """The fallback level that answers the call."""
    shadow: list[bool]
    """For each row, whether it is a shadow row."""
    anytime: list[bool]
    """For each row, whether it asks for the scores of every exit."""
    began: int
    """How many stages had been run, for any call, when this one began."""
    n_travelling: int
    """How many rows have not arrived yet."""
    error: Exception | None = None
    """Why the call has failed; None while it has not."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """By row that is answered: its (K,) scores."""
    left_after: dict[int, int] = field(default_factory=dict)
    """By row that is answered: the stage after which it left, or `FULL`."""
    beside: dict[int, Live] = field(default_factory=dict)
    """By row that left nowhere: what the backbone returned beside its scores."""
    reference: dict[int, Tensor] = field(default_factory=dict)
    """By shadow row: the backbone's (K,) scores."""
    recorded: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """By stage and shadow row: what was recorded of the row's activation."""
    exit_scores: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """By stage and anytime row: the (K,) scores of the exit there."""
    seconds: list[float] = field(default_factory=list)
    """Wall time of each stage that ran with rows of the call."""

    def answers(self) -> Answers:
        """Return the answers of a call that has ended.

        Raises:
            Exception: what a stage raised.
        """
        if self.error is not None:
            raise self.error
        outputs = torch.stack([self.outputs[row] for row in range(len(self.shadow))])
        shadow, anytime = ([row for row, is_set in enumerate(mask) if is_set] for mask in (self.shadow, self.anytime))
        left_after = [self.left_after[row] for row in range(len(self.shadow))]
        stages, shadow_rows, anytime_rows = (torch.tensor(numbers, dtype=torch.int64)
                                             for numbers in (left_after, shadow, anytime))
        return Answers(
            outputs, stages, shadow_rows,
            torch.stack([self.reference[row] for row in shadow]) if shadow else outputs[:0], tuple(self.seconds),
            anytime_rows, _stacked(self.exit_scores),
            tuple(torch.stack(rows) for rows in zip(*(self.beside[row] for row in sorted(self.beside)))))

    def activations(self) -> dict[int, Tensor]:
        """Return by stage what was recorded of the (S, ...) activations of the shadow rows."""
        return _stacked(self.recorded)

    def travels_on(self, row: int) -> bool:
        """Tell whether a row has something to wait for: its answer, or the end of the backbone."""
        return row not in self.outputs or self.shadow[row] or self.anytime[row]


class InFlightCalls:
    """All calls of one model that have not ended."""

    def __init__(self, levels: Sequence[Sequence[Stage]], record: Record | None = None) -> None:
        """Start without calls.

        Args:
            levels: the stages at each fallback level, which differ in their exits alone.
            record: makes what is recorded of activations; without it nothing is recorded.
        """
        self._levels, self._record = levels, record
        self._waiting: list[list[_Chunk]] = [[] for _ in levels[0]]
        self._n_run = 0

    def enter(self, inputs: Live, shadow: Tensor, anytime: Tensor | None = None, level: int = 0) -> InFlightCall:
        """Let a call join.

        Args:
            inputs: its (B, ...) inputs, B > 0.
            shadow: (B,) bool mask of its shadow rows.
            anytime: (B,) bool mask of the rows that ask for every exit; None where no row does.
            level: the fallback level that answers it.
        """
        asks = [False] * len(shadow) if anytime is None else anytime.tolist()
        call = InFlightCall(level, shadow.tolist(), asks, self._n_run, len(shadow))
        self._waiting[0].append((inputs, [(call, row) for row in range(len(shadow))]))
        return call

    def drop(self, dropped: InFlightCall) -> None:
        """Forget a call's rows wherever they wait."""
        for chunks in self._waiting:
            chunks[:] = [kept for chunk in chunks if (kept := _select(chunk, lambda call: call is not dropped))[1]]

    def run_stage(self) -> list[InFlightCall]:
        """Run one stage for the rows that wait there; return the calls that have ended with it."""
        waiting = [Waiting(stage, sum(len(rows) for _, rows in chunks),
                           max(self._n_run - call.began for _, rows in chunks for call, _ in rows))
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
            calls = dict.fromkeys(call for _, rows in chunks for call, _ in rows)
            return [ended for call in calls for ended in self._advance_alone(stage, chunks, call)]

    def _advance_alone(self, stage: int, chunks: list[_Chunk], alone: InFlightCall) -> list[InFlightCall]:
        own = [kept for chunk in chunks if (kept := _select(chunk, lambda call: call is alone))[1]]
        try:
            return self._advance(stage, own)
        except Exception as error:
            alone.error = error
            self.drop(alone)
            return [alone]

    def _advance(self, number: int, chunks: list[_Chunk]) -> list[InFlightCall]:
        started = time.perf_counter()
        rows = [row for _, chunk_rows in chunks for row in chunk_rows]
        shadows = [position for position, (call, row) in enumerate(rows) if call.shadow[row]]
        is_last, recorded = number == len(self._waiting) - 1, None
        with torch.no_grad():
            live = self._levels[0][number].forward(*_together([live for live, _ in chunks]))
            if self._record is not None and shadows and not is_last:
                recorded = self._record(number, take_rows(live[0], numbers_on(live[0].device, shadows)))
            decisions = [self._decide(level, number, live[0], rows)
                         for level in sorted({call.level for call, _ in rows})]
        # Nothing can fail from here on, so a row is never counted twice.
        for leaving, asking in decisions:
            for (call, row), scores in leaving:
                call.outputs[row], call.left_after[row] = scores, number
            for (call, row), scores in asking:
                call.exit_scores.setdefault(number, {})[row] = scores
        for position, activation in zip(shadows, recorded if recorded is not None else ()):
            call, row = rows[position]
            call.recorded.setdefault(number, {})[row] = activation
        stay = [] if is_last else [position for position, (call, row) in enumerate(rows) if call.travels_on(row)]
        if is_last:
            _arrive(rows, live)
        elif stay:
            index = numbers_on(live[0].device, stay)
            self._waiting[number + 1].append((tuple(_own(take_rows(x, index), x) for x in live),
                                              [rows[position] for position in stay]))
        for position in set(range(len(rows))) - set(stay):
            rows[position][0].n_travelling -= 1
        calls = dict.fromkeys(call for call, _ in rows)
        for call in calls:
            call.seconds.append(time.perf_counter() - started)
        return [call for call in calls if not call.n_travelling]

    def _decide(self, level: int, number: int, x: Tensor, rows: list[_Row]) -> tuple[_Scores, _Scores]:
        """Return, of the rows that a level answers, those that leave after a stage, and those that ask for its exit."""
        exit_ = self._levels[level][number].exit
        if exit_ is None:
            return [], []
        waiting = [call.level == level and row not in call.outputs for call, row in rows]
        asking = [position for position, (call, row) in enumerate(rows) if call.level == level and call.anytime[row]]
        logits, sure = exit_.decide(x)

        def scores(positions: list[int]) -> _Scores:
            chosen = logits.index_select(0, numbers_on(x.device, positions))
            return list(zip([rows[position] for position in positions], exit_.answer(chosen)))

        return scores(answered(sure, waiting)), scores(asking)


def _arrive(rows: list[_Row], live: Live) -> None:
    """Note what the whole backbone returned for rows."""
    for (call, row), scores, *beside in zip(rows, *live):
        if row not in call.outputs:
            call.outputs[row], call.left_after[row] = scores, FULL
            call.beside[row] = tuple(beside)
        if call.shadow[row]:
            call.reference[row] = scores
        if call.anytime[row]:
            call.exit_scores.setdefault(FULL, {})[row] = scores


def _own(taken: Tensor, x: Tensor) -> Tensor:
    """Return rows that may wait: on a GPU the next rows that pass this stage overwrite what it handed on."""
    return x.clone() if taken is x and x.is_cuda else taken


def _together(parts: Sequence[Live]) -> Live:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(tensors) for tensors in zip(*parts))


def _stacked(by_stage: dict[int, dict[int, Tensor]]) -> dict[int, Tensor]:
    """Return by stage the (R, ...) tensors of some rows, in the order of the rows."""
    return {stage: torch.stack([rows[row] for row in sorted(rows)]) for stage, rows in by_stage.items()}


def _select(chunk: _Chunk, wanted: Callable[[InFlightCall], bool]) -> _Chunk:
    live, rows = chunk
    positions = [position for position, (call, _) in enumerate(rows) if wanted(call)]
    index = numbers_on(live[0].device, positions)
    return tuple(take_rows(x, index) for x in live), [rows[position] for position in positions]
