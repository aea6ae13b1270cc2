"""What a run found, for a reader and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from early_exit.handler.plan import ExitPlan
from early_exit.training.thresholds import Candidates, Choice, outcome


@dataclass(frozen=True)
class ExitReport:
    """One exit of the plan, on the certify part."""

    layer: str
    cost: float
    threshold: float
    temperature: float
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
    """Number of records by part."""
    plan: ExitPlan
    exits: tuple[ExitReport, ...]
    heads: tuple[HeadReport, ...]
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
            f"FLOPs per request {self.flops_ratio:.3f} of the backbone  disagreement {self.disagreement:.2%}",
            f"  records: {parts}", "",
            "  layer         cost  hits    alone   agreement  confidence >=",
        ]
        for found in self.exits:
            agreement = "-" if found.agreement is None else f"{found.agreement:.2%}"
            lines.append(f"  {found.layer:12}  {found.cost:.2f}  {found.hit_rate:6.1%}  {found.hit_rate_alone:6.1%}"
                         f"  {agreement:>9}  {found.threshold:.4f}")
        if not self.exits:
            lines.append("  no exit saves anything within the tolerance: the plan answers every request in full")
        unused = [f"{head.layer} ({head.agreement:.0%} agree)" for head in self.heads if not head.used]
        if unused:
            lines += ["", "  not used: " + ", ".join(unused)]
        lines += [f"  left out: {reason}" for reason in self.left_out]
        lines += ["", "  " + self._guarantee()]
        return "\n".join(lines) + "\n"

    def _guarantee(self) -> str:
        if self.plan.certificate is not None:
            return self.plan.certificate.in_words()
        return (f"Thresholds by the rule '{self.plan.thresholds}' carry no guarantee: the disagreement above is an "
                "estimate on records that were not used to choose them.")


def report_exits(plan: ExitPlan, choice: Choice, certify: Candidates) -> tuple[tuple[ExitReport, ...], float, float]:
    """Return the exits, the mean cost and the disagreement of a choice on the certify part."""
    found = outcome(choice, certify)
    exits: Sequence[ExitReport] = [
        ExitReport(
            layer=planned.layer, cost=planned.cost, threshold=planned.threshold, temperature=planned.temperature,
            hit_rate=(found.exit == position).double().mean().item(),
            agreement=1 - found.differs[found.exit == position].double().mean().item()
            if bool((found.exit == position).any()) else None,
            hit_rate_alone=(certify.confidence[:, layer] >= planned.threshold).double().mean().item(),
        )
        for position, (planned, layer) in enumerate(zip(plan.exits, choice.layers))
    ]
    return tuple(exits), found.cost.mean().item(), found.differs.double().mean().item()
