"""Handlers that make rows from requests in all the ways of users. A request is {"rows": list of up to 8 numbers}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.call import Call, Reply
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import CONFIDENCE_HEADER, EXIT_HEADER
from tests.support.host import worker_of

N_NUMBERS = 8
HEADERS = (EXIT_HEADER, CONFIDENCE_HEADER)


class AtOnce:
    """A handler that makes a row from each request and calls the model once."""

    rows_per_request: int | None = 1
    """The value that describes the handler correctly."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return self.classes(torch.stack([row(item) for item in data])).tolist()

    @torch.no_grad()
    def classes(self, rows: Tensor) -> Tensor:
        found: Tensor = self.model(rows).argmax(dim=1)
        return found


class OneByOne(AtOnce):
    """A handler that calls the model for each request."""

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return [self.classes(row(item)[None])[0].item() for item in data]


class Augmenting(AtOnce):
    """A handler that makes three rows from each request and answers with their most frequent class."""

    rows_per_request: int | None = 3

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        rows = torch.cat([views(item) for item in data])
        return self.classes(rows).reshape(-1, 3).mode(dim=1).values.tolist()


class AugmentingOneByOne(Augmenting):
    """The same handler, but with a call of the model for each request."""

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return [self.classes(views(item)).mode().values.item() for item in data]


class CallingTwice(AtOnce):
    """A handler that augments by calling the model a second time."""

    rows_per_request = None

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        rows = torch.stack([row(item) for item in data])
        return [*zip(self.classes(rows).tolist(), self.classes(rows.flip(1)).tolist())]


class Reversing(AtOnce):
    """A handler that reverses its batch, and reverses the answers back."""

    rows_per_request = None

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return super().handle(data[::-1], context)[::-1]


class SortingByLength(AtOnce):
    """A handler that sorts its batch by length, which two requests of the same length do not reveal."""

    rows_per_request = None

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        order = sorted(range(len(data)), key=lambda item: len(data[item]["rows"]))
        answers = super().handle([data[item] for item in order], context)
        return [answers[order.index(item)] for item in range(len(data))]


class FilteringDuplicates(AtOnce):
    """A handler that asks the model only once about equal requests."""

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        unique = {tuple(item["rows"]): item for item in data}
        answers = dict(zip(unique, super().handle([*unique.values()], context)))
        return [answers[tuple(item["rows"])] for item in data]


def row(item: Any) -> Tensor:
    """Return the (8,) row of a request: its numbers, padded with zeros."""
    numbers = torch.tensor(item["rows"])
    return torch.nn.functional.pad(numbers, (0, N_NUMBERS - len(numbers)))


def views(item: Any) -> Tensor:
    """Return three rows of a request as a (3, 8) tensor."""
    return torch.stack([row(item), row(item).flip(0), 2 * row(item)])


def calls_of(requests: list[list[float]], **headers: str) -> list[Call]:
    """Return a call for each request, with a body of its own."""
    return [Call(f"id-{number}", {"rows": numbers, "body": f"body-{number}".encode()}, headers)
            for number, numbers in enumerate(requests)]


def backbone_of_rows() -> Backbone:
    """Return a classifier of rows."""
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(*(nn.Linear(8, 8), nn.ReLU()) * 3, nn.Linear(8, 3)), (N_NUMBERS,))


def requests(count: int, *, seed: int = 0, lengths: Sequence[int] = (8,)) -> list[list[float]]:
    """Return the numbers of a few requests, whose lengths repeat in turn."""
    numbers = 3 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return [row.tolist()[:lengths[number % len(lengths)]] for number, row in enumerate(numbers)]


def replied(worker: Any, calls: Sequence[Call]) -> list[Reply]:
    """Return the replies of a worker to calls that it gets in one batch."""
    replies = [reply for reply in worker.step(calls) if reply is not None]
    assert [reply.status for reply in replies] == [200] * len(calls)
    return replies


def told(replies: Sequence[Reply]) -> list[tuple[str | None, ...]]:
    """Return the values of the headers of each reply."""
    return [tuple(reply.headers.get(name) for name in HEADERS) for reply in replies]


def alone(model: EarlyExitModel, handler: AtOnce, calls: Sequence[Call]) -> list[Reply]:
    """Return the reply to each call when it is the only one in its batch."""
    worker = worker_of(model, handler)
    return [reply for call in calls for reply in replied(worker, [call])]
