"""The steps from records to a plan, in order; heads that are trained already are not trained again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from early_exit.handler.backbone import BackboneDescription
from early_exit.handler.candidates import CandidateLayer, spread_over
from early_exit.handler.errors import RecordError
from early_exit.handler.head import Head, HeadSpec, pooled_shape
from early_exit.handler.plan import Certificate, ExitPlan, PlannedExit, save_plan
from early_exit.handler.policy import ConfidencePolicy
from early_exit.training.calibrate import fit_temperature
from early_exit.training.certify import p_value, require_enough, walk
from early_exit.training.cost import head_flops
from early_exit.training.dataset import Part, RecordedTraffic, load_traffic, recorded_layers
from early_exit.training.distill import Distillation, train_head
from early_exit.training.paths import RunPaths, replacing
from early_exit.training.report import HeadReport, RunReport, report_exits
from early_exit.training.subset import MAX_CANDIDATES
from early_exit.training.thresholds import (
    NEVER,
    Candidates,
    Choice,
    certified_path,
    equal_choice,
    outcome,
    paper_choice,
)

Rule = Literal["certified", "paper", "equal"]


@dataclass(frozen=True)
class TrainingOptions:
    """What `ee-train` was asked for."""

    tolerance: float
    """T: tolerated share of answers that differ from the backbone's."""
    confidence: float
    """1 - delta of the certificate."""
    thresholds: Rule
    head: HeadSpec
    recipe: Distillation

    @property
    def delta(self) -> float:
        return 1 - self.confidence


def train(model: str, backbone: BackboneDescription, shards: list[Path], options: TrainingOptions,
          run: RunPaths, say: Callable[[str], None] = lambda line: None) -> RunReport:
    """Make heads, plan and report from records, and write them into the folder of the run.

    A run that was stopped goes on with the records it was started with, and with the heads it has trained.

    Args:
        model: name, for the report.
        backbone: of the records.
        shards: the records.
        options: what was asked for.
        run: where everything is written.
        say: told when the folder's run goes on with other records than `shards`.

    Raises:
        RecordError: too few records, records of different kinds, or a folder of another run.
    """
    shards, inputs = _inputs(run, backbone, shards, options, say)
    traffic = load_traffic(shards)
    parts = {part: traffic.part(part) for part in Part}
    if options.thresholds == "certified":
        require_enough(len(parts[Part.CERTIFY]), Part.CERTIFY.share, options.tolerance, options.delta)
    if not all(len(rows) for rows in parts.values()):
        raise RecordError(f"{len(traffic)} records are too few to split into {', '.join(p.name.lower() for p in Part)}")
    with replacing(run.inputs) as scratch:
        scratch.write_text(json.dumps(inputs, indent=1))
    recorded, pool = recorded_layers(shards)
    spec = replace(options.head, pool=pool)
    layers = spread_over([layer for layer in backbone.candidates if layer.path in recorded], MAX_CANDIDATES)
    heads = _train_heads(run, traffic, parts[Part.TRAIN], layers, backbone, spec, options.recipe)
    tune, certify, temperatures = _judge_heads(traffic, parts, layers, heads, backbone)
    choice = _choose(tune, certify, options)
    plan = _plan(choice, traffic, layers, heads, temperatures, certify, backbone, options)
    exits, flops_ratio, disagreement = report_exits(plan, choice, certify)
    report = RunReport(
        model=model, records={part.name.lower(): len(rows) for part, rows in parts.items()}, plan=plan, exits=exits,
        heads=tuple(HeadReport(layer.path, tune.agrees[:, index].double().mean().item(), temperatures[index],
                               tune.head_costs[index], index in choice.layers) for index, layer in enumerate(layers)),
        flops_ratio=flops_ratio, disagreement=disagreement,
        left_out=tuple(f"{layer.path}: not recorded" if layer.path not in recorded
                       else f"{layer.path}: {MAX_CANDIDATES} others cover the backbone's cost evenly"
                       for layer in backbone.candidates if layer not in layers),
    )
    save_plan(run.root, plan, {layer.path: head for layer, head in zip(layers, heads)})
    for path, text in ((run.report_json, json.dumps(report.to_json(), indent=1)), (run.report_text, report.to_text())):
        with replacing(path) as scratch:
            scratch.write_text(text)
    return report


