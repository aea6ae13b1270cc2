"""Tells what is in an early-exit archive."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from early_exit.handler.archive_layout import DESCRIPTION_FILE, ArchiveLayout, extract
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import ArchiveError
from early_exit.handler.exits.plan import ExitPlan, load_plan
from early_exit.training.data.preprocessing import archived_config


def describe(mar: Path) -> dict[str, Any]:
    """Return the contents of an archive as JSON-ready data.

    Raises:
        ArchiveError: it is not an early-exit archive.
    """
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        extract(mar, layout.root)
        if not layout.original_manifest.exists():
            raise ArchiveError(f"{mar} is not an early-exit archive: make one with 'ee-archive {mar}'")
        manifest = json.loads(layout.manifest.read_text())["model"]
        backbone = BackboneDescription.load(layout.folder / DESCRIPTION_FILE)
        plan: ExitPlan | None = load_plan(layout.plan)[0] if layout.plan.exists() else None
        config = archived_config(layout)
        serving = ServingConfig.from_model_config(config)
        return {
            "model": manifest["modelName"],
            "version": manifest["modelVersion"],
            "bytes": mar.stat().st_size,
            "workers": config.get("minWorkers"),
            "engine": serving.engine,
            "answers": serving.answers,
            "handler": json.loads(layout.original_manifest.read_text())["model"]["handler"],
            "backbone": {
                "sha256": backbone.sha256, "input_shape": backbone.input_shape,
                "inputs": [one.__dict__ for one in backbone.inputs], "n_classes": backbone.n_classes,
                "scores": backbone.scores.value, "flops": backbone.flops,
                "candidates": [layer.to_json() for layer in backbone.candidates],
                "left_out": [layer.__dict__ for layer in backbone.left_out],
            },
            "plan": plan.to_json() if plan else None,
            "plan_digest": plan.digest() if plan else None,
        }


def sample_request(mar: Path) -> bytes | None:
    """Return the body of a request that the archive's handler answers, where one is known."""
    with zipfile.ZipFile(mar) as archive:
        sample = str(ArchiveLayout(Path()).sample_request)
        return archive.read(sample) if sample in archive.namelist() else None


def in_words(mar: Path) -> str:
    """Return the contents of an archive for a reader.

    Raises:
        ArchiveError: it is not an early-exit archive.
    """
    found = describe(mar)
    backbone, plan = found["backbone"], found["plan"]
    exits = {planned["layer"]: planned for planned in (plan["exits"] if plan else ())}
    lines = [
        f"{mar}  {found['bytes'] / 1e6:.1f} MB  {len(exits)} exits of {len(backbone['candidates'])} candidates",
        f"  model {found['model']} {found['version']}  handler {found['handler']}  input "
        f"{' '.join('x'.join(map(str, one['shape'])) for one in backbone['inputs'])}  {backbone['n_classes']} classes  "
        f"{backbone['flops'] / 1e6:.1f} MFLOPs  engine {found['engine']}  backbone {backbone['sha256'][:12]}",
    ]
    width = max(len(layer["path"]) for layer in [*backbone["candidates"], *backbone["left_out"]])
    for layer in backbone["candidates"]:
        planned = exits.get(layer["path"])
        role = f"exits at confidence {planned['threshold']:.4f}" if planned else "candidate"
        lines.append(f"    {layer['path']:{width}}  cost {layer['cost']:.2f}  {role}")
    lines += [f"    {layer['path']:{width}}  left out: {layer['reason']}" for layer in backbone["left_out"]]
    if plan and plan["certificate"]:
        lines.append("  " + ExitPlan.from_json(plan, str(mar)).certificate.in_words())  # type: ignore[union-attr]
    return "\n".join(lines)
