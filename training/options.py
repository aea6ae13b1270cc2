"""The options of an `ee-train` run."""

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
_SKIPPED = 0.1
"""The largest share of the records that certify that a replay may skip, as a share of the tolerance: the certificate is
not about these requests, so they must not matter."""


@dataclass(frozen=True)
class TrainingOptions:
    """The choices of one run."""

    tolerance: float = 0.02
    """The largest expected loss of an answer, T (`--tolerance`)."""
    confidence: float = 0.95
    """The confidence of the certificate, 1 - delta (`--confidence`)."""
    thresholds: Rule = "certified"
    """How confidence thresholds are set: `certified`, or without a guarantee by the paper's budgets T/2^n (`paper`) or
    by equal budgets (`equal`) (`--thresholds`)."""
    risk: Risk = Risk.DISAGREEMENT
    """What counts as a loss: `disagreement`, `confidence-gap` or `accuracy` (`--risk`)."""
    policy: str = ConfidencePolicy.kind
    """The kind of exit policy, which decides at an exit which requests leave."""
    measure: Measure = "seconds"
    """What the choice of exits minimises: measured `seconds`, or `flops` as in the paper (`--cost`)."""
    batch_size: int = 8
    """The batch size for which time is measured. `ee-train` takes it from the archive (`--batch-size`)."""
    engine: str = DEFAULT_ENGINE
    """The identity of the engine that will serve. Time is measured on this engine."""
    measure_device: str = "cpu"
    """The device on which time is measured, the one that will serve (`--measure-device`)."""
    layers: int = 16
    """The largest number of candidate layers that get an exit head. They are spread evenly over the backbone's cost
    (`--layers`)."""
    search: Search | None = field(default_factory=Search)
    """The extent of the search: how many heads are tried at each layer, and how many of them at random before NNI's
    tuner chooses (`startup`). Without a search every layer gets the default head, or the head that the search space
    gives it (`--search`, `--trials`, `--seed`)."""
    service: Service | None = None
    """The NNI service that runs the trials of the search. Without one they run in this process (`--service`)."""
    space: SearchSpace = field(default_factory=SearchSpace)
    """The architectures that the search may try (`--space`)."""
    recipe: Distillation = field(default_factory=Distillation)
    """How exit heads are trained (`--train-device`, `--seed`)."""
    replay: Replay | None = None
    """How recorded requests are run again to make more training data (`--replay`, `--augment`)."""
    split: SplitRule = SplitRule.TIME
    """How records are split into those that train, those that choose and those that certify: `time` or `random`
    (`--split`)."""
    fresh_after: float | None = None
    """The Unix time, in seconds, after which records may choose and certify; all earlier records train. `ee-watch` sets
    it, so that a renewed plan is certified on records that certified no plan before."""

    def __post_init__(self) -> None:
        policy_class(self.policy)  # an unknown policy is refused before anything is trained

    @property
    def delta(self) -> float:
        return 1 - self.confidence

    @property
    def most_skipped(self) -> float:
        """The largest share of the records that certify that a replay may skip."""
        return _SKIPPED * self.tolerance if self.thresholds == "certified" else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the options with which a stopped run must be continued.

        The place where trials run is left out: it may change, and it may be secret.
        """
        return {**asdict(self), "service": self.service is not None}

    @classmethod
    def to_choose_with(cls, data: Mapping[str, Any]) -> TrainingOptions:
        """Return the options that the choice of exits depends on, from the result of `to_json`.

        The others have their default values.
        """
        return cls(risk=Risk(data["risk"]), **{name: data[name] for name in (
            "tolerance", "confidence", "thresholds", "measure", "batch_size", "measure_device")})

    @property
    def trial_recipe(self) -> Distillation:
        """The recipe of a trial. Trials are trained briefly, because they are only compared with each other, but long
        enough for convolutions to overtake linear heads."""
        return replace(self.recipe, epochs=max(1, self.recipe.epochs // 3),
                       max_steps=min(_TRIAL_STEPS, self.recipe.max_steps))
