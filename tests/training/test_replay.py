"""Replays of recorded requests with augmentations, through a user's handler and a small backbone for images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import list_shards, read_header, read_shard, write_shard
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.training.data.dataset import RecordedTraffic, load_traffic
from early_exit.training.data.preprocessing import Preprocessing, preprocessing
from early_exit.training.data.replay import Replay, augmentation, replay_records
from early_exit.training.data.skipped import Skipped
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet, columns_of, finish, prepare
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import TrainingSetPaths
from tests.support.images import MANIFEST, SHAPE, image_model, record_images, write_handler
from tests.support.recording import record

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
        assert differs.double().mean() > 0.8  # an augmentation may leave an image unchanged
        rest = model[int(layer.path) + 1:]
        expected = rest(seen[augmented].float()).log_softmax(dim=1)
        torch.testing.assert_close(replayed.log_probabilities[augmented].float(), expected, atol=0.01, rtol=0.01)
    assert torch.equal(replayed.backbone_class[as_recorded], traffic.backbone_class)


def test_a_row_of_which_a_replay_gave_no_scores_trains_nothing(
        backbone: Backbone, traffic: RecordedTraffic, tmp_path: Path) -> None:
    paths, about = TrainingSetPaths(tmp_path), backbone.description
    pool = read_header(traffic.shards[0]).pool
    train = prepare(paths, traffic, about.candidates, about.n_classes, pool).rows(Part.TRAIN)
    scores = traffic.log_probabilities.clone()
    scores[train[0]] = torch.nan
    columns = {**columns_of(traffic), "log_probabilities": scores}
    finish(paths, about.candidates, pool, about.n_classes, columns, traffic.split, {})
    assert torch.equal(TrainingSet.load(paths).rows(Part.TRAIN), train[1:])


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
    batch = (200 * torch.eye(400)[:, None, None, :]).to(dtype)  # each image has another bright pixel
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
        assert ["expected {'scale': 3.0} besides the tensors" in reason for reason in skipped.counts] == [True]


def test_a_request_that_a_handler_fails_on_is_skipped_and_counted_with_the_reason(
        model: nn.Sequential, backbone: Backbone, tmp_path: Path) -> None:
    """Of the 90 requests, 12 are too short, each with another length, and 3 could not be kept."""
    images = torch.randn(N_RECORDS, *SHAPE, generator=torch.Generator().manual_seed(1))
    bodies: list[bytes] = [image.numpy().tobytes() for image in images]
    short, unkept = range(5, 65, 5), {0, 31, 77}
    bodies = [body[:8 * number] if number in short else body for number, body in enumerate(bodies)]
    record(backbone, images, tmp_path / "records", bodies=bodies)
    [shard] = list_shards(tmp_path / "records")
    records = read_shard(shard, [layer.path for layer in backbone.description.candidates], kept=True)
    kept = [b"" if number in unkept else request for number, request in enumerate(records.kept or ())]
    write_shard(shard, read_header(shard), replace(records, kept=kept))
    everything, said = load_traffic([shard]), list[str]()
    write_handler(tmp_path)
    layers = backbone.description.candidates
    with preprocessing(tmp_path, MANIFEST) as handler:
        paths = TrainingSetPaths(tmp_path / "training_set")
        replayed = replay_records(paths, everything, layers, backbone, handler, Replay(ROUNDS, pool=None),
                                  log=said.append)
        with pytest.raises(RecordError, match="none of the 12 recorded requests can be run again. The most common "
                                              "reason, for 12 of them: raw_images.py fails on a request with "):
            replay_records(TrainingSetPaths(tmp_path / "none"), everything.where(_chosen(short)), layers, backbone,
                           handler, Replay(0))
        n_certify = everything.size(Part.CERTIFY)
        skipped = int((everything.part[_chosen([*short, *unkept])] == Part.CERTIFY.number).sum())
        few, most = TrainingSetPaths(tmp_path / "few"), TrainingOptions(tolerance=0.02).most_skipped
        with pytest.raises(RecordError, match=f"{skipped} of the {n_certify} requests that certify cannot be run"):
            replay_records(few, everything, layers, backbone, handler, Replay(0), most_skipped=most)
    assert TrainingOptions(thresholds="paper").most_skipped == 1
    answered = everything.where(~_chosen([*short, *unkept]))
    assert replayed.n_records == len(answered) == 75
    assert torch.equal(replayed.request, answered.request) and torch.equal(replayed.split.part, answered.split.part)
    assert len(replayed.rows(Part.TRAIN)) == (1 + ROUNDS) * answered.size(Part.TRAIN) == len(
        replayed.log_probabilities) - 75 + answered.size(Part.TRAIN)
    right = images[~_chosen([*short, *unkept])]
    with torch.no_grad():
        expected = model(right).log_softmax(dim=1)
    torch.testing.assert_close(replayed.log_probabilities[:75].float(), expected, atol=0.01, rtol=0.01)
    assert list(replayed.skipped.values()) == [12, 3] and len(said) == 2
    assert said[0].startswith("12 of 90 recorded requests are skipped: raw_images.py fails on a request with")
    assert said[1].startswith("3 of 90 recorded requests are skipped: the request was not kept")


def _chosen(records: Iterable[int]) -> Tensor:
    return torch.zeros(N_RECORDS, dtype=torch.bool).index_fill(0, torch.tensor([*records]), True)


def test_a_handler_that_empties_its_requests_gets_them_whole_each_time(backbone: Backbone, tmp_path: Path) -> None:
    """The first attempt empties the first request and fails at the second one; the next attempt must get both whole."""
    write_handler(tmp_path)
    file = tmp_path / "raw_images.py"
    file.write_text(file.read_text().replace('row["body"]', 'row.pop("body")'))
    good, bad = KeptRequest({"body": torch.ones(SHAPE).numpy().tobytes()}), KeptRequest({"body": b"abc"})
    with preprocessing(tmp_path, MANIFEST) as handler:
        positions, [inputs] = handler.model_inputs([good, bad, good], backbone.description, Skipped())
    assert positions == [0, 2] and torch.equal(inputs, torch.ones(2, *SHAPE))


def test_a_replay_hands_over_parts_and_their_content_types_as_they_were(backbone: Backbone, tmp_path: Path) -> None:
    write_handler(tmp_path)
    file = tmp_path / "raw_images.py"
    file.write_text(file.read_text().replace("        images =", """        for number, row in enumerate(data):
            assert row["options"] == {"k": [1, 2.0]} and type(row["body"]) is bytearray, row
            types = context.get_all_request_header(number)
            assert types == {"body": {"content-type": "image/raw"}, "options": {"content-type": "application/json"}}
        images ="""))
    body = bytearray(torch.ones(SHAPE).numpy().tobytes())
    request = KeptRequest({"body": body, "options": {"k": [1, 2.0]}},
                          {"body": "image/raw", "options": "application/json"})
    with preprocessing(tmp_path, MANIFEST) as handler:
        skipped = Skipped()
        positions, _ = handler.model_inputs([request] * 2, backbone.description, skipped)
    assert positions == [0, 1], skipped.counts


def test_rows_of_several_requests_that_cannot_be_told_apart_are_asked_for_one_by_one(
        backbone: Backbone, tmp_path: Path) -> None:
    write_handler(tmp_path)
    file = tmp_path / "raw_images.py"
    file.write_text(file.read_text().replace("for row in data]", "for row in data[::-1]]"))
    layout = ArchiveLayout(tmp_path)
    layout.folder.mkdir()
    HandlerDescription(rows_per_request=None, rows_unknown_because="it reverses").save(layout.handler_description)
    images = torch.randn(3, *SHAPE)
    with preprocessing(tmp_path, MANIFEST) as handler:
        _, [inputs] = handler.model_inputs([KeptRequest({"body": image.numpy().tobytes()}) for image in images],
                                           backbone.description, Skipped())
    assert torch.equal(inputs, images)


def test_records_without_requests_are_skipped_and_where_there_are_no_others_the_remedy_is_named(
        backbone: Backbone, tmp_path: Path, handler: Preprocessing) -> None:
    images = torch.randn(40, *SHAPE)
    record(backbone, images[:20], tmp_path / "without")
    record(backbone, images[20:], tmp_path / "with", first_request=20,
           bodies=[image.numpy().tobytes() for image in images[20:]])
    shards = [shard for folder in ("without", "with") for shard in list_shards(tmp_path / folder)]
    layers = backbone.description.candidates
    replayed = replay_records(TrainingSetPaths(tmp_path / "set"), load_traffic(shards), layers, backbone, handler,
                              Replay(0))
    assert torch.equal(replayed.request, load_traffic(shards[1:]).request) and [*replayed.skipped.values()] == [20]
    with pytest.raises(RecordError, match="for 20 of them: the request was not kept: record .*keep_requests: true"):
        replay_records(TrainingSetPaths(tmp_path / "none"), load_traffic(shards[:1]), layers, backbone, handler,
                       Replay(0))
