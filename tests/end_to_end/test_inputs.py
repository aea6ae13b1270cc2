"""Models other than ResNets behind a real TorchServe: DLRM on counts and categories, a classifier of texts with masks,
an object detector, MobileFaceNet, EfficientNet, a vision transformer, and a handler that reorders its rows."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import efficientnet_b0
from torchvision.transforms.functional import to_pil_image

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.detector import backbone_of_detector
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan, save_plan
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import FULL
from early_exit.handler.recording.format import ANONYMOUS, list_shards, read_shard
from early_exit.handler.user_handler.description import HandlerDescription
from tests.conftest import WORKERS
from tests.support.client import failed, metrics, send
from tests.support.detector import images, one_exit, sure_detector
from tests.support.models.criteo import encode, from_json
from tests.support.models.digits_handler import DigitsClassifier
from tests.support.models.dlrm import DLRM
from tests.support.models.face_handler import FaceClassifier
from tests.support.models.mobilefacenet import MobileFaceNet
from tests.support.models.rows_model import rows_model
from tests.support.models.small_vit import SmallViT
from tests.support.models.text_classifier import TextClassifier
from tests.support.models.text_handler import TextHandler
from tests.support.original import MODELS, factory_request, original_mar
from tests.support.plans import thirds, write_plan
from tests.support.rewritten import rewritten
from tests.support.untried import build_untried
from tests.support.waiting import wait_until
from tests.support.zoo import text

pytestmark = pytest.mark.slow

CLICKS: list[dict[str, Any]] = [
    {"I1": number, "I5": 7 * number, **({"C1": "68fd1e64"} if number % 3 else {}), "C2": f"site {number % 5}"}
    for number in range(24)]
TEXTS = [("early exits answer easy texts soon " * 2)[number:number + number % 15 + 2] for number in range(24)]

ROWS = [json.dumps(row).encode()
        for row in (3 * torch.randn(24, 6, generator=torch.Generator().manual_seed(0))).tolist()]
SCENE = (3, 96, 96)
Planned = tuple[Backbone, ExitPlan, dict[str, Head]]


PICTURES = {"faces": "face_handler.py", "photos": "face_handler.py", "digits": "digits_handler.py"}
"""The models that classify images, and their handlers."""
SHAPES = {"faces": (3, 112, 96), "photos": (3, 112, 96), "digits": (1, 32, 32), "clicks": (39,)}
SEES = {"faces": FaceClassifier.image_processing, "photos": FaceClassifier.image_processing,
        "digits": DigitsClassifier.image_processing}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    pictures = {"faces": MobileFaceNet(), "photos": efficientnet_b0(), "digits": SmallViT()}
    return {"clicks": DLRM().eval(), "texts": TextClassifier().eval(), "scenes": sure_detector(),
            **{name: _sure(model.eval(), _inputs(name)) for name, model in pictures.items()}}


@pytest.fixture(scope="module")
def plans(models: dict[str, nn.Module]) -> dict[str, Planned]:
    """A plan with two exits for each model. For clicks, they are before and after the interaction."""
    found = {}
    for name, shape in SHAPES.items():
        backbone = Backbone.from_module(models[name], shape)
        paths = [one.path for one in backbone.description.candidates]
        # The deeper activations of an untrained network hardly differ between inputs.
        layers = ["embeddings", "interaction"] if name == "clicks" else paths[1:4:2]
        found[name] = backbone, *thirds(backbone, layers, _inputs(name))
    return found


@pytest.fixture(scope="module")
def server(models: dict[str, nn.Module], plans: dict[str, Planned],
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A server of all models, with exits, which records every request."""
    folder = tmp_path_factory.mktemp("inputs")
    store, config = folder / "store", WORKERS.format(n=1) + "  sampling_rate: 1.0\n"
    request = folder / "click.json"
    request.write_text(json.dumps(CLICKS[0]))
    texts = original_mar(folder / "texts", "texts", "text_classifier.py", "text_handler.py",
                         models["texts"].state_dict(), config)
    recorder = build_untried(ArchiveRequest(str(texts), folder, inputs=text(16)))
    scenes = original_mar(folder / "scenes", "scenes", "small_detector.py", "object_detector",
                          models["scenes"].state_dict(), config)
    backbone = backbone_of_detector(models["scenes"], SCENE, None, 1, "small_detector.py")
    save_plan(folder / "scenes", *one_exit(backbone, threshold=0.8))
    archives = [
        build_untried(ArchiveRequest(str(recorder), store, plan=write_plan(folder / "run", recorder, threshold=0.6))),
        build_untried(ArchiveRequest(str(scenes), store, input_shape=SCENE, plan=folder / "scenes" / "plan.json")),
        build_archive(_made("clicks", models, plans, folder, store, config, "click_handler.py",
                            extra_files=["criteo.py"], requests=[request]))]
    for name, handler in PICTURES.items():
        archives.append(build_untried(_made(name, models, plans, folder, store, config, handler)))
    archives.append(_sorting(folder, store, config))
    with TorchServe(store, folder / "state", Addresses.free(), records=folder / "records",
                    models=[one.name for one in archives]) as running:
        management = Management(running.addresses, running.key_file, running.secret_file)
        wait_until(lambda: all(management.versions(name)[0].n_ready for name in (*models, "rows")),
                   "the workers do not start", limit_s=180, every_s=0.5)
        yield running


