"""Replays of recorded requests with augmentations, through a user's handler and a small backbone of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import list_shards
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.training.data.dataset import Part, RecordedTraffic, load_traffic
from early_exit.training.data.preprocessing import Preprocessing, preprocessing
from early_exit.training.data.replay import Replay, augmentation, replay_records
from early_exit.training.data.skipped import Skipped
from early_exit.training.paths import TrainingSetPaths
from tests.support.images import MANIFEST, SHAPE, image_model, record_images, write_handler

N_RECORDS, ROUNDS = 90, 2


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return image_model()


@pytest.fixture(scope="module")
def backbone(model: nn.Sequential) -> Backbone:
    return Backbone.from_module(model, SHAPE)


@pytest.fixture(scope="module")
def traffic(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> RecordedTraffic:
    folder = tmp_path_factory.mktemp("records")
    record_images(backbone, N_RECORDS, folder)
    return load_traffic(list_shards(folder))


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[Preprocessing]:
    write_handler(tmp_path)
    with preprocessing(tmp_path, MANIFEST) as loaded:
        yield loaded


def test_only_the_train_part_is_augmented_and_the_backbone_is_asked_about_what_came_of_it(
        model: nn.Sequential, backbone: Backbone, traffic: RecordedTraffic, handler: Preprocessing,
        tmp_path: Path) -> None:
    layers = backbone.description.candidates
    replayed = replay_records(TrainingSetPaths(tmp_path / "training_set"), traffic, layers, backbone, handler,
                              Replay(ROUNDS, pool=None))
    plain = replay_records(TrainingSetPaths(tmp_path / "plain"), traffic, layers, backbone, handler,
                           Replay(0, pool=None))
    train = replayed.rows(Part.TRAIN)
    assert len(train) == (1 + ROUNDS) * traffic.size(Part.TRAIN)
    assert [len(replayed.rows(part)) for part in (Part.TUNE, Part.CERTIFY)] == [
        traffic.size(part) for part in (Part.TUNE, Part.CERTIFY)]
    as_recorded, augmented = torch.arange(N_RECORDS), torch.arange(N_RECORDS, len(replayed.log_probabilities))
    assert set(augmented.tolist()) < set(train.tolist())
    for layer in layers:
        seen = replayed.activations(layer)
        assert torch.equal(seen[as_recorded], plain.activations(layer)[as_recorded])
        originals = seen[plain.rows(Part.TRAIN)]
        differs = (seen[augmented] != torch.cat([originals] * ROUNDS)).flatten(1).any(dim=1)
        assert differs.double().mean() > 0.8  # a draw may also be to leave an image as it is
        rest = model[int(layer.path) + 1:]
        expected = rest(seen[augmented].float()).log_softmax(dim=1)
        torch.testing.assert_close(replayed.log_probabilities[augmented].float(), expected, atol=0.01, rtol=0.01)
    assert torch.equal(replayed.backbone_class[as_recorded], traffic.backbone_class)


def test_a_stopped_replay_goes_on_after_its_last_full_round(
        backbone: Backbone, traffic: RecordedTraffic, handler: Preprocessing, tmp_path: Path) -> None:
    layers, replay = backbone.description.candidates, Replay(ROUNDS)
    whole = replay_records(TrainingSetPaths(tmp_path / "whole"), traffic, layers, backbone, handler, replay)
    paths, n_train, n_run = TrainingSetPaths(tmp_path / "stopped"), traffic.size(Part.TRAIN), 0

    def stop_in_the_last_round(n: int) -> None:
        nonlocal n_run
        n_run += n
        if n_run > N_RECORDS + n_train:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay_records(paths, traffic, layers, backbone, handler, replay, on_batch=stop_in_the_last_round)
    assert not paths.index.exists()
    run_again: list[int] = []
    resumed = replay_records(paths, traffic, layers, backbone, handler, replay, on_batch=run_again.append)
    assert sum(run_again) == n_train
    assert torch.equal(resumed.log_probabilities, whole.log_probabilities)
    every = torch.arange(len(whole.log_probabilities))
    assert all(torch.equal(resumed.activations(layer)[every], whole.activations(layer)[every]) for layer in layers)


@pytest.mark.parametrize("shapes", [[(16,)], [(3, 8, 8), (4,)]])
def test_what_is_no_image_is_not_augmented_but_can_be_replayed(shapes: list[tuple[int, ...]]) -> None:
    inputs = [InputSpec(f"x{number}", shape) for number, shape in enumerate(shapes)]
    with pytest.raises(RecordError, match="a replay augments images, but the model's inputs are x0"):
        augmentation(Replay(1), inputs)
    batch = torch.randn(2, 16)
    assert augmentation(Replay(0), inputs)(batch) is batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_mixup_averages_about_half_of_the_images_with_another_one(dtype: torch.dtype) -> None:
    mix = augmentation(Replay(1, augmentations=("mixup",)), [InputSpec("x", (1, 1, 1))])
    torch.manual_seed(0)
    batch = (200 * torch.eye(400)[:, None, None, :]).to(dtype)  # each image has a pixel of its own
    mixed = mix(batch).squeeze()
    assert mixed.dtype is dtype
    torch.testing.assert_close(mixed.float().sum(dim=1), torch.full((400,), 200.0), atol=1.0, rtol=0)
    assert (mixed.float().sort(dim=1, descending=True).values[:, 2:] == 0).all()
    assert 0.4 < (mixed.diagonal() < 199).double().mean() < 0.6


def test_what_a_handler_gives_its_model_besides_tensors_is_asked_for_and_not_replayed(backbone: Backbone,
                                                                                       tmp_path: Path) -> None:
    write_handler(tmp_path)
    file = tmp_path / "raw_images.py"
    file.write_text(file.read_text().replace("(torch.stack(images))", "(torch.stack(images), scale=2.0)"))
    body = torch.zeros(SHAPE).numpy().tobytes()
    with preprocessing(tmp_path, MANIFEST) as handler:
        skipped, request = Skipped(), KeptRequest({"body": body})
        positions, [inputs] = handler.model_inputs([request], replace(backbone.description, constants={"scale": 2.0}),
                                                   skipped)
        assert inputs.shape == (1, *SHAPE) and positions == [0] and not skipped.counts
        assert handler.model_inputs([request], replace(backbone.description, constants={"scale": 3.0}),
                                    skipped) == ([], ())
        assert ["expected {'scale': 3.0} beside the tensors" in reason for reason in skipped.counts] == [True]
