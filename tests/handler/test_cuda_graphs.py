"""CUDA graphs give the answers of the stages. Most of these tests need a GPU; all other tests run without graphs."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.cuda.graphs import Graphed, padded, sizes_up_to
from early_exit.handler.cuda.stages import graphed
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Exit, Stage, run_with_exits
from early_exit.handler.inference.in_flight import InFlightCalls
from early_exit.handler.model.loading import build_model
from early_exit.handler.model.probe import answer_probe
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.skips import needs_gpu

CUDA = torch.device("cuda")
SPEC = HeadSpec(pool=2, widths=(8,))
SIZES = (3, 1, 9, 2, 16, 5, 0, 8, 1, 13)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def stages(device: torch.device | str, shrink_from: int = 1) -> list[Stage]:
    torch.manual_seed(0)
    widths = (3, 8, 8, 8)
    bodies = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(widths)]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)) for _ in bodies]
    for module in [*bodies, *heads]:
        module.to(device).requires_grad_(False)
    exits = [Exit(head.forward, ConfidencePolicy(0.2, 0.6), lambda logits: logits, shrink_from) for head in heads[:-1]]
    last = nn.Sequential(bodies[-1], heads[-1])
    return [*(Stage(lambda x, body=body: (body(x),), exit_) for body, exit_ in zip(bodies, exits)),
            Stage(lambda x: (last(x),))]


def varied(size: int) -> Tensor:
    """Return inputs of varied scale, so that some are easy."""
    return torch.randn(size, 3, 12, 12, device=CUDA) * 8 * torch.rand(size, 1, 1, 1, device=CUDA)


@given(st.integers(1, 5000))
def test_a_batch_takes_a_graph_that_holds_it_and_wastes_less_than_a_fifth_of_it(n_rows: int) -> None:
    assert n_rows <= padded(n_rows) < 1.25 * n_rows
    assert padded(n_rows) == sizes_up_to(n_rows)[-1] and len(sizes_up_to(n_rows)) <= 4 * n_rows.bit_length()


def test_on_a_cpu_the_stages_stay_as_they_are() -> None:
    given_ = stages("cpu")
    assert graphed(given_, torch.device("cpu")) == tuple(given_)


@needs_gpu
@pytest.mark.parametrize("shrink_from", [1, 3, 99])
def test_batches_of_every_size_get_the_same_answers_in_any_order_of_sizes(shrink_from: int) -> None:
    plain, fast = stages(CUDA, shrink_from), graphed(stages(CUDA, shrink_from), CUDA)
    kept = []
    for size in SIZES:
        x = varied(size)
        shadow = torch.rand(size) < 0.3
        seen, also_seen = {}, {}
        expected = run_with_exits((x.clone(),), plain, shadow=shadow, anytime=shadow, observe=seen.__setitem__)
        found = run_with_exits((x.clone(),), fast, shadow=shadow, anytime=shadow, observe=also_seen.__setitem__)
        kept.append((expected, found))
        torch.testing.assert_close(also_seen, seen, rtol=1e-3, atol=1e-3)
    for expected, found in kept:  # compared last: later batches must not change what was returned
        assert found.stages.tolist() == expected.stages.tolist()
        torch.testing.assert_close((found.outputs, found.reference, found.exit_scores),
                                   (expected.outputs, expected.reference, expected.exit_scores), rtol=1e-3, atol=1e-3)
    assert len({stage for expected, _ in kept for stage in expected.stages.tolist()}) == 3


@needs_gpu
def test_requests_that_wait_between_stages_keep_their_rows_while_others_pass() -> None:
    plain, in_flight = stages(CUDA), InFlightCalls([graphed(stages(CUDA), CUDA)])
    waiting, ended = {}, 0
    for round_ in range(12):
        x = torch.randn(1 + round_ % 4, 3, 12, 12, device=CUDA)
        waiting[in_flight.enter((x,), torch.zeros(len(x), dtype=torch.bool))] = x
        for call in in_flight.run_stage():
            x = waiting.pop(call)
            torch.testing.assert_close(call.answers().outputs, run_with_exits((x,), plain).outputs, rtol=1e-3,
                                       atol=1e-3)
            ended += 1
    assert ended > 3


@needs_gpu
def test_a_graph_that_was_made_in_inference_mode_serves_outside_of_it() -> None:
    fast = graphed(stages(CUDA), CUDA)
    x = torch.randn(4, 3, 12, 12, device=CUDA)
    with torch.inference_mode():
        inside = run_with_exits((x,), fast).outputs.clone()
    with torch.no_grad():
        torch.testing.assert_close(run_with_exits((x + 0,), fast).outputs, inside)


@needs_gpu
@torch.no_grad()
def test_a_size_that_is_first_met_under_autocast_computes_like_the_others() -> None:
    layer = nn.Linear(64, 64, device=CUDA)
    function = Graphed(lambda x: (layer(x),), torch.cuda.graph_pool_handle())
    x = torch.randn(4, 64, device=CUDA)
    with torch.autocast("cuda"):
        under_autocast = function(x)[0].clone()
    assert under_autocast.dtype is torch.float32
    torch.testing.assert_close(under_autocast, layer(x))


@needs_gpu
def test_what_cannot_be_captured_is_launched_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    def depends_on_values(x: Tensor) -> tuple[Tensor, ...]:
        return (x * float(x.sum() > 0),)

    function = Graphed(depends_on_values, torch.cuda.graph_pool_handle())
    for _ in range(2):
        torch.testing.assert_close(function(torch.ones(3, 2, device=CUDA)), (torch.ones(3, 2, device=CUDA),))
    assert caplog.text.count("cannot be captured as a CUDA graph") == 1
    assert torch.rand(5, device=CUDA).unique().numel() == 5, "torch is not usable any more"


@needs_gpu
@pytest.mark.parametrize("engine", ["folded", "eager", "bfloat16"])
def test_a_served_model_answers_and_records_on_a_gpu_what_it_does_on_a_cpu(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Backbone.from_module(DigitsResNet().eval(), (1, 8, 8)).save(tmp_path)
    served = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        backbone = load_backbone(tmp_path, device)
        layers = backbone.description.candidates[1:3]
        heads = {layer.path: Head(SPEC, layer.shape, 10).eval() for layer in layers}
        exits = tuple(PlannedExit(layer.path, SPEC, ConfidencePolicy(0.1, 0.3), layer.cost, 0.1) for layer in layers)
        plan = ExitPlan(backbone.description.sha256, "paper", exits, None, engine)
        model = build_model(backbone, plan, heads, engine=engine, sampling_rate=1.0, record_layers=3,
                            record_pool=2).to(device)
        model.prepare(8)
        x = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * torch.arange(7).view(7, 1, 1, 1)
        with torch.inference_mode():
            outputs = model(x.to(device)).cpu()
        [batch] = model.log.take()
        served.append((outputs, batch.answers.stages, batch.answers.reference.cpu(), dict(batch.activations)))
        assert answer_probe(model)["probe"] == "ok"
    tolerance = 0.05 if engine == "bfloat16" else 1e-3
    torch.testing.assert_close(served[1], served[0], rtol=tolerance, atol=tolerance)