@torch.no_grad()
def test_clicks_as_json_and_binary_leave_early_or_get_the_models_own_answers(
        server: TorchServe, models: dict[str, nn.Module], plans: dict[str, Planned]) -> None:
    own = models["clicks"](_inputs("clicks")).softmax(dim=1)[:, 1].tolist()
    expected, exits = _served("clicks", plans)
    as_json = send(server, "clicks", [json.dumps(one).encode() for one in CLICKS])
    alone = send(server, "clicks", [encode([one]) for one in CLICKS])
    [batch] = send(server, "clicks", [encode(CLICKS)])
    assert failed([*as_json, *alone, batch]) == 0
    assert [reply.exit for reply in as_json] == [reply.exit for reply in alone] == exits
    assert set(exits) == {"embeddings", "interaction", "full"}
    click = expected.softmax(dim=1)[:, 1].tolist()
    assert [answer for answer, exit_ in zip(click, exits) if exit_ == "full"] == pytest.approx(
        [answer for answer, exit_ in zip(own, exits) if exit_ == "full"], abs=1e-5)
    assert [json.loads(reply.body)["click"] for reply in as_json] == pytest.approx(click, abs=1e-5)
    assert [json.loads(reply.body)[0]["click"] for reply in alone] == pytest.approx(click, abs=1e-5)
    assert [one["click"] for one in json.loads(batch.body)] == pytest.approx(click, abs=1e-5)
    [bad] = send(server, "clicks", [b"CLK1 and too little"])
    assert bad.status == 400 and b"expected records of 156 bytes" in bad.body


@pytest.mark.parametrize("name", PICTURES)
@torch.no_grad()
def test_pictures_leave_early_or_get_the_models_own_answers(
        name: str, server: TorchServe, models: dict[str, nn.Module], plans: dict[str, Planned]) -> None:
    replies = send(server, name, _pictures(name))
    assert failed(replies) == 0
    expected, exits = _served(name, plans)
    assert [reply.exit for reply in replies] == exits and len(set(exits)) == 3
    own = models[name](_inputs(name))
    for reply, scores in zip(replies, [own[row] if exit_ == "full" else expected[row]
                                       for row, exit_ in enumerate(exits)]):
        for label, probability in json.loads(reply.body).items():
            assert probability == pytest.approx(scores.softmax(dim=0)[int(label)].item(), abs=1e-4)


def test_clicks_are_recorded_before_and_after_the_interaction(server: TorchServe) -> None:
    records = server.state.parent / "records" / "clicks"
    wait_until(lambda: sum(len(read_shard(shard, [])) for shard in list_shards(records)) >= 2 * len(CLICKS),
               "the records are not written", limit_s=20, every_s=0.5)
    shapes = {name: tuple(values.shape[1:]) for name, values in read_shard(
        list_shards(records)[0], ["embeddings", "interaction"]).activations.items()}
    assert shapes == {"embeddings": (2, 64), "interaction": (415,)}, "counts and the mean of all; and all products"


