"""Streams of requests that are not independent: frames of scenes, repeated files, bursts, slow change.

The first half of a stream shows sources that heads are trained on, the rest others. What a stream goes on like after
its end is known, so what is certified on it can be judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.benchmarks.frames import Bank

N_SCENES = 3000
N_REQUESTS = 6000
"""Of streams that are not made of scenes."""
_N_CONTINUED = 20_000
Draw = Callable[[Bank, np.random.Generator, np.random.Generator], "Drawn"]


@dataclass(frozen=True)
class Drawn:
    """N recorded requests, and what comes after them."""

    frame: np.ndarray
    """(N,) rows of the bank."""
    content: np.ndarray
    """(N,) int64: equal where a file is repeated."""
    scene: np.ndarray
    """(N,) int64: equal where records are evidence together."""
    position: np.ndarray
    """(N,) how many requests were served before each."""
    of_requests: np.ndarray
    """(S * F,) what share of later requests shows each row of the bank."""
    of_contents: np.ndarray
    """(S * F,) the same of contents that are new then."""


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
        source = np.where(is_past, first.integers(bank.n_training, size=len(size)),
                          then.integers(bank.n_training, bank.n_sources, size=len(size)))
        return _recorded(bank, source, size, then, rate)

    return draw


def constant(size: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Return the sizes of scenes that are equally long."""
    return lambda random: np.full(N_SCENES, size)


def unequal(random: np.random.Generator) -> np.ndarray:
    """Return the sizes of scenes of which a few are long."""
    size = random.integers(2, 12, size=N_SCENES)
    size[random.choice(N_SCENES, 6, replace=False)] = 500
    return size


def bursts(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return single requests and, as many, bursts of one client: of nearly equal files, or of files of one class."""
    n = N_REQUESTS
    size = np.where(then.random(n) < 0.03, then.integers(5, 60, size=n), 1)
    is_past = np.cumsum(size) - size < size.sum() / 2
    source = np.where(is_past, first.integers(bank.n_training, size=n),
                      then.integers(bank.n_training, bank.n_sources, size=n))
    drawn = _recorded(bank, source, size, then)
    label, frame = bank.label.numpy(), drawn.frame.copy()
    of_one_class = (size > 1) & (then.random(n) < 0.5)
    for scene in of_one_class.nonzero()[0]:
        rows = np.flatnonzero(drawn.scene == scene)
        low, high = (0, bank.n_training) if is_past[scene] else (bank.n_training, bank.n_sources)
        alike = low + np.flatnonzero(label[low:high] == label[source[scene]])
        frame[rows] = then.choice(alike, len(rows)) * bank.n_frames + then.integers(bank.n_frames, size=len(rows))
    return Drawn(frame, drawn.content, drawn.scene, drawn.position, drawn.of_requests, drawn.of_contents)


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
    source = np.concatenate([first.integers(bank.n_training, size=half),
                             then.integers(bank.n_training, bank.n_sources, size=n - half)])
    frame = source[earliest] * bank.n_frames
    later = np.bincount(frame[N_REQUESTS:], minlength=len(bank.states)) / _N_CONTINUED
    earliest, new = earliest[:N_REQUESTS], np.zeros(len(bank.states))
    new[bank.n_training * bank.n_frames::bank.n_frames] = 1 / (bank.n_sources - bank.n_training)
    return Drawn(frame[:N_REQUESTS], earliest, earliest, np.arange(N_REQUESTS), later, new)


def fifty_files(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return fifty files at random, then others: from somewhere in the last third of the records on, or after them."""
    files = first.choice(bank.n_training, 50, replace=False) * bank.n_frames
    frame = files[np.concatenate([first.integers(50, size=N_REQUESTS // 2), then.integers(50, size=N_REQUESTS // 2)])]
    content = frame.copy()
    switch = int(then.uniform(0.7, 1.3) * N_REQUESTS)
    others = _uniform(bank)
    n_others = max(0, N_REQUESTS - switch)
    if n_others:
        frame[switch:] = then.choice(np.flatnonzero(others), n_others)
        content[switch:] = len(bank.states) + np.arange(n_others)
    return Drawn(frame, content, content, np.arange(N_REQUESTS), others, others)


def slow_change(bank: Bank, first: np.random.Generator, then: np.random.Generator) -> Drawn:
    """Return requests that get harder and easier again, two and a half times."""
    difficulty = bank.difficulty.numpy()
    past, rest = np.argsort(difficulty[:bank.n_training]), np.argsort(difficulty[bank.n_training:]) + bank.n_training
    half, time = N_REQUESTS // 2, np.arange(N_REQUESTS) / N_REQUESTS
    power = np.exp(0.3 * np.sin(2 * np.pi * 2.5 * time))  # below 1 the hard ones come more often
    source = np.concatenate([past[(first.random(half) ** power[:half] * len(past)).astype(int)],
                             rest[(then.random(half) ** power[half:] * len(rest)).astype(int)]])
    frame = source * bank.n_frames + then.integers(bank.n_frames, size=N_REQUESTS)
    edges = np.linspace(0, 1, len(rest) + 1)
    # As in the last three tenths, which certify.
    chances = np.mean([np.diff(edges ** (1 / one)) for one in power[int(0.7 * N_REQUESTS)::20]], axis=0)
    later = np.zeros((bank.n_sources, bank.n_frames))
    later[rest] = chances[:, None] / bank.n_frames
    each = np.arange(N_REQUESTS)
    return Drawn(frame, each, each, each, later.ravel(), later.ravel())


def _recorded(bank: Bank, source: np.ndarray, size: np.ndarray, random: np.random.Generator,
              rate: float = 1.0) -> Drawn:
    scene = np.repeat(np.arange(len(size)), size)
    position = np.flatnonzero(random.random(len(scene)) < rate) if rate < 1 else np.arange(len(scene))
    scene = scene[position]
    frame = source[scene] * bank.n_frames + random.integers(bank.n_frames, size=len(scene))
    return Drawn(frame, np.arange(len(scene)), scene, position, _uniform(bank), _uniform(bank))


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
    Stream("scenes of 5", "cifar", scenes(constant(5))),
    Stream("scenes of 5 at .05", "cifar", scenes(constant(5), 0.05), may_refuse=True),
    Stream("scenes of 20", "digits", scenes(constant(20))),
    Stream("scenes of 20 at .05", "digits", scenes(constant(20), 0.05), may_refuse=True),
    Stream("scenes of 60", "digits", scenes(constant(60))),
    Stream("scenes of 60 at .05", "digits", scenes(constant(60), 0.05), may_refuse=True),
    Stream("unequal scenes", "digits", scenes(unequal)),
    Stream("repeated files", "cifar", repeated, fixed_past=True),
    Stream("50 files, then others", "cifar", fifty_files, fixed_past=True, may_refuse=True),
    Stream("bursts", "cifar", bursts),
    Stream("slow change", "cifar", slow_change))}
