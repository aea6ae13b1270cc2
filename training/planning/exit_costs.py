"""The costs of exits with trained heads, in measured time or in FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.training.costs.cost import Costs, FlopCost, flop_costs
from early_exit.training.costs.profiling import Profile, profile_exit
from early_exit.training.heads.heads import TrainedHead


def exit_costs(profile: Profile | None, heads: Sequence[TrainedHead], policies: Sequence[str],
               backbone: BackboneDescription, batch_size: int) -> Costs:
    """Return the costs of exits with the given heads.

    Args:
        profile: measured times of the backbone's stages; without one, FLOPs are counted.
        heads: the heads, in the order of the backbone.
        policies: the kind of each exit's policy, which is timed with it.
        backbone: the backbone of the heads.
        batch_size: the size of full batches, if time is measured.
    """
    layers = [trained.layer for trained in heads]
    if profile is None:
        cost = FlopCost(backbone.flops)
        return flop_costs(layers, [cost(trained.head, trained.layer) for trained in heads])
    timed = tqdm(list(zip(heads, policies)), desc="profile", unit="exit", disable=None)
    exits = [profile_exit(trained.head, trained.layer, policy, engine=profile.engine, device=profile.device)
             for trained, policy in timed]
    return profile.costs([layer.path for layer in layers], exits, batch_size)
