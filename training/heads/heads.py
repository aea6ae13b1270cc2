"""From a training set to trained heads: find an architecture for each layer, then train it in full."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from safetensors.torch import load_file, save_file
from tqdm import tqdm

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.distill import Classify
from early_exit.training.heads.nni_service import search_in_service
from early_exit.training.heads.search import best_trial, search_layer
from early_exit.training.heads.space import default_head, given_head
from early_exit.training.heads.trial import Evaluator, Trial
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths, replacing

HeadCost = Callable[[Head, CandidateLayer], float]
"""The cost of a head at a layer as a fraction of the backbone's."""


@dataclass(frozen=True)
class TrainedHead:
    """A head and how it came about."""

    layer: CandidateLayer
    head: Head
    trials: tuple[Trial, ...] = ()
    """Of the search; empty for a head that was given."""


def find_architectures(run: RunPaths, training_set: TrainingSet, options: TrainingOptions, head_cost: HeadCost,
                       log: Callable[[str], None] = lambda line: None,
                       ) -> tuple[dict[str, tuple[HeadSpec, tuple[Trial, ...]]], list[str]]:
    """Return the architecture for each layer that is worth a head, and why the others are not.

    Raises:
        ConfigError: a head that the user gives is for no layer of these records, or cannot be trained on them.
    """
    found: dict[str, tuple[HeadSpec, tuple[Trial, ...]]] = {}
    dropped: list[str] = []
    search = options.search
    given = options.space.heads
    _require_known(given, [layer.path for layer in training_set.layers])
    n_trials = search.trials * sum(layer.path not in given for layer in training_set.layers) if search else 0
    with tqdm(total=n_trials, desc="search", unit="trial", disable=None if n_trials else True) as progress:
        for layer in training_set.layers:
            progress.set_postfix_str(layer.path)
            if layer.path in given:
                found[layer.path] = given_head(given[layer.path], training_set.recorded), ()
            elif search is None:
                found[layer.path] = default_head(training_set.recorded), ()
            else:
                evaluator = Evaluator(layer, training_set, options.tolerance, options.trial_recipe, head_cost)
                if options.service is None:
                    trials = search_layer(evaluator, options.space, search, run, progress.update)
                else:
                    trials = search_in_service(evaluator, options.space, search, options.service, run, log,
                                               progress.update)
                best = best_trial(trials)
                if best is None:
                    n_stopped = sum(trial.stopped for trial in trials)
                    dropped.append(f"{layer.path}: none of {len(trials)} heads is better than chance"
                                   + (f", {n_stopped} of which were given up early" if n_stopped else ""))
                else:
                    found[layer.path] = best.head, tuple(trials)
    return found, dropped


def _require_known(given: Iterable[str], layers: Sequence[str]) -> None:
    """Check that heads are given only for layers that there are records of."""
    for path in given:
        if path not in layers:
            close = difflib.get_close_matches(path, layers, n=1)
            raise ConfigError(f"a head is given for {path!r}, which is no layer that this run has records of: "
                              + (f"did you mean {close[0]!r}? " if close else "")
                              + f"There are {', '.join(layers)}; --layers and early_exit.layers say how many")


def train_heads(run: RunPaths, training_set: TrainingSet, options: TrainingOptions,
                architectures: dict[str, tuple[HeadSpec, tuple[Trial, ...]]], head_cost: HeadCost) -> list[TrainedHead]:
    """Train the chosen heads in full, in the order of the backbone; those that are trained already are read."""
    layers = [layer for layer in training_set.layers if layer.path in architectures]
    evaluators = [Evaluator(layer, training_set, options.tolerance, options.recipe, head_cost) for layer in layers]
    trained = []
    with tqdm(total=sum(one.n_steps() for one in evaluators), desc="heads", unit="step", disable=None) as progress:
        def on_step(step: int, classify: Classify) -> bool:
            progress.update()
            return True

        for layer, evaluator in zip(layers, evaluators):
            spec, trials = architectures[layer.path]
            path = run.head(layer.path)
            if path.exists():
                head = Head(spec, layer.shape, training_set.n_classes).eval().requires_grad_(False)
                head.load_state_dict(load_file(path))
                progress.update(evaluator.n_steps())
            else:
                progress.set_postfix_str(layer.path)
                head = evaluator.train(spec, on_step)
                with replacing(path) as scratch:
                    save_file(head.state_dict(), scratch)
            trained.append(TrainedHead(layer, head, trials))
    return trained
