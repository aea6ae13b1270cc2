"""A request that needs no input: does this version compute what it computed where it was made?"""

from __future__ import annotations

from typing import Any

import torch

from early_exit.handler.errors import ArchiveError
from early_exit.handler.model import EarlyExitModel
from early_exit.handler.protocol import PROBE_HEADER


def answer_probe(model: EarlyExitModel) -> dict[str, Any]:
    """Run the archive's probe through every stage and head and compare it with the stored scores.

    Raises:
        ArchiveError: the scores are not those that the archive was made with.
    """
    expected = torch.tensor([model.description.probe])
    inputs = tuple(one.to(model.device) for one in model.description.probe_inputs())
    with torch.no_grad():
        answers = model.passes.run(0, inputs, shadow=torch.ones(1, dtype=torch.bool))
    error = (answers.reference.cpu() - expected).abs().max() / expected.abs().max()
    allowed = model.engine.max_probe_error
    if not error <= allowed:  # also catches NaN
        raise ArchiveError(f"the backbone's scores are off by {error:.1e} from those stored in the archive (allowed "
                           f"with the engine {model.engine.name}: {allowed:.0e}): the weights are damaged, or this "
                           "device computes differently")
    exits = [path for path, stage in zip(model.layers, model.stages) if stage.exit is not None]
    return {"probe": "ok", "relative_error": error.item(), "backbone": model.description.sha256, "exits": exits,
            "plan": model.plan.digest() if model.plan else None}


def is_probe(headers: dict[str, str]) -> bool:
    """Tell a probe by the headers of a request, however a proxy spells them."""
    return any(name.lower() == PROBE_HEADER.lower() for name in headers)
