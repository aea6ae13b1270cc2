"""A handler whose calls cannot run side by side cannot give early answers: its archive is refused and does not hang."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from early_exit.archiver.packaging.sources.sample import sample_images
from early_exit.archiver.packaging.tryout.answers import Answer
from early_exit.archiver.packaging.tryout.checking import last_first, require_side_by_side
from early_exit.archiver.packaging.tryout.child import LoadingError
from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import ArchiveError
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from tests.archiver.test_tryout import HANDLER, PLAIN, archived, samples
from tests.support.host import worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, backbone_of_rows, calls_of, requests

__all__ = ["samples"]


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


class KeepingNamesInAClass(AtOnce):
    names: ClassVar[list[str]] = []

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        type(self).names = [item["body"].decode() for item in data]
        classes = super().handle(data, context)
        return [{"of": name, "class": found} for name, found in zip(self.names, classes)]


class PassingNamesOn(AtOnce):
    """A handler whose post-processing takes what its pre-processing has put into a queue."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.names: queue.Queue[str] = queue.Queue()

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        for item in data:
            self.names.put(item["body"].decode())
        return [{"of": self.names.get(), "class": found} for found in super().handle(data, context)]


class Counting(AtOnce):
    """A handler that answers with the number of the request, and with a time that all requests of a moment share."""

    n_handled = 0

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        self.n_handled += 1
        [found] = super().handle(data, context)
        return [{"class": found, "number": self.n_handled, "ten": self.n_handled // 4}]


class Asked:
    """A handler with early answers, which two requests can be sent to."""

    def __init__(self, handler: type[AtOnce]) -> None:
        backbone = backbone_of_rows()
        model = build_model(backbone, *random_exits(backbone), answers="early")
        self.model = model
        self._worker = worker_of(model, handler(model), ServingConfig(answers="early"))
        self._calls = calls_of(requests(2))

    def at_once(self) -> list[Answer]:
        return self._answers(self._calls)

    def alone(self) -> list[Answer]:
        return [answer for call in self._calls for answer in self._answers([call])]

    def _answers(self, waiting: Sequence[Call]) -> list[Answer]:
        answers: dict[str, Answer] = {}
        ids = [call.id for call in waiting]
        while waiting:
            replies = self._worker.step(waiting)
            answers |= {call.id: Answer(reply.status, "", json.dumps(reply.body).encode())
                        for call, reply in zip(waiting, replies) if reply is not None}
            waiting = [call for call in waiting if call.id not in answers]
        return [answers[id_] for id_ in ids]


def test_a_handler_whose_calls_go_on_side_by_side_is_taken() -> None:
    asked = Asked(AtOnce)
    require_side_by_side(asked.at_once, asked.alone)


def test_a_handler_that_keeps_a_request_in_its_class_while_the_next_one_begins_is_refused() -> None:
    asked = Asked(KeepingNamesInAClass)
    with pytest.raises(LoadingError, match=r"(?s)local variables:\nsample 1 .*\$\.of: 'body-0' has become 'body-1'"):
        require_side_by_side(asked.at_once, asked.alone)


def test_a_handler_whose_requests_take_what_others_have_put_down_if_they_overtake_them_is_refused() -> None:
    """In the order of the requests, each takes its own."""
    asked = Asked(PassingNamesOn)
    asked.model.fall_back(asked.model.assembly.last_level)
    require_side_by_side(asked.at_once, asked.alone)
    told = r"(?s)a queue\.Queue.*'body-0' has become 'body-1'"
    with last_first(asked.model), pytest.raises(LoadingError, match=told):
        require_side_by_side(asked.at_once, asked.alone)


@pytest.mark.parametrize(("keep", "read"), [
    ("self.array[0] = first", "self.array[0]"),
    ("for item in data: self.queue.put(item['body'][0])", "self.queue.get(timeout=9)"),
    ("self.kept[0] = first", "self.kept[0]"), ("kept = first", "kept")])
def test_an_archive_whose_handler_keeps_a_request_in_an_array_or_queue_of_its_own_is_refused_and_one_with_a_dict_is_not(
        tmp_path: Path, samples: list[Path], keep: str, read: str) -> None:
    handler = HANDLER.format(initialize="        self.kept, self.array, self.queue = {}, torch.zeros(1), queue.Queue()",
                             postprocess=PLAIN) + f"""
    def handle(self, data, context):
        first = data[0]["body"][0]
        {keep}
        return [{{"scores": scores, "first": float({read})}} for scores in super().handle(data, context)]
"""
    config = tmp_path / "early.yaml"
    config.write_text("batchSize: 4\nearly_exit: {answers: early}\n")
    refused = pytest.raises(ArchiveError, match=r"(?s)local variables.*\$\.first: 0\.1.* has become -1\.0")
    with refused if "array" in keep or "queue" in keep else nullcontext():
        archived(tmp_path, f"import queue\n{handler}", samples, config=config)


def test_an_archive_whose_handler_keeps_the_size_of_a_picture_in_a_tensor_is_refused(tmp_path: Path) -> None:
    handler = HANDLER.format(initialize="        self.size = torch.zeros(2)", postprocess=PLAIN) + """
    def preprocess(self, data):
        import io
        from PIL import Image
        pictures = [Image.open(io.BytesIO(item["body"])) for item in data]
        self.size[:] = torch.tensor(pictures[0].size)
        return torch.tensor([[value / 255 for value in picture.resize((2, 2)).convert("L").getdata()]
                             for picture in pictures])

    def postprocess(self, scores):
        return [{"width": int(self.size[0])} for _ in scores]
"""
    config, picture = tmp_path / "early.yaml", tmp_path / "picture.png"
    config.write_text("batchSize: 4\nearly_exit: {answers: early}\n")
    picture.write_bytes(sample_images((3, 16, 16))[0].parts[0].value)
    with pytest.raises(ArchiveError, match=r"(?s)local variables.*\$\.width: 16 has become 21"):
        archived(tmp_path, handler, [picture], config=config)


def test_what_differs_from_request_to_request_in_any_case_is_not_compared() -> None:
    asked = Asked(Counting)
    require_side_by_side(asked.at_once, asked.alone)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize(("handler", "told"), [(UnderALock, "not answered within 2 s"),
                                               (InALoopOfItsOwn, "one was answered with 500")])
def test_a_handler_that_holds_what_the_next_call_needs_is_refused(handler: type[AtOnce], told: str) -> None:
    with pytest.raises(LoadingError, match=f"{told}.*answers: plain"):
        require_side_by_side(Asked(handler).at_once, limit_s=2)
