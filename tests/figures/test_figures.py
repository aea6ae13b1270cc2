"""The figures of the benchmarks compare what they claim to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from early_exit.handler.inference.forward import Stage
from early_exit.handler.recording import writer
from tests.benchmarks import answers, engine, faces, gpu, int8, recovery, rows, scenes
from tests.benchmarks.loop import compared_with
from tests.benchmarks.overhead import recording_ratio
from tests.demo.__main__ import table
from tests.support import arms
from tests.support.cifar import DataMissing, data_folder
from tests.support.client import Reply
from tests.support.loop import LoopResult
from tests.support.residual import residual_backbone
from tests.support.skips import NO_DATA


@pytest.mark.parametrize("size", engine.BATCHES)
def test_shares_that_leave_are_exact_for_all_batches_and_vary_from_one_to_the_next(size: int) -> None:
    torch.manual_seed(0)
    destinies = engine.dealt(size, 24)
    calls = 10 if size == 1 else 1
    assert destinies.shape == (24, calls, size)
    counts = engine.counts_of(destinies)
    n_rows = 24 * calls * size
    assert sum(map(sum, counts)) == n_rows
    for stage, share in enumerate(engine.SHARES):
        column = [one[stage] for one in counts]
        assert sum(column) / n_rows == pytest.approx(share, abs=1 / n_rows)
        assert len(set(column)) > 2, "every batch lets the same number leave"


def test_rows_of_a_gpus_batches_leave_where_they_are_to_leave() -> None:
    torch.manual_seed(0)
    leaves_after, destinies = torch.randint(4, (64,)), engine.dealt(16, 8).flatten(0, 1)
    found = gpu.rows_of(destinies, leaves_after)
    assert torch.equal(leaves_after[found], destinies) and len(found.unique()) > 30


def test_ideal_exits_cost_what_the_rows_that_were_used_pay_up_to_their_exits() -> None:
    # The stages take 0.1, 0.2 and 0.7. Of four rows, two leave after the first stage and one after the second.
    assert engine.ideal_ratio([0.1, 0.2, 0.7], [[2, 1, 1]]) == pytest.approx((2 * 0.1 + 0.3 + 1.0) / 4)
    assert engine.ideal_ratio([0.1, 0.2, 0.7], [[2, 1, 1], [0, 0, 4]]) == pytest.approx((0.5 + 1 + 4) / 8)


def test_the_share_of_the_ideal_is_told_for_every_engine_and_batch_size() -> None:
    cells = [{"batch": batch, "engine": name, "exits": engine.EXITS, "ratio_to_same_engine": 0.5, "ratio_to_eager": 0.4,
              "ideal_ratio": 0.3, "share_of_ideal": 0.5 / 0.7} for batch in (1, 8) for name in ("eager", "folded")]
    told = engine.summary(cells)
    assert told["share_of_ideal"] == {name: {"1": 0.5 / 0.7, "8": 0.5 / 0.7} for name in ("eager", "folded")}
    assert told["share_of_ideal_b8"] == 0.5 / 0.7 and told["share_of_ideal_b32"] is None


def compute_for(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def taking(seconds: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a model of four classes that takes so much CPU time for a batch."""
    def model(batch: torch.Tensor) -> torch.Tensor:
        compute_for(seconds)
        return batch[:, :4]

    return model


def test_a_ratio_below_one_says_that_exits_save_time() -> None:
    stages = [Stage(lambda batch: (taking(0.001)(batch),))]
    found = rows.time_ratios(torch.randn(64, 8), taking(0.004), stages)
    assert found.keys() == {"1", "8", "32"} and all(0.1 < ratio < 0.6 for ratio in found.values()), found


def test_every_engine_is_compared_with_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "work_of", lambda model, plan, inputs: (0.6, []))
    arms_of = {"original": taking(0.004), "folded": taking(0.003), "folded with exits": taking(0.001)}
    plan: Any = SimpleNamespace(certificate=None)
    found = int8.figures(arms_of, {"folded with exits": plan}, torch.randn(64, 8), torch.zeros(64))
    original, folded, exits = ({**one["cpu_time_ratio"]} for one in found["rows"])
    for size in ("1", "8", "32"):
        assert original[size] == 1 and exits[size] < 0.6 < folded[size] < 1, found["rows"]


