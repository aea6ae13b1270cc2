"""Workers that record different shares of their requests give one sample, in which each request counts the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from early_exit.handler.exits.risk import Risk
from early_exit.handler.recording.format import Records, ShardHeader, request_hash, write_shard
from early_exit.training.data.dataset import DRAWN_MORE_OFTEN, NEWER_THAN_OTHERS, load_traffic
from early_exit.training.data.sampling import chance_at_one_rate, drawn, dropped_share
from early_exit.training.data.split import Part, SplitRule


def at_one_rate(time: Tensor, worker: Tensor, rate: Tensor, request: Tensor) -> Tensor:
    return drawn(request, chance_at_one_rate(time, worker, rate))


def shard_of(folder: Path, worker: str, requests: Sequence[tuple[float, float]], wrong: float, seed: int, *,
             host: str = "", n_rows: int = 1) -> Path:
    """Record the requests of a worker, each with a time and a rate, and with some rows. The given share of the rows is
    answered wrongly."""
    draw = random.Random(seed)
    sampled = [(number, time, rate) for number, (time, rate) in enumerate(requests) if draw.random() < rate
             for _ in range(n_rows)]
    n = len(sampled)
    zeros = torch.zeros(n, dtype=torch.int32)
    path = folder / f"{worker}.safetensors"
    write_shard(path, ShardHeader("model", "1.0", "ab12", 4, ("layer",), worker=worker, host=host), Records(
        activations={"layer": torch.zeros(n, 1).half()},
        log_probabilities=torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(1).half(),
        backbone_class=torch.tensor([int(draw.random() < wrong) for _ in sampled]).int(), full_class=zeros,
        answered_class=zeros.clone(), exit=zeros.short(), row=torch.arange(n, dtype=torch.int32) % n_rows,
        request=torch.tensor([request_hash(f"{worker} {number}") for number, _, _ in sampled]),
        content=torch.tensor([request_hash(f"content {worker} {number}") for number, _, _ in sampled]),
        sequence=torch.tensor([number for number, _, _ in sampled]),
        time=torch.tensor([time for _, time, _ in sampled], dtype=torch.float64),
        sampling_rate=torch.tensor([rate for _, _, rate in sampled])))
    return path


@pytest.mark.parametrize(("rate", "n_per_life"), [(0.05, 20), (0.02, 20), (0.02, 5), (0.02, 1)])
def test_a_worker_that_samples_and_is_restarted_often_is_not_outweighed(rate: float, n_per_life: int) -> None:
    """Each life of the worker has few records, and some time passes before the first and after the last of them."""
    n, generator = 40_000, torch.Generator().manual_seed(0)
    samples = torch.arange(n) % 2 == 0
    records = ~samples | (torch.rand(n, generator=generator) < rate)
    life = (samples & records).long().cumsum(dim=0) // n_per_life
    worker = torch.where(samples, 1 + life, 0)[records]
    found = at_one_rate(torch.arange(n)[records].double(), worker, torch.where(samples, rate, 1.0)[records],
                        torch.randint(-2**63, 2**63 - 1, (n,), generator=generator)[records])
    assert float(samples[records][found].double().mean()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("rule", SplitRule)
def test_a_worker_that_records_everything_does_not_outweigh_one_that_samples(tmp_path: Path, rule: SplitRule) -> None:
    """Of one worker's requests, 6 % are answered wrongly, so 3 % of all are. Of all records, it is only 0.3 %."""
    n = 20_000
    shards = [shard_of(tmp_path, "sampling", [(float(time), 0.05) for time in range(n)], 0.06, 1),
              shard_of(tmp_path, "full", [(float(time), 1.0) for time in range(n)], 0.0, 2)]
    traffic = load_traffic(shards, rule=rule)
    wrong = traffic.backbone_class != traffic.full_class
    assert float(wrong.double().mean()) < 0.01
    rows = traffic.split.rows(Part.CERTIFY)
    assert float(wrong[rows].double().mean()) == pytest.approx(0.03, abs=0.02)
    evidence = traffic.split.evidence()
    assert evidence.p_value(Risk.DISAGREEMENT, wrong[rows].double(), 0.02, 0.05) > 0.05
    assert traffic.size(Part.TRAIN) > 9000, "all early records train"
    assert (DRAWN_MORE_OFTEN in traffic.skipped) == (rule is SplitRule.TIME)


