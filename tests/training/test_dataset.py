"""Records of which it is not known which request they belong to, beside those of which it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import ANONYMOUS, Records, ShardHeader, request_hash, write_shard
from early_exit.training.data.dataset import Part, RecordedTraffic, load_traffic
from early_exit.training.data.labels import load_labels

HEADER = ShardHeader("model", "1.0", "ab12", 4, ("layer",))


def traffic(folder: Path, requests: list[int], times: list[float]) -> RecordedTraffic:
    """Write one shard, in which every record has another activation, and read it."""
    n = len(requests)
    zeros = torch.zeros(n, dtype=torch.int32)
    write_shard(folder / "a.safetensors", HEADER, Records(
        activations={"layer": torch.arange(n)[:, None].half()}, log_probabilities=torch.zeros(n, 3).half(),
        backbone_class=zeros, full_class=zeros.clone(), answered_class=zeros.clone(), exit=zeros.short(),
        request=torch.tensor(requests), time=torch.tensor(times, dtype=torch.float64), sampling_rate=torch.ones(n),
        bodies=[b"" if request == ANONYMOUS else str(request).encode() for request in requests]))
    return load_traffic([folder / "a.safetensors"])


def activations(of: RecordedTraffic) -> list[float]:
    return [value for _, values in of.activation("layer") for value in values.flatten().tolist()]


def test_a_request_that_ran_twice_counts_once_and_unknown_ones_count_each(tmp_path: Path) -> None:
    a, b = request_hash("a"), request_hash("b")
    read = traffic(tmp_path, [ANONYMOUS, a, ANONYMOUS, b, a, ANONYMOUS], [1.0] * 6)
    assert read.request.tolist() == [ANONYMOUS, a, ANONYMOUS, b, ANONYMOUS]
    assert activations(read) == [0, 1, 2, 3, 5]


def test_unknown_requests_are_split_by_time_so_that_what_was_served_together_stays_together(tmp_path: Path) -> None:
    """Rows of one request must not be in the part for training and in that for the certificate."""
    times = [1.7e9 + 0.01 * (number // 4) for number in range(16_000)]
    read = traffic(tmp_path, [ANONYMOUS] * 16_000, times)
    together = read.part.reshape(-1, 4)
    assert bool((together == together[:, :1]).all())
    for part in Part:
        assert read.size(part) / len(read) == pytest.approx(part.share, abs=0.02)


def test_nothing_that_belongs_to_a_request_is_taken_for_an_unknown_one(tmp_path: Path) -> None:
    a = request_hash("a")
    read = traffic(tmp_path, [ANONYMOUS, a, ANONYMOUS], [1.0, 2.0, 3.0])
    (tmp_path / "labels.csv").write_text("a,2\nb,1\n")
    assert load_labels(tmp_path / "labels.csv", read.request, 3).tolist() == [-1, 2, -1]
    known = read.of_known_requests()
    assert [bodies for _, bodies in known.bodies()] == [[str(a).encode()]]
    assert activations(known) == [1] and known.time.tolist() == [2.0]


def test_a_replay_of_unknown_requests_alone_says_where_the_reason_is(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="the log of its workers says why"):
        traffic(tmp_path, [ANONYMOUS] * 2, [1.0, 2.0]).of_known_requests()
