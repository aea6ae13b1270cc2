"""Whether the certificate is true of traffic that is not independent: scenes, repeated files, bursts, slow change.

    python -m tests.benchmarks.dependence --json FILE

Heads are trained once for each kind of stream, on its first half; what follows is drawn again and again, split, tuned
and certified by the very functions that ee-train calls. A plan is judged on what the stream goes on like, all frames
that could be drawn: it is broken when of the requests, or of the new contents, more than the tolerated share is
answered differently. It is refused when nothing is certified, or fewer than 5 % leave. A plan that is true is then
watched by the monitor on the records that come next: an alarm is a false one. How soon the monitor notices three times
the tolerance is measured on independent traffic.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor
from tqdm import tqdm

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.betting import rejects
from early_exit.handler.errors import RecordError
from early_exit.handler.exits.head import HeadSpec
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.monitor.blocks import Sample
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import Evidence
from early_exit.training.costs.cost import Costs, flop_costs, head_flops
from early_exit.training.costs.profiling import one_thread
from early_exit.training.data.split import Part, Split, split_at_random, split_in_time
from early_exit.training.heads.distill import Distillation, train_head
from early_exit.training.options import TrainingOptions
from early_exit.training.planning.choose import choose
from early_exit.training.planning.predictions import HeadPredictions, PartPredictions
from early_exit.training.selection.calibrate import fit_policy
from early_exit.training.selection.simulation import Candidates, OperatingPoint, mean_cost, outcome
from tests.benchmarks import frames
from tests.benchmarks.frames import Bank
from tests.benchmarks.report import report
from tests.benchmarks.streams import INDEPENDENT, STREAMS, Drawn, Records, Stream

_OPTIONS = TrainingOptions(measure="flops")
_LEAVE = 0.05
"""A plan from which fewer leave counts as refused."""
_N_OLD = 50
"""Repetitions in which the rule for independent records chooses too: their mean cost is enough."""
_RECIPE = Distillation(max_steps=1500)
_BANKS: dict[str, Callable[[Path], Bank]] = {
    "cifar": frames.cifar, "cifar100": frames.cifar100, "digits": frames.handwriting}


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether the certificate is true of traffic that is not independent.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS), metavar="NAME",
                        help="by default all: " + ", ".join(STREAMS))
    options = parser.parse_args()
    return report(options.json, lambda scratch: measure(
        scratch, [STREAMS[name] for name in options.streams], options.repetitions), vars(options))


def measure(scratch: Path, streams: Sequence[Stream], n_repetitions: int) -> dict[str, Any]:
    """Return what the certificate is worth on each kind of stream."""
    rows, ratios, noticed = [], [], []
    with one_thread():  # the tensors are small, and each core repeats
        for name in dict.fromkeys(stream.bank for stream in streams):
            bank = _BANKS[name](scratch / name)
            for stream in (one for one in streams if one.bank == name):
                found = repeated(Subject.train(bank, stream), n_repetitions)
                rows.append(summary(stream, found))
                print(rows[-1], file=sys.stderr, flush=True)
                if stream.name in INDEPENDENT:
                    ratios.append(fmean(one.cost for one, old in found if old) / fmean(_old_costs(found)))
                    noticed += [one.noticed_after for one, _ in found if one.noticed_after is not None]
    return {"streams": rows, "iid_cost_ratio": max(ratios, default=None),
            "median_samples_to_alarm": median(noticed) if noticed else None}


@dataclass(frozen=True)
class Verdict:
    """What became of one plan."""

    is_refused: bool
    is_broken: bool
    cost: float
    """Of a request, as a fraction of the backbone's; 1 where the plan is refused."""
    is_true: bool = False
    """Whether the plan is true at all times, so that an alarm of the monitor is false."""
    is_false_alarm: bool = False
    noticed_after: float | None = None
    """Shadow samples until three times the tolerance is noticed, where requests are independent; infinity if it is not
    noticed among all that come later."""


_Verdicts = Sequence[tuple[Verdict, Verdict | None]]
REFUSED = Verdict(is_refused=True, is_broken=False, cost=1.0)


