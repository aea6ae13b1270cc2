"""Every block reaches the bets, also one that ends together with another one."""

from __future__ import annotations

import torch

from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.monitor.blocks import Blocks, Sample

PLACE = (torch.zeros(2), torch.eye(2))
"""Samples are compared by their two components as they are."""


def at(x: float, content: int, loss: float = 0.0, requests: float = 1.0) -> Sample:
    return Sample(0, loss, content, 0.0, requests, (x, 0.0))


def test_blocks_that_end_at_the_same_sample_all_reach_the_bets() -> None:
    """The second 1 is a copy until the block of 2 has ended. Then it decides, together with 5, about two blocks."""
    likeness, n_remembered = Likeness(*PLACE, distance=0.01, length=1.0, longest=4.0), 1
    blocks, found = Blocks(), []
    for content in (1, 2, 3, 4, 1, 5):
        blocks, ended = blocks.after(at(10.0 * content, content, loss=content / 8, requests=20.0), likeness,
                                     n_remembered)
        found.append([block.lost * 8 for block in ended])
    assert found == [[], [], [], [1.0], [], [2.0, 3.0]]
