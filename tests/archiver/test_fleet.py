"""Which servers the options of a command name, and which tokens are used for each server."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from early_exit.archiver.torchserve import server_options
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.server_options import add_server_options, servers_of
from early_exit.handler.errors import ServerError


def servers(*arguments: str) -> list[Management]:
    parser = argparse.ArgumentParser()
    add_server_options(parser)
    return servers_of(parser.parse_args(arguments))


def test_without_an_address_the_server_is_the_one_on_loopback() -> None:
    assert [str(one) for one in servers("--port", "9000")] == ["http://127.0.0.1:9001"]


def test_each_server_has_its_address_and_the_management_port_follows_unless_it_is_named() -> None:
    found = servers("--server", "http://10.0.0.7:8080", "--server", "https://two:443,https://admin:9443", "--no-tokens")
    assert [str(one) for one in found] == ["http://10.0.0.7:8081", "https://admin:9443"]


def test_there_is_one_key_file_for_all_or_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path | None] = []

    class Remembered(Management):
        def __init__(self, addresses: Addresses, key_file: Path | None, secret_file: Path | None = None) -> None:
            given.append(key_file)

    monkeypatch.setattr(server_options, "Management", Remembered)
    two = ("--server", "http://one:1", "--server", "http://two:2")
    servers(*two, "--tokens", "a")
    servers(*two, "--tokens", "a", "--tokens", "b")
    servers(*two, "--no-tokens")
    assert given == [Path("a"), Path("a"), Path("a"), Path("b"), None, None]
    with pytest.raises(ServerError, match="2 files for 1 servers: pass --tokens"):
        servers("--tokens", "a", "--tokens", "b")


def test_a_secret_lies_beside_the_key_file_unless_it_is_named(tmp_path: Path) -> None:
    keys = str(tmp_path / "key_file.json")
    (tmp_path / "named").write_text("s\n")
    assert not servers("--tokens", keys)[0].has_secret, "a server that ee-serve did not start"
    (tmp_path / "secret").write_text("s\n")
    assert servers("--tokens", keys)[0].has_secret
    assert not servers("--no-tokens")[0].has_secret
    assert servers("--no-tokens", "--secret", str(tmp_path / "named"))[0].has_secret
    with pytest.raises(ServerError, match="no secret at .*missing: ee-serve makes it"):
        servers("--secret", str(tmp_path / "missing"))


@pytest.mark.parametrize("text", ["", "two\nlines\n", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_what_no_header_can_carry_is_no_secret(text: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(text)
    with pytest.raises(ServerError, match="one line of ASCII"):
        _ = servers("--tokens", str(tmp_path / "key_file.json"))[0].has_secret


@pytest.mark.parametrize("text", ["10.0.0.7:8080", "http://host", "ftp://host:1", "http://host:many", ""])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ServerError, match="expected an inference address"):
        Addresses.of_server(text)
