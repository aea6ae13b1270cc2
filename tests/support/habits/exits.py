"""Exits whose heads are copies of the layers that follow them, so that an early answer equals the full answer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from torch import nn

from early_exit.handler.archive_contents import read_archive
from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit, save_plan
from early_exit.handler.exits.policy import ConfidencePolicy


def copied_exits(folder: Path, archive: Path, followers: Sequence[Sequence[nn.Linear]],
                 thresholds: Sequence[float]) -> Path:
    """Write a plan for an archive; return its path.

    Args:
        folder: the folder into which the plan is written. It is created.
        archive: an archive that `ee-archive` made.
        followers: for each exit, the linear layers that follow it in the model, with ReLU between them.
        thresholds: for each exit, the confidence threshold.
    """
    description = read_archive(archive).description
    heads: dict[str, Head] = {}
    exits: list[PlannedExit] = []
    for chain, threshold in zip(followers, thresholds):
        layer = _place(description.candidates, chain[0].in_features)
        spec = HeadSpec(pool=None, widths=tuple(linear.out_features for linear in chain[:-1]))
        head = Head(spec, layer.shape, description.n_classes)
        own = [part for part in head.layers if isinstance(part, nn.Linear)]
        for copy, linear in zip(own, chain, strict=True):
            copy.load_state_dict(linear.state_dict())
        heads[layer.path] = head.eval()
        exits.append(PlannedExit(layer.path, spec, ConfidencePolicy(1.0, threshold), layer.cost, 0.01))
    folder.mkdir(parents=True, exist_ok=True)
    save_plan(folder, ExitPlan(description.sha256, "paper", tuple(exits), None), heads)
    return folder / "plan.json"


def _place(candidates: Sequence[CandidateLayer], n_values: int) -> CandidateLayer:
    """Return the last candidate layer with this number of values.

    Candidates are not found by path, because paths depend on what the handler puts around the model.
    """
    places = [layer for layer in candidates if prod(layer.shape) == n_values]
    if not places:
        raise AssertionError(f"no candidate has {n_values} values, found "
                             f"{[(layer.path, layer.shape) for layer in candidates]}")
    return places[-1]
