"""Benchmarks with a TorchServe, and the demo, at toy size: each completes and writes finite, plausible figures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from tests.support import digits
from tests.support.arms import ARMS
from tests.support.cifar import DataMissing
from tests.support.loop import LoopResult
from tests.support.models.demo_resnet import DemoResNet
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.plans import write_plan
from tests.support.skips import NO_DATA
from tests.support.toy_size import Run, command, in_one_batch, require_ratios
from tests.support.untried import build_untried
from tests.support.without_openvino import without_openvino

pytestmark = pytest.mark.slow

N_MEASURED = 96


@pytest.fixture(scope="module", autouse=True)
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide OpenVINO from the servers, whose workers start sooner then."""
    with without_openvino(tmp_path_factory.mktemp("without")):
        yield


def test_the_demo_and_the_loop_compare_three_arms(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`loop` gets the servers' part of the demo's run, because only the model and the images differ."""
    demo, loop = command("demo.__main__"), command("benchmarks.loop")
    demo_loop, weights, kept = demo.run_loop, dict[str, Any](), list[LoopResult]()

    def keeping(original: Path, *arguments: Any, **more: Any) -> LoopResult:
        weights.update(torch.load(original.with_name("weights.pth"), weights_only=True))
        found = demo_loop(original, *arguments, **more)
        kept.append(replace(found, **{name: Path(shutil.copy(getattr(found, name), tmp_path))
                                      for name in ("recorder", "exiting")}))
        return found

    options = TrainingOptions(0.2, search=None, recipe=Distillation(epochs=3))
    for name, value in {"N_STEPS": 40, "N_MEASURE": N_MEASURED, "PICTURE": tmp_path / "river.svg", "OPTIONS": options,
                        "run_loop": keeping}.items():
        monkeypatch.setattr(demo, name, value)
    for name in ("loop", "arms"):
        monkeypatch.setattr(f"tests.support.{name}.build_archive", build_untried)
    monkeypatch.setattr("tests.support.arms._SEALED_S", 1.0)
    require_three_arms(run(demo))
    assert (tmp_path / "river.svg").read_text().startswith("<svg")

    measured = 2 * digits.measured_traffic(N_MEASURED, 2, demo.N_FOR_BACKBONE)
    for name, value in {"load_requests": lambda: ([one.body for one in measured], [one.label for one in measured]),
                        "load_weights": lambda name: weights, "ResNet18W32": DemoResNet, "as_batch": in_one_batch,
                        "original_mar": lambda *_: None,
                        "run_loop": create_autospec(demo_loop, return_value=kept[0])}.items():
        monkeypatch.setattr(loop, name, value)
    require_three_arms(run(loop, "--images", 2 * N_MEASURED))


def require_three_arms(figures: dict[str, Any]) -> None:
    assert figures["failed"] == 0 < figures["requests"]
    assert sum(figures["hits"].values()) == pytest.approx(1) and figures["hits"]["full"] < 1
    assert figures["disagreement_without_exits"] == 0 <= figures["disagreement"] <= 1
    for other in ("vs_original", "vs_without_exits"):
        require_ratios(*figures[other]["cpu_time_ratio_by_batch"].values(), figures[other]["flops_ratio"])
    for name in ("flops_ratio", "cpu_time_ratio", "cpu_time_ratio_by_batch"):
        assert figures[name] == figures["vs_without_exits"][name], "fields without a baseline in their name keep theirs"
    assert all(figures["worker_cpu_ms_per_request"][arm] > 0 for arm in ARMS)


def test_answers_leave_in_three_modes(run: Run, recorder_mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part (b) gets the rows that were measured for part (a), because only the model and the requests differ."""
    answers, rows = command("benchmarks.answers"), list[dict[str, Any]]()
    measured = answers.measure

    def measure(part: str, *arguments: Any) -> list[dict[str, Any]]:
        rows.extend(measured(part, *arguments) if not rows else ())
        return [{**row, "part": part} for row in rows]

    def prepared(folder: Path) -> tuple[Path, Path, list[bytes]]:
        return recorder_mar, write_plan(folder / "plan", recorder_mar), bodies

    bodies = [one.body for one in digits.traffic(40, seed=3)]
    for name, value in {"photos": prepared, "cifar": prepared, "CLIENTS": (1, 8), "measure": measure}.items():
        monkeypatch.setattr(answers, name, value)
    figures = run(answers, "--requests", 40, 40)
    assert len(figures["rows"]) == 2 * 3 * len(answers.MODES)
    for row in figures["rows"]:
        assert row["failed"] == 0 and row["requests"] == 40 and sum(row["hits"].values()) == pytest.approx(1)
        assert set(row["hits"]) == {"full"} if row["mode"] == "plain" else len(row["hits"]) > 1
    require_ratios(figures["early_p50_ratio"], figures["batched_p50_ratio"])


def test_rolls_lose_nothing(run: Run, digits_backbone: DigitsResNet, monkeypatch: pytest.MonkeyPatch) -> None:
    roll = command("benchmarks.roll")
    for name, value in {"WARM_UP_S": 1.0, "QUIET_S": 2.0, "CLIENTS": 2, "PAUSE_S": 0.02,
                        "exits_off_s": partial(roll.exits_off_s, times=1, silent_s=1.0)}.items():
        monkeypatch.setattr(roll, name, value)
    for name, value in {"adoption.SCALED": (1, 3), "rivals.STAYS_S": 0.5, "switching._WARM_UP_S": 1.5,
                        "switching._AFTER_S": 1.0}.items():  # fewer workers start, and there is less waiting
        monkeypatch.setattr(f"tests.benchmarks.{name}", value)
    for name in ("adoption", "rivals", "roll"):
        monkeypatch.setattr(f"tests.benchmarks.{name}.build_archive", build_untried)
        monkeypatch.setattr(f"tests.benchmarks.{name}.train_backbone", lambda n_steps: digits_backbone)
    figures = run(roll, "--answers", "plain", "--rolls", 1, "--rollbacks", 0, "--requests", 100, "--rivals", 1)
    assert figures["requests"] >= 100 and figures["failed"] == figures["lost"] == figures["rivals_wrong"] == 0
    assert figures["settings_kept"] and figures["put_back_to_original"] and 0 < figures["exits_off_s"] < 60
    require_ratios(figures["p99_ratio"])


def test_a_recovery_without_enough_records_is_reported_as_it_failed(
        run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole recovery takes minutes; test_watch.py has one of a smaller model."""
    recovery = command("benchmarks.recovery")
    try:
        bodies, labels = recovery.load_requests()
    except DataMissing:
        pytest.skip(NO_DATA)
    monkeypatch.setattr(recovery, "load_requests", lambda: (bodies[:200], labels[:200]))
    figures = run(recovery, "--runs", 1, "--requests", 60, 20, 40)
    [told] = figures["each"]
    assert figures["recovered"] == 0 == told["failed"] and not told["recovered"]
    assert "expected the watcher to note 'rolled'" in told["failure"]
