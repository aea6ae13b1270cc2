"""The model of an archive in this process, as a worker loads it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import load_model
from early_exit.training.data.preprocessing import archived_config

TIMED = {"threads_of_model_times": 1, "control_rate_of_model_times": 0.0}
"""How models are timed: with one thread, and without the control batches of a worker, which take no exits."""


def served_model(mar: Path) -> EarlyExitModel:
    """Load the model of an early-exit archive, without records and without control batches."""
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        extract(mar, layout.root)
        engine = ServingConfig.from_model_config(archived_config(layout)).engine
        return load_model(layout, ServingConfig(engine=engine, control_rate=TIMED["control_rate_of_model_times"]))


def as_in_service(model: EarlyExitModel) -> Callable[[Tensor], Tensor]:
    """Return a function that answers each batch in a new call of the handler, as a worker does.

    Otherwise the log of the model's calls, and the time to search it, would grow with every batch.
    """
    def answer(batch: Tensor) -> Tensor:
        model.log.begin()
        scores: Tensor = model(batch)
        return scores

    return answer
