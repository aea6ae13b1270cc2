"""How soon the monitor notices that traffic has changed, and how rarely it raises a false alarm.

    python -m tests.benchmarks.drift --json FILE

A plan for ResNet-18 (width 32) is trained and certified on 5,000 CIFAR-10 requests. The other requests are answered
once, clean and corrupted, at every fallback level of the plan. Streams of shadow samples are then drawn from these
answers and fed to the handler's own monitor. A corruption with more than three times the tolerance is also mixed with
clean requests, so that the true disagreement is exactly three times the tolerance. `recovery` takes a real server with
its watcher through a drift.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.exits.plan import ExitPlan, build_heads, load_plan
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.monitor.blocks import Sample
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.training.data.shards import find_shards
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.benchmarks.report import report
from tests.benchmarks.subjects import Subject, resnet18
from tests.support.cifar import as_batch, load_requests
from tests.support.corrupt import corrupted

STRENGTHS = {"blur": (1.0, 2.0, 3.0), "noise": (0.15, 0.3, 0.5), "contrast": (0.5, 0.75, 0.9)}
QUIET = 500
"""The number of clean shadow samples before a stream drifts."""
LIMIT = 3000
"""The number of shadow samples after which a stream ends."""
SAMPLING_RATE = 0.05


@dataclass(frozen=True)
class Traffic:
    """Which of N requests are answered differently from the backbone, at each fallback level of a plan."""

    differs: Tensor
    """Whether each request is answered differently at each fallback level, (levels, N) bool."""

    @cached_property
    def requests(self) -> list[list[bool]]:
        """The same as one list for each request, with a value for each fallback level."""
        return self.differs.T.tolist()

    def rate(self, step: int = 0) -> float:
        return float(self.differs[step].double().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description="How soon the monitor notices a drift.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000, help="of each kind of traffic")
    options = parser.parse_args()
    return report(options.json, lambda scratch: measure(
        resnet18(scratch), scratch / "run", options.streams, options.requests), vars(options))


def measure(subject: Subject, folder: Path, n_streams: int, n_requests: int) -> dict[str, Any]:
    """Return the figures of all streams."""
    run = RunPaths(folder)
    shards = find_shards(subject.records, "model", subject.backbone.description)
    train("cifar", subject.archive, shards, TrainingOptions(measure="flops", search=None), run)
    plan, tensors = load_plan(run.plan)
    model = build_model(subject.backbone, plan, build_heads(plan, tensors, subject.backbone.description))
    bodies = load_requests()[0][-len(subject.inputs):]

    def traffic(inputs: Tensor) -> Traffic:
        return answered(model, plan, subject.backbone, inputs)

    clean = traffic(subject.inputs[:2 * n_requests])
    assert plan.certificate is not None
    monitored = Monitored.of(plan.certificate)
    three_times = 3 * monitored.tolerance
    rows = []
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:
            drifted = traffic(as_batch([corrupted(body, kind, strength, seed=number)
                                        for number, body in enumerate(bodies[:n_requests])]))
            rows.append({"traffic": kind, "strength": strength, **streams(drifted, clean, monitored, n_streams)})
            if drifted.rate() > three_times:
                share = (three_times - clean.rate()) / (drifted.rate() - clean.rate())
                rows.append({"traffic": f"{kind}, mixed", "strength": strength,
                             **streams(drifted, clean, monitored, n_streams, share=share)})
    hardest = subject.truth[:clean.differs.shape[1]]
    by_label = [float(clean.differs[0][hardest == label].double().mean()) for label in range(10)]
    worst = sorted(range(10), key=by_label.__getitem__)[-2:]
    shifted = Traffic(clean.differs[:, (hardest == worst[0]) | (hardest == worst[1])])
    rows.append({"traffic": f"labels {worst[0]} and {worst[1]} only", "strength": 1.0,
                 **streams(shifted, clean, monitored, n_streams)})
    quiet = [alarms(lambda stream: clean, monitored, clean, seed)[0] for seed in range(n_streams)]
    mixed = [row for row in rows if "mixed" in row["traffic"]]
    return {
        "median_samples_to_alarm": _median([row["median_samples_to_alarm"] for row in mixed]),
        "median_samples_to_alarm_without_quiet_time": _median(
            [row["median_samples_without_quiet_time"] for row in mixed]),
        "mixed": " or ".join(dict.fromkeys(row["traffic"].split(",")[0] for row in mixed)),
        "false_alarm_share": sum(first is not None for first in quiet) / n_streams,
        "streams": n_streams, "samples_per_clean_stream": LIMIT, "quiet_samples_before_drift": QUIET,
        "tolerance": monitored.tolerance, "clean_disagreement": clean.rate(), "steps": len(model.assembly.levels),
        "certificate": {"n": plan.certificate.n, "k": plan.certificate.k}, "rows": rows,
    }


def answered(model: EarlyExitModel, plan: ExitPlan, backbone: Backbone, inputs: Tensor) -> Traffic:
    """Answer (N, ...) requests at every fallback level of a model, in one pass."""
    exits = [stage for stage in model.assembly.stages if stage.exit is not None]
    confidence, classes, reference = [], [], []
    with torch.no_grad():
        for x in inputs.split(100):
            said = []
            for stage in model.assembly.stages:
                [x] = stage.forward(x)
                if stage.exit is not None:
                    said.append(stage.exit.head(x))
            confidence.append(torch.stack([planned.policy.on_answers().confidence(logits)
                                           for planned, logits in zip(plan.exits, said)]))
            classes.append(torch.stack([logits.argmax(dim=1) for logits in said]))
            reference.append(x.argmax(dim=1))
    sure, says, backbone_class = torch.cat(confidence, 1), torch.cat(classes, 1), torch.cat(reference)
    never = (2.0,) * len(exits)
    differs = []
    for thresholds in (tuple(planned.threshold for planned in plan.exits), *plan.safer, never):
        served = backbone_class.clone()
        waiting = torch.ones(len(served), dtype=torch.bool)
        for number, threshold in enumerate(thresholds):
            leaves = waiting & (sure[number] >= threshold)
            served[leaves] = says[number][leaves]
            waiting &= ~leaves
        differs.append(served != backbone_class)
    return Traffic(torch.stack(differs))


def alarms(source: Callable[[random.Random], Traffic], monitored: Monitored, clean: Traffic, seed: int, *,
           quiet: int = 0) -> tuple[int | None, list[int], MonitorState]:
    """Feed one stream to the monitor. Return the samples to its first alarm and to each alarm, and its last state.

    Samples are counted from the end of the quiet time, so an alarm during the quiet time has a count of at most 0.

    Args:
        source: draws the traffic that the next request belongs to.
        monitored: what the monitor tests.
        clean: the traffic of the quiet time.
        seed: the seed of the stream.
        quiet: the number of clean samples before the stream drifts.
    """
    stream = random.Random(seed)
    last = len(clean.differs) - 1
    state, at = MonitorState(), []
    for n in range(-quiet, LIMIT):
        before = state.step
        request = stream.choice((clean if n < 0 else source(stream)).requests)
        state = state.after([Sample(before, float(request[before]))], monitored, last, 0.0)
        if state.step != before:
            at.append(n + 1)
        if state.step == last:
            break
    return (at[0] if at else None), at, state


def streams(drifted: Traffic, clean: Traffic, monitored: Monitored, n_streams: int, *,
            share: float = 1.0) -> dict[str, Any]:
    """Return what the monitor does on streams that change from clean to drifted traffic.

    Args:
        drifted: the drifted traffic.
        clean: the traffic of all other requests.
        monitored: what the monitor tests.
        n_streams: the number of streams.
        share: the share of drifted requests after the quiet time.
    """
    def source(stream: random.Random) -> Traffic:
        return drifted if stream.random() < share else clean

    late = [alarms(source, monitored, clean, seed, quiet=QUIET) for seed in range(n_streams)]
    late = [one for one in late if one[0] is None or one[0] > 0]  # without false alarms in the quiet time
    at_once = [alarms(source, monitored, clean, seed)[0] for seed in range(n_streams)]
    settled = [state.step for _, _, state in late]
    rates = [share * drifted.rate(step) + (1 - share) * clean.rate(step) for step in range(len(clean.differs))]
    to_alarm = _median([first for first, _, _ in late])
    to_rest = _median([at[-1] if at else None for _, at, _ in late])
    return {
        "share_of_drifted_requests": share, "disagreement_before": clean.rate(), "disagreement_during": rates[0],
        "disagreement_after": sum(rates[step] for step in settled) / len(late),
        "disagreement_by_step": rates, "alarmed_share": sum(first is not None for first, _, _ in late) / len(late),
        "median_samples_to_alarm": to_alarm, "median_samples_without_quiet_time": _median(at_once),
        "median_samples_to_last_step_back": to_rest,
        "median_requests_to_alarm": None if to_alarm is None else to_alarm / SAMPLING_RATE,
        "median_step_settled_at": statistics.median(settled),
    }


def _median(counts: Sequence[float | None]) -> float | None:
    """Return the median count of samples; None if half of the streams, or more, end without what is counted."""
    found = statistics.median(math.inf if count is None else count for count in counts)
    return None if found == math.inf else found


if __name__ == "__main__":
    sys.exit(main())
