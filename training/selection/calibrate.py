"""Fits an exit's policy to the output of its head, by temperature scaling with the backbone's class as the label."""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from early_exit.handler.exits.policy import PlannedPolicy, policy_class

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def fit_policy(kind: str, logits: Tensor, teacher: Tensor) -> PlannedPolicy:
    """Return the calibrated policy of a head. Until it gets another threshold, no request leaves by it.

    Args:
        kind: the name under which the policy is registered.
        logits: (N, K) head logits on records the head was not trained on.
        teacher: (N,) class the backbone predicted for the same records.
    """
    return policy_class(kind).fitted(fit_temperature(logits, teacher), logits, teacher)


def fit_temperature(logits: Tensor, teacher: Tensor) -> float:
    """Return the T for which softmax(logits / T) agrees best with the teacher (Guo et al. 2017, section 4.2).

    Args:
        logits: (N, K) head logits on records the head was not trained on.
        teacher: (N,) class the backbone predicted for the same records.

    Returns:
        The minimiser of the cross-entropy in [0.05, 20]; near 0.05 for a head that agrees everywhere.

    >>> import torch
    >>> fit_temperature(torch.tensor([[4., 0.], [0., 4.], [4., 0.], [4., 0.]]),
    ...                 torch.tensor([0, 1, 0, 1])) > 1  # overconfident: soften
    True
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return functional.cross_entropy(logits / math.exp(log_temperature), teacher).item()

    # The log keeps T positive, and the bounds keep a head that agrees everywhere from dividing by 0.
    result = minimize_scalar(loss, bounds=(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)), method="bounded")
    return math.exp(float(result.x))
