"""The answers of an archive that was tried out."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from early_exit.handler.errors import ArchiveError
from early_exit.handler.formats import ANSWERS


@dataclass(frozen=True)
class Answer:
    """The response that a client gets for one request."""

    status: int
    """The HTTP status."""
    content_type: str
    """The content type that the handler set; empty if TorchServe chooses one."""
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The response headers that the handler set; they are not stored."""

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "content_type": self.content_type, "body": base64.b64encode(self.body).decode()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        return cls(data["status"], data["content_type"], base64.b64decode(data["body"]))

    def __str__(self) -> str:
        text = self.body.decode(errors="backslashreplace")
        return f"{self.status} {self.content_type} {text if len(text) <= 500 else text[:500] + ' ...'}".strip()


@dataclass(frozen=True)
class Batch:
    """Samples that are answered together, and the kind of the answer."""

    samples: tuple[int, ...]
    """The numbers of the samples, in order."""
    explain: bool = False
    """Whether explanations are asked for instead of predictions."""

    def __str__(self) -> str:
        numbers = ", ".join(str(number + 1) for number in self.samples)
        return f"{'the explanation of ' if self.explain else ''}sample{'s' * (len(self.samples) > 1)} {numbers}"


@dataclass(frozen=True)
class AnsweredBatch:
    """The answers to a batch."""

    batch: Batch
    answers: tuple[Answer, ...]
    """One answer for each sample of the batch, in order."""
    unstable: tuple[tuple[str, ...], ...] = ()
    """For each sample, the paths in the body at which the original's answers to two equal requests differ."""


def batches_of(n_samples: int) -> list[Batch]:
    """Return the batches in which samples are answered: alone, together, and together in the other order."""
    together = [Batch((0, 1)), Batch((1, 0))] if n_samples > 1 else [Batch((0, 0))]
    return [*(Batch((number,)) for number in range(min(2, n_samples))), *together]


def save_answers(path: Path, answered: Iterable[AnsweredBatch]) -> None:
    """Write the answers of an archive."""
    path.write_text(json.dumps(ANSWERS.stamped({"batches": [
        {"samples": one.batch.samples, "explain": one.batch.explain, "unstable": one.unstable,
         "answers": [answer.to_json() for answer in one.answers]} for one in answered]}), indent=1))


def load_answers(path: Path) -> list[AnsweredBatch]:
    """Read what `save_answers` wrote.

    Raises:
        FormatError: this version does not read the format of the file.
        ArchiveError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        ANSWERS.require(content, path)
        return [AnsweredBatch(Batch(tuple(one["samples"]), one["explain"]),
                              tuple(Answer.from_json(answer) for answer in one["answers"]),
                              tuple(tuple(paths) for paths in one["unstable"])) for one in content["batches"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"cannot read the answers in {path}: {error!r}") from error


def as_read(body: bytes) -> Any:
    """Return the body of an answer as parsed JSON, or else as text; None for other bytes."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