def _inputs(run: RunPaths, backbone: BackboneDescription, shards: list[Path], options: TrainingOptions,
            say: Callable[[str], None]) -> tuple[list[Path], dict[str, Any]]:
    """Return the shards to use and what to remember of the run: those it was started with, if it was.

    Raises:
        RecordError: the folder holds a run of another backbone or with other options.
    """
    asked: dict[str, Any] = json.loads(json.dumps({"backbone": backbone.sha256, "options": asdict(options)}))
    found = [str(shard.resolve()) for shard in shards]
    if not run.inputs.exists():
        return shards, {**asked, "shards": found}
    started: dict[str, Any] = json.loads(run.inputs.read_text())
    if {key: started.get(key) for key in asked} != asked:
        raise RecordError(f"{run.root} holds a run of another backbone or with other options: pass another --to, or "
                          "delete it")
    if started["shards"] != found:
        say(f"{run.root} goes on with the {len(started['shards'])} shards it was started with, of {len(found)} that "
            "there are now: pass another --to to use them all")
    return [Path(shard) for shard in started["shards"]], started


def _train_heads(run: RunPaths, traffic: RecordedTraffic, rows: torch.Tensor, layers: list[CandidateLayer],
                 backbone: BackboneDescription, spec: HeadSpec, recipe: Distillation) -> list[Head]:
    heads = []
    n_steps = recipe.n_steps(len(rows))
    with tqdm(total=n_steps * len(layers), desc="heads", unit="step", disable=None) as progress:
        def on_step() -> None:
            progress.update()

        for layer in layers:
            path = run.head(layer.path)
            if path.exists():
                head = Head(spec, layer.shape, backbone.n_classes).eval().requires_grad_(False)
                head.load_state_dict(load_file(path))
                progress.update(n_steps)
            else:
                progress.set_postfix_str(layer.path)
                head = train_head(spec, layer.shape, traffic.activation(layer.path)[rows],
                                  traffic.log_probabilities[rows], recipe, on_step)
                with replacing(path) as scratch:
                    save_file(head.state_dict(), scratch)
            heads.append(head)
    return heads


def _judge_heads(traffic: RecordedTraffic, parts: dict[Part, torch.Tensor], layers: list[CandidateLayer],
                 heads: list[Head], backbone: BackboneDescription) -> tuple[Candidates, Candidates, list[float]]:
    """Calibrate the heads on *tune*; return what they say about *tune* and *certify*, and their temperatures."""
    judged: dict[Part, list[tuple[torch.Tensor, torch.Tensor]]] = {Part.TUNE: [], Part.CERTIFY: []}
    temperatures = []
    for layer, head in zip(layers, heads):
        pooled = traffic.activation(layer.path)
        for part, found in judged.items():
            rows = parts[part]
            logits = head.classify(pooled[rows])
            teacher = traffic.backbone_class[rows]
            if part is Part.TUNE:
                temperatures.append(fit_temperature(logits, teacher))
            policy = ConfidencePolicy(temperatures[-1], NEVER)  # the very formula that will serve
            found.append((policy.confidence(logits), logits.argmax(dim=1) == teacher))
    head_costs = tuple(head_flops(head, pooled_shape(layer.shape, head.spec.pool)) / backbone.flops
                       for layer, head in zip(layers, heads))
    costs = tuple(layer.cost for layer in layers)
    tune, certify = (Candidates(torch.stack([confidence for confidence, _ in found], dim=1),
                                torch.stack([agrees for _, agrees in found], dim=1), costs, head_costs)
                     for found in judged.values())
    return tune, certify, temperatures


def _choose(tune: Candidates, certify: Candidates, options: TrainingOptions) -> Choice:
    if options.thresholds == "paper":
        return paper_choice(tune, options.tolerance)
    if options.thresholds == "equal":
        return equal_choice(tune, options.tolerance)
    path = certified_path(tune, options.tolerance, options.delta, len(certify))
    failures = (int(outcome(choice, certify).differs.sum()) for choice in path)
    deployed = path[walk(failures, len(certify), options.tolerance, options.delta)]
    # Where few may leave, everyone pays for the heads and hardly anyone gains; no exits differ from nothing.
    return deployed if outcome(deployed, tune).cost.mean() < 1 else Choice((), ())


def _plan(choice: Choice, traffic: RecordedTraffic, layers: list[CandidateLayer], heads: list[Head],
          temperatures: list[float], certify: Candidates, backbone: BackboneDescription,
          options: TrainingOptions) -> ExitPlan:
    exits = tuple(
        PlannedExit(layer=layers[index].path, head=heads[index].spec, temperature=temperatures[index],
                    threshold=threshold, cost=layers[index].cost, head_cost=certify.head_costs[index])
        for index, threshold in zip(choice.layers, choice.thresholds))
    certificate = None
    if options.thresholds == "certified":
        k = int(outcome(choice, certify).differs.sum())
        certificate = Certificate(
            risk="disagreement", tolerance=options.tolerance, confidence=options.confidence, n=len(certify), k=k,
            p_value=p_value(k, len(certify), options.tolerance), method="fixed-sequence test, exact binomial",
            window=(traffic.time.min().item(), traffic.time.max().item()))
    return ExitPlan(backbone.sha256, options.thresholds, exits, certificate)
