"""Engines that change answers: the change is known, counted, and the same wherever the backbone is cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from early_exit.archiver.packaging.quantize import quantize
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.config import ServingConfig
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import ENGINES, INT8, are_alike
from early_exit.handler.errors import ArchiveError, ConfigError, InputError, PlanError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.model.loading import build_model, load_model
from tests.support.digits import traffic
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.plans import random_exits

LOSSY = ["bfloat16", INT8]


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Return (200, 1, 32, 32) inputs, as the handler makes them from requests."""
    import io

    import numpy as np
    from PIL import Image

    pictures = [np.asarray(Image.open(io.BytesIO(one.body))) for one in traffic(200, seed=40)]
    return (torch.tensor(np.stack(pictures)).unsqueeze(1) / 255 - 0.3) / 0.35


@pytest.fixture(scope="module")
def backbone(digits_backbone: DigitsResNet, digits: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Return a trained backbone with its quantized pieces in the same folder."""
    folder = tmp_path_factory.mktemp("quantized")
    whole = Backbone.from_module(digits_backbone, (1, 32, 32))
    whole.save(folder)
    quantize(whole, (digits[:50],), folder)
    return load_backbone(folder)


@pytest.mark.parametrize("name", LOSSY)
@torch.no_grad()
def test_cutting_changes_nothing_that_the_engine_does_not_change_anyway(name: str, backbone: Backbone,
                                                                       digits: Tensor) -> None:
    engine = ENGINES[name]
    [whole] = engine.unsplit(backbone)(digits)
    agree = (whole.argmax(dim=1) == backbone.graph(digits).argmax(dim=1)).double().mean().item()
    assert agree > 0.95 and whole.dtype is torch.float32
    for n_rows in (1, 3, 8):
        split = build_model(backbone, engine=name, record_layers=100)(digits[:n_rows])
        torch.testing.assert_close(split, whole[:n_rows], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_between_stages_travel_integers_and_heads_read_floats(backbone: Backbone, digits: Tensor) -> None:
    served = build_model(backbone, engine=INT8, record_layers=100)
    exact = build_model(backbone, record_layers=100)
    live, reference, n_integers = (digits,), (digits,), 0
    for number, (stage, same) in enumerate(zip(served.assembly.stages[:-1], exact.assembly.stages[:-1])):
        live, reference = stage.forward(*live), same.forward(*reference)
        n_integers += live[0].dtype is torch.uint8
        read, activation = served.assembly._reads[number](live[0]), reference[0]
        assert read.dtype is torch.float32
        assert (read - activation).abs().mean() < 0.05 * activation.abs().amax()
    assert n_integers >= len(served.assembly.stages) // 2


@pytest.mark.parametrize("name", LOSSY)
@torch.no_grad()
def test_an_items_answer_does_not_depend_on_its_batch(name: str, backbone: Backbone, digits: Tensor) -> None:
    plan, heads = random_exits(backbone, ENGINES[name].identity(backbone.folder), threshold=0.93)
    served = build_model(backbone, plan, heads, engine=name)
    together = served(digits[:16])
    stages = served.log.take()[0].answers.stages
    assert len(set(stages.tolist())) > 1, "rows must leave at several places"
    alone = torch.cat([served(row[None]) for row in digits[:16]])
    assert torch.equal(torch.cat([one.answers.stages for one in served.log.take()]), stages)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", LOSSY)
@torch.no_grad()
def test_shadow_rows_are_compared_with_the_backbone_in_fp32(name: str, backbone: Backbone, digits: Tensor) -> None:
    served = build_model(backbone, engine=name, sampling_rate=1.0, record_layers=3)
    answers = served(digits)
    batch = served.log.take()[0]
    torch.testing.assert_close(batch.answers.reference, backbone.graph(digits), atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.full_class, answers.argmax(dim=1))
    assert not torch.equal(batch.answers.reference, answers)


def test_a_plan_serves_on_the_engine_that_it_was_made_on_and_no_other(backbone: Backbone) -> None:
    int8 = ENGINES[INT8].identity(backbone.folder)
    assert are_alike("folded", "openvino") and are_alike(int8, int8)
    assert not are_alike(int8, INT8 + "@0123456789ab") and not are_alike("folded", "bfloat16")
    for made_on, serves_on in (("folded", INT8), (int8, "folded"), (INT8 + "@0123456789ab", INT8)):
        plan = ExitPlan(backbone.description.sha256, "paper", (), None, made_on)
        with pytest.raises(PlanError, match="made on the engine .* executed by"):
            build_model(backbone, plan, {}, engine=serves_on)


def test_without_quantized_pieces_the_engine_says_how_to_make_them(backbone: Backbone, tmp_path: Path) -> None:
    layout = ArchiveLayout(tmp_path)
    layout.folder.mkdir()
    backbone.save(layout.folder)
    with pytest.raises(ArchiveError, match="found 0: make them with ee-archive --engine openvino-int8 --calibrate"):
        load_model(layout, ServingConfig(engine=INT8))
    with pytest.raises(ConfigError, match="runs on the CPU, but this worker was given cuda:0"):
        load_model(layout, ServingConfig(engine=INT8), "cuda:0")


def test_an_explanation_is_that_of_the_backbone_or_refused(backbone: Backbone, digits: Tensor) -> None:
    rows = digits[:2].clone().requires_grad_()
    (expected,) = torch.autograd.grad(backbone.graph(rows).sum(), rows)
    (found,) = torch.autograd.grad(build_model(backbone, engine=INT8)(rows).sum(), rows)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="gradients, which the engine openvino does not compute"):
        build_model(backbone, engine="openvino")(rows)


@pytest.mark.parametrize("code", ["""
from early_exit.handler.engines.openvino import import_openvino
import_openvino()
assert sys.modules["openvino_telemetry"] is None
assert sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__ == "openvino.tools.ovc.telemetry_stub"
""", """
from early_exit.handler.user_handler.entry_point import import_handler
import_handler("image_classifier")
assert "openvino" not in sys.modules
"""], ids=["the engine", "a handler of TorchServe"])
def test_openvino_is_used_without_its_telemetry(code: str) -> None:
    """By default, OpenVINO reports every import and conversion to its makers.

    The check runs in a process of its own, because another test may have imported OpenVINO into this one.
    """
    subprocess.run([sys.executable, "-c", f"import sys\n{code}"], check=True)
