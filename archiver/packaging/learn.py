"""Finds out what an archive needs from its source: the backbone, samples with answers, and how the handler works."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.sample import sample_images, samples_of, varied
from early_exit.archiver.packaging.sources.source import Source
from early_exit.archiver.packaging.tryout.trials import adopt, answer_in_full
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.sample_request import SampleRequest, samples_in, samples_text


def learn(request: ArchiveRequest, layout: ArchiveLayout, source: Source, aside: Path,
          log: Callable[[str], None]) -> None:
    """Fill the archive's own folder with the backbone, the samples and their answers, and the handler's description.

    Args:
        request: the archive to build.
        layout: the user's files.
        source: the source of these files.
        aside: an existing folder for files that do not go into the archive.
        log: receives lines that the user should know.

    Raises:
        EarlyExitError: the source does not load or does not answer, or its model cannot be exported.
    """
    if source.is_ours:
        _take_over(request, layout, log)
    else:
        _adopt(request, layout, source, aside, log)
    if not samples_in(layout):
        layout.samples.unlink(missing_ok=True)
        layout.answers.unlink(missing_ok=True)
        log("no sample request is known, so the new archive's answers cannot be compared with the original's, and "
            "ee-roll will ask for --untried: pass --request FILE to give a sample")


def _own_samples(request: ArchiveRequest) -> list[SampleRequest]:
    return samples_of(request.requests, request.content_type, request.form)


def _varied(own: list[SampleRequest]) -> list[SampleRequest]:
    """Return a second, varied request if there is only one."""
    return varied(own[0]) if len(own) == 1 else []


def _take_over(request: ArchiveRequest, layout: ArchiveLayout, log: Callable[[str], None]) -> None:
    """Keep the contents of an archive that `ee-archive` made; if new samples are given, let the archive answer them."""
    own = _own_samples(request)
    samples = own + _varied(own) or list(samples_in(layout))
    if samples:
        layout.samples.write_text(samples_text(samples))
    if own and layout.handler_description.exists():
        answer_in_full(Path(request.source), samples, layout.answers)
    elif samples and not layout.answers.exists():
        log("the archive was made by an older version, which kept no answers, so there is nothing to compare with")


def _adopt(request: ArchiveRequest, layout: ArchiveLayout, source: Source, aside: Path,
           log: Callable[[str], None]) -> None:
    own = _own_samples(request)
    samples = own + _varied(own) or sample_images(request.input_shape)
    files, found = aside / "files", aside / "found"
    shutil.copytree(layout.root, files)  # the handler may write into its folder
    found.mkdir()
    for batch in adopt(request, files, source.manifest, samples, len(own), found):
        log(f"your archive answers {batch} differently each time, so that answer cannot be compared")
    shutil.rmtree(files)
    ArchiveLayout(found).folder.rename(layout.folder)
    for file in found.iterdir():
        file.rename(layout.folder / file.name)
