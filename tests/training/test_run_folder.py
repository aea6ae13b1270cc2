"""Only the user who starts a run can read what the run keeps of the records."""

from __future__ import annotations

from pathlib import Path

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.training.data.shards import find_shards
from early_exit.training.data.sources import local_folders
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.search import Search
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.support.foreign import open_to_others, open_umask
from tests.support.recording import record
from tests.support.residual import recorded_inputs

OPTIONS = TrainingOptions(tolerance=0.2, thresholds="equal", measure="flops", layers=1, search=Search(trials=1),
                          recipe=Distillation(epochs=10))


def test_whatever_the_umask_a_run_and_the_records_are_private_up_to_the_first_folder_that_was_made(
        backbone: Backbone, archive: ArchiveLayout, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    run = RunPaths(tmp_path / "runs" / "first")
    with open_umask():
        record(backbone, recorded_inputs()[:1500], tmp_path / "records")
        shards = find_shards(local_folders([f"file://{tmp_path / 'records'}"], run.remote), "model",
                             backbone.description)
        assert all(shard.is_relative_to(run.remote) for shard in shards), "copies"
        train("model", archive, shards, OPTIONS, run)
    assert run.plan.exists() and run.trials("0").parent.exists() and list(run.training_set.root.glob("*.npy"))
    assert open_to_others(tmp_path) == []
