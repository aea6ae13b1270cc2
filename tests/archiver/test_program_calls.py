"""A handler that calls its model with None goes on working when an exported program takes the model's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from early_exit.archiver.packaging.tryout.adoption import CalledModel
from early_exit.archiver.packaging.tryout.exporting import exported
from early_exit.archiver.packaging.tryout.model_calls import ModelCall
from early_exit.handler.backbone.export import export_backbone
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.errors import InputError
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from tests.handler.test_binding import Masked

X, MASK = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.0, 1, 1, 0]] * 3)
BATCH = Dim("batch", min=1)


class WithScale(Masked):
    def forward(self, x: Tensor, scale: float | None = 2.0, **others: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x * 2.0)


def served(program: torch.export.ExportedProgram, model: nn.Module, call: tuple[Any, ...], folder: Path
           ) -> EarlyExitModel:
    """Return what serves if an archive is made with --program and the handler calls the model like this."""
    torch.export.save(program, folder / "model.pt2")
    job = {"program": str(folder / "model.pt2"), "input_shape": None, "own_samples": True, "folder": str(folder)}
    backbone, fits = exported(job, CalledModel(model, ()), [ModelCall(model, call, {}, False)])
    assert fits
    return build_model(backbone)


@torch.no_grad()
def test_none_is_no_argument_for_a_program_with_the_names_of_the_model(tmp_path: Path) -> None:
    model = Masked().eval()
    rows = {0: BATCH}
    program = torch.export.export(model, (X,), {"mask": MASK}, dynamic_shapes={"x": rows, "mask": rows})
    early = served(program, model, (X, None, MASK), tmp_path)
    for given, named in (((X, None, MASK), {}), ((X,), {"mask": MASK}), ((X,), {"shift": None, "mask": MASK})):
        torch.testing.assert_close(early(*given, **named), model(X, None, MASK))
    with pytest.raises(InputError, match="expected the inputs x, mask"):
        early(X, MASK)


@torch.no_grad()
@pytest.mark.parametrize("names", ["of the model", "of another one"])
@pytest.mark.parametrize("kind", [Masked, WithScale])
def test_none_is_no_argument_for_a_program_with_one_input(names: str, kind: type[Masked], tmp_path: Path) -> None:
    model = kind().eval()
    program = (torch.export.export(Masked().eval(), (X,), dynamic_shapes={"x": {0: BATCH}})
               if names == "of the model" else export_backbone(model, [InputSpec("x", (4,))])[0])
    early = served(program, model, (X,), tmp_path)
    for given, named in (((X,), {}), ((X, None), {}), ((X,), {"scale": None}), ((X,), {"mask": None})):
        if kind is WithScale or "scale" not in named:
            torch.testing.assert_close(early(*given, **named), early(X))
    with pytest.raises(InputError):
        early(X, X)
