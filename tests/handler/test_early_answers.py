"""Early answers: the calls of any handler wait at the model, and each one is answered when it leaves."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import ArchiveError, ConfigError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.at_once import AtOnceExecutor
from early_exit.handler.inference.bypass import AdaptiveBypass
from early_exit.handler.inference.bypassing import EpochBypass
from early_exit.handler.inference.continuous import ContinuousExecutor
from early_exit.handler.inference.in_flight import InFlightCalls
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.model.shadow import ShadowSampler
from early_exit.handler.torchserve.continuous_batching import claim_only_worker, require_continuous_batching
from tests.support.host import MemoryHost, worker_of


class Numbers:
    """A handler that counts its calls and stores in its attributes what it needs after the model has run."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model
        self.n_loaded = self.n_handled = 0
        self.vocabulary: dict[str, int] | None = None
        self.seen: Any = None
        self.mapping: Any = None

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        self.n_handled += 1
        if self.vocabulary is None:
            self.vocabulary = {"loaded": 1}
            self.n_loaded += 1
        self.seen = [item["body"] for item in data]
        with torch.inference_mode():
            scores = self.model(torch.stack([torch.tensor(body) for body in self.seen]))
        context.set_response_header(0, "X-Own", str(self.seen[0][0]))
        return [{"class": row.argmax().item(), "of": body, "ratio": 1 / body[3]}
                for row, body in zip(scores, self.seen)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), (4,))


@pytest.fixture
def model(backbone: Backbone) -> EarlyExitModel:
    """Return a model with two exits, at which about half of the random requests leave."""
    torch.manual_seed(1)
    layers = backbone.description.candidates[:2]
    spec = HeadSpec(widths=())
    plan = ExitPlan(backbone.description.sha256, "paper", tuple(
        PlannedExit(layer.path, spec, ConfidencePolicy(0.2, 0.75), layer.cost, 0.01) for layer in layers), None)
    heads = {layer.path: Head(spec, layer.shape, 3) for layer in layers}
    return build_model(backbone, plan, heads, answers="early")


class Frontend:
    """A host: at each step of its worker it hands over every request that has not been answered yet."""

    def __init__(self, model: EarlyExitModel, handler: Any = None) -> None:
        self.handler = handler or Numbers(model)
        self.worker = worker_of(model, self.handler, ServingConfig(answers="early"), MemoryHost("numbers"))
        self.waiting: dict[str, Any] = {}
        self.answers: dict[str, tuple[int, Any, dict[str, str]]] = {}

    def step(self) -> None:
        calls = [Call(name, {"body": body}) for name, body in self.waiting.items()]
        for call, reply in zip(calls, self.worker.step(calls)):
            if reply is not None:
                self.answers[call.id] = reply.status, reply.body, reply.headers
                del self.waiting[call.id]

    def finish(self) -> None:
        for _ in range(200):
            if not self.waiting:
                return
            self.step()
        raise AssertionError("a request is never answered")


def requests(count: int, seed: int = 0) -> list[list[float]]:
    rows: list[list[float]] = (2 * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))).tolist()
    return rows


def plainly(model: EarlyExitModel, body: Any) -> tuple[int, Any, dict[str, str]]:
    """Answer a single request in the way of plain batching."""
    assembly = model.assembly
    plain = EarlyExitModel(assembly, AtOnceExecutor(assembly.levels), AdaptiveBypass(0.0, random.random),
                           ShadowSampler())
    [reply] = worker_of(plain, Numbers(plain), host=MemoryHost("numbers")).step([Call("alone", {"body": body})])
    assert reply is not None
    return reply.status, reply.body, reply.headers


def test_every_request_gets_the_answer_status_and_headers_of_plain_batching(model: EarlyExitModel) -> None:
    frontend = Frontend(model)
    bodies: dict[str, Any] = {f"id-{number}": body for number, body in enumerate(requests(40))}
    bodies |= {"text": "no numbers", "short": [1.0, 2.0], "late": [1.0, 2.0, 3.0, 0.0]}  # their statuses: 400, 400, 500
    order = random.Random(0).sample(sorted(bodies), len(bodies))
    for start in range(0, len(order), 5):
        frontend.waiting |= {name: bodies[name] for name in order[start:start + 5]}
        frontend.step()
    frontend.finish()
    assert {frontend.answers[name][0] for name in bodies if name.startswith("id-")} == {200}
    assert {name: frontend.answers[name][0] for name in ("text", "short", "late")} == {
        "text": 400, "short": 400, "late": 500}
    for name, body in bodies.items():
        assert frontend.answers[name] == plainly(model, body), name
    exits = {headers["X-Early-Exit"] for status, _, headers in frontend.answers.values() if status == 200}
    assert len(exits) == 3, "the test needs requests that leave at each exit and at the end"


def test_who_exits_first_is_answered_first_and_others_join_meanwhile(model: EarlyExitModel) -> None:
    frontend = Frontend(model)
    frontend.waiting = {f"id-{number}": body for number, body in enumerate(requests(8))}
    frontend.step()
    first = {headers["X-Early-Exit"] for _, _, headers in frontend.answers.values()}
    assert first == {model.assembly.layers[0]} and frontend.waiting
    frontend.waiting["new"] = requests(1, 5)[0]
    frontend.finish()
    assert frontend.answers["new"][0] == 200


