"""A handler or a stage may write into the tensors that it is given, which changes no other request and no number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.config import ServingConfig
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.inference.forward import Live, Stage
from early_exit.handler.inference.in_flight import InFlightCall, InFlightCalls
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.model.loading import build_model
from early_exit.handler.model.probe import answer_probe
from early_exit.handler.protocol import FULL, OPINIONS_HEADER
from tests.handler.test_early_answers import Frontend
from tests.support.host import worker_of
from tests.support.row_handlers import AtOnce, backbone_of_rows, calls_of, requests


class FillingABuffer(AtOnce):
    """A handler that fills the same tensor with the rows of each request."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.buffer = torch.zeros(8, 8)

    @torch.no_grad()
    def handle(self, data: list[Any], context: Any) -> list[Any]:
        for number, item in enumerate(data):
            self.buffer[number] = torch.tensor(item["body"])
        scores: Tensor = self.model(self.buffer[:len(data)])
        return scores.tolist()


class InInferenceMode(FillingABuffer):
    @torch.inference_mode()
    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return super().handle(data, context)


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return self.last(torch.relu(self.first(x)))


def in_flight_at_once(backbone: Backbone, handler: type[AtOnce], bodies: list[list[float]]) -> list[Any]:
    """Return the status and the body of the answer to each request, with early answers and all requests in flight."""
    model = build_model(backbone, answers="early")
    frontend = Frontend(model, handler(model))
    frontend.waiting = {f"{number}": body for number, body in enumerate(bodies)}
    frontend.finish()
    return [frontend.answers[f"{number}"][:2] for number in range(len(bodies))]


@pytest.mark.parametrize("handler", [FillingABuffer, InInferenceMode])
def test_each_request_is_answered_from_its_own_numbers_though_the_handler_fills_one_buffer(
        handler: type[AtOnce]) -> None:
    backbone, bodies = backbone_of_rows(), requests(4)
    found = in_flight_at_once(backbone, handler, bodies)
    for body, (status, scores) in zip(bodies, found):
        assert status == 200
        torch.testing.assert_close(torch.tensor(scores), backbone.graph(torch.tensor([body]))[0])


@pytest.mark.parametrize("engine", ["folded", "bfloat16"])
def test_each_record_has_the_reference_of_its_own_request_though_the_handler_fills_one_buffer(engine: str) -> None:
    """For an engine that is not exact, the reference is computed apart from the answer, from the same inputs."""
    backbone, bodies = backbone_of_rows(), requests(8)
    model = build_model(backbone, answers="early", engine=engine, sampling_rate=1.0)
    served: list[ServedBatch] = []
    with patch.object(model.log, "add", side_effect=served.append):
        frontend = Frontend(model, FillingABuffer(model))
        frontend.waiting = {f"{number}": body for number, body in enumerate(bodies)}
        frontend.finish()
    found = {tuple(one.answers.reference[0].tolist()) for one in served}
    with torch.no_grad():
        expected = backbone.graph(torch.tensor(bodies))
    assert len(found) == len(bodies)
    for scores in expected:
        assert any(torch.allclose(scores, torch.tensor(one), atol=1e-5) for one in found)


def test_a_stage_may_write_into_inputs_that_were_made_in_inference_mode() -> None:
    class Making(AtOnce):
        @torch.inference_mode()
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            scores: Tensor = self.model(torch.tensor([item["body"] for item in data]))
            return scores.tolist()

    torch.manual_seed(0)
    original = WritesIntoItsInput().eval()
    backbone, [body] = Backbone.from_module(original, (8,)), requests(1)
    [(status, scores)] = in_flight_at_once(backbone, Making, [body])
    assert status == 200
    torch.testing.assert_close(torch.tensor(scores), original(torch.tensor([body]))[0])


