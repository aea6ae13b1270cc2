"""Damaged weights, as after bytes on a disk went bad."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.scores import score_error


def weights_of(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return the first, the middle and the last matrix or kernel of a model."""
    weights = [(name, weight) for name, weight in graph.named_parameters() if weight.dim() > 1]
    return dict(weights[place] for place in (0, len(weights) // 2, -1))


@torch.no_grad()
def overwrite(weights: Tensor, seed: int = 0) -> None:
    """Fill weights with random bytes. Zeros replace values that are not finite, which would give the damage away."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (weights.numel() * weights.element_size(),), generator=generator, dtype=torch.uint8)
    weights.copy_(data.view(weights.dtype).view(weights.shape).nan_to_num(0, 0, 0))


@torch.no_grad()
def unnoticed_damage(backbone: Backbone, allowed: float, batch: tuple[Tensor, ...] = ()) -> Iterator[str]:
    """Yield the weights of `weights_of` whose damage a backbone's probe does not notice.

    Args:
        backbone: the backbone, which is unchanged afterwards.
        allowed: the largest error of the probe that does not count as damage.
        batch: the inputs of a batch. Damage that changes no scores of this batch either is left out. With random
            weights, some weights make no difference.
    """
    expected, kind = torch.tensor(backbone.description.probe), backbone.description.scores
    before = backbone.graph(*batch)[0] if batch else None
    for name, weights in weights_of(backbone.graph).items():
        sound = weights.clone()
        overwrite(weights)
        if score_error(backbone.graph(*backbone.probe)[0], expected, kind) <= allowed and (
                before is None or not score_error(backbone.graph(*batch)[0], before, kind) <= allowed):
            yield name
        weights.copy_(sound)
