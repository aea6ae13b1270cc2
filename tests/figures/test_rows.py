"""The numbers of a row of the paper's tables, and what its times and those of other benchmarks are times of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.inference_head import InferenceHead
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Exit
from early_exit.training.costs.cost import head_flops
from tests.benchmarks import engine, loop, rows
from tests.support import arms
from tests.support.residual import recorded_inputs, residual_backbone
from tests.support.timing import interleaved

N = 400


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return residual_backbone()


@torch.no_grad()
def test_a_row_tells_what_exits_that_serve_lose_and_cost(
        backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes the head as it was trained, and the activations before it, instead of what serves."""
    torch.manual_seed(1)
    inputs = recorded_inputs()[:N]
    truth = torch.randint(4, (N,))
    layer = backbone.description.candidates[2]
    head = Head(HeadSpec(), layer.shape, 4).eval()
    [activations] = ENGINES[DEFAULT_ENGINE].compile(backbone, [layer.node])[0].module.forward(inputs)
    logits = head(activations)
    confidence = (logits / 2).softmax(dim=1).amax(dim=1)
    policy = ConfidencePolicy(2.0, confidence.median().item())
    leaves, full = confidence >= policy.threshold, backbone.graph(inputs)
    served = torch.where(leaves, logits.argmax(dim=1), full.argmax(dim=1))
    assert 0 < leaves.sum() < N and not torch.equal(served, full.argmax(dim=1))

    timed: dict[str, Callable[[Tensor], Any]] = {}

    def noted(which: Mapping[str, Callable[[Tensor], Any]], batches: Sequence[Tensor]) -> dict[str, list[float]]:
        timed.update(which)
        return {"plain": [4.0] * len(batches), "exiting": [1.0] * len(batches)}

    heads: list[object] = []
    stage = rows.Stage
    monkeypatch.setattr(rows, "interleaved", noted)
    monkeypatch.setattr(rows, "Stage", lambda forward, end: heads.append(end and end.head) or stage(forward, end))
    found = rows.row(backbone, {layer.path: Exit(head, policy, policy.answers)}, inputs, truth, full)

    def share(of: Tensor) -> Any:
        return pytest.approx(of.double().mean().item())

    on_head = head_flops(head, layer.shape) / backbone.description.flops
    assert found["disagreement"] == share(served != full.argmax(dim=1))
    assert found["accuracy"] == share(served == truth)
    assert found["accuracy_loss"] == share((full.argmax(dim=1) == truth).double() - (served == truth).double())
    assert found["majority_accuracy"] == truth.bincount().max() / N
    assert found["hits"] == {layer.path: share(leaves), "full": share(~leaves)}
    assert found["flops_ratio"] == pytest.approx(
        (layer.cost * leaves.double() + ~leaves).mean().item() + on_head, rel=0.02), "every row pays for the head"
    assert found["cpu_time_ratio"] == {"1": 0.25, "8": 0.25, "32": 0.25}
    assert [type(one) for one in heads] == [InferenceHead, type(None)], "heads are timed as they serve"
    torch.testing.assert_close(timed["plain"](inputs), (full,))
    assert torch.equal(timed["exiting"](inputs).outputs.argmax(dim=1), served)


def test_arms_take_turns_and_another_one_is_first_in_each_round() -> None:
    done: list[tuple[str, int]] = []
    clock: Iterator[int] = count()
    costs = {"a": 5, "b": 7}

    def arm(name: str) -> Callable[[int], None]:
        def run(item: int) -> None:
            done.append((name, item))
            for _ in range(costs[name] - 1):
                next(clock)
        return run

    seconds = interleaved({name: arm(name) for name in costs}, [0, 1, 2], lambda: float(next(clock)))
    assert done == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert seconds == {"a": [5.0] * 3, "b": [7.0] * 3}


def test_the_original_arm_of_the_loop_is_the_users_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: dict[str, Any] = {}
    monkeypatch.setattr(loop, "interleaved", lambda which, batches: timed.update(which) or {})
    for name in ("served_model", "exiting_model"):
        monkeypatch.setattr(loop, name, lambda result, name=name: name)
    monkeypatch.setattr(loop, "as_in_service", lambda model: model)
    original, result = nn.Linear(2, 2), SimpleNamespace(recorder="recorder")
    loop.model_seconds(result, [torch.ones(1, 2)], original)  # type: ignore[arg-type]
    assert timed == {arms.ORIGINAL: original, arms.WITHOUT_EXITS: "served_model", arms.WITH_EXITS: "exiting_model"}


def test_rows_that_do_not_leave_where_the_script_says_are_noticed() -> None:
    destinies = torch.tensor([[0, 2, 3, 1]])
    engine.require_as_dealt([torch.tensor([0, 2, -1, 1])], destinies)
    with pytest.raises(AssertionError, match="expected rows to leave"):
        engine.require_as_dealt([torch.tensor([-1, -1, -1, -1])], destinies)
