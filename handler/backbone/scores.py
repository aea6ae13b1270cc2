"""What kind of scores a classifier returns, so that an exit can return the same kind."""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class ScoreKind(str, Enum):
    """The (B, K) scores are logits, log-probabilities or probabilities."""

    LOGITS = "logits"
    LOG_PROBABILITIES = "log_probabilities"
    PROBABILITIES = "probabilities"

    def log_probabilities(self, scores: Tensor) -> Tensor:
        """Return (B, K) log-probabilities for scores of this kind."""
        if self is ScoreKind.PROBABILITIES:
            return scores.clamp_min(1e-30).log()
        return scores.log_softmax(dim=1)  # log-probabilities are logits too

    def from_logits(self, logits: Tensor) -> Tensor:
        """Return (B, K) scores of this kind for logits."""
        if self is ScoreKind.PROBABILITIES:
            return logits.softmax(dim=1)
        return logits.log_softmax(dim=1) if self is ScoreKind.LOG_PROBABILITIES else logits


def score_kind(scores: Tensor) -> ScoreKind:
    """Tell the kind from (B, K) scores of a real forward pass."""
    def sums_to_one(values: Tensor) -> bool:
        return bool(((values.sum(dim=1) - 1).abs() < 1e-3).all())

    if bool((scores >= 0).all()) and sums_to_one(scores):
        return ScoreKind.PROBABILITIES
    if bool((scores <= 0).all()) and sums_to_one(scores.exp()):
        return ScoreKind.LOG_PROBABILITIES
    return ScoreKind.LOGITS
