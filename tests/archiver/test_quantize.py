"""Which recorded inputs calibrate the quantization to 8 bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from early_exit.archiver.packaging.quantize import quantize, recorded_inputs
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import INT8
from early_exit.handler.model.loading import build_model
from early_exit.handler.recording.format import list_shards, read_header, read_shard, write_shard
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.handler.user_handler.traffic import digests_of
from early_exit.training.data.dataset import load_traffic
from early_exit.training.data.skipped import Skipped
from early_exit.training.data.split import Part
from early_exit.training.data.traffic import traffic_in
from tests.support.images import MANIFEST, SHAPE, image_model, record_images, write_handler
from tests.support.models.text_classifier import LENGTH, TextClassifier
from tests.support.models.text_handler import TextHandler
from tests.support.original import MODELS
from tests.support.recording import record
from tests.support.zoo import text


def trains(records: Path, n_requests: int) -> torch.Tensor:
    """Return an (N,) bool mask of the requests in the train part, in the order in which they were recorded."""
    traffic = load_traffic(list_shards(records))
    chosen = torch.zeros(n_requests, dtype=torch.bool)
    chosen[traffic.rows[traffic.part == Part.TRAIN.number]] = True
    return chosen



def test_only_requests_of_the_train_part_calibrate(tmp_path: Path) -> None:
    backbone, layout = Backbone.from_module(image_model(), SHAPE), ArchiveLayout(tmp_path / "archive")
    layout.root.mkdir()
    write_handler(layout.root)
    images = record_images(backbone, 700, tmp_path / "records")
    is_train = trains(tmp_path / "records", 700)
    [inputs] = recorded_inputs(tmp_path / "records", layout, MANIFEST, backbone, Skipped())
    assert len(inputs) == 300
    assert torch.equal(inputs, images[is_train][:300])


def test_requests_that_the_handler_fails_on_do_not_calibrate_and_others_take_their_place(tmp_path: Path) -> None:
    backbone, layout = Backbone.from_module(image_model(), SHAPE), ArchiveLayout(tmp_path / "archive")
    layout.root.mkdir()
    write_handler(layout.root)
    images = torch.randn(700, *SHAPE)
    record(backbone, images, tmp_path / "records", bodies=[
        b"short" if number % 20 == 3 else image.numpy().tobytes() for number, image in enumerate(images)])
    is_train = trains(tmp_path / "records", 700)
    skipped, said = Skipped(), list[str]()
    [inputs] = recorded_inputs(tmp_path / "records", layout, MANIFEST, backbone, skipped, said.append)
    assert torch.equal(inputs, images[is_train & (torch.arange(700) % 20 != 3)][:300])
    [(reason, count)] = skipped.counts.items()
    assert said == [f"{count} of {300 + count} recorded requests are skipped: {reason}"] and count > 5


def test_damaged_shards_and_those_of_other_traffic_do_not_calibrate_and_are_told(tmp_path: Path) -> None:
    backbone, layout = Backbone.from_module(image_model(), SHAPE), ArchiveLayout(tmp_path / "archive")
    layout.folder.mkdir(parents=True)
    write_handler(layout.root)
    layout.original_manifest.write_text(json.dumps(MANIFEST))
    layout.manifest.parent.mkdir()
    layout.manifest.write_text(json.dumps(MANIFEST))
    HandlerDescription(files=digests_of(layout.root, ["raw_images.py"])).save(layout.handler_description)
    record_images(backbone, 100, tmp_path / "records")
    [shard] = list_shards(tmp_path / "records")
    header = read_header(shard)
    records = read_shard(shard, header.layers, kept=True)
    for name, of, found in (("same", traffic_in(layout, backbone.description), records),
                            ("other", "0" * 64, replace(records, request=records.request.flip(0) + 1))):
        write_shard(shard.with_name(f"{name}.safetensors"), replace(header, traffic=of), found)
    shard.write_bytes(shard.read_bytes()[:-40])
    said: list[str] = []
    [inputs] = recorded_inputs(tmp_path / "records", layout, MANIFEST, backbone, Skipped(), said.append)
    assert len(inputs) == load_traffic([shard.with_name("same.safetensors")]).size(Part.TRAIN)
    damaged, others = said
    assert str(shard) in damaged and damaged.endswith("It is skipped")
    assert others.startswith("100 records are skipped: they are of other traffic")


@torch.no_grad()
def test_a_model_of_texts_is_calibrated_with_their_tokens_and_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TextClassifier().eval()
    model.blocks = model.blocks[:2]  # a shorter model is enough, and faster
    backbone = Backbone.from_inputs(model, text(LENGTH))
    texts = [bytes(torch.randint(97, 123, (int(length),)).tolist()) for length in torch.randint(4, 20, (80,))]
    tokens, mask = TextHandler().preprocess([{"body": text} for text in texts])
    record(backbone, (tokens, mask), tmp_path / "records", bodies=texts)
    layout = ArchiveLayout(tmp_path / "archive")
    layout.folder.mkdir(parents=True)
    shutil.copy(MODELS / "text_handler.py", layout.root)
    backbone.save(layout.folder)
    manifest = {"model": {"modelName": "model", "handler": "text_handler.py", "modelFile": "text_classifier.py"}}
    found = recorded_inputs(tmp_path / "records", layout, manifest, backbone, Skipped())
    is_train = trains(tmp_path / "records", 80)
    assert [torch.equal(one, expected[is_train]) for one, expected in zip(found, (tokens, mask))] == [True, True]
    quantize(backbone, found, layout.folder)
    served = build_model(load_backbone(layout.folder), engine=INT8)
    scores, expected = served(input_ids=tokens, attention_mask=mask)["logits"], model(tokens, mask)["logits"]
    assert 0 < (scores - expected).norm() / expected.norm() < 0.25, "8 bits change what random weights say"
