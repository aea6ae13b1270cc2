"""Checks a new archive in this process, loaded as by TorchServe: whether it answers its samples as it should."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from early_exit.archiver.packaging.sources.sample import resized
from early_exit.archiver.packaging.tryout.answers import (
    Answer,
    AnsweredBatch,
    Batch,
    as_read,
    batches_of,
    load_answers,
    save_answers,
)
from early_exit.archiver.packaging.tryout.child import LoadingError, in_a_fork
from early_exit.archiver.packaging.tryout.comparison import TOLERANCE, contradictions, unstable
from early_exit.archiver.packaging.tryout.loaded_archive import EXPLAIN, LoadedArchive
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.scores import score_error
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.inference.executor import Execution
from early_exit.handler.inference.forward import Live
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.precision import rounding_error
from early_exit.handler.protocol import EXIT_HEADER, FULL, PROBE_BODY, PROBE_HEADER, SECRET_HEADER, SECRET_VARIABLE
from early_exit.handler.sample_request import Part, SampleRequest, samples_in
from early_exit.handler.user_handler.description import HandlerDescription, Root

_IN_FULL = {"exits": False, "engine": "eager", "answers": "plain", "sampling_rate": 0, "control_rate": 0}
"""The settings with which an archive answers exactly as its original does."""
_AS_SERVED = {"sampling_rate": 0, "control_rate": 0}
_SIDE_BY_SIDE_S = 60.0
"""How long several requests at once may take, when a single one was answered before."""
_CONFIGURATION, _USERS = "tried-out.yaml", "tried-out-users.yaml"


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Compare an archive's full answers with the expected ones, then try the archive out as it will serve.

    Args:
        job: "folder", the folder of an extracted archive; "samples", a text with samples that replace its own;
            "expected", a file with the expected answers; "out", the file into which the archive's answers are written.
            All but the first may be None.

    Returns:
        The archive's answers to its first sample, by the exit that gives them.

    Raises:
        LoadingError: the archive does not load, does not answer, or answers differently.
    """
    folder = Path(job["folder"])
    if job["samples"]:
        ArchiveLayout(folder).samples.write_text(job["samples"])
    if job["expected"] or job["out"]:
        in_a_fork(lambda: _answer_in_full(folder, job))  # this process has all imports, but has run nothing yet
    _configure(folder, _AS_SERVED)
    secret = os.environ[SECRET_VARIABLE] = secrets.token_hex(24)  # for this run, set before the worker loads
    archive = _loaded(folder)
    probed = SampleRequest((Part(PROBE_BODY, "application/json"),))
    [probe] = archive.answer([probed], {PROBE_HEADER: "1", SECRET_HEADER: secret})
    if probe.status != 200:
        raise LoadingError(f"the probe was answered with {probe}")
    samples = samples_in(ArchiveLayout(folder))[:2]
    service: Any = archive.roots[Root.HANDLER]
    model = service.worker.model
    # An archive that is only asked for its answers may have been made by an older version with an error of its engine.
    with nullcontext() if job["out"] else scores_compared(model, load_backbone(ArchiveLayout(folder).folder)):
        answers = _answers_by_exit(archive, samples[:1])
        model.fall_back(model.assembly.last_level)
        for batch in batches_of(len(samples)) if samples else []:
            archive.answer([samples[number] for number in batch.samples])
    if samples and service.worker.is_early:
        _try_side_by_side(archive, samples)
    return answers