@torch.no_grad()
def test_texts_leave_early_and_the_others_get_the_models_own_answers(
        server: TorchServe, models: dict[str, nn.Module]) -> None:
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
        server: TorchServe, models: dict[str, nn.Module]) -> None:
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


def test_a_handler_that_sorts_gives_no_request_the_header_or_record_of_another(server: TorchServe) -> None:
    alone = send(server, "rows", ROWS, clients=1)
    together = send(server, "rows", ROWS, clients=8)
    assert failed(alone) == failed(together) == 0
    assert len({reply.exit for reply in alone}) > 1 and all(reply.exit for reply in alone)
    for single, reply in zip(alone, together):
        assert reply.body == single.body and reply.exit in ("", single.exit)
    n_unknown = [reply.exit for reply in together].count("")
    assert n_unknown, "the test needs batches of several requests"
    records, deadline = server.state.parent / "records" / "rows", time.monotonic() + 20
    recorded: list[int] = []
    while len(recorded) < 2 * len(ROWS):
        assert time.monotonic() < deadline, "the records are not written"
        time.sleep(0.5)
        recorded = [hashed for shard in list_shards(records) for hashed in read_shard(shard, []).request.tolist()]
    assert recorded.count(ANONYMOUS) == n_unknown
    assert re.search(r'ee_rows_unknown\{[^}]*Because="archive"[^}]*\} 1\.0', metrics(server))


def _sorting(folder: Path, store: Path, config: str) -> Path:
    """Return an archive with exits whose handler sorts its rows, described as `ee-archive` would describe it."""
    folder = folder / "rows"
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    torch.manual_seed(0)
    save_file(rows_model().state_dict(), folder / "weights.safetensors")
    asked = ArchiveRequest("tests.support.models.rows_model:rows_model", folder, model_name="rows", version="1.0",
                           weights=folder / "weights.safetensors", input_shape=(6,), config=folder / "config.yaml",
                           handler=str(MODELS / "sorting_handler.py"))
    plan = write_plan(folder / "run", build_untried(asked))
    description = HandlerDescription(rows_per_request=None, rows_unknown_because="it reorders them")
    description.save(folder / "handler.json")
    return rewritten(build_untried(replace(asked, version="2.0", plan=plan)), store / "rows-2.0.mar",
                     **{"early_exit/handler.json": (folder / "handler.json").read_bytes()})


def _sure(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return the untrained model with its classifier scaled so that its scores differ clearly between classes."""
    *_, classifier = (part for part in model.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        classifier.weight.normal_()
        classifier.bias.zero_()
        classifier.weight *= 3 / model(inputs).std()
    return model


def _pictures(name: str) -> list[bytes]:
    _, height, width = SHAPES[name]
    return [_png(image) for image in images(24, (3, height, width))]


def _inputs(name: str) -> Tensor:
    """Return the inputs that the handler makes of the requests."""
    if name == "clicks":
        return torch.tensor([from_json(one) for one in CLICKS])
    return torch.stack([SEES[name](Image.open(io.BytesIO(body))) for body in _pictures(name)])


def _served(name: str, plans: dict[str, Planned]) -> tuple[Tensor, list[str]]:
    """Return the scores and the exits that a model gives in this process."""
    model = build_model(*plans[name])
    scores: Tensor = model(_inputs(name))
    stages = model.log.take()[0].answers.stages.tolist()
    return scores, ["full" if stage == FULL else model.assembly.layers[stage] for stage in stages]


def _made(name: str, models: dict[str, nn.Module], plans: dict[str, Planned], folder: Path, store: Path, config: str,
          handler: str, **more: Any) -> ArchiveRequest:
    asked = factory_request(folder / name, store, name, models[name], handler, config, input_shape=SHAPES[name],
                            plan=folder / name / "plan.json", **more)
    _, plan, heads = plans[name]
    save_plan(folder / name, plan, heads)
    return replace(asked, source="torchvision.models:efficientnet_b0") if name == "photos" else asked


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil_image((image * 255).round().byte()).save(buffer, "PNG")
    return buffer.getvalue()
