"""Headers that cost a full pass take effect only if the server's secret comes with them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import (
    ANYTIME_HEADER,
    EXIT_HEADER,
    OPINIONS_HEADER,
    PROBE_HEADER,
    SECRET_HEADER,
    SECRET_VARIABLE,
)
from tests.handler.test_early_answers import Numbers, backbone, model, requests
from tests.support.host import MemoryHost, worker_of

__all__ = ["backbone", "model"]

SECRET = "the secret of this server"


@pytest.fixture(autouse=True)
def secret_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)


def asked(model: EarlyExitModel, headers: dict[str, str],
          config: ServingConfig | None = None) -> tuple[set[str], float]:
    """Send a request; return the headers of what the worker did beyond an ordinary answer, and how many requests it ran
    to the end."""
    host, [body] = MemoryHost(), requests(1)
    [reply] = worker_of(model, Numbers(model), config, host).step([Call("id", {"body": body}, headers)])
    assert reply is not None and reply.status == 200
    told = {OPINIONS_HEADER} & reply.headers.keys()
    if EXIT_HEADER not in reply.headers:
        assert reply.body["probe"] == "ok"
        told = {PROBE_HEADER}
    return told, host.value("anytime_answers_total")


@pytest.mark.parametrize("header", [ANYTIME_HEADER, PROBE_HEADER, ANYTIME_HEADER.lower()])
@pytest.mark.parametrize("secret", [None, "", "guessed", SECRET[:-1], "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_client_without_the_secret_gets_an_ordinary_answer(
        model: EarlyExitModel, header: str, secret: str | None) -> None:
    assert asked(model, {header: "1", **({} if secret is None else {SECRET_HEADER: secret})}) == (set(), 0)


@pytest.mark.parametrize("header", [ANYTIME_HEADER, PROBE_HEADER])
@pytest.mark.parametrize("variable", [None, "", " "])
def test_where_the_worker_has_no_secret_nobody_has_it(
        model: EarlyExitModel, header: str, variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is None:
        monkeypatch.delenv(SECRET_VARIABLE)
    else:
        monkeypatch.setenv(SECRET_VARIABLE, variable)
    for sent in ("", " ", "None"):
        assert asked(model, {header: "1", SECRET_HEADER: sent}) == (set(), 0)


def test_the_operator_is_told(model: EarlyExitModel) -> None:
    for name in (SECRET_HEADER, SECRET_HEADER.lower()):
        assert asked(model, {ANYTIME_HEADER: "1", name: SECRET}) == ({OPINIONS_HEADER}, 1)
        assert asked(model, {PROBE_HEADER: "1", name: SECRET})[0] == {PROBE_HEADER}
    assert asked(model, {SECRET_HEADER: SECRET}) == (set(), 0), "the secret alone asks for nothing"


def test_a_part_of_a_form_that_is_named_like_the_secret_fails_nobodys_answer(model: EarlyExitModel) -> None:
    part: Any = {"content-type": "text/plain"}
    assert asked(model, {ANYTIME_HEADER: "1", SECRET_HEADER: part}) == (set(), 0)


def test_a_configuration_can_open_the_headers_to_clients(model: EarlyExitModel) -> None:
    config = ServingConfig.from_model_config({"early_exit": {"open_headers": True}})
    assert asked(model, {ANYTIME_HEADER: "1"}, config) == ({OPINIONS_HEADER}, 1)
    assert asked(model, {PROBE_HEADER: "1"}, config)[0] == {PROBE_HEADER}


def test_the_users_handler_does_not_see_the_secret_nor_is_it_logged(
        model: EarlyExitModel, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[dict[str, str]] = []

    class Curious(Numbers):
        def handle(self, data, context):  # type: ignore[no-untyped-def]
            seen.append(context.get_all_request_header(0))
            return super().handle(data, context)

    caplog.set_level(logging.DEBUG)
    worker = worker_of(model, Curious(model))
    for secret in (SECRET, "guessed"):
        for _ in range(3):
            headers = {ANYTIME_HEADER: "1", "X-Own": "1", SECRET_HEADER: secret}
            worker.step([Call("id", {"body": requests(1)[0]}, headers)])
    assert [headers.keys() for headers in seen] == [{ANYTIME_HEADER, "X-Own"}] * 3 + [{"X-Own"}] * 3
    [warning] = [record.message for record in caplog.records if SECRET_VARIABLE in record.message]
    assert "open_headers: true" in warning and "guessed" not in caplog.text and SECRET not in caplog.text
