"""Benchmarks at toy size: each command completes, and writes finite, plausible figures into the file that it names.

Some benchmarks are only imported and asked for their options. `answers`, `demo`, `drift`, `habits`, `loop`, `recovery`
and `roll` take minutes with a server even at toy size, and so do the processes of `dependence` and `search`. The last
one is `gpu`.
"""

from __future__ import annotations

import importlib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.allocator import ALLOCATOR
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from tests.benchmarks import subjects
from tests.benchmarks.subjects import Subject
from tests.support import digits
from tests.support.digits import batches
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.sources import ids_in
from tests.support.untried import build_untried

pytestmark = pytest.mark.slow

N_RECORDED, N_MEASURED = 900, 200
BENCHMARKS = Path(subjects.__file__).parent
COMMANDS = [*sorted(f"benchmarks.{file.stem}" for file in BENCHMARKS.glob("*.py") if "def main()" in file.read_text()),
            "demo.__main__"]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_backbone: DigitsResNet) -> Iterator[Run]:
    """Yield a function that runs a benchmark's command in this process and returns the figures that it wrote.

    To save a minute, commands do not restart with the server's allocator, and archives are not tried out.
    """
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads = torch.get_num_threads()
    for name, value in ALLOCATOR.items():
        monkeypatch.setenv(name, value)

    def run(benchmark: ModuleType, *arguments: object) -> dict[str, Any]:
        for name, instead in (("build_archive", build_untried), ("train_backbone", lambda **_: digits_backbone)):
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


def command(name: str) -> ModuleType:
    return importlib.import_module(f"tests.{name}")


@pytest.fixture(scope="module")
def requests() -> tuple[list[digits.Request], list[str]]:
    """Return the recorded requests followed by the measured ones, and the IDs of the recorded ones."""
    recorded, parts = digits.recorded_traffic(N_RECORDED, seed=1)
    return [*recorded, *digits.measured_traffic(N_MEASURED, seed=2)], ids_in(parts)


