"""A detector with exits: full answers are the detector's own, and an early answer is a class without a box."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN, keypointrcnn_resnet50_fpn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from early_exit.archiver.packaging.sources.detector import backbone_of_detector, is_detector
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.detector_tails import TAILS
from early_exit.handler.backbone.image_class import CERTAIN, Strategy, class_scores
from early_exit.handler.call import Call
from early_exit.handler.detection.detections import with_nulls
from early_exit.handler.detection.detector import images_of
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.errors import ArchiveError, ConfigError, GraphError
from early_exit.handler.inference.in_flight import InFlightCalls
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import EXIT_HEADER, FULL, FULL_NAME
from tests.support.detector import images, one_exit, sure_detector
from tests.support.host import worker_of
from tests.support.models.small_detector import SmallDetector
from tests.support.original import MODELS

SHAPE = (3, 90, 128)
"""The detector scales such images to 96 x 136 and pads them to 96 x 160."""
Detected = dict[str, Tensor]


@pytest.fixture(scope="module")
def detector() -> SmallDetector:
    return sure_detector()


@pytest.fixture(scope="module")
def backbone(detector: SmallDetector) -> Backbone:
    return backbone_of_detector(detector, SHAPE, None, 1, "small_detector.py")


def require_same(found: Detected, expected: Detected, tolerance: float = 1e-3) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("engine", ["eager", "folded"])
@torch.no_grad()
def test_without_exits_all_detections_are_the_detectors_own(detector: SmallDetector, backbone: Backbone,
                                                           engine: str) -> None:
    served = build_model(backbone, engine=engine, record_layers=100)
    assert len(served.assembly.layers) >= 2, "cut where several maps travel"
    for count in (1, 3):
        batch = images(count, SHAPE)
        expected = detector(list(batch))
        assert all(len(one["boxes"]) for one in expected)
        for found, own in zip(served(batch), expected):
            require_same(found, own)
    assert len(backbone.description.candidates) + len(backbone.description.left_out) >= 11, "stages are looked into"


@pytest.mark.slow
@torch.no_grad()
def test_the_detector_that_torchvision_has_coco_weights_for_is_cut_too() -> None:
    """The detector's batch norms are frozen, and their epsilon becomes 0 when the weights are loaded."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    detector = MaskRCNN(body, num_classes=91, min_size=96, max_size=128, rpn_post_nms_top_n_test=50,
                        box_detections_per_img=5).eval()
    overwrite_eps(detector, 0.0)
    frozen = [one for one in detector.modules() if isinstance(one, FrozenBatchNorm2d)]
    assert len(frozen) == 53
    for one in frozen:
        for values in (one.weight, one.running_var):
            values.uniform_(0.4, 0.6)
        one.running_mean.normal_(0.0, 0.1)
    detector.roi_heads.box_predictor.cls_score.weight *= 30
    found = backbone_of_detector(detector, SHAPE, None, 1, "coco.py")
    served, batch = build_model(found, record_layers=100), images(2, SHAPE)
    expected = detector(list(batch))
    assert len(served.assembly.layers) >= 2 and all(len(one["boxes"]) for one in expected)
    for one, own in zip(served(batch), expected):
        require_same(one, own)


@torch.no_grad()
def test_who_leaves_early_gets_a_class_and_the_others_their_own_boxes(detector: SmallDetector,
                                                                     backbone: Backbone) -> None:
    plan, heads = one_exit(backbone, threshold=0.8)
    served = build_model(backbone, plan, heads, sampling_rate=0.3)
    batch = images(24, SHAPE)
    expected = detector(list(batch))
    found = served(batch)
    stages = served.log.take()[0].answers.stages.tolist()
    assert 0 < stages.count(FULL) < len(batch), "some leave and some stay"
    for stage, one, own in zip(stages, found, expected):
        if stage == FULL:
            require_same(one, own)
        else:
            assert one["boxes"].isnan().all() and one["masks"].isnan().all() and (one["scores"] >= CERTAIN).all()
            assert len(one["labels"]) == len(one["scores"]) == len(one["boxes"]) == len(one["masks"]) <= 1


