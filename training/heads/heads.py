"""From a training set to trained heads: find an architecture for each layer, then train it in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from safetensors.torch import load_file, save_file
from tqdm import tqdm

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.errors import ConfigError, did_you_mean
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.files.private import replacing
from early_exit.training.heads.distill import Classify
from early_exit.training.heads.nni_service import Service, search_in_service
from early_exit.training.heads.search import Search, best_trial, search_layer
from early_exit.training.heads.space import SearchSpace, default_head, given_head
from early_exit.training.heads.trial import Evaluator, Trial
from early_exit.training.paths import RunPaths


@dataclass(frozen=True)
class Architecture:
    """The head that a layer will get, and the trials that led to it."""

    spec: HeadSpec
    trials: tuple[Trial, ...] = ()
    """The trials of the search; empty for a head that was given."""


@dataclass(frozen=True)
class TrainedHead:
    """A trained head, and the trials that led to it."""

    layer: CandidateLayer
    head: Head
    trials: tuple[Trial, ...] = ()
    """The trials of the search; empty for a head that was given."""


def find_architectures(evaluators: Sequence[Evaluator], run: RunPaths, space: SearchSpace, search: Search | None,
                       service: Service | None = None, log: Callable[[str], None] = lambda line: None,
                       ) -> tuple[dict[str, Architecture], list[str]]:
    """Return the architecture of each layer's head, by layer path, and the reasons why the other layers get no head.

    Args:
        evaluators: one for each layer, in the order of the backbone.
        run: the folder in which trials are kept.
        space: the search space, and the heads that the user gives.
        search: the extent of the search; without one, every layer gets the default head unless the user gives one.
        service: NNI's service, if trials do not run in this process.
        log: receives lines for the user.

    Raises:
        ConfigError: a head that the user gives is for no layer of these records, or cannot be trained on them.
    """
    architectures: dict[str, Architecture] = {}
    dropped: list[str] = []
    _require_known(space.heads, [evaluator.layer.path for evaluator in evaluators])
    n_trials = search.trials * sum(evaluator.layer.path not in space.heads for evaluator in evaluators) if search else 0
    with tqdm(total=n_trials, desc="search", unit="trial", disable=None if n_trials else True) as progress:
        for evaluator in evaluators:
            path, recorded = evaluator.layer.path, evaluator.training_set.recorded
            progress.set_postfix_str(path)
            if path in space.heads:
                architectures[path] = Architecture(given_head(space.heads[path], recorded))
            elif search is None:
                architectures[path] = Architecture(default_head(recorded))
            else:
                if service is None:
                    trials = search_layer(evaluator, space, search, run, progress.update)
                else:
                    trials = search_in_service(evaluator, space, search, service, run, log, progress.update)
                best = best_trial(trials)
                if best is None:
                    n_stopped = sum(trial.stopped for trial in trials)
                    dropped.append(f"{path}: none of {len(trials)} heads is better than chance"
                                   + (f", {n_stopped} of which were stopped early" if n_stopped else ""))
                else:
                    architectures[path] = Architecture(best.head, tuple(trials))
                if progress.disable:  # no terminal shows how far the search is
                    log(f"{path}: searched, {len(architectures) + len(dropped)} of {len(evaluators)} layers")
    return architectures, dropped


def _require_known(given: Iterable[str], layers: Sequence[str]) -> None:
    """Check that heads are given only for layers that have records."""
    for path in given:
        if path not in layers:
            raise ConfigError(f"a head is given for {path!r}, but this run has no records of that layer (--layers and "
                              f"early_exit.layers limit the number of layers): {did_you_mean(path, layers)}")


def train_heads(evaluators: Sequence[Evaluator], architectures: Mapping[str, Architecture],
                run: RunPaths) -> tuple[list[TrainedHead], list[str]]:
    """Train the chosen heads in full; heads that were trained already are read from the run.

    Args:
        evaluators: one for each layer, in the order of the backbone, with the recipe for the final training.
        architectures: by layer path; layers without one are skipped.
        run: the folder in which heads are kept.

    Returns:
        The heads that are better than chance, in the order of the backbone, and why the others are dropped.
    """
    chosen = [evaluator for evaluator in evaluators if evaluator.layer.path in architectures]
    heads, dropped = list[TrainedHead](), list[str]()
    with tqdm(total=sum(evaluator.n_steps() for evaluator in chosen), desc="heads", unit="step",
              disable=None) as progress:
        def on_step(step: int, classify: Classify) -> bool:
            progress.update()
            return True

        for evaluator in chosen:
            layer = evaluator.layer
            architecture, path = architectures[layer.path], run.head(layer.path)
            if path.exists():
                head = Head(architecture.spec, layer.shape, evaluator.training_set.n_classes)
                head.eval().requires_grad_(False).load_state_dict(load_file(path))
                progress.update(evaluator.n_steps())
            else:
                progress.set_postfix_str(layer.path)
                head = evaluator.train(architecture.spec, on_step)
                with replacing(path) as scratch:
                    save_file(head.state_dict(), scratch)
            if evaluator.beats_chance(head):
                heads.append(TrainedHead(layer, head, architecture.trials))
            else:
                dropped.append(f"{layer.path}: its head is not better than chance")
    return heads, dropped
