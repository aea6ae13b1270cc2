"""A handler whose calls cannot run side by side cannot give early answers: its archive is refused and does not hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from early_exit.archiver.packaging.tryout.answers import Answer
from early_exit.archiver.packaging.tryout.checking import require_side_by_side
from early_exit.archiver.packaging.tryout.child import LoadingError
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from tests.support.host import worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, backbone_of_rows, calls_of, requests


class UnderALock(AtOnce):
    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.lock = threading.Lock()

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        with self.lock:
            return super().handle(data, context)


class InALoopOfItsOwn(AtOnce):
    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.loop = asyncio.new_event_loop()

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        async def answers() -> list[Any]:
            return super(InALoopOfItsOwn, self).handle(data, context)

        answered: list[Any] = self.loop.run_until_complete(answers())
        return answered


def ask(handler: type[AtOnce]) -> Sequence[Answer]:
    """Return the answers to two requests that are made at once; each answer holds only its status."""
    backbone = backbone_of_rows()
    model = build_model(backbone, *random_exits(backbone), answers="early")
    worker = worker_of(model, handler(model), ServingConfig(answers="early"))
    waiting, answers = calls_of(requests(2)), list[Answer]()
    while waiting:
        replies = worker.step(waiting)
        answers += [Answer(reply.status, "", b"") for reply in replies if reply is not None]
        waiting = [call for call, reply in zip(waiting, replies) if reply is None]
    return answers


def test_a_handler_whose_calls_go_on_side_by_side_is_taken() -> None:
    require_side_by_side(lambda: ask(AtOnce))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize(("handler", "told"), [(UnderALock, "not answered within 2 s"),
                                               (InALoopOfItsOwn, "one was answered with 500")])
def test_a_handler_that_holds_what_the_next_call_needs_is_refused(handler: type[AtOnce], told: str) -> None:
    with pytest.raises(LoadingError, match=f"{told}.*answers: plain"):
        require_side_by_side(lambda: ask(handler), limit_s=2)
