"""A new archive is loaded and run once, as TorchServe would, before anyone sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from early_exit.handler.archive_layout import ArchiveLayout, extract, read_manifest
from early_exit.handler.config import RECORDS_VARIABLE
from early_exit.handler.errors import ArchiveError

_FIRST_RUN = Path(__file__).with_name("first_run.py")
_LIMIT_S = 300


def validate(mar: Path) -> dict[str, Any]:
    """Load an archive in a fresh process with TorchServe's own loader, probe it, and run its sample request.

    Returns:
        What the probe said.

    Raises:
        ArchiveError: it does not load or answer; the message ends with what the worker printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        extract(mar, folder)
        _record_nothing(folder)
        environment = {name: value for name, value in os.environ.items() if name != RECORDS_VARIABLE}
        # -I: nothing of the current directory or PYTHONPATH may help a self-contained archive.
        try:
            run = subprocess.run([sys.executable, "-I", str(_FIRST_RUN), str(folder)], env=environment,
                                 capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise ArchiveError(f"the new archive did not load and answer within {_LIMIT_S} s") from None
    if run.returncode:
        raise ArchiveError(f"the new archive does not run, so it is not published:\n{run.stderr.strip()[-2000:]}")
    outcome: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return outcome


def _record_nothing(folder: Path) -> None:
    name = read_manifest(ArchiveLayout(folder).manifest)["model"].get("configFile")
    if name:
        config = yaml.safe_load((folder / name).read_text()) or {}
        config["early_exit"] = {**(config.get("early_exit") or {}), "sampling_rate": 0}
        (folder / name).write_text(yaml.safe_dump(config))
