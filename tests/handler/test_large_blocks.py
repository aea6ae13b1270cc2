"""No part of a long block escapes the monitor."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import torch

from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.monitor.blocks import Blocks, Sample

PLACE = (torch.zeros(2), torch.eye(2))
"""Samples are compared by their two components as they are."""


def at(x: float, content: int, loss: float = 0.0, requests: float = 1.0) -> Sample:
    return Sample(0, loss, content, 0.0, requests, (x, 0.0))


def hashes(n: int) -> list[int]:
    draw = random.Random(1)
    return [draw.getrandbits(63) - 2**62 for _ in range(n)]


def one_long_block(samples: list[Sample]) -> Blocks:
    blocks, likeness = Blocks(), Likeness(*PLACE, distance=0.5, length=10_000.0)
    for sample in samples:
        blocks, ended = blocks.after(sample, likeness, 1000)
        assert not ended
    return blocks


def test_a_long_block_that_is_answered_wrongly_late_is_counted_with_the_share_that_is_wrong() -> None:
    blocks = one_long_block([at(0.0, content, float(number >= 1000)) for number, content in enumerate(hashes(3000))])
    assert len(blocks.open) == 1000
    assert 0.6 < sum(loss for _, loss in blocks.open) / 1000 < 0.73, "two thirds are wrong"


def test_what_is_counted_of_a_long_block_depends_neither_on_the_order_nor_on_copies() -> None:
    frames = [at(0.0, content, float(number % 2)) for number, content in enumerate(hashes(1500))]
    tail = [at(0.0, 2**63 + number) for number in range(3)]  # the last two samples stay undecided
    copied = [copy for frame in frames for copy in (frame, frame)]
    counted = [set(one_long_block([*order, *tail]).open) for order in (frames, frames[::-1], copied)]
    assert counted[0] == counted[1] == counted[2]


def test_a_health_check_that_is_no_longer_counted_in_a_long_block_is_still_known() -> None:
    probe = at(50.0, 2**62)
    blocks = one_long_block([one for content in hashes(1200) for one in (probe, at(0.0, content))])
    assert all(content != probe.content for content, _ in blocks.open)
    assert blocks.before == ((0.0, 0.0),) * 3, "it is not compared with its neighbours again"
    assert Blocks.from_json(json.loads(json.dumps(asdict(blocks)))) == blocks
