"""Servers that do not find OpenVINO.

TorchServe's handlers import it if it is installed. That takes a quarter of the time in which a worker starts, and they
do not use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


@contextmanager
def without_openvino(folder: Path) -> Iterator[None]:
    """Hide OpenVINO from the processes that are started inside the block.

    Args:
        folder: a folder for the module that hides it.
    """
    package = folder / "openvino"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise ImportError('not for this server')\n")
    with patch.dict(os.environ, PYTHONPATH=str(folder)):
        yield
