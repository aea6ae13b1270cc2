"""Blocks of shadow samples. Within a block, each content is counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from early_exit.handler.exits.likeness import LEAST, REACH, Likeness

_MOST_UNDECIDED = 100
"""The length of `Blocks.undecided` from which copies are no longer added to it."""
_MOST_CONTENTS = 1000
"""The largest number of contents that are counted in a block, because a camera may show one scene for days. Of more
contents, those with the smallest hashes are counted. The hashes are uniform, so these contents are a random sample of
the whole block. Contents that are not known are counted until the block is full."""


@dataclass(frozen=True)
class Sample:
    """What the monitor knows about one shadow sample."""

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
    """The components by which neighbouring samples are compared, see `Likeness.components`. Empty if each sample is a
    block of its own."""

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
    """The number of contents in it that are new: they are not among the remembered contents, see `Blocks.counted`."""
    lost_new: float
    """The sum of the losses of the new contents."""


@dataclass(frozen=True)
class Blocks:
    """The open block, and what is needed to tell where it ends.

    A block ends by the rule of `training.selection.blocks`: it ends where none of the next three samples is like any of
    the last three. It has at least half of the usual length, and it ends at the latest when it has the largest length.
    A sample whose content has come before, such as a health check, neither ends a block nor keeps it open.
    """

    open: tuple[tuple[int | None, float], ...] = ()
    """Content and loss of each content in the open block."""
    requests: float = 0.0
    """The number of requests, without copies, that have been served since the open block began."""
    before: tuple[tuple[float, ...], ...] = ()
    """Components of the last samples of new contents that were assigned to a block."""
    undecided: tuple[Sample, ...] = ()
    """The latest samples, which are not assigned to a block yet. More samples are needed to tell whether a new block
    begins with the first of them."""
    counted: tuple[int, ...] = ()
    """The remembered contents: the latest contents of the blocks that have ended. If one of them comes again, it is not
    new."""
    skips: bool = False
    """Whether the open block will be skipped when it ends. If blocks are periods, every second block is skipped."""
    last: int | None = None
    """The content of the last sample, if each sample is a block of its own. A copy that follows directly is not another
    block."""
    left_out: tuple[int, ...] = ()
    """Contents of the open block that were counted until contents with smaller hashes came. They are the latest that
    came, and are kept so that their copies are known as copies."""

    def after(self, sample: Sample, likeness: Likeness | None, n_remembered: int) -> tuple[Blocks, Sequence[Block]]:
        """Return the blocks after one more sample, and the blocks that have ended, in order.

        Several blocks may end at once, because one sample can decide to which blocks the undecided samples belong.

        Args:
            sample: the next sample.
            likeness: how samples are compared, or None if each sample is a block of its own.
            n_remembered: how many contents are remembered.
        """
        if likeness is None:
            if sample.content is not None and sample.content == self.last:
                return self, []
            blocks, closed = replace(self._with(sample), last=sample.content)._closed(n_remembered)
            return blocks, [closed]
        blocks, ended = self._with_undecided(sample), list[Block]()
        while blocks.undecided:
            first = blocks.undecided[0]
            if not blocks._is_known(first):
                originals = blocks._originals()
                if len(originals) < REACH:
                    break
                ends = blocks._ends_before(originals, likeness)
                if ends:
                    blocks, block = blocks._ended(likeness, n_remembered)
                    ended += [block] if block else []
                blocks = replace(blocks, before=(*blocks.before, first.components)[-REACH:],
                                 requests=0.0 if ends or not blocks.before else blocks.requests + first.requests)
            blocks = replace(blocks._with(first), undecided=blocks.undecided[1:])
        return blocks, ended

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Blocks:
        """Read the blocks from the JSON of a monitor's state.

        Raises:
            KeyError, TypeError: the JSON does not describe blocks.
        """
        return cls(tuple((content, loss) for content, loss in data["open"]), data["requests"],
                   tuple(map(tuple, data["before"])), tuple(map(Sample.from_json, data["undecided"])),
                   tuple(data["counted"]), data["skips"], data["last"],
                   tuple(data.get("left_out", ())))

    def _with_undecided(self, sample: Sample) -> Blocks:
        """Return these blocks with one more undecided sample.

        If many samples wait, they are copies of few contents, as in a night of health checks. A copy then only raises
        the loss of the last sample of its content that waits, or is left out if there is none. A new content always
        waits, because the third one decides about all of them.
        """
        if len(self.undecided) < _MOST_UNDECIDED:
            return replace(self, undecided=(*self.undecided, sample))
        waits = [one.content for one in self.undecided]
        if sample.content is not None and sample.content in waits:
            last = len(waits) - 1 - waits[::-1].index(sample.content)
            copy = self.undecided[last]
            return replace(self, undecided=(*self.undecided[:last], replace(copy, loss=max(copy.loss, sample.loss)),
                                            *self.undecided[last + 1:]))
        return self if self._is_known(sample) else replace(self, undecided=(*self.undecided, sample))

    def _originals(self) -> list[Sample]:
        """Return the undecided samples that are not copies of earlier samples."""
        seen: set[int] = set()
        originals = []
        for sample in self.undecided:
            if sample.content not in seen and not self._is_known(sample):
                originals.append(sample)
            if sample.content is not None:
                seen.add(sample.content)
        return originals

    def _ends_before(self, originals: Sequence[Sample], likeness: Likeness) -> bool:
        """Tell whether the open block ends before the first of the undecided samples."""
        requests = self.requests + originals[0].requests
        if not self.before or requests < LEAST * likeness.length:
            return False
        return requests >= likeness.longest or not any(
            sum((a - b) ** 2 for a, b in zip(one, other.components)) < likeness.distance
            for one in self.before for other in originals[:REACH])

    def _ended(self, likeness: Likeness, n_remembered: int) -> tuple[Blocks, Block | None]:
        """End the open block. Return the blocks without it, and the ended block, or None if it is skipped."""
        blocks, ended = self._closed(n_remembered)
        return replace(blocks, skips=likeness.is_periodic and not self.skips), None if self.skips else ended

    def _is_known(self, sample: Sample) -> bool:
        """Tell whether the content of a sample is in the open block, or came recently."""
        return sample.content is not None and (
            sample.content in self.counted or sample.content in self.left_out
            or any(sample.content == content for content, _ in self.open))

    def _with(self, sample: Sample) -> Blocks:
        """Return these blocks with a sample added to the open block."""
        content, loss = sample.content, sample.loss
        if content is not None and any(content == other for other, _ in self.open):
            return replace(self, open=tuple(
                (other, max(loss, found) if other == content else found) for other, found in self.open))
        if len(self.open) < _MOST_CONTENTS:
            return replace(self, open=(*self.open, (content, loss)))
        largest = max((other for other, _ in self.open if other is not None), default=None)
        if content is None or largest is None or content > largest:
            return self._leaving_out(content) if content in self.left_out else self
        kept = tuple((other, found) for other, found in self.open if other != largest)
        return replace(self, open=(*kept, (content, loss)))._leaving_out(largest)

    def _leaving_out(self, content: int | None) -> Blocks:
        """Return these blocks with a content as the latest of those that are left out."""
        others = (other for other in self.left_out if other != content)
        return self if content is None else replace(self, left_out=(*others, content)[-_MOST_CONTENTS:])

    def _closed(self, n_remembered: int) -> tuple[Blocks, Block]:
        """Close the open block, which is not empty. Return the blocks without it, and the closed block."""
        new = [(content, loss) for content, loss in self.open if content is None or content not in self.counted]
        came = [content for content, _ in self.open if content is not None]
        kept = (*(content for content in self.counted if content not in came), *came)[-n_remembered:]
        return replace(self, open=(), counted=kept, left_out=()), Block(
            len(self.open), sum(loss for _, loss in self.open), len(new), sum(loss for _, loss in new))
