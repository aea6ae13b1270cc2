"""No method of the paper's tables sees the test data when it chooses exits, and all are measured on the same terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.inference_head import InferenceHead
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Exit
from early_exit.training.heads.distill import Distillation
from tests.benchmarks.baselines import earlyon
from tests.benchmarks.bench import BATCH, Bench
from tests.benchmarks.methods import BUDGETS, LAYER_COUNTS, METHODS, Choice, Terms
from tests.benchmarks.paper import attempt, is_resumed
from tests.benchmarks.published import PUBLISHED
from tests.benchmarks.rows import as_served
from tests.benchmarks.subjects import Subject
from tests.support.recording import record
from tests.support.residual import recorded_inputs, residual_backbone

pytestmark = pytest.mark.slow

N_RECORDS = 1500
BASELINES = ("branchynet", "gati", "earlyon")


class Unseen:
    """A stand-in for the test data that raises an error at any use."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise AssertionError(f"a choice looks at what is measured: {name}")

    def __len__(self) -> NoReturn:
        raise AssertionError("a choice counts what is measured")

    def __getitem__(self, index: object) -> NoReturn:
        raise AssertionError("a choice takes some of what is measured")

    @classmethod
    def __torch_function__(cls, *arguments: object) -> NoReturn:
        raise AssertionError("a choice computes with what is measured")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return the records of a small backbone whose exits pay and whose batches shrink once enough rows are answered.

    Any use of the test data is an error.
    """
    folder = tmp_path_factory.mktemp("subject")
    backbone, inputs = residual_backbone(), recorded_inputs()[:N_RECORDS]
    archive = ArchiveLayout(folder / "archive")
    archive.folder.mkdir(parents=True)
    backbone.save(archive.folder)
    record(backbone, inputs, folder / "records")
    with torch.no_grad():
        classes = backbone.graph(inputs).argmax(dim=1).tolist()
    (folder / "labels.csv").write_text("".join(f"request-{number},{one}\n" for number, one in enumerate(classes)))
    unseen: Any = Unseen()
    subject = Subject("ResNet-18", "vectors", archive, backbone, folder / "records", folder / "labels.csv",
                      unseen, unseen, None)
    made = Bench.prepare(subject, folder / "run", 1)
    profile = replace(made.profile, stages=tuple(tuple(map(float, made.profile.sizes)) for _ in made.profile.stages),
                      shrinks=tuple((12.0,) * len(made.profile.sizes) for _ in made.profile.shrinks))
    return replace(made, profile=profile, options=replace(made.options, recipe=Distillation(epochs=15)))


@pytest.fixture(scope="module")
def choose(bench: Bench) -> Generator[Callable[[str], list[Choice]]]:
    """Yield a function that returns the choices of a method, one for each of its table rows, with two budgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(earlyon, "EPOCHS", 2)

        @cache
        def chosen(method: str) -> list[Choice]:
            return [METHODS[method].choose(bench, terms) for terms in METHODS[method].terms(bench, (0.02, 0.3))]

        yield chosen


@pytest.mark.parametrize("method", METHODS)
def test_no_choice_sees_what_is_measured(method: str, choose: Callable[[str], list[Choice]]) -> None:
    assert any(choice.exits for choice in choose(method))


def test_whoever_looks_at_what_is_measured_fails() -> None:
    unseen: Any = Unseen()
    for look in (lambda: unseen.shape, lambda: len(unseen), lambda: unseen[0], lambda: torch.argmax(unseen)):
        with pytest.raises(AssertionError, match="measured"):
            look()


def test_budgets_are_those_that_were_fixed_and_every_pair_with_a_number_of_layers_has_a_row(bench: Bench) -> None:
    n = len(bench.layers(None))
    offered = {n if count is None or count >= n else count for count in LAYER_COUNTS}
    for method in (*BASELINES, "paper", "equal"):
        terms = list(METHODS[method].terms(bench, BUDGETS))
        assert Counter(one.budget for one in terms) == dict.fromkeys(BUDGETS, len(offered)), method
        assert {one.layers or n for one in terms} == offered, method


@pytest.mark.parametrize("method", [*BASELINES, "paper", "equal"])
def test_a_number_of_layers_means_the_same_ones_for_every_method(method: str, bench: Bench,
                                                                 choose: Callable[[str], list[Choice]]) -> None:
    few = {layer.path for layer in bench.layers(4)}
    assert len(few) == 4 < len(bench.layers(None)) and 4 in LAYER_COUNTS
    with_few = [choice for choice in choose(method) if choice.about["layers"] == len(few)]
    assert len(with_few) == 2
    for choice in with_few:
        assert choice.exits.keys() <= few


