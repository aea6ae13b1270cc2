"""However many copies of a content come in a row, the monitor goes on watching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.monitor.blocks import Sample
from tests.handler.test_monitored_blocks import ALONE, after, alarms, alike_of, ended, samples, scenes


@settings(max_examples=60)
@given(data=st.data(), n_copies=st.sampled_from([2, 97, 98, 99, 100, 101, 150, 400]))
def test_copies_in_a_row_however_many_are_as_one(data: st.DataObject, n_copies: int) -> None:
    """A service that gets nothing but health checks at night is watched again in the morning."""
    alike = alike_of(3)
    scene_samples = samples(scenes(12, 3, seed=data.draw(st.integers(0, 99))),
                            data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=36, max_size=36)), alike)
    at = data.draw(st.integers(0, len(scene_samples)))
    copied = data.draw(st.sampled_from([scene_samples[max(at - 1, 0)], samples(scenes(1, 1, 77), [0.0], alike)[0]]))
    losses = [1.0, *[0.0] * (n_copies - 1)]
    copies = [replace(copied, loss=loss, content=-1) for loss in losses]
    once = of_contents([*scene_samples[:at], copies[0], *scene_samples[at:]], alike)
    assert of_contents([*scene_samples[:at], *copies, *scene_samples[at:]], alike) == once
    assert of_contents([*scene_samples[:at], *copies[::-1], *scene_samples[at:]], alike) == once


def of_contents(given_samples: Sequence[Sample], alike: Likeness) -> Sequence[tuple[int, float]]:
    """Return what the blocks tell of new contents. Requests are counted in more blocks if many copies come in a row."""
    return [(block.n_new, block.lost_new) for block in ended(given_samples, alike) if block.n_new]


@pytest.mark.parametrize("n_first", [0, 1, 2])
@pytest.mark.parametrize("n_probes", [90, 150, 5000])
def test_after_a_long_run_of_health_checks_a_drift_is_an_alarm(n_first: int, n_probes: int) -> None:
    alike = alike_of(5)
    [probe] = samples(scenes(1, 1, 77), [0.0], alike)
    others = samples(scenes(60, 5, 3), [1.0] * 300, alike)
    stream = [*others[:n_first], *[replace(probe, content=-1)] * n_probes, *others[n_first:]]
    found = alarms(stream, replace(ALONE, likeness=alike))
    assert found is not None and found < n_probes + 200


def test_what_waits_to_be_decided_is_bounded_whatever_comes_again() -> None:
    """All files are known, and each of two new ones comes once: neither can be decided until a third one comes."""
    alike = alike_of(5)
    files = samples(scenes(400, 1, 5), [0.0] * 400, alike)
    evidence = after([*files, *files[:300], *files[:300]], replace(ALONE, likeness=alike))
    waiting = after([*samples(scenes(2, 1, 6), [0.0] * 2, alike), *files[:300] * 3],
                    replace(ALONE, likeness=alike), evidence).blocks.undecided
    assert len(waiting) == 2
