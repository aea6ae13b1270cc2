"""Where requests form blocks, a popular file that is answered wrongly is noticed as it is where they do not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from early_exit.handler.betting import rejects
from early_exit.handler.monitor.blocks import Block, Blocks, Count, Sample
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import Evidence
from tests.handler.test_monitored_blocks import ALONE, TOLERANCE, after, alarms, alike_of, ended, samples, scenes

SIZE = 60
ALIKE = alike_of(SIZE)
WATCHED = replace(ALONE, likeness=ALIKE)


def frames(n_scenes: int, seed: int, wrong: float = 0.0) -> Iterator[Sample]:
    """Return the frames of scenes. Of some scenes, all frames are answered wrongly."""
    draw = random.Random(seed)
    losses = [float(draw.random() < wrong) for _ in range(n_scenes)]
    return iter(samples(scenes(n_scenes, SIZE, seed), [loss for loss in losses for _ in range(SIZE)], ALIKE))


def files(losses: list[float]) -> list[Sample]:
    """Return one sample for each file; the files are known by their contents, -1, -2 and so on."""
    made = samples(scenes(len(losses), 1, 99), losses, ALIKE)
    return [replace(sample, content=-1 - number) for number, sample in enumerate(made)]


def mixed(share: float, seed: int, losses: list[float], n_scenes: int = 150) -> list[Sample]:
    """Return frames of scenes with files between them: the given share of the samples is of files."""
    draw, popular = random.Random(seed), files(losses)
    return [one for frame in frames(n_scenes, seed)
            for one in ([draw.choice(popular), frame] if draw.random() < share / (1 - share) else [frame])]


@pytest.mark.parametrize("seed", range(3))
def test_a_popular_file_that_is_answered_wrongly_between_the_frames_of_scenes_is_an_alarm(seed: int) -> None:
    """Three in twenty requests are of a file that is answered wrongly."""
    assert alarms(mixed(0.15, seed, [1.0]), WATCHED) is not None


@pytest.mark.parametrize("wrong", [(0, 1), (18, 19), (19, 9)], ids=["those that came first", "last", "last and before"])
@pytest.mark.parametrize("n_before", [0, 30])
def test_files_that_are_answered_wrongly_are_an_alarm_where_nothing_new_comes(
        n_before: int, wrong: tuple[int, ...]) -> None:
    """Only twenty files are asked for, and two of them are answered wrongly, whichever came last as new ones."""
    draw, known = random.Random(0), files([float(number in wrong) for number in range(20)])
    before = [*frames(n_before, 0), *known]
    stream = [*before, *(draw.choice(known) for _ in range(20_000))]
    found = alarms(stream, WATCHED)
    assert found is not None and len(before) < found < len(before) + 15_000


def test_where_few_requests_are_new_a_popular_file_is_noticed_as_soon_as_without_blocks() -> None:
    draw, known = random.Random(0), files([1.0, *[0.0] * 16])
    stream = [next(new) if draw.random() < 0.02 else draw.choice(known)
              for new in [frames(12, 0)] for _ in range(30_000)]
    alone, in_blocks = alarms(stream, ALONE), alarms(stream, WATCHED)
    assert alone is not None and in_blocks is not None and in_blocks < 1.3 * alone


@pytest.mark.parametrize("watched", [ALONE, WATCHED], ids=["alone", "in blocks"])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.97])
def test_a_popular_file_that_is_answered_rightly_makes_no_alarm_of_the_others(watched: Monitored, share: float) -> None:
    """Of all requests 1.5 % are answered wrongly. The popular file often follows itself, and counts each time."""
    draw, known = random.Random(0), files([0.0, 1.0, *[0.0] * 18])
    wrong = 0.015 / (1 - share)
    stream = [known[0] if draw.random() < share else known[1] if draw.random() < wrong else draw.choice(known[2:])
              for _ in range(60_000)]
    assert alarms(stream, watched) is None


def test_files_that_are_answered_wrongly_less_often_than_is_tolerated_are_no_alarm() -> None:
    for seed in range(3):
        stream = mixed(0.5, seed, [1.0, *[0.0] * 39], n_scenes=100)
        assert 0.01 < sum(one.loss for one in stream) / len(stream) < TOLERANCE
        assert alarms(stream, WATCHED) is None, seed


def test_a_client_that_retries_what_is_answered_wrongly_is_no_alarm_by_itself() -> None:
    [file] = files([1.0])
    assert alarms([*frames(30, 0), *[file] * 20_000, *frames(30, 1)], WATCHED) is None


def in_runs(n_runs: int, losses: list[float], longest: int, seed: int) -> list[Sample]:
    """Return known files, each asked for up to so many times in a row."""
    draw, known = random.Random(seed), files(losses)
    return [*known, *(one for _ in range(n_runs) for one in [draw.choice(known)] * draw.randint(1, longest))]


@pytest.mark.parametrize("longest", [1, 3, 9])
def test_known_files_that_are_each_asked_for_several_times_in_a_row_are_watched_as_well(longest: int) -> None:
    """Two of twenty-five files are answered wrongly, which is four times what is tolerated."""
    found = alarms(in_runs(20_000, [1.0, 1.0, *[0.0] * 23], longest, seed=0), ALONE)
    assert found is not None and found < 20_000 * longest


def test_requests_in_runs_raise_few_alarms_at_the_tolerance() -> None:
    raised = [alarms(in_runs(3000, [1.0, *[0.0] * 49], 12, seed), ALONE) for seed in range(20)]
    assert sum(found is not None for found in raised) <= 3, "P(Binomial(20, .05) > 3) is 1.6 %"


def test_long_bursts_of_a_file_that_is_answered_rightly_make_no_alarm_of_the_others() -> None:
    """Each file is asked for three times in a row, and 4 % of these runs are wrong. Now and then, a right one is asked
    for 10,000 times, so that 2 % of all samples are wrong."""
    for seed in range(10):
        draw, evidence = random.Random(seed), Evidence()
        for _ in range(100):
            is_wrong = [draw.random() < 0.04 for _ in range(1000)]
            sizes = [3 if wrong or draw.random() > 0.00031 else 10_000 for wrong in is_wrong]
            lost = sum(size for size, wrong in zip(sizes, is_wrong) if wrong)
            block = Block(Count(sum(sizes), len(sizes), float(sum(is_wrong)), float(lost)))
            evidence = evidence._bet_on_requests(block, ALONE)
            assert not rejects(evidence.wealth(), ALONE.delta)


def test_scenes_with_files_between_their_frames_raise_few_alarms_at_the_tolerance() -> None:
    """One scene in fifty is answered wrongly in all its frames, and one in fifty of forty files."""
    raised = 0
    for seed in range(20):
        draw, popular = random.Random(seed), files([float(number < 1) for number in range(50)])
        stream = [one for frame in frames(100, seed, TOLERANCE)
                  for one in ([draw.choice(popular), frame] if draw.random() < 0.5 else [frame])]
        raised += alarms(stream, WATCHED) is not None
    assert raised <= 3, "P(Binomial(20, .05) > 3) is 1.6 %"


def between(draw: random.Random) -> list[Sample]:
    """Return frames of right and of wrong scenes, each with a content of its own, and known files between them."""
    known = files([0.0, 0.25, 0.5])
    stream = [one for frame in [*frames(10, 3), *frames(10, 4, 1.0)]
              for one in [frame, *draw.choices(known, k=draw.choice([0, 0, 1, 150]))]]
    return [replace(one, content=number) if one.content is None or one.content >= 0 else one
            for number, one in enumerate(stream)]


def test_no_sample_is_lost_and_what_waits_is_only_of_the_last_scenes() -> None:
    stream = between(random.Random(3))
    blocks, found = after(stream, WATCHED).blocks, ended(stream, ALIKE)
    waiting = sum((one.count for one in blocks.undecided), blocks.count)
    counted = sum((block.count for block in found), waiting)
    runs = [one for before, one in zip([None, *stream], stream) if before is None or before.content != one.content]
    assert counted == Count(len(stream), len(runs), sum(one.loss for one in runs), sum(one.loss for one in stream))
    assert waiting.n <= 3 * SIZE
    assert Blocks.from_json(json.loads(json.dumps(asdict(blocks)))) == blocks


def test_each_scene_is_in_one_block_however_many_copies_come_between_its_frames() -> None:
    """If a scene that is answered wrongly were divided among rounds, they would raise an alarm by itself."""
    found = ended(between(random.Random(3)), ALIKE)
    scenes_in_blocks = [block for block in found if block.n_new > 1]
    assert len(scenes_in_blocks) >= 15 and all(block.n_new >= SIZE / 2 for block in scenes_in_blocks)
    assert all(block.count.lost <= 1 for block in found if not block.n_new), "a copy is a block of its own"


def test_where_periods_are_skipped_so_are_the_copies_in_them_but_not_where_nothing_new_comes() -> None:
    periodic, known = replace(ALIKE, distance=0.0, length=200.0, longest=float("inf")), files([0.0, 0.25])
    stream = [one for frame in frames(40, 5) for one in (frame, known[0])]
    found = ended([*known, *stream], periodic)
    n_copies = sum(block.count.n for block in found if not block.n_new)
    n_new = sum(block.n_new for block in found)
    assert 0.8 < n_copies / n_new < 1.2 and n_new < 0.6 * len(stream) / 2
    last = ended([*known, *stream, *known * 500], periodic)[-700:]
    assert sum(block.count.n for block in last) >= 700


def test_the_blocks_of_an_older_state_go_on() -> None:
    """It stored neither numbers of samples, nor what came while a sample waited."""
    blocks = after([*frames(3, 0)][:150], WATCHED).blocks
    data = json.loads(json.dumps(asdict(blocks)))
    older = {name: value for name, value in data.items() if name not in ("count", "requests_since_new")}
    older["undecided"] = [one["sample"] for one in data["undecided"]]
    assert replace(Blocks.from_json(older), requests_since_new=blocks.requests_since_new) == blocks
