"""Habits that `ee-archive` refuses, each for a listed reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from early_exit.handler.errors import Unsupported
from tests.support.habits.habit import CONFIG, Ask, UsersFiles
from tests.support.habits.rows import JSON, ROWS, rows


def torchscript(model: nn.Module, folder: Path) -> UsersFiles:
    torch.jit.trace(model, torch.zeros(2, 6)).save(folder / "model.pt")  # type: ignore[no-untyped-call]
    return UsersFiles(folder / "model.pt")


def aot_library(model: nn.Module, folder: Path) -> UsersFiles:
    batch = torch.export.Dim("batch", min=1, max=64)
    library = torch._export.aot_compile(model, (torch.zeros(2, 6),), dynamic_shapes=({0: batch},),
                                        options={"aot_inductor.output_path": str(folder / "model.so")})
    return UsersFiles(Path(str(library)))


def matrix(model: nn.Module, folder: Path) -> UsersFiles:
    np.save(folder / "matrix.npy", np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    return UsersFiles(extra=(folder / "matrix.npy",))


def two_weights(model: nn.Module, folder: Path) -> UsersFiles:
    for name, scale in (("weights.pth", 1.0), ("other.pth", 0.5)):
        torch.save({key: scale * tensor for key, tensor in model.state_dict().items()}, folder / name)
    return UsersFiles(folder / "weights.pth", (folder / "other.pth",))


SHARPENED = tuple(Ask(json.dumps({"row": row, "sharpness": 0.5 + number % 3}).encode(), JSON)
                  for number, row in enumerate(ROWS.tolist()))

REFUSED = (
    rows("torchscript", model_file=None, write=torchscript, refusal=Unsupported.TORCHSCRIPT),
    rows("traced", "traced.py", refusal=Unsupported.TORCHSCRIPT),
    rows("aot_library", model_file=None, write=aot_library, refusal=Unsupported.AOT_LIBRARY,
         config=CONFIG + "pt2:\n  export:\n    aot_compile: true\n"),
    rows("no_module", "no_module.py", model_file=None, write=matrix, refusal=Unsupported.NO_MODULE),
    rows("quantised", "quantised.py", refusal=Unsupported.TORCHSCRIPT),
    rows("branching", model_file="branching_net.py", refusal=Unsupported.CONTROL_FLOW),
    rows("two_heads", "two_heads.py", model_file="two_heads_net.py", refusal=Unsupported.SEVERAL_SCORES),
    rows("ensemble", "ensemble.py", write=two_weights, refusal=Unsupported.SEVERAL_SCORES),
    rows("sharpened_per_request", "sharpened_per_request.py", model_file="sharpened_net.py", asks=SHARPENED,
         refusal=Unsupported.CHANGES),
)