@torch.no_grad()
def test_stage_by_stage_boxes_stay_with_their_images(backbone: Backbone) -> None:
    plan, heads = one_exit(backbone, threshold=0.8)
    served = build_model(backbone, plan, heads)
    in_flight = InFlightCalls([served.assembly.stages])
    calls = [images(count, SHAPE, seed=count) for count in (3, 1, 4)]
    in_order = []
    for batch in calls:
        in_order.append(in_flight.enter((batch,), torch.zeros(len(batch), dtype=torch.bool)))
        in_flight.run_stage()
    while any(call.n_travelling for call in in_order):
        in_flight.run_stage()
    spec = backbone.description.detector
    assert spec is not None
    for batch, call in zip(calls, in_order):
        answers = call.answers()
        found = images_of(spec, answers.outputs, answers.stages.tolist(), next(iter(answers.beside), None))
        for one, expected in zip(found, served(batch)):
            for name, value in expected.items():
                torch.testing.assert_close(one[name], value, atol=1e-3, rtol=1e-3, equal_nan=True)


@torch.no_grad()
def test_an_archived_detector_is_made_of_its_model_file_and_its_weights(
        backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build_model(backbone)(images(2, SHAPE))
    folder = tmp_path / "early_exit"
    folder.mkdir()
    backbone.save(folder)
    source = (MODELS / "small_detector.py").read_text()
    (tmp_path / "small_detector.py").write_text(source)
    assert backbone.description.detector is not None
    tail = backbone.description.detector.tail
    monkeypatch.delitem(TAILS, tail)  # another process would not have it
    for found, own in zip(build_model(load_backbone(folder))(images(2, SHAPE)), expected):
        require_same(found, own, 1e-5)
    del TAILS[tail]
    (tmp_path / "small_detector.py").write_text(source.replace("box_detections_per_img=5", "box_score_thresh=0.2"))
    with pytest.raises(ArchiveError, match="not the file that the archive was made with"):
        load_backbone(folder)
    (tmp_path / "small_detector.py").write_text(source.replace("num_classes=4", "num_classes=5"))
    with pytest.raises(ArchiveError, match="cannot create the detector of small_detector.py: RuntimeError"):
        load_backbone(folder)


@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0.05, 1.0)), max_size=6), st.sampled_from(Strategy))
def test_the_class_of_an_image_is_that_of_the_strategy(found: list[tuple[int, float]], strategy: Strategy) -> None:
    labels = torch.tensor([label for label, _ in found], dtype=torch.int64)
    scores = torch.tensor([score for _, score in found], dtype=torch.float64)
    classes = class_scores(labels, scores, 4, strategy, pedestrian=2)
    assert classes.sum().item() == pytest.approx(1) and (classes >= 0).all()
    certain = [(label, score) for label, score in found if score >= CERTAIN]
    best = max(found, key=lambda one: one[1], default=(0, 0.0))
    if strategy is Strategy.PEDESTRIAN:
        assert classes[1].item() == pytest.approx(max((score for label, score in found if label == 2), default=0.0))
    elif not certain:
        assert classes.argmax() == 0 or best[1] == pytest.approx(CERTAIN)
    elif strategy is Strategy.OBJECT:
        assert classes[best[0]] == classes.amax()
    else:
        sums = [sum(score for label, score in certain if label == one) for one in (1, 2, 3)]
        assert classes[1:].tolist() == pytest.approx([one / (sum(sums) + 1 - best[1]) for one in sums])


def test_a_pedestrian_is_answered_with_the_label_of_pedestrians(detector: SmallDetector) -> None:
    backbone = backbone_of_detector(detector, SHAPE, Strategy.PEDESTRIAN, 3, "small_detector.py")
    assert backbone.description.n_classes == 2
    plan, heads = one_exit(backbone, threshold=0.0)
    labels = [one["labels"].tolist() for one in build_model(backbone, plan, heads)(images(24, SHAPE))]
    assert {tuple(one) for one in labels} <= {(), (3,)}
    with pytest.raises(GraphError, match="has the labels 1 to 3, found 4"):
        backbone_of_detector(detector, SHAPE, Strategy.PEDESTRIAN, 4, "small_detector.py")