@contextmanager
def scores_compared(model: EarlyExitModel, backbone: Backbone) -> Iterator[None]:
    """Compare the scores of the calls of a model, in the block, with those of the operations as they were exported.

    Answers alone would not show most errors, because a handler may return nothing but a class. The rows that left at an
    exit are not compared. For an engine that is not exact, the scores with which certificate and monitor compare its
    answers are compared instead.

    Args:
        model: the model as it serves.
        backbone: the backbone of the model.

    Raises:
        LoadingError: the scores differ by more than rounding.
    """
    if backbone.description.detector is not None:  # rounding decides which of a detector's boxes are kept
        yield
        return
    assembly, run, errors = model.assembly, model.executor.run, [0.0]

    def compared(inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        given, again = (tuple(x.clone() for x in inputs) for _ in range(2))  # the model may write into its inputs
        execution = run(inputs, level, shadow, anytime)
        rows = (execution.answers.stages == FULL).nonzero().flatten()
        reference = assembly.reference(given, rows)
        found = execution.answers.outputs[rows] if reference is None else reference
        errors.extend(score_error(*pair, backbone.description.scores)
                      for pair in zip(found, backbone.graph(*again)[rows]) if bool(pair[1].isfinite().any()))
        return execution

    model.executor.run = compared  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.executor.run = run  # type: ignore[method-assign]
    error, allowed = max(errors), max(TOLERANCE, rounding_error(backbone))
    if error > allowed:
        raise LoadingError(f"for a sample request, the engine {assembly.engine.name} computes scores that are off by "
                           f"{error:.1e} from those of the original model (allowed: {allowed:.0e}): choose another "
                           "engine, such as --engine eager")


def _try_side_by_side(archive: LoadedArchive, samples: Sequence[SampleRequest]) -> None:
    service: Any = archive.roots[Root.HANDLER]
    model = service.worker.model
    model.fall_back(model.assembly.last_level)  # all requests go through all stages, so they wait side by side
    samples = [sample for sample in (*samples, *resized(samples[0])) if archive.answer([sample])[0].status == 200]
    pair = samples if len(samples) > 1 else samples * 2

    def alone() -> list[Answer]:
        # A handler may answer with the id of the request, so each request has the same id alone as in the pair.
        return [answer for number, sample in enumerate(pair) for answer in archive.answer([sample], first=number)]

    # The numbers of an engine that is not exact depend on the rows that run together.
    compared = alone if model.assembly.engine.is_exact else None
    require_side_by_side(lambda: archive.answer(pair), compared)
    with last_first(model):
        require_side_by_side(lambda: archive.answer(pair), compared)


@contextmanager
def last_first(model: EarlyExitModel) -> Iterator[None]:
    """Let requests that reach the end together continue in the opposite order.

    In service, requests that leave early overtake others.
    """
    calls: Any = model.executor.calls  # type: ignore[attr-defined]
    run_stage = calls.run_stage
    calls.run_stage = lambda: run_stage()[::-1]
    try:
        yield
    finally:
        calls.run_stage = run_stage


def require_side_by_side(ask: Callable[[], Sequence[Answer]], alone: Callable[[], Sequence[Answer]] | None = None,
                         limit_s: float = _SIDE_BY_SIDE_S) -> None:
    """Refuse a handler whose calls cannot run side by side.

    Such a handler cannot begin with a request while another request waits in its call of the model, or it answers with
    what it has kept of the other request.

    Args:
        ask: sends several requests at once and returns their answers.
        alone: sends each of these requests alone and returns their answers; None if the answers are not compared.
            Where the handler answers differently when it is asked twice, the answers are not compared.
        limit_s: how long the answers to the requests at once may take.

    Raises:
        LoadingError: the requests were not answered, or differently than alone.
    """
    before = tuple(alone()) if alone is not None else ()
    advice = ("with early answers, calls of a handler run side by side, which is not possible while a handler holds a "
              "lock or an event loop of its own around the call of its model. Set 'answers: plain', or call the model "
              "outside of the lock or loop")
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.extend(ask()), daemon=True)  # if it hangs, it is never joined
    asking.start()
    asking.join(limit_s)
    if not answers:
        raise LoadingError(f"requests that came at once were not answered within {limit_s:.0f} s: {advice}")
    if wrong := [answer for answer in answers if answer.status != 200]:
        raise LoadingError(f"of several requests that came at once, one was answered with {wrong[0]}: {advice}")
    if alone is None:
        return
    # Asked again afterwards, so that a clock or a counter has moved on in between.
    expected = AnsweredBatch(Batch(tuple(range(len(before)))), before, unstable(before, alone()))
    if told := contradictions(expected, answers):
        raise LoadingError("with early answers, a request is answered differently when another one comes at once. The "
                           "handler keeps something of a request where the request beside it overwrites or takes it, "
                           "such as a tensor, an array, a queue.Queue or an attribute of a class. Set "
                           "'answers: plain', or keep it in local variables:\n" + "\n".join(told[:3]))


def _answers_by_exit(archive: LoadedArchive, samples: Sequence[SampleRequest]) -> dict[str, Any]:
    """Return the answers to a sample at every fallback level, by the exit that gives them; the last level answers in
    full."""
    if not samples:
        return {}
    [first], [second] = archive.answer(samples), archive.answer(samples)
    if first.status != 200:
        raise LoadingError(f"a request was answered with {first}")
    if first != second or as_read(first.body) is None:
        return {}  # an answer that differs from call to call cannot be compared with a server's
    service: Any = archive.roots[Root.HANDLER]
    model = service.worker.model
    answers: dict[str, Any] = {}
    for level in range(model.assembly.last_level + 1):
        model.fall_back(level)
        [answer] = archive.answer(samples)
        answers.setdefault(answer.headers.get(EXIT_HEADER, ""), as_read(answer.body))
    return answers


def _answer_in_full(folder: Path, job: Mapping[str, Any]) -> None:
    _configure(folder, _IN_FULL)
    archive, samples = _loaded(folder), samples_in(ArchiveLayout(folder))
    reached: list[object] = []
    service: Any = archive.roots[Root.HANDLER]
    service.worker.model.register_forward_hook(lambda *_: reached.append(_))
    expected = load_answers(Path(job["expected"])) if job["expected"] else None
    batches = [one.batch for one in expected] if expected is not None else batches_of(len(samples))
    found, told = [], []
    for number, batch in enumerate(batches):
        answers = archive.answer([samples[sample] for sample in batch.samples], EXPLAIN if batch.explain else {})
        found.append(AnsweredBatch(batch, tuple(answers)))
        told += contradictions(expected[number], answers) if expected is not None else []
    if told:
        raise LoadingError("without exits, the new archive answers differently from the original:\n"
                           + "\n".join(told[:3]))
    if batches and not reached:
        raise LoadingError("the new archive answers without calling the exported model: the handler calls another one, "
                           "or adds a hook to its model for each request; let it add the hook once, in initialize()")
    if expected is None:
        save_answers(Path(job["out"]), found)


def _loaded(folder: Path) -> LoadedArchive:
    description = HandlerDescription.load(ArchiveLayout(folder).handler_description)
    return LoadedArchive(folder, description.service_envelope)


def _configure(folder: Path, settings: Mapping[str, Any]) -> None:
    """Set the settings of `early_exit` with which an archive is loaded next."""
    layout = ArchiveLayout(folder)
    manifest = json.loads(layout.manifest.read_text())
    kept = folder / _USERS
    if not kept.exists():
        name = manifest["model"].get("configFile")
        kept.write_text((folder / name).read_text() if name else "")
    user = yaml.safe_load(kept.read_text()) or {}
    user["early_exit"] = {**(user.get("early_exit") or {}), **settings}
    (folder / _CONFIGURATION).write_text(yaml.safe_dump(user))
    manifest["model"]["configFile"] = _CONFIGURATION
    layout.manifest.write_text(json.dumps(manifest))
