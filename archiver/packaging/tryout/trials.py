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
    """Let the user's handler load its model, export the model, and note the handler's answers.

    Args:
        request: the archive to build.
        folder: the user's files, as TorchServe would extract them.
        manifest: the manifest of these files.
        samples: requests to try; those that lead to no answer are left out.
        n_own: the number of samples, at the beginning, that the user gave; these must be answered.
        out: an existing folder; the backbone is written into it. The samples that were answered, the answers, and the
            description of the handler are written into the archive's own folder in it.

    Returns:
        The batches of samples whose answers differ each time, so that they cannot be compared.

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
        expected: the file with earlier answers to its samples; with exits off, the archive must give the same answers.

    Returns:
        The answers to its first sample in service, as parsed JSON or a text, by the exit that gives them; empty if the
        archive has no sample, or if its answers differ each time.

    Raises:
        ArchiveError: the archive does not load, does not answer, or answers differently.
    """
    try:
        answers: dict[str, Any] = _run(mar, {"expected": expected and str(expected), "out": None, "samples": None},
                                       "the new archive")
        return answers
    except ArchiveError as error:
        raise ArchiveError(f"the new archive does not answer as it should, so it is not published: {error}",
                           error.unsupported) from error


def answer_in_full(mar: Path, samples: Sequence[SampleRequest], out: Path) -> None:
    """Write the answers of an archive that `ee-archive` made to some requests, with exits off.

    Raises:
        ArchiveError: the archive does not load or does not answer.
    """
    _run(mar, {"expected": None, "out": str(out), "samples": samples_text(samples)}, "the archive")


def _run(mar: Path, job: dict[str, Any], what: str) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        unpack(mar, folder)
        read_manifest(ArchiveLayout(folder).manifest)  # checks the file names, because the program opens these files
        return run_child(_REPACKAGED, {**job, "folder": str(folder)}, what)
