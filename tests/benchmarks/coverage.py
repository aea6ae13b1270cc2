"""Which classifiers the project can take without code of their own: one line per model, with random weights.

    python -m tests.benchmarks.coverage --json FILE [--families torchvision timm hf] [--models NAME ...]

A model is ok if it can be exported, has at least two candidate layers, a head at every candidate layer gives one row of
logits per item, its probe notices overwritten weights, and its stages in a chain give the model's own answers to 1e-4.
Overwritten weights that change no scores of a batch are left out: some random weights make no difference. The stages
are compared at batches of 1, 3 and 8, both as exported and as served from an archive: written, read again, and run on
the default engine. A run that was stopped continues with the models that FILE does not have yet, if the code is the
same.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.graph import split
from early_exit.handler.errors import GraphError
from early_exit.handler.exits.head import Head, HeadSpec
from tests.benchmarks.report import conditions, save
from tests.support.damage import unnoticed_damage
from tests.support.zoo import FAMILIES, Specimen

BATCHES = (1, 3, 8)
TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description="Which classifiers go through the project with no code.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--models", nargs="*", help="only these")
    options = parser.parse_args()
    run = conditions(vars(options))
    models = earlier(options.json, run)
    done = {(one["family"], one["model"]) for one in models}
    for family in options.families:
        for specimen in FAMILIES[family]():
            if (family, specimen.name) in done or (options.models and specimen.name not in options.models):
                continue
            found = {"family": family, "model": specimen.name, **examine(specimen)}
            models.append(found)
            print(in_words(found), flush=True)
            save(options.json, run, summary(models))
            gc.collect()
    print(json.dumps({key: value for key, value in summary(models).items() if key != "models"}))
    return 0


def earlier(file: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the models of a run that was stopped. Return none if that run had other code, so that no table mixes two.

    A run whose files differ from the commit begins anew, because these files may have changed since.
    """
    if not file.exists() or not run["commit"] or run["commit"].endswith("+"):
        return []
    told = json.loads(file.read_text())
    same = all(told.get("run", {}).get(name) == run[name] for name in ("commit", "torch", "processor"))
    models: list[dict[str, Any]] = told["models"] if same else []
    return models


@torch.no_grad()
def examine(specimen: Specimen) -> dict[str, Any]:
    """Export a model and compare its stages with it.

    Returns:
        ok, candidates, max_error (of the scores, relative where they exceed 1), served_error (the same for the model as
        it is served from an archive), unnoticed_damage (names of overwritten weights that the probe does not notice),
        the engine, seconds (for the export and the search for candidate layers), and a reason if it is not ok.
    """
    torch.manual_seed(0)
    model = as_trained(specimen.make().eval())
    started = time.perf_counter()
    try:
        backbone = specimen.export(model)
    except GraphError as refusal:
        return {"ok": False, "candidates": 0, "max_error": None, "served_error": None,
                "seconds": round(time.perf_counter() - started, 1), "reason": str(refusal)[:600]}
    seconds = time.perf_counter() - started
    layers = backbone.description.candidates
    stages = split(backbone.graph, [layer.node for layer in layers])
    served = specimen.served(backbone)
    error = served_error = 0.0
    for size in BATCHES:
        inputs = specimen.batch(size)
        expected = specimen.scores(model, inputs)
        live: tuple[Tensor, ...] = tuple(inputs.values())
        for stage, layer in zip(stages, [*layers, None]):
            live = stage(*live)
            if layer is not None:
                logits = Head(HeadSpec(), layer.shape, backbone.description.n_classes)(live[0])
                if logits.shape != expected.shape:
                    raise AssertionError(f"a head at {layer.path} gives {tuple(logits.shape)} for {size} items")
        error = max(error, relative_error(live[0], expected))
        served_error = max(served_error, relative_error(specimen.scores(served, inputs), expected))
    allowed = served.assembly.max_probe_error
    batch = tuple(specimen.batch(BATCHES[-1]).values())
    unnoticed = {name for one in (backbone, backbone.probed_by(tuple(specimen.batch(1).values())))
                 for name in unnoticed_damage(one, allowed, batch)}
    reason = "" if len(layers) >= 2 else "; ".join(f"{one.path}: {one.reason}" for one in backbone.description.left_out)
    ok = len(layers) >= 2 and max(error, served_error) <= TOLERANCE and not unnoticed
    return {"ok": ok, "candidates": len(layers), "max_error": error, "served_error": served_error,
            "unnoticed_damage": sorted(unnoticed), "engine": served.assembly.engine.name, "seconds": round(seconds, 1),
            **({"reason": reason[:600]} if reason else {})}


def as_trained(model: nn.Module) -> nn.Module:
    """Set normalisation weights that are all zero to one, and return the model.

    Some libraries begin with zeros, so that a branch makes no difference at first. No trained model has them.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and not weight.any():
            nn.init.ones_(weight)
    return model


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def summary(models: Iterable[dict[str, Any]]) -> dict[str, Any]:
    models = list(models)
    counts = {f"{family}_ok": sum(one["ok"] for one in models if one["family"] == family) for family in FAMILIES}
    return {**counts, "total": len(models), "models": models}


def in_words(found: dict[str, Any]) -> str:
    error = "-" if found["max_error"] is None else f"{found['max_error']:.1e} / {found['served_error']:.1e} served"
    verdict = "ok" if found["ok"] else "NO"
    return (f"{found['family']:12}{found['model']:40}{verdict:4}{found['candidates']:4} candidates"
            f"  error {error:24}{found['seconds']:7.1f} s  {found.get('reason', '')}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
