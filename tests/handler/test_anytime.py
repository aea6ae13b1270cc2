"""The anytime mode: a request that asks gets the prediction of every exit, and no request's answer changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.inference.forward import run_with_exits
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import ANYTIME_HEADER, FULL, OPINIONS_HEADER, SECRET_HEADER, SECRET_VARIABLE
from tests.handler.test_early_answers import Numbers, backbone, model, requests
from tests.handler.test_forward import inputs, three_stages
from tests.support.host import worker_of

__all__ = ["backbone", "model"]


@settings(max_examples=100)
@given(n_rows=st.integers(1, 12), seed=st.integers(0, 1000), asked=st.integers(0, 2**12 - 1),
       thresholds=st.tuples(st.floats(0.2, 1.1), st.floats(0.2, 1.1)), shrink_from=st.integers(1, 9))
@torch.no_grad()
def test_opinions_are_what_each_head_says_and_change_no_answer(
        n_rows: int, seed: int, asked: int, thresholds: tuple[float, float], shrink_from: int) -> None:
    batch, stages = inputs(n_rows, seed), three_stages(*thresholds, shrink_from=shrink_from)
    anytime = torch.tensor([bool(asked >> row & 1) for row in range(n_rows)])
    shadow = torch.rand(n_rows, generator=torch.Generator().manual_seed(seed)) < 0.3
    without = run_with_exits(batch, stages, shadow=shadow)
    answers = run_with_exits(batch, stages, shadow=shadow, anytime=anytime)
    torch.testing.assert_close(answers.outputs, without.outputs)
    assert torch.equal(answers.stages, without.stages) and torch.equal(answers.shadow, without.shadow)
    torch.testing.assert_close(answers.reference, without.reference)
    assert answers.anytime.tolist() == anytime.nonzero().flatten().tolist()
    if not anytime.any():
        assert not answers.exit_scores
        return
    expected: dict[int, Tensor] = {}
    live = (batch[0][anytime],)
    for number, stage in enumerate(stages):
        live = stage.forward(*live)
        if stage.exit is not None:
            expected[number] = stage.exit.answer(stage.exit.head(live[0]))
    expected[FULL] = live[0]
    assert list(answers.exit_scores) == list(expected)
    for number, scores in expected.items():
        torch.testing.assert_close(answers.exit_scores[number], scores)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the secret of the worker."""
    monkeypatch.setenv(SECRET_VARIABLE, "the operator's")


def answered(model: EarlyExitModel, asking: list[bool], labels: Any = None) -> list[dict[str, str]]:
    """Answer requests in one batch through a handler; return their response headers."""
    handler = Numbers(model)
    handler.mapping = labels
    asks = {ANYTIME_HEADER.lower(): "1", SECRET_HEADER: "the operator's"}
    calls = [Call(f"id-{item}", {"body": body}, asks if asking[item] else {})
             for item, body in enumerate(requests(len(asking)))]
    replies = [reply.headers for reply in worker_of(model, handler).step(calls) if reply is not None]
    assert len(replies) == len(asking)
    return replies


def test_only_requests_with_the_header_hear_the_opinions(model: EarlyExitModel) -> None:
    plain = answered(model, [False] * 12)
    asking = [item % 3 == 0 for item in range(12)]
    headers = answered(model, asking, labels={"0": "none", "1": ["n1", "one"]})
    for asks, before, after in zip(asking, plain, headers):
        assert asks == (OPINIONS_HEADER in after)
        assert after["X-Early-Exit"] == before["X-Early-Exit"]
        if asks:
            opinions = json.loads(after[OPINIONS_HEADER])
            assert [one["exit"] for one in opinions] == [*model.assembly.layers, "full"]
            [answer] = [one for one in opinions if one["exit"] == after["X-Early-Exit"]]
            assert answer["confidence"] == pytest.approx(float(after["X-Early-Exit-Confidence"]), abs=1e-4)
            assert {one.get("label") for one in opinions if one["class"] == 1} <= {"one"}
            assert not [one for one in opinions if one["class"] == 2 and "label" in one]
            assert len(after[OPINIONS_HEADER]) <= 80 * len(opinions)


def test_a_model_can_be_configured_to_tell_all(model: EarlyExitModel) -> None:
    telling = EarlyExitModel(model.assembly, model.executor, model.bypass, model.shadow, anytime=True)
    assert all(OPINIONS_HEADER in headers for headers in answered(telling, [False] * 3))
    assert ServingConfig.from_model_config({"early_exit": {"anytime": True}}).anytime


def test_opinions_that_were_asked_for_are_no_shadow_samples(model: EarlyExitModel) -> None:
    """Requests that ask are not drawn at random, so they must not affect which requests are recorded."""
    model.log.begin([True] * 4)
    model(torch.tensor(requests(4)))
    [batch] = model.log.take()
    assert len(batch.answers.anytime) == 4 and len(batch.answers.shadow) == 0
