"""Run by `adopt` in a fresh process: loads the user's archive as TorchServe does, exports its model, and keeps its
answers.

Usage: original.py JOB.json
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from early_exit.archiver.packaging.sources.eager_model import model_from_factory
from early_exit.archiver.packaging.sources.envelopes import in_one, n_instances
from early_exit.archiver.packaging.sources.sample import sample_images
from early_exit.archiver.packaging.tryout.adoption import (
    CalledModel,
    called_model,
    held_model,
    probed,
    require_fixed,
    require_same,
)
from early_exit.archiver.packaging.tryout.answers import AnsweredBatch, Batch, batches_of, save_answers
from early_exit.archiver.packaging.tryout.child import LoadingError, answer_parent, in_a_fork
from early_exit.archiver.packaging.tryout.comparison import unstable
from early_exit.archiver.packaging.tryout.exporting import exported, images_of
from early_exit.archiver.packaging.tryout.loaded_archive import EXPLAIN, LoadedArchive
from early_exit.archiver.packaging.tryout.model_calls import ModelCall, recorded_calls
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.export import backbone_graph
from early_exit.handler.backbone.graph import inputs_of
from early_exit.handler.backbone.program_file import load_program
from early_exit.handler.sample_request import SampleRequest, parse_samples, samples_text
from early_exit.handler.user_handler.description import HandlerDescription, Loading
from early_exit.handler.user_handler.model_state import ModelState
from early_exit.handler.user_handler.places import modules_reached, put
from early_exit.handler.user_handler.rows import Rows, RowsPerRequest, called_often, n_rows_of, rows_per_request
from early_exit.handler.user_handler.wrapper import LOADERS, given_to_loaders


class Original:
    """The user's archive in this process."""

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the result of torch.compile cannot be exported
        self.job = job
        self.folder = Path(job["folder"])
        self.given = _given_model(job)
        self.envelope = job["envelope"]
        with _found_by_loaders(self.given) as self.loaders_called:
            self.archive = LoadedArchive(self.folder, job["envelope"])
        self.roots = self.archive.roots
        if self.given is not None and not any(module is self.given for _, module in modules_reached(self.roots)):
            put(self.roots, HandlerDescription().model[0], self.given)

    def reached(self) -> list[nn.Module]:
        return list({id(module): module for _, module in modules_reached(self.roots)}.values())

    def together(self, first: SampleRequest, second: SampleRequest) -> list[SampleRequest]:
        """Return the requests that ask for two samples at once: a batch, or, in an envelope, one request for both."""
        return [first, second] if self.envelope is None else [in_one(first, second)]

    def of_an_instance(self, rows: RowsPerRequest, samples: Sequence[SampleRequest]) -> RowsPerRequest:
        """Return the number of rows of each instance, if the number of rows of each request is known."""
        counts = {n_instances(sample) for sample in samples[:2]} if self.envelope else {1}
        if rows.count is None or counts == {1}:
            return rows
        if len(counts) > 1 or rows.count % max(counts):
            return RowsPerRequest(None, f"the handler makes {rows.count} rows of a request of {max(counts)} instances")
        return RowsPerRequest(rows.count // max(counts))

    def calls(self, samples: Sequence[SampleRequest]) -> list[ModelCall]:
        """Return the calls of modules that a batch leads to; none if the handler fails."""
        with recorded_calls(self.reached()) as calls:
            answers = self.archive.answer(samples)
        return calls if all(answer.status == 200 for answer in answers) else []


def adopt(job: dict[str, Any]) -> list[str]:
    """Export the model of a user's archive, and write the description of its handler.

    Args:
        job: as `adopt` in `trials.py` makes it.

    Returns:
        The batches whose answers differ each time, so that they cannot be compared.
    """
    original = Original(job)
    samples, first_calls = _samples_that_reach(original)
    # A handler that caches answers calls its model for the first of equal requests only.
    calls = original.calls(samples[:1]) or first_calls[0] if samples else []
    model = called_model(calls, original.roots) if samples else held_model(original.roots)
    before = ModelState(model.exported, numbers=True)
    rows = RowsPerRequest(HandlerDescription().rows_per_request)  # until two samples, or a worker's own check, say more
    alone: list[list[ModelCall]] = []
    if samples:
        alone = [model.calls(calls), *(_calls_of(model, original, [sample]) or model.calls(first)
                                       for sample, first in zip(samples[1:2], first_calls[1:]))]
        require_fixed(model, [call for calls in alone for call in calls])
        # This is checked after the second sample, because the last batch may restore the state before the first one.
        require_same(before, [call for calls in (*first_calls, *alone) for call in model.calls(calls)])
    together: list[list[ModelCall]] = []
    if len(samples) > 1:
        together = [_calls_of(model, original, original.together(samples[first], samples[second]))
                    for first, second in ((0, 1), (1, 0))]
    if not in_a_fork(lambda: _exported(job, model, alone, together)):
        samples = []
    if together and samples:
        rows = original.of_an_instance(
            rows_per_request(*([_rows(call) for call in calls] for calls in (*alone, *together))), samples)
    elif samples:
        rows = original.of_an_instance(RowsPerRequest(n_rows_of(_rows(alone[0][0]))), samples) if (
            len(alone[0]) == 1) else called_often(len(alone[0]))
    answered = _answers(original, samples)
    require_same(before, [call for calls in together for call in calls])
    folder = Path(job["out"])
    layout = ArchiveLayout(folder)
    layout.folder.mkdir()
    (layout.samples).write_text(samples_text(samples))
    save_answers(layout.answers, answered)
    # In place of several models, the worker would give the handler this one several times.
    is_given = len(original.loaders_called) == 1
    HandlerDescription(model.places, Loading.GIVEN if is_given else Loading.OWN, rows.count,
                       rows.unknown_because, job["envelope"], is_used_as_given=original.given is None
                       ).save(layout.handler_description)
    return [str(one.batch) for one in answered if all("$" in paths for paths in one.unstable)]


def _exported(job: dict[str, Any], model: CalledModel, alone: Sequence[Sequence[ModelCall]],
              together: Sequence[Sequence[ModelCall]]) -> bool:
    """Export a model; return whether its calls, for single samples and for two together, fit the exported backbone.

    This runs in a separate process, because an export changes the model, which the handler still needs for answers, and
    because threads of the handler could call the model during the export.
    """
    torch.set_num_threads(1)  # OpenMP's threads do not exist in the fork
    backbone, fits = exported(job, model, [call for calls in (*alone, *together) for call in calls])
    probed(backbone, model, [call for calls in alone for call in calls] if fits else []).save(Path(job["out"]))
    return fits


def _samples_that_reach(original: Original) -> tuple[list[SampleRequest], list[list[ModelCall]]]:
    """Return the samples that the archive answers and whose answers need a model, and the calls that each led to.

    Raises:
        LoadingError: the archive does not answer one of the user's own samples.
    """
    samples = parse_samples(original.job["samples"], "--request")
    if not original.job["own_samples"] and isinstance(original.given, fx.GraphModule):
        first = inputs_of(original.given.graph)[0].meta["val"]
        samples = tuple(sample_images([int(size) for size in first.shape[1:]]))
    reaching, reached = [], []
    for number, sample in enumerate(samples):
        with recorded_calls(original.reached()) as calls:
            [answer] = original.archive.answer([sample])
        if answer.status == 200 and (calls or original.job["own_samples"]):
            reaching.append(sample)
            reached.append(calls)
        elif number < original.job["own_samples"]:
            raise LoadingError(f"the archive does not answer the sample request, so it cannot be tried out: {answer}")
        elif not number:
            return [], []
    return reaching, reached


def _calls_of(model: CalledModel, original: Original, samples: Sequence[SampleRequest]) -> list[ModelCall]:
    return model.calls(original.calls(samples))


def _rows(call: ModelCall) -> Rows:
    """Return the tensors of a call; if they are a detector's list of images, each image as a row."""
    values = [*call.given, *call.named.values()]
    tensors = tuple(value for value in values if isinstance(value, Tensor))
    return tensors or tuple(image.flatten()[None] for image in images_of(call))


def _answers(original: Original, samples: list[SampleRequest]) -> list[AnsweredBatch]:
    """Return the answers to all batches of the samples; each batch is sent twice."""
    answered = []
    batches = batches_of(len(samples)) if samples else []
    for batch in [*batches, *(Batch(batch.samples, explain=True) for batch in batches[:1])]:
        chosen, headers = [samples[number] for number in batch.samples], EXPLAIN if batch.explain else {}
        first = original.archive.answer(chosen, headers)
        if batch.explain and any(answer.status != 200 for answer in first):
            continue  # the handler has no explanations
        second = original.archive.answer(chosen, headers)
        differing = unstable(first, second)
        if original.envelope == "kservev2":  # its answers name the version, and the new archive has another one
            differing = tuple((*paths, "$.model_version") for paths in differing)
        answered.append(AnsweredBatch(batch, tuple(first), differing))
    return answered


def _given_model(job: dict[str, Any]) -> nn.Module | None:
    """Return the model that is given apart from the archive's files, if there is one."""
    if job["program"] is not None:
        return backbone_graph(load_program(Path(job["program"])))
    if job["factory"] is None:
        return None
    sys.path[:0] = [path for path in job["factory_paths"] if path]
    return model_from_factory(job["factory"], Path(job["weights"]))


@contextlib.contextmanager
def _found_by_loaders(model: nn.Module | None) -> Any:
    """Let TorchServe's base handler load a given model; without one, only note how many models it loads."""
    from ts.torch_handler.base_handler import BaseHandler

    called: list[str] = []
    if model is not None:
        called.append("given")
        with given_to_loaders(None, lambda: model):
            yield called
        return
    before = {name: getattr(BaseHandler, name) for name in LOADERS if hasattr(BaseHandler, name)}

    def noted(load: Any) -> Any:
        def read(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append("read")
            return load(self, *args, **kwargs)

        return read

    for name, load in before.items():
        setattr(BaseHandler, name, noted(load))
    try:
        yield called
    finally:
        for name, load in before.items():
            setattr(BaseHandler, name, load)


if __name__ == "__main__":
    answer_parent(adopt)
