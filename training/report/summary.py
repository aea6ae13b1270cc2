"""The report of a run: its exits, its heads and what they cost, for a reader and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.exits.plan import ExitPlan
from early_exit.training.costs.cost import Costs, flop_costs, head_flops
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.report.performance import Performance, Setting, exit_performances, setting
from early_exit.training.selection.simulation import OperatingPoint


@dataclass(frozen=True)
class ExitReport:
    """One exit of the plan, on the certify part."""

    layer: str
    cost: float
    """The fraction of the backbone's FLOPs that is spent before its head."""
    head: str
    """The architecture of its head, in words."""
    threshold: float
    temperature: float
    alone: Performance
    """The performance of the exit as the only one."""
    together: Performance
    """The performance of the exit after the exits before it."""


@dataclass(frozen=True)
class HeadReport:
    """One trained head, on the tune part."""

    layer: str
    architecture: str
    n_trials: int
    """The number of trials of the search that found the head; 0 for a head that was given."""
    agreement: float
    """The share of records on which the head's class is the backbone's."""
    temperature: float
    flops_ratio: float
    """The FLOPs of the head alone as a fraction of the backbone's."""
    used: bool
    """Whether the plan has an exit with this head."""


@dataclass(frozen=True)
class RunReport:
    """The outcome of an `ee-train` run."""

    model: str
    records: Mapping[str, int]
    """The number of records by part; replays belong to the train part."""
    plan: ExitPlan
    deployed: Setting
    """The figures of the plan on the certify part."""
    exits: tuple[ExitReport, ...]
    heads: tuple[HeadReport, ...]
    left_out: tuple[str, ...]
    """The candidates without a head, and why."""
    skipped: Mapping[str, int]
    """How many requests were skipped, by reason."""

    def to_json(self) -> dict[str, Any]:
        """Return report.json."""
        exits = [{"layer": exit.layer, "cost": exit.cost, "threshold": exit.threshold, "temperature": exit.temperature,
                  "head": exit.head, "hit_rate": exit.together.hit_rate, "agreement": exit.together.agreement,
                  "hit_rate_alone": exit.alone.hit_rate} for exit in self.exits]
        return {"model": self.model, "records": dict(self.records), "plan": self.plan.to_json(), "exits": exits,
                "heads": [asdict(head) for head in self.heads], "cost_ratio": self.deployed.cost,
                "flops_ratio": self.deployed.flops, "disagreement": self.deployed.disagreement,
                "left_out": list(self.left_out), "skipped": dict(self.skipped)}

    def to_text(self) -> str:
        """Return report.txt."""
        parts = "  ".join(f"{name} {count}" for name, count in self.records.items())
        lines = [
            f"{self.model}  {len(self.exits)} exits of {len(self.heads)} candidates  {self._time()}"
            f"FLOPs {self.deployed.flops:.3f} of the backbone's  disagreement {self.deployed.disagreement:.2%}",
            f"  records: {parts}", "",
            "  layer         cost  hits    alone   agreement  confidence >=  head",
        ]
        for exit in self.exits:
            agreement = "-" if exit.together.agreement is None else f"{exit.together.agreement:.2%}"
            lines.append(f"  {exit.layer:12}  {exit.cost:.2f}  {exit.together.hit_rate:6.1%}  "
                         f"{exit.alone.hit_rate:6.1%}  {agreement:>9}  {exit.threshold:.4f}         {exit.head}")
        if not self.exits:
            lines.append("  no exit saves anything within the tolerance: the plan answers every request in full")
        unused = [f"{head.layer} ({head.agreement:.0%} agree)" for head in self.heads if not head.used]
        if unused:
            lines += ["", "  not used: " + ", ".join(unused)]
        lines += [f"  left out: {reason}" for reason in self.left_out]
        lines += [f"  skipped: {count} requests: {reason}" for reason, count in self.skipped.items()]
        lines += ["", "  " + guarantee(self.plan)]
        return "\n".join(lines) + "\n"

    def _time(self) -> str:
        if self.plan.measure == "flops":
            return ""
        return f"time {self.deployed.cost:.3f} (batches of {self.plan.batch_size})  "


def guarantee(plan: ExitPlan) -> str:
    """Return the guarantee of a plan in words."""
    if plan.certificate is not None:
        return plan.certificate.in_words()
    return (f"Thresholds by the rule '{plan.thresholds}' carry no guarantee: the disagreement above is an estimate on "
            "records that were not used to choose them.")


def head_reports(heads: Sequence[TrainedHead], predictions: HeadPredictions, point: OperatingPoint,
                 backbone: BackboneDescription) -> list[HeadReport]:
    """Return the reports on all trained heads, in the order of the backbone."""
    return [HeadReport(layer=trained.layer.path, architecture=trained.head.spec.in_words(),
                       n_trials=len(trained.trials),
                       agreement=predictions.tune.candidates.agrees[:, index].double().mean().item(),
                       temperature=predictions.policies[index].temperature,
                       flops_ratio=head_flops(trained.head, trained.layer.shape) / backbone.flops,
                       used=index in point.layers)
            for index, trained in enumerate(heads)]


def flops_of(heads: Sequence[HeadReport], backbone: BackboneDescription) -> Costs:
    """Return the costs, in FLOPs, of exits with the reported heads."""
    return flop_costs([backbone.layer(head.layer) for head in heads], [head.flops_ratio for head in heads])


def make_report(model: str, records: Mapping[str, int], plan: ExitPlan, point: OperatingPoint,
                predictions: HeadPredictions, heads: Sequence[HeadReport], left_out: Sequence[str],
                skipped: Mapping[str, int], backbone: BackboneDescription) -> RunReport:
    """Return the report of a run.

    Args:
        model: the name of the model.
        records: the number of records by part; with the risk `accuracy`, records without a label count only
            in *train*.
        plan: the plan that was made from the operating point.
        point: the operating point that was chosen.
        predictions: the predictions by which it was chosen.
        heads: all heads that were trained.
        left_out: the candidates without a head, and why.
        skipped: the numbers of requests that were skipped, by reason.
        backbone: the backbone of the plan.
    """
    certify = predictions.certify
    exits = tuple(
        ExitReport(planned.layer, planned.cost, planned.head.in_words(), planned.threshold,
                   planned.policy.temperature, alone, together)
        for planned, (alone, together) in zip(plan.exits, exit_performances(point, certify)))
    return RunReport(model=model, records=records, plan=plan, exits=exits, heads=tuple(heads),
                     deployed=setting(point, certify, flops_of(heads, backbone)), left_out=tuple(left_out),
                     skipped=skipped)
