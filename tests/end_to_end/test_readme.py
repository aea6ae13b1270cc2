"""The commands of the pages on the loop and of the tutorial are run as they stand; their output has the form that the
pages show. The README's commands are among those of the pages."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from websockets.sync.client import connect

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from tests.support.client import consecutive_free_ports, failed, send
from tests.support.digits import traffic
from tests.support.documents import LIVE_PAGE, LOOP, PAGES, README, SWITCH, TUTORIAL, Shown, blocks, commands
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import original_mar
from tests.support.reader import Reader

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not shutil.which("curl"), reason="no curl is installed: make system")]

CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 20\nearly_exit:\n  seal_after_s: 2\n"
N_PHOTOS = 260


def test_the_loop_works_as_it_stands(digits_backbone: DigitsResNet, tmp_path: Path) -> None:
    """Digits take the place of CIFAR's photos, and the search is short."""
    reader = Reader(LOOP, SWITCH, LIVE_PAGE, folder=tmp_path,
                    instead={"3,32,32": "1,32,32", "cifar_handler": "digits_handler"},
                    more={"ee-train records": "--trials 2 --layers 3", "ee-watch": "--once"})
    mar = original_mar(tmp_path / "user", "cifar", "digits_resnet.py", "digits_handler.py",
                       digits_backbone.state_dict(), CONFIG)
    shutil.copy(mar, tmp_path / "cifar.mar")
    bodies = [one.body for one in traffic(1500, seed=6)]
    (tmp_path / "00000.jpg").write_bytes(bodies[0])
    reader.check("ee-archive cifar.mar")
    with reader.running(reader.follow("ee-serve")) as serving:
        server = server_at(reader)
        printed = reader.run(reader.follow("curl"))
        assert "X-Early-Exit: full" in printed and "X-Early-Exit-Confidence: " in printed
        assert failed(send(server, "cifar", bodies)) == 0
        time.sleep(4)  # the last shard is sealed after two seconds
        reader.check("ee-train records")
        reader.check("ee-train report")
        reader.check("ee-archive model-store/cifar-2.0.mar --plan")
        reader.check("ee-roll")
        fresh = send(server, "cifar", [one.body for one in traffic(300, seed=7)])
        assert failed(fresh) == 0 and {one.version for one in fresh} == {"3.0"}
        assert any(one.exit != "full" for one in fresh)
        reader.check("ee-watch")
        reader.check("ee-exits cifar off")
        assert {one.exit for one in send(server, "cifar", bodies[:40])} == {"full"}
        reader.check("ee-exits cifar on")
        port = consecutive_free_ports()
        with reader.running(reader.follow("ee-gateway"), f" --port {port}"):
            token = re.search(r"#token=(\w+)", reader.printed)
            assert token is not None, reader.printed
            ask_through_the_gateway(port, token[1], bodies[0])
        workers = psutil.Process(serving.pid).children(recursive=True)
        assert len(workers) >= 2, "the server and a worker"
    reader.at_the_end()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "Ctrl-C stops the server and its workers"
    assert not (tmp_path / ".ee-serve" / "key_file.json").exists()


def test_every_command_of_the_readme_is_on_a_page_with_its_output() -> None:
    """So the tests that run the commands of the pages run those of the README too."""
    shown = [one for page in PAGES for one in commands(page)]
    assert [one.command for one in commands(README) if not any(same(one, other) for other in shown)] == []


def same(quoted: Shown, other: Shown) -> bool:
    """Tell whether a page shows the same command, with an output that has every line of the quoted output."""
    return quoted.command == other.command and not quoted.missing("\n".join(other.output))


def server_at(reader: Reader) -> TorchServe:
    """Return the server that the document's `ee-serve` started, so that requests can be sent to it."""
    addresses = Addresses.on_loopback(*range(reader.port, reader.port + 3))
    return TorchServe(reader.folder / "model-store", reader.folder / ".ee-serve", addresses)


