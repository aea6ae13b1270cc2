"""The exact search for exits is compared with trying every subset on every record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from early_exit.training.costs.cost import Costs
from early_exit.training.selection.subset import Option, best_subset, bit_mask, improved_subset, loss_masks


def random_costs(n_layers: int, generator: torch.Generator, *, batch_size: int) -> Costs:
    """Return costs that grow with the number of rows, but not in proportion to it."""
    def steps(count: int, scale: float) -> np.ndarray:
        draws = torch.rand(count, batch_size + 1, generator=generator) * scale
        draws[:, 0] = 0
        return draws.cumsum(dim=1).double().numpy()

    stages, exits = steps(n_layers + 1, 1.0), steps(n_layers, 0.2)
    whole = stages[:, -1].sum()
    return Costs("seconds", batch_size, stages / whole, exits / whole)


def flops(stages: Sequence[float], exits: Sequence[float]) -> Costs:
    return Costs("flops", 1, np.array([[0, stage] for stage in stages]), np.array([[0, exit] for exit in exits]))


def by_definition(layers: tuple[int, ...], hits: Tensor, losses: Tensor, costs: Costs) -> tuple[float, float]:
    """Return the mean cost of a batch and the total loss, from the distribution of the rows that reach each stage."""
    n_records, batch = hits.shape[1], costs.batch_size
    alive, cost, lost = torch.ones(n_records, dtype=torch.bool), 0.0, 0.0
    for layer in range(costs.n_layers + 1):
        share = alive.double().mean().item()
        chances = [math.comb(batch, n) * share**n * (1 - share) ** (batch - n) for n in range(batch + 1)]
        cost += sum(chance * costs.stages[layer][n] for n, chance in enumerate(chances))
        if layer in layers:
            cost += sum(chance * costs.exits[layer][n] for n, chance in enumerate(chances))
            leaves = alive & hits[layer]
            lost += losses[layer, leaves].sum().item()
            alive = alive & ~leaves
    return cost, lost


@settings(max_examples=150)
@given(seed=st.integers(0, 10_000), n_layers=st.integers(1, 6), n_records=st.integers(1, 30),
       batch_size=st.integers(1, 4), max_loss=st.none() | st.integers(0, 4),
       size=st.none() | st.integers(1, 4), signed=st.booleans())
def test_the_search_finds_what_brute_force_finds(
        seed: int, n_layers: int, n_records: int, batch_size: int, max_loss: int | None, size: int | None,
        signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    hits = torch.rand(n_layers, n_records, generator=generator) < 0.4
    losses = (torch.rand(n_layers, n_records, generator=generator) < 0.2).float() * hits
    if signed:
        losses = losses * (torch.randint(-4, 5, losses.shape, generator=generator) / 4)
    costs = random_costs(n_layers, generator, batch_size=batch_size)
    options = [Option(bit_mask(hit), loss_masks(loss)) for hit, loss in zip(hits, losses)]
    best = best_subset(lambda layer, position: options[layer], costs, n_records, max_loss=max_loss, size=size)
    allowed = [1.0]
    for count in range(1, n_layers + 1) if size is None else [size]:
        for layers in combinations(range(n_layers), count):
            # Losses can be negative, so a subset may be allowed although one of its prefixes is not. The search does
            # not consider such subsets.
            prefixes = [by_definition(layers[:end], hits, losses, costs)[1] for end in range(1, count + 1)]
            if max_loss is None or max(prefixes) <= max_loss:
                allowed.append(by_definition(layers, hits, losses, costs)[0])
    assert best.cost == pytest.approx(min(allowed), abs=1e-9)
    if best.layers:
        assert best.cost == pytest.approx(by_definition(best.layers, hits, losses, costs)[0], abs=1e-9)


def test_with_flops_the_cost_is_one_minus_the_papers_score() -> None:
    """The paper's score is K(S) = sum over exits of |H| (C2 - C1) - |M| C1."""
    hits = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    costs = flops((0.3, 0.3, 0.4), (0.01, 0.02))
    options = [Option(bit_mask(hit), ()) for hit in hits]
    best = best_subset(lambda layer, position: options[layer], costs, 6)
    k = 2 * (0.7 - 0.01) - 4 * 0.01 + 2 * (0.4 - 0.02) - 2 * 0.02
    assert best.layers == (0, 1)
    assert best.cost == pytest.approx(1 - k / 6)


def test_when_no_exit_pays_the_subset_is_empty() -> None:
    costs = flops((0.25,) * 4, (0.5,) * 3)
    assert best_subset(lambda layer, position: Option(0b1, ()), costs, 100).layers == ()


def test_the_position_in_the_plan_decides_the_option() -> None:
    """With budgets T / 2^n, fewer requests leave at the same candidate if it is the second exit, not the first."""
    asked = set()

    def option(layer: int, position: int) -> Option:
        asked.add((layer, position))
        return Option(0b1 << layer, ())

    best_subset(option, flops((0.25,) * 4, (0.0,) * 3), 4)
    assert {(0, 1), (1, 1), (1, 2), (2, 3)} <= asked
    assert (0, 2) not in asked


def test_beyond_the_exact_limit_the_subset_is_as_good_as_any_of_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    n_layers, n_records = 20, 60
    skill = torch.linspace(0.1, 0.9, n_layers)[:, None]
    hits = torch.rand(1, n_records, generator=generator) < skill
    costs = random_costs(n_layers, generator, batch_size=4)
    options = [Option(bit_mask(hit), ()) for hit in hits]
    best = improved_subset(lambda layer, position: options[layer], costs, n_records)
    no_loss = torch.zeros(n_layers, n_records)
    for layer in range(n_layers):
        neighbour = tuple(sorted(set(best.layers) ^ {layer}))
        assert by_definition(neighbour, hits, no_loss, costs)[0] >= best.cost - 1e-9


@given(flags=st.lists(st.booleans(), max_size=40))
def test_a_mask_has_exactly_the_set_bits(flags: list[bool]) -> None:
    mask = bit_mask(torch.tensor(flags, dtype=torch.bool))
    assert [bool(mask >> index & 1) for index in range(len(flags))] == flags


@given(losses=st.lists(st.integers(-1024, 1024), max_size=30))
def test_weighted_masks_add_up_to_the_losses(losses: list[int]) -> None:
    masks = loss_masks(torch.tensor(losses) / 1024)
    sums = [sum(weight for weight, mask in masks if mask >> index & 1) for index in range(len(losses))]
    assert sums == [loss / 1024 for loss in losses]
