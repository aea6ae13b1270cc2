"""What the live page gets: counts per look from counters, distributions from latencies, promises from archives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.archiver.gateway.certificates import Promises
from early_exit.archiver.gateway.dashboard import changes
from early_exit.archiver.gateway.latency import DECADES, PER_DECADE, Latencies, distribution
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.metrics import named_requests, read_metrics
from early_exit.archiver.version_metrics import VersionMetrics
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk
from tests.support.plans import write_plan
from tests.support.untried import build_untried

TEXT = """# HELP ee_answers_total Torchserve prometheus counter metric with unit: count
# TYPE ee_answers_total counter
ee_answers_total{ModelName="digits",ModelVersion="3.0",Exit="layer1.0",Hostname="host",} 30.0
ee_answers_total{ModelName="digits",ModelVersion="3.0",Exit="full",Hostname="host",} 12.0
# HELP ee_shadow_samples_total Torchserve prometheus counter metric with unit: count
# TYPE ee_shadow_samples_total counter
ee_shadow_samples_total{ModelName="digits",ModelVersion="3.0",Hostname="host",} 4.0
# HELP ee_anytime_answers_total Torchserve prometheus counter metric with unit: count
# TYPE ee_anytime_answers_total counter
ee_anytime_answers_total{ModelName="digits",ModelVersion="3.0",Hostname="host",} 2.0
# HELP ee_monitor_mean_loss Torchserve prometheus gauge metric with unit: ratio
# TYPE ee_monitor_mean_loss gauge
ee_monitor_mean_loss{ModelName="digits",ModelVersion="3.0",Hostname="host",} 0.25
# HELP ee_exits_bypassed Torchserve prometheus gauge metric with unit: bool
# TYPE ee_exits_bypassed gauge
ee_exits_bypassed{ModelName="digits",ModelVersion="3.0",BatchSize="1",Hostname="host",} 1.0
ee_exits_bypassed{ModelName="digits",ModelVersion="3.0",BatchSize="8",Hostname="host",} 0.0
# HELP ts_inference_requests_total Torchserve prometheus counter metric with unit: Count
# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="digits",model_version="3.0",hostname="host",} 42.0
# HELP ts_inference_latency_microseconds Torchserve prometheus counter metric with unit: Microseconds
# TYPE ts_inference_latency_microseconds counter
ts_inference_latency_microseconds{model_name="digits",model_version="3.0",hostname="host",} 2100000.0
"""


def test_the_metrics_of_a_server_are_read_by_model_and_version() -> None:
    assert read_metrics(TEXT) == {"digits": {"3.0": VersionMetrics(
        answers={"layer1.0": 30.0, "full": 12.0}, shadow=4.0, anytime=2.0, monitor={"mean_loss": 0.25}, bypassed={1},
        requests=42.0, seconds=2.1)}}


def test_requests_that_name_a_version_are_read_of_this_version_alone() -> None:
    others = TEXT + ('ts_inference_requests_total{model_name="digits",model_version="default",hostname="host",} 7.0\n'
                     'ts_inference_requests_total{model_name="more digits",model_version="3.0",hostname="host",} 8.0\n'
                     'ts_inference_requests_total{model_name="digits",model_version="3.0",hostname="a, b",} 1e3\n')
    assert named_requests(others, "digits", "3.0") == 1042.0
    assert named_requests(others, "digits", "2.0") == named_requests("", "digits", "3.0") == 0.0


@given(st.lists(st.integers(0, 50), max_size=9), st.integers(0, 400))
def test_every_answer_is_counted_once_and_a_new_server_begins_at_0(added: list[int], again: int) -> None:
    looks = [VersionMetrics(answers={"full": float(sum(added[:n]))}) for n in range(len(added) + 1)]
    assert sum(now.since(before).answers["full"] for before, now in pairwise(looks)) == sum(added)
    restarted = VersionMetrics(answers={"full": float(again)})
    expected = again if again < sum(added) else again - sum(added)
    assert restarted.since(looks[-1]).answers["full"] == expected


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=50))
def test_a_distribution_has_every_value_in_its_bin(values: list[float]) -> None:
    told = distribution(values)
    edges = 10 ** (np.arange(PER_DECADE * DECADES + 1) / PER_DECADE)
    expected, _ = np.histogram(np.clip(values, 1.0, edges[-1]), edges)
    assert told["n"] == len(values)
    assert sum(told["bins"]) == pytest.approx(1, abs=0.01)
    # A value on an edge may fall to either side of it by rounding.
    assert np.abs(np.cumsum(told["bins"]) - np.cumsum(expected) / len(values)).max() <= 0.01 + sum(
        np.isclose(values, edge).any() for edge in edges) / len(values)
    assert min(values) <= told["p50"] <= told["p95"] <= max(values)


def test_the_latest_three_versions_are_compared_by_answers_that_did_not_wait_for_opinions() -> None:
    latencies = Latencies()
    for number in range(1, 6):
        for exit_name in ("layer1.0", "full"):
            latencies.add({"status": 200, "version": f"{number}.0", "exit": exit_name, "latency_ms": 5.0})
    latencies.add({"status": 502, "error": "no answer from the server"})
    latencies.add({"status": 200, "version": "5.0", "exit": "layer1.0", "latency_ms": 90.0, "opinions": []})
    assert [(one["version"], one["early"], one["n"]) for one in latencies.distributions()] == [
        (version, early, 1) for version in ("3.0", "4.0", "5.0") for early in (True, False)]


def test_an_archive_tells_its_exits_and_its_promise_and_anything_else_nothing(
        recorder_mar: Path, tmp_path: Path) -> None:
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1000, 5, 0.005, 0.01, "by hand", (0.0, 1.0))
    plan = write_plan(tmp_path / "run", recorder_mar, certificate=certificate)
    mar = build_untried(ArchiveRequest(str(recorder_mar), tmp_path / "store", plan=plan, version="3.0"))
    (tmp_path / "store" / "other.mar").write_bytes(b"no archive")
    promises = Promises(tmp_path / "store")
    told = promises.of(mar.name)
    assert told is not None and told["certificate"]["words"] == certificate.in_words()
    assert told["watched"] == {"risk": "disagreement", "tolerance": 0.02, "delta": pytest.approx(0.05)}
    assert all(exit_["cost"] < 1 for exit_ in told["exits"]) and len(told["exits"]) > 2
    assert [promises.of(name) for name in ("other.mar", "missing.mar", "../run/plan.json")] == [None] * 3


def version(name: str, *, serves: bool = False, workers: int = 1, step: float = 0) -> dict[str, object]:
    return {"version": name, "serves": serves, "workers": workers, "monitor": {"step": step}}


def test_a_roll_is_told_step_by_step() -> None:
    old, new = version("2.0", serves=True), version("3.0")
    looks = [[], [old], [old, version("3.0", workers=0)], [old, new],
             [version("2.0"), version("3.0", serves=True)], [version("3.0", serves=True)],
             [version("3.0", serves=True, step=1)], [version("3.0", serves=True, step=1)]]
    assert [changes(before, now) for before, now in pairwise(looks)] == [
        ["version 2.0 serves"], ["version 3.0 is being loaded"], ["version 3.0 is ready"],
        ["version 3.0 serves instead of 2.0"], ["version 2.0 is removed"],
        ["alarm: version 3.0 has gone to fallback level 1"], []]


def test_an_alarm_from_before_the_first_look_is_not_told_as_news() -> None:
    assert changes([], [version("3.0", serves=True, step=2)]) == [
        "version 3.0 serves", "version 3.0 is at fallback level 2 because of an earlier alarm"]
