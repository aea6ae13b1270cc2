"""Which servers are meant, and with which tokens."""

from __future__ import annotations

import argparse

import pytest

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


def test_there_is_one_key_file_for_all_or_one_for_each() -> None:
    two = ("--server", "http://one:1", "--server", "http://two:2")
    assert len(servers(*two, "--tokens", "a")) == len(servers(*two, "--tokens", "a", "--tokens", "b")) == 2
    with pytest.raises(ServerError, match="2 key files for 1 servers"):
        servers("--tokens", "a", "--tokens", "b")


@pytest.mark.parametrize("text", ["10.0.0.7:8080", "http://host", "ftp://host:1", "http://host:many", ""])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ServerError, match="expected an inference address"):
        Addresses.of_server(text)
