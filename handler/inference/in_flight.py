"""The forward pass one stage at a time: rows of different calls that wait at the same stage run together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from early_exit.handler.inference.executor import Record
from early_exit.handler.inference.forward import Answers, Live, Stage, answered, laid_out_like, numbers_on, take_rows
from early_exit.handler.inference.scheduler import Waiting, next_stage
from early_exit.handler.protocol import FULL

_Row = tuple["InFlightCall", int]
"""A row of a call."""
_Chunk = tuple[Live, list[_Row]]
"""Rows that wait together, with their tensors."""
_Scores = list[tuple[_Row, Tensor]]
"""Rows and their (K,) scores."""


@dataclass(eq=False)
class InFlightCall:
    """A call of the model that has not ended. Its answers will be those that `run_with_exits` returns at once."""

    level: int
    """The fallback level that answers the call."""
    shadow: list[bool]
    """For each row, whether it is a shadow row."""
    anytime: list[bool]
    """For each row, whether it asks for the scores of every exit."""
    began: int
    """The number of stages that had been run, for any call, when this call began."""
    n_travelling: int
    """The number of rows that still have to run through stages."""
    error: Exception | None = None
    """The error with which the call has failed, or None."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """The (K,) scores of each row that has been answered, by row."""
    left_after: dict[int, int] = field(default_factory=dict)
    """The stage after which each answered row left, or `FULL`, by row."""
    beside: dict[int, Live] = field(default_factory=dict)
    """The values that the backbone returned beside the scores, by row, for rows that did not leave early."""
    reference: dict[int, Tensor] = field(default_factory=dict)
    """The backbone's (K,) scores of each shadow row, by row."""
    recorded: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """The recorded activations of shadow rows, by stage and row."""
    exit_scores: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """The (K,) scores of exits for anytime rows, by stage and row."""
    seconds: list[float] = field(default_factory=list)
    """Wall time in seconds of each stage that ran with rows of the call."""

    def answers(self) -> Answers:
        """Return the answers of a call that has ended.

        Raises:
            Exception: a stage raised it.
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
        """Return the recorded (S, ...) activations of the shadow rows, by stage."""
        return _stacked(self.recorded)

    def travels_on(self, row: int) -> bool:
        """Tell whether a row must run on: it has no answer yet, or it runs to the end."""
        return row not in self.outputs or self.shadow[row] or self.anytime[row]


class InFlightCalls:
    """All calls of one model that have not ended."""

    def __init__(self, levels: Sequence[Sequence[Stage]], record: Record | None = None) -> None:
        """Start without calls.

        Args:
            levels: the stages at each fallback level; the levels differ in their exits alone.
            record: computes what is recorded of an activation; with None, nothing is recorded.
        """
        self._levels, self._record = levels, record
        self._waiting: list[list[_Chunk]] = [[] for _ in levels[0]]
        self._n_run = 0
        self._writes: dict[int, bool] = {}
        """For each stage that has run to its end or has written into its input, whether it has ever done so."""

    def enter(self, inputs: Live, shadow: Tensor, anytime: Tensor | None = None, level: int = 0) -> InFlightCall:
        """Add a call.

        Args:
            inputs: the call's (B, ...) inputs, B > 0.
            shadow: (B,) bool mask of the shadow rows.
            anytime: (B,) bool mask of the rows that ask for every exit; None if no row does.
            level: the fallback level that answers the call.
        """
        asks = [False] * len(shadow) if anytime is None else anytime.tolist()
        call = InFlightCall(level, shadow.tolist(), asks, self._n_run, len(shadow))
        self._waiting[0].append((inputs, [(call, row) for row in range(len(shadow))]))
        return call

    def drop(self, dropped: InFlightCall) -> None:
        """Remove the rows of a call from all stages."""
        for chunks in self._waiting:
            chunks[:] = [kept for chunk in chunks if (kept := _select(chunk, lambda call: call is not dropped))[1]]

    def run_stage(self) -> list[InFlightCall]:
        """Run one stage for the rows that wait there, and return the calls that have ended with it."""
        waiting = [Waiting(stage, sum(len(rows) for _, rows in chunks),
                           max(self._n_run - call.began for _, rows in chunks for call, _ in rows))
                   for stage, chunks in enumerate(self._waiting) if chunks]
        if not waiting:
            return []
        stage = next_stage(waiting, len(self._waiting))
        chunks, self._waiting[stage] = self._waiting[stage], []
        self._n_run += 1
        before = [_n_writes(live) for live, _ in chunks]
        try:
            return self._advance(stage, chunks)
        except Exception as error:
            calls = dict.fromkeys(call for _, rows in chunks for call, _ in rows)
            if [_n_writes(live) for live, _ in chunks] != before:  # a second run would give wrong answers
                return [self._fail(call, error) for call in calls]
            # Each call is run alone: one bad row must not fail the others.
            return [ended for call in calls for ended in self._advance_alone(stage, chunks, call)]

    def _advance_alone(self, stage: int, chunks: list[_Chunk], alone: InFlightCall) -> list[InFlightCall]:
        own = [kept for chunk in chunks if (kept := _select(chunk, lambda call: call is alone))[1]]
        try:
            return self._advance(stage, own)
        except Exception as error:
            return [self._fail(alone, error)]

    def _fail(self, call: InFlightCall, error: Exception) -> InFlightCall:
        call.error = error
        self.drop(call)
        return call

    def _forward(self, number: int, parts: Sequence[Live]) -> Live:
        """Run a stage on the rows of several chunks, whose tensors stay as they are, in case the stage fails.

        A single chunk is copied only if the stage may write into its input. Whether it does is not known before its
        first run, and on a GPU it may depend on the number of rows.
        """
        live = _together(parts, copy=self._writes.get(number, True))
        before = _n_writes(live)
        try:
            result = self._levels[0][number].forward(*live)
            self._writes.setdefault(number, False)
            return result
        finally:
            if _n_writes(live) != before:
                self._writes[number] = True

    def _advance(self, number: int, chunks: list[_Chunk]) -> list[InFlightCall]:
        started = time.perf_counter()
        rows = [row for _, chunk_rows in chunks for row in chunk_rows]
        shadows = [position for position, (call, row) in enumerate(rows) if call.shadow[row]]
        is_last, recorded = number == len(self._waiting) - 1, None
        with torch.no_grad():
            live = self._forward(number, [live for live, _ in chunks])
            if self._record is not None and shadows and not is_last:
                recorded = self._record(number, take_rows(live[0], numbers_on(live[0].device, shadows)))
            decisions = [self._decide(level, number, live[0], rows)
                         for level in sorted({call.level for call, _ in rows})]
        # Nothing can fail after this point, so no row is counted twice.
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
        """Return the rows of a fallback level that leave after a stage, and its rows that ask for the exit's scores."""
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
    """Note the whole backbone's results for rows."""
    for (call, row), scores, *beside in zip(rows, *live):
        if row not in call.outputs:
            call.outputs[row], call.left_after[row] = scores, FULL
            call.beside[row] = tuple(beside)
        if call.shadow[row]:
            call.reference[row] = scores
        if call.anytime[row]:
            call.exit_scores.setdefault(FULL, {})[row] = scores


