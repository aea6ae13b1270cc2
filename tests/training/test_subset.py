"""The exact search for exits against trying every subset on every record."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from early_exit.training.subset import Option, best_subset, bit_mask


def score(layers: tuple[int, ...], hits: Tensor, wrong: Tensor, head_costs: list[float],
          left: list[float]) -> tuple[float, int]:
    """Return K(S) and the number of wrong answers, record by record."""
    saved, n_wrong = 0.0, 0
    for record in range(hits.shape[1]):
        for layer in layers:
            if hits[layer, record]:
                saved += left[layer] - head_costs[layer]
                n_wrong += int(wrong[layer, record])
                break
            saved -= head_costs[layer]
    return saved, n_wrong


@settings(deadline=None, max_examples=120)
@given(seed=st.integers(0, 10_000), n_layers=st.integers(1, 6), n_records=st.integers(1, 30),
       max_wrong=st.none() | st.integers(0, 4), size=st.none() | st.integers(1, 4))
def test_the_search_finds_what_brute_force_finds(
        seed: int, n_layers: int, n_records: int, max_wrong: int | None, size: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    hits = torch.rand(n_layers, n_records, generator=generator) < 0.4
    wrong = hits & (torch.rand(n_layers, n_records, generator=generator) < 0.2)
    left = sorted(torch.rand(n_layers, generator=generator).tolist(), reverse=True)
    head_costs = (torch.rand(n_layers, generator=generator) * 0.2).tolist()
    options = [Option(bit_mask(h), bit_mask(w), c, r) for h, w, c, r in zip(hits, wrong, head_costs, left)]
    found = best_subset(lambda layer, position: options[layer], n_layers, n_records, max_wrong=max_wrong, size=size)
    allowed = [(0.0, ())]
    for count in range(1, n_layers + 1) if size is None else [size]:
        for layers in combinations(range(n_layers), count):
            saved, n_wrong = score(layers, hits, wrong, head_costs, left)
            if max_wrong is None or n_wrong <= max_wrong:
                allowed.append((saved, layers))
    assert abs(found.score - max(saved for saved, _ in allowed)) < 1e-9
    saved, n_wrong = score(found.layers, hits, wrong, head_costs, left)
    assert abs(saved - found.score) < 1e-9
    assert n_wrong == found.n_wrong


def test_when_no_exit_pays_the_subset_is_empty() -> None:
    useless = Option(hits=0b1, wrong=0, head_cost=0.5, cost_left=0.6)
    assert best_subset(lambda layer, position: useless, 3, 100).layers == ()


def test_the_position_in_the_plan_decides_the_option() -> None:
    """With budgets T / 2^n the same candidate hits less as the second exit than as the first."""
    asked = set()

    def option(layer: int, position: int) -> Option:
        asked.add((layer, position))
        return Option(0b1111 >> position, 0, 0.0, 0.5)

    best_subset(option, 3, 4)
    assert (1, 1) in asked and (1, 2) in asked and (0, 2) not in asked


@given(flags=st.lists(st.booleans(), max_size=40))
def test_a_mask_has_exactly_the_set_bits(flags: list[bool]) -> None:
    mask = bit_mask(torch.tensor(flags, dtype=torch.bool))
    assert [bool(mask >> index & 1) for index in range(len(flags))] == flags
