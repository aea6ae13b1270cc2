"""The model of an archive in this process, as a worker loads it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import load_model
from early_exit.training.data.preprocessing import archived_config


def served_model(mar: Path) -> EarlyExitModel:
    """Load the model of an early-exit archive, without records and without control batches, which take no exits."""
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        extract(mar, layout.root)
        engine = ServingConfig.from_model_config(archived_config(layout)).engine
        return load_model(layout, ServingConfig(engine=engine, control_rate=0))
