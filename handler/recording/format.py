"""The record format: what is stored about a request for training. A shard appears complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from early_exit.handler.backbone.pooling import Side
from early_exit.handler.errors import RecordError
from early_exit.handler.files.names import bare_name
from early_exit.handler.files.private import replacing
from early_exit.handler.formats import RECORDS
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.sample_request import BODY

SUFFIX = ".safetensors"
_ACTIVATION = "activation/"
_KEPT, _BODY = "kept", "body"
"""Names of the tensors with kept requests, and with the bodies that the previous release kept instead."""
_SIZES, _BYTES = "_sizes", "_bytes"
_SYSTEMS_NUMBER = re.compile(r"os error (\d+)")
ANONYMOUS = -2**63
"""The request of a record if it is not known to which request the recorded row belongs.

Such records are not repeats of each other. Their requests are not kept, and no label belongs to them. Several of them
may come from one request, so they are not independent evidence: exit heads learn from them, but the choice of exits and
the certificate ignore them.
"""


@dataclass(frozen=True)
class RecordColumns:
    """The columns of N records: everything but activations and kept requests. A shard holds each column by its name.

    Class numbers are int32 and exits int16 in a shard, and int64 where training reads them.
    """

    log_probabilities: Tensor
    """(N, K) float16: the backbone's distribution."""
    backbone_class: Tensor
    """(N,) int32: the class that the backbone predicts."""
    full_class: Tensor
    """(N,) int32: the class that the serving engine predicts without exits; with an exact engine, `backbone_class`. It
    is `NO_CLASS` where only the scores of a lossy engine are not finite."""
    answered_class: Tensor
    """(N,) int32: the class that was served, or `NO_CLASS`."""
    exit: Tensor
    """(N,) int16: the exit that answered, as a position in the shard's layers, or -1 for the backbone."""
    request: Tensor
    """(N,) int64: a uniform hash of the request id, or `ANONYMOUS`."""
    row: Tensor
    """(N,) int32: the number of the instance in its request; 0 unless the request had several in an envelope."""
    content: Tensor
    """(N,) int64: a keyed hash of the handler's input, equal for equal contents, or `UNKNOWN_CONTENT`."""
    sequence: Tensor
    """(N,) int64: the number of requests, recorded or not, that the worker had answered before this one. It grows even
    if the clock is set back."""
    time: Tensor
    """(N,) float64: Unix time in seconds, the same for all requests that were served together."""
    sampling_rate: Tensor
    """(N,) float32: the probability with which the request was drawn."""

    def __len__(self) -> int:
        return len(self.request)

    def columns(self) -> dict[str, Tensor]:
        """Return every column by its name."""
        return {name: getattr(self, name) for name in COLUMNS}


COLUMNS = tuple(field.name for field in fields(RecordColumns))
_NEW = {"row": 0, "content": UNKNOWN_CONTENT, "sequence": 0}
"""The columns that shards of the previous release lack, with the values that replace them."""


@dataclass(frozen=True, kw_only=True)
class Records(RecordColumns):
    """N records: requests of the shadow sample, each with the output of the whole backbone."""

    activations: Mapping[str, Tensor]
    """Pooled activations by layer path: (N, ...) float16."""
    kept: Sequence[bytes] | None = None
    """The N kept requests, as `KeptRequest.to_bytes` writes them, or None if requests are not kept. The bytes are empty
    if the request of the record is not known, or if it is not JSON with bytes."""

    def where(self, chosen: Tensor) -> Records:
        """Return the records that a (N,) bool mask selects."""
        kept = None if self.kept is None else [*compress(self.kept, chosen.tolist())]
        activations = {path: activation[chosen] for path, activation in self.activations.items()}
        return Records(activations=activations, kept=kept,
                       **{name: column[chosen] for name, column in self.columns().items()})

    def predict(self) -> Tensor:
        """Return a (N,) bool mask of the records whose scores predict a class.

        Activations may be NaN or infinite. No exit head learns from such a record, and the certificate counts it as
        answered wrongly by every exit.
        """
        return ~self.log_probabilities.isnan().any(dim=1)

    @staticmethod
    def concatenate(parts: Sequence[Records]) -> Records:
        """Join records that have the same layers."""
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
        activations = {path: torch.cat([part.activations[path] for part in parts]) for path in parts[0].activations}
        keeping = [part.kept for part in parts if part.kept is not None]
        kept = [request for part in keeping for request in part] if len(keeping) == len(parts) else None
        return Records(activations=activations, kept=kept, **columns)


@dataclass(frozen=True)
class ShardHeader:
    """What all records of a shard have in common."""

    model: str
    version: str
    backbone: str
    """sha256 of the backbone."""
    pool: Side
    layers: tuple[str, ...]
    """Layers at which the backbone was cut, in order. All are recorded, and `Records.exit` is a position in this
    tuple."""
    engine: str = "folded"
    """Identity of the engine that computed the activations."""
    traffic: str = ""
    """Identity of the traffic that was recorded, see `user_handler.traffic`; empty if it is not known."""
    worker: str = ""
    """Name of the worker that wrote the shard, whose requests `Records.sequence` counts; empty if it has no name."""
    content_key: str = ""
    """Name of the key that contents were hashed with; empty if none were hashed."""
    n_not_finite: int = 0
    """The number of requests that the worker did not record between its previous shard and this one, because their
    scores were not finite and predicted no class."""
    host: str = ""
    """The name of the host of the worker; empty if it is not known."""
    n_dropped: int = 0
    """The number of records that the worker dropped since it sealed its previous shard, because it could not write or
    make them."""
    dropped: tuple[float, float] = (0.0, 0.0)
    """Unix times of the first and of the last of the dropped records."""

    def __post_init__(self) -> None:
        for what in ("model", "version", "backbone"):
            bare_name(getattr(self, what), f"the {what} of recorded requests", RecordError)

    def folder(self, root: Path) -> Path:
        return root / self.model / self.backbone


