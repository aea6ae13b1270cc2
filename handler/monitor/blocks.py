"""Blocks of shadow samples: the requests in a block, and its contents, each of which is counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
class Count:
    """The samples of some requests."""

    n: int = 0
    """The number of samples."""
    n_runs: int = 0
    """The number of runs of samples with one content that follow each other directly, as when a client repeats a
    request."""
    lost: float = 0.0
    """The sum of the losses of the first samples of the runs."""
    lost_by_all: float = 0.0
    """The sum of the losses of all samples."""

    def __add__(self, other: Count) -> Count:
        return Count(self.n + other.n, self.n_runs + other.n_runs, self.lost + other.lost,
                     self.lost_by_all + other.lost_by_all)

    def mean_loss(self) -> float:
        """Return the mean loss of the samples or that of the runs, whichever is less, for at least one run.

        The mean loss of the runs is less if a client repeats one request many times, which is evidence about that
        request alone.
        """
        return min(self.lost_by_all / self.n, self.lost / self.n_runs)


@dataclass(frozen=True)
class Waiting:
    """A sample with a new content that is not assigned to a block yet, and its copies that came in the meantime."""

    sample: Sample
    """The sample, with the largest loss of its copies."""
    count: Count
    """The sample and its copies."""

    def and_copy(self, loss: float, count: Count) -> Waiting:
        """Return this with a copy."""
        return Waiting(replace(self.sample, loss=max(self.sample.loss, loss)), self.count + count)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Waiting:
        """Read the JSON of a state. Version 0.2.0 stored the sample alone."""
        if "sample" in data:
            return cls(Sample.from_json(data["sample"]), Count(**data["count"]))
        sample = Sample.from_json(data)
        return cls(sample, Count(1, 1, sample.loss, sample.loss))


@dataclass(frozen=True)
class Block:
    """A block that has ended."""

    count: Count
    """The samples in it."""
    n_new: int = 0
    """The number of contents in it that are new: they are not among the remembered contents, see `Blocks.counted`."""
    lost_new: float = 0.0
    """The sum of the losses of the new contents. A content with several samples counts with the largest of their
    losses."""


@dataclass(frozen=True)
class Blocks:
    """The open block, and what is needed to tell where it ends.

    A block ends by the rule of `training.selection.blocks`: it ends where none of the next three samples is like any of
    the last three. It has at least half of the usual length, and it ends at the latest when it has the largest length.

    A sample whose content has come before, such as a health check, neither ends a block nor keeps it open. If the
    content is remembered from an earlier block, the sample is a block of its own, without new contents. If the content
    is in the open block, the sample counts in the open block, unless no new content has come for longer than a block
    lasts. Such a sample is a block of its own, too: the scene is over, and only its content is still asked for.
    """

    open: tuple[tuple[int | None, float], ...] = ()
    """Content and loss of each content in the open block."""
    count: Count = field(default_factory=Count)
    """The samples in the open block."""
    requests: float = 0.0
    """The number of requests, without copies, that have been served since the open block began."""
    requests_since_new: float = 0.0
    """The number of requests that have been served since the latest new content came."""
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
    """The content of the last sample."""
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
        repeats = sample.content is not None and sample.content == self.last
        count = Count(1, 0, 0.0, sample.loss) if repeats else Count(1, 1, sample.loss, sample.loss)
        blocks = replace(self, last=sample.content)
        if likeness is None:
            if repeats:
                return blocks, [Block(count)]
            blocks, closed = blocks._with(sample, count)._closed(n_remembered)
            return blocks, [closed]
        if blocks._is_copy(sample):
            return blocks._with_copy(sample, count, likeness)
        blocks = replace(blocks, requests_since_new=0.0, undecided=(*self.undecided, Waiting(sample, count)))
        ended = list[Block]()
        while len(blocks.undecided) >= REACH:
            first = blocks.undecided[0]
            if ends := blocks._ends_before_undecided(likeness):
                blocks, block = blocks._ended(likeness, n_remembered)
                ended += [block] if block else []
            blocks = replace(blocks, before=(*blocks.before, first.sample.components)[-REACH:],
                             requests=0.0 if ends or not blocks.before else blocks.requests + first.sample.requests,
                             undecided=blocks.undecided[1:])._with(first.sample, first.count)
        return blocks, ended

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Blocks:
        """Read the blocks from the JSON of a monitor's state.

        Raises:
            KeyError, TypeError: the JSON does not describe blocks.
        """
        is_open = tuple((content, loss) for content, loss in data["open"])
        # Version 0.2.0 stored no numbers of samples. Each content then counts as one.
        lost = sum(loss for _, loss in is_open)
        count = Count(**data["count"]) if "count" in data else Count(len(is_open), len(is_open), lost, lost)
        return cls(is_open, count, data["requests"], data.get("requests_since_new", 0.0),
                   tuple(map(tuple, data["before"])), tuple(map(Waiting.from_json, data["undecided"])),
                   tuple(data["counted"]), data["skips"], data["last"],
                   tuple(data.get("left_out", ())))

    def _with_copy(self, copy: Sample, count: Count, likeness: Likeness) -> tuple[Blocks, Sequence[Block]]:
        """Return these blocks with a copy of an earlier sample, and a block if the copy is one of its own.

        Args:
            copy: the copy.
            count: the copy as a count.
            likeness: how samples are compared.
        """
        blocks = replace(self, requests_since_new=self.requests_since_new + copy.requests)
        is_over = blocks.requests_since_new > likeness.most_requests
        ended = list[Block]()
        if is_over or copy.content in self.counted:
            # Where every second block is skipped, so are the copies that come meanwhile: they must not weigh more.
            ended, count = [Block(count)] if is_over or not self.skips else [], Count()
        waits = [one.sample.content for one in self.undecided]
        if copy.content in waits:
            place = waits.index(copy.content)
            return replace(blocks, undecided=(*self.undecided[:place], self.undecided[place].and_copy(copy.loss, count),
                                              *self.undecided[place + 1:])), ended
        return blocks._with(copy, count), ended

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

    def _with(self, sample: Sample, count: Count) -> Blocks:
        """Return these blocks with a sample, and the number of samples that it stands for, added to the open block."""
        is_open, left_out = self._contents_with(sample.content, sample.loss)
        return replace(self, count=self.count + count, open=is_open, left_out=left_out)

    def _contents_with(self, content: int | None, loss: float
                       ) -> tuple[tuple[tuple[int | None, float], ...], tuple[int, ...]]:
        """Return the contents of the open block with one more, and the contents that are left out then."""
        if content is not None and any(content == other for other, _ in self.open):
            return tuple((other, max(loss, found) if other == content else found)
                         for other, found in self.open), self.left_out
        if len(self.open) < _MOST_CONTENTS:
            return (*self.open, (content, loss)), self.left_out
        largest = max((other for other, _ in self.open if other is not None), default=None)
        if content is None or largest is None or content > largest:
            return self.open, self._left_out_with(content) if content in self.left_out else self.left_out
        kept = (one for one in self.open if one[0] != largest)
        return (*kept, (content, loss)), self._left_out_with(largest)

    def _left_out_with(self, content: int | None) -> tuple[int, ...]:
        """Return the contents that are left out, with one as the latest of them."""
        others = (other for other in self.left_out if other != content)
        return self.left_out if content is None else (*others, content)[-_MOST_CONTENTS:]

    def _closed(self, n_remembered: int) -> tuple[Blocks, Block]:
        """Close the open block, which is not empty. Return the blocks without it, and the closed block."""
        came = [content for content, _ in self.open if content is not None]
        known = {content for content in came if content in self.counted}
        new = [loss for content, loss in self.open if content not in known]
        others = tuple(content for content in self.counted if content not in known) if known else self.counted
        return (replace(self, open=(), count=Count(), counted=(*others, *came)[-n_remembered:], left_out=()),
                Block(self.count, len(new), sum(new)))
