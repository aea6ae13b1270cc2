"""The monitor seldom raises an alarm while the certificate holds, soon raises one when it does not, and keeps its
state when a worker is killed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor.blocks import Sample
from early_exit.handler.monitor.monitored import Monitored, upper_limit
from early_exit.handler.monitor.sequential_test import BETS, ON_CONTENTS, ON_REQUESTS, Evidence, MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor, read_state
from tests.support.shadow_samples import samples_of
from tests.support.waiting import wait_until

TOLERANCE = 0.02
MONITORED = Monitored(Risk.DISAGREEMENT, TOLERANCE, 0.05)


def samples_until_alarm(rate: float, seed: int, *, quiet: int = 0, limit: int = 3000) -> int | None:
    draw = random.Random(seed)
    evidence = Evidence()
    for _ in range(quiet):
        evidence = evidence.after(Sample(0, float(draw.random() < TOLERANCE / 2)), MONITORED)
    for n in range(1, limit + 1):
        evidence = evidence.after(Sample(0, float(draw.random() < rate)), MONITORED)
        if evidence.wealth() >= 1 / MONITORED.delta:
            return n
    return None


@given(losses=st.lists(st.floats(0, 1), max_size=100))
def test_within_the_first_stake_the_wealth_is_half_kept_and_half_the_product_of_the_bets(losses: list[float]) -> None:
    evidence = Evidence()
    for sample in samples_of(losses):
        evidence = evidence.after(sample, MONITORED)
    products = [math.exp(sum(math.log1p(bet / TOLERANCE * (loss - TOLERANCE)) for loss in losses)) for bet in BETS]
    expected = ON_REQUESTS + ON_CONTENTS * (0.5 + 0.5 * sum(products) / len(BETS)) if losses else 1.0
    assert evidence.wealth() == pytest.approx(expected)


@given(losses=st.lists(st.sampled_from([0.0, 1.0]), max_size=350), filler=st.sampled_from([0, 650]))
def test_a_sample_at_exactly_the_tolerated_rate_leaves_the_expected_capital_of_contents_as_it_is(
        losses: list[float], filler: int) -> None:
    evidence = Evidence()
    for sample in samples_of([0.0] * filler + losses):
        evidence = evidence.after(sample, MONITORED)
    lost, kept = (evidence.after(Sample(0, loss), MONITORED).contents.wealth(100) for loss in (1.0, 0.0))
    assert TOLERANCE * lost + (1 - TOLERANCE) * kept == pytest.approx(evidence.contents.wealth(100))


def test_at_exactly_the_tolerated_rate_few_streams_ever_alarm() -> None:
    alarms = sum(samples_until_alarm(TOLERANCE, seed, limit=2000) is not None for seed in range(200))
    assert alarms <= 10, "5 % of 200"


@pytest.mark.parametrize(("quiet", "median"), [(0, 300), (2000, 700)])
def test_three_times_the_tolerance_is_noticed_also_after_a_long_quiet_time(quiet: int, median: int) -> None:
    found = sorted(samples_until_alarm(3 * TOLERANCE, seed, quiet=quiet) or 3000 for seed in range(41))
    assert found[20] <= median


def test_after_an_alarm_the_next_step_begins_with_fresh_evidence_and_the_last_one_never_alarms() -> None:
    state = MonitorState().after(samples_of([1.0] * 50), MONITORED, 2, 7.0)
    assert (state.step, state.evidence, state.alarms[0].time) == (1, Evidence(), 7.0)
    assert state.alarms[0].mean_loss == 1.0
    late = state.after(samples_of([1.0] * 50), MONITORED, 2, 8.0)
    assert late == state, "samples of the level before do not count"
    last = state.after(samples_of([1.0] * 50, level=1), MONITORED, 2, 8.0)
    assert last.step == 2
    assert last.after(samples_of([1.0] * 500, level=2), MONITORED, 2, 9.0) == last


def test_at_a_level_that_the_switch_demands_wrong_answers_are_an_alarm_that_leaves_this_level() -> None:
    state = MonitorState().after(samples_of([1.0] * 50, level=1), MONITORED, 3, 7.0)
    assert [alarm.step for alarm in state.alarms] == [1] and (state.step, state.evidence) == (2, Evidence())
    quiet = MonitorState().after(samples_of([0.0] * 50, level=1), MONITORED, 3, 7.0)
    assert quiet.evidence.n == 50 and not quiet.alarms
    assert MonitorState().after(samples_of([0.0] * 50, level=3), MONITORED, 3, 7.0) == MonitorState()


def test_the_upper_limit_is_that_of_clopper_and_pearson() -> None:
    for k, n in ((0, 50), (3, 200), (40, 1500)):
        assert upper_limit(k, n, 0.05) == pytest.approx(beta.ppf(0.95, k + 1, n - k), rel=1e-6)
    assert upper_limit(5, 5, 0.05) == 1.0


def test_the_loss_is_that_of_the_certificate() -> None:
    outputs = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    reference = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]]))

    def losses(risk: str) -> list[float]:
        certificate = Certificate(Risk(risk), 0.02, 0.95, 1000, 20, 0.01, 0.01, "-", (0.0, 1.0))
        return Monitored.of(certificate).losses(outputs, reference, ScoreKind.LOGITS)

    assert losses("disagreement") == losses("accuracy") == [0.0, 1.0]
    assert losses("confidence-gap") == pytest.approx([0.0, 0.1])


def test_without_labels_accuracy_is_watched_by_the_disagreement_it_was_certified_with() -> None:
    certificate = Certificate(Risk.ACCURACY, 0.01, 0.95, 1000, 30, 0.002, 0.01, "-", (0.0, 1.0))
    monitored = Monitored.of(certificate)
    assert monitored.risk is Risk.DISAGREEMENT
    assert monitored.tolerance == pytest.approx(beta.ppf(0.975, 31, 970), rel=1e-6)
    assert monitored.delta == pytest.approx(0.025), "the limit may be too low, which is a false alarm, too"


def test_workers_share_one_state_and_all_step_back(tmp_path: Path) -> None:
    path = tmp_path / "model" / "ab" / "monitor-2.0-cd.json"
    workers = [SharedMonitor(MONITORED, 2, path) for _ in range(3)]
    for worker in workers:
        worker.note(samples_of([0.0] * 40))
    wait_until(lambda: all(worker.state.evidence.n == 120 for worker in workers), "120 shared samples", limit_s=10)
    workers[0].note(samples_of([1.0] * 20))
    wait_until(lambda: all(worker.state.step == 1 for worker in workers), "the step back", limit_s=10)
    for worker in workers:
        worker.close()
    state = read_state(path)
    assert state is not None and len(state.alarms) == 1
    assert json.loads(path.read_text())["certificate"] == "void"
    restarted = SharedMonitor(MONITORED, 2, path)
    assert restarted.state == state, "a restarted worker goes on where the version was"
    restarted.close()


def test_with_no_folder_the_state_is_in_memory() -> None:
    watchman = SharedMonitor(MONITORED, 1, None)
    watchman.note(samples_of([1.0] * 20))
    watchman.close()
    assert watchman.state.step == 1


def test_while_the_folder_cannot_be_written_a_worker_watches_alone_and_adds_what_it_saw_later(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    path = folder / "monitor.json"
    watchman = SharedMonitor(MONITORED, 2, path)
    folder.write_text("a file where the folder should be")
    watchman.note(samples_of([0.0] * 30))
    wait_until(lambda: watchman.state.evidence.n == 30, "30 samples in memory", limit_s=10)
    assert len([line for line in caplog.messages if "watches alone" in line]) == 1
    folder.unlink()
    other = SharedMonitor(MONITORED, 2, path)
    other.note(samples_of([0.0] * 12))
    other.close()
    watchman.note(samples_of([0.0]))
    watchman.close()
    state = read_state(path)
    assert state is not None and state.evidence.n == 43


def test_a_folder_that_is_deleted_while_serving_does_not_undo_a_step_back(tmp_path: Path) -> None:
    path = tmp_path / "model" / "monitor.json"
    watchman = SharedMonitor(MONITORED, 2, path)
    watchman.note(samples_of([1.0] * 20))
    wait_until(path.exists, "the state", limit_s=10)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    watchman.note(samples_of([0.0] * 5, level=1))
    watchman.close()
    state = read_state(path)
    assert state is not None and (state.step, state.evidence.n) == (1, 5)


def _watch_for_ever(path: Path) -> None:
    watchman = SharedMonitor(MONITORED, 2, path)
    while True:
        watchman.note(samples_of([0.0]))
        time.sleep(0.001)


def test_killed_workers_leave_neither_a_lock_nor_a_half_written_state(tmp_path: Path) -> None:
    path = tmp_path / "monitor.json"
    processes = [multiprocessing.get_context("fork").Process(target=_watch_for_ever, args=(path,)) for _ in range(3)]
    for process in processes:
        process.start()
    wait_until(path.exists, "the state", limit_s=10)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    before = read_state(path)
    survivor = SharedMonitor(MONITORED, 2, path)
    survivor.note(samples_of([0.0]))
    survivor.close()
    after = read_state(path)
    assert before is not None and after is not None and after.evidence.n == before.evidence.n + 1