def ask_through_the_gateway(port: int, token: str, body: bytes) -> None:
    """Send the message that the page shows, with real requests in it; the answers must have the form that it shows."""
    said = next(block for block in blocks(LIVE_PAGE) if block.startswith("> {"))
    message, answer = (line[2:] for line in said.splitlines()[:2])
    message = message.replace("<base64>", base64.b64encode(body).decode())
    allowed = {"Authorization": f"Bearer {token}"}
    with connect(f"ws://127.0.0.1:{port}/ws/cifar", additional_headers=allowed) as socket:
        socket.send(message)
        for _ in range(2):
            told = json.loads(socket.recv(timeout=60))
            assert told.keys() == json.loads(answer.replace("{...}", "{}")).keys() and told["status"] == 200


def test_the_tutorial_works_as_it_stands(tmp_path: Path) -> None:
    """The photos are 260 striped pictures of five kinds, the model has half the blocks, and there is no search."""
    model, names = (re.search(rf"^```{kind}\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
                    for kind in ("python", "json"))
    assert model is not None and names is not None
    source = model[1].replace("[2, 2, 2, 2]", "[1, 1, 1, 1]")
    (tmp_path / "model.py").write_text(source)
    (tmp_path / "index_to_name.json").write_text(names[1])
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(N_PHOTOS):
        (photos / f"{number:03}.png").write_bytes(striped(number))
    torch.save(weights(source, [(photos / f"{number:03}.png").read_bytes() for number in range(30)]),
               tmp_path / "weights.pth")
    reader = Reader(TUTORIAL, folder=tmp_path, instead={},
                    more={"ee-archive photos.mar": f"--config {sealing_soon(tmp_path)}",
                          "ee-train records": "--search none --layers 3"},
                    elsewhere={"ee-train report": "the loop"})
    reader.check("torch-model-archiver")
    reader.check("ee-archive photos.mar")
    with reader.running(reader.follow("ee-serve")):
        reader.check("KEY=")
        time.sleep(4)
        reader.check("ee-train records")
        reader.check("ee-archive model-store/photos-2.0.mar --plan")
        reader.check("ee-roll")
        [reply] = send(server_at(reader), "photos", [striped(7)])
    reader.at_the_end()
    assert reply.version == "3.0" and reply.top() in json.loads(names[1]).values()


def sealing_soon(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text("early_exit:\n  seal_after_s: 2\n")
    return path


def striped(number: int) -> bytes:
    """Return a picture of one of five kinds: the kind decides the width of the stripes. Each has a random colour."""
    generator = torch.Generator().manual_seed(number)
    phase, *colour = torch.rand(4, generator=generator).tolist()
    waves = torch.sin((torch.arange(64) / 2 ** (number % 5) + phase) * torch.pi)
    picture = waves[:, None].expand(64, 64)
    noisy = picture[None] * torch.tensor(colour)[:, None, None] + 0.2 * torch.randn(3, 64, 64, generator=generator)
    out = io.BytesIO()
    Image.fromarray(((noisy + 1) * 127).clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(out, "png")
    return out.getvalue()


def weights(source: str, bodies: list[bytes]) -> dict[str, torch.Tensor]:
    """Return weights with which the tutorial's model tells the kinds apart: its last layer compares the features of an
    image with the mean features of each kind."""
    scope: dict[str, type[nn.Module]] = {}
    exec(source, scope)
    torch.manual_seed(0)
    model = scope["Photos"]().eval()
    prepare = v2.Compose([v2.PILToTensor(), v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True),
                          v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    classifier, model.fc = model.fc, nn.Identity()
    with torch.no_grad():
        features = model(torch.stack([prepare(Image.open(io.BytesIO(body))) for body in bodies]))
        kinds = torch.stack([features[kind::5].mean(dim=0) for kind in range(5)])
        spread = features.std(dim=0).clamp_min(1e-6)
        directions = (kinds - features.mean(dim=0)) / spread**2
        classifier.weight.copy_(directions)
        classifier.bias.copy_(-(directions * (kinds + features.mean(dim=0)) / 2).sum(dim=1))
    model.fc = classifier
    return model.state_dict()
