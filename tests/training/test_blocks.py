"""Similar records count together as evidence, so certificates hold for scenes; with a random split they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from early_exit.handler.exits.risk import Risk
from early_exit.training.data.split import Part, Split, split_at_random, split_in_time
from early_exit.training.selection.blocks import blocks_of
from early_exit.training.selection.certify import walk
from early_exit.training.selection.evidence import Evidence
from early_exit.training.selection.likeness import likeness

TOLERANCE, DELTA = 0.02, 0.05
N_SCENES, N_FRAMES, N_REPETITIONS = 1500, 5, 40
LEVELS = torch.linspace(2.0, -1.6, 100)
"""Confidence thresholds from cautious to bold. The walk of `certified` begins before them, where no record leaves."""


class Frames:
    """Made-up records: the frames of a scene look nearly alike, are nearly equally hard, and mostly fail together."""

    def __init__(self, n_scenes: int, n_frames: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = n_scenes * n_frames
        self.scene = scene = torch.arange(n_scenes).repeat_interleave(n_frames)
        looks = torch.randn(n_scenes, 8, generator=generator)
        self.states = looks[scene] + 0.2 * torch.randn(n, 8, generator=generator)
        hardness = torch.randn(n_scenes, generator=generator)[scene] + 0.1 * torch.randn(n, generator=generator)
        luck, own = torch.rand(n_scenes, generator=generator)[scene], torch.rand(n, generator=generator)
        luck = torch.where(torch.rand(n, generator=generator) < 0.1, own, luck)
        self.confidence = -hardness
        self.differs = luck < 0.6 * torch.sigmoid(3 * (hardness - 1.2))

    def losses(self, level: float, learned: Tensor) -> Tensor:
        """Return the (N,) losses of a head. It makes no error on the records of the (N,) bool mask `learned`, because
        it was trained on their twins."""
        return (self.differs & ~learned & (self.confidence >= level)).float()


def by_time(frames: Frames) -> Split:
    n = len(frames.states)
    each, every = torch.arange(n), torch.ones(n, dtype=torch.bool)
    return split_in_time(frames.states, each, each, each, each.double(), every, every, every)


def at_random(frames: Frames) -> Split:
    n = len(frames.states)
    requests = torch.randint(-2**62, 2**62, (n,), generator=torch.Generator().manual_seed(n)) * 2
    return split_at_random(requests, torch.zeros(n, dtype=torch.bool))


def certified(frames: Frames, split: Split) -> int:
    """Return the number of the boldest level that the records certify, or -1."""
    learned = torch.isin(frames.scene, frames.scene[split.part == Part.TRAIN.number])
    evidence, certify = split.evidence(), split.rows(Part.CERTIFY)

    def p_values() -> Iterator[float]:
        yield 0.0
        for level in LEVELS.tolist():
            yield evidence.p_value(Risk.DISAGREEMENT, frames.losses(level, learned)[certify], TOLERANCE, DELTA)

    return walk(p_values(), DELTA) - 1


@pytest.fixture(scope="module")
def risks() -> Tensor:
    """Return, for each level, the share of all possible frames that is answered differently."""
    everything = Frames(400_000, 1, seed=0)
    nothing = torch.zeros(400_000, dtype=torch.bool)
    return torch.stack([everything.losses(level, nothing).mean() for level in LEVELS.tolist()])


def levels(rule: Callable[[Frames], Split], n_repetitions: int) -> Tensor:
    """Return the number of the boldest level that each of several streams certifies, or -1."""
    drawn = (Frames(N_SCENES, N_FRAMES, seed) for seed in range(1, n_repetitions + 1))
    return torch.tensor([certified(frames, rule(frames)) for frames in drawn])


def test_scenes_are_certified_and_their_certificate_is_true_as_often_as_it_says(risks: Tensor) -> None:
    found = levels(by_time, N_REPETITIONS)
    assert int((found >= 0).sum()) >= 0.8 * N_REPETITIONS
    n_broken = int((risks[found[found >= 0]] > TOLERANCE).sum())
    assert n_broken <= binom.ppf(0.99, N_REPETITIONS, DELTA)


def test_the_random_split_takes_frames_of_a_scene_for_independent_and_breaks_its_promise(risks: Tensor) -> None:
    found = levels(at_random, 8)
    assert int((risks[found[found >= 0]] > TOLERANCE).sum()) > 6


def test_long_blocks_that_are_answered_wrongly_are_not_certified_away_though_they_are_few() -> None:
    """The size at which a block counts is bounded by the sizes of earlier blocks; the loss of its requests is not."""
    block = torch.cat([torch.arange(4000), torch.arange(4000, 4020).repeat_interleave(50)])
    losses = (block >= 4000).double()
    of_requests = Evidence(block, block, torch.ones(len(block), dtype=torch.bool))
    assert of_requests.sizes() == of_requests.largest == (1.0, 1.0) and losses.mean() == 0.2
    assert of_requests.p_value(Risk.DISAGREEMENT, losses, TOLERANCE, DELTA) == 1
    assert of_requests.p_value(Risk.DISAGREEMENT, 0 * losses, TOLERANCE, DELTA) < DELTA


def test_a_block_of_scenes_begins_where_the_content_changes() -> None:
    frames = Frames(400, N_FRAMES, seed=1)
    position = torch.arange(len(frames.states)).double()
    alike = likeness(frames.states, position)
    assert alike.length == N_FRAMES
    blocks = blocks_of(alike, frames.states, position)
    begins = (blocks[1:] > blocks[:-1]).nonzero().flatten() + 1
    assert float((begins % N_FRAMES == 0).double().mean()) > 0.95
    assert 0.9 * 400 <= int(blocks[-1]) + 1 <= 400


def test_records_that_are_not_alike_are_blocks_of_their_own() -> None:
    frames = Frames(2000, 1, seed=1)
    position = torch.arange(2000).double()
    alike = likeness(frames.states, position)
    assert alike.length == 0 and blocks_of(alike, frames.states, position).tolist() == list(range(2000))


def test_what_a_client_sends_of_one_class_in_a_row_is_one_block() -> None:
    generator = torch.Generator().manual_seed(0)
    n_runs = 1500
    size = torch.where(torch.rand(n_runs, generator=generator) < 0.05, 40, 1)
    run = torch.arange(n_runs).repeat_interleave(size)
    centres = 3 * torch.eye(10)
    of_run = torch.randint(10, (n_runs,), generator=generator)
    states = centres[of_run[run]] + 0.5 * torch.randn(len(run), 10, generator=generator)
    position = torch.arange(len(run)).double()
    blocks = blocks_of(likeness(states, position), states, position)
    in_run = run[1:] == run[:-1]
    begins = blocks[1:] > blocks[:-1]
    assert int((begins & in_run).sum()) <= 0.05 * int(in_run.sum())
    assert int(blocks[-1]) + 1 >= 0.2 * n_runs  # single records are not merged with all others