def test_the_cost_of_recording_includes_what_the_writer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def slowly(path: Path, *arguments: Any) -> None:
        compute_for(0.3)
        write(path, *arguments)
        written.append(path)

    write = writer.write_shard
    monkeypatch.setattr(writer, "write_shard", slowly)
    inputs = [torch.randn(8, 16) for _ in range(2)]
    with torch.no_grad():
        found = recording_ratio(residual_backbone(), inputs, n_shards=2, n_records=16)
    assert len(written) == 3, "a shard to warm up, and two that are timed"
    assert found > 5, "a fraction of a second for each shard, beside two batches of a small model"


def test_the_worker_knows_whose_rows_are_timed(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        recording_ratio(residual_backbone(), [torch.randn(8, 16)], n_shards=1, n_records=16)
    assert "not known which row" not in caplog.text


def test_a_shard_that_no_number_of_batches_fills_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        recording_ratio(residual_backbone(), [torch.randn(8, 16)], n_shards=1, n_records=12)


def test_ways_to_answer_differ_in_nothing_but_how_they_answer() -> None:
    settings = {mode: yaml.safe_load(answers.CONFIG.format(**answers.SAME, more=more))
                for mode, more in answers.MODES.items()}
    for mode, own in (("plain", "exits"), ("early", "answers")):
        settings[mode]["early_exit"].pop(own)
    assert settings["plain"] == settings["early"] == settings["batched"]
    assert settings["plain"]["batchSize"] == answers.BATCH


def test_a_recovery_that_fails_is_told_with_what_was_measured_before(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_first(folder: Path, seed: int, sizes: recovery.Sizes, story: dict[str, Any]) -> None:
        story["disagreement_before"] = 0.01
        if seed == 0:
            raise RuntimeError("no alarm came in 4000 requests")

    monkeypatch.setattr(recovery, "live_through", fails_first)
    told = recovery.recovered(tmp_path, 2)
    assert (told["runs"], told["recovered"]) == (2, 1)
    assert told["each"][0] == {"seed": 0, "recovered": False, "disagreement_before": 0.01,
                               "failure": "RuntimeError: no alarm came in 4000 requests"}


def reply(number: int, arm: str) -> Reply:
    return Reply(200, b'{"%d": 1.0}' % (number % 3 if arm != arms.WITH_EXITS or number else 9), 0.1, "full", "1")


def test_the_three_arms_take_turns_and_each_pays_for_its_own_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, int]] = []
    used = dict.fromkeys(arms.ARMS, 0.0)

    def send(server: object, arm: str, bodies: Sequence[bytes]) -> list[Reply]:
        sent.append((arm, len(bodies)))
        used[arm] += 1 + arms.ARMS.index(arm)
        return [reply(int(body), arm) for body in bodies]

    monkeypatch.setattr(arms, "send", send)
    monkeypatch.setattr(arms.time, "sleep", lambda seconds: None)
    workers: Any = {arm: SimpleNamespace(cpu_times=lambda arm=arm: SimpleNamespace(user=used[arm], system=0.0),
                                         memory_info=lambda: SimpleNamespace(rss=2**20)) for arm in arms.ARMS}
    bodies = [b"%d" % number for number in range(36)]
    server: Any = None
    found = arms._take_turns(server, workers, bodies)
    turns = [arm for arm, _ in sent[len(arms.ARMS):]]
    rounds = [turns[start:start + 3] for start in range(0, len(turns), 3)]
    assert len(rounds) == arms.TURNS and all(sorted(one) == sorted(arms.ARMS) for one in rounds)
    assert {one[0] for one in rounds} == set(arms.ARMS), "always the same one goes first"
    for index, arm in enumerate(arms.ARMS):
        assert [one.top() for one in found[arm].replies] == [reply(number, arm).top() for number in range(36)]
        assert found[arm].cpu_s == pytest.approx(arms.TURNS * (1 + index) / len(bodies))


