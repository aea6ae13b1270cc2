"""Classifiers of third-party libraries are packaged from the function that makes them, without a model file."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.backbone.signature import InputSpec
from tests.support.models.text_handler import LENGTH
from tests.support.original import MODELS
from tests.support.served import served_model
from tests.support.zoo import image, text

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("library", "factory", "handler", "inputs"), [
    ("torchvision", "torchvision.models:squeezenet1_1", "image_classifier", image(224)),
    ("timm", "timm.models.mobilenetv3:lcnet_050", "image_classifier", image(224)),
    ("transformers", "tests.support.zoo:small_bert", str(MODELS / "text_handler.py"), text(LENGTH))],
    ids=["torchvision", "timm", "transformers"])
@torch.no_grad()
def test_an_archive_answers_as_the_librarys_model(library: str, factory: str, handler: str,
                                                  inputs: tuple[InputSpec, ...], tmp_path: Path) -> None:
    module, _, name = factory.partition(":")
    torch.manual_seed(0)
    model = getattr(importlib.import_module(module), name)().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    served = served_model(build_archive(ArchiveRequest(
        factory, tmp_path, model_name=library, weights=tmp_path / "weights.pth", handler=handler, inputs=inputs)))
    batch = [torch.cat([one.probe(), one.probe()]) if one.dtype == "int64" else torch.randn(2, *one.shape)
             for one in inputs]
    found, expected = (answer if isinstance(answer, torch.Tensor) else answer["logits"]
                       for answer in (served(*batch), model(*batch)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
