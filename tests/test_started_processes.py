"""A command that restarts itself does not import code from the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from early_exit.handler.allocator import ALLOCATOR


def test_a_command_that_restarts_itself_runs_no_code_of_the_current_folder(tmp_path: Path) -> None:
    """The current folder may hold foreign code if it was downloaded or if everybody may write into it."""
    (tmp_path / "argparse.py").write_text("print('code of the current folder')\nraise SystemExit(7)\n")
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PYTHONPATH", "PYTHONSAFEPATH", *ALLOCATOR)}
    done = subprocess.run([Path(sys.executable).with_name("ee-train"), "--help"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "code of" in done.stdout, "usage" in done.stdout) == (0, False, True), done
