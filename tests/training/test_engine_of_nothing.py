"""An engine is added in one place: an engine that is registered here can be planned with and served."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.config import ServingConfig
from early_exit.handler.engines.compiled_stage import CompiledStage
from early_exit.handler.engines.registry import ENGINES, Engine, engine_of
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.plan import build_heads, load_plan, save_plan
from early_exit.handler.model.loading import load_model
from early_exit.handler.protocol import FULL
from early_exit.training.data.shards import find_shards
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.support.residual import recorded_inputs

NOTHING = "nothing"


class CountedStage(nn.Module):
    """A stage as it was exported, which counts its calls."""

    def __init__(self, stage: fx.GraphModule, calls: Counter[int], number: int) -> None:
        super().__init__()
        self._stage, self._calls, self._number = stage, calls, number

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        self._calls[self._number] += 1
        outputs: tuple[Tensor, ...] = self._stage(*live)
        return outputs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Register the engine for one test; return how often each of its stages was called, by stage number."""
    counted: Counter[int] = Counter()

    def compile_nothing(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
        return [CompiledStage(CountedStage(stage, counted, number))
                for number, stage in enumerate(split(backbone.graph, boundaries))]

    monkeypatch.setitem(ENGINES, NOTHING, Engine(NOTHING, compile_nothing, is_exact=True, max_probe_error=1e-3))
    return counted


def test_an_engine_that_registers_itself_is_planned_with_and_served(
        calls: Counter[int], backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    options = TrainingOptions(tolerance=0.05, measure="seconds", batch_size=4, search=None, engine=NOTHING,
                              recipe=Distillation(epochs=3))
    train("model", archive, find_shards(records, "model", backbone.description), options, run)
    assert calls, "its stages are what was timed"
    plan, tensors = load_plan(run.plan)
    assert plan.engine == NOTHING and plan.measure == "seconds"
    layout = ArchiveLayout(tmp_path / "archive")
    shutil.copytree(archive.folder, layout.folder)
    save_plan(layout.folder, plan, build_heads(plan, tensors, backbone.description))
    model = load_model(layout, ServingConfig(engine=NOTHING, control_rate=0))
    calls.clear()
    batch = recorded_inputs()[:64]
    with torch.no_grad():
        scores, expected = model(batch), backbone.graph(batch)
    assert calls[0] == 1, "its stages are what served"
    stays = model.log.take()[0].answers.stages == FULL
    assert stays.any()
    torch.testing.assert_close(scores[stays], expected[stays])
    assert model.assembly.engine_identity == NOTHING


def test_without_it_nobody_knows_it() -> None:
    with pytest.raises(ConfigError, match="engine.*expected one of folded, .* found 'nothing'"):
        ServingConfig(engine=NOTHING)
    with pytest.raises(ConfigError, match="expected one of the engines folded, .* found 'nothing@12ab'"):
        engine_of(NOTHING + "@12ab")