class ChangingScores(AtOnce):
    """A handler that scales the scores in place and rules out a class, as the original model's scores allow."""

    @torch.no_grad()
    def classes(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.model(rows)
        scores.div_(0.01)
        scores[:, 2] = -torch.inf
        return scores.argmax(dim=1)


@pytest.mark.parametrize("answers", ["plain", "early"])
def test_what_a_handler_does_to_the_scores_changes_no_header(answers: Literal["plain", "early"]) -> None:
    backbone, calls = backbone_of_rows(), calls_of(requests(1))

    def headers(handler: type[AtOnce]) -> dict[str, str]:
        model = build_model(backbone, answers=answers, anytime=True)
        worker = worker_of(model, handler(model), ServingConfig(answers=answers))
        while True:
            [reply] = worker.step(calls)
            if reply is not None:
                return reply.headers

    found = headers(ChangingScores)
    assert found == headers(AtOnce) and OPINIONS_HEADER in found


def test_records_and_monitor_read_the_models_own_scores_though_the_handler_changes_its_own() -> None:
    model, rows = build_model(backbone_of_rows(), sampling_rate=1.0, anytime=True), torch.tensor(requests(3))
    given: Tensor = model(rows)
    expected = given.clone()
    given.fill_(-1.0)
    [served] = model.log.take()
    answers = served.answers
    for scores in (answers.outputs, answers.reference, answers.exit_scores[FULL]):
        torch.testing.assert_close(scores, expected)


def picky_doubling(x: Tensor) -> Live:
    """Double a tensor in place, then refuse it if it holds a large number."""
    x.mul_(2.0)
    if (x > 100).any():
        raise RuntimeError("too large")
    return (x,)


def run_together(stage: Callable[[Tensor], Live], batches: Sequence[Tensor],
                 warm_up: Sequence[Tensor] = ()) -> list[InFlightCall]:
    """Return calls that reach a stage in one tensor; other calls have gone through the same stage before them."""
    in_flight = InFlightCalls([[Stage(lambda x: (x.clone(),)), Stage(stage)]])
    for calls in (warm_up, batches):
        entered = [in_flight.enter((batch,), torch.zeros(len(batch), dtype=torch.bool)) for batch in calls]
        while any(call.n_travelling and call.error is None for call in entered):
            in_flight.run_stage()
    return entered


@torch.no_grad()
def test_a_stage_that_writes_into_its_input_and_then_fails_for_one_row_answers_the_others_as_ever() -> None:
    good, bad, other = run_together(picky_doubling, [torch.full((1, 2), value) for value in (1.0, 99.0, 3.0)])
    assert good.answers().outputs.tolist() == [[2.0, 2.0]] and other.answers().outputs.tolist() == [[6.0, 6.0]]
    with pytest.raises(RuntimeError, match="too large"):
        bad.answers()


@torch.no_grad()
def test_a_call_that_fails_after_writing_into_its_input_is_not_answered_from_what_it_wrote() -> None:
    """On a GPU, small batches run in a captured graph, which leaves its input as it is, and large ones do not."""
    def in_place_for_many(x: Tensor) -> Live:
        if len(x) == 1:
            return (x * 2.0,)
        seen.append(len(x))
        x.mul_(2.0)
        if len(seen) == 1:
            raise RuntimeError("out of memory")
        return (x,)

    for sizes in ([2], [1, 1]):
        seen: list[int] = []
        for call in run_together(in_place_for_many, [torch.ones(size, 2) for size in sizes], [torch.ones(1, 2)]):
            with pytest.raises(RuntimeError, match="out of memory"):
                call.answers()
        assert seen == [2]


class Hashing(nn.Module):
    """A model that hashes ids into buckets, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        ids.remainder_(10).add_(3)
        return self.last(torch.relu(self.first(self.embedding(ids).mean(1))))


class InHalf(nn.Module):
    """A model in bfloat16 that scales its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 4)
        self.bfloat16()

    def forward(self, ids: Tensor) -> Tensor:
        ids[:, 1:].sub_(0.5).mul_(4)
        return self.last(torch.relu(self.first(ids)))


class Masked(nn.Module):
    """A model that turns its mask over, in place, and reads it in each of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask.neg_().add_(1.0)
        mask.add_(mask.gt(0.5).float() * 0.25)
        for layer in self.layers:
            x = torch.relu(layer(x) * mask)
        return self.last(x)


@pytest.mark.parametrize(("kind", "inputs", "dtype"), [
    (Hashing, torch.arange(240).reshape(40, 6) % 50, "int64"),
    (InHalf, torch.linspace(0, 1, 240).reshape(40, 6).bfloat16(), "bfloat16")])
@torch.no_grad()
def test_the_reference_of_a_lossy_engine_is_computed_from_the_inputs_as_they_came(
        kind: type[nn.Module], inputs: Tensor, dtype: str) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    spec = InputSpec("ids", (6,), dtype, 50 if dtype == "int64" else None)
    served = build_model(Backbone.from_inputs(model, [spec]), engine="bfloat16", sampling_rate=1.0)
    served(inputs)
    [batch] = served.log.take()
    torch.testing.assert_close(batch.answers.reference, model(inputs.clone()).float())


@pytest.mark.parametrize("engine", ["eager", "folded"])
@torch.no_grad()
def test_a_mask_is_written_once_however_often_the_backbone_is_cut(engine: str) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    backbone = Backbone.from_inputs(model, [InputSpec("x", (8,)), InputSpec("mask", (8,))])
    x, mask = torch.randn(20, 8), torch.rand(20, 8)
    expected = model(x, mask.clone())
    for layers in (0, 8):
        served = build_model(backbone, engine=engine, record_layers=layers)
        torch.testing.assert_close(served(x, mask), expected)
    assert len(served.assembly.stages) == 4


@torch.no_grad()
def test_a_probe_tests_the_same_each_time_though_the_model_writes_into_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    row = torch.randn(1, 8)
    backbone = Backbone.from_module(WritesIntoItsInput().eval(), (8,)).probed_by((row.clone(),))
    assert torch.equal(backbone.probe[0], row)
    backbone.save(tmp_path)
    for model in (build_model(backbone), build_model(load_backbone(tmp_path))):
        for _ in range(3):
            assert answer_probe(model)["relative_error"] < 1e-6