def request_hash(request_id: str) -> int:
    """Return a uniform signed 64-bit hash of a request id, never `ANONYMOUS`; records are split by it."""
    return max(ANONYMOUS + 1, int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big", signed=True))


def write_shard(path: Path, header: ShardHeader, records: Records) -> None:
    """Publish records as a shard that no other user can read. It is written to a scratch file, synced and renamed.

    Raises:
        ForeignFileError: the folder belongs to somebody else.
        OSError: the shard cannot be written; nothing is left behind.
    """
    tensors = records.columns() | {_ACTIVATION + layer: tensor for layer, tensor in records.activations.items()}
    if records.kept is not None:
        tensors[_KEPT + _SIZES] = torch.tensor([len(request) for request in records.kept])
        tensors[_KEPT + _BYTES] = torch.frombuffer(bytearray(b"".join(records.kept) or b"\0"), dtype=torch.uint8)
    stamped = RECORDS.stamped({"header": json.dumps(header.__dict__)})
    metadata = {name: str(value) for name, value in stamped.items()}  # safetensors keeps strings only
    with replacing(path) as scratch:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        except SafetensorError as error:  # safetensors reports a full disk or a missing permission in this way
            number = _SYSTEMS_NUMBER.search(str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())


def list_shards(folder: Path) -> list[Path]:
    """Return the complete shards below a folder, oldest first."""
    dated = []
    for path in folder.rglob("*" + SUFFIX):
        try:
            about = path.stat()
        except FileNotFoundError:  # deleted by the retention of a worker in the meantime
            continue
        except OSError:  # a link to itself, or a folder without permission: the reader of the shard reports it
            dated.append((0.0, path))
            continue
        if stat.S_ISREG(about.st_mode):  # opening a pipe would block for ever
            dated.append((about.st_mtime, path))
    return [path for _, path in sorted(dated)]


def read_header(path: Path) -> ShardHeader:
    """Return the header of a shard.

    Raises:
        RecordError: the file is damaged.
        FormatError: this version does not read its format.
    """
    with _opened(path) as shard:
        header = json.loads(shard.metadata()["header"])
        return ShardHeader(**{**header, "layers": tuple(header["layers"]),
                              "dropped": tuple(header.get("dropped", (0.0, 0.0)))})


def read_shard(path: Path, layers: Sequence[str], *, kept: bool = False) -> Records:
    """Return the records of a shard with the activations of the given layers, and with the kept requests if `kept`.

    Raises:
        RecordError: the file is damaged or lacks a layer.
        FormatError: this version does not read its format.
    """
    with _opened(path) as shard:
        present = set(shard.keys())
        columns = {name: shard.get_tensor(name) for name in COLUMNS if name in present or name not in _NEW}
        n = len(columns["request"])
        if lengths := {name: len(column) for name, column in columns.items() if len(column) != n}:
            raise ValueError(f"its columns have {lengths} values, expected {n} of each")
        columns = {name: torch.full((n,), value) for name, value in _NEW.items()} | columns
        activations = {layer: shard.get_tensor(_ACTIVATION + layer) for layer in layers}
        requests = None
        if kept and _KEPT + _SIZES in present:
            requests = list(_cut(shard, _KEPT))
        elif kept and _BODY + _SIZES in present:
            requests = [KeptRequest({BODY: body}).to_bytes() for body in _cut(shard, _BODY)]
    return Records(activations=activations, kept=requests, **columns)


def read_times(path: Path) -> Tensor:
    """Return the (N,) float64 Unix times of a shard's records without reading anything else.

    Raises:
        RecordError: the file is damaged.
        FormatError: this version does not read its format.
    """
    with _opened(path) as shard:
        times: Tensor = shard.get_tensor("time")
        return times


def read_sequence(path: Path) -> Tensor:
    """Return the (N,) int64 sequence of a shard's records, or zeros if it has none, without reading anything else.

    Raises:
        RecordError: the file is damaged.
        FormatError: this version does not read its format.
    """
    with _opened(path) as shard:
        name = "sequence" if "sequence" in set(shard.keys()) else None
        sequence: Tensor = shard.get_tensor(name) if name else torch.zeros(len(shard.get_tensor("time")))
        return sequence.long()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a shard for reading and check its format; every reader of shards uses this function."""
    try:
        with safe_open(path, "pt") as shard:
            RECORDS.require(shard.metadata(), path)
            yield shard
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"cannot read the record shard {path}: {type(error).__name__}: {error}") from error


def _cut(shard: Any, name: str) -> Iterator[bytes]:
    """Yield the pieces of a tensor of bytes; a second tensor holds their sizes."""
    joined, start = shard.get_tensor(name + _BYTES).numpy().tobytes(), 0
    for size in shard.get_tensor(name + _SIZES).tolist():
        yield joined[start:start + size]
        start += size
