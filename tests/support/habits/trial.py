"""Trials of habits: clients send the same requests to an original archive and to those that `ee-archive` made of it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.archive_layout import MANIFEST
from tests.support.habits.agreement import Answer, difference
from tests.support.habits.exits import copied_exits
from tests.support.habits.habit import Ask, Habit, Over
from tests.support.habits.packing import SUFFIXES, Refused, asked, build_all, original
from tests.support.habits.serving import Served, alone, left_and_stayed, serving, together
from tests.support.rewritten import rewritten
from tests.support.untried import build_untried
from tests.support.without_openvino import without_openvino

EXITS = "early_exit:\n  control_rate: 0\n"
"""The configuration with exits, which are never bypassed, even if they save no time."""
EARLY = EXITS + "  answers: early\ncontinuousBatching: true\n"
WITHOUT_EXITS, WITH_EXITS, EARLY_ANSWERS = "without exits", "with exits", "with early answers"
WAYS = (WITHOUT_EXITS, WITH_EXITS, EARLY_ANSWERS)
"""The ways in which our archives may answer."""


@dataclass
class Trial:
    """The trial of a habit."""

    habit: Habit
    folder: Path
    """The folder for the files of the habit."""
    ours: dict[str, Served] = field(default_factory=dict)
    """Our version for each way of answering."""
    refused: Refused | None = None
    """The refusal of the original archive by `ee-archive`, if any."""
    wrong: list[str] = field(default_factory=list)
    """How a client would notice the difference. It is empty if none would."""
    first: list[Answer] = field(default_factory=list)
    """The original's answers to requests that are sent one after the other."""
    again: list[Answer] = field(default_factory=list)
    """The original's answers to the same requests a second time."""
    in_batches: list[Answer] = field(default_factory=list)
    """The original's answers to requests that TorchServe puts into batches."""

    @property
    def same(self) -> bool:
        return not self.wrong and self.refused is None

    @property
    def original(self) -> Served:
        suffix = SUFFIXES[self.habit.archive_format]
        return Served(self.habit.name, self.habit.version, self.habit.name + suffix, is_node(self.habit))

    @property
    def batchable(self) -> list[Ask]:
        """The requests that may be in a batch with others."""
        return [ask for ask in self.habit.asks if not ask.explain and not ask.fails and ask.over is Over.REST]

    def __str__(self) -> str:
        verdict = "same" if self.same else "WRONG" if self.wrong else "refused"
        return f"{self.habit.name:28}{verdict:9}{'; '.join(self.wrong) or self.refused or ''}".rstrip()


def try_habits(habits: Sequence[Habit], folder: Path, *, ways: Sequence[str] = WAYS, at_once: int = 8,
               build: Callable[[ArchiveRequest], Path] = build_archive,
               log: Callable[[str], None] = lambda line: None) -> list[Trial]:
    """Return the result of the trial of each habit.

    Args:
        habits: the habits to try.
        folder: the folder for everything that is written.
        ways: the ways of answering to try.
        at_once: how many habits are served side by side. Each one takes a worker.
        build: a function that makes our archive from an original.
        log: a function that is called with a line about each habit.
    """
    store = folder / "store"
    store.mkdir(parents=True)
    trials = [Trial(habit, folder / "users" / habit.name) for habit in habits]
    for envelope in dict.fromkeys(habit.envelope for habit in habits):
        own = [trial for trial in trials if trial.habit.envelope == envelope]
        state, config = folder / f"state-{envelope}", configuration(folder, envelope)
        with without_openvino(folder / "without"), TorchServe(store, state, Addresses.free(), config=config) as server:
            for start in range(0, len(own), at_once):
                _try(own[start:start + at_once], server, ways, build)
                for trial in own[start:start + at_once]:
                    log(str(trial))
    return trials


def configuration(folder: Path, envelope: str | None) -> Path:
    """Write a configuration of TorchServe with the envelope, if one is given; return its path."""
    config = folder / f"{envelope}.properties"
    config.write_text(f"service_envelope={envelope}\n" if envelope else "")
    return config


def _try(trials: Sequence[Trial], server: TorchServe, ways: Sequence[str],
         build: Callable[[ArchiveRequest], Path]) -> None:
    _adopt(trials, server.model_store, build)
    _add_exits([trial for trial in trials if trial.ours and trial.habit.followers], server.model_store)
    _ask_originals(trials, server)
    for way in ways:
        _ask_ours([trial for trial in trials if way in trial.ours], way, server)


