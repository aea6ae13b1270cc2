"""Removes the files of renewals that are over, and records that are too old or too many."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from early_exit.archiver.audit import Event
from early_exit.archiver.packaging.configuration import serving_config
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.triggers import ATTEMPT, KEPT, ROLLING
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.recording.retention import enforce_limits
from early_exit.training.paths import RunPaths

_RUN = re.compile(r"\d{8}-\d{6}")
_TELLS_THE_RATE = 0.1
"""Records tell the rate at which they come if they span this share of the age at which they are deleted."""


def run_name() -> str:
    """Return a name for the folder of a run that begins now; such names mark the folders of runs."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def remove_left_over(runs: Path, events: Sequence[Event], unfinished: str | None) -> None:
    """Remove the files that runs no longer need when they are over; other folders beside them stay.

    If a run made a plan, its copy of the records is removed, which would otherwise outlive the age and size limits of
    the records. A run that made no plan is removed as a whole.

    Args:
        runs: the folder of a watcher's runs.
        events: all decisions of the watcher, oldest first.
        unfinished: the name of the run that will continue, if there is one.
    """
    with_plan = _runs_with_plan(events)
    for folder in runs.iterdir() if runs.is_dir() else ():
        if folder.name == unfinished or not _RUN.fullmatch(folder.name) or folder.is_symlink():
            continue
        if folder.name in with_plan:
            run = RunPaths(folder)
            shutil.rmtree(run.training_set.root, ignore_errors=True)
            shutil.rmtree(run.remote, ignore_errors=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def limit_records(sources: Sequence[str], model: str, archive: Path) -> None:
    """Delete the records that a worker of an archive would delete, because there may be no worker.

    Args:
        sources: records folders and URLs; records at a URL are left to the workers there.
        model: the name of the model.
        archive: the archive whose configuration limits the age and the size of records.

    Raises:
        EarlyExitError: the archive cannot be read.
    """
    config = serving_config(read_archive(archive).configuration)
    for source in sources:
        if "://" not in source:
            enforce_limits(Path(source), model, config.records_max_age_s, config.records_max_bytes)


def too_little_room(status: ModelStatus, n_wanted: int, n_folders: int) -> str | None:
    """Return a sentence about a limit on the size or the age of records that keeps fewer than a renewal needs.

    Args:
        status: the model.
        n_wanted: the number of records that the next renewal needs.
        n_folders: the number of records folders, each of which has the limit on the size.
    """
    max_bytes, max_age_s = status.config.records_max_bytes, status.config.records_max_age_s
    n_bytes = sum(map(_size, status.shards))
    if len(status.times) and n_bytes and (
            n_kept := max(1, int(n_folders * max_bytes * len(status.times) / n_bytes))) < n_wanted:
        return (f"the next renewal needs {n_wanted} new records, but early_exit.records_max_bytes, which is "
                f"{max_bytes}, keeps only about {n_kept} of their size, so it never begins: set at least "
                f"{math.ceil(max_bytes * n_wanted / n_kept)} in model-config.yaml, record less of each request "
                "(early_exit.layers, pool), or pass a larger --tolerance")
    span_s = (status.times[-1] - status.times[0]).item() if len(status.times) else 0.0
    n_later = max(1, len(status.times) - 1)  # the first one opens the span
    # The first hours do not tell how many requests come in days.
    if span_s >= _TELLS_THE_RATE * max_age_s and (n_kept := int(n_later * max_age_s / span_s)) < n_wanted:
        return (f"the next renewal needs {n_wanted} new records, but at the rate so far only about {n_kept} come "
                f"within early_exit.records_max_age_s, which is {max_age_s:.0f}, so it never begins: set at least "
                f"{math.ceil(span_s * n_wanted / n_later)} in model-config.yaml, raise "
                "early_exit.sampling_rate, or pass a larger --tolerance")
    return None


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it has gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _runs_with_plan(events: Sequence[Event]) -> set[str]:
    found, run = set(), None
    for event in events:
        if event["event"] == ATTEMPT:
            run = event["run"]
        elif run is not None and (event["event"] == ROLLING or (event["event"] == KEPT and "new" in event)):
            found.add(run)
    return found
