"""Benchmarks at toy size: each command completes, and writes finite, plausible figures into the file that it names.

Commands that start servers are in test_commands_with_servers.py. `habits` and `dependence` have a test of their own,
tests/end_to_end/test_habits.py and test_dependence.py. `gpu` is only imported where there is no GPU.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

from early_exit.handler.recording.format import list_shards, read_shard
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.sample_request import BODY
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from tests.benchmarks import subjects
from tests.benchmarks.published import PUBLISHED
from tests.benchmarks.subjects import Subject
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.toy_size import (
    N_MEASURED,
    N_RECORDED,
    Requests,
    Run,
    command,
    digits_subject,
    in_one_batch,
    require_ratios,
)

pytestmark = pytest.mark.slow

BENCHMARKS = Path(subjects.__file__).parent
COMMANDS = [*sorted(f"benchmarks.{file.stem}" for file in BENCHMARKS.glob("*.py") if "def main()" in file.read_text()),
            "demo.__main__"]


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
    for name in ("eager", "folded"):
        row = rows[name, engine.EXITS]
        saved, ideally = 1 - row["ratio_to_same_engine"], 1 - row["ideal_ratio"]
        assert row["share_of_ideal"] == figures["share_of_ideal"][name]["8"] == pytest.approx(saved / ideally)
    assert all(sum(counts) == 8 for counts in figures["counts"]["8"])


def test_exits_stand_beside_int8(run: Run, recorder_mar: Path, requests: Requests,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = command("benchmarks.int8")
    for name, value in {"resnet18_full": lambda folder: digits_subject(folder, recorder_mar, requests),
                        "N_TIMED": 24,
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
    assert figures["exits"][-1]["share"] < 1 and rows["folded with exits"]["flops_ratio"] < 1


def test_what_recording_costs_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = command("benchmarks.overhead")
    monkeypatch.setitem(overhead.MODELS, "resnet18w32_32px", overhead.Measured(
        DigitsResNet, (1, 32, 32), {1: 3, 8: 3, 32: 3}, n_shards=2))
    figures = run(overhead, "--models", "resnet18w32_32px", "--records-per-shard", 32)
    found = figures["resnet18w32_32px"]
    assert found["max_error"] < 1e-4
    for name, sizes in (("no_exit_ratio", {"1", "8", "32"}), ("recording_ratio", {"1", "8", "32"}),
                        ("recording_ratio_10_mb", {"1"})):
        assert found[name].keys() == sizes
        require_ratios(*found[name].values())


def test_the_rules_promises_are_counted(run: Run, subject: Subject, requests: Requests,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    certify = command("benchmarks.certify")
    for name, value in {"N_TRAIN": 300, "N_OWN": 300, "N_TUNE": 150, "N_CERTIFY": 800,
                        "Distillation": partial(Distillation, epochs=3), "NETWORKS": {"digits": lambda folder: subject},
                        "load_requests": lambda: (list(requests.all), requests.labels),
                        "as_batch": lambda some: in_one_batch([one.body for one in some])}.items():
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
    monkeypatch.setattr("tests.benchmarks.rows.N_TIMED", 80)
    monkeypatch.setattr("tests.benchmarks.bench.TrainingOptions", partial(
        TrainingOptions, layers=4, recipe=Distillation(epochs=3)))
    methods = ("no-replay", "branchynet")
    figures = run(paper, "--subjects", "resnet18", "--methods", *methods, "--budgets", 0.05, "--measured", N_MEASURED)
    rows = figures["rows"]
    assert {row["method"] for row in rows} == {*methods} and not any("left_out" in row for row in rows)
    assert {row["tolerance"] for row in rows} == {0.05}, "no budget follows from what was measured"
    for row in rows:
        assert sum(row["hits"].values()) == pytest.approx(1)
        assert 0 <= row["disagreement"] <= 1 and -1 <= row["accuracy_loss"] <= 1 and 0 < row["flops_ratio"] < 1.5
        require_ratios(*row["cpu_time_ratio"].values(), row["size_ratio"], row["ltma_ratio"])


def test_what_is_measured_is_neither_recorded_nor_labelled(subject: Subject, requests: Requests) -> None:
    shards = [read_shard(shard, [], kept=True) for shard in list_shards(subject.records)]
    recorded = [KeptRequest.from_bytes(kept).item[BODY] for shard in shards for kept in shard.kept or ()]
    assert sorted(recorded) == sorted(requests.bodies[:N_RECORDED]), "each once, and no other"
    assert not {*recorded} & {*requests.bodies[N_RECORDED:]}
    assert [line.split(",")[0] for line in subject.labels.read_text().splitlines()] == [*requests.ids]
    assert len(subject.inputs) == len(subject.truth) == N_MEASURED


def test_each_network_of_the_paper_is_that_of_a_subject() -> None:
    source = Path(subjects.__file__).read_text()
    assert [name for name in PUBLISHED if f'"{name}"' not in source] == []


def test_malformed_requests_are_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = command("benchmarks.fuzz")
    monkeypatch.setattr(fuzz, "WARM_UP", 20)
    figures = run(fuzz, "--bad", 60)
    assert (figures["bad"], figures["good"], figures["sent"], figures["worker_deaths"]) == (60, 15, 75, 0)
    assert sum(figures["statuses"].values()) == 75 and figures["statuses"]["good: 200"] == 15
    assert figures["wrong_by_kind"] == {}


def test_drifts_are_noticed(run: Run, subject: Subject, requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    drift = command("benchmarks.drift")
    for name, value in {"STRENGTHS": {"noise": (1.0,)}, "LIMIT": 1000, "resnet18": lambda folder: subject,
                        "load_requests": lambda: (requests.bodies, requests.labels), "as_batch": in_one_batch,
                        "TrainingOptions": partial(TrainingOptions, 0.1, recipe=Distillation(epochs=3))}.items():
        monkeypatch.setattr(drift, name, value)
    figures = run(drift, "--streams", 4, "--requests", N_MEASURED // 2)
    assert figures["rows"] and 0 <= figures["false_alarm_share"] <= 1
    assert 0 < figures["median_samples_to_alarm"] < 1000
    noise, mixed, _ = figures["rows"]
    assert noise["disagreement_during"] > mixed["disagreement_during"] == pytest.approx(0.3)
    assert noise["alarmed_share"] == mixed["alarmed_share"] == 1


def test_a_killed_search_goes_on(run: Run, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    search = command("benchmarks.search")
    for name, value in {"TRIALS": 1, "TIMES": 2, "resnet18": lambda folder: subject}.items():
        monkeypatch.setattr(search, name, value)
    figures = run(search)
    assert figures["trials"] == figures["trials_wanted"] > figures["trials_before_kill"] > 0
    assert figures["trials_lost"] == 0 and figures["peak_mb"] > 0
    assert figures["many_records"] > figures["records"]
