"""What a server's answer to a probe means. Workers ignore a probe that comes without their secret."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.api import Api
from early_exit.handler.errors import ServerError


def probed(status: int, answer: Any) -> dict[str, Any]:
    """Return what the probe of a version learns from this status and answer."""
    conversation = Api(Addresses.on_loopback()).probe("digits", "3.0")
    asked = next(conversation)
    assert asked.needs_secret and asked.headers == {"X-Early-Exit-Probe": "1", "content-type": "application/json"}
    with pytest.raises(StopIteration) as end:
        conversation.send(httpx.Response(status, json=answer, request=httpx.Request("POST", asked.url)))
    learnt: dict[str, Any] = end.value.value
    return learnt


PROBED = {"probe": "ok", "backbone": "651c"}


@pytest.mark.parametrize("answer", [PROBED, {"predictions": [PROBED]}, {"id": "1", "outputs": [
    {"name": "probe", "shape": [1], "datatype": "BYTES", "data": [PROBED]}]}])
def test_a_probe_that_was_taken_tells_backbone_and_plan_in_any_envelope(answer: Any) -> None:
    assert probed(200, answer)["backbone"] == "651c"


@pytest.mark.parametrize(("status", "answer"), [(200, {"cat": 0.9}), (200, [0.9]), (400, {"message": "?"})])
def test_an_ordinary_answer_is_no_probe_and_the_secret_is_asked_for(status: int, answer: Any) -> None:
    with pytest.raises(ServerError, match=f"with {status}: .*\nIf it gives this answer .*EARLY_EXIT_SECRET .*--secret"):
        probed(status, answer)


def test_a_probe_that_fails_says_why_and_nothing_of_secrets() -> None:
    with pytest.raises(ServerError, match="the scores are off$"):
        probed(500, {"code": 500, "type": "ProbeFailed", "message": "the scores are off"})