def _own(taken: Tensor, x: Tensor) -> Tensor:
    """Return rows with memory of their own: on a GPU, the next run of a stage overwrites its previous output."""
    return x.clone() if taken is x and x.is_cuda else taken


def _together(parts: Sequence[Live], *, copy: bool) -> Live:
    if len(parts) > 1:
        return tuple(laid_out_like(tensors[0], torch.cat(tensors)) for tensors in zip(*parts))
    return tuple(x.clone() for x in parts[0]) if copy else parts[0]


def _n_writes(live: Live) -> list[int | None]:
    """Return how often each tensor has been written to; None for tensors of inference mode, which do not count."""
    return [None if x.is_inference() else x._version for x in live]


def _stacked(by_stage: dict[int, dict[int, Tensor]]) -> dict[int, Tensor]:
    """Return the (R, ...) tensors of some rows, in the order of the rows, by stage."""
    return {stage: torch.stack([rows[row] for row in sorted(rows)]) for stage, rows in by_stage.items()}


def _select(chunk: _Chunk, wanted: Callable[[InFlightCall], bool]) -> _Chunk:
    live, rows = chunk
    positions = [position for position, (call, _) in enumerate(rows) if wanted(call)]
    index = numbers_on(live[0].device, positions)
    return tuple(take_rows(x, index) for x in live), [rows[position] for position in positions]
