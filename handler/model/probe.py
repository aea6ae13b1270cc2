"""The answer to a probe: does this version compute the scores that it computed when its archive was made?"""

from __future__ import annotations

from typing import Any

import torch

from early_exit.handler.backbone.scores import score_error
from early_exit.handler.errors import ArchiveError
from early_exit.handler.model.early_exit_model import EarlyExitModel


def answer_probe(model: EarlyExitModel) -> dict[str, Any]:
    """Run the archive's probe through every stage and head, and compare the scores with the stored ones.

    Raises:
        ArchiveError: the scores differ from those that were stored when the archive was made.
    """
    assembly = model.assembly
    with torch.no_grad():
        execution = model.executor.run(assembly.probe_inputs(), 0, torch.ones(1, dtype=torch.bool))
    found, expected = execution.answers.reference[0].cpu(), torch.tensor(assembly.description.probe)
    error, allowed = score_error(found, expected, assembly.description.scores), assembly.max_probe_error
    if error > allowed:
        raise ArchiveError(f"the backbone's scores are off by {error:.1e} from those stored in the archive (allowed "
                           f"with the engine {assembly.engine.name}: {allowed:.0e}): the weights are damaged, or this "
                           "device computes differently")
    exits = [path for path, stage in zip(assembly.layers, assembly.stages) if stage.exit is not None]
    return {"probe": "ok", "relative_error": error, "backbone": assembly.description.sha256, "exits": exits,
            "plan": assembly.plan.digest() if assembly.plan else None}
