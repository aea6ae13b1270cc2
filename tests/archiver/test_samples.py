"""Sample requests of several parts: how they are given, varied, and sent."""

from __future__ import annotations

import argparse
import email
import email.policy
import io
import json
from email.message import EmailMessage
from pathlib import Path

import httpx
import pytest
from PIL import Image

from early_exit.archiver.packaging.cli import parser as archive_parser
from early_exit.archiver.packaging.sources.form import FormFile, form_file
from early_exit.archiver.packaging.sources.sample import resized, sample_images, samples_of, varied
from early_exit.archiver.rollout.cli import parser as roll_parser
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.handler.errors import ArchiveError
from early_exit.handler.sample_request import Part, SampleRequest, parse_samples, samples_text

PICTURE = sample_images((3, 16, 16))[0].parts[0].value


@pytest.mark.parametrize(("text", "expected"), [
    ("image=cat.jpg", FormFile("image", Path("cat.jpg"), None)),
    ("image=@cat.jpg;type=image/jpeg", FormFile("image", Path("cat.jpg"), "image/jpeg")),
    ("a b=x=y;type=text/plain; charset=utf-8", FormFile("a b", Path("x=y"), "text/plain; charset=utf-8")),
])
def test_a_part_is_named_as_curl_does(text: str, expected: FormFile) -> None:
    assert form_file(text) == expected


@pytest.mark.parametrize("text", ["cat.jpg", "=cat.jpg", "image=", "image=@", "image=cat.jpg;type="])
def test_what_names_no_part_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=FILE or NAME=FILE;type=TYPE"):
        form_file(text)


@pytest.mark.parametrize("command", [
    lambda form: archive_parser().parse_args(["theirs.mar", *form]),
    lambda form: roll_parser().parse_args(["theirs.mar", *form])], ids=["ee-archive", "ee-roll"])
def test_the_forms_of_a_command_are_one_request(command: object, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PICTURE)
    (tmp_path / "options").write_text('{"k": 3}')
    options = command([f"--form=image={tmp_path}/cat.png",  # type: ignore[operator]
                       f"--form=options={tmp_path}/options;type=application/json"])
    [request] = samples_of([], None, options.form)
    assert request.parts == (Part(PICTURE, "image/png", "image"), Part(b'{"k": 3}', "application/json", "options"))
    assert request.inputs() == {"image": PICTURE, "options": {"k": 3}}
    assert parse_samples(samples_text([request]), "the archive") == (request,)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ArchiveError, match="cannot read the sample request missing.png"):
        samples_of([], None, [FormFile("image", Path("missing.png"), None)])


def test_the_varied_request_has_the_same_parts_and_the_largest_differs() -> None:
    options = Part(b'{"resize": true, "mode": "fast"}', "application/json", "options")
    [other] = varied(SampleRequest((options, Part(PICTURE, "image/png", "image"))))
    assert other.parts[0] == options, "an option that is varied may be refused"
    assert (other.parts[1].name, other.parts[1].content_type) == ("image", "image/png")
    assert other.parts[1].value != PICTURE and other.parts[1].value.startswith(b"\x89PNG")
    [other] = varied(SampleRequest((Part(b"\xff" * 15, name="raw"), Part(b"some words", "text/plain", "text"))))
    assert [part.value for part in other.parts] == [b"\xff" * 15, b"words some"], "the largest cannot be varied"
    assert varied(SampleRequest((Part(b"\xff" * 7), Part(b"true", "application/json", "b")))) == []


def test_the_resized_request_has_an_image_of_another_width_and_height() -> None:
    [other] = resized(SampleRequest((Part(b"[1]", "application/json", "options"), Part(PICTURE, "image/png", "image"))))
    assert other.parts[0].value == b"[1]"
    with Image.open(io.BytesIO(other.parts[1].value)) as image:
        assert image.size == (21, 25)
    assert resized(SampleRequest((Part(b"[1]", "application/json"),))) == []


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[httpx.Request]:
    """The requests that a client sends from now on; each is answered with 200."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={})

    client = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **more: client(transport=httpx.MockTransport(answer)))
    return requests


def test_a_body_is_sent_as_it_is_and_several_parts_as_a_form_with_their_types(sent: list[httpx.Request]) -> None:
    management = Management(Addresses.free(), None)
    management.predict("model", "1.0", SampleRequest((Part(b"[1]", "application/json"),)))
    parts = (Part(PICTURE, "image/png", "image"), Part(b"[1]", "application/json", "body"))
    management.predict("model", "1.0", SampleRequest(parts))
    management.predict("model", "1.0", SampleRequest(parts[:1]))
    plain, *forms = sent
    assert (plain.content, plain.headers["content-type"]) == (b"[1]", "application/json")
    for request, expected in zip(forms, (parts, parts[:1]), strict=True):
        assert tuple(_parts_of(request)) == expected


def _parts_of(request: httpx.Request) -> list[Part]:
    header = f"content-type: {request.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(header + request.read(), policy=email.policy.HTTP)
    assert isinstance(message, EmailMessage)
    return [Part(part.get_payload(decode=True), part.get_content_type(),  # type: ignore[arg-type]
                 str(part.get_param("name", header="content-disposition"))) for part in message.iter_parts()]


def test_a_worker_is_handed_what_torchserve_makes_of_a_part() -> None:
    assert [(type(got), got) for got in (Part(value, content_type).handed_over() for value, content_type in (
        (b"{}", "application/json"), (b"{}", "application/json; charset=utf-8"), (b"a", "text/csv"),
        (b"\xff", "text/plain"), (b"{", "application/json")))] == [
        (dict, {}), (bytearray, b"{}"), (str, "a"), (bytearray, b"\xff"), (bytearray, b"{")]
    assert json.loads(json.dumps(Part(b"[1e400]", "application/json").handed_over())) == [float("inf")]
