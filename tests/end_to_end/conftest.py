"""Fixtures that are shared by the modules that start a server of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from tests.support.without_openvino import without_openvino


@pytest.fixture(scope="module", autouse=True)
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide OpenVINO from the servers, whose workers start sooner then. A module that needs it overrides this."""
    with without_openvino(tmp_path_factory.mktemp("without")):
        yield


@pytest.fixture(scope="module")
def management(server: TorchServe) -> Management:
    """The management API of the module's server."""
    return Management(server.addresses, server.key_file, server.secret_file)
