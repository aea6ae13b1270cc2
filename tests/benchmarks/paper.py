"""The paper's tables in this project's numbers: accuracy, disagreement, hits, cost, for every method on the same data.

    python -m tests.benchmarks.paper --json FILE [--subjects resnet18 resnet56 efficientnet]

Each method chooses its exits with the recorded requests only; each row is measured on requests that nothing was
chosen with. Costs are CPU time of one thread against the plain backbone, interleaved, with the server's allocator.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.candidates import spread_over
from early_exit.handler.plan import ExitPlan
from early_exit.handler.stages import Exit
from early_exit.training.choose import choose, make_plan
from early_exit.training.dataset import Part, find_shards, load_traffic
from early_exit.training.heads import TrainedHead, find_architectures, train_heads
from early_exit.training.judged import judge
from early_exit.training.labels import load_labels
from early_exit.training.material import Material, prepare
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import exit_costs
from early_exit.training.profile import Profile, TimeCost, profile_backbone
from early_exit.training.replay import Replay, replay_records
from early_exit.training.requests import preprocessing
from early_exit.training.risk import Risk
from early_exit.training.search import Search
from tests.benchmarks.baselines.branchynet import branchynet
from tests.benchmarks.baselines.earlyon import earlyon
from tests.benchmarks.baselines.gati import gati
from tests.benchmarks.baselines.labelled import LabelledRecords
from tests.benchmarks.rows import row
from tests.benchmarks.subjects import SUBJECTS, Subject
from tests.support.cifar import DataMissing

PAPER_LAYERS = 3
BATCH = 32


def main() -> int:
    parser = argparse.ArgumentParser(description="The paper's tables in this project's numbers.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--subjects", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--trials", type=int, default=20, help="of the search for each layer (%(default)s)")
    options = parser.parse_args()
    restart_with_allocator("tests.benchmarks.paper", sys.argv[1:])
    rows: list[dict[str, Any]] = []
    for name in options.subjects:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                bench = Bench.prepare(SUBJECTS[name](Path(scratch)), Path(scratch), options.trials)
            except DataMissing as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
                continue
            for one in bench.rows():
                rows.append(one)
                print(json.dumps(one), flush=True)
                options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


@dataclass(frozen=True)
class Bench:
    """A subject with heads of three kinds, all trained."""

    subject: Subject
    options: TrainingOptions
    recorded: Material
    replayed: Material
    searched: list[TrainedHead]
    default: list[TrainedHead]
    """The default architecture, trained with replay."""
    plain: list[TrainedHead]
    """The default architecture, trained on the records alone."""
    profile: Profile

    @classmethod
    def prepare(cls, subject: Subject, folder: Path, n_trials: int) -> Bench:
        options = TrainingOptions(search=Search(n_trials), batch_size=BATCH, replay=Replay())
        backbone = subject.backbone
        shards = find_shards(subject.records, "model", backbone.description)
        traffic = load_traffic(shards)
        layers = spread_over(list(backbone.description.candidates), options.layers)
        recorded = prepare(RunPaths(folder / "recorded").material, traffic, layers, backbone.description.n_classes, 4)
        original = json.loads(subject.archive.original_manifest.read_text())
        _say(subject, "replaying")
        with preprocessing(subject.archive.root, original) as handler:
            replayed = replay_records(RunPaths(folder / "searched").material, traffic, layers, backbone, handler,
                                      options.replay or Replay())
        profile = profile_backbone(backbone, layers)
        head_cost = TimeCost(profile, BATCH)
        _say(subject, "searching")
        found, _ = find_architectures(RunPaths(folder / "searched"), replayed, options, head_cost)
        _say(subject, "training")
        searched = train_heads(RunPaths(folder / "searched"), replayed, options, found, head_cost)
        without = replace(options, search=None)
        both = []
        for name, material in (("default", replayed), ("plain", recorded)):
            found, _ = find_architectures(RunPaths(folder / name), material, without, head_cost)
            both.append(train_heads(RunPaths(folder / name), material, without, found, head_cost))
        return cls(subject, options, recorded, replayed, searched, *both, profile)

    def rows(self) -> list[dict[str, Any]]:
        """Return every method's row."""
        full = torch.cat([self.subject.backbone.graph(batch) for batch in self.subject.inputs.split(250)]).detach()
        accuracy = replace(self.options, risk=Risk.ACCURACY)
        gap = replace(self.options, risk=Risk.CONFIDENCE_GAP)
        flops = replace(self.options, measure="flops")
        papers = replace(self.options, thresholds="paper", measure="flops")
        rows = []
        for method, material, heads, options in (
                ("certified", self.replayed, self.searched, self.options),
                ("certified-accuracy", self.replayed, self.searched, accuracy),
                ("certified-confidence-gap", self.replayed, self.searched, gap),
                ("certified-batch-8", self.replayed, self.searched, replace(self.options, batch_size=8)),
                ("certified-batch-1", self.replayed, self.searched, replace(self.options, batch_size=1)),
                ("certified-flops", self.replayed, self.searched, flops),
                ("no-nas", self.replayed, self.default, self.options),
                ("no-replay", self.recorded, self.plain, self.options),
                *((f"paper-{count}-layers" if count > PAPER_LAYERS else "paper", self.replayed,
                   _spread(self.searched, count), papers) for count in range(PAPER_LAYERS, PAPER_LAYERS + 4)),
                ("paper-no-nas", self.recorded, _spread(self.plain, PAPER_LAYERS), papers),
                ("equal", self.replayed, self.searched, replace(papers, thresholds="equal"))):
            _say(self.subject, method)
            plan, exits = self._plan(material, heads, options)
            certificate = plan.certificate
            rows.append(row(self.subject, method, exits, full, tolerance=options.tolerance, labelled=False,
                            certificate=None if certificate is None else certificate.in_words()))
        for method, baseline in BASELINES.items():
            for max_loss in (self.options.tolerance, _close_to(rows[0]["accuracy_loss"])):
                _say(self.subject, f"{method} at an accuracy loss of {max_loss:.3f}")
                rows.append(row(self.subject, method, baseline(self._labelled(), max_loss), full, tolerance=max_loss,
                                labelled=True, certificate=None))
        return rows

    def _plan(self, material: Material, heads: Sequence[TrainedHead],
              options: TrainingOptions) -> tuple[ExitPlan, dict[str, Exit]]:
        labels = None
        if options.risk is Risk.ACCURACY:
            labels = load_labels(self.subject.labels, material.request, material.n_classes)
        description, profile = self.subject.backbone.description, None if options.measure == "flops" else self.profile
        judged = judge(material, heads, exit_costs(profile, heads, description, options), options.risk, labels)
        choice = choose(judged, options)
        plan = make_plan(choice, judged, heads, material, description, options, profile)
        by_path = {one.layer.path: one.head for one in heads}
        return plan, {planned.layer: Exit(by_path[planned.layer], planned.policy(), lambda logits: logits,
                                      planned.shrink_from)
                      for planned in plan.exits}

    def _labelled(self) -> LabelledRecords:
        material = self.recorded
        labels = load_labels(self.subject.labels, material.request, material.n_classes)
        every = torch.arange(material.n_records)
        layers = spread_over(list(material.layers), 8)
        return LabelledRecords(
            layers=tuple(layers), pooled={one.path: material.activations(one)[every].float() for one in layers},
            labels=labels, backbone_class=material.backbone_class, n_classes=material.n_classes,
            train=material.rows(Part.TRAIN), tune=torch.cat([material.rows(Part.TUNE), material.rows(Part.CERTIFY)]))


BASELINES: Mapping[str, Callable[[LabelledRecords, float], dict[str, Exit]]] = {
    "branchynet": branchynet, "gati": gati, "earlyon": earlyon}


def _spread(heads: list[TrainedHead], count: int) -> list[TrainedHead]:
    chosen = spread_over([one.layer for one in heads], count)
    return [one for one in heads if one.layer in chosen]


def _close_to(loss: float) -> float:
    """Return an accuracy loss for baselines that compares with a measured one; half a per mille at least."""
    return max(0.0005, loss)


def _say(subject: Subject, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {subject.name}: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
