"""The answer to a probe: does this version compute the scores that it computed when its archive was made?"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from early_exit.handler.backbone.export import ScoresOnly, unwrapped
from early_exit.handler.backbone.scores import score_error
from early_exit.handler.backbone.signature import HALF_PRECISION
from early_exit.handler.errors import ArchiveError
from early_exit.handler.model.early_exit_model import EarlyExitModel

logger = logging.getLogger(__name__)

_MOST_OFF, _MOST_OFF_IN_HALF_PRECISION = 0.01, 0.1
"""How far the scores of the model that a handler loads may be from those of the exported one, relative to the largest.
The handler may choose another precision on another device."""


def require_exported(model: EarlyExitModel, own: nn.Module) -> None:
    """Check that the model which the user's handler has loaded here is the one that was exported.

    What a handler loads may depend on an environment variable, on the configuration, or on a file that is not in the
    archive. The exported model would then answer as if these were as they were when the archive was made.

    Args:
        model: the model that answers.
        own: the model that the handler has loaded.

    Raises:
        ArchiveError: for the archive's probe, its scores are others.
    """
    description, own = model.assembly.description, unwrapped(own)
    if description.detector is not None:  # only a part of it was exported
        return
    first = next(own.parameters(), torch.empty(0))
    key = description.output.key
    called = ScoresOnly(own, [spec.name for spec in description.inputs], description.constants,
                        None if key is None else str(key), lambda spec: None)
    try:
        with torch.no_grad():
            found = called(*(x.to(first.device) for x in model.assembly.probe_inputs())).float().cpu()
        found = found.reshape(len(description.probe))  # of a single row, a model may squeeze the first dimension away
    except Exception as error:  # the user's own model may raise anything, such as for another precision on this device
        logger.warning("the model that the handler has loaded cannot be compared with the exported one: %s: %s",
                       type(error).__name__, error)
        return
    error_found = score_error(found, torch.tensor(description.probe), description.scores)
    if error_found > (_MOST_OFF_IN_HALF_PRECISION if first.dtype in HALF_PRECISION else _MOST_OFF):
        raise ArchiveError(f"the handler has loaded another model than the one that was exported: its scores are off "
                           f"by {error_found:.1e}. Does it depend on an environment variable, on model-config.yaml or "
                           "on a file outside of the archive? Then these must be as they were when ee-archive exported "
                           "it: make the archive again, from your own one, where they are as in service")


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
