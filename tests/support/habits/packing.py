"""The archives of a habit: the original is made by the stock archiver, and ours by `ee-archive`."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.form import FormFile
from early_exit.handler.errors import EarlyExitError, Unsupported
from tests.support.habits.habit import FILES, Habit

SUFFIXES = {"default": ".mar", "tgz": ".tar.gz", "no-archive": ""}


@dataclass(frozen=True)
class Refused:
    """The refusal of `ee-archive` to make an archive."""

    reason: Unsupported | None
    """The reason, or None if it is not a listed one."""
    message: str

    def __str__(self) -> str:
        return f"{self.reason.value if self.reason else 'for a reason that is not listed'}: {self.message}"


def original(habit: Habit, folder: Path, store: Path) -> Path:
    """Archive a habit with torch-model-archiver; return the archive's path in the model store.

    Args:
        habit: the habit to archive.
        folder: the folder into which the user's files are written. It is created.
        store: the folder for the archive.
    """
    folder.mkdir(parents=True)
    files = habit.write(habit.model(), folder)
    (folder / "model-config.yaml").write_text(habit.config)
    handler = habit.handler if "." not in habit.handler else str(FILES / habit.handler)
    extra = [*(FILES / name for name in habit.imports), *files.extra]
    # The archiver works in a folder with the model's name, which another process may use for a model of the same name.
    with FileLock(Path(tempfile.gettempdir()) / "torch-model-archiver.lock"):
        generate_model_archive(ModelArchiverConfig(
            model_name=habit.name, version=habit.version, handler=handler.replace(".py:", ":"),
            model_file=str(FILES / habit.model_file) if habit.model_file else None,
            serialized_file=str(files.serialized) if files.serialized else None,
            extra_files=",".join(map(str, extra)) or None, config_file=str(folder / "model-config.yaml"),
            export_path=str(store), archive_format=habit.archive_format, force=True, runtime="python"))
    return store / f"{habit.name}{SUFFIXES[habit.archive_format]}"


def asked(habit: Habit, source: Path, folder: Path, store: Path) -> ArchiveRequest:
    """Return a user's request to `ee-archive` for an original archive.

    Args:
        habit: the habit of the archive.
        source: the original archive.
        folder: an existing folder for two sample requests.
        store: the folder for the new archive.
    """
    more: dict[str, Any] = {"service_envelope": habit.envelope}
    samples = [folder / "first", folder / "second"]
    for sample, ask in zip(samples, habit.asks):
        sample.write_bytes(ask.body)
    if habit.asks[0].parts:
        samples, more["form"] = [], []
        for name, value, content_type in habit.asks[0].parts:
            (folder / name).write_bytes(value)
            more["form"].append(FormFile(name, folder / name, content_type))
    if habit.envelope:
        more["content_type"] = "application/json"
    return ArchiveRequest(str(source), store, requests=samples, **more, **habit.options)


def build_all(requests: Sequence[ArchiveRequest], build: Callable[[ArchiveRequest], Path]) -> list[Path | Refused]:
    """Build archives in two processes, because torch reads only one exported program at a time in each process."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(_built, build), requests))


def _built(build: Callable[[ArchiveRequest], Path], request: ArchiveRequest) -> Path | Refused:
    try:
        return build(request)
    except EarlyExitError as error:
        return Refused(error.unsupported, str(error))
    except Exception:  # kept as a traceback, which a user would see too
        return Refused(None, traceback.format_exc()[-3000:])
