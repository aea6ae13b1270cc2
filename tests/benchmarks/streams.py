"""Streams of requests that are not independent: frames of scenes, repeated files, bursts, slow change.

The first half of a stream shows sources that heads are trained on, the rest others. What a stream goes on like after
its end is known, so what is certified on it can be judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tests.benchmarks.frames import Bank

N_SCENES = 3000
N_REQUESTS = 6000
"""Of streams that are not made of scenes."""
N_LATER = 4000
"""Records that come after a stream, for the monitor."""
_N_CONTINUED = 20_000
Draw = Callable[[Bank, np.random.Generator, np.random.Generator], "Drawn"]


@dataclass(frozen=True)
class Records:
    """N recorded requests."""

    frame: np.ndarray
    """(N,) rows of the bank."""
    content: np.ndarray
    """(N,) int64: equal where a file is repeated."""
    scene: np.ndarray
    """(N,) int64: equal where records are evidence together."""
    position: np.ndarray
    """(N,) how many requests were served before each."""

    def until(self, n: int) -> Records:
        """Return the first n."""
        return Records(self.frame[:n], self.content[:n], self.scene[:n], self.position[:n])


@dataclass(frozen=True)
class Drawn:
    """What is recorded of a stream, and what comes after it."""

    records: Records
    later: Records
    """What is recorded then, at the same rate."""
    of_requests: np.ndarray
    """(S * F,) what share of later requests shows each row of the bank."""
    of_contents: np.ndarray
    """(S * F,) the same of contents that are new then."""
    of_hardest: np.ndarray | None = None
    """(S * F,) the same of requests in the hardest time, where times differ."""


@dataclass(frozen=True)
class Stream:
    """A kind of traffic."""

    name: str
    bank: str
    draw: Draw
    """Draws one of a bank; its first half by the first generator, what follows by the second."""
    fixed_past: bool = False
    """Whether all that are drawn have the first half in common, as it repeats what heads were trained on."""
    may_refuse: bool = False


def scenes(sizes: Callable[[np.random.Generator], np.ndarray], rate: float = 1.0) -> Draw:
    """Return streams of scenes of unlike images, of which a share of the frames is recorded."""

    def draw(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
        size = sizes(then)
        is_past = np.cumsum(size) - size < size.sum() / 2
        source = np.where(is_past, first.integers(bank.n_training, size=len(size)), _others(bank, len(size), then))
        records = _recorded(bank, source, size, then, rate)
        later_size = sizes(then)
        later = _recorded(bank, _others(bank, len(later_size), then), later_size, then, rate)
        return Drawn(records, later.until(N_LATER), _uniform(bank), _uniform(bank))

    return draw


def constant(size: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Return the sizes of scenes that are equally long."""
    return lambda random: np.full(N_SCENES, size)


def unequal(random: np.random.Generator) -> np.ndarray:
    """Return the sizes of scenes of which a few are long."""
    size = random.integers(2, 12, size=N_SCENES)
    size[random.choice(N_SCENES, 6, replace=False)] = 500
    return size


