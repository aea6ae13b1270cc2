"""The two programs that run a user's code when an archive is made: one for the original, one for the new archive."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.unpacking import unpack
from early_exit.archiver.packaging.tryout.child import run_child
from early_exit.handler.archive_layout import ArchiveLayout, read_manifest
from early_exit.handler.errors import ArchiveError
from early_exit.handler.sample_request import SampleRequest, samples_text

_ORIGINAL, _REPACKAGED = (Path(__file__).with_name(name) for name in ("original.py", "repackaged.py"))


def adopt(request: ArchiveRequest, folder: Path, manifest: dict[str, Any], samples: Sequence[SampleRequest],
          n_own: int, out: Path) -> list[str]:
    """Let the user's handler load its model, export that, and note what it answers.

    Args:
        request: what is wanted.
        folder: the user's files, as TorchServe would extract them.
        manifest: theirs.
        samples: requests to try; those that lead to no answer are left out.
        n_own: how many of them, at the beginning, the user gave, so that they must be answered.
        out: an existing folder; the backbone is written into it, and into an archive's folder in there the samples that
            were answered, the answers, and the description of the handler.

    Returns:
        Batches of samples whose answers are other ones each time, so that they cannot be compared.

    Raises:
        EarlyExitError: the archive does not load, or its model cannot be exported.
    """
    is_program = request.source.endswith(".pt2")
    is_factory = not is_program and ":" in request.source
    volatile: list[str] = run_child(_ORIGINAL, {
        "folder": str(folder), "out": str(out), "samples": samples_text(samples), "own_samples": n_own,
        "input_shape": request.input_shape, "inputs": [asdict(spec) for spec in request.inputs],
        "output": request.output, "envelope": request.service_envelope,
        "strategy": request.strategy and request.strategy.value,
        "pedestrian": request.pedestrian, "model_file": manifest["model"].get("modelFile"),
        "program": str(Path(request.source).absolute()) if is_program else None,
        "factory": request.source if is_factory else None,
        "factory_paths": [str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)],
        "weights": request.weights and str(request.weights.absolute()),
    }, "the original archive")
    return volatile


def check(mar: Path, expected: Path | None = None) -> dict[str, Any]:
    """Load an archive in a fresh process with TorchServe's own loader, and let it answer its samples.

    Args:
        mar: the archive.
        expected: what its samples were answered with before; with exits off it must answer the same.

    Returns:
        How it answers its first sample as it will serve, as parsed JSON or a text, by the exit that answers; empty
        where it has none, or where it answers otherwise each time.

    Raises:
        ArchiveError: it does not load or does not answer, or not the same.
    """
    try:
        answers: dict[str, Any] = _run(mar, {"expected": expected and str(expected), "out": None, "samples": None},
                                       "the new archive")
        return answers
    except ArchiveError as error:
        raise ArchiveError(f"the new archive does not answer as it should, so it is not published: {error}",
                           error.unsupported) from error


def answer_in_full(mar: Path, samples: Sequence[SampleRequest], out: Path) -> None:
    """Write what an archive of ours answers to some requests with exits off.

    Raises:
        ArchiveError: it does not load or does not answer.
    """
    _run(mar, {"expected": None, "out": str(out), "samples": samples_text(samples)}, "the archive")


def _run(mar: Path, job: dict[str, Any], what: str) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        unpack(mar, folder)
        read_manifest(ArchiveLayout(folder).manifest)  # whose names are followed there
        return run_child(_REPACKAGED, {**job, "folder": str(folder)}, what)
