"""A habit's archives: the original by the stock archiver, and ours by `ee-archive`."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from filelock import FileLock
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.errors import EarlyExitError, Unsupported
from tests.support.habits.habit import FILES, Habit

SUFFIXES = {"default": ".mar", "tgz": ".tar.gz", "no-archive": ""}
LIMIT_S = 600


@dataclass(frozen=True)
class Refused:
    """What `ee-archive` said instead of making an archive."""

    reason: Unsupported | None
    """None where none is listed."""
    message: str


def original(habit: Habit, folder: Path, store: Path) -> Path:
    """Archive a habit with torch-model-archiver; return the archive's path in the model store.

    Args:
        habit: is archived.
        folder: where the user's files are written; created.
        store: folder for the archive.
    """
    folder.mkdir(parents=True)
    files = habit.write(habit.model(), folder)
    (folder / "model-config.yaml").write_text(habit.config)
    handler = habit.handler if "." not in habit.handler else str(FILES / habit.handler)
    extra = [*(FILES / name for name in habit.imports), *files.extra]
    # It works in a folder of the model's name, which another process may use for another model of that name.
    with FileLock(Path(tempfile.gettempdir()) / "torch-model-archiver.lock"):
        generate_model_archive(ModelArchiverConfig(
            model_name=habit.name, version=habit.version, handler=handler.replace(".py:", ":"),
            model_file=str(FILES / habit.model_file) if habit.model_file else None,
            serialized_file=str(files.serialized) if files.serialized else None,
            extra_files=",".join(map(str, extra)) or None, config_file=str(folder / "model-config.yaml"),
            export_path=str(store), archive_format=habit.archive_format, force=True, runtime="python"))
    return store / f"{habit.name}{SUFFIXES[habit.archive_format]}"


def build_all(requests: Sequence[ArchiveRequest]) -> list[Path | Refused]:
    """Build archives, two at a time, each in a process of its own as `ee-archive` is."""
    context = multiprocessing.get_context("forkserver")  # of a process that has imported torch, but no user's file
    context.set_forkserver_preload([__name__])
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda request: _build_apart(context, request), requests))


def _build_apart(context: multiprocessing.context.ForkServerContext, request: ArchiveRequest) -> Path | Refused:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_build, args=(request, sender), daemon=False)
    process.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT_S):
            process.kill()
            return Refused(None, f"ee-archive did not end within {LIMIT_S} s")
        outcome: Path | Refused = receiver.recv()
    except EOFError:
        outcome = Refused(None, "ee-archive ended without a word")
    finally:
        process.join()
    return outcome


def _build(request: ArchiveRequest, sender: Connection) -> None:
    try:
        sender.send(build_archive(request))
    except EarlyExitError as error:
        sender.send(Refused(error.unsupported, str(error)))
    except BaseException:
        sender.send(Refused(None, traceback.format_exc()[-3000:]))