def cameras(n_cameras: int, n_frames: int, n_requests: int) -> Draw:
    """Return streams of cameras that send a frame in turns; each shows scenes that follow each other."""

    def recorded(bank: Bank, first: np.random.Generator, then: np.random.Generator, n: int, n_past: int) -> Records:
        camera, place = np.arange(n) % n_cameras, np.arange(n) // n_cameras
        begins = then.integers(n_frames, size=n_cameras)[camera]
        of_scene = camera * n + (place + begins) // n_frames
        _, earliest, scene = np.unique(of_scene, return_index=True, return_inverse=True)
        source = np.where(earliest < n_past, first.integers(bank.n_training, size=len(earliest)),
                          _others(bank, len(earliest), then))
        frame = source[scene] * bank.n_frames + then.integers(bank.n_frames, size=n)
        return Records(frame, np.arange(n), scene, np.arange(n))

    def draw(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
        return Drawn(recorded(bank, first, then, n_requests, n_requests // 2),
                     recorded(bank, first, then, N_LATER, 0), _uniform(bank), _uniform(bank))

    return draw


def harder_longer(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return scenes of one to nine frames, of which the harder last longer."""
    n = N_SCENES // 2
    difficulty, size_of = bank.difficulty.numpy(), np.zeros(bank.n_sources, dtype=int)
    for sources in (np.arange(bank.n_training), np.arange(bank.n_training, bank.n_sources)):
        rank = np.argsort(np.argsort(difficulty[sources])) / len(sources)
        size_of[sources] = 1 + (9 * rank).astype(int)
    source = np.concatenate([first.integers(bank.n_training, size=n), _others(bank, n, then)])
    records = _recorded(bank, source, size_of[source], then)
    later_source = _others(bank, n, then)
    later = _recorded(bank, later_source, size_of[later_source], then)
    by_frame = np.repeat(size_of * (np.arange(bank.n_sources) >= bank.n_training), bank.n_frames)
    chances = by_frame / by_frame.sum()
    return Drawn(records, later.until(N_LATER), chances, chances)


def bursts(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return single requests and, as many, bursts of one client: of one file again and again, of nearly equal files,
    or of files of one class."""
    n = N_REQUESTS
    size = np.where(then.random(n) < 0.03, then.integers(5, 60, size=n), 1)
    is_past = np.cumsum(size) - size < size.sum() / 2
    source = np.where(is_past, first.integers(bank.n_training, size=n), _others(bank, n, then))
    records = _in_bursts(bank, _recorded(bank, source, size, then), source, is_past, size > 1, then)
    later_size = np.where(then.random(n) < 0.03, then.integers(5, 60, size=n), 1)
    source = _others(bank, n, then)
    later = _in_bursts(bank, _recorded(bank, source, later_size, then).until(N_LATER), source,
                       np.zeros(n, dtype=bool), later_size > 1, then)
    return Drawn(records, later, _uniform(bank), _uniform(bank))


def _in_bursts(bank: Bank, records: Records, source: np.ndarray, is_past: np.ndarray, is_burst: np.ndarray,
               random: np.random.Generator) -> Records:
    """Return records in which a third of the bursts repeat one frame, and a third show many sources of one class."""
    label, frame, content = bank.label.numpy(), records.frame.copy(), records.content.copy()
    kind = np.where(is_burst, random.integers(3, size=len(is_burst)), 2)
    for scene in np.flatnonzero(kind < 2):
        rows = np.flatnonzero(records.scene == scene)
        if kind[scene] == 0:
            frame[rows], content[rows] = frame[rows[:1]], content[rows[:1]]
            continue
        low, high = (0, bank.n_training) if is_past[scene] else (bank.n_training, bank.n_sources)
        alike = low + np.flatnonzero(label[low:high] == label[source[scene]])
        frame[rows] = random.choice(alike, len(rows)) * bank.n_frames + random.integers(bank.n_frames, size=len(rows))
    return replace(records, frame=frame, content=content)


def repeated(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return files of which each request shows a new one or, as often, one of those before: the more often it came
    already, the sooner (Yule and Simon)."""
    n = N_REQUESTS + _N_CONTINUED
    half = N_REQUESTS // 2
    is_new = np.concatenate([[True], first.random(half - 1) < 0.5, then.random(n - half) < 0.5])
    again = (np.concatenate([first.random(half), then.random(n - half)]) * np.arange(n)).astype(int)
    earliest = np.arange(n)
    for request in np.flatnonzero(~is_new):
        earliest[request] = earliest[again[request]]
    source = np.concatenate([first.integers(bank.n_training, size=half), _others(bank, n - half, then)])
    frame = source[earliest] * bank.n_frames
    of_requests = np.bincount(frame[N_REQUESTS:], minlength=len(bank.states)) / _N_CONTINUED
    new = np.zeros(len(bank.states))
    new[bank.n_training * bank.n_frames::bank.n_frames] = 1 / (bank.n_sources - bank.n_training)
    records, later = (Records(frame[part], earliest[part], earliest[part], np.arange(n)[part])
                      for part in (slice(N_REQUESTS), slice(N_REQUESTS, N_REQUESTS + N_LATER)))
    return Drawn(records, later, of_requests, new)


def fifty_files(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return fifty files at random, then others: from somewhere in the last third of the records on, or after them."""
    files = first.choice(bank.n_training, 50, replace=False) * bank.n_frames
    half, n = N_REQUESTS // 2, N_REQUESTS + N_LATER
    frame = files[np.concatenate([first.integers(50, size=half), then.integers(50, size=n - half)])]
    content = frame.copy()
    switch = int(then.uniform(0.7, 1.3) * N_REQUESTS)
    others = _uniform(bank)
    frame[switch:] = then.choice(np.flatnonzero(others), n - switch)
    content[switch:] = len(bank.states) + np.arange(n - switch)
    records, later = (Records(frame[part], content[part], content[part], np.arange(n)[part])
                      for part in (slice(N_REQUESTS), slice(N_REQUESTS, n)))
    return Drawn(records, later, others, others)


def slow_change(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return requests that get harder and easier again, two and a half times, and go on so."""
    difficulty = bank.difficulty.numpy()
    past, rest = np.argsort(difficulty[:bank.n_training]), np.argsort(difficulty[bank.n_training:]) + bank.n_training
    half, n = N_REQUESTS // 2, N_REQUESTS + N_LATER
    power = np.exp(0.3 * np.sin(2 * np.pi * 2.5 * np.arange(n) / N_REQUESTS))  # below 1 the hard ones come more often
    source = np.concatenate([past[(first.random(half) ** power[:half] * len(past)).astype(int)],
                             rest[(then.random(n - half) ** power[half:] * len(rest)).astype(int)]])
    frame, each = source * bank.n_frames + then.integers(bank.n_frames, size=n), np.arange(n)
    records, later = (Records(frame[part], each[part], each[part], each[part])
                      for part in (slice(N_REQUESTS), slice(N_REQUESTS, n)))
    edges = np.linspace(0, 1, len(rest) + 1)

    def chances(powers: np.ndarray) -> np.ndarray:
        by_frame = np.zeros((bank.n_sources, bank.n_frames))
        by_frame[rest] = np.mean([np.diff(edges ** (1 / one)) for one in powers], axis=0)[:, None] / bank.n_frames
        return by_frame.ravel()

    # As in the last three tenths, which certify.
    certified = chances(power[int(0.7 * N_REQUESTS):N_REQUESTS:20])
    return Drawn(records, later, certified, certified, of_hardest=chances(power.min(keepdims=True)))


def _others(bank: Bank, n: int, random: np.random.Generator) -> np.ndarray:
    """Return n sources that no head is trained on."""
    return random.integers(bank.n_training, bank.n_sources, size=n)


def _recorded(bank: Bank, source: np.ndarray, size: np.ndarray, random: np.random.Generator,
              rate: float = 1.0) -> Records:
    scene = np.repeat(np.arange(len(size)), size)
    position = np.flatnonzero(random.random(len(scene)) < rate) if rate < 1 else np.arange(len(scene))
    scene = scene[position]
    frame = source[scene] * bank.n_frames + random.integers(bank.n_frames, size=len(scene))
    return Records(frame, np.arange(len(scene)), scene, position)


def _uniform(bank: Bank) -> np.ndarray:
    """Return the (S * F,) chances of frames that are drawn at random from sources that no head is trained on."""
    chances = np.zeros(len(bank.states))
    chances[bank.n_training * bank.n_frames:] = 1 / (len(chances) - bank.n_training * bank.n_frames)
    return chances


def independent(random: np.random.Generator) -> np.ndarray:
    """Return the sizes of scenes of one frame."""
    return np.ones(N_REQUESTS, dtype=int)


INDEPENDENT = ("independent", "independent digits")
STREAMS = {stream.name: stream for stream in (
    Stream("independent", "cifar", scenes(independent)),
    Stream("independent digits", "digits", scenes(independent)),
    Stream("scenes of 2", "cifar", scenes(constant(2))),
    Stream("scenes of 2 at .05", "cifar", scenes(constant(2), 0.05), may_refuse=True),
    Stream("scenes of 5", "cifar", scenes(constant(5))),
    Stream("scenes of 5 at .05", "cifar", scenes(constant(5), 0.05), may_refuse=True),
    Stream("scenes of 20", "digits", scenes(constant(20))),
    Stream("scenes of 20 at .05", "digits", scenes(constant(20), 0.05), may_refuse=True),
    Stream("scenes of 60", "digits", scenes(constant(60))),
    Stream("scenes of 60 at .05", "digits", scenes(constant(60), 0.05), may_refuse=True),
    Stream("unequal scenes", "digits", scenes(unequal)),
    Stream("two cameras in turns", "digits", cameras(2, 5, 40_000), may_refuse=True),
    Stream("eight cameras in turns", "digits", cameras(8, 20, 12_000), may_refuse=True),
    Stream("harder scenes last longer", "digits", harder_longer),
    Stream("repeated files", "cifar100", repeated, fixed_past=True),
    Stream("50 files, then others", "cifar", fifty_files, fixed_past=True, may_refuse=True),
    Stream("bursts", "cifar", bursts),
    Stream("slow change", "cifar", slow_change))}