def _adopt(trials: Sequence[Trial], store: Path, build: Callable[[ArchiveRequest], Path]) -> None:
    """Make the original archives, and from each of them our archive without exits."""
    sources = [original(trial.habit, trial.folder, store) for trial in trials]
    requests = [asked(trial.habit, source, trial.folder, store) for trial, source in zip(trials, sources)]
    for trial, outcome in zip(trials, build_all(requests, build)):
        if isinstance(outcome, Refused):
            trial.refused = outcome
        else:
            trial.ours[WITHOUT_EXITS] = _served(outcome, trial.habit)


def _add_exits(trials: Sequence[Trial], store: Path) -> None:
    """Make an archive with exits from each archive without exits, and from that one an archive with early answers."""
    for trial in trials:
        habit, recorder = trial.habit, store / trial.ours[WITHOUT_EXITS].file_name
        config = trial.folder / "exits.yaml"
        config.write_text(habit.config + EXITS)
        try:
            plan = copied_exits(trial.folder / "plan", recorder, habit.followers(habit.model()), habit.thresholds)
            exits = build_untried(ArchiveRequest(str(recorder), store, plan=plan, config=config,
                                                 version=f"{trial.ours[WITHOUT_EXITS].version}.exits"))
        except Exception as error:  # a habit that cannot have exits must not stop the others
            trial.wrong.append(f"{WITH_EXITS}: {type(error).__name__}: {error}")
            continue
        served = trial.ours[WITH_EXITS] = _served(exits, habit)
        early = rewritten(exits, store / f"{habit.name}-early.mar", **{
            MANIFEST: lambda text, version=served.version: text.replace(f'"{version}"', f'"{version}.early"'),
            "model-config.yaml": (habit.config + EARLY).encode()})
        trial.ours[EARLY_ANSWERS] = _served(early, habit)


def _served(mar: Path, habit: Habit) -> Served:
    with zipfile.ZipFile(mar) as archive:
        return Served(habit.name, json.loads(archive.read(MANIFEST))["model"]["modelVersion"], mar.name,
                      is_node(habit))


def is_node(habit: Habit) -> bool:
    """Tell whether some requests of a habit go through a workflow."""
    return any(ask.over is Over.WORKFLOW for ask in habit.asks)


def _ask_originals(trials: Sequence[Trial], server: TorchServe) -> None:
    def ask(trial: Trial) -> None:
        if trial.original in troubles:
            trial.wrong.append(f"stock TorchServe does not serve it: {troubles[trial.original]}")
            return
        trial.first, trial.again = (alone(server, trial.original, trial.habit.asks) for _ in range(2))
        trial.in_batches = together(server, trial.original, trial.batchable)

    with serving(server, [trial.original for trial in trials]) as troubles:
        _side_by_side(ask, trials)


def _ask_ours(trials: Sequence[Trial], way: str, server: TorchServe) -> None:
    def ask(trial: Trial) -> None:
        served = trial.ours[way]
        told = troubles.get(served) or _noticed(trial, served, server)
        if not told and way != WITHOUT_EXITS:
            left, stayed = left_and_stayed(server, served)
            told = "" if left and stayed else f"{left} rows left and {stayed} stayed, where both are to be tried"
        trial.wrong += [f"{way}: {told}"] if told else []

    with serving(server, [trial.ours[way] for trial in trials]) as troubles:
        _side_by_side(ask, trials)


def _side_by_side(ask: Callable[[Trial], None], trials: Sequence[Trial]) -> None:
    """Send the requests of all trials at the same time, because each trial mostly waits for its batches."""
    with ThreadPoolExecutor(max(1, len(trials))) as pool:
        list(pool.map(ask, trials))


def _with_version(answer: Answer, found: str, expected: str) -> Answer:
    """Return an answer in which the version, if it is named as in an envelope, is replaced by the expected one."""
    said = (f'"model_version": "{version}"'.encode() for version in (found, expected))
    return replace(answer, body=answer.body.replace(*said))


def _noticed(trial: Trial, served: Served, server: TorchServe) -> str:
    """Return how a client would notice that a version answers instead of the original, or an empty text."""
    habit = trial.habit
    batchable = [number for number, ask in enumerate(habit.asks) if ask in trial.batchable]
    for asks, found, expected, again in (
            (habit.asks, alone(server, served, habit.asks), trial.first, trial.again),
            (trial.batchable, together(server, served, trial.batchable), trial.in_batches,
             [trial.first[number] for number in batchable])):
        for ask, *answers in zip(asks, found, expected, again):
            answers[0] = _with_version(answers[0], served.version, habit.version)
            if told := difference(*answers, exact=ask.exact):
                return f"{'explanation of ' if ask.explain else ''}{ask.body[:60]!r}: {told}"
    return ""
