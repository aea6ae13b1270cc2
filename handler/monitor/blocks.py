"""Groups shadow samples into blocks. A block counts once, and within a block each content counts once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from early_exit.handler.exits.likeness import LEAST, REACH, Likeness

_MOST_CONTENTS = 1000
"""How many contents of a block count at most, the first ones: a camera may look at one scene for days."""


@dataclass(frozen=True)
class Sample:
    """What the monitor knows of a request of the shadow sample."""

    level: int
    """The fallback level that answered."""
    loss: float
    """The loss of the answer, in [0, 1]."""
    content: int | None = None
    """A hash that is equal for requests with equal contents, or None if the content is not known."""
    time: float = 0.0
    """Unix time in seconds."""
    requests: float = 1.0
    """The number of requests that it stands for: 1 / sampling rate."""
    components: tuple[float, ...] = ()
    """See `Likeness.components`: neighbouring samples are compared by them. Empty if each sample is a block of its
    own."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Read a sample from the JSON of a monitor's state.

        Raises:
            KeyError, TypeError: the JSON is not a sample.
        """
        return cls(**{**data, "components": tuple(data["components"])})


@dataclass(frozen=True)
class Block:
    """A block that has ended."""

    n: int
    """The number of contents in it."""
    lost: float
    """The sum of their losses. A content with several samples counts with the largest of their losses."""
    n_new: int
    """The number of those contents that were not among the contents counted most recently."""
    lost_new: float
    """The sum of the losses of those."""


@dataclass(frozen=True)
class Blocks:
    """The open block, and what is needed to tell where it ends.

    A block ends by the rule of `training.selection.blocks`: where none of the next three samples is like any of the
    last three, but not before it has half of the usual length, and at the latest when it has the largest. A sample of a
    content that came before, such as a health check, neither ends a block nor keeps it open.
    """

    open: tuple[tuple[int | None, float], ...] = ()
    """Content and loss of each content in the open block."""
    requests: float = 0.0
    """The number of requests that have been served since the open block began."""
    before: tuple[tuple[float, ...], ...] = ()
    """Components of the last samples of new contents that were assigned to a block."""
    undecided: tuple[Sample, ...] = ()
    """The samples after those. More samples are needed to tell whether a new block begins with the first of them."""
    counted: tuple[int, ...] = ()
    """The contents that were counted as new most recently in blocks that have ended; they are not new again."""
    skips: bool = False
    """Whether the open block will not count: of blocks that are periods, every second one does not."""
    last: int | None = None
    """The content of the last sample, if each sample is a block of its own: a copy of that sample is no further
    block."""

    def after(self, sample: Sample, likeness: Likeness | None, n_remembered: int) -> tuple[Blocks, Block | None]:
        """Return the blocks after one more sample, and the block that has ended, if one has.

        Args:
            sample: the next sample.
            likeness: how samples are compared, or None if each sample is a block of its own.
            n_remembered: how many contents are remembered as counted.
        """
        if likeness is None:
            if sample.content is not None and sample.content == self.last:
                return self, None
            return replace(self._with(sample), last=sample.content)._closed(n_remembered)
        undecided = (*self.undecided, sample)
        if len(undecided) < REACH:
            return replace(self, undecided=undecided), None
        first = undecided[0]
        requests = self.requests + (first.requests if self.before else 0.0)
        ended: Block | None = None
        blocks = self
        is_copy = self._is_known(first)
        if self.before and not is_copy and requests >= LEAST * likeness.length and (
                requests >= likeness.longest or not self._alike(undecided, likeness.distance)):
            blocks, ended = self._closed(n_remembered)
            requests = 0.0
            if likeness.is_periodic:
                blocks = replace(self, open=()) if self.skips else blocks
                ended, blocks = None if self.skips else ended, replace(blocks, skips=not self.skips)
        blocks = blocks._with(first)
        before = self.before if is_copy else (*self.before, first.components)[-REACH:]
        return replace(blocks, requests=requests, before=before, undecided=undecided[1:]), ended

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Blocks:
        """Read the blocks from the JSON of a monitor's state.

        Raises:
            KeyError, TypeError: the JSON does not describe blocks.
        """
        return cls(tuple((content, loss) for content, loss in data["open"]), data["requests"],
                   tuple(map(tuple, data["before"])), tuple(map(Sample.from_json, data["undecided"])),
                   tuple(data["counted"]), data["skips"], data["last"])

    def _alike(self, behind: Sequence[Sample], distance: float) -> bool:
        return any(sum((a - b) ** 2 for a, b in zip(one, other.components)) < distance
                   for other in behind if not self._is_known(other) for one in self.before)

    def _is_known(self, sample: Sample) -> bool:
        """Tell whether the content of a sample is in the open block, or was counted recently."""
        return sample.content is not None and (
            sample.content in self.counted or any(sample.content == content for content, _ in self.open))

    def _with(self, sample: Sample) -> Blocks:
        """Return these blocks with a sample added to the open block."""
        content, loss = sample.content, sample.loss
        if content is not None and any(content == other for other, _ in self.open):
            return replace(self, open=tuple(
                (other, max(loss, found) if other == content else found) for other, found in self.open))
        return self if len(self.open) >= _MOST_CONTENTS else replace(self, open=(*self.open, (content, loss)))

    def _closed(self, n_remembered: int) -> tuple[Blocks, Block]:
        """Close the open block, which is not empty: return the blocks without it, and that block."""
        new = [(content, loss) for content, loss in self.open if content is None or content not in self.counted]
        kept = (*self.counted, *(content for content, _ in new if content is not None))[-n_remembered:]
        return replace(self, open=(), counted=kept), Block(
            len(self.open), sum(loss for _, loss in self.open), len(new), sum(loss for _, loss in new))
