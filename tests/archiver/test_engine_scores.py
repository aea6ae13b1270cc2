"""`ee-archive` compares the scores of the engine that will serve with those of the exported model."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from early_exit.archiver.packaging.tryout.checking import scores_compared
from early_exit.archiver.packaging.tryout.child import LoadingError
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.engines.registry import ENGINES
from early_exit.handler.errors import ArchiveError
from early_exit.handler.model.loading import build_model
from tests.archiver.test_tryout import HANDLER, archived, samples
from tests.support.plans import random_exits
from tests.support.row_handlers import backbone_of_rows, requests

__all__ = ["samples"]  # a fixture

NAMES = [engine.name for engine in ENGINES.values() if not engine.needs_calibration]
CANCELLING = """

def Cancelling(net):
    class Cancelling_(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.filter, self.norm = net, torch.nn.Conv1d(1, 3, 4), torch.nn.BatchNorm1d(3)
            torch.nn.init.constant_(self.norm.running_var, 7.0)

        def forward(self, x):
            y, z = self.filter(x[:, None]), self.filter(x[:, None])
            return self.net(x.clamp(-1, 1)) + (self.norm(y) * 7.00001 ** 0.5 - z)[:, :, 0]

    return Cancelling_()
"""


def altered(backbone: Backbone) -> Backbone:
    """Return the backbone with another bias of its last layer."""
    graph = copy.deepcopy(backbone.graph)
    *_, last = graph.parameters()
    last.data += 0.01
    return replace(backbone, graph=graph)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_altered", [False, True])
def test_scores_that_are_off_are_refused_whatever_a_handler_makes_of_them(name: str, is_altered: bool) -> None:
    """With an engine that changes answers, these are the scores that certificate and monitor compare with."""
    backbone = backbone_of_rows()
    served = build_model(backbone, *random_exits(backbone, name), engine=name)
    refused = pytest.raises(LoadingError, match=f"the engine {name} computes scores that are off by .*allowed: 1e-04")
    original = altered(backbone) if is_altered else backbone
    with refused if is_altered else nullcontext(), scores_compared(served, original):
        served(torch.tensor(requests(16)))
    served(torch.tensor(requests(1)))


@pytest.mark.parametrize("engine", ["folded", "eager"])
def test_an_archive_is_refused_if_its_engine_rounds_more_than_is_promised(
        tmp_path: Path, samples: list[Path], engine: str) -> None:
    """The second sample is large, and large numbers cancel out in this model."""
    samples[1].write_text("[1e7, -3e7, 2.1e7, 0.7e7]")
    refused = pytest.raises(ArchiveError, match="the engine folded computes .* choose another engine, such as --engine")
    with refused if engine == "folded" else nullcontext():
        archived(tmp_path, HANDLER.format(
            initialize="        torch.manual_seed(0)\n        self.model = Cancelling(self.model).eval()",
            postprocess="        return scores.argmax(1).tolist()") + CANCELLING, samples, engine=engine)
