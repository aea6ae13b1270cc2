"""What users of the last release have: archives, a plan, records and a monitor's state, made by that release's code."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

COMMIT = "d03828e24f0bf1d8fee9139bb37894c731976d63"
"""The commit of release 0.1.0, the last one before the handler's modules moved into packages."""
_ROOT = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("release_010.py")


@dataclass(frozen=True)
class LastRelease:
    """The files of one user, whose model is called digits."""

    folder: Path

    @property
    def recorder(self) -> Path:
        """The archive that records and gives full answers, digits 2.0."""
        return self.folder / "store" / "digits-2.0.mar"

    @property
    def exiting(self) -> Path:
        """The archive with exits, digits 3.0. Half of its requests are shadow samples."""
        return self.folder / "store" / "digits-3.0.mar"

    @property
    def plan(self) -> Path:
        """The plan of that archive."""
        return self.folder / "run" / "plan.json"

    @property
    def records(self) -> Path:
        """The records folder: 320 requests with their bodies, and the state of the monitor of digits 3.0."""
        return self.folder / "records"

    @property
    def answers(self) -> Path:
        """The answers of the archive with exits: (64, 1, 32, 32) `inputs` and (64, 10) `outputs`."""
        return self.folder / "answers.safetensors"


def made_by_last_release(digits_mar: Path, folder: Path) -> LastRelease:
    """Make the files in an existing folder.

    Raises:
        RuntimeError: the history of the repository lacks the release, or its code failed.
    """
    code = folder / "code" / "early_exit"
    packed = subprocess.run(["git", "-C", _ROOT, "archive", "--format=tar", COMMIT], capture_output=True, check=False)
    if packed.returncode:
        raise RuntimeError(f"the last release's code, commit {COMMIT[:7]}, is needed to make what its users have, and "
                           f"git says: {packed.stderr.decode().strip()}. Run the tests in a clone with its history: "
                           "git fetch --unshallow")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tree:
        tree.extractall(code, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since Python 3.11.4
    # PYTHONPATH comes before what is installed, which is the code of this version.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (code.parent, code)))}
    made = subprocess.run([sys.executable, "-", digits_mar, folder], input=_SCRIPT.read_text(), env=environment,
                          cwd=folder, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"the last release's code failed:\n{made.stderr[-3000:]}")
    return LastRelease(folder)
