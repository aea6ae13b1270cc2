"""A value that is not finite costs one record: that record is counted, no other is lost, and the monitor goes on."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.scores import NO_CLASS, ScoreKind
from early_exit.handler.config import ServingConfig
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.exits.risk import Risk
from early_exit.handler.model.loading import build_model
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import Capital, Evidence, MonitorState
from early_exit.handler.monitor.shared_state import monitor_file, read_state
from early_exit.handler.recording.format import Records, list_shards, read_header, read_shard, request_hash
from tests.support.host import MemoryHost, calls_of_rows, worker_of
from tests.support.shadow_samples import samples_of


class Spread(nn.Module):
    """A layer that divides by the spread of its input, which is 0 for a row of equal values."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(
        Spread(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 3)), (8,))


def recorded(backbone: Backbone, rows: Tensor, folder: Path, engine: str = "folded") -> tuple[Records, MemoryHost]:
    """Serve rows in batches of four; return their records and the host."""
    host = MemoryHost()
    model = build_model(backbone, engine=engine, sampling_rate=1.0, record_layers=8)
    worker = worker_of(model, config=ServingConfig(records=str(folder), records_per_shard=len(rows)), host=host)
    for start in range(0, len(rows), 4):
        names = [f"id-{number}" for number in range(start, min(start + 4, len(rows)))]
        replies = worker.step(calls_of_rows([rows[start:start + 4]], names))
        assert all(reply and reply.status == 200 for reply in replies)
    while not (shards := list_shards(folder)):
        time.sleep(0.01)
    worker.step(calls_of_rows([torch.randn(1, 8)], ["after it"]))  # the host then learns what could not be recorded
    worker.close()
    [shard] = shards
    return read_shard(shard, [layer.path for layer in backbone.description.candidates]), host


@pytest.mark.parametrize("bad", [
    torch.zeros(8), torch.full((8,), math.nan), torch.tensor([math.inf, *[0.0] * 7]), torch.tensor([-math.inf] * 8)],
    ids=["black", "nan", "infinity", "minus infinity"])
def test_one_bad_input_costs_its_own_record_and_nothing_of_its_batch(
        bad: Tensor, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    expected, _ = recorded(backbone, torch.cat([rows[:5], rows[6:]]), tmp_path / "without")
    rows[5] = bad
    with caplog.at_level(logging.WARNING, logger="early_exit"):
        found, host = recorded(backbone, rows, tmp_path / "with")
    others = [number for number in range(16) if number != 5]
    assert found.request.tolist() == [request_hash(f"id-{number}") for number in others]
    assert found.sequence.tolist() == others, "it was a request, though none that is recorded"
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities, atol=2e-3, rtol=2e-3)
    assert all(bool(activation.isfinite().all()) for activation in found.activations.values())
    assert host.value("records_not_finite_total") == 1
    assert [read_header(shard).n_not_finite for shard in list_shards(tmp_path / "with")] == [1, 0], "for the report"
    assert len([line for line in caplog.messages if "not finite" in line]) == 1


def test_what_only_float16_cannot_hold_is_recorded_as_infinite(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with torch.no_grad():
        large[0].weight.mul_(1e6)
    backbone = Backbone.from_module(nn.Sequential(large, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), (8,))
    found, host = recorded(backbone, torch.randn(8, 8), tmp_path)
    assert len(found) == 8 and host.value("records_not_finite_total") == 0
    [first, *_] = found.activations.values()
    assert bool(first.isinf().any(dim=1).all()) and not bool(first.isnan().any())


class Close(nn.Module):
    """A layer that divides by a small number. If the number was rounded to bfloat16 beside a large one, it is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x / ((x[:, :1].abs() + 300.0) - 300.0)


def test_a_request_for_which_only_the_engine_has_no_scores_is_recorded_without_a_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Backbone.from_module(nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 3), Close()), (8,))
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 20
    with torch.no_grad():
        model = build_model(backbone, engine="bfloat16", sampling_rate=1.0)
        has_scores = torch.cat([model(batch) for batch in rows.split(4)]).isfinite().all(dim=1)
        full_class = torch.cat([served.full_class for served in model.log.take()])
    assert 8 < has_scores.sum() < 56 and backbone.graph(rows).isfinite().all()
    assert (full_class[~has_scores] == NO_CLASS).all() and (full_class[has_scores] >= 0).all()
    found, host = recorded(backbone, rows, tmp_path, "bfloat16")
    assert found.request.tolist() == [request_hash(f"id-{number}") for number in range(64)]
    assert found.full_class.tolist() == found.answered_class.tolist() == full_class.tolist()
    assert host.value("records_not_finite_total") == 0


@pytest.mark.parametrize(("risk", "loss"), [
    (Risk.DISAGREEMENT, [1.0, 1.0]), (Risk.CONFIDENCE_GAP, [1.0, 1.0]), (Risk.ACCURACY, [1.0, 0.0])])
def test_an_answer_without_a_class_is_the_worst_one(risk: Risk, loss: list[float]) -> None:
    """With the risk of accuracy it costs as much as any wrong class: nothing where the backbone is wrong itself."""
    answer, backbone_class, labels = torch.full((2, 1), NO_CLASS), torch.tensor([0, 0]), torch.tensor([0, 1])
    scores = torch.tensor([[0.1, 0.0]] * 2).log_softmax(dim=1)
    assert risk.losses(answer, backbone_class, scores, labels).flatten().tolist() == loss


MONITORED = Monitored(Risk.CONFIDENCE_GAP, 0.02, 0.05)


@pytest.mark.parametrize("kind", list(ScoreKind))
def test_log_probabilities_are_finite_in_float16_also_for_masked_classes(kind: ScoreKind) -> None:
    logits = torch.tensor([[1.0, -1e9, 2.0], [0.0, -math.inf, 0.0], [math.nan, 0.0, 0.0]])
    found = kind.log_probabilities(kind.from_logits(logits)).half()
    assert found[:2].isfinite().all() and found[2].isnan().any()
    torch.testing.assert_close(found[:2, [0, 2]].float(), logits[:2, [0, 2]].log_softmax(1), atol=1e-3, rtol=1e-3)


class Masked(nn.Module):
    """Masks the last class."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], torch.full_like(x[:, -1:], -math.inf)], dim=1)


class Overflowing(nn.Module):
    """Overflows where the input is large."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1e30 * x[:, :1].abs().clamp_min(1.0)).clamp_max(1e38)


class Bounded(nn.Linear):
    """A linear layer that limits its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1.0, 1.0))


