"""Describes the contents of an early-exit archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from early_exit.handler.archive_contents import ArchiveContents, read_archive
from early_exit.handler.config import ServingConfig
from early_exit.training.data.traffic import OTHER_TRAFFIC, is_of_other_traffic
from early_exit.training.text_files import parse_yaml


def describe(mar: Path) -> dict[str, Any]:
    """Return the contents of an archive as JSON-ready data.

    Raises:
        ArchiveError: the file is not an early-exit archive.
        PlanError: the archive's plan cannot be read.
    """
    return _as_data(mar, read_archive(mar))


def _as_data(mar: Path, contents: ArchiveContents) -> dict[str, Any]:
    backbone, plan = contents.description, contents.plan
    configuration = parse_yaml(contents.configuration, f"model-config.yaml in {mar}") or {}
    serving = ServingConfig.from_model_config(configuration)
    return {
        "model": contents.model,
        "version": contents.version,
        "bytes": mar.stat().st_size,
        "workers": configuration.get("minWorkers"),
        "engine": serving.engine,
        "answers": serving.answers,
        "handler": contents.original_manifest["model"]["handler"],
        "samples": len(contents.samples),
        "compared": contents.is_compared,
        "backbone": {
            "sha256": backbone.sha256, "input_shape": backbone.input_shape,
            "inputs": [spec.__dict__ for spec in backbone.inputs], "n_classes": backbone.n_classes,
            "scores": backbone.scores.value, "flops": backbone.flops,
            "candidates": [layer.to_json() for layer in backbone.candidates],
            "left_out": [layer.__dict__ for layer in backbone.left_out],
        },
        "plan": plan.to_json() if plan else None,
        "plan_digest": plan.digest() if plan else None,
    }


def in_words(mar: Path) -> str:
    """Return the contents of an archive for a reader.

    Raises:
        ArchiveError: the file is not an early-exit archive.
        PlanError: the archive's plan cannot be read.
    """
    archive = read_archive(mar)
    contents, plan = _as_data(mar, archive), archive.plan
    backbone = contents["backbone"]
    exits = {planned.layer: planned for planned in (plan.exits if plan else ())}
    lines = [
        f"{mar}  {contents['bytes'] / 1e6:.1f} MB  {len(exits)} exits of {len(backbone['candidates'])} candidates",
        f"  model {contents['model']} {contents['version']}  handler {contents['handler']}  input "
        f"{' '.join('x'.join(map(str, spec['shape'])) for spec in backbone['inputs'])}  {backbone['n_classes']} "
        f"classes  {backbone['flops'] / 1e6:.1f} MFLOPs  engine {contents['engine']}  backbone "
        f"{backbone['sha256'][:12]}",
        "  without exits it answers as the original did" if contents["compared"] else
        "  its answers have not been compared with the original's",
    ]
    width = max(len(layer["path"]) for layer in [*backbone["candidates"], *backbone["left_out"]])
    for layer in backbone["candidates"]:
        planned = exits.get(layer["path"])
        role = f"exits at confidence {planned.threshold:.4f}" if planned else "candidate"
        lines.append(f"    {layer['path']:{width}}  cost {layer['cost']:.2f}  {role}")
    lines += [f"    {layer['path']:{width}}  left out: {layer['reason']}" for layer in backbone["left_out"]]
    if plan and plan.certificate:
        lines.append("  " + (OTHER_TRAFFIC if is_of_other_traffic(archive) else plan.certificate.in_words()))
    return "\n".join(lines)
