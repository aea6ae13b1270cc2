"""Records that train are older than those that choose exits, and these are older than those that certify. Repeats and
twins do not count as evidence twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from early_exit.handler.errors import RecordError
from early_exit.handler.exits.likeness import LEAST
from early_exit.handler.exits.risk import Risk
from early_exit.training.data.split import GAP, REPEATED, Part, Split, in_time_order, split_in_time
from early_exit.training.selection.certify import risk_p_value
from early_exit.training.selection.evidence import Evidence


def split(states: Tensor, content: Tensor | None = None, *, n_old: int = 0) -> Split:
    """Split consecutive records, each of which belongs to a request of its own; `n_old` came before a certificate."""
    n = len(states)
    every = torch.ones(n, dtype=torch.bool)
    return split_in_time(states, torch.arange(n), torch.arange(n) if content is None else content, torch.arange(n),
                         torch.arange(n).double(), every, torch.arange(n) >= n_old, every)


def test_records_that_are_not_alike_are_each_of_its_own_and_none_is_lost() -> None:
    found = split(torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)))
    assert found.likeness is None and bool(found.is_new[found.part != Part.TRAIN.number].all())
    assert [int((found.part == part.number).sum()) for part in Part] == [1000, 400, 600]
    assert found.part.tolist() == sorted(found.part.tolist()), "the past trains, what came last certifies"


def scenes(n_scenes: int, n_frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    of_scene = torch.randn(n_scenes, 6, generator=generator).repeat_interleave(n_frames, dim=0)
    return of_scene + 0.1 * torch.randn(of_scene.shape, generator=generator)


@pytest.mark.parametrize("n_frames", [2, 5, 20])
def test_frames_of_a_scene_are_one_block_and_a_scene_at_the_border_is_in_no_part(n_frames: int) -> None:
    found = split(scenes(600, n_frames))
    scene = torch.arange(600).repeat_interleave(n_frames)
    assert found.likeness is not None and found.likeness.length == pytest.approx(n_frames, rel=0.2)
    certified = found.part == Part.CERTIFY.number
    of_block = {int(block): set(scene[found.block == block].tolist()) for block in found.block[certified].unique()}
    assert sum(len(of_one) for of_one in of_block.values()) / len(of_block) < 1.3, "most blocks are one scene"
    others = {int(one) for part in (Part.TRAIN, Part.TUNE) for one in scene[found.part == part.number]}
    assert not others & set(scene[certified].tolist())
    assert bool((found.part == GAP).any())


def cameras(n_cameras: int, n_scenes: int, n_frames: int) -> Tensor:
    """Return the frames of cameras that come in turns. No record is like those beside it."""
    return scenes(n_scenes, n_frames).view(n_cameras, -1, 6).transpose(0, 1).reshape(-1, 6)


@pytest.mark.parametrize("n_old", [20_000, 60_000])
@pytest.mark.parametrize(("n_cameras", "n_scenes", "n_frames"), [(1, 50, 20), (2, 100, 10), (8, 48, 20)])
def test_many_older_records_of_other_traffic_do_not_hide_that_fresh_ones_are_alike(
        n_old: int, n_cameras: int, n_scenes: int, n_frames: int) -> None:
    fresh = cameras(n_cameras, n_scenes, n_frames)
    older = torch.randn(n_old, 6, generator=torch.Generator().manual_seed(1))
    alone, renewed = split(fresh), split(torch.cat([older, fresh]), n_old=n_old)
    assert renewed.likeness is not None
    assert renewed.evidence().n_blocks <= 1.2 * alone.evidence().n_blocks < len(fresh) / 10
    with pytest.raises(RecordError, match="collect about"):
        renewed.evidence().require_enough(Risk.DISAGREEMENT, 0.02, 0.05, 0.3)


def test_few_fresh_records_are_as_alike_as_the_older_ones_of_the_same_traffic() -> None:
    states = scenes(1000, 20)
    found = split(states, n_old=len(states) - 120)
    assert found.likeness is not None and found.evidence().n_blocks < 10


def test_frames_of_cameras_in_turns_are_periods_of_which_every_second_one_certifies() -> None:
    """Blocks that begin where the content changes would be single records."""
    n_cameras, n_frames, n_scenes = 8, 20, 600
    states = cameras(n_cameras, n_scenes, n_frames)
    found = split(states)
    assert found.likeness is not None and found.likeness.is_periodic
    assert found.likeness.length * LEAST >= n_cameras * n_frames * 0.8
    blocks = found.block[found.rows(Part.CERTIFY)].unique()
    assert len(blocks) > 2 and bool((blocks.diff() == 2).all())
    with pytest.raises(RecordError, match="records of .* new scenes"):
        found.evidence().require_enough(Risk.DISAGREEMENT, 0.02, 0.05, 0.3)


def test_a_trend_is_told_and_scenes_are_none() -> None:
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(4000, 6, generator=generator)
    drifting = still.clone()
    drifting[:, 2] += torch.linspace(0, 1, 4000)
    assert split(drifting).is_trend and not split(still).is_trend and not split(scenes(600, 20)).is_trend


def test_a_row_of_each_request_chooses_though_all_its_rows_have_one_content() -> None:
    states, request = torch.randn(3000, 6), torch.arange(1000).repeat_interleave(3)
    every = torch.ones(3000, dtype=torch.bool)
    found = split_in_time(states, request, request, torch.arange(3000), torch.arange(3000).double(), every, every,
                          every)
    assert len(request[found.rows(Part.TUNE)].unique()) == 200
    assert int((found.part == Part.TUNE.number).sum()) == 600, "one row is drawn later, whichever it is"


def test_likeness_and_the_largest_block_are_fixed_before_the_records_that_certify() -> None:
    early = scenes(420, 5)
    found = split(torch.cat([early, scenes(180, 5, seed=1)]))
    late = split(torch.cat([early, scenes(45, 20, seed=1)]))
    assert found.likeness is not None and late.likeness is not None
    assert found.likeness.length == late.likeness.length and found.likeness.distance == late.likeness.distance
    assert found.evidence().largest == late.evidence().largest


def test_positions_count_requests_and_not_records() -> None:
    """With a tenth of the requests recorded, scenes of 50 requests have 5 records and last as long as before."""
    states = scenes(600, 5)
    n = len(states)
    every, each = torch.ones(n, dtype=torch.bool), torch.arange(n)
    found = split_in_time(states, each, each, each, 10.0 * each.double(), every, every, every)
    assert found.likeness is not None and found.likeness.length == pytest.approx(50, rel=0.2)


def test_repeats_of_a_new_content_are_one_piece_of_evidence_wherever_they_come() -> None:
    content = torch.arange(1000) % 200
    evidence = Evidence(torch.arange(1000), content, torch.arange(1000) < 200)
    losses = (content == 0).float()
    assert evidence.sizes() == (5.0, 1.0) and evidence.in_blocks
    alone = Evidence(torch.arange(1000), torch.arange(1000), torch.ones(1000, dtype=torch.bool))
    of_repeats, of_single = (one.p_value(Risk.DISAGREEMENT, losses, 0.02, 0.05) for one in (evidence, alone))
    assert of_repeats > of_single


def test_a_content_belongs_to_the_part_in_which_it_was_first_recorded() -> None:
    states = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    content = torch.arange(1000)
    content[600], content[610], content[900], content[950] = 5, 601, 7, 949
    found = split(states, content)
    assert found.part[600] == REPEATED and found.part[610] == REPEATED, "what was seen before chooses nothing"
    assert not bool(found.is_new[900]) and found.part[900] == Part.CERTIFY.number, "it counts as a request"
    assert bool(found.is_new[949]) and not bool(found.is_new[950])


def test_repeats_within_a_block_count_for_the_largest_block_though_they_choose_nothing() -> None:
    """A burst of one content counts at its full size. Without its repeats, later bursts would count as single records.
    """
    n_bursts = 400
    content = torch.arange(n_bursts).repeat_interleave(10)
    looks = torch.randn(n_bursts, 6, generator=torch.Generator().manual_seed(0))
    found = split(looks[content], content)
    assert found.evidence().largest == (10.0, 1.0)
    assert len(found.rows(Part.TUNE)) == len(content[found.rows(Part.TUNE)].unique())


def test_records_of_which_the_content_is_not_known_train_only_if_they_came_before_what_chooses() -> None:
    states = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    each = torch.arange(1000)
    known = each % 4 != 3
    found = split_in_time(states, each, each, each, each.double(), known, *[torch.ones(1000, dtype=torch.bool)] * 2)
    first = int(found.rows(Part.TUNE)[0])
    assert bool((found.part[~known & (each < first)] == Part.TRAIN.number).all())
    assert bool((found.part[~known & (each > first)] == GAP).all())


def test_a_split_is_read_as_it_was_written() -> None:
    for found in (split(scenes(600, 5)), split(torch.randn(600, 6, generator=torch.Generator().manual_seed(0)))):
        again = Split.from_tensors(found.to_tensors())
        assert str(again) == str(found) and again.evidence().largest == found.evidence().largest


def test_all_records_of_a_request_are_in_one_part() -> None:
    states, request = torch.randn(999, 6), torch.arange(333).repeat_interleave(3)
    every = torch.ones(999, dtype=torch.bool)
    found = split_in_time(states, request, torch.arange(999), torch.arange(999), request.double(), every, every,
                          every)
    for number in range(333):
        assert len(set(found.part[request == number].tolist())) == 1


def test_the_order_is_that_of_time_and_positions_count_requests_between_records() -> None:
    time = torch.tensor([3.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    order, position = in_time_order(time, torch.tensor([0, 0, 1, 0]), torch.tensor([40, 20, 7, 60]))
    assert order.tolist() == [1, 2, 0, 3]
    assert position.tolist() == [21.0, 0.0, 1.0, 41.0]


RECORDS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.booleans()), min_size=1, max_size=30)
"""The block, the content and the loss of each record."""


def evidence_of(records: list[tuple[int, int, bool]]) -> tuple[Evidence, Tensor]:
    block, content, lost = (torch.tensor(column) for column in zip(*records))
    first = {}
    for of_block, of_content, _ in records:
        first.setdefault(of_content, of_block)
    is_new = torch.tensor([first[of_content] == of_block for of_block, of_content, _ in records])
    return Evidence(block, content, is_new), lost.float()


@given(RECORDS, st.data())
def test_copies_within_a_block_and_the_order_of_equal_contents_change_nothing_of_what_is_new(
        records: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    evidence, losses = evidence_of(records)
    copied = data.draw(st.lists(st.integers(0, len(records) - 1), max_size=10))
    order = data.draw(st.permutations(range(len(records) + len(copied))))
    rows = torch.tensor([*range(len(records)), *copied])[torch.tensor(order)]
    again = evidence.where(rows)
    for found, expected in zip(again._of_new(losses[rows]), evidence._of_new(losses)):
        assert torch.equal(found, expected)
    assert (again.n_contents, again.n_tested) == (evidence.n_contents, evidence.n_tested)


def test_where_blocks_are_single_records_it_is_the_exact_binomial_test() -> None:
    losses = (torch.rand(900, generator=torch.Generator().manual_seed(0)) < 0.01).float()
    evidence = Evidence(torch.arange(900), torch.arange(900), torch.ones(900, dtype=torch.bool))
    found = evidence.p_value(Risk.DISAGREEMENT, losses, 0.02, 0.05)
    assert found == pytest.approx(binom.cdf(int(losses.sum()), 900, 0.02))
    assert found == risk_p_value(Risk.DISAGREEMENT, losses, 0.02, 0.05)


def test_a_popular_file_that_is_answered_wrongly_counts_as_often_as_it_comes() -> None:
    content = torch.where(torch.arange(1000) % 20 == 0, 0, torch.arange(1000))
    first = torch.cat([torch.tensor([True]), content[1:] != 0])
    evidence, losses = Evidence(torch.arange(1000), content, first), (content == 0).float()
    assert evidence.p_value(Risk.DISAGREEMENT, losses, 0.02, 0.05) > 0.5
    assert evidence.p_value(Risk.DISAGREEMENT, 1 - losses, 0.02, 0.05) > 0.99


def test_few_files_that_are_always_right_prove_nothing_of_new_ones() -> None:
    content = torch.arange(1000) % 50
    evidence = Evidence(torch.arange(1000), content, torch.arange(1000) < 50)
    assert evidence.p_value(Risk.DISAGREEMENT, torch.zeros(1000), 0.02, 0.05) >= 0.98**50


def test_p_values_of_blocks_are_seldom_small_where_the_share_is_above_the_tolerance() -> None:
    generator = torch.Generator().manual_seed(0)
    n_wrong = 0
    for _ in range(400):
        sizes = torch.randint(1, 12, (400,), generator=generator)
        wrong = torch.rand(400, generator=generator) < 0.02
        block = torch.arange(400).repeat_interleave(sizes)
        evidence = Evidence(block, torch.arange(len(block)), torch.ones(len(block), dtype=torch.bool),
                            largest=(10.0, 10.0))
        n_wrong += evidence.p_value(Risk.DISAGREEMENT, wrong[block].float(), 0.02, 0.05) <= 0.05
    assert n_wrong <= 400 * 0.05 + 2.4 * (400 * 0.05 * 0.95) ** 0.5