@dataclass(frozen=True)
class Subject:
    """A kind of stream, and what heads that were trained on the first half of one say of all frames."""

    bank: Bank
    stream: Stream
    logits: Tensor
    """(S * F, L, K)."""
    costs: Costs

    @classmethod
    def train(cls, bank: Bank, stream: Stream) -> Subject:
        past = _drawn(bank, stream, 0).records.frame
        past = torch.from_numpy(past[:len(past) // 2])
        logits, flops = [], []
        for layer in bank.layers:
            activations = bank.activations[layer.path]
            head = train_head(HeadSpec(), layer.shape, activations[past], bank.states[past], _RECIPE)
            logits.append(torch.cat([head.classify(rows.float()) for rows in activations.split(4096)]))
            flops.append(head_flops(head, layer.shape) / bank.flops)
        return cls(bank, stream, torch.stack(logits, dim=1), flop_costs(bank.layers, flops))

    def repetition(self, seed: int) -> tuple[Verdict, Verdict | None]:
        """Return what becomes of a plan of a stream, and, in some repetitions, of a plan that the rule for independent
        records makes of one record of each scene."""
        drawn = _drawn(self.bank, self.stream, seed)
        in_time = _in_time(self.bank.states, drawn.records)
        found = self.verdict(drawn, drawn.records.frame, in_time, watch=True)
        if seed > _N_OLD:
            return found, None
        generator = np.random.default_rng([2, seed])
        alone = generator.choice(len(drawn.of_contents), len(np.unique(drawn.records.scene)), p=drawn.of_contents)
        split = split_at_random(torch.from_numpy(generator.integers(-2**63, 2**63, size=len(alone))),
                                torch.zeros(len(alone), dtype=torch.bool))
        return found, self.verdict(drawn, alone, split)

    def verdict(self, drawn: Drawn, frame: np.ndarray, split: Split, *, watch: bool = False) -> Verdict:
        """Choose a plan with the records of some frames, judge it by what comes after them, and watch it there."""
        try:
            point, judged = self.plan(torch.from_numpy(frame), split)
        except RecordError:
            return REFUSED
        after = outcome(point, judged)
        differs = after.differs.double().numpy()
        requests = torch.from_numpy(drawn.of_requests)
        if float(requests[after.exit >= 0].sum()) < _LEAVE:
            return REFUSED
        broken = max(float(differs @ drawn.of_requests), float(differs @ drawn.of_contents)) > _OPTIONS.tolerance
        later = torch.multinomial(requests, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
        found = Verdict(is_refused=False, is_broken=broken, cost=mean_cost(point, after.exit[later], self.costs))
        if not watch:
            return found
        monitored = Monitored(_OPTIONS.risk, _OPTIONS.tolerance, _OPTIONS.delta, split.likeness)
        hardest = drawn.of_requests if drawn.of_hardest is None else drawn.of_hardest
        is_true = not broken and float(differs @ hardest) <= _OPTIONS.tolerance
        return replace(
            found, is_false_alarm=is_true and self.alarm(monitored, differs, drawn.later) is not None,
            is_true=is_true,
            noticed_after=self.alarm(monitored, differs, _drifted(differs, drawn.later)) or math.inf
            if self.stream.name in INDEPENDENT and differs.any() else None)

    def alarm(self, monitored: Monitored, differs: np.ndarray, later: Records) -> int | None:
        """Return the number of shadow samples after which the monitor raises an alarm; None where it does not."""
        reference = self.bank.states[torch.from_numpy(later.frame)]
        components = monitored.components(reference, ScoreKind.LOGITS)
        requests = np.diff(later.position, prepend=later.position[0])
        evidence = Evidence()
        for number, (row, content) in enumerate(zip(later.frame, later.content)):
            sample = Sample(0, float(differs[row]), int(content), 0.0, float(requests[number]), components[number])
            evidence = evidence.after(sample, monitored)
            if rejects(evidence.wealth(), monitored.delta):
                return number + 1
        return None

    def plan(self, frame: Tensor, split: Split) -> tuple[OperatingPoint, Candidates]:
        """Return the exits to deploy, and what the heads, calibrated, say of all frames.

        Raises:
            RecordError: nothing can be certified.
        """
        tune, certify = split.rows(Part.TUNE), split.rows(Part.CERTIFY)
        proof = split.evidence()
        proof.require_enough(_OPTIONS.risk, _OPTIONS.tolerance, _OPTIONS.delta, Part.CERTIFY.share)
        if not len(tune):
            raise RecordError("no records to choose with")
        teacher = self.bank.states.argmax(dim=1)
        policies = tuple(fit_policy(ConfidencePolicy.kind, self.logits[frame[tune], layer], teacher[frame[tune]])
                         for layer in range(self.costs.n_layers))
        # This policy's chance of an error is 1 - confidence, and the bank is large.
        confidence = torch.stack([policy.confidence(self.logits[:, layer]) for layer, policy in enumerate(policies)],
                                 dim=1)
        answers = self.logits.argmax(dim=2)
        agrees = answers == teacher[:, None]

        def candidates(rows: Tensor) -> Candidates:
            return Candidates(confidence[rows], 1 - confidence[rows], agrees[rows], (~agrees[rows]).float(),
                              torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows)), self.costs)

        parts = (PartPredictions(candidates(frame[rows]), answers[frame[rows]], teacher[frame[rows]],
                                 teacher[frame[rows]], torch.full((len(rows),), -1))
                 for rows in (tune, certify))
        predictions = HeadPredictions(tuple(layer.path for layer in self.bank.layers), policies, *parts, proof)
        return choose(predictions, _OPTIONS), candidates(torch.arange(len(teacher)))


def _drawn(bank: Bank, stream: Stream, seed: int) -> Drawn:
    return stream.draw(bank, np.random.default_rng([0, 0 if stream.fixed_past else seed]),
                       np.random.default_rng([1, seed]))


def _in_time(states: Tensor, records: Records) -> Split:
    n = len(records.frame)
    each, every = torch.arange(n), torch.ones(n, dtype=torch.bool)
    return split_in_time(states[torch.from_numpy(records.frame)], each, torch.from_numpy(records.content), each,
                         torch.from_numpy(records.position).double(), every, every, every)


def _drifted(differs: np.ndarray, later: Records) -> Records:
    """Return as many independent records of which three times the tolerated share is answered differently."""
    random = np.random.default_rng(int(later.frame[0]))
    n = len(later.frame)
    wrong, right = random.choice(np.flatnonzero(differs), n), random.choice(np.flatnonzero(differs == 0), n)
    frame, each = np.where(random.random(n) < 3 * _OPTIONS.tolerance, wrong, right), np.arange(n)
    return Records(frame, each, each, each)


def repeated(subject: Subject, n_repetitions: int) -> _Verdicts:
    """Return the verdicts of repetitions, which all cores make."""
    seeds = range(1, n_repetitions + 1)
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _keep, (subject,)) as pool:
        return list(tqdm(pool.imap(_repeat, seeds), desc=subject.stream.name, total=n_repetitions, disable=None))


