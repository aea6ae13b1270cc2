"""The exit plan: which exits a model version has, and what is certified about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from early_exit.handler.archive_layout import HEADS_FILE, PLAN_FILE
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.errors import PlanError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.exits.policy import ConfidencePolicy, PlannedPolicy, policy_of
from early_exit.handler.exits.risk import Risk
from early_exit.handler.files.private import replacing
from early_exit.handler.formats import PLAN


@dataclass(frozen=True)
class PlannedExit:
    """One exit of a plan."""

    layer: str
    """Module path of the candidate layer that the exit comes after."""
    head: HeadSpec
    policy: PlannedPolicy
    """The exit policy, for logits of the trained head; `InferenceHead` computes the policy's answers."""
    cost: float
    """Fraction of the backbone's FLOPs spent when this layer has run, in (0, 1)."""
    head_cost: float
    """FLOPs of the head as a fraction of the backbone's."""
    shrink_from: int = 1
    """The smallest number of answered rows at which it saves time to copy the other rows to a smaller batch, as
    measured."""

    @property
    def threshold(self) -> float:
        """The confidence threshold: the lowest confidence at which a request leaves here."""
        return self.policy.threshold

    def to_json(self) -> dict[str, Any]:
        """Return the exit in the form of plan.json; `policy` is written only for policies of another kind than
        confidence."""
        policy = self.policy.to_json()
        temperature, threshold = policy.pop("temperature"), policy.pop("threshold")
        tag = {} if self.policy.kind == ConfidencePolicy.kind else {"policy": policy}
        return {"layer": self.layer, "head": self.head.to_json(), "temperature": temperature, "threshold": threshold,
                "cost": self.cost, "head_cost": self.head_cost, "shrink_from": self.shrink_from, **tag}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlannedExit:
        """Read the output of `to_json`.

        Raises:
            PlanError: the head or the policy is not one that this version knows.
            KeyError, TypeError: a value is missing, or there is a value that this version does not know.
        """
        values = dict(data)
        policy = policy_of({**values.pop("policy", {}), "temperature": values.pop("temperature"),
                            "threshold": values.pop("threshold")})
        return cls(**{**values, "head": HeadSpec.from_json(values["head"]), "policy": policy})


@dataclass(frozen=True)
class Certificate:
    """The expected loss of a served answer is at most the tolerance, with this confidence.

    The statement holds for requests like those of the certify part: the shadow sample of the window.
    """

    risk: Risk
    """The measure of the loss."""
    tolerance: float
    confidence: float
    """1 - delta: the share of such certificates that are true."""
    n: int
    """The number of records in the certify part, which are used for nothing else."""
    k: int
    """The number of these records for which the served answer differed."""
    observed: float
    """The mean loss on these records; for disagreement it is k / n."""
    p_value: float
    """The probability of observing a loss this small if the expected loss is above the tolerance."""
    method: str
    window: tuple[float, float]
    """Unix times, in seconds, of the first record of the certify part, and of the last record that training used."""
    contents: int = 0
    """The number of contents that were first recorded in the certify part; 0 in an older certificate, which does not
    contain this number."""
    blocks: int = 0
    """The number of blocks of the records; 0 in an older certificate."""
    block_length: float = 0.0
    """The usual number of requests in a block; 0 if each record is a block of its own."""
    largest_block: float = 0.0
    """In the statement about requests, no block counts as more than this number of records."""
    is_trend: bool = False
    """Whether requests stay alike for longer than a tenth of the records."""

    def in_words(self) -> str:
        confidence = f"With {min(100 * self.confidence, 99.9999999):.9g}% confidence"  # it is never certain
        tolerance = f"{100 * self.tolerance:.6g}%"
        differed = f"{self.k} of {self.n} held-out records differed{self._evidence()}"
        if self.risk == Risk.DISAGREEMENT:
            of_new = " and of new contents" if self.contents else ""
            return f"{confidence} the served class differs from the backbone's on at most {tolerance} of requests" \
                   f"{of_new} ({differed})."
        if self.risk == Risk.ACCURACY:
            return f"{confidence} the accuracy is at most {tolerance} below the backbone's (on {self.n} labelled " \
                   f"held-out records it was {100 * self.observed:.2f}% below; {differed}), as long as the requests " \
                   "that have labels are a random sample of the traffic."
        return f"{confidence} the backbone finds the served classes on average at most {tolerance} less probable " \
               f"than its own (observed {100 * self.observed:.2f}%; {differed}). That bounds the loss of accuracy as " \
               "long as the backbone is not under-confident."


    def _evidence(self) -> str:
        """Return words about the contents and the blocks, if their numbers are not the number of records, and about the
        trend."""
        contents = f", {self.contents} contents" if self.contents not in (0, self.n) else ""
        blocks = (f", {self.blocks} blocks of similar requests, none of which counts as more than "
                  f"{self.largest_block:.0f} records" if self.block_length else "")
        trend = ", in traffic with a trend that must go on as it did there" if self.is_trend else ""
        return contents + blocks + trend


