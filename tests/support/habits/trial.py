"""Tries habits: clients ask the original archive and those that `ee-archive` made of it the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.archive_layout import MANIFEST
from tests.support.habits.agreement import Answer, difference
from tests.support.habits.exits import copied_exits
from tests.support.habits.habit import Ask, Habit
from tests.support.habits.packing import Refused, build_all, original
from tests.support.habits.serving import Served, alone, left_and_stayed, serving, together
from tests.support.rewritten import rewritten

EXITS = "early_exit:\n  control_rate: 0\n"
"""Exits are not bypassed, whatever time they save."""
EARLY = EXITS + "  answers: early\ncontinuousBatching: true\n"


@dataclass(frozen=True)
class Outcome:
    """What became of a habit."""

    habit: Habit
    wrong: str = ""
    """How a client would notice; empty where none would."""
    refused: Refused | None = None

    @property
    def same(self) -> bool:
        return not self.wrong and self.refused is None

    @property
    def expected(self) -> bool:
        return not self.wrong and (self.refused.reason if self.refused else None) == self.habit.refusal


@dataclass(frozen=True)
class _Archives:
    """A habit in the model store."""

    original: Served
    ours: dict[str, Served]
    """By what they do: without exits, with exits, with early answers."""


def try_habits(habits: Sequence[Habit], folder: Path, *, at_once: int = 5,
               log: Callable[[str], None] = lambda line: None) -> list[Outcome]:
    """Return what became of each habit.

    Args:
        habits: are tried.
        folder: for everything that is written.
        at_once: how many are served side by side; each takes three workers.
        log: called with a line about each habit.
    """
    outcomes: list[Outcome] = []
    store = folder / "store"
    store.mkdir(parents=True)
    with TorchServe(store, folder / "state", Addresses.free()) as server:
        for start in range(0, len(habits), at_once):
            for outcome in _try_some(habits[start:start + at_once], folder, server):
                log(in_words(outcome))
                outcomes.append(outcome)
    return outcomes


def in_words(outcome: Outcome) -> str:
    said = outcome.wrong or (f"{_reason(outcome.refused)}: {outcome.refused.message}" if outcome.refused else "")
    verdict = "same" if outcome.same else "WRONG" if outcome.wrong else "refused"
    return f"{outcome.habit.name:28}{verdict:9}{said}".rstrip()


def _reason(refused: Refused) -> str:
    return refused.reason.value if refused.reason else "for a reason that is not listed"


def _try_some(habits: Sequence[Habit], folder: Path, server: TorchServe) -> list[Outcome]:
    wrong: dict[str, str] = {}
    refused: dict[str, Refused] = {}
    archives = _archives(habits, folder, wrong, refused)
    by_name = {habit.name: habit for habit in habits}
    expected: dict[str, tuple[list[Answer], list[Answer], list[Answer]]] = {}
    originals = {name: archive.original for name, archive in archives.items()}
    with serving(server, list(originals.values())) as troubles:
        for name, served in originals.items():
            if served in troubles:
                wrong[name] = f"stock TorchServe does not serve it: {troubles[served]}"
            else:
                asks = by_name[name].asks
                expected[name] = (alone(server, served, asks), alone(server, served, asks),
                                  together(server, served, _batchable(by_name[name])))
    with serving(server, [served for archive in archives.values() for served in archive.ours.values()]) as troubles:
        for name, archive in archives.items():
            problems = [] if name in wrong else [
                _problem(by_name[name], server, mode, served, expected[name], troubles)
                for mode, served in archive.ours.items()]
            if found := [problem for problem in problems if problem]:
                wrong[name] = "; ".join(found)
    return [Outcome(habit, wrong.get(habit.name, ""), refused.get(habit.name)) for habit in habits]


def _archives(habits: Sequence[Habit], folder: Path, wrong: dict[str, str],
              refused: dict[str, Refused]) -> dict[str, _Archives]:
    """Build all archives of some habits; note what is wrong with those that cannot be built, and what is refused."""
    store = folder / "store"
    archives: dict[str, _Archives] = {}
    requests: dict[str, ArchiveRequest] = {}
    for habit in habits:
        own = folder / "users" / habit.name
        source = original(habit, own, store)
        archives[habit.name] = _Archives(Served(habit.name, habit.version, source.name), {})
        requests[habit.name] = asked(habit, source, own, store)
    with_exits: dict[str, ArchiveRequest] = {}
    by_name = {habit.name: habit for habit in habits}
    for name, outcome in zip(requests, build_all(list(requests.values()))):
        habit, own = by_name[name], folder / "users" / name
        if isinstance(outcome, Refused):
            refused[name] = outcome
            continue
        archives[name].ours["without exits"] = _served(outcome, habit)
        if chains := habit.followers(habit.model()):
            try:
                plan = copied_exits(own / "plan", outcome, chains, habit.thresholds)
            except Exception as error:
                wrong[name] = f"its exits cannot be copied: {error}"
                continue
            config = own / "exits.yaml"
            config.write_text(habit.config + EXITS)
            with_exits[name] = ArchiveRequest(str(outcome), store, plan=plan, config=config)
    for name, outcome in zip(with_exits, build_all(list(with_exits.values()))):
        habit = by_name[name]
        if isinstance(outcome, Refused):
            wrong[name] = f"refused with exits: {outcome.message}"
            continue
        archives[name].ours["with exits"] = exits = _served(outcome, habit)
        early = rewritten(outcome, store / f"{name}-early.mar", **{
            MANIFEST: lambda text, version=exits.version: text.replace(f'"{version}"', f'"{version}.early"'),
            "model-config.yaml": (habit.config + EARLY).encode()})
        archives[name].ours["with early answers"] = _served(early, habit)
    return archives


def asked(habit: Habit, source: Path, folder: Path, store: Path) -> ArchiveRequest:
    """Return what a user asks of `ee-archive` for a habit's original archive, with two samples in a folder."""
    samples = [folder / "first", folder / "second"]
    for sample, ask in zip(samples, habit.asks):
        sample.write_bytes(ask.body)
    return ArchiveRequest(str(source), store, requests=samples, **habit.options)


def _served(mar: Path, habit: Habit) -> Served:
    import zipfile

    with zipfile.ZipFile(mar) as archive:
        return Served(habit.name, json.loads(archive.read(MANIFEST))["model"]["modelVersion"], mar.name)


def _batchable(habit: Habit) -> list[Ask]:
    return [ask for ask in habit.asks if not ask.explain and not ask.fails]


def _problem(habit: Habit, server: TorchServe, mode: str, served: Served,
             expected: tuple[list[Answer], list[Answer], list[Answer]], troubles: dict[Served, str]) -> str:
    """Return how a client would notice that this version answers; empty where none would."""
    if served in troubles:
        return f"{mode}: {troubles[served]}"
    first, again, batched = expected
    answers = alone(server, served, habit.asks)
    in_batches = _batchable(habit)
    for way, asks, found, wanted, once_more in (
            ("alone", habit.asks, answers, first, again),
            ("together", in_batches, together(server, served, in_batches), batched,
             [answer for ask, answer in zip(habit.asks, first) if ask in in_batches])):
        for ask, *three in zip(asks, found, wanted, once_more):
            if differs := difference(*three, habit.read):
                return f"{mode}, {way}, {'explanation of ' if ask.explain else ''}{ask.body[:60]!r}: {differs}"
    if mode != "without exits":
        left, stayed = left_and_stayed(server, served)
        if not (left and stayed):
            return f"{mode}: {left} rows left and {stayed} stayed, where both are to be tried"
    return ""
