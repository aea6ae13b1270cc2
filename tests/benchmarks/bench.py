"""What methods may choose exits with: a subject's records, replays of these records, and heads trained on both."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from early_exit.handler.backbone.candidates import CandidateLayer, spread_over
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
from tests.benchmarks.baselines.labelled import LabelledRecords
from tests.benchmarks.subjects import Subject

BATCH = 32
"""The batch size for which exits are chosen, and for which it is decided when a batch shrinks."""


@dataclass(frozen=True)
class Bench:
    """A subject's records, and heads of several kinds, which are trained when a method first asks for them."""

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

    def layers(self, count: int | None) -> tuple[CandidateLayer, ...]:
        """Return at most `count` candidate layers, spread over the backbone's cost. Every method gets the same ones."""
        candidates = self.recorded.layers
        return tuple(candidates if count is None else spread_over(list(candidates), count))

    def shrinking(self, exits: Mapping[str, Exit], batch_size: int) -> dict[str, Exit]:
        """Return exits that shrink batches where that pays on this machine, as the exits of a plan do.

        Args:
            exits: the exits. Keys are layer paths.
            batch_size: the size of full batches.
        """
        paths = [layer.path for layer in self.recorded.layers if layer.path in exits]
        least = self.profile.shrink_from(paths, batch_size) if paths else ()
        return {path: replace(exits[path], shrink_from=n) for path, n in zip(paths, least)}

    @cached_property
    def replayed(self) -> TrainingSet:
        """The records and their replays, or the records alone if the subject has no replays."""
        return self._replayed("searched", self.subject.replay)

    @cached_property
    def of_one_class(self) -> TrainingSet:
        """The same with replays that show a single class each, for methods that learn from labels."""
        replay = self.subject.replay
        if replay is None or MIXUP not in replay.augmentations:
            return self.replayed
        others = tuple(name for name in replay.augmentations if name != MIXUP)
        return self._replayed("labelled", replace(replay, augmentations=others))

    def _replayed(self, name: str, replay: Replay | None) -> TrainingSet:
        if replay is None:
            return self.recorded
        self.say(f"replaying for '{name}'")
        archive = self.subject.archive
        with preprocessing(archive.root, json.loads(archive.original_manifest.read_text())) as handler:
            return replay_records(RunPaths(self.folder / name).training_set, self.traffic, self.recorded.layers,
                                  self.subject.backbone, handler, replay)

    @cached_property
    def searched(self) -> list[TrainedHead]:
        return self._trained("searched", self.replayed, self.options)

    @cached_property
    def default(self) -> list[TrainedHead]:
        """Heads of the default architecture, trained with replays."""
        return self._trained("default", self.replayed, replace(self.options, search=None))

    @cached_property
    def plain(self) -> list[TrainedHead]:
        """Heads of the default architecture, trained on the records alone."""
        return self._trained("plain", self.recorded, replace(self.options, search=None))

    def _trained(self, name: str, training_set: TrainingSet, options: TrainingOptions) -> list[TrainedHead]:
        self.say(f"training the heads '{name}'")
        run, head_cost = RunPaths(self.folder / name), TimeCost(self.profile, BATCH, options.policy)
        trials_on = evaluators_of(training_set, options.tolerance, options.trial_recipe, head_cost, options.policy)
        architectures, _ = find_architectures(trials_on, run, options.space, options.search)
        trainings = evaluators_of(training_set, options.tolerance, options.recipe, head_cost, options.policy)
        heads, _ = train_heads(trainings, architectures, run)
        return heads

    @cached_property
    def certify_accuracy(self) -> float:
        """The backbone's accuracy on the records that certify, which tells whether they are easier than others."""
        recorded = self.recorded
        labels = load_labels(self.subject.labels, recorded.request, recorded.row, recorded.n_classes)
        rows = recorded.rows(Part.CERTIFY)
        return (recorded.backbone_class[rows] == labels[rows]).double().mean().item()

    @cached_property
    def labelled(self) -> LabelledRecords:
        """What the baselines get, for all layers. A replay has the label of the request that it replays."""
        training_set = self.of_one_class
        labels = load_labels(self.subject.labels, training_set.request, training_set.row, training_set.n_classes)
        originals = training_set.split.rows(Part.TRAIN)
        n_rounds = (len(training_set.backbone_class) - training_set.n_records) // max(1, len(originals))
        layers = training_set.layers
        return LabelledRecords(
            layers=tuple(layers), recorded=training_set.recorded,
            pooled={one.path: training_set.activations(one) for one in layers},
            labels=torch.cat([labels, labels[originals].repeat(n_rounds)]), backbone_class=training_set.backbone_class,
            n_classes=training_set.n_classes, train=training_set.rows(Part.TRAIN),
            tune=torch.cat([training_set.rows(Part.TUNE), training_set.rows(Part.CERTIFY)]))

    def say(self, what: str) -> None:
        """Print what is being done."""
        print(f"{time.strftime('%H:%M:%S')} {self.subject.name}: {what}", file=sys.stderr, flush=True)
