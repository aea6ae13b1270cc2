"""Records from which heads learn little: no plan uses a head that is no better than chance or was never evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import RecordError
from early_exit.handler.exits.head import HeadSpec
from early_exit.training.data.shards import find_shards
from early_exit.training.data.split import SplitRule
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.space import SearchSpace
from early_exit.training.options import Rule, TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.selection.thresholds import least_agreeing
from tests.support.recording import record

OPTIONS = TrainingOptions(tolerance=0.05, measure="flops", search=None, recipe=Distillation(epochs=10))


def test_heads_that_are_not_better_than_chance_are_left_out_with_a_word_though_nothing_was_searched(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    first, second, *_ = (layer.path for layer in backbone.description.candidates)
    learned_nothing = replace(OPTIONS, recipe=Distillation(epochs=1, learning_rate=1e-9))
    given = SearchSpace(heads={second: HeadSpec(widths=(4,))})
    with pytest.raises(RecordError, match=f"no layer has a head .*: {first}: its head .* than chance; {second}: its"):
        train("model", archive, shards, replace(learned_nothing, space=given), RunPaths(tmp_path / "run"))
    run = RunPaths(tmp_path / "other")
    train("model", archive, shards, OPTIONS, run)
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(run.head(first)).items()}, run.head(first))
    report = train("model", archive, shards, OPTIONS, run)
    assert report.left_out == (f"{first}: its head is not better than chance",)
    assert [head.layer for head in report.heads] == [layer.path for layer in backbone.description.candidates][1:]


@pytest.mark.parametrize("rule", ["certified", "paper", "equal"])
@pytest.mark.parametrize("n_files", [1, 3])
def test_a_load_test_with_few_files_makes_no_plan_by_which_everything_leaves(
        n_files: int, rule: Rule, backbone: Backbone, archive: ArchiveLayout, tmp_path: Path) -> None:
    """With one file, no head learns to tell classes apart. With three files, no threshold is below the lowest
    confidence at which its head agreed with the backbone."""
    candidates = torch.randn(50, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        classes = backbone.graph(candidates).argmax(dim=1)
    files = torch.stack([candidates[classes == label][0] for label in classes.unique()[:n_files]])
    assert len(files) == n_files
    record(backbone, files.repeat(1200 // n_files, 1), tmp_path / "records")
    shards = find_shards(tmp_path / "records", "model", backbone.description)
    run = RunPaths(tmp_path / "run")
    with pytest.raises(RecordError, match="new scenes or contents|too few to split"):
        train("model", archive, shards, replace(OPTIONS, thresholds=rule), RunPaths(tmp_path / "in time"))
    options = replace(OPTIONS, thresholds=rule, split=SplitRule.RANDOM)  # takes all records for independent
    if n_files == 1:
        with pytest.raises(RecordError, match="no layer has a head that is better than chance"):
            train("model", archive, shards, options, run)
        return
    plan = train("model", archive, shards, options, run).plan
    thresholds = [planned.threshold for planned in plan.exits]
    predictions = HeadPredictions.load(run.predictions)
    tune = predictions.tune.candidates
    for setting in (thresholds, *plan.safer):
        for planned, threshold in zip(plan.exits, setting, strict=True):
            layer = predictions.layers.index(planned.layer)
            assert threshold >= least_agreeing(tune.confidence[:, layer], tune.agrees[:, layer]) - 1e-6 > 0.25
