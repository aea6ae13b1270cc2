"""The shards of a model: where they are, which of them can be read, and which belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.backbone.pooling import Side
from early_exit.handler.engines.registry import are_alike
from early_exit.handler.errors import FormatError, RecordError
from early_exit.handler.recording.clock import in_order
from early_exit.handler.recording.content import KEY_FILE
from early_exit.handler.recording.format import (
    SUFFIX,
    list_shards,
    read_header,
    read_sequence,
    read_shard,
    read_times,
)


def find_shards(records: Path | Sequence[Path], model: str, backbone: BackboneDescription,
                log: Callable[[str], None] = lambda line: None, *, may_be_renamed: bool = False) -> list[Path]:
    """Return the shards of a model below some records folders, each once, the oldest of each folder first.

    A shard that is in several folders, or in a folder that is given twice, is evidence only once. A copy is recognised
    by its name, which contains the worker and the time at which it began, and by its size: a copy that is not complete
    must not hide the whole shard. Shards that cannot be read are returned, too, because nobody knows whose they are,
    and their reader reports them.

    Args:
        records: one records folder or several.
        model: the name of the model.
        backbone: the backbone of the model.
        log: receives a line about the records of other models with the same backbone.
        may_be_renamed: whether the model may have been served under another name. If so, and if there are no records
            of its own name, but records of one other name, these are returned.

    Raises:
        RecordError: there are no such shards; the message lists the ones that were found.
    """
    folders = [records] if isinstance(records, Path) else records
    for folder in folders:
        if not folder.is_dir():
            raise RecordError(f"no records folder at {folder}: pass the one that ee-serve printed")
    shards = [shard for folder in folders for shard in list_shards(folder)]
    model_of = {shard: _model_of(shard) for shard in shards if shard.parent.name == backbone.sha256}
    others = sorted({name for name in model_of.values() if name not in (None, model)})
    served_as = others[0] if may_be_renamed and len(others) == 1 and model not in model_of.values() else model
    first_of: dict[tuple[str, int], Path] = {}
    for shard, name in model_of.items():
        if name in (None, served_as):
            first_of.setdefault((shard.name, _size(shard)), shard)
    if served_as != model:
        log(f"there are no records of {model}, so those of {served_as} are used: if {model} is not served under that "
            "name, a plan from them is certified for requests to another model")
    elif others:
        log(f"records of {', '.join(others)} are skipped: they are requests to another model, although its backbone is "
            f"that of {model}")
    if first_of:
        return [*first_of.values()]
    found = ", ".join(sorted({f"{shard.parent.parent.name} {shard.parent.name[:12]}" for shard in shards}))
    raise RecordError(f"{', '.join(map(str, folders))} has no records of {model} with the backbone "
                      f"{backbone.sha256[:12]}; it has {found or 'none at all'}. Serve the archive, send requests, and "
                      "wait until the first shard is sealed; if the model is served under another name, pass only the "
                      "records folder of that name")


def is_folder_of(folder: Path, model: str, backbone: BackboneDescription) -> bool:
    """Tell whether a folder is one in which workers record a model with a backbone.

    The folder above it has the name of the model, except in a copy of a part of a records folder. There, the shards
    name the model.
    """
    return folder.name == backbone.sha256 and (
        folder.resolve().parent.name == model
        or any(_model_of(shard) == model for shard in folder.glob("*" + SUFFIX)))


def _model_of(shard: Path) -> str | None:
    """Return the name under which the recorded model was served; None if the shard cannot be read."""
    try:
        return read_header(shard).model
    except (RecordError, FormatError):
        return None


def _size(shard: Path) -> int:
    """Return the size of a shard in bytes; 0 if it cannot be read, which its reader will report."""
    try:
        return shard.stat().st_size
    except OSError:
        return 0


def readable_shards(shards: Sequence[Path], log: Callable[[str], None]) -> list[Path]:
    """Return the shards that can be read.

    A line is logged for each file that cannot be read: one that is empty, truncated, not a shard, of a newer format, or
    deleted in the meantime.

    Raises:
        RecordError: no shard can be read.
    """
    readable, reasons = [], []
    for shard in shards:
        try:
            header = read_header(shard)
            read_shard(shard, header.layers[:1])
            read_sequence(shard)
        except (RecordError, FormatError) as error:
            log(f"{error}. It is skipped")
            reasons.append(str(error))
        else:
            readable.append(shard)
    if not readable:
        raise RecordError(f"none of the {len(shards)} record shards can be read: record again. The error of the first "
                          f"is: {reasons[0]}" if reasons else "there are no record shards: record first")
    return readable


def of_traffic(shards: Sequence[Path], traffic: str, log: Callable[[str], None]) -> list[Path]:
    """Return the shards of the given traffic, and shards of an earlier version, whose traffic is not known.

    Args:
        shards: shards of one backbone.
        traffic: the identity of the archive's traffic; empty if it is not known.
        log: receives a line that says how many records the other shards hold.

    Raises:
        RecordError: all shards are of other traffic.
    """
    known = {shard: read_header(shard).traffic for shard in shards}
    usable = [shard for shard in shards if known[shard] in ("", traffic)]
    others = [shard for shard in shards if known[shard] not in ("", traffic)]
    if not others:
        return usable
    n_others = sum(len(read_times(shard)) for shard in others)
    why = ("they are of other traffic: they were recorded with another handler, other files or another configuration "
           "than this archive has" if traffic else
           "the archive was made by an earlier version and does not identify its traffic: make it again with "
           "ee-archive")
    if not usable:
        raise RecordError(f"all {n_others} records are skipped: {why}. Record with this archive")
    log(f"{n_others} records are skipped: {why}")
    return usable


def tell_keys(shards: Sequence[Path], log: Callable[[str], None]) -> None:
    """Log a line if contents were hashed with several keys, because repeats with different keys are not recognised."""
    keys = {read_header(shard).content_key for shard in shards} - {""}
    if len(keys) > 1:
        log(f"the contents of these records were hashed with {len(keys)} keys, so equal contents are not recognised as "
            f"equal: give all hosts the same {KEY_FILE}, in their records folders, before they record")


def times_of(shards: Sequence[Path]) -> dict[Path, Tensor]:
    """Return for each shard the (N,) float64 Unix times of its records, corrected if a clock was set in the meantime.

    Raises:
        RecordError: a shard is damaged or has gone.
    """
    by_worker: dict[str, list[Path]] = defaultdict(list)
    for shard in shards:
        by_worker[read_header(shard).worker].append(shard)
    corrected: dict[Path, Tensor] = {}
    for worker, written in by_worker.items():
        times: Sequence[Tensor] = [read_times(shard) for shard in written]
        if worker:
            sequence = torch.cat([read_sequence(shard) for shard in written])
            times = torch.split(corrected_times(sequence, torch.cat([*times])), [len(of_shard) for of_shard in times])
        corrected |= dict(zip(written, times))
    return corrected


def corrected_times(sequence: Tensor, time: Tensor) -> Tensor:
    """Return the (N,) float64 Unix times of a worker's records, corrected if the clock was set in the meantime.

    Args:
        sequence: (N,) int64: the order in which the records were made.
        time: (N,) float64: Unix times by the worker's clock.
    """
    order = torch.argsort(sequence, stable=True)
    ordered = torch.tensor(in_order(time[order].tolist()), dtype=torch.float64)
    return torch.empty_like(ordered).scatter(0, order, ordered)


def recorded_layers(shards: Sequence[Path]) -> tuple[set[str], Side]:
    """Return the paths of the layers that every shard of one setting holds, and the side to which they were pooled."""
    headers = [read_header(shard) for shard in shards]
    return set.intersection(*(set(header.layers) for header in headers)), headers[0].pool


def of_newest_setting(shards: Sequence[Path]) -> list[Path]:
    """Return the shards that can be used together with the newest: pooled alike, and with layers in common.

    Shards that also hold other layers stay: the recorded layers depend on the plan that serves.
    """
    headers, times = {shard: read_header(shard) for shard in shards}, times_of(shards)
    newest_first = sorted(shards, key=lambda shard: times[shard].max().item(), reverse=True)
    newest = headers[newest_first[0]]
    common, usable = set(newest.layers), set[Path]()
    for shard in newest_first:
        if headers[shard].pool == newest.pool and common & set(headers[shard].layers):
            common &= set(headers[shard].layers)
            usable.add(shard)
    return [shard for shard in shards if shard in usable]


def of_engine(shards: Sequence[Path], engine: str) -> list[Path]:
    """Return the shards whose activations are like those that heads will read in service.

    Args:
        shards: shards of one backbone.
        engine: the identity of the engine that will serve.

    Raises:
        RecordError: all shards were made by other engines.
    """
    made_on = {shard: read_header(shard).engine for shard in shards}
    alike = [shard for shard in shards if are_alike(made_on[shard], engine)]
    if not alike:
        others = ", ".join(sorted(set(made_on.values())))
        raise RecordError(f"the archive is executed by {engine}, but {others} made the records, and heads would read "
                          "other activations in service: record with this archive, or run the recorded requests again "
                          "with --replay, for which they must have been recorded with 'keep_requests: true'")
    return alike