def test_a_worker_whose_rate_changes_loses_no_record(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "alone", [(float(time), 0.1 if time < 4000 else 1.0) for time in range(5000)], 0.0, 1)
    traffic = load_traffic([shard])
    assert not traffic.skipped and 1200 < len(traffic) < 1600


@given(data=st.data(), n=st.integers(1, 200), n_workers=st.integers(1, 4))
def test_what_is_drawn_depends_on_no_order_and_leaves_the_rarest_alone(
        data: st.DataObject, n: int, n_workers: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    rates = torch.tensor(data.draw(st.lists(st.sampled_from([0.05, 0.5, 1.0]), min_size=n_workers, max_size=n_workers)))
    worker = torch.randint(n_workers, (n,), generator=generator)
    time = torch.rand(n, generator=generator, dtype=torch.float64)
    request = torch.randint(-2**63, 2**63 - 1, (n,), generator=generator)

    def in_this(order: Tensor) -> Tensor:
        return at_one_rate(time[order], worker[order], rates[worker[order]], request[order])

    found, shuffled = in_this(torch.arange(n)), torch.randperm(n, generator=generator)
    assert torch.equal(in_this(shuffled), found[shuffled])
    assert bool(found[rates[worker] == rates[worker].min()].all())


def test_records_are_drawn_by_the_rates_of_their_time() -> None:
    """The second worker records only in the second half of the time, and then a tenth of its requests."""
    n = 20_000
    time = torch.arange(n).double()
    late = torch.arange(n) >= n // 2
    rate = torch.where(late & (torch.arange(n) % 2 == 1), 0.1, 1.0)
    worker = (rate < 1).long()
    request = torch.randint(-2**63, 2**63 - 1, (n,), generator=torch.Generator().manual_seed(0))
    found = at_one_rate(time, worker, rate, request)
    assert bool(found[:n // 2 - 50].all()) and bool(found[worker == 1].all())
    assert float(found[late & (worker == 0)].double().mean()) == pytest.approx(0.1, abs=0.02)


HOSTS = ["one", "other"]


def of_hosts(folder: Path, ends: Sequence[float], wrong: Sequence[float]) -> list[Path]:
    """Record requests of two hosts up to a time of each host. The given share of a host's requests is answered wrongly.
    """
    return [shard_of(folder / host, host, [(float(time), 1.0) for time in range(int(end))], share, seed)
            for seed, (host, end, share) in enumerate(zip(HOSTS, ends, wrong))]


@pytest.mark.parametrize("lag", [0, 60, 1000, 1700])
def test_records_of_a_host_that_lag_behind_are_among_those_that_certify_as_often_as_they_came(
        tmp_path: Path, lag: int) -> None:
    """Of the requests of the host that lags behind, 6 % are answered wrongly, so 3 % of all are."""
    shards = of_hosts(tmp_path, (5000, 5000 - lag), (0.0, 0.06))
    traffic = load_traffic(shards)
    rows = traffic.split.rows(Part.CERTIFY)
    wrong = (traffic.backbone_class != traffic.full_class)[rows]
    assert len(rows) > 1900 and not traffic.ended
    assert float(wrong.double().mean()) == pytest.approx(0.03, abs=0.012)
    assert float(traffic.time[rows].max()) < 5000 - lag + 3
    assert traffic.skipped.get(NEWER_THAN_OTHERS, 0) == pytest.approx(max(0, lag - 3), abs=1)


def test_hosts_that_record_in_one_folder_are_told_apart_by_their_names(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path, host, [(float(time), 1.0) for time in range(end)], 0.0, 1, host=host)
              for host, end in zip(HOSTS, (5000, 3500))]
    traffic = load_traffic(shards)
    assert float(traffic.time[traffic.split.rows(Part.CERTIFY)].max()) == 3502
    assert traffic.skipped == {NEWER_THAN_OTHERS: 1497}


def test_a_host_whose_records_ended_long_ago_is_named_and_holds_nothing_up(tmp_path: Path) -> None:
    traffic = load_traffic(of_hosts(tmp_path, (5000, 2000), (0.0, 0.06)))
    assert [Path(folder).name for folder in traffic.ended] == ["other"] and NEWER_THAN_OTHERS not in traffic.skipped
    assert float(traffic.time[traffic.split.rows(Part.CERTIFY)].max()) == 4999


def test_hosts_that_end_before_the_end_that_all_others_have_are_named(tmp_path: Path) -> None:
    """Of all requests, 35 % are newer than those of the first host, and 29.8 % are newer than those of the second."""
    shards = [shard_of(tmp_path, f"host {end}", [(float(time), 1.0) for time in range(end)], 0.0, end, host=str(end))
              for end in (5580, 6300, 14000)]
    for chosen, named in ((shards, ["5580"]), (shards[:2], []), (shards[1:], ["6300"])):
        assert [*load_traffic(chosen).ended] == named


@pytest.mark.parametrize("order", [1, -1])
def test_a_copy_of_a_hosts_folder_that_lags_behind_makes_no_difference(tmp_path: Path, order: int) -> None:
    """The host was started anew in the meantime, so the newest worker has no records in the copy."""
    early = shard_of(tmp_path / "copy", "one", [(float(time), 1.0) for time in range(4000)], 0.0, 1, host="host")
    late = shard_of(tmp_path / "host", "two", [(float(time), 1.0) for time in range(4000, 5000)], 0.0, 2, host="host")
    traffic = load_traffic([early, late][::order])
    assert float(traffic.time[traffic.split.rows(Part.CERTIFY)].max()) == 4999 and not traffic.skipped


def test_shards_of_an_earlier_version_are_of_the_host_that_records_beside_them(tmp_path: Path) -> None:
    before = shard_of(tmp_path, "one", [(float(time), 1.0) for time in range(4000)], 0.0, 1)
    after = shard_of(tmp_path, "two", [(float(time), float(time >= 4000)) for time in range(5000)], 0.0, 2, host="host")
    traffic = load_traffic([before, after])
    assert not traffic.skipped and float(traffic.time[traffic.split.rows(Part.CERTIFY)].max()) == 4999


def test_a_host_that_records_rarely_holds_nothing_up(tmp_path: Path) -> None:
    rare = shard_of(tmp_path, "rare", [(1000.0 * time + 100, 1.0) for time in range(5)], 0.0, 1, host="rare")
    busy = shard_of(tmp_path, "busy", [(float(time), 1.0) for time in range(5000)], 0.0, 2, host="busy")
    traffic = load_traffic([rare, busy])
    assert not traffic.skipped and float(traffic.time[traffic.split.rows(Part.CERTIFY)].max()) == 4999


def test_the_rows_of_a_request_do_not_count_as_requests_of_a_host(tmp_path: Path) -> None:
    """Of the requests, 80 % are newer than those of the first host; of the rows, 29 %."""
    ended = shard_of(tmp_path, "ended", [(float(time), 1.0) for time in range(1000)], 0.0, 1, host="ended", n_rows=10)
    serves = shard_of(tmp_path, "serves", [(float(time), 1.0) for time in range(1000, 5000)], 0.0, 2, host="serves")
    traffic = load_traffic([ended, serves])
    assert [*traffic.ended] == ["ended"] and not traffic.skipped


def test_a_host_that_has_just_begun_holds_nothing_up(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path / "one", "one", [(float(time), 1.0) for time in range(5000)], 0.0, 1),
              shard_of(tmp_path / "new", "new", [(float(time), 1.0) for time in range(4900, 5000)], 0.0, 2)]
    traffic = load_traffic(shards)
    assert not traffic.ended and not traffic.skipped


def test_a_host_that_ends_within_the_time_that_certifies_is_named_too(tmp_path: Path) -> None:
    """Another host lags less and ends that time, so that it begins before the end of the first host."""
    shards = [shard_of(tmp_path, name, [(float(time), 1.0) for time in range(first, end, 3)], 0.0, first, host=name)
              for first, (name, end) in enumerate({"current": 9000, "late": 7380, "later": 4770}.items())]
    traffic = load_traffic(shards)
    certify = traffic.time[traffic.part == Part.CERTIFY.number]
    assert certify.min() < 4760 and certify.max() < 7400 and [*traffic.ended] == ["later"]


def test_a_host_that_ended_before_the_last_certificate_is_named_as_well(tmp_path: Path) -> None:
    shards = of_hosts(tmp_path, (5000, 2500), (0.0, 0.06))
    for fresh_after in (2400.0, 2600.0):
        traffic = load_traffic(shards, fresh_after)
        assert [(Path(host).name, count) for host, count in traffic.ended.items()] == [("other", 0)]
    assert not load_traffic(shards, 6000.0).ended, "nothing can be certified"


@pytest.mark.parametrize("rule", SplitRule)
def test_each_ended_host_is_named_with_the_number_of_its_requests_that_certify_the_last_one_first(
        tmp_path: Path, rule: SplitRule) -> None:
    """Ten hosts replace each other."""
    shards = [shard_of(tmp_path, f"pod-{number}", [(500.0 * number + time, 1.0) for time in range(500)], 0.0, number,
                       host=f"pod-{number}") for number in range(10)]
    traffic = load_traffic(shards, rule=rule)
    certify = traffic.time[traffic.part == Part.CERTIFY.number]
    assert [*traffic.ended] == [f"pod-{number}" for number in reversed(range(6))]
    for number in range(6):
        of_host = (certify >= 500 * number) & (certify < 500 * (number + 1))
        assert traffic.ended[f"pod-{number}"] == int(of_host.sum())
    assert sum(traffic.ended.values()) > 0


def test_a_host_that_records_rarely_and_in_pairs_holds_nothing_up(tmp_path: Path) -> None:
    for number, gap in enumerate((0.3, 0.0)):
        pairs = [(begin + later, 1.0) for begin in (200.0, 2000.0, 3750.0) for later in (0.0, gap)]
        shards = [shard_of(tmp_path / str(number), "rare", pairs, 0.0, 1, host="rare"),
                  shard_of(tmp_path / str(number), "busy", [(float(time), 1.0) for time in range(5000)], 0.0, 2,
                           host="busy")]
        traffic = load_traffic(shards)
        assert not traffic.skipped and not traffic.ended


def test_a_host_that_paused_long_ago_is_not_thought_to_be_silent_by_habit(tmp_path: Path) -> None:
    day = 86400.0
    paused = [(float(time), 1.0) for time in range(100)] + [(30 * day + time, 1.0) for time in range(2000)]
    shards = [shard_of(tmp_path, "paused", paused, 0.0, 1, host="paused"),
              shard_of(tmp_path, "other", [(30 * day + time, 1.0) for time in range(2600)], 0.0, 2, host="other")]
    assert load_traffic(shards).time[load_traffic(shards).part == Part.CERTIFY.number].max() < 30 * day + 2010


def header(n_dropped: int, first: float, last: float) -> ShardHeader:
    return ShardHeader("model", "1.0", "ab12", 4, ("layer",), n_dropped=n_dropped, dropped=(first, last))


def test_dropped_records_count_with_the_chance_at_which_they_would_have_been_drawn() -> None:
    """Of one worker all records are drawn, and of the other one in twenty: they are as many."""
    time = torch.arange(1000.0, dtype=torch.float64)
    chance = [torch.ones(1000), torch.full((20_000,), 0.05)]
    times = [time, time.repeat(20).sort().values]
    drawn_times = torch.cat([time, time])
    for n_of_rare, n_of_full in ((30, 0), (0, 600)):
        headers = [header(n_of_rare, 800.0, 990.0), header(n_of_full, 800.0, 990.0)]
        share = dropped_share(headers, times, times, chance, drawn_times, time[700:])
        assert share == pytest.approx(30 / 630), "of 600 drawn records of this time"


def test_records_that_were_dropped_while_a_clock_was_wrong_count_whenever_that_was() -> None:
    time, ahead = torch.arange(1000.0, dtype=torch.float64), 172800.0
    told = torch.where(time > 900, time + ahead, time)
    ones = [torch.ones(1000)]
    for written, times in ((told, time), (time, time)):  # the clock came back before the next record, or after it
        lost = [header(100, 950 + ahead, 990 + ahead)]
        assert dropped_share(lost, [written], [times], ones, time, time[700:]) == pytest.approx(100 / 400)
    assert dropped_share([header(100, 10.0, 20.0)], [time], [time], ones, time, time[700:]) == 0


def test_records_that_were_dropped_after_those_that_certify_do_not_count_if_their_worker_went_on() -> None:
    """The shard that tells of them holds records from before, because the queue was full in between."""
    time = torch.arange(1000.0, dtype=torch.float64)
    parts, ones = [time[:900], time[920:]], [torch.ones(900), torch.ones(80)]
    headers = [header(20, 901.0, 919.0), header(0, 0.0, 0.0)]
    assert dropped_share(headers, parts, parts, ones, torch.cat(parts), time[500:850]) == 0
    assert dropped_share(headers, parts, parts, ones, torch.cat(parts), time[500:910]) > 0