def test_what_is_no_such_detector_is_refused_with_what_is(backbone: Backbone) -> None:
    assert is_detector(SmallDetector()) and not is_detector(resnet18())
    with pytest.raises(GraphError, match="finds keypoints: expected a Faster R-CNN or a Mask R-CNN"):
        backbone_of_detector(keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None), SHAPE, None, 1, "x.py")
    with pytest.raises(GraphError, match="pass --input-shape"):
        backbone_of_detector(SmallDetector(), None, None, 1, "x.py")
    with pytest.raises(ConfigError, match="needs the engine folded or eager"):
        build_model(backbone, engine="openvino")


class Thresholding(SmallDetector):
    """A detector whose own forward keeps only some objects."""

    def forward(self, images: list[Tensor], targets: None = None) -> list[Detected]:  # type: ignore[override]
        return [{name: value[found["scores"] > 0.9] for name, value in found.items()}
                for found in super().forward(images)]


class Grey(GeneralizedRCNNTransform):
    def normalize(self, image: Tensor) -> Tensor:
        normalized: Tensor = super().normalize(image.mean(dim=0, keepdim=True).expand_as(image))
        return normalized


def with_grey_images(detector: SmallDetector) -> SmallDetector:
    detector.transform.__class__ = Grey
    return detector


def with_a_hook(detector: SmallDetector) -> SmallDetector:
    detector.backbone.register_forward_hook(lambda module, args, maps: {name: 2 * one for name, one in maps.items()})
    return detector


def with_its_own_resizing(detector: SmallDetector) -> SmallDetector:
    detector.transform.resize = lambda image, target: (image, target)  # type: ignore[method-assign]
    return detector


@pytest.mark.parametrize(("changed", "own"), [
    (lambda detector: Thresholding(), "detector Thresholding has its own forward"),
    (with_grey_images, "transform Grey has its own normalize"),
    (with_a_hook, "backbone BackboneWithFPN has its own hooks"),
    (with_its_own_resizing, "transform GeneralizedRCNNTransform has its own resize")])
def test_a_detector_with_code_that_would_be_skipped_is_refused(
        changed: Callable[[SmallDetector], SmallDetector], own: str) -> None:
    with pytest.raises(GraphError, match=own):
        backbone_of_detector(changed(sure_detector()), SHAPE, None, 1, "small_detector.py")


@torch.no_grad()
def test_a_detector_that_scales_all_images_to_one_size_does_so_here() -> None:
    detector = sure_detector()
    detector.transform.fixed_size = (160, 64)  # width and height
    batch = images(3, SHAPE)
    backbone = backbone_of_detector(detector, SHAPE, None, 1, "small_detector.py")
    for found, expected in zip(build_model(backbone)(batch), detector([*batch])):
        assert len(expected["boxes"])
        require_same(found, expected)


class Rating:
    """A handler that answers with boxes and a number that is not known."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        with torch.no_grad():
            return [{"boxes": found["boxes"].tolist(), "rating": math.nan}
                    for found in self.model(torch.stack([item["image"] for item in data]))]


def test_of_a_full_answer_nothing_becomes_null_that_the_handler_has_put_there(backbone: Backbone) -> None:
    served = build_model(backbone, *one_exit(backbone, threshold=0.8))
    calls = [Call(f"id-{number}", {"image": image}) for number, image in enumerate(images(24, SHAPE))]
    replies = [reply for reply in worker_of(served, Rating(served)).step(calls) if reply is not None]
    in_full = [reply for reply in replies if reply.headers[EXIT_HEADER] == FULL_NAME]
    assert 0 < len(in_full) < len(replies) == 24
    for reply in replies:
        assert (reply.body["rating"] is None) == (reply not in in_full)


def test_json_has_null_where_there_is_no_box() -> None:
    nan = float("nan")
    response = [{"person": [nan] * 4, "score": 0.75}, {"car": [1.0, 2.0, 3.0, 4.0], "mask": [[[nan]]], "x": [None]}]
    assert with_nulls(response) == [{"person": None, "score": 0.75},
                                    {"car": [1.0, 2.0, 3.0, 4.0], "mask": None, "x": [None]}]
    assert with_nulls([]) == [] and with_nulls("nan") == "nan"
