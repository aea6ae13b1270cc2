"""Plans that are made by hand, for tests that need exits but no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.archive_contents import read_archive
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit, save_plan
from early_exit.handler.exits.policy import ConfidencePolicy


def write_plan(folder: Path, archive: Path, *, threshold: float = 0.5, backbone: str | None = None,
               certificate: Certificate | None = None, which: slice = slice(None, None, 2)) -> Path:
    """Write a plan with untrained heads at some candidate layers of an archive, by default every second one; return its
    path."""
    description = read_archive(archive).description
    torch.manual_seed(0)
    layers = description.candidates[which]
    heads = {layer.path: Head(HeadSpec(widths=()), layer.shape, description.n_classes) for layer in layers}
    exits = tuple(PlannedExit(layer.path, HeadSpec(widths=()), ConfidencePolicy(0.2, threshold), layer.cost, 0.01)
                  for layer in layers)
    folder.mkdir(parents=True, exist_ok=True)
    save_plan(folder, ExitPlan(backbone or description.sha256, "certified" if certificate else "paper", exits,
                               certificate), heads)
    return folder / "plan.json"


def random_exits(backbone: Backbone, engine: str = "folded", *,
                 threshold: float = 0.55) -> tuple[ExitPlan, dict[str, Head]]:
    """Return a plan with untrained heads whose confidence differs widely between inputs."""
    torch.manual_seed(1)
    layers = backbone.description.candidates[1:-1:2]
    spec = HeadSpec(pool=2, widths=())
    heads = {layer.path: Head(spec, layer.shape, backbone.description.n_classes).eval() for layer in layers}
    exits = tuple(PlannedExit(layer.path, spec, ConfidencePolicy(0.1, threshold), layer.cost, 0.01) for layer in layers)
    return ExitPlan(backbone.description.sha256, "paper", exits, None, engine), heads


@torch.no_grad()
def thirds(backbone: Backbone, layers: Sequence[str], inputs: Tensor) -> tuple[ExitPlan, dict[str, Head]]:
    """Return a plan with two untrained heads. One third of the inputs leaves at each, and one third does not leave."""
    torch.manual_seed(0)
    spec = HeadSpec(pool=2, widths=())
    found = [backbone.description.layer(path) for path in layers]
    heads = {layer.path: Head(spec, layer.shape, backbone.description.n_classes).eval() for layer in found}
    live, waits, exits = (inputs,), torch.ones(len(inputs), dtype=torch.bool), []
    for layer, stage in zip(found, split(backbone.graph, [layer.node for layer in found])):
        live = stage(*live)
        logits = heads[layer.path](live[0])
        temperature = logits.std().item()  # so that no two confidences are rounded to 1
        confidence = ConfidencePolicy(temperature, 0.0).confidence(logits)
        last, first = confidence[waits].sort(descending=True).values[len(inputs) // 3 - 1:len(inputs) // 3 + 1].tolist()
        exits.append(PlannedExit(layer.path, spec, ConfidencePolicy(temperature, (last + first) / 2), layer.cost, 0.01))
        waits &= confidence < exits[-1].threshold
    return ExitPlan(backbone.description.sha256, "paper", tuple(exits), None), heads
