"""Headers, records, metrics and the monitor fail independently of each other, and each failure is counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.exits.risk import Risk
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.monitor.shared_state import SharedMonitor
from early_exit.handler.protocol import EXIT_HEADER, EXPLAIN_HEADER
from early_exit.handler.recording.format import list_shards
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.serving.metrics import ServingMetrics
from early_exit.handler.serving.response_headers import ResponseHeaders
from early_exit.handler.serving.worker import Worker
from tests.support.host import MemoryHost, calls_of_rows, worker_of
from tests.support.row_handlers import AtOnce, backbone_of_rows, calls_of, replied, requests

BREAKS: dict[str, tuple[type[Any], str]] = {"headers": (ResponseHeaders, "set"), "records": (RecordWriter, "offer"),
                                            "monitor": (SharedMonitor, "note"), "metrics": (ServingMetrics, "served")}
"""For each kind of side work, a method without which it fails."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(*(nn.Linear(8, 8), nn.ReLU()) * 3, nn.Linear(8, 3)), (8,))


def worker(backbone: Backbone, host: MemoryHost, records: Path) -> Worker:
    """Return a worker whose exit answers every request, and wrongly; it records and monitors all requests."""
    layer = backbone.description.candidates[0]
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1500, 19, 0.0127, 0.03, "fixed-sequence", (1.0, 2.0))
    plan = ExitPlan(backbone.description.sha256, "certified", (
        PlannedExit(layer.path, HeadSpec(widths=()), ConfidencePolicy(1.0, 0.0), layer.cost, 0.01),), certificate)
    torch.manual_seed(1)
    model = build_model(backbone, plan, {layer.path: Head(HeadSpec(widths=()), layer.shape, 3)}, sampling_rate=1.0,
                        record_layers=1)
    return worker_of(model, config=ServingConfig(records=str(records), records_per_shard=64), host=host)


def broken(*args: object, **kwargs: object) -> None:
    raise RuntimeError("broken")


def works(kind: str, host: MemoryHost, serving: Worker, headers: dict[str, str], records: Path) -> bool:
    """Tell whether a kind of side work has had its effect."""
    return {"headers": lambda: EXIT_HEADER in headers,
            "records": lambda: bool(list_shards(records)),
            "monitor": lambda: serving.model.level == 1,
            "metrics": lambda: host.value("shadow_samples_total") > 0}[kind]()


@pytest.mark.parametrize("kind", BREAKS)
def test_what_fails_beside_the_answers_is_counted_and_stops_nothing_else(
        kind: str, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    host = MemoryHost()
    monkeypatch.setattr(*BREAKS[kind], broken)
    serving = worker(backbone, host, tmp_path)
    calls = calls_of_rows([torch.randn(64, 8)], [f"request-{row}" for row in range(64)])
    deadline, replies = time.monotonic() + 20, []
    expected, working, n_steps = {other: other != kind for other in BREAKS}, {}, 0
    while working != expected and time.monotonic() < deadline:
        replies, n_steps = [reply for reply in serving.step(calls) if reply is not None], n_steps + 1
        working = {other: works(other, host, serving, replies[0].headers, tmp_path) for other in BREAKS}
        time.sleep(0.02)
    assert [reply.status for reply in replies] == [200] * 64
    assert working == expected
    assert host.metrics["side_errors_total"].values == {(other,): n_steps * (other == kind) for other in BREAKS}
    assert caplog.text.count(f"side work '{kind}' failed") == 1, "a failure is logged once while it lasts"
    serving.close()


def test_the_first_request_that_a_handler_answers_without_its_model_is_logged_once(
        caplog: pytest.LogCaptureFixture) -> None:
    class Remembering(AtOnce):
        def __init__(self, model: EarlyExitModel) -> None:
            super().__init__(model)
            self.known: dict[str, Any] = {}

        def handle(self, data: list[Any], context: Any) -> list[Any]:
            keys = [str(item["rows"]) for item in data]
            new = {key: item for key, item in zip(keys, data) if key not in self.known}
            if new:
                self.known.update(zip(new, super().handle([*new.values()], context)))
            return [self.known[key] for key in keys]

    model = build_model(backbone_of_rows())
    serving = worker_of(model, Remembering(model))
    first, second = requests(2), requests(4, seed=1)
    for bodies, n_logged in ((first, 0), (second[:2], 0), ([second[2], first[0]], 1), (first, 1)):
        assert [reply.status for reply in replied(serving, calls_of(bodies))] == [200, 200]
        assert caplog.text.count("answered without a call of the model") == n_logged


def test_a_request_for_an_explanation_and_one_that_is_refused_need_no_row(caplog: pytest.LogCaptureFixture) -> None:
    class WithoutTheModel(AtOnce):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            if "refused" in data[0]:
                context.set_response_status(code=400, idx=0)
            return ["nothing"]

    model = build_model(backbone_of_rows())
    serving = worker_of(model, WithoutTheModel(model))
    replied(serving, [Call("explained", {"rows": [1.0]}, {EXPLAIN_HEADER: "True"})])
    [refused] = serving.step([Call("refused", {"refused": True})])
    assert refused is not None and refused.status == 400
    assert "without a call of the model" not in caplog.text
    replied(serving, [Call("answered", {"rows": [1.0]})])
    assert "without a call of the model" in caplog.text
