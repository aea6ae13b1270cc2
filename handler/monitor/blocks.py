"""Which shadow samples are evidence together: those of one block, and in it those of one content, count once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from early_exit.handler.exits.likeness import LEAST, REACH, Likeness

_MOST_CONTENTS = 1000
"""A block counts with its first contents only: a camera may look at one scene for days."""


@dataclass(frozen=True)
class Sample:
    """What is known of a request that ran on to the end though it was answered at some level."""

    level: int
    """The fallback level that answered."""
    loss: float
    """In [0, 1]."""
    content: int | None = None
    """Equal where two requests held the same; None where that is not known."""
    time: float = 0.0
    """Unix time in seconds."""
    requests: float = 1.0
    """How many requests it stands for: 1 / sampling rate."""
    components: tuple[float, ...] = ()
    """Of its state, by which neighbours are compared; empty where records are each evidence of its own."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Read a sample of a state.

        Raises:
            KeyError, TypeError: it is none.
        """
        return cls(**{**data, "components": tuple(data["components"])})


@dataclass(frozen=True)
class Block:
    """A block that has ended."""

    n: int
    """Contents that count."""
    lost: float
    """The sum of their losses; of samples of one content the largest counts."""


@dataclass(frozen=True)
class Blocks:
    """The block that is going on, and what is needed to tell where it ends.

    It ends as `training.selection.blocks` says: where none of the next three samples is like any of the last three,
    and not before half of the usual length.
    """

    open: tuple[tuple[int | None, float], ...] = ()
    """Content and loss of what counts in the block that is going on."""
    requests: float = 0.0
    """How many have been served since that block began."""
    before: tuple[tuple[float, ...], ...] = ()
    """Components of the last samples that are in a block."""
    undecided: tuple[Sample, ...] = ()
    """Those behind them, of which it takes more samples to tell whether a block begins with the first."""
    counted: tuple[int, ...] = ()
    """The contents that were counted last in blocks that have ended; they do not count again."""

    def after(self, sample: Sample, likeness: Likeness | None, n_remembered: int) -> tuple[Blocks, Block | None]:
        """Return what is going on after one more sample, and the block that has ended, if one has.

        Args:
            sample: the next one.
            likeness: how samples are compared; None where each is a block of its own.
            n_remembered: how many contents are remembered as counted.
        """
        if likeness is None:
            return self._with(sample)._closed(n_remembered)
        undecided = (*self.undecided, sample)
        if len(undecided) < REACH:
            return replace(self, undecided=undecided), None
        first = undecided[0]
        requests = self.requests + (first.requests if self.before else 0.0)
        ended: Block | None = None
        blocks = self
        if self.before and requests >= LEAST * likeness.length and not self._alike(undecided, likeness.distance):
            blocks, ended = self._closed(n_remembered)
            requests = 0.0
        blocks = blocks._with(first)
        before = (*self.before, first.components)[-REACH:]
        return replace(blocks, requests=requests, before=before, undecided=undecided[1:]), ended

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Blocks:
        """Read the blocks of a state.

        Raises:
            KeyError, TypeError: they are none.
        """
        return cls(tuple((content, loss) for content, loss in data["open"]), data["requests"],
                   tuple(map(tuple, data["before"])), tuple(map(Sample.from_json, data["undecided"])),
                   tuple(data["counted"]))

    def _alike(self, behind: Sequence[Sample], distance: float) -> bool:
        return any(sum((a - b) ** 2 for a, b in zip(one, other.components)) < distance
                   for one in self.before for other in behind)

    def _with(self, sample: Sample) -> Blocks:
        """Return these with a sample in the block that is going on."""
        content, loss = sample.content, sample.loss
        if content is not None and content in self.counted:
            return self
        if content is not None and any(content == other for other, _ in self.open):
            return replace(self, open=tuple(
                (other, max(loss, found) if other == content else found) for other, found in self.open))
        return self if len(self.open) >= _MOST_CONTENTS else replace(self, open=(*self.open, (content, loss)))

    def _closed(self, n_remembered: int) -> tuple[Blocks, Block | None]:
        """Return these without the block that is going on, and that block, if anything in it counts."""
        if not self.open:
            return self, None
        counted = [content for content, _ in self.open if content is not None]
        kept = (*self.counted, *counted)[-n_remembered:]
        return replace(self, open=(), counted=kept), Block(len(self.open), sum(loss for _, loss in self.open))
