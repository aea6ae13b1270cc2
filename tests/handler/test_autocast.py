"""A handler's autocast around the call of its model lowers the precision of the model, but not that of exit heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.pooling import pool_activation
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.model.loading import build_model
from tests.support.forwards import Plain

LOWERED = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(Plain().eval(), (3, 8, 8))


def one_exit(backbone: Backbone, pool: int | None, temperature: float, engine: str) -> tuple[ExitPlan, Head]:
    layer, spec = backbone.description.candidates[0], HeadSpec(pool=pool, widths=(16,))
    torch.manual_seed(1)
    exit_ = PlannedExit(layer.path, spec, ConfidencePolicy(temperature, 0.8), layer.cost, 0.01)
    return ExitPlan(backbone.description.sha256, "paper", (exit_,), None, engine), Head(spec, layer.shape, 5).eval()


@pytest.mark.parametrize("dtype", LOWERED)
@pytest.mark.parametrize(("pool", "temperature"), [(2, 0.02), (None, 0.1)])
@pytest.mark.parametrize("engine", ["folded", "eager", "bfloat16"])
@torch.no_grad()
def test_heads_decide_and_records_are_made_in_float32(
        backbone: Backbone, engine: str, pool: int | None, temperature: float, dtype: torch.dtype) -> None:
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    plan, head = one_exit(backbone, pool, temperature, engine)
    [planned] = plan.exits
    model = build_model(backbone, plan, {planned.layer: head}, engine=engine, sampling_rate=1.0, record_layers=2,
                        record_pool=2, anytime=True)
    with torch.autocast("cpu", dtype=dtype):
        model(images)
        handed_on: Tensor = model.assembly.stages[0].forward(images)[0]
    served = model.log.take()[0]
    assert handed_on.dtype is dtype, "the model itself computes as the handler wants"
    logits = head(handed_on.float())
    leaves = planned.policy(logits)
    assert 0 < leaves.sum() < 64, "some rows must leave"
    assert torch.equal(served.answers.stages == 0, leaves)
    torch.testing.assert_close(served.answers.exit_scores[0], planned.policy.answers(logits), atol=1e-4, rtol=1e-5)
    recorded = served.activations[model.assembly.layers[0]]
    torch.testing.assert_close(recorded, pool_activation(handed_on.float(), 2).half(), atol=0, rtol=1e-3)


@torch.no_grad()
def test_the_reference_of_a_lossy_engine_is_computed_in_float32(backbone: Backbone) -> None:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model = build_model(backbone, engine="bfloat16", sampling_rate=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images)
    [served] = model.log.take()
    torch.testing.assert_close(served.answers.reference, backbone.graph(images))
