"""Fixtures that run a benchmark's command in this process, with digits instead of photos."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from early_exit.handler.allocator import ALLOCATOR
from tests.benchmarks.subjects import Subject
from tests.support import digits
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.sources import ids_in
from tests.support.toy_size import N_MEASURED, N_RECORDED, Requests, Run, digits_subject
from tests.support.untried import build_untried


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_backbone: DigitsResNet) -> Iterator[Run]:
    """Yield a function that runs a benchmark's command in this process and returns the figures that it wrote.

    To save a minute, commands do not restart with the server's allocator, and archives are not tried out.
    """
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads = torch.get_num_threads()
    for name, value in ALLOCATOR.items():
        monkeypatch.setenv(name, value)

    def trained(n_steps: int = 0, *, kind: type[nn.Module] = DigitsResNet, **more: Any) -> nn.Module:
        return digits_backbone if kind is DigitsResNet else digits.train_backbone(n_steps, kind=kind, **more)

    def run(benchmark: ModuleType, *arguments: object) -> dict[str, Any]:
        for name, instead in (("build_archive", build_untried), ("train_backbone", trained)):
            if hasattr(benchmark, name):
                monkeypatch.setattr(benchmark, name, instead)
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, "--json", *map(str, (file, *arguments))])
        assert not benchmark.main()
        figures: dict[str, Any] = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN or infinity
        return figures

    yield run
    torch.set_num_threads(threads)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def requests() -> Requests:
    recorded, parts = digits.recorded_traffic(N_RECORDED, seed=1)
    return Requests([*recorded, *digits.measured_traffic(N_MEASURED, seed=2)], ids_in(parts))


@pytest.fixture(scope="module")
def subject(recorder_mar: Path, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Return a subject of the benchmarks that has digits instead of photos."""
    return digits_subject(tmp_path_factory.mktemp("subject"), recorder_mar, requests)
