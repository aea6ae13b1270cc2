"""What a server refuses for a reason that its answer hides comes with what to do about it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.api import Api, Conversation
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.errors import ServerError
from tests.support.server_in_memory import ServerInMemory
from tests.support.untried import build_untried
from tests.support.virtual_clock import VirtualClock

NOT_CLEANED = {"code": 500, "type": "InternalServerException",
               "message": "Interrupted while cleaning resources: digits"}
"""TorchServe's answer to DELETE where there is no program `kill`."""
NOT_ALLOWED = {"code": 405, "type": "MethodNotAllowedException",
               "message": "Requested method is not allowed, please refer to API document."}
"""TorchServe's answer to a registration where `enable_model_api` is off, as it is by default."""


class WithoutKill(ServerInMemory):
    """A server that cannot remove a version."""

    def unregister(self, model: str, version: str) -> None:
        answer(Api(Addresses.on_loopback()).unregister(model, version), 500, NOT_CLEANED)


def answer(conversation: Conversation[None], status: int, said: dict[str, object]) -> None:
    asked = next(conversation)
    conversation.send(httpx.Response(status, json=said, request=httpx.Request(asked.method, asked.url)))


def test_a_registration_that_the_server_does_not_allow_names_the_setting() -> None:
    api = Api(Addresses.on_loopback())
    with pytest.raises(ServerError, match="405: Requested method is not allowed.*\n.*enable_model_api=true"):
        answer(api.register("digits-2.0.mar", RunSettings(), None, None), 405, NOT_ALLOWED)


def test_a_removal_that_fails_for_want_of_kill_names_the_program_and_the_version_that_serves(
        recorder_mar: Path, tmp_path: Path) -> None:
    for version in ("2.0", "3.0"):
        build_untried(ArchiveRequest(str(recorder_mar), tmp_path, version=version))
    server, limits = WithoutKill("a", tmp_path), {"longest_batch_s": 0.0, "clock": VirtualClock()}
    server.register("digits-2.0.mar", RunSettings())
    with pytest.raises(ServerError, match="Interrupted .*\n.* program kill: .* procps\n"
                                          "digits 2.0 could not be removed. .* another version is the default"):
        roll(server, tmp_path / "digits-3.0.mar", **limits)  # type: ignore[arg-type]
    assert server.default == "3.0"
    with pytest.raises(ServerError, match="digits 3.0 is registered already and serves: "):
        roll(server, tmp_path / "digits-3.0.mar", **limits)  # type: ignore[arg-type]


def test_a_server_does_not_start_where_it_could_remove_no_version(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "store").mkdir()
    with pytest.raises(ServerError, match="expected the program kill on PATH, found none.*procps"), \
            TorchServe(tmp_path / "store", tmp_path / "state", Addresses.free()):
        pytest.fail("it has started")