@dataclass(frozen=True)
class ExitPlan:
    """The exits of one model version, in order, for exactly one backbone."""

    backbone: str
    """sha256 of the backbone that the plan was made for."""
    thresholds: str
    """How the thresholds were chosen: certified, paper or equal."""
    exits: tuple[PlannedExit, ...]
    certificate: Certificate | None
    engine: str = "folded"
    """Identity of the engine that serves. The certificate includes the answers that this engine changes."""
    measure: str = "flops"
    """What `expected_cost` compares: flops, or seconds measured on the machine that trained."""
    batch_size: int = 1
    """The number of rows of a full batch, for which `expected_cost` holds."""
    expected_cost: float = 1.0
    """Mean cost of a request on the certify part, heads included, as a fraction of the backbone's."""
    safer: tuple[tuple[float, ...], ...] = ()
    """The settings of the fallback levels from 1 on: a confidence threshold for each exit. They were certified together
    with the deployed setting. The level after the last setting has no exits."""
    traffic: str = ""
    """Identity of the traffic that the certificate is about; empty if it is not known."""
    heads: str = ""
    """sha256 of the file with the heads' weights; empty in an older plan, which does not contain it."""
    likeness: Likeness | None = field(default=None, compare=False, repr=False)
    """How records were compared to form the certificate's blocks; it is stored beside the heads."""

    def __post_init__(self) -> None:
        costs = [planned.cost for planned in self.exits]
        if sorted(set(costs)) != costs:
            raise PlanError(f"the exits of a plan must be in order of cost, found {costs}")
        if any(len(thresholds) != len(costs) for thresholds in self.safer):
            raise PlanError(f"each fallback level needs {len(costs)} thresholds, one for each exit, found {self.safer}")

    @property
    def last_level(self) -> int:
        """The fallback level without exits. Level 0 is the deployed plan, and the settings in `safer` lie between."""
        return len(self.safer) + 1 if self.exits else 0

    def to_json(self) -> dict[str, Any]:
        plan = {**asdict(replace(self, likeness=None)), "exits": [planned.to_json() for planned in self.exits]}
        del plan["likeness"]
        for name in ("traffic", "heads"):  # the digest of a plan of the previous release must stay the same
            if not plan[name]:
                del plan[name]
        if self.certificate is not None and not self.certificate.blocks:
            for name in ("contents", "blocks", "block_length", "largest_block", "is_trend"):
                del plan["certificate"][name]
        return PLAN.stamped(plan)

    def is_certified_for(self, traffic: str) -> bool:
        """Tell whether the plan has a certificate for this traffic. Traffic that is not known counts as the same."""
        return self.certificate is not None and (not self.traffic or not traffic or self.traffic == traffic)

    def digest(self) -> str:
        """Return a short hash of the plan and of its heads. State files, probes and audit logs name it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> ExitPlan:
        """Read a plan.

        Raises:
            FormatError: this version does not read its format.
            PlanError: the plan is incomplete.
        """
        PLAN.require(data, source)
        certificate = data.get("certificate")
        try:
            return cls(
                backbone=data["backbone"], thresholds=data["thresholds"], engine=data["engine"],
                measure=data["measure"], batch_size=data["batch_size"],
                expected_cost=data["expected_cost"],
                exits=tuple(PlannedExit.from_json(planned) for planned in data["exits"]),
                certificate=None if certificate is None
                else Certificate(**{**certificate, "risk": Risk(certificate["risk"]),
                                    "window": tuple(certificate["window"])}),
                safer=tuple(tuple(thresholds) for thresholds in data.get("safer", ())),
                traffic=data.get("traffic", ""), heads=data.get("heads", ""),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{source} is not a complete plan: {error}") from error


def save_plan(folder: Path, plan: ExitPlan, heads: Mapping[str, Head]) -> ExitPlan:
    """Write a new plan and its heads into an existing folder, and return the plan, which then names these heads.

    Args:
        folder: receives heads.safetensors and then plan.json.
        plan: the plan.
        heads: the heads by the paths of their layers.
    """
    tensors = {f"{planned.layer}/{name}": tensor.contiguous()
               for planned in plan.exits for name, tensor in heads[planned.layer].state_dict().items()}
    if plan.likeness is not None:
        tensors.update(plan.likeness.to_tensors())
    content = save(tensors, metadata={"backbone": plan.backbone})
    plan = replace(plan, heads=hashlib.sha256(content).hexdigest())
    write_plan(folder, plan, content)
    return plan


def write_plan(folder: Path, plan: ExitPlan, heads: bytes) -> None:
    """Write a plan, and the content of the file of its heads, into an existing folder."""
    with replacing(folder / HEADS_FILE) as scratch:
        scratch.write_bytes(heads)
    with replacing(folder / PLAN_FILE) as scratch:
        scratch.write_text(json.dumps(plan.to_json(), indent=1))


def load_plan(path: Path) -> tuple[ExitPlan, dict[str, Tensor]]:
    """Read a plan and the tensors of its heads, which lie beside it.

    Raises:
        FormatError: this version does not read the plan's format.
        PlanError: a file is missing or damaged, or the heads are not those that the plan was made with.
    """
    try:
        plan = ExitPlan.from_json(json.loads(path.read_text()), str(path))
        content = path.with_name(HEADS_FILE).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if plan.heads and plan.heads != found:
            raise PlanError(f"{path} was made with other heads than those in {HEADS_FILE} beside it, expected the "
                            f"sha256 {plan.heads[:12]}..., found {found[:12]}...: use the two files of one run")
        tensors = load(content)
        return replace(plan, likeness=Likeness.from_tensors(tensors)), tensors
    except (OSError, ValueError, SafetensorError) as error:
        raise PlanError(f"cannot read the plan {path} and {HEADS_FILE} beside it: {error}") from error


def build_heads(plan: ExitPlan, tensors: Mapping[str, Tensor], backbone: BackboneDescription) -> dict[str, Head]:
    """Return the heads of a plan, by layer path, with their weights.

    Raises:
        PlanError: the plan was made for another backbone, or its tensors do not fit its heads.
    """
    if plan.backbone != backbone.sha256:
        raise PlanError(f"the plan was made for the backbone {plan.backbone[:12]}..., but this one is "
                        f"{backbone.sha256[:12]}...: train heads on records of this backbone, or use the other one")
    heads: dict[str, Head] = {}
    for planned in plan.exits:
        head = Head(planned.head, backbone.layer(planned.layer).shape, backbone.n_classes)
        prefix = planned.layer + "/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            head.load_state_dict(own)
        except RuntimeError as error:
            raise PlanError(f"{HEADS_FILE} does not fit the head at {planned.layer}: {error}") from error
        heads[planned.layer] = head.eval()
    return heads
