"""The demo and the benchmarks record different pictures for each part, and none that they measure with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch

from early_exit.handler.backbone.backbone import Backbone
from early_exit.training.data.dataset import load_traffic
from early_exit.training.data.shards import find_shards
from early_exit.training.data.split import Part
from tests.support import digits
from tests.support.recording import record
from tests.support.sources import deal, ids_in, recorded_parts


def test_a_picture_is_dealt_out_once_and_the_parts_have_their_shares() -> None:
    dealt = deal(range(1000))
    assert sorted(chain.from_iterable(dealt.values())) == list(range(1000))
    n_recorded = 1000 - len(dealt[None])
    for part in Part:
        assert len(dealt[part]) / n_recorded == pytest.approx(part.share, abs=0.02)


def test_requests_fall_into_the_parts_that_their_ids_were_made_for(backbone: Backbone, tmp_path: Path) -> None:
    parts = recorded_parts(400)
    inputs = torch.randn(400, 16)
    record(backbone, inputs, tmp_path, ids=ids_in(parts))
    traffic = load_traffic(find_shards(tmp_path, "model", backbone.description))
    assert [list(Part)[number] for number in traffic.part.tolist()] == parts


def test_what_is_measured_shows_other_digits_than_each_part_of_what_is_recorded(
        monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[set[int]] = []
    pictures = digits._digits

    def seen(which: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        shown.append(set(which))
        return pictures(which)

    monkeypatch.setattr(digits, "_digits", seen)
    requests, parts = digits.recorded_traffic(100, seed=1)
    assert len(requests) == len(parts) == 100
    digits.measured_traffic(20, seed=1)
    assert len(shown) == 4 and sum(map(len, shown)) == len(set().union(*shown))
    assert min(set().union(*shown)) >= digits.N_FOR_BACKBONE


def test_of_what_the_demo_records_the_parts_that_prove_something_show_each_of_their_digits_once(
        monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[int, int] = {}

    def varied(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for image in images:
            key = hash(image.numpy().tobytes())
            shown[key] = shown.get(key, 0) + 1
        return torch.zeros(len(images), 1, 32, 32)

    monkeypatch.setattr(digits, "_augment", varied)
    n_records = len(digits.recorded_once(1, 600))
    once = [count for count in shown.values() if count == 1]
    assert len(once) >= n_records * (Part.TUNE.share + Part.CERTIFY.share)
    before = dict(shown)
    digits.measured_traffic(50, 2, 600)
    assert all(shown[key] == count for key, count in before.items()), "none of them is measured with"
