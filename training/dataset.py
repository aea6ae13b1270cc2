"""The records of one backbone, read shard by shard and split by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.backbone import BackboneDescription
from early_exit.handler.errors import RecordError
from early_exit.handler.records import Records, list_shards, read_header, read_shard


class Part(Enum):
    """The disjoint parts of the records; the values are where each begins in [0, 1)."""

    TRAIN = 0.0
    TUNE = 0.5
    CERTIFY = 0.7

    @property
    def share(self) -> float:
        """Fraction of the records, as in section 3.2.2 of the paper."""
        ends = [*(part.value for part in Part), 1.0]
        return float(ends[ends.index(self.value) + 1] - self.value)


@dataclass(frozen=True)
class RecordedTraffic:
    """N records without their activations, which are read layer by layer."""

    shards: tuple[Path, ...]
    rows: Tensor
    """(N,) int64: positions of the records used in the concatenated shards, each request once."""
    log_probabilities: Tensor
    """(N, K) float32: the backbone's distributions."""
    backbone_class: Tensor
    """(N,) int64."""
    time: Tensor
    """(N,) float64: Unix seconds."""
    position: Tensor
    """(N,) float64 in [0, 1): a uniform hash of the request, which decides the part."""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, part: Part) -> Tensor:
        """Return the (M,) indices of a part's records."""
        inside = (self.position >= part.value) & (self.position < part.value + part.share)
        return inside.nonzero().flatten()

    def activation(self, layer: str) -> Tensor:
        """Return the (N, ...) float32 pooled activations of a layer.

        Raises:
            RecordError: a shard is damaged or has gone.
        """
        parts = [read_shard(shard, [layer]).activations[layer] for shard in self.shards]
        return torch.cat(parts)[self.rows].float()


def find_shards(records: Path, model: str, backbone: BackboneDescription) -> list[Path]:
    """Return the shards of one backbone below a records folder, oldest first.

    Raises:
        RecordError: there are none; the message tells what there is.
    """
    if not records.is_dir():
        raise RecordError(f"no records folder at {records}: pass the one that ee-serve printed")
    shards = list_shards(records)
    matching = [shard for shard in shards if shard.parent.name == backbone.sha256]
    if matching:
        return matching
    others = sorted({f"{shard.parent.parent.name} {shard.parent.name[:12]}" for shard in shards})
    raise RecordError(f"{records} has no records of {model} with the backbone {backbone.sha256[:12]}; it has "
                      f"{', '.join(others) or 'none at all'}. Serve the archive, send requests, and wait until the "
                      "first shard is sealed")


def recorded_layers(shards: Sequence[Path]) -> tuple[set[str], int]:
    """Return the paths of the layers that every shard holds, and the side to which they were pooled.

    Raises:
        RecordError: there is no such layer, or not one side: the settings changed between the shards.
    """
    headers = [read_header(shard) for shard in shards]
    layers = set.intersection(*(set(header.layers) for header in headers))
    pools = {header.pool for header in headers}
    if not layers or len(pools) > 1:
        raise RecordError(f"the records were made with different settings (early_exit.pool {sorted(pools)}, "
                          f"{len(layers)} common layers): remove those of the old setting")
    return layers, pools.pop()


def load_traffic(shards: Sequence[Path]) -> RecordedTraffic:
    """Read everything but the activations.

    Raises:
        RecordError: a shard is damaged or has gone.
    """
    records = Records.concatenate([read_shard(shard, []) for shard in shards])
    rows = _first_of_each(records.request)
    return RecordedTraffic(
        shards=tuple(shards), rows=rows, log_probabilities=records.log_probabilities[rows].float(),
        backbone_class=records.backbone_class[rows].long(), time=records.time[rows],
        position=(records.request[rows].double() / 2.0**64 + 0.5).clamp(max=1 - 1e-9),  # 1 would be in no part
    )


def _first_of_each(request: Tensor) -> Tensor:
    """Return the positions of the first record of each request: TorchServe may run one twice."""
    _, order = torch.sort(request, stable=True)
    ordered = request[order]
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return order[is_first].sort().values
