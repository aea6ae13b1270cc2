"""The format numbers of files that another version of this software may have written, and the check of these numbers.

The rule: a number rises when its file changes in a way that the previous release could misread, and at most once
between two releases, however many changes there are. A version reads the number that it writes and the number that the
last release wrote; fields that the older file lacks take the defaults of their class. Every other number is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from early_exit.handler.errors import FormatError

_KEY = "format"


@dataclass(frozen=True)
class FileFormat:
    """One kind of file, and its numbers."""

    kind: str
    """The name of such a file in messages."""
    released: int
    """The number that the last release writes, or the first number of a kind that no release has yet."""
    written: int
    """The number that this version writes: the released one, or the one after it."""
    renewal: str
    """How a user gets a new file in place of one that is too old."""

    @property
    def readable(self) -> tuple[int, ...]:
        """All numbers that this version reads, ascending."""
        return tuple(sorted({self.released, self.written}))

    def stamped(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of a file with the number that this version writes."""
        return {_KEY: self.written, **content}

    def require(self, content: object, source: object) -> None:
        """Check that this version can read a file.

        Args:
            content: what the file holds, or its metadata; the number may be an integer or its digits.
            source: names the file in messages.

        Raises:
            FormatError: the file has no number, or one that this version does not read.
        """
        number = str(content.get(_KEY)) if isinstance(content, Mapping) else ""
        if not number.isdecimal():
            raise FormatError(f"{source} has no format number, where {self.kind} was expected")
        if int(number) in self.readable:
            return
        remedy = f"{self.renewal}, or use the version of early-exit-torchserve that wrote it"
        if int(number) > self.written:
            remedy = "use the version of early-exit-torchserve that wrote it, or a newer one"
        raise FormatError(f"{source} is {self.kind} of format {number}, this version reads "
                          f"{' and '.join(map(str, self.readable))}: {remedy}")


BACKBONE = FileFormat("the description of a backbone", 2, 3,
                      "make the archive again with ee-archive, from the one that you had before")
HANDLER = FileFormat("the description of a handler", 1, 1,
                     "make the archive again with ee-archive, from the one that you had before")
SAMPLES = FileFormat("a file of sample requests", 1, 1,
                     "make the archive again with ee-archive, from the one that you had before")
ANSWERS = FileFormat("a file of answers to sample requests", 1, 1,
                     "make the archive again with ee-archive, from the one that you had before")
PLAN = FileFormat("an exit plan", 1, 1, "make the plan again with ee-train")
RECORDS = FileFormat("a record shard", 2, 3, "record again with an archive of this version")
MONITOR_STATE = FileFormat("the state of a monitor", 1, 2, "delete it when the version that wrote it no longer serves")
FORMATS = (BACKBONE, HANDLER, SAMPLES, ANSWERS, PLAN, RECORDS, MONITOR_STATE)
