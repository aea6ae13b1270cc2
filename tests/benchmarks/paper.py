"""The paper's tables in this project's numbers: accuracy, disagreement, hits, cost, for every method on the same data.

    python -m tests.benchmarks.paper --json FILE [--subjects resnet18 resnet56 efficientnet]

Each method chooses its exits with the recorded requests only; each row is measured on requests that nothing was
chosen with. Costs are CPU time of one thread against the plain backbone, interleaved, with the server's allocator.
Baselines get the same records and replays of them, and labels, but half of the layers: they choose no layers, and would
pay for a head at each. Where a subject or a method is left out, its row says why.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.backbone.candidates import spread_over
from early_exit.handler.errors import EarlyExitError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.exits.risk import Risk
from early_exit.handler.inference.forward import Exit
from early_exit.training.costs.profiling import Profile, TimeCost, profile_backbone
from early_exit.training.data.dataset import RecordedTraffic, load_traffic
from early_exit.training.data.labels import load_labels
from early_exit.training.data.preprocessing import preprocessing
from early_exit.training.data.replay import MIXUP, Replay, replay_records
from early_exit.training.data.shards import find_shards
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet, prepare
from early_exit.training.heads.heads import TrainedHead, find_architectures, train_heads
from early_exit.training.heads.search import Search
from early_exit.training.heads.trial import evaluators_of
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.planning.choose import choose, make_plan
from early_exit.training.planning.exit_costs import exit_costs
from early_exit.training.planning.predictions import predict
from tests.benchmarks.baselines.branchynet import branchynet
from tests.benchmarks.baselines.earlyon import earlyon
from tests.benchmarks.baselines.gati import gati
from tests.benchmarks.baselines.labelled import LabelledRecords
from tests.benchmarks.rows import row
from tests.benchmarks.subjects import SUBJECTS, Subject
from tests.support.cifar import DataMissing

PAPER_LAYERS, BASELINE_LAYERS = 3, 8
BATCH = 32
EXPECTED = (DataMissing, EarlyExitError)
"""What may keep a subject or a method from a row."""


def main() -> int:
    parser = argparse.ArgumentParser(description="The paper's tables in this project's numbers.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--subjects", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, metavar="METHOD",
                        help="rows to measure (all of %(choices)s)")
    parser.add_argument("--trials", type=int, default=20, help="of the search for each layer (%(default)s)")
    parser.add_argument("--work", type=Path, metavar="FOLDER",
                        help="keep heads and training_set there: a run that is stopped or repeated goes on with them")
    options = parser.parse_args()
    restart_with_allocator()
    rows: list[dict[str, Any]] = []
    for name in options.subjects:
        with tempfile.TemporaryDirectory() as scratch:
            kept = options.work / name if options.work else Path(scratch)
            for one in rows_of(name, Path(scratch), kept, options.trials, options.methods):
                rows.append(one)
                print(json.dumps(one), flush=True)
                options.json.write_text(legible({"rows": rows}) + "\n")
    return 0


def rows_of(name: str, scratch: Path, kept: Path, n_trials: int, methods: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each method on a subject; what cannot be had has a row that says why, and the others follow."""
    try:
        bench = Bench.prepare(SUBJECTS[name](scratch), kept, n_trials)
    except EXPECTED as error:
        yield {"backbone": name, "left_out": str(error)}
    else:
        yield from bench.rows(methods)


