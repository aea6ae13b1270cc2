"""Models that classify no single image, through a real TorchServe: records of counts and categories, texts with a mask,
and a detector of objects."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from early_exit.archiver.addresses import Addresses
from early_exit.archiver.archive import ArchiveRequest, build_archive
from early_exit.archiver.detector import backbone_of_detector
from early_exit.archiver.server import TorchServe
from early_exit.handler.plan import save_plan
from early_exit.handler.records import list_shards, read_shard
from early_exit.handler.signature import InputSpec
from tests.conftest import WORKERS
from tests.support.client import failed, send
from tests.support.detector import images, one_exit, sure_detector
from tests.support.models.criteo import encode, from_json
from tests.support.models.dlrm import DLRM
from tests.support.models.text_classifier import TextClassifier
from tests.support.models.text_handler import TextHandler
from tests.support.original import factory_request, original_mar
from tests.support.plans import write_plan

pytestmark = pytest.mark.slow

CLICKS: list[dict[str, Any]] = [
    {"I1": number, "I5": 7 * number, **({"C1": "68fd1e64"} if number % 3 else {}), "C2": f"site {number % 5}"}
    for number in range(24)]
TEXTS = [("early exits answer easy texts soon " * 2)[number:number + number % 15 + 2] for number in range(24)]

SCENE = (3, 96, 96)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {"clicks": DLRM().eval(), "texts": TextClassifier().eval(), "scenes": sure_detector()}


@pytest.fixture(scope="module")
def server(models: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """All models: clicks record and answer in full, texts and scenes have exits."""
    folder = tmp_path_factory.mktemp("inputs")
    store, config = folder / "store", WORKERS.format(n=1) + "  sampling_rate: 1.0\n"
    request = folder / "click.json"
    request.write_text(json.dumps(CLICKS[0]))
    texts = original_mar(folder / "texts", "texts", "text_classifier.py", "text_handler.py",
                         models["texts"].state_dict(), config)
    inputs = (InputSpec("input_ids", (16,), "int64"), InputSpec("attention_mask", (16,), "int64"))
    recorder = build_archive(ArchiveRequest(str(texts), folder, inputs=inputs))
    archives = [build_archive(factory_request(folder / "clicks", store, "clicks", models["clicks"], "click_handler.py",
                                              config, extra_files=["criteo.py"], input_shape=(39,), request=request)),
                build_archive(ArchiveRequest(str(recorder), store, plan=write_plan(folder / "run", recorder,
                                                                                   threshold=0.6)))]
    scenes = original_mar(folder / "scenes", "scenes", "small_detector.py", "object_detector",
                          models["scenes"].state_dict(), config)
    backbone = backbone_of_detector(models["scenes"], SCENE, None, 1, "small_detector.py")
    save_plan(folder / "scenes", *one_exit(backbone, threshold=0.8))
    archives.append(build_archive(ArchiveRequest(str(scenes), store, input_shape=SCENE,
                                                 plan=folder / "scenes" / "plan.json")))
    with TorchServe(store, folder / "state", Addresses.free(), records=folder / "records",
                    models=[one.name for one in archives]) as running:
        yield running


@torch.no_grad()
def test_clicks_as_json_and_binary_get_the_models_own_answers(
        server: TorchServe, models: dict[str, torch.nn.Module]) -> None:
    expected = models["clicks"](torch.tensor([from_json(one) for one in CLICKS])).softmax(dim=1)[:, 1].tolist()
    as_json = send(server, "clicks", [json.dumps(one).encode() for one in CLICKS])
    alone = send(server, "clicks", [encode([one]) for one in CLICKS])
    [batch] = send(server, "clicks", [encode(CLICKS)])
    assert failed([*as_json, *alone, batch]) == 0
    assert [json.loads(reply.body)["click"] for reply in as_json] == pytest.approx(expected, abs=1e-5)
    assert [json.loads(reply.body)[0]["click"] for reply in alone] == pytest.approx(expected, abs=1e-5)
    assert [one["click"] for one in json.loads(batch.body)] == pytest.approx(expected, abs=1e-5)
    assert {reply.exit for reply in [*as_json, *alone]} == {"full"}
    [bad] = send(server, "clicks", [b"CLK1 and too little"])
    assert bad.status == 400 and b"expected records of 156 bytes" in bad.body


def test_clicks_are_recorded_before_and_after_the_interaction(server: TorchServe) -> None:
    records, deadline = server.state.parent / "records" / "clicks", time.monotonic() + 20
    while sum(len(read_shard(shard, [])) for shard in list_shards(records)) < 2 * len(CLICKS):
        assert time.monotonic() < deadline, "the records are not written"
        time.sleep(0.5)
    shapes = {name: tuple(values.shape[1:]) for name, values in read_shard(
        list_shards(records)[0], ["embeddings", "interaction"]).activations.items()}
    assert shapes == {"embeddings": (2, 64), "interaction": (415,)}, "counts and the mean of all; and all products"


@torch.no_grad()
def test_texts_leave_early_and_the_others_get_the_models_own_answers(
        server: TorchServe, models: dict[str, torch.nn.Module]) -> None:
    replies = send(server, "texts", [text.encode() for text in TEXTS])
    assert failed(replies) == 0
    handler = TextHandler()
    tokens, mask = handler.preprocess([{"body": text} for text in TEXTS])
    expected = models["texts"](tokens, mask)["logits"]
    exits = [reply.exit for reply in replies]
    assert 0 < exits.count("full") < len(exits)
    for reply, scores in zip(replies, expected.tolist()):
        if reply.exit == "full":
            assert json.loads(reply.body)["scores"] == pytest.approx(scores, abs=1e-4)


@torch.no_grad()
def test_scenes_that_leave_early_have_no_box_and_the_others_the_models_own(
        server: TorchServe, models: dict[str, torch.nn.Module]) -> None:
    scenes = images(24, SCENE)
    replies = send(server, "scenes", [_png(scene) for scene in scenes])
    assert failed(replies) == 0
    exits = [reply.exit for reply in replies]
    assert 0 < exits.count("full") < len(exits)
    for reply, scene in zip(replies, scenes):
        objects = json.loads(reply.body)
        if reply.exit == "full":
            [expected] = models["scenes"]([(scene * 255).round() / 255])
            for found, label, box in zip(objects, expected["labels"].tolist(), expected["boxes"].tolist()):
                assert found[str(label)] == pytest.approx(box, abs=0.1)
            assert len(objects) == (expected["scores"] >= 0.5).sum()
        else:
            assert len(objects) <= 1 and all(box is None for one in objects for name, box in one.items()
                                             if name != "score")


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil_image((image * 255).round().byte()).save(buffer, "PNG")
    return buffer.getvalue()
