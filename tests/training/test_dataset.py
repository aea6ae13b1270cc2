"""Records whose request is unknown, next to records whose request is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from early_exit.handler.errors import RecordError
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.format import ANONYMOUS, Records, ShardHeader, request_hash, write_shard
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.training.data.dataset import MAY_REPEAT, RecordedTraffic, load_traffic
from early_exit.training.data.labels import load_labels
from early_exit.training.data.split import Part, SplitRule

HEADER = ShardHeader("model", "1.0", "ab12", 4, ("layer",))


def traffic(folder: Path, requests: list[int], times: list[float], rows: list[int] | None = None) -> RecordedTraffic:
    """Write one shard, in which every record has a different activation, and read it."""
    n = len(requests)
    zeros = torch.zeros(n, dtype=torch.int32)
    write_shard(folder / "a.safetensors", HEADER, Records(
        activations={"layer": torch.arange(n)[:, None].half()}, log_probabilities=torch.zeros(n, 3).half(),
        backbone_class=zeros, full_class=zeros.clone(), answered_class=zeros.clone(), exit=zeros.short(),
        request=torch.tensor(requests), row=zeros.clone() if rows is None else torch.tensor(rows).int(),
        content=torch.tensor([UNKNOWN_CONTENT if request == ANONYMOUS else request // 7 + row
                              for request, row in zip(requests, rows or [0] * n)]),
        sequence=torch.arange(n), time=torch.tensor(times, dtype=torch.float64),
        sampling_rate=torch.ones(n),
        kept=[b"" if request == ANONYMOUS else KeptRequest(str(request)).to_bytes() for request in requests]))
    return load_traffic([folder / "a.safetensors"])


def activations(of: RecordedTraffic) -> list[float]:
    return [value for _, values in of.activation("layer") for value in values.flatten().tolist()]


def test_a_request_that_ran_twice_counts_once_and_unknown_ones_count_each(tmp_path: Path) -> None:
    a, b = request_hash("a"), request_hash("b")
    read = traffic(tmp_path, [ANONYMOUS, a, ANONYMOUS, ANONYMOUS, a, b], [1.0] * 6)
    assert read.request.tolist() == [ANONYMOUS, a, ANONYMOUS, ANONYMOUS, b]
    assert activations(read) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("rule", list(SplitRule))
def test_a_copy_of_a_shard_adds_no_evidence(rule: SplitRule, tmp_path: Path) -> None:
    traffic(tmp_path, [request_hash(str(number)) for number in range(200)], [*map(float, range(200))])
    alone, copied = (load_traffic([tmp_path / "a.safetensors"] * n, rule=rule) for n in (1, 2))
    assert copied.request.tolist() == alone.request.tolist() and copied.part.tolist() == alone.part.tolist()
    assert copied.split.evidence().n_tested == alone.split.evidence().n_tested > 0


def test_unknown_requests_train_and_prove_nothing(tmp_path: Path) -> None:
    """Some of these records may be rows of one request, but a certificate needs independent records."""
    known = [request_hash(str(number)) for number in range(200)]
    read = traffic(tmp_path, [ANONYMOUS] * 100 + known, [1.0] * 300)
    assert read.part[read.request == ANONYMOUS].tolist() == [Part.TRAIN.number] * 100
    assert read.n_anonymous == 100 and all(0 < read.size(part) < 200 for part in (Part.TUNE, Part.CERTIFY))


def test_unknown_requests_beside_those_that_choose_and_certify_do_not_even_train(tmp_path: Path) -> None:
    """Unknown requests may repeat known ones, but a certificate is about requests that no head was trained on."""
    known = [request_hash(str(number)) for number in range(200)]
    read = traffic(tmp_path, known + [ANONYMOUS] * 100, [1.0] * 300)
    assert read.n_anonymous == 0 and read.skipped == {MAY_REPEAT: 100}
    assert len(read) == 200


def test_each_instance_of_a_request_trains_and_one_of_them_drawn_by_a_hash_is_evidence(tmp_path: Path) -> None:
    n_requests, n_rows = 3000, 3
    ids = [request_hash(str(number)) for number in range(n_requests)]
    repeated = [request for request in ids for _ in range(n_rows)]
    read = traffic(tmp_path, repeated + ids, [1.0] * (n_rows + 1) * n_requests,
                   [*range(n_rows)] * n_requests + [0] * n_requests)
    trains = read.part == Part.TRAIN.number
    in_training = set(read.request[trains].tolist())
    assert int(trains.sum()) == n_rows * len(in_training), "each of its instances once, though some were served twice"
    proves = read.request[~trains].tolist()
    assert len(proves) == len(set(proves)) == n_requests - len(in_training) and not in_training & set(proves)
    shares = read.row[~trains].bincount(minlength=n_rows) / len(proves)
    assert shares.tolist() == pytest.approx([1 / n_rows] * n_rows, abs=0.04), "each is as likely to be the one"


def test_a_label_names_the_instance_that_it_belongs_to(tmp_path: Path) -> None:
    a, b = request_hash("a"), request_hash("b")
    (tmp_path / "labels.csv").write_text("a,0,1\na,2,0\nb,1,2\n")
    request, row = torch.tensor([a, a, a, b, b]), torch.tensor([0, 1, 2, 0, 1])
    assert load_labels(tmp_path / "labels.csv", request, row, 3).tolist() == [1, -1, 0, -1, 2]


def test_nothing_that_belongs_to_a_request_is_taken_for_an_unknown_one(tmp_path: Path) -> None:
    a = request_hash("a")
    read = traffic(tmp_path, [ANONYMOUS, a, ANONYMOUS], [1.0, 3.0, 2.0])
    (tmp_path / "labels.csv").write_text("a,2\nb,1\n")
    assert load_labels(tmp_path / "labels.csv", read.request, read.row, 3).tolist() == [-1, 2, -1]
    known = read.of_known_requests()
    assert [requests for _, requests in known.kept()] == [[KeptRequest(str(a))]]
    assert activations(known) == [1] and known.time.tolist() == [3.0]


def test_a_replay_of_unknown_requests_alone_says_where_the_reason_is(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="the log of its workers says why"):
        traffic(tmp_path, [ANONYMOUS] * 2, [1.0, 2.0]).of_known_requests()