_KEPT: list[Subject] = []


def _keep(subject: Subject) -> None:
    _KEPT[:] = [subject]


def _repeat(seed: int) -> tuple[Verdict, Verdict | None]:
    return _KEPT[0].repetition(seed)


def summary(stream: Stream, found: _Verdicts) -> dict[str, Any]:
    n, n_true = len(found), sum(plan.is_true for plan, _ in found)
    n_broken, n_alarms = sum(plan.is_broken for plan, _ in found), sum(plan.is_false_alarm for plan, _ in found)
    return {"name": stream.name, "repetitions": n, "refused_share": sum(plan.is_refused for plan, _ in found) / n,
            "broken_share": n_broken / n,
            "broken_low": _low(n_broken, n),
            "watched": n_true, "false_alarm_share": n_alarms / max(1, n_true),
            "false_alarm_low": _low(n_alarms, n_true),
            "saving": 1 - fmean(plan.cost for plan, _ in found),
            "saving_of_independent": 1 - fmean(_old_costs(found)), "may_refuse": stream.may_refuse}


def _old_costs(found: _Verdicts) -> list[float]:
    return [old.cost for _, old in found if old is not None]


def _low(k: int, n: int) -> float:
    """Return the lower 95 % confidence limit of a share (Clopper-Pearson)."""
    return float(beta.ppf(0.05, k, n - k + 1)) if k else 0.0


if __name__ == "__main__":
    sys.exit(main())
