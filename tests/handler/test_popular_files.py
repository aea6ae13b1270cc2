"""Where requests form blocks, a popular file that is answered wrongly is noticed as it is where they do not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from early_exit.handler.monitor.blocks import Blocks, Sample
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


@pytest.mark.parametrize("n_before", [0, 30])
def test_files_that_are_answered_wrongly_are_an_alarm_where_nothing_new_comes(n_before: int) -> None:
    """Only twenty files are asked for, and two of them are answered wrongly."""
    draw, known = random.Random(0), files([1.0, 1.0, *[0.0] * 18])
    before = [*frames(n_before, 0), *known]
    stream = [*before, *(draw.choice(known) for _ in range(20_000))]
    found = alarms(stream, WATCHED)
    assert found is not None and found > len(before)


def test_files_that_are_answered_wrongly_less_often_than_is_tolerated_are_no_alarm() -> None:
    for seed in range(3):
        stream = mixed(0.5, seed, [1.0, *[0.0] * 39], n_scenes=100)
        assert 0.01 < sum(one.loss for one in stream) / len(stream) < TOLERANCE
        assert alarms(stream, WATCHED) is None, seed


def test_a_client_that_retries_what_is_answered_wrongly_is_no_alarm_by_itself() -> None:
    [file] = files([1.0])
    assert alarms([*frames(30, 0), *[file] * 20_000, *frames(30, 1)], WATCHED) is None


def test_scenes_with_files_between_their_frames_raise_few_alarms_at_the_tolerance() -> None:
    """One scene in fifty is answered wrongly in all its frames, and one in fifty of forty files."""
    raised = 0
    for seed in range(20):
        draw, popular = random.Random(seed), files([float(number < 1) for number in range(50)])
        stream = [one for frame in frames(100, seed, TOLERANCE)
                  for one in ([draw.choice(popular), frame] if draw.random() < 0.5 else [frame])]
        raised += alarms(stream, WATCHED) is not None
    assert raised <= 3, "P(Binomial(20, .05) > 3) is 1.6 %"


def test_no_sample_is_lost_whatever_waits_and_whatever_is_cut() -> None:
    draw, known = random.Random(3), files([0.0, 0.25, 0.5])
    stream = [one for frame in [*frames(10, 3), *frames(10, 4, 1.0)]
              for one in [frame, *draw.choices(known, k=draw.choice([0, 0, 1, 400]))]]
    stream = [replace(one, content=one.content if one.content < 0 else number) for number, one in enumerate(stream)]
    counted = [one for before, one in zip([None, *stream], stream) if before is None or before.content != one.content]
    blocks = after(stream, WATCHED).blocks
    waiting = blocks.undecided
    found = ended(stream, ALIKE)
    assert any(not block.n_new for block in found), "some are blocks without new contents"
    assert sum(block.n for block in found) + blocks.n + sum(one.n for one in waiting) == len(counted)
    assert (sum(block.lost for block in found) + blocks.lost + sum(one.lost for one in waiting)
            == sum(one.loss for one in counted))
    assert Blocks.from_json(json.loads(json.dumps(asdict(blocks)))) == blocks


def test_the_blocks_of_an_older_state_go_on() -> None:
    """It stored neither numbers of samples, nor what came while a sample waited."""
    blocks = after([*frames(3, 0)][:150], WATCHED).blocks
    data = json.loads(json.dumps(asdict(blocks)))
    older = {name: value for name, value in data.items() if name not in ("n", "lost", "requests_since_new")}
    older["undecided"] = [one["sample"] for one in data["undecided"]]
    assert replace(Blocks.from_json(older), requests_since_new=blocks.requests_since_new) == blocks