@pytest.mark.parametrize("method", METHODS)
def test_every_method_shrinks_batches_where_the_profile_says_that_it_pays(
        method: str, bench: Bench, choose: Callable[[str], list[Choice]]) -> None:
    size = {"certified-batch-8": 8, "certified-batch-1": 1}.get(method, BATCH)
    for choice in choose(method):
        paths = [layer.path for layer in bench.layers(None) if layer.path in choice.exits]
        expected = bench.profile.shrink_from(paths, size) if paths else ()
        assert tuple(choice.exits[path].shrink_from for path in paths) == expected
        assert size == 1 or 1 not in expected


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_heads_serve_in_their_optimised_form_and_say_the_same(
        method: str, bench: Bench, choose: Callable[[str], list[Choice]]) -> None:
    choice = next(choice for choice in choose(method) if choice.exits)
    for layer in bench.layers(None):
        if (exit_ := choice.exits.get(layer.path)) is None:
            continue
        x = torch.randn(40, *layer.shape)
        served = as_served(exit_)
        logits = exit_.head(x)
        assert isinstance(served.head, InferenceHead)
        torch.testing.assert_close(served.answer(served.head(x)), exit_.answer(logits))
        assert torch.equal(served.policy(served.head(x)), exit_.policy(logits))


def test_a_head_that_cannot_be_optimised_is_refused() -> None:
    with pytest.raises(TypeError, match="a head of ours"):
        as_served(Exit(torch.nn.Linear(4, 2), ConfidencePolicy(1.0, 0.5), lambda scores: scores))


def test_the_temperature_serves_in_the_weights() -> None:
    torch.manual_seed(0)
    head, x = Head(HeadSpec(), (8,), 3).eval(), torch.randn(5, 8)
    policy = ConfidencePolicy(2.5, 0.5)
    served = as_served(Exit(head, policy, policy.answers))
    torch.testing.assert_close(served.head(x), head(x) / 2.5)
    assert torch.equal(served.policy(served.head(x)), policy(head(x)))


def test_a_row_of_the_papers_network_has_the_papers_figures(bench: Bench) -> None:
    inputs = torch.randn(600, 16)
    with torch.no_grad():
        full = bench.subject.backbone.graph(inputs)
    found = attempt(bench, "certified", Terms(0.02, None), inputs, full.argmax(dim=1), full)
    assert {"backbone", "data", "method", "flops_ratio", "accuracy_loss", "disagreement"} <= found.keys()
    assert found["cpu_time_ratio"].keys() == {"1", "8", "32"}
    assert found["paper"]["flops_ratio"] == 0.541 and found["paper"]["accuracy_loss"] == 0.0251
    other = replace(bench, subject=replace(bench.subject, name="another"))
    assert "paper" not in attempt(other, "certified", Terms(0.02, None), inputs, full.argmax(dim=1), full)


def test_certified_at_the_papers_loss_has_a_row_where_the_paper_has_the_network(bench: Bench) -> None:
    method = METHODS["certified-papers-loss"]
    [terms] = method.terms(bench, BUDGETS)
    assert terms.budget == PUBLISHED["ResNet-18"].accuracy_loss
    other = replace(bench, subject=replace(bench.subject, name="another"))
    assert list(method.terms(other, BUDGETS)) == []


@pytest.mark.parametrize(("name", "flops", "time", "loss"), [
    ("ResNet-18", 0.54, 0.75, 0.025), ("ResNet-50", 0.42, 0.54, 0.025), ("MobileFaceNet", 0.62, 0.67, 0.009),
    ("EfficientNet-Lite0", 0.67, 0.71, 0.020), ("Mask R-CNN (ResNet-18)", 0.55, 0.55, 0.086),
    ("DLRM", 0.65, 0.85, 0.065)])
def test_the_papers_figures_are_those_of_its_tables(name: str, flops: float, time: float, loss: float) -> None:
    told = PUBLISHED[name].to_json()
    assert told["flops_ratio"] == pytest.approx(flops, abs=0.005)
    assert told["cpu_time_ratio"]["32"] == pytest.approx(time, abs=0.005)
    assert told["accuracy_loss"] == pytest.approx(loss, abs=0.0005)
    disagree = abs(told["cpu_time_ratio"]["32"] - told["cpu_time_ratio_by_its_ms"]["32"]) > 0.01
    assert disagree == (name in ("ResNet-50", "Mask R-CNN (ResNet-18)"))


def test_work_of_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    run = {"commit": "0123456789ab", "torch": "2.9.1", "processor": "one", "settings": {"trials": 20}}
    assert not is_resumed(tmp_path / "work", run) and is_resumed(tmp_path / "work", run)
    for other in ({"commit": "ba9876543210"}, {"processor": "another"}, {"settings": {"trials": 3}}):
        with pytest.raises(ConfigError, match="holds the work of another run"):
            is_resumed(tmp_path / "work", {**run, **other})