def test_every_figure_of_the_loop_is_compared_with_both_others() -> None:
    measured = {arm: arms.Arm([reply(number, arm) for number in range(4)]) for arm in arms.ARMS}
    nothing: Any = None
    result = LoopResult([], [], measured, 0, 0, nothing, nothing, nothing)
    times = {8: {arms.ORIGINAL: [4.0], arms.WITHOUT_EXITS: [3.0], arms.WITH_EXITS: [2.0]}}
    worker = {arms.ORIGINAL: {"p50_ms": 40.0}, arms.WITHOUT_EXITS: {"p50_ms": 20.0}, arms.WITH_EXITS: {"p50_ms": 10.0}}
    flops = {arms.ORIGINAL: 100.0, arms.WITHOUT_EXITS: 100.0, arms.WITH_EXITS: 60.0}
    labels = ["0", "1", "2", "0"]
    of_original, of_exits = (compared_with(arm, result, labels, times, worker, flops)
                             for arm in (arms.ORIGINAL, arms.WITHOUT_EXITS))
    assert of_original == {"accuracy_loss": 0.25, "disagreement": 0.25, "flops_ratio": 0.6, "cpu_time_ratio": 0.5,
                           "cpu_time_ratio_by_batch": {8: 0.5}, "p50_ms": 0.25}
    assert of_exits["cpu_time_ratio"] == pytest.approx(2 / 3) and of_exits["p50_ms"] == 0.5


def test_the_demos_table_shows_all_three_arms() -> None:
    ratios = {"flops_ratio": 0.43, "cpu_time_ratio": 0.5, "accuracy_loss": 0.01}
    values = {"original": 3.0, "without_exits": 2.0, "with_exits": 1.0}
    told = table({"accuracy_before": 0.98, "accuracy_after": 0.97, "disagreement": 0.015,
                  "disagreement_without_exits": 0.0, "certified_bound": 0.02, "hits": {"layer1": 0.4, "full": 0.6},
                  "failed": 0, "requests": 10,
                  "vs_original": ratios, "vs_without_exits": {**ratios, "cpu_time_ratio": 0.8},
                  **dict.fromkeys(("worker_cpu_ms_per_request", "p50_ms", "p95_ms"), values)})
    assert "original" in told and "ours, no exits" in told and "certified <= 2.0%" in told
    line = next(line for line in told.splitlines() if "CPU time of the model" in line)
    assert line.split()[-3:] == ["1.00", "0.62", "0.50"]
    assert next(line for line in told.splitlines() if "p50" in line).split() == ["p50", "ms", "3.0", "2.0", "1.0"]


def test_faces_and_scenes_that_are_recorded_show_other_pictures_than_those_that_are_measured(
        monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        data_folder()
    except DataMissing as missing:
        pytest.skip(f"{NO_DATA}: {missing}")
    shown = []

    def seen(photos: Sequence[Any], people: Sequence[int], seed: int, n: int) -> faces.Seen:
        shown.append({one.tobytes() for one in photos})
        return faces.Seen([b""] * n, [0] * n)

    monkeypatch.setattr(faces, "_seen_by_camera", seen)
    recorded, parts, measured = faces.traffic()
    assert len(recorded.bodies) == len(parts) == faces.N_RECORDED and len(measured.bodies) == faces.N_MEASURED
    assert len(shown) == 4 and sum(map(len, shown)) == len(set().union(*shown))
    dealt = scenes._cutouts(for_training=False).dealt().values()
    for pictures in ([{one.tobytes() for one in each.photos} for each in dealt],
                     *([{one.tobytes() for person in each.by_label[label] for one in person} for each in dealt]
                       for label in (scenes.PERSON, 2, 3, 4))):
        assert len(pictures) == 4 and all(pictures)
        assert sum(map(len, pictures)) == len(set().union(*pictures))