def test_pre_processing_happens_once_and_what_a_handler_loads_stays(model: EarlyExitModel) -> None:
    frontend = Frontend(model)
    for number, body in enumerate(requests(6)):
        frontend.waiting[f"id-{number}"] = body
        frontend.finish()
    assert (frontend.handler.n_handled, frontend.handler.n_loaded) == (6, 1), "whatever the number of stages"


def test_what_a_handler_notes_in_its_context_before_the_model_is_its_own_requests_after_it(
        model: EarlyExitModel) -> None:
    class Noted(Numbers):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            context.noted = data[0]["body"]
            [answer] = super().handle(data, context)
            return [answer | {"of": context.noted}]

    frontend = Frontend(model, Noted(model))
    bodies = {f"id-{number}": body for number, body in enumerate(requests(20))}
    frontend.waiting = dict(bodies)
    frontend.finish()
    assert {name: answer["of"] for name, (_, answer, _) in frontend.answers.items()} == bodies


def test_a_request_that_the_host_forgets_is_dropped_and_its_thread_is_free(model: EarlyExitModel) -> None:
    frontend = Frontend(model)
    before = threading.active_count()
    for number in range(20):
        frontend.waiting = {f"{number}-{row}": body for row, body in enumerate(requests(3, number))}
        frontend.step()
    frontend.waiting = {"last": requests(1, 99)[0]}
    frontend.finish()
    assert frontend.answers["last"][0] == 200
    assert threading.active_count() - before <= 4


def test_a_handler_may_call_its_model_twice_or_not_at_all(model: EarlyExitModel) -> None:
    class Twice(Numbers):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            if data[0]["body"][0] > 0:
                return ["without the model"]
            return [[super().handle(data, context), super().handle(data, context)]]

    frontend = Frontend(model, Twice(model))
    frontend.waiting = {f"id-{number}": body for number, body in enumerate(requests(12))}
    frontend.finish()
    for number, body in enumerate(requests(12)):
        status, answer, headers = frontend.answers[f"id-{number}"]
        assert status == 200
        if body[0] > 0:
            assert answer == "without the model" and headers == {}
        else:
            assert answer[0] == answer[1] == [plainly(model, body)[1]]


def test_an_explanation_still_follows_the_gradient(model: EarlyExitModel) -> None:
    class Explains(Numbers):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            batch = torch.tensor([data[0]["body"]], requires_grad=True)
            self.model(batch).sum().backward()
            assert isinstance(batch.grad, Tensor)
            return [batch.grad.abs().sum().item() > 0]

    frontend = Frontend(model, Explains(model))
    frontend.waiting = {"id": requests(1)[0]}
    frontend.step()
    assert frontend.answers["id"][1] is True


def test_exits_that_cost_more_than_they_save_are_bypassed(backbone: Backbone, model: EarlyExitModel) -> None:
    """The bypass works as with plain batching, but decides for a stretch of requests at a time, not for each batch."""
    def slow(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def classify(x: Tensor) -> Tensor:
            time.sleep(0.01)
            return head(x)
        return classify

    bypass, levels = AdaptiveBypass(0.5, random.Random(0).random), tuple(
        tuple(replace(stage, exit=stage.exit and replace(stage.exit, head=slow(stage.exit.head))) for stage in stages)
        for stages in model.assembly.levels)
    slowed = EarlyExitModel(model.assembly, ContinuousExecutor(levels), EpochBypass(bypass), ShadowSampler())
    frontend = Frontend(slowed)
    bodies = requests(16)
    for _ in range(400):
        frontend.waiting = {f"{number}": body for number, body in enumerate(bodies)}
        frontend.finish()
        if bypass.bypassed() == {1: True}:
            return
    raise AssertionError(bypass)


def test_out_of_memory_is_left_to_the_host_and_the_next_requests_are_served(
        model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(calls: InFlightCalls) -> None:
        raise MemoryError

    frontend = Frontend(model, Numbers(model))
    frontend.waiting = dict(zip("ab", requests(2)))
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(InFlightCalls, "run_stage", broken)
        frontend.step()
    frontend.waiting = {"c": requests(1)[0]}  # the host has answered the first two
    frontend.finish()
    assert frontend.answers["c"][0] == 200


def test_a_server_that_is_set_otherwise_is_refused_at_load() -> None:
    require_continuous_batching({"continuousBatching": True, "minWorkers": 1, "maxWorkers": 1})
    with pytest.raises(ConfigError, match=r"'minWorkers': 2.*ee-archive"):
        require_continuous_batching({"continuousBatching": True, "minWorkers": 2, "maxWorkers": 2})
    with pytest.raises(ConfigError, match="'continuousBatching': None"):
        require_continuous_batching({"minWorkers": 1, "maxWorkers": 1})


def test_a_second_worker_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    layout = ArchiveLayout(tmp_path)
    layout.manifest.parent.mkdir()
    layout.manifest.write_text("{}")
    claim = claim_only_worker(layout)
    with pytest.raises(ArchiveError, match="exactly one worker"):
        claim_only_worker(layout)
    claim.close()
    claim_only_worker(layout).close()
