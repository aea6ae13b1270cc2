"""Where things lie in the folder of a run; the only owner of these names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from early_exit.handler.plan import PLAN_FILE


@dataclass(frozen=True)
class RunPaths:
    """The folder of one `ee-train` run."""

    root: Path

    @property
    def inputs(self) -> Path:
        """What the run was started with."""
        return self.root / "run.json"

    @property
    def plan(self) -> Path:
        return self.root / PLAN_FILE

    @property
    def report_json(self) -> Path:
        return self.root / "report.json"

    @property
    def report_text(self) -> Path:
        return self.root / "report.txt"

    def head(self, layer: str) -> Path:
        """Return where a trained head is kept until the plan is made."""
        return self.root / "heads" / (quote(layer, safe="") + ".safetensors")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a scratch path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
