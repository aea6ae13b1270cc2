"""A fixture that is shared by the modules that start a server of their own."""

from __future__ import annotations

import pytest

from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe


@pytest.fixture(scope="module")
def management(server: TorchServe) -> Management:
    """The management API of the module's server."""
    return Management(server.addresses, server.key_file, server.secret_file)
