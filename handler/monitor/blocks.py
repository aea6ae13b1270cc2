"""Blocks of shadow samples: the requests in a block, and its contents, each of which is counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from early_exit.handler.exits.likeness import LEAST, REACH, Likeness

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
class Waiting:
    """A sample with a new content that is not assigned to a block yet, and its copies that came in the meantime."""

    sample: Sample
    """The sample, with the largest loss of its copies."""
    n: int
    """The number of samples, with copies; see `Block.n`."""
    lost: float
    """The sum of their losses."""

    def and_copy(self, copy: Sample, n: int) -> Waiting:
        """Return this with a copy that counts as n samples, 0 or 1."""
        worst = replace(self.sample, loss=max(self.sample.loss, copy.loss))
        return Waiting(worst, self.n + n, self.lost + n * copy.loss)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Waiting:
        """Read the JSON of a state. An older version stored the sample alone."""
        if "sample" in data:
            return cls(Sample.from_json(data["sample"]), data["n"], data["lost"])
        sample = Sample.from_json(data)
        return cls(sample, 1, sample.loss)


@dataclass(frozen=True)
class Block:
    """A block that has ended."""

    n: int
    """The number of samples in it. Samples with one content that follow each other directly count as one."""
    lost: float
    """The sum of their losses."""
    n_new: int
    """The number of contents in it that are new: they are not among the remembered contents, see `Blocks.counted`."""
    lost_new: float
    """The sum of the losses of the new contents. A content with several samples counts with the largest of their
    losses."""


@dataclass(frozen=True)
class Blocks:
    """The open block, and what is needed to tell where it ends.

    A block ends by the rule of `training.selection.blocks`: it ends where none of the next three samples is like any of
    the last three. It has at least half of the usual length, and it ends at the latest when it has the largest length.
    A sample whose content has come before, such as a health check, neither ends a block nor keeps it open. It counts in
    the block that is open when it comes. If no new content comes for the largest length of a block, the samples so far
    are a block without new contents.
    """

    open: tuple[tuple[int | None, float], ...] = ()
    """Content and loss of each content in the open block."""
    n: int = 0
    """The number of samples in the open block, see `Block.n`."""
    lost: float = 0.0
    """The sum of their losses."""
    requests: float = 0.0
    """The number of requests, without copies, that have been served since the open block began."""
    requests_since_new: float = 0.0
    """The number of requests that have been served since the latest new content came, or since the latest block without
    new contents."""
    before: tuple[tuple[float, ...], ...] = ()
    """Components of the last samples of new contents that were assigned to a block."""
    undecided: tuple[Waiting, ...] = ()
    """The latest samples of new contents. More of them are needed to tell whether a new block begins with the first."""
    counted: tuple[int, ...] = ()
    """The remembered contents: the latest contents of the blocks that have ended. If one of them comes again, it is not
    new."""
    skips: bool = False
    """Whether the open block will be skipped when it ends. If blocks are periods, every second block is skipped."""
    last: int | None = None
    """The content of the last sample. A copy that follows directly is not another sample."""
    left_out: tuple[int, ...] = ()
    """Contents of the open block that were counted until contents with smaller hashes came. They are the latest that
    came, and are kept so that their copies are known as copies."""

    def after(self, sample: Sample, likeness: Likeness | None, n_remembered: int) -> tuple[Blocks, Sequence[Block]]:
        """Return the blocks after one more sample, and the blocks that have ended, in order.

        Args:
            sample: the next sample.
            likeness: how samples are compared, or None if each sample is a block of its own.
            n_remembered: how many contents are remembered.
        """
        n = 0 if sample.content is not None and sample.content == self.last else 1
        blocks = replace(self, last=sample.content)
        if likeness is None:
            if not n:
                return self, []
            blocks, closed = blocks._with(sample)._counting(n, sample.loss)._closed(n_remembered)
            return blocks, [closed]
        if blocks._is_copy(sample):
            return blocks._with_copy(sample, n, likeness)
        blocks = replace(blocks, requests_since_new=0.0,
                         undecided=(*self.undecided, Waiting(sample, n, n * sample.loss)))
        ended = list[Block]()
        while len(blocks.undecided) >= REACH:
            first = blocks.undecided[0]
            if ends := blocks._ends_before_undecided(likeness):
                blocks, block = blocks._ended(likeness, n_remembered)
                ended += [block] if block else []
            blocks = replace(blocks, before=(*blocks.before, first.sample.components)[-REACH:],
                             requests=0.0 if ends or not blocks.before else blocks.requests + first.sample.requests,
                             undecided=blocks.undecided[1:])._with(first.sample)._counting(first.n, first.lost)
        return blocks, ended

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Blocks:
        """Read the blocks from the JSON of a monitor's state.

        Raises:
            KeyError, TypeError: the JSON does not describe blocks.
        """
        is_open = tuple((content, loss) for content, loss in data["open"])
        # An older version stored no numbers of samples. Each content then counts as one.
        return cls(is_open, data.get("n", len(is_open)), data.get("lost", sum(loss for _, loss in is_open)),
                   data["requests"], data.get("requests_since_new", 0.0),
                   tuple(map(tuple, data["before"])), tuple(map(Waiting.from_json, data["undecided"])),
                   tuple(data["counted"]), data["skips"], data["last"],
                   tuple(data.get("left_out", ())))

    def _with_copy(self, copy: Sample, n: int, likeness: Likeness) -> tuple[Blocks, Sequence[Block]]:
        """Return these blocks with a copy of an earlier sample, and the block that has ended.

        Args:
            copy: the copy.
            n: 1, or 0 if it follows a sample with the same content directly.
            likeness: how samples are compared.
        """
        blocks = replace(self, requests_since_new=self.requests_since_new + copy.requests)
        waits = [one.sample.content for one in self.undecided]
        if copy.content in waits:
            place = waits.index(copy.content)
            blocks = replace(blocks, undecided=(*self.undecided[:place], self.undecided[place].and_copy(copy, n),
                                                *self.undecided[place + 1:]))
        else:
            blocks = blocks._with(copy)._counting(n, n * copy.loss)
        if blocks.requests_since_new < likeness.most_requests:
            return blocks, []
        ended = [Block(blocks.n, blocks.lost, 0, 0.0)] if blocks.n else []
        return replace(blocks, n=0, lost=0.0, requests_since_new=0.0), ended

    def _ends_before_undecided(self, likeness: Likeness) -> bool:
        """Tell whether the open block ends before the first of the undecided samples."""
        originals = [one.sample for one in self.undecided[:REACH]]
        requests = self.requests + originals[0].requests
        if not self.before or requests < LEAST * likeness.length:
            return False
        return requests >= likeness.longest or not any(
            sum((a - b) ** 2 for a, b in zip(one, other.components)) < likeness.distance
            for one in self.before for other in originals)

    def _ended(self, likeness: Likeness, n_remembered: int) -> tuple[Blocks, Block | None]:
        """End the open block. Return the blocks without it, and the ended block, or None if it is skipped."""
        blocks, ended = self._closed(n_remembered)
        return replace(blocks, skips=likeness.is_periodic and not self.skips), None if self.skips else ended

    def _is_copy(self, sample: Sample) -> bool:
        """Tell whether the content of a sample waits, is in the open block, or is remembered."""
        return sample.content is not None and (
            sample.content in self.counted or sample.content in self.left_out
            or any(sample.content == content for content, _ in self.open)
            or any(sample.content == one.sample.content for one in self.undecided))

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

    def _counting(self, n: int, lost: float) -> Blocks:
        """Return these blocks with n more samples, and the sum of their losses, in the open block."""
        return replace(self, n=self.n + n, lost=self.lost + lost)

    def _leaving_out(self, content: int | None) -> Blocks:
        """Return these blocks with a content as the latest of those that are left out."""
        others = (other for other in self.left_out if other != content)
        return self if content is None else replace(self, left_out=(*others, content)[-_MOST_CONTENTS:])

    def _closed(self, n_remembered: int) -> tuple[Blocks, Block]:
        """Close the open block, which is not empty. Return the blocks without it, and the closed block."""
        new = [(content, loss) for content, loss in self.open if content is None or content not in self.counted]
        came = [content for content, _ in self.open if content is not None]
        kept = (*(content for content in self.counted if content not in came), *came)[-n_remembered:]
        return (replace(self, open=(), n=0, lost=0.0, counted=kept, left_out=()),
                Block(self.n, self.lost, len(new), sum(loss for _, loss in new)))
