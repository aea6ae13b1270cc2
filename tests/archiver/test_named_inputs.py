"""The names that `--input` gives to the inputs of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from early_exit.archiver.packaging.tryout.adoption import CalledModel
from early_exit.archiver.packaging.tryout.exporting import exported
from early_exit.archiver.packaging.tryout.model_calls import ModelCall
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import ArchiveError
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from tests.handler.test_binding import Masked

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Named(Masked):
    """A model that takes its input by any name."""

    def forward(self, x: Tensor | None = None, **others: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(others["image"] if x is None else x)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the manifest of an archive that has no exported program."""
    manifest = ArchiveLayout(tmp_path).manifest
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text('{"model": {"serializedFile": "weights.pth", "modelFile": "model.py"}}')
    return tmp_path


def served(model: Masked, names: list[str], calls: list[ModelCall], folder: Path) -> EarlyExitModel:
    """Return what serves if an archive of a model is made with an --input of each name."""
    job = {"program": None, "input_shape": None, "own_samples": True, "folder": str(folder), "strategy": None,
           "inputs": [{"name": name, "shape": [4], "dtype": "float32"} for name in names], "output": None}
    return build_model(exported(job, CalledModel(model, ()), calls)[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", [Masked, Named])
@pytest.mark.parametrize("is_tried", [False, True])
def test_a_single_input_may_have_any_name(
        kind: type[Masked], is_tried: bool, folder: Path) -> None:
    model = kind().eval()
    calls = [ModelCall(model, (X,), {}, False)] if is_tried else []
    early = served(model, ["picture"], calls, folder)
    torch.testing.assert_close(early(X), model(X))
    torch.testing.assert_close(early(x=X), model(X))


@torch.no_grad()
def test_an_input_that_the_handler_passes_by_that_name_keeps_it(folder: Path) -> None:
    model = Named().eval()
    early = served(model, ["image"], [ModelCall(model, (), {"image": X}, False)], folder)
    torch.testing.assert_close(early(image=X), model(image=X))


def test_several_inputs_need_the_names_of_parameters(folder: Path) -> None:
    with pytest.raises(ArchiveError, match="forward of Masked takes x, shift, mask, but --input names 'image'"):
        served(Masked().eval(), ["image", "mask"], [], folder)
