"""What `ee-train` was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from early_exit.handler.engines.registry import DEFAULT_ENGINE
from early_exit.handler.exits.policy import ConfidencePolicy, policy_class
from early_exit.handler.exits.risk import Risk
from early_exit.training.data.replay import Replay
from early_exit.training.data.split import SplitRule
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.nni_service import Service
from early_exit.training.heads.search import Search
from early_exit.training.heads.space import SearchSpace

Rule = Literal["certified", "paper", "equal"]
Measure = Literal["seconds", "flops"]

_TRIAL_STEPS = 800


@dataclass(frozen=True)
class TrainingOptions:
    """The choices of one run."""

    tolerance: float = 0.02
    """The expected loss of an answer that is tolerated, T."""
    confidence: float = 0.95
    """The confidence of the certificate, 1 - delta."""
    thresholds: Rule = "certified"
    risk: Risk = Risk.DISAGREEMENT
    policy: str = ConfidencePolicy.kind
    """The kind of policy that decides at exits who leaves."""
    measure: Measure = "seconds"
    """What exits are chosen to save: measured time, or FLOPs as in the paper."""
    batch_size: int = 8
    """The size of the batches for which time is saved."""
    engine: str = DEFAULT_ENGINE
    """The identity of the engine that will serve, on which time is measured."""
    measure_device: str = "cpu"
    """The device on which time is measured: the one that will serve."""
    layers: int = 16
    """The most candidates that get a head; they are spread evenly over the backbone's cost."""
    search: Search | None = field(default_factory=Search)
    """How much is searched; without a search every layer gets the default head, unless the space gives it one."""
    service: Service | None = None
    """The service in which the trials of the search run; without one they run here."""
    space: SearchSpace = field(default_factory=SearchSpace)
    recipe: Distillation = field(default_factory=Distillation)
    replay: Replay | None = None
    split: SplitRule = SplitRule.TIME
    """How records are split into what trains, what chooses and what certifies."""
    fresh_after: float | None = None
    """The Unix time, in seconds, after which records tune and certify; earlier ones all train, so that a renewed plan
    is certified on records that no earlier one was."""

    def __post_init__(self) -> None:
        policy_class(self.policy)  # an unknown one is refused before anything is trained

    @property
    def delta(self) -> float:
        return 1 - self.confidence

    def to_json(self) -> dict[str, Any]:
        """Return what a stopped run has to be continued with: where its trials run may change, and may be secret."""
        return {**asdict(self), "service": self.service is not None}

    @classmethod
    def to_choose_with(cls, data: Mapping[str, Any]) -> TrainingOptions:
        """Return, of what `to_json` gave, the options that the choice of exits depends on; the others are defaults."""
        return cls(risk=Risk(data["risk"]), **{name: data[name] for name in (
            "tolerance", "confidence", "thresholds", "measure", "batch_size", "measure_device")})

    @property
    def trial_recipe(self) -> Distillation:
        """Trials are trained briefly, as they are compared with each other only; yet long enough for convolutions to
        overtake linear heads."""
        return replace(self.recipe, epochs=max(1, self.recipe.epochs // 3),
                       max_steps=min(_TRIAL_STEPS, self.recipe.max_steps))