@pytest.fixture(scope="module")
def subject(recorder_mar: Path, requests: tuple[list[digits.Request], list[str]],
            tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Return a subject of the benchmarks that has digits instead of photos."""
    return digits_subject(tmp_path_factory.mktemp("subject"), recorder_mar, requests)


def digits_subject(folder: Path, recorder_mar: Path, requests: tuple[list[digits.Request], list[str]]) -> Subject:
    shown, ids = requests
    (folder / "store").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "build_archive", lambda asked: recorder_mar)
        (folder / "store" / recorder_mar.name).symlink_to(recorder_mar)
        return subjects._subject(folder, "ResNet", "digits", ArchiveRequest("none", folder / "store"),
                                 [one.body for one in shown], [one.label for one in shown], n_recorded=len(ids),
                                 ids=ids, replay=None)


def require_ratios(*ratios: float) -> None:
    """Check ratios loosely: other work on the machine changes them, but does not make them negative or huge."""
    assert all(math.isfinite(ratio) and 0.001 < ratio < 1000 for ratio in ratios), ratios


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_is_imported_and_tells_its_options(
        name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command(name).main()
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out


def test_models_are_covered(run: Run) -> None:
    figures = run(command("benchmarks.coverage"), "--families", "torchvision", "--models", "squeezenet1_1")
    [model] = figures["models"]
    assert (figures["total"], figures["torchvision_ok"], model["ok"]) == (1, 1, True)
    assert model["candidates"] >= 2 and 0 <= model["served_error"] < 1e-4


def small_resnet50(**_: object) -> ResNet:
    """Return a ResNet-50 in which the inner convolutions of each bottleneck have a quarter of the channels."""
    torch.manual_seed(0)
    return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=16)


def test_engines_are_compared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = command("benchmarks.engine")
    monkeypatch.setattr("torchvision.models.resnet50", small_resnet50)
    monkeypatch.setattr(engine, "memory", lambda folder: {"ratio": 1.0})  # it would start two processes
    figures = run(engine, "--engines", "folded", "--batches", 8, "--rounds", 2)
    rows = {(one["engine"], one["exits"]): one for one in figures["cells"]}
    assert rows.keys() == {(name, exits) for name in ("eager", "folded") for exits in ("none", engine.EXITS)}
    require_ratios(*(one["ratio_to_same_engine"] for one in rows.values()),
                   *(one["ratio_to_eager"] for one in rows.values()), figures["exits_same_engine_b8"])
    assert figures["exits_same_engine_b8"] == rows["folded", engine.EXITS]["ratio_to_same_engine"]
    assert all(sum(counts) == 8 for counts in figures["counts"]["8"])


def test_exits_stand_beside_int8(run: Run, recorder_mar: Path, requests: tuple[list[digits.Request], list[str]],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = command("benchmarks.int8")
    for name, value in {"resnet18_full": lambda folder: digits_subject(folder, recorder_mar, requests),
                        "N_BATCHES": {1: 3, 8: 3, 32: 2},
                        "TrainingOptions": partial(TrainingOptions, layers=2, recipe=Distillation(epochs=3))}.items():
        monkeypatch.setattr(int8, name, value)
    figures = run(int8, "--rounds", 1, "--tolerance", 0.3)
    rows = {one["arm"]: one for one in figures["rows"]}
    assert [*rows] == ["original", "folded", "folded with exits", "openvino-int8", "openvino-int8 with exits"]
    assert rows["original"]["disagreement"] == rows["folded"]["disagreement"] == 0
    for row in rows.values():
        assert 0 <= row["disagreement"] <= 1 and -1 <= row["accuracy_loss"] <= 1 and 0 < row["flops_ratio"] < 1.5
        assert (row["certificate"] is not None) == row["arm"].endswith("with exits")
        require_ratios(*row["cpu_time_ratio"].values())
    assert sum(one["share"] for one in figures["exits"]) == pytest.approx(1)


def test_what_recording_costs_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = command("benchmarks.overhead")
    monkeypatch.setitem(overhead.MODELS, "resnet18w32_32px", (DigitsResNet, (1, 32, 32), {1: 3, 8: 3, 32: 3}))
    figures = run(overhead, "--models", "resnet18w32_32px", "--shards", 2, "--records-per-shard", 32)
    found = figures["resnet18w32_32px"]
    assert found["max_error"] < 1e-4
    for name, sizes in (("no_exit_ratio", {"1", "8", "32"}), ("recording_ratio", {"1", "8", "32"}),
                        ("recording_ratio_10_mb", {"1"})):
        assert found[name].keys() == sizes
        require_ratios(*found[name].values())


def test_the_rules_promises_are_counted(
        run: Run, subject: Subject, requests: tuple[list[digits.Request], list[str]],
        monkeypatch: pytest.MonkeyPatch) -> None:
    certify = command("benchmarks.certify")
    shown, _ = requests
    for name, value in {"N_TRAIN": 300, "N_OWN": 300, "N_TUNE": 150, "N_CERTIFY": 300,
                        "Distillation": partial(Distillation, epochs=3), "resnet18": lambda folder: subject,
                        "load_requests": lambda: (shown, [one.label for one in shown]),
                        "as_batch": lambda some: torch.cat(list(batches(some, len(some))))}.items():
        monkeypatch.setattr(certify, name, value)
    figures = run(certify, "--splits", 2)
    assert figures["n"] == 2 and len(figures["rows"]) == 2 * len(certify.RULES)
    for rule in certify.RULES:
        low, high = figures[f"{rule}_broken_interval"]
        assert 0 <= low <= figures[f"{rule}_broken_share"] <= high <= 1
    assert all(0 < row["mean_flops_ratio"] < 1.5 and 0 <= row["mean_disagreement"] <= row["worst_disagreement"] <= 1
               for row in figures["rows"])


def test_methods_have_rows(run: Run, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = command("benchmarks.paper")
    monkeypatch.setitem(paper.SUBJECTS, "resnet18", lambda folder: subject)
    monkeypatch.setattr("tests.benchmarks.rows.N_BATCHES", {1: 20, 8: 10, 32: 5})
    monkeypatch.setattr("tests.benchmarks.bench.TrainingOptions", partial(
        TrainingOptions, layers=4, recipe=Distillation(epochs=3)))
    methods = ("no-replay", "branchynet")
    figures = run(paper, "--subjects", "resnet18", "--methods", *methods, "--budgets", 0.05, "--measured", N_MEASURED)
    rows = figures["rows"]
    assert {row["method"] for row in rows} == {*methods} and not any("left_out" in row for row in rows)
    for row in rows:
        assert sum(row["hits"].values()) == pytest.approx(1)
        assert 0 <= row["disagreement"] <= 1 and -1 <= row["accuracy_loss"] <= 1 and 0 < row["flops_ratio"] < 1.5
        require_ratios(*row["cpu_time_ratio"].values(), row["size_ratio"], row["ltma_ratio"])


def test_malformed_requests_are_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = command("benchmarks.fuzz")
    monkeypatch.setattr(fuzz, "WARM_UP", 20)
    figures = run(fuzz, "--bad", 60)
    assert (figures["bad"], figures["good"], figures["sent"], figures["worker_deaths"]) == (60, 15, 75, 0)
    assert sum(figures["statuses"].values()) == 75 and figures["statuses"]["good: 200"] == 15
    assert figures["wrong_by_kind"] == {}
