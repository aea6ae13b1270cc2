"""Benchmarks at toy size: their modules, and a subject with a few hundred digits."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from early_exit.archiver.packaging.request import ArchiveRequest
from tests.benchmarks import subjects
from tests.benchmarks.subjects import Subject
from tests.support import digits

N_RECORDED, N_MEASURED = 900, 200
Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Requests:
    """Requests to record, followed by those to measure with."""

    all: Sequence[digits.Request]
    ids: Sequence[str]
    """The IDs of the requests to record."""

    @property
    def bodies(self) -> list[bytes]:
        return [one.body for one in self.all]

    @property
    def labels(self) -> list[int]:
        return [one.label for one in self.all]


def command(name: str) -> ModuleType:
    """Import a benchmark, such as `benchmarks.engine`, or `demo.__main__`."""
    return importlib.import_module(f"tests.{name}")


def digits_subject(folder: Path, recorder_mar: Path, requests: Requests) -> Subject:
    """Return a subject of the benchmarks that has digits instead of photos."""
    (folder / "store").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "build_archive", lambda asked: recorder_mar)
        (folder / "store" / recorder_mar.name).symlink_to(recorder_mar)
        return subjects._subject(folder, "ResNet", "digits", ArchiveRequest("none", folder / "store"), requests.bodies,
                                 requests.labels, n_recorded=len(requests.ids), ids=requests.ids, replay=None)


def in_one_batch(bodies: Sequence[bytes]) -> Tensor:
    """Return digits as the (N, 1, 32, 32) batch that the handler gives to the model."""
    [batch] = digits.batches([digits.Request(body, label=0) for body in bodies], len(bodies))
    return batch


def require_ratios(*ratios: float) -> None:
    """Check ratios loosely: other work on the machine changes them, but does not make them negative or huge."""
    assert all(math.isfinite(ratio) and 0.001 < ratio < 1000 for ratio in ratios), ratios