@dataclass(frozen=True)
class Bench:
    """A subject, and heads of three kinds, trained when a method asks for them."""

    subject: Subject
    folder: Path
    options: TrainingOptions
    traffic: RecordedTraffic
    recorded: TrainingSet
    profile: Profile

    @classmethod
    def prepare(cls, subject: Subject, folder: Path, n_trials: int) -> Bench:
        options = TrainingOptions(search=Search(n_trials), batch_size=BATCH, replay=subject.replay)
        backbone = subject.backbone
        shards = find_shards(subject.records, "model", backbone.description)
        traffic = load_traffic(shards)
        layers = spread_over(list(backbone.description.candidates), options.layers)
        recorded = prepare(RunPaths(folder / "recorded").training_set, traffic, layers,
                           backbone.description.n_classes, 4)
        return cls(subject, folder, options, traffic, recorded, profile_backbone(backbone, layers))

    @cached_property
    def replayed(self) -> TrainingSet:
        """Records and replays; the records alone where nothing is replayed."""
        return self._replayed("searched", self.subject.replay)

    @cached_property
    def of_one_class(self) -> TrainingSet:
        """The same with replays that are of one class each, for those who learn from labels."""
        replay = self.subject.replay
        if replay is None or MIXUP not in replay.augmentations:
            return self.replayed
        others = tuple(name for name in replay.augmentations if name != MIXUP)
        return self._replayed("labelled", replace(replay, augmentations=others))

    def _replayed(self, name: str, replay: Replay | None) -> TrainingSet:
        if replay is None:
            return self.recorded
        _say(self.subject, f"replaying for '{name}'")
        archive = self.subject.archive
        with preprocessing(archive.root, json.loads(archive.original_manifest.read_text())) as handler:
            return replay_records(RunPaths(self.folder / name).training_set, self.traffic, self.recorded.layers,
                                  self.subject.backbone, handler, replay)

    @cached_property
    def searched(self) -> list[TrainedHead]:
        return self._trained("searched", self.replayed, self.options)

    @cached_property
    def default(self) -> list[TrainedHead]:
        """The default architecture, trained with replay."""
        return self._trained("default", self.replayed, replace(self.options, search=None))

    @cached_property
    def plain(self) -> list[TrainedHead]:
        """The default architecture, trained on the records alone."""
        return self._trained("plain", self.recorded, replace(self.options, search=None))

    def _trained(self, name: str, training_set: TrainingSet, options: TrainingOptions) -> list[TrainedHead]:
        _say(self.subject, f"training the heads '{name}'")
        run, head_cost = RunPaths(self.folder / name), TimeCost(self.profile, BATCH, options.policy)
        trials_on = evaluators_of(training_set, options.tolerance, options.trial_recipe, head_cost, options.policy)
        architectures, _ = find_architectures(trials_on, run, options.space, options.search)
        trainings = evaluators_of(training_set, options.tolerance, options.recipe, head_cost, options.policy)
        heads, _ = train_heads(trainings, architectures, run)
        return heads

    def rows(self, methods: Collection[str]) -> Iterator[dict[str, Any]]:
        """Yield a row for each of some methods."""
        with torch.no_grad():
            full = torch.cat([self.subject.backbone.graph(batch) for batch in self.subject.inputs.split(250)])
        accuracy = replace(self.options, risk=Risk.ACCURACY)
        gap = replace(self.options, risk=Risk.CONFIDENCE_GAP)
        flops = replace(self.options, measure="flops")
        papers = replace(self.options, thresholds="paper", measure="flops")
        loss = 0.0
        for method, kind, count, options in (
                ("certified", "searched", None, self.options),
                ("certified-accuracy", "searched", None, accuracy),
                ("certified-confidence-gap", "searched", None, gap),
                ("certified-batch-8", "searched", None, replace(self.options, batch_size=8)),
                ("certified-batch-1", "searched", None, replace(self.options, batch_size=1)),
                ("certified-flops", "searched", None, flops),
                ("no-nas", "default", None, self.options),
                ("no-replay", "plain", None, self.options),
                *((f"paper-{count}-layers" if count > PAPER_LAYERS else "paper", "searched", count,
                   papers) for count in range(PAPER_LAYERS, PAPER_LAYERS + 4)),
                ("paper-no-nas", "plain", PAPER_LAYERS, papers),
                ("equal", "searched", None, replace(papers, thresholds="equal"))):
            if method not in methods:
                continue
            found = self._attempt(method, partial(self._own_row, method, kind, count, options, full))
            if method == "certified":
                loss = found.get("accuracy_loss", loss)
            yield found
        for method in [name for name in BASELINES if name in methods]:
            for max_loss in (self.options.tolerance, _close_to(loss)):
                yield self._attempt(method, partial(self._labelled_row, method, max_loss, full))

    def _attempt(self, method: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        _say(self.subject, method)
        try:
            return measure()
        except EXPECTED as error:
            return {"backbone": self.subject.name, "data": self.subject.data, "method": method, "left_out": str(error)}

    def _own_row(self, method: str, kind: str, count: int | None, options: TrainingOptions,
                 full: Tensor) -> dict[str, Any]:
        training_set = self.recorded if kind == "plain" else self.replayed
        heads: list[TrainedHead] = getattr(self, kind)
        heads = _spread(heads, count) if count else heads
        plan, exits = self._plan(training_set, heads, options)
        certificate = plan.certificate
        return row(self.subject, method, exits, full, tolerance=options.tolerance, labelled=False, layers=len(heads),
                   replayed=training_set is not self.recorded,
                   certificate=None if certificate is None else certificate.in_words())

    def _labelled_row(self, method: str, max_loss: float, full: Tensor) -> dict[str, Any]:
        return row(self.subject, method, BASELINES[method](self.labelled, max_loss), full, tolerance=max_loss,
                   labelled=True, layers=len(self.labelled.layers), replayed=self.of_one_class is not self.recorded,
                   certificate=None)

    def _plan(self, training_set: TrainingSet, heads: Sequence[TrainedHead],
              options: TrainingOptions) -> tuple[ExitPlan, dict[str, Exit]]:
        if not heads:  # none is better than chance: the backbone stays as it is
            return ExitPlan(self.subject.backbone.description.sha256, options.thresholds, (), None), {}
        labels = None
        if options.risk is Risk.ACCURACY:
            labels = load_labels(self.subject.labels, training_set.request, training_set.row,
                                 training_set.n_classes)
        description, profile = self.subject.backbone.description, None if options.measure == "flops" else self.profile
        costs = exit_costs(profile, heads, [options.policy] * len(heads), description, options.batch_size)
        predictions = predict(training_set, heads, costs, options.risk, options.policy, labels)
        point = choose(predictions, options)
        plan = make_plan(point, predictions, heads, training_set, description, options, profile)
        by_path = {one.layer.path: one.head for one in heads}
        return plan, {planned.layer: Exit(by_path[planned.layer], planned.policy,
                                          _calibrated(planned.policy.temperature), planned.shrink_from)
                      for planned in plan.exits}

    @cached_property
    def labelled(self) -> LabelledRecords:
        """What the baselines get; a replay has the label of the request that it replays."""
        training_set = self.of_one_class
        labels = load_labels(self.subject.labels, training_set.request, training_set.row,
                                 training_set.n_classes)
        n_train = int((training_set.part == list(Part).index(Part.TRAIN)).sum())
        originals = training_set.rows(Part.TRAIN)[:n_train]
        n_rounds = (len(training_set.backbone_class) - training_set.n_records) // max(1, n_train)
        layers = spread_over(list(training_set.layers), BASELINE_LAYERS)
        return LabelledRecords(
            layers=tuple(layers), recorded=training_set.recorded,
            pooled={one.path: training_set.activations(one) for one in layers},
            labels=torch.cat([labels, labels[originals].repeat(n_rounds)]), backbone_class=training_set.backbone_class,
            n_classes=training_set.n_classes, train=training_set.rows(Part.TRAIN),
            tune=torch.cat([training_set.rows(Part.TUNE), training_set.rows(Part.CERTIFY)]))


BASELINES: Mapping[str, Callable[[LabelledRecords, float], dict[str, Exit]]] = {
    "branchynet": branchynet, "gati": gati, "earlyon": earlyon}


METHODS = ("certified", "certified-accuracy", "certified-confidence-gap", "certified-batch-8", "certified-batch-1",
           "certified-flops", "no-nas", "no-replay", "paper", "paper-4-layers", "paper-5-layers", "paper-6-layers",
           "paper-no-nas", "equal", *BASELINES)


def _spread(heads: list[TrainedHead], count: int) -> list[TrainedHead]:
    chosen = spread_over([one.layer for one in heads], count)
    return [one for one in heads if one.layer in chosen]


def _calibrated(temperature: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits / temperature


def _close_to(loss: float) -> float:
    """Return an accuracy loss for baselines that compares with a measured one; half a per mille at least."""
    return max(0.0005, loss)


def legible(rows: Mapping[str, Any]) -> str:
    """Return JSON in which a list of numbers takes one line."""
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(rows, indent=1))


def _say(subject: Subject, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {subject.name}: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
