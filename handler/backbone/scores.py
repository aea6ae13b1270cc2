"""The kinds of scores that classifiers return; an exit returns the kind of its backbone."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

_SMALLEST = 1e-30
"""Smaller probabilities are replaced by this value, because masked classes have the probability 0."""
_FAR_BELOW, _TIMES_THE_OTHERS = 1000.0, 100.0
"""Scores are fillers, which stand for no answer, if they lie below the other scores by more than this distance, and by
more than this multiple of the size of the other scores."""
_CONSTANT_BELOW, _CONSTANT_TIMES = 20.0, 5.0
"""The same limits for scores that equal the expected ones to the last bit, as a constant such as -50 does."""


NO_CLASS = -1
"""The class of scores that predict none, see `predicts`."""


class ScoreKind(str, Enum):
    """The (B, K) scores are logits, log-probabilities or probabilities."""

    LOGITS = "logits"
    LOG_PROBABILITIES = "log_probabilities"
    PROBABILITIES = "probabilities"

    def log_probabilities(self, scores: Tensor) -> Tensor:
        """Return (B, K) log-probabilities for scores of this kind.

        They are at least log(`_SMALLEST`), so that they are finite in float16, too. NaN stays NaN.
        """
        if self is ScoreKind.PROBABILITIES:
            return scores.clamp_min(_SMALLEST).log()
        return scores.log_softmax(dim=1).clamp_min(math.log(_SMALLEST))  # log-probabilities are logits too

    def from_logits(self, logits: Tensor) -> Tensor:
        """Return (B, K) scores of this kind for logits."""
        if self is ScoreKind.PROBABILITIES:
            return logits.softmax(dim=1)
        return logits.log_softmax(dim=1) if self is ScoreKind.LOG_PROBABILITIES else logits


def predicts(scores: Tensor) -> Tensor:
    """Return a (B,) bool mask of the rows of (B, K) scores that predict a class: their largest score is finite.

    A masked class may have the score minus infinity. A row with NaN, whose largest score is NaN, predicts no class.
    """
    return scores.amax(dim=1).isfinite()


def predicted_class(scores: Tensor) -> Tensor:
    """Return the (B,) int64 classes that (B, K) scores predict, or `NO_CLASS`.

    `argmax` would name a class, such as the first one if all scores are NaN.
    """
    return scores.argmax(dim=1).masked_fill(~predicts(scores), NO_CLASS)


def score_kind(scores: Tensor, dtype: torch.dtype) -> ScoreKind:
    """Return the kind of (B, K) scores, found from scores of a real forward pass.

    Args:
        scores: (B, K) scores, which may have been cast to float32.
        dtype: the dtype in which they were computed. Each logarithm of a probability is rounded in proportion to its
            size, so the sum of the probabilities is off by up to the entropy, times the rounding.
    """
    allowed = max(1e-3, torch.finfo(dtype).eps * (1 + math.log(scores.shape[1])))

    def sums_to_one(values: Tensor) -> bool:
        return bool(((values.sum(dim=1) - 1).abs() < allowed).all())

    if bool((scores >= 0).all()) and sums_to_one(scores):
        return ScoreKind.PROBABILITIES
    if bool((scores <= 0).all()) and sums_to_one(scores.exp()):
        return ScoreKind.LOG_PROBABILITIES
    return ScoreKind.LOGITS


def score_error(found: Tensor, expected: Tensor, kind: ScoreKind) -> float:
    """Return the largest difference between two (K,) rows of scores, relative to the largest score.

    Probabilities are compared by their logarithms, because the probabilities of a sure answer hardly change with the
    weights. Classes that are masked by a constant such as -1e9 or -50 have a scale of their own. The error is infinite
    if scores that are not numbers are found elsewhere than expected, or if no score is a number.
    """
    found, expected = found.double(), expected.double()
    if kind is ScoreKind.PROBABILITIES:
        found, expected = kind.log_probabilities(found), kind.log_probabilities(expected)
    is_number = expected.isfinite()
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    is_comparable = bool((is_same | is_number).all()) and bool(found[is_number].isfinite().all())
    if not bool(is_number.any()) or not is_comparable:
        return math.inf
    differences, sizes = (found - expected)[is_number].abs(), expected[is_number].abs()
    numbers = expected[is_number]
    is_filler = numbers <= math.log(_SMALLEST) if kind is ScoreKind.PROBABILITIES else (
        _are_below(numbers, _FAR_BELOW, _TIMES_THE_OTHERS)
        | (_are_below(numbers, _CONSTANT_BELOW, _CONSTANT_TIMES) & is_same[is_number]))
    answers = float(sizes[~is_filler].amax()) or 1.0
    if kind is ScoreKind.PROBABILITIES:
        answers = max(answers, 1.0)  # the logarithm of a probability near 1 is hardly more than rounding
    scale = torch.where(is_filler, sizes, answers)
    return float((differences / scale).amax())


def _are_below(scores: Tensor, distance: float, times: float) -> Tensor:
    """Return a (N,) mask of the scores that lie below the others by a distance and by a multiple of their size.

    Args:
        scores: (N,) finite scores.
        distance: the distance to the lowest of the others must be larger than this.
        times: the distance must be larger than this multiple of the largest absolute value of the others.
    """
    ordered = scores.sort(descending=True).values
    gaps = ordered[:-1] - ordered[1:]
    largest = torch.maximum(ordered[0].abs(), ordered[:-1].abs())
    ends = ((gaps > distance) & (gaps > times * largest)).nonzero().flatten()
    return scores < ordered[ends[0]] if len(ends) else torch.zeros_like(scores, dtype=torch.bool)
