"""How a benchmark reports its figures, and the conditions of the run that they come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from early_exit import handler
from early_exit.handler.allocator import ALLOCATOR
from tests.support.cifar import DataMissing

_ROOT = Path(__file__).resolve().parents[2]
_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16",
                 "amx_int8", "asimd", "asimddp", "sve", "bf16", "i8mm")
"""The instruction sets of a processor on which the time of a model depends."""
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
"""Matches an absolute path without the name of the file."""
_NO_SETTINGS = ("json", "curves", "work", "resident")
"""Options that only say where files are."""


def report(file: Path, measure: Callable[[Path], dict[str, Any]], settings: Mapping[str, Any] | None = None) -> int:
    """Measure in a temporary folder, write the figures and print them; return the exit status.

    Args:
        file: the file for the figures.
        measure: a function that takes the folder and returns the figures.
        settings: what the figures depend on, such as the options of the command.
    """
    run = conditions(settings or {})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            figures = measure(Path(scratch))
    except DataMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    save(file, run, figures)
    print(legible(figures))
    return 0


def save(file: Path, run: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write figures. Before them come what `conditions` returned when the run began, and the seconds since then."""
    seconds = round(time.time() - psutil.Process().create_time())
    file.parent.mkdir(parents=True, exist_ok=True)
    text = legible({"run": {**run, "seconds": seconds}, **figures})
    # Results are published, and an error in them must not reveal the folders of this machine.
    file.write_text(_FOLDERS.sub("", text) + "\n")


def legible(figures: Mapping[str, Any]) -> str:
    """Return JSON in which each list of numbers is on one line."""
    text = json.dumps(figures, indent=1, default=str)
    return re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text)


def conditions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions of a run: the code, the machine, and the settings. Call it before measuring.

    Args:
        settings: what else the figures depend on, such as the options of the command.
    """
    return {
        "commit": commit_of_code(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _of_processor("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if name in _of_processor("flags", "Features").split()],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__, "python": platform.python_version(),
        "allocator": all(os.environ.get(name) == value for name, value in ALLOCATOR.items()),
        "settings": {name: value for name, value in settings.items() if name not in _NO_SETTINGS},
    }


def commit_of_code() -> str | None:
    """Return the commit of the code, with a plus if there are other files or changes, or if code of another folder is
    imported. Results and pages are no code."""
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)

    try:
        found = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", ".", ":!docs", ":!*.md").stdout
    except OSError:  # git is not installed
        return None
    is_other = Path(handler.__path__[0]).resolve().parent != _ROOT
    return None if found.returncode else found.stdout.strip()[:12] + ("+" if changed or is_other else "")


def _of_processor(*keys: str) -> str:
    """Return the value of the first of these keys that Linux has for the first processor; an empty text if none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    return next((told[key] for key in keys if key in told), "")
