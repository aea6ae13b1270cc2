"""What a run found, for a reader and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.exits.plan import ExitPlan
from early_exit.training.costs.cost import flop_costs, head_flops
from early_exit.training.data.dataset import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.selection.thresholds import OperatingPoint, mean_cost, outcome


@dataclass(frozen=True)
class ExitReport:
    """One exit of the plan, on the certify part."""

    layer: str
    cost: float
    threshold: float
    temperature: float
    head: str
    """Its architecture, in words."""
    hit_rate: float
    """Share of all records that leave here, after the exits before it."""
    agreement: float | None
    """Share of those answered like the backbone; none when nobody leaves."""
    hit_rate_alone: float
    """Share that would leave here if it were the only exit."""


@dataclass(frozen=True)
class HeadReport:
    """One trained head, on the tune part."""

    layer: str
    architecture: str
    n_trials: int
    """Of the search that found it; 0 for a head that was given."""
    agreement: float
    """Share of records on which its class is the backbone's."""
    temperature: float
    flops_ratio: float
    """Of the head alone, as a fraction of the backbone."""
    used: bool


@dataclass(frozen=True)
class RunReport:
    """The outcome of an `ee-train` run."""

    model: str
    records: dict[str, int]
    """Number of records by part; replays belong to the train part."""
    plan: ExitPlan
    exits: tuple[ExitReport, ...]
    heads: tuple[HeadReport, ...]
    cost_ratio: float
    """Mean cost per request as a fraction of the backbone's, in the plan's measure, on the certify part."""
    flops_ratio: float
    """Mean FLOPs per request as a fraction of the backbone's, heads included, on the certify part."""
    disagreement: float
    """Share of the certify part answered differently from the backbone."""
    left_out: tuple[str, ...]
    """Candidates without a head, and why."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_json()}

    def to_text(self) -> str:
        parts = "  ".join(f"{name} {count}" for name, count in self.records.items())
        lines = [
            f"{self.model}  {len(self.exits)} exits of {len(self.heads)} candidates  "
            f"{self._cost()}FLOPs {self.flops_ratio:.3f} of the backbone's  disagreement {self.disagreement:.2%}",
            f"  records: {parts}", "",
            "  layer         cost  hits    alone   agreement  confidence >=  head",
        ]
        for found in self.exits:
            agreement = "-" if found.agreement is None else f"{found.agreement:.2%}"
            lines.append(f"  {found.layer:12}  {found.cost:.2f}  {found.hit_rate:6.1%}  {found.hit_rate_alone:6.1%}"
                         f"  {agreement:>9}  {found.threshold:.4f}         {found.head}")
        if not self.exits:
            lines.append("  no exit saves anything within the tolerance: the plan answers every request in full")
        unused = [f"{head.layer} ({head.agreement:.0%} agree)" for head in self.heads if not head.used]
        if unused:
            lines += ["", "  not used: " + ", ".join(unused)]
        lines += [f"  left out: {reason}" for reason in self.left_out]
        lines += ["", "  " + guarantee(self.plan)]
        return "\n".join(lines) + "\n"

    def _cost(self) -> str:
        if self.plan.measure == "flops":
            return ""
        return f"time {self.cost_ratio:.3f} (batches of {self.plan.batch_size})  "


def guarantee(plan: ExitPlan) -> str:
    """Return in words what is certified about a plan."""
    if plan.certificate is not None:
        return plan.certificate.in_words()
    return (f"Thresholds by the rule '{plan.thresholds}' carry no guarantee: the disagreement above is an estimate on "
            "records that were not used to choose them.")


def make_report(model: str, training_set: TrainingSet, heads: Sequence[TrainedHead], judged: HeadPredictions,
                choice: OperatingPoint, plan: ExitPlan, left_out: Sequence[str],
                backbone: BackboneDescription) -> RunReport:
    """Put together what a run found."""
    certify = judged.certify
    found = outcome(choice, certify)
    flops = flop_costs([one.layer for one in heads],
                       [head_flops(one.head, one.layer.shape) / backbone.flops for one in heads])
    exits = []
    for position, (planned, layer) in enumerate(zip(plan.exits, choice.layers)):
        leaves = found.exit == position
        exits.append(ExitReport(
            layer=planned.layer, cost=planned.cost, threshold=planned.threshold, temperature=planned.policy.temperature,
            head=planned.head.in_words(), hit_rate=leaves.double().mean().item(),
            agreement=1 - found.differs[leaves].double().mean().item() if bool(leaves.any()) else None,
            hit_rate_alone=(certify.confidence[:, layer] >= planned.threshold).double().mean().item()))
    return RunReport(
        model=model, plan=plan, exits=tuple(exits), left_out=tuple(left_out),
        records={part.name.lower(): len(training_set.rows(part)) for part in Part},
        heads=tuple(
            HeadReport(one.layer.path, one.head.spec.in_words(), len(one.trials),
                       judged.tune.agrees[:, index].double().mean().item(), judged.temperatures[index],
                       float(flops.exits[index][1]), index in choice.layers)
            for index, one in enumerate(heads)),
        flops_ratio=mean_cost(choice, found.exit, flops), cost_ratio=mean_cost(choice, found.exit, certify.costs),
        disagreement=found.differs.double().mean().item())
