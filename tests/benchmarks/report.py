"""How a benchmark tells its figures."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.cifar import DataMissing


def report(file: Path, measure: Callable[[Path], dict[str, Any]]) -> int:
    """Measure in a folder that is removed afterwards, write the figures and print them; return the exit status."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            figures = measure(Path(scratch))
    except DataMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    text = json.dumps(figures, indent=1)
    file.write_text(text + "\n")
    print(text)
    return 0
