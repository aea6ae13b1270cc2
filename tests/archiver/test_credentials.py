"""Credentials in a URL are used for requests, and never appear in logs, errors, the audit or the live page."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.archiver.audit import AUDIT_FILE, Audit
from early_exit.archiver.gateway.dashboard import Live, in_words
from early_exit.archiver.gateway.upstream import answer_item
from early_exit.archiver.torchserve.addresses import Addresses, free_ports
from early_exit.archiver.torchserve.api import Api
from early_exit.archiver.watch.cli import main as ee_watch
from early_exit.handler.errors import RecordError, ServerError
from early_exit.training.command import run_command
from early_exit.training.credentials import without_credentials
from early_exit.training.data.sources import local_folders
from tests.archiver.test_gateway_upstream import upstream_of


@pytest.fixture
def nowhere() -> str:
    """The URL of a server that does not run, with a password."""
    [port] = free_ports(1)
    return f"http://me:secret@127.0.0.1:{port}"


@given(user=st.text(), password=st.text(min_size=1), quoted=st.booleans(), around=st.text())
def test_whatever_a_password_holds_a_host_is_all_that_is_left(
        user: str, password: str, quoted: bool, around: str) -> None:
    if quoted:
        user, password = quote(user, safe=""), quote(password, safe="")
    else:  # a URL holds no spaces, and each of the other characters would end the part before the host
        user, password = ("".join(re.split(r"[\s/?#\"<>]", text)) for text in (user, password))
    around = around.replace("@", "")
    assert without_credentials(f"{around} https://{user}:{password}@host/x") == (
        f"{without_credentials(around)} https://***@host/x")


@pytest.mark.parametrize("text", [
    "https://me:sec/ret@host:8080/x", "https://me:sec#ret@host", "https://me:sec?ret@host", "me:sec@ret@host:8080",
    "me:secret@host:8080"])
def test_a_password_that_should_have_been_quoted_and_an_address_without_its_scheme_are_told_without_it(
        text: str) -> None:
    assert re.fullmatch(r"(https://)?\*\*\*@host(:8080)?(/x)?", without_credentials(text))
    with pytest.raises(ServerError, match=r"expected an inference address .*\*\*\*@host"):
        Addresses.of_server(text)


@pytest.mark.parametrize("text", [
    "https://host:8081/models/digits@1", "https://host/a@b", "https://host:80?x=a@b", "10:30 me@host:22", "me@host"])
def test_what_is_no_password_is_left(text: str) -> None:
    assert without_credentials(text) == text


def test_an_audit_holds_no_credentials_and_tells_none_of_an_older_one(tmp_path: Path, nowhere: str) -> None:
    audit = Audit(tmp_path / "state" / AUDIT_FILE)
    audit.append("trouble", error=f"no answer from {nowhere}", evidence={"sources": [nowhere]}, version="2.0")
    assert "secret" not in audit.path.read_text() and "127.0.0.1" in audit.path.read_text()
    with audit.path.open("a") as file:
        file.write(json.dumps({"time": 1.0, "event": "trouble", "error": nowhere}) + "\n")
    assert all("secret" not in in_words(event) + json.dumps(event) for event in audit.read())


def test_what_a_watcher_says_of_a_server_that_does_not_answer_names_no_password(
        nowhere: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["digits", "--server", nowhere, "--no-tokens", "--state", str(tmp_path), "--model-store", str(tmp_path)]
    assert ee_watch([*asked, "--once", "--json"]) == 1
    assert ee_watch(["status", *asked]) == 1
    said = capsys.readouterr()
    for text in (said.out, said.err, (tmp_path / AUDIT_FILE).read_text()):
        assert "no answer from http://***@127.0.0.1" in text and "secret" not in text


def test_who_asks_the_gateway_hears_nothing_of_the_password_for_the_server(nowhere: str) -> None:
    async def ask() -> str:
        upstream = upstream_of(nowhere)
        live = Live(upstream)
        await live.look()
        message = await answer_item(upstream, "digits", b"", anytime=False)
        await upstream.close()
        return json.dumps([message, live.state(None)])

    said = asyncio.run(ask())
    assert said.count("***@127.0.0.1") == 2 and "secret" not in said


def test_a_refusal_names_no_password(nowhere: str) -> None:
    asking = Api(Addresses.of_server(nowhere)).unregister("digits", "2.0")
    asked = next(asking)
    with pytest.raises(ServerError, match=r"DELETE http://\*\*\*@127\.0\.0\.1.* was answered with 404") as refused:
        asking.send(httpx.Response(404, request=httpx.Request(asked.method, asked.url)))
    assert "secret" in asked.url and "secret" not in str(refused.value)


@pytest.mark.parametrize("source", ["nothing://me:secret@host/records", "ftp://me:secret@127.0.0.1:1/records",
                                    "nothing://host/records?X-Amz-Signature=secret&n=1"])
def test_a_source_of_records_that_cannot_be_read_is_named_without_its_credentials(source: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot (open|read).*\*\*\*") as error:
        local_folders([source], tmp_path)
    assert "secret" not in str(error.value)


def test_no_command_ends_with_credentials_in_its_message(capsys: pytest.CaptureFixture[str], nowhere: str) -> None:
    def work() -> int:
        raise OSError(f"cannot reach {nowhere}")

    assert run_command("ee-train", work) == 1
    with pytest.raises(ServerError, match=r"ftp://\*\*\*@host:1"):
        Addresses.of_server("ftp://me:secret@host:1")
    assert capsys.readouterr().err.startswith("ee-train: cannot reach http://***@127.0.0.1")