def test_a_class_that_is_masked_by_minus_infinity_costs_no_record_and_is_no_difference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    masked = Backbone.from_module(nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3), Masked()), (8,))
    rows = torch.randn(16, 8)
    found, host = recorded(masked, rows, tmp_path)
    assert len(found) == 16 and host.value("records_not_finite_total") == 0
    reference = masked.graph(rows)
    assert found.backbone_class.tolist() == reference.argmax(dim=1).tolist() and bool(reference[:, 2].isinf().all())
    assert bool(found.log_probabilities.isfinite().all())
    answers = reference.clamp_min(-30.0)  # exit heads give finite scores
    assert MONITORED.losses(answers, reference, masked.description.scores) == [0.0] * 16


def test_an_activation_that_is_not_finite_costs_no_record_if_the_scores_are(tmp_path: Path) -> None:
    """The certificate is then about this request, too, and counts it as answered wrongly by every exit."""
    torch.manual_seed(0)
    overflowing = Backbone.from_module(nn.Sequential(
        nn.Linear(8, 8), Overflowing(), Bounded(8, 8), nn.Tanh(), nn.Linear(8, 3)), (8,))
    rows = torch.randn(16, 8)
    rows[5] = 1e9
    found, host = recorded(overflowing, rows, tmp_path)
    assert len(found) == 16 and host.value("records_not_finite_total") == 0
    first, *_ = found.activations.values()
    assert not bool(first[5].isfinite().all())


def test_a_request_for_which_the_backbone_predicts_no_class_is_not_watched(backbone: Backbone, tmp_path: Path) -> None:
    exits = [PlannedExit(layer.path, HeadSpec(widths=()), ConfidencePolicy(1.0, 2.0), layer.cost, 0.01)
             for layer in backbone.description.candidates[:1]]
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1500, 19, 0.0127, 0.03, "fixed-sequence", (1.0, 2.0))
    plan = ExitPlan(backbone.description.sha256, "certified", tuple(exits), certificate)
    heads = {one.layer: Head(one.head, backbone.description.layer(one.layer).shape, 3) for one in exits}
    rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    rows[5] = math.nan
    model = build_model(backbone, plan, heads, sampling_rate=1.0)
    worker = worker_of(model, config=ServingConfig(records=str(tmp_path)))
    worker.step(calls_of_rows([rows], [f"id-{number}" for number in range(8)]))
    worker.close()
    state = read_state(monitor_file(next(tmp_path.rglob("monitor-*.json")).parent, "1.0", plan))
    assert state is not None and state.evidence.n == 7


def test_a_loss_that_is_no_number_counts_as_one_and_the_monitor_goes_on() -> None:
    good, none = torch.tensor([[5.0, 0.0]]), torch.tensor([[math.nan, math.nan]])
    losses = MONITORED.losses(torch.cat([good, none]), torch.cat([good, good]), ScoreKind.LOGITS)
    assert losses == [0.0, 1.0]
    quiet = MonitorState().after(samples_of([0.0] * 2000 + losses), MONITORED, 2, 0.0)
    assert not quiet.alarms and math.isfinite(quiet.evidence.wealth())
    assert quiet.after(samples_of([1.0] * 200), MONITORED, 2, 0.0).alarms, "it still sees"


@pytest.mark.parametrize("risk", [Risk.DISAGREEMENT, Risk.CONFIDENCE_GAP])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_names_no_class_where_the_backbone_names_one_differs(risk: Risk, bad: float) -> None:
    """`argmax` returns class 0 for such an answer, which is the class of the first row of the backbone."""
    served, reference = torch.full((2, 2), bad), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert replace(MONITORED, risk=risk).losses(served, reference, ScoreKind.LOGITS) == [1.0, 1.0]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["lost", "capital"])
def test_a_state_with_a_number_that_is_not_finite_is_refused(where: str, number: float) -> None:
    evidence = Evidence(3, number) if where == "lost" else Evidence(3, 0.0, Capital(3, (number, 0.0, 0.0, 0.0, 0.0)))
    written = json.loads(json.dumps(MonitorState(0, evidence).to_json()))
    with pytest.raises(ValueError, match="expected finite numbers"):
        MonitorState.from_json(written, "state.json")
